//! The inventory as a slow, obviously right model: maps and brute force.

use std::collections::{BTreeMap, BTreeSet};

use virt_usb_model::{
    BusAddress, ClaimState, Device, DeviceId, DeviceRequest, InstanceId, ProjectId, RuleVerdict,
    Serial, Status, UnavailableReason,
};
use virt_usb_store::Source;

use crate::common::PENDING_GRACE;

/// Identity of a device: its serial, or otherwise its socket, regardless of the bus number.
pub(crate) fn identity(device: &Device) -> String {
    match &device.key.serial {
        Serial::Unique(serial) => format!("{} {serial}", device.key.usb),
        _ => format!("{} at {:?}", device.key.usb, device.key.path),
    }
}

#[derive(Debug, Clone)]
pub(crate) struct Row {
    pub(crate) device: Device,
    pub(crate) verdict: RuleVerdict,
    pub(crate) present: bool,
}

#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Claim {
    pub(crate) instance: InstanceId,
    pub(crate) allocated: bool,
    pub(crate) lasting: bool,
    pub(crate) pending: Option<f64>,
    pub(crate) boot: String,
    /// No request is served by it.
    pub(crate) unasked: bool,
    /// Whether the device is in a handwritten hostdev.
    pub(crate) by_hand: bool,
    /// When a restore named it while it was firm.
    pub(crate) named: Option<f64>,
    /// Claimed for a guest that comes in with it: not allocated before it was out of that guest.
    pub(crate) needs_reattach: bool,
    /// In the guest, at any time of this run of it.
    pub(crate) seen: bool,
}

#[derive(Debug, Clone, Default)]
pub(crate) struct Model {
    pub(crate) ids: BTreeMap<String, DeviceId>,
    pub(crate) rows: BTreeMap<DeviceId, Row>,
    pub(crate) claims: BTreeMap<DeviceId, Claim>,
    pub(crate) assignments: BTreeMap<InstanceId, Vec<(Source, DeviceRequest)>>,
    pub(crate) flavors: BTreeSet<String>,
}

impl Model {
    pub(crate) fn status(&self, id: DeviceId) -> Option<Status> {
        let row = &self.rows[&id];
        let hold = self
            .claims
            .get(&id)
            .map(|c| if c.allocated { ClaimState::Allocated } else { ClaimState::Claimed });
        Status::derive(hold, row.present, row.verdict.withheld)
    }

    pub(crate) fn of(&self, instance: InstanceId) -> BTreeSet<DeviceId> {
        self.claims.iter().filter(|(_, c)| c.instance == instance).map(|(id, _)| *id).collect()
    }

    /// A claim ends with the boot; held for the instance, it only leaves the guest. Unconfirmed, it
    /// ends after a while.
    pub(crate) fn sweep(&mut self, boot: &str, uptime: f64) {
        self.claims.retain(|_, c| match c.pending {
            Some(since) => c.boot == boot && since >= uptime - PENDING_GRACE,
            None => c.boot == boot || c.lasting,
        });
        for claim in self.claims.values_mut().filter(|c| c.boot != boot) {
            (claim.allocated, claim.needs_reattach, claim.named, claim.seen) =
                (false, false, None, false);
            claim.boot = boot.into();
        }
    }

    /// Whether the instance's guest runs, as far as its claims tell.
    pub(crate) fn runs(&self, instance: InstanceId, boot: &str) -> bool {
        let runs = |c: &Claim| c.pending.is_none() && c.boot == boot && (c.allocated || !c.lasting);
        self.claims.values().any(|c| c.instance == instance && runs(c))
    }

    /// The instance now holds exactly `ids`, what was adopted and what its XML holds (`inside`).
    /// Who comes in and may yet fail to (`since`) loses
    /// nothing: what was firm stays as it was.
    pub(crate) fn grant(
        &mut self,
        instance: InstanceId,
        ids: &BTreeSet<DeviceId>,
        inside: &[DeviceId],
        lasting: bool,
        since: Option<f64>,
        boot: &str,
    ) {
        let kept = |id: &DeviceId, c: &Claim| {
            c.unasked || since.is_some() || ids.contains(id) || inside.contains(id)
        };
        self.claims.retain(|id, c| c.instance != instance || kept(id, c));
        for (id, claim) in
            self.claims.iter_mut().filter(|(_, c)| c.instance == instance && since.is_none())
        {
            if !ids.contains(id) && !claim.unasked {
                (claim.by_hand, claim.unasked, claim.lasting) = (true, true, false);
            }
        }
        for id in ids {
            let new = Claim {
                instance,
                allocated: false,
                lasting,
                pending: since,
                boot: boot.into(),
                unasked: false,
                by_hand: false,
                named: None,
                needs_reattach: since.is_some(),
                seen: false,
            };
            match self.claims.get_mut(id) {
                Some(firm) if since.is_some() && firm.pending.is_none() => firm.named = since,
                Some(claim) => {
                    claim.lasting = lasting;
                    claim.unasked = false;
                    claim.by_hand &= since.is_some() || inside.contains(id);
                    claim.named = None;
                    claim.pending = since;
                    claim.needs_reattach |= since.is_some();
                }
                None => drop(self.claims.insert(*id, new)),
            }
        }
    }

