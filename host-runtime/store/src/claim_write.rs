//! Writing what was chosen for a claim: decides nothing.

use rusqlite::params;
use virt_usb_model::DeviceId;
use virt_usb_model::state::{ClaimState, Status};

use crate::claim::{ClaimMode, ClaimRequest, Claimant, Granted};
use crate::device::{self, ClaimRow, refresh, sql_id, step_revision};
use crate::error::Sql;
use crate::events::{Event, record};
use crate::hints::{HintSubject, Hints};
use crate::open::{Tx, TxError};
use crate::{Context, NOW, nova_metadata, release};

pub(crate) struct ClaimWrite<'a> {
    pub(crate) tx: &'a Tx<'a>,
    pub(crate) hints: &'a Hints,
    pub(crate) claimant: &'a Claimant,
    /// Claims of the instance.
    pub(crate) mine: &'a [ClaimRow],
    /// Devices in the domain's own XML.
    pub(crate) prefer: &'a [DeviceId],
    pub(crate) mode: ClaimMode,
    pub(crate) context: &'a Context,
}

impl ClaimWrite<'_> {
    pub(crate) fn write(
        &self,
        requests: &[ClaimRequest],
        chosen: &[Granted],
    ) -> Result<(), TxError> {
        // What was adopted from the domain's own XML was never asked for: it stays until release.
        // And an incoming guest that may yet fail to arrive loses nothing.
        let replaces = self.mode == ClaimMode::Replace;
        let asked_for = self.mine.iter().filter(|c| replaces && c.request.is_some());
        let (by_hand, given_up): (Vec<&ClaimRow>, Vec<&ClaimRow>) = asked_for
            .filter(|c| chosen.iter().all(|g| g.device.entry.id != c.device_id))
            .partition(|c| self.prefer.contains(&c.device_id));
        if given_up.is_empty()
            && by_hand.is_empty()
            && chosen.iter().all(|g| self.is_as_was(g, requests.get(g.request)))
        {
            return Ok(());
        }
        step_revision(self.tx)?;
        for claim in given_up {
            release::delete(self.tx, claim, "released", "no longer requested", self.context)?;
        }
        // The device is no longer requested, but the guest still starts with it.
        for claim in by_hand {
            let sql = "UPDATE claims SET by_hand = 1, request = NULL, hold = 'running', revision = \
                (SELECT max(revision) FROM compute_nodes) WHERE id = ?1";
            self.tx.prepare_cached(sql)?.execute([claim.id])?;
            if claim.is_lasting() && !claim.pending {
                self.tx.mark_lasting();
            }
        }
        let known = HintSubject::Instance(self.claimant.instance);
        if chosen.iter().any(|g| self.outlives_the_boot(g, requests.get(g.request))) {
            self.tx.mark_lasting();
            self.hints.add_lasting(known)?;
        } else if !chosen.is_empty() {
            self.hints.add(known)?;
        }
        for granted in chosen {
            self.claim(granted, requests.get(granted.request))?;
        }
        nova_metadata::refresh(self.tx, self.claimant.instance)?;
        Ok(())
    }

    fn held(&self, device: DeviceId) -> Option<&ClaimRow> {
        self.mine.iter().find(|c| c.device_id == device)
    }

    /// Whether the device is in a handwritten hostdev: the claim records that as long as the XML
    /// has the hostdev.
    fn by_hand(&self, device: DeviceId) -> bool {
        self.held(device).is_some_and(|c| {
            c.by_hand && (self.mode != ClaimMode::Replace || self.prefer.contains(&device))
        })
    }

    /// Whether what is written of this claim must survive a power cut: the claim is held for the
    /// instance, or was. What waits to be confirmed ends with the boot.
    fn outlives_the_boot(&self, granted: &Granted, want: Option<&ClaimRequest>) -> bool {
        let was =
            || self.held(granted.device.entry.id).is_some_and(|c| c.is_lasting() && !c.pending);
        self.mode != ClaimMode::Provisional && (hold_name(want) == "instance" || was())
    }

    /// Nothing to write for this one: the same claim, the same request, firm, where it was stored.
    fn is_as_was(&self, granted: &Granted, want: Option<&ClaimRequest>) -> bool {
        let entry = &granted.device.entry;
        let same_claim = self.held(entry.id).is_some_and(|c| {
            c.request == Some(position(granted, want))
                && !c.pending
                && !c.ending
                && self.mode != ClaimMode::Provisional
                && c.incoming_since.is_none()
                && c.by_hand == self.by_hand(entry.id)
                && c.hold == hold_name(want)
                && c.domain == self.claimant.domain
        });
        same_claim && granted.stored == granted.device.location()
    }

    fn claim(&self, granted: &Granted, want: Option<&ClaimRequest>) -> Sql<()> {
        let device = granted.device.entry.id;
        let pending = (self.mode == ClaimMode::Provisional).then_some(self.context.uptime);
        if pending.is_some() && self.held(device).is_some_and(|c| !c.pending) {
            return name_incoming(self.tx, device, self.context);
        }
        let what = params![
            sql_id(device),
            self.claimant.instance.to_string(),
            self.claimant.domain,
            self.claimant.project.as_ref().map(ToString::to_string),
            position(granted, want),
            hold_name(want),
            pending,
            self.context.boot_id,
            self.by_hand(device),
        ];
        if self.held(device).is_some() {
            let sql = "UPDATE claims SET domain = ?3, project_id = ?4, request = ?5, hold = ?6, \
                pending_since = ?7, incoming_since = NULL,
                 by_hand = ?9, arrived = arrived OR ?7 IS NOT NULL, ending = 0, boot_id = ?8, \
                 revision = (SELECT max(revision) FROM compute_nodes) WHERE device_id = ?1 AND \
                 instance_uuid = ?2";
            self.tx.prepare_cached(sql)?.execute(what)?;
        } else {
            let sql = format!(
                "INSERT INTO claims (created_at, device_id, instance_uuid, domain, project_id, \
                    request, state, hold, pending_since, arrived, boot_id, revision, descriptors, \
                    by_hand)
                 VALUES ({NOW}, ?1, ?2, ?3, ?4, ?5, 'claimed', ?6, ?7, ?7 IS NOT NULL, ?8,
                 (SELECT max(revision) FROM compute_nodes), (SELECT descriptors FROM usb_devices \
                 WHERE id = ?1), ?9)"
            );
            self.tx.prepare_cached(&sql)?.execute(what)?;
        }
        let seen = granted.device.location();
        if granted.stored != seen {
            device::set_location(self.tx, device, &seen)?;
        }
        if self.held(device).is_some() {
            return refresh(self.tx, device);
        }
        let (present, withheld) = (granted.device.present, granted.device.withheld);
        let status = Status::derive(Some(ClaimState::Claimed), present, withheld);
        device::write_state(self.tx, device, status, Some(&self.claimant.instance.to_string()))?;
        let detail = match self.mode {
            ClaimMode::Replace | ClaimMode::Add => format!("usb_devices[{}]", granted.request),
            ClaimMode::Provisional => format!("usb_devices[{}], pending", granted.request),
        };
        record(
            self.tx,
            self.context,
            &Event::of("claimed", self.claimant).about(device).with(detail),
        )
    }
}

/// A restore names the device of a firm claim. Nothing of the claim changes, its revision neither:
/// its guest may run.
pub(crate) fn name_incoming(tx: &Tx<'_>, device: DeviceId, context: &Context) -> Sql<()> {
    tx.prepare_cached("UPDATE claims SET incoming_since = ?2 WHERE device_id = ?1")?
        .execute(params![sql_id(device), context.uptime])?;
    Ok(())
}

/// The request that the claim says it serves.
fn position(granted: &Granted, want: Option<&ClaimRequest>) -> u32 {
    let here = || u32::try_from(granted.request).unwrap_or(u32::MAX);
    want.and_then(|w| w.number).unwrap_or_else(here)
}

fn hold_name(want: Option<&ClaimRequest>) -> &'static str {
    if want.is_some_and(|w| w.lasting) { "instance" } else { "running" }
}