    /// A handwritten hostdev arrives with this device.
    pub(crate) fn receive_by_hand(
        &mut self,
        instance: InstanceId,
        id: DeviceId,
        since: f64,
        boot: &str,
    ) {
        let new = Claim {
            instance,
            allocated: false,
            lasting: false,
            pending: Some(since),
            boot: boot.into(),
            unasked: true,
            by_hand: true,
            named: None,
            needs_reattach: true,
            seen: false,
        };
        match self.claims.get_mut(&id) {
            Some(firm) if firm.pending.is_none() => firm.named = Some(since),
            Some(claim) => *claim = Claim { boot: claim.boot.clone(), ..new },
            None => drop(self.claims.insert(id, new)),
        }
    }

    /// A flavor's requests are these from now on; those of operators stay.
    pub(crate) fn assign(&mut self, instance: InstanceId, requests: Vec<DeviceRequest>) {
        let all = self.assignments.entry(instance).or_default();
        let is_flavors = |(source, _): &&(Source, DeviceRequest)| *source == Source::Flavor;
        if !all.iter().filter(is_flavors).map(|(_, request)| request).eq(&requests) {
            all.retain(|one| !is_flavors(&one));
            all.extend(requests.into_iter().map(|request| (Source::Flavor, request)));
        }
    }

    /// The guest is about to start with `inside`; `lost`: without a device that it comes in with.
    pub(crate) fn enter(
        &mut self,
        instance: InstanceId,
        inside: &BTreeSet<DeviceId>,
        lost: bool,
    ) -> bool {
        if lost {
            return true;
        }
        let mine = || self.claims.iter().filter(|(_, c)| c.instance == instance);
        if !mine().any(|(id, c)| c.needs_reattach && inside.contains(id)) {
            return false;
        }
        self.claims.retain(|id, c| {
            c.instance != instance || inside.contains(id) || (c.pending.is_none() && c.lasting)
        });
        true
    }

    /// The guest runs with `in_guest` (`started`: that is the start of it); or it does not run.
    pub(crate) fn set_states(
        &mut self,
        instance: InstanceId,
        in_guest: Option<&[DeviceId]>,
        started: bool,
        boot: &str,
    ) {
        for (id, claim) in self.claims.iter_mut().filter(|(_, c)| c.instance == instance) {
            let valid = claim.boot == boot || (claim.lasting && claim.pending.is_none());
            if !valid || (!started && claim.pending.is_some()) {
                continue;
            }
            let inside = in_guest.is_some_and(|ids| ids.contains(id));
            claim.needs_reattach &= inside;
            claim.allocated = inside && !claim.needs_reattach;
            claim.seen = in_guest.is_some() && (claim.seen || claim.allocated);
            (claim.pending, claim.named) = (None, None);
            claim.boot = boot.into();
        }
    }

    /// Ends the claims of the instance; says which.
    pub(crate) fn release(
        &mut self,
        instance: InstanceId,
        everything: bool,
        boot: &str,
    ) -> BTreeSet<DeviceId> {
        let kept = |c: &Claim| !everything && c.lasting && c.pending.is_none();
        let ended: BTreeSet<_> =
            self.of(instance).into_iter().filter(|id| !kept(&self.claims[id])).collect();
        self.claims.retain(|id, _| !ended.contains(id));
        for claim in self.claims.values_mut().filter(|c| c.instance == instance) {
            (claim.allocated, claim.needs_reattach, claim.named, claim.seen) =
                (false, false, None, false);
            claim.boot = boot.into();
        }
        if everything {
            self.assignments.remove(&instance);
        }
        ended
    }

    /// Devices that the instance may get for the request, if they are at their recorded ports.
    /// `keeps`: the instance keeps its devices, whatever project they are for.
    pub(crate) fn eligible(
        &self,
        world: &[(Device, RuleVerdict)],
        instance: InstanceId,
        project: Option<&ProjectId>,
        request: &DeviceRequest,
        keeps: bool,
    ) -> BTreeSet<DeviceId> {
        let free = |id: &DeviceId| self.status(*id) == Some(Status::Available);
        let mine = |id: &DeviceId| self.claims.get(id).is_some_and(|c| c.instance == instance);
        let allowed = |row: &Row| {
            row.verdict.projects.is_empty()
                || project.is_some_and(|p| row.verdict.projects.iter().any(|granted| granted.is(p)))
        };
        let fits = |id: &DeviceId, row: &Row| {
            request.selector.matches(*id, &row.device, &row.verdict.tags)
                && (allowed(row) || (keeps && mine(id)))
                && (free(id) || mine(id))
                && where_is(world, &row.device).is_some()
        };
        self.rows.iter().filter(|(id, row)| fits(id, row)).map(|(id, _)| *id).collect()
    }
}

/// Where the device really is, if it is at the port that the inventory has.
pub(crate) fn where_is(world: &[(Device, RuleVerdict)], known: &Device) -> Option<BusAddress> {
    world.iter().map(|(d, _)| d).find(|d| is_same_place(d, known)).map(|d| d.address)
}

/// The same device in the same socket, whatever number its bus has.
pub(crate) fn is_same_place(one: &Device, other: &Device) -> bool {
    one.key.usb == other.key.usb
        && one.key.serial == other.key.serial
        && one.key.path == other.key.path
}

/// Whether each row can have a device of its own, by trying everything.
pub(crate) fn can_serve(rows: &[BTreeSet<DeviceId>], used: &mut Vec<DeviceId>) -> bool {
    let Some((first, rest)) = rows.split_first() else { return true };
    first.iter().any(|id| {
        if used.contains(id) {
            return false;
        }
        used.push(*id);
        let served = can_serve(rest, used);
        used.pop();
        served
    })
}

pub(crate) const WITHHELD: UnavailableReason = UnavailableReason::Whitelist;
