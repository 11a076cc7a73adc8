//! Adoption of the devices that a domain's own XML already holds: a handwritten hostdev, or one
//! that a running guest has when the daemon returns.
//!
//! One rule applies at prepare, restore, migrate and reconnect: the device is claimed for the
//! domain regardless of the rules, because the author of the XML may assign devices. A guest is
//! refused only if another instance holds its device, or if the device is set aside.

use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

use rusqlite::types::Value;
use rusqlite::{params, params_from_iter};
use virt_usb_model::{BusAddress, DeviceId, PortPath, UsbId};

use crate::allocate::Choice;
use crate::claim::{
    self, ClaimMode, ClaimRequest, ClaimVerifier, Claimant, Claimed, Granted, Shortage, Verified,
};
use crate::claim_write::name_incoming;
use crate::device::{self, ClaimRow, Location, Record, refresh, sql_id, step_revision};
use crate::error::Sql;
use crate::events::{Event, record};
use crate::hints::{HintSubject, Hints};
use crate::open::{Tx, TxError};
use crate::{Context, NOW, Store, StoreError, nova_metadata, quarantine, release};

/// A hostdev as the XML names its source.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Holding {
    /// From an alias of our form. It counts where this instance has a claim on that device; others
    /// use the form too.
    pub id: Option<DeviceId>,
    /// From vendor and product.
    pub usb: Option<UsbId>,
    /// From the source's address.
    pub address: Option<BusAddress>,
    /// From the source's port on the host.
    pub port: Option<PortPath>,
}

/// Result of the adoption of one holding.
#[derive(Debug, Clone, PartialEq)]
pub enum Adoption {
    /// Now claimed for the instance.
    New(DeviceId),
    /// The instance already held the device.
    AlreadyYours(DeviceId),
    /// Another instance holds it.
    HeldBy(Box<Record>, Box<ClaimRow>),
    /// The device is disabled, quarantined or flapping, regardless of the rules: no guest starts
    /// with it.
    SetAside(Box<Record>),
    /// The current restore or migration claimed the device for the instance, but it is no longer at
    /// the hostdev's address.
    Lost(DeviceId),
    /// The inventory has no such device, or cannot identify it.
    Unknown,
}

impl Adoption {
    /// The device, where the instance has it now.
    pub const fn device(&self) -> Option<DeviceId> {
        match self {
            Self::New(id) | Self::AlreadyYours(id) => Some(*id),
            Self::HeldBy(..) | Self::SetAside(_) | Self::Lost(_) | Self::Unknown => None,
        }
    }
}

/// How far the instance has come with what is adopted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// The guest is about to start.
    Starting,
    /// The guest runs with it.
    Running,
}

/// Devices in the own XML of a domain that is about to start.
#[derive(Debug, Clone, PartialEq)]
pub struct Entered {
    /// One answer a holding.
    pub adopted: Vec<Adoption>,
    /// The guest comes in by restore or migration, with what was claimed for it then.
    pub arriving: bool,
}

/// Devices for a guest that is restored or migrated.
#[derive(Debug, Clone, PartialEq)]
pub enum Received {
    /// All of it, until it is confirmed.
    Granted {
        /// The devices of `ours`.
        ours: Vec<Granted>,
        /// The devices of `by_hand` with their addresses, one entry per holding; `None` if the
        /// inventory has no such device or cannot identify it.
        by_hand: Vec<Option<(DeviceId, BusAddress)>>,
    },
    /// Not enough devices for `ours`; nothing was taken.
    Short(Vec<Shortage>),
    /// The guest cannot take them; nothing was taken.
    Unfit(String),
    /// Another instance holds a device of `by_hand`; nothing was taken.
    HeldBy(Box<Record>, Box<ClaimRow>),
    /// A device of `by_hand` is set aside; nothing was taken.
    SetAside(Box<Record>),
}

impl Store {
    /// Claims what the domain's own XML holds, one answer a holding. What another instance holds
    /// stays with it. What is set aside is adopted only from a guest that runs with it. A pending
    /// claim stays pending at [`Stage::Running`]: the guest may have run before it was made.
    ///
    /// # Errors
    /// When the database cannot be written; then nothing was adopted.
    pub fn adopt(
        &mut self,
        claimant: &Claimant,
        holdings: &[Holding],
        stage: Stage,
        verifier: &mut dyn ClaimVerifier,
        context: &Context,
    ) -> Result<Vec<Adoption>, StoreError> {
        self.write(|tx, hints| adopt(tx, hints, claimant, holdings, stage, verifier, context))
    }

    /// The domain is about to start with what its own XML holds: [`Store::adopt`]. Where it comes
    /// in by restore or migration, what was claimed for it then stands from now on, each claim with
    /// its request and its hold; of the rest it keeps what is held for the instance. If a device of
    /// those is lost, all claims stay as they are: the guest cannot start.
    ///
    /// # Errors
    /// When the database cannot be written; then nothing was adopted.
    pub fn enter(
        &mut self,
        claimant: &Claimant,
        holdings: &[Holding],
        verifier: &mut dyn ClaimVerifier,
        context: &Context,
    ) -> Result<Entered, StoreError> {
        self.write(|tx, hints| {
            let mut adopted =
                adopt(tx, hints, claimant, holdings, Stage::Starting, verifier, context)?;
            let inside: BTreeSet<DeviceId> = adopted.iter().filter_map(Adoption::device).collect();
            let mine = release::held(tx, claimant.instance)?;
            let mut lost = false;
            for (adopted, holding) in adopted.iter_mut().zip(holdings) {
                let comes = |c: &&ClaimRow| {
                    Some(c.device_id) == holding.id && !c.by_hand && is_coming(c, context)
                };
                if let (Adoption::Unknown, Some(claim)) = (&*adopted, mine.iter().find(comes)) {
                    *adopted = Adoption::Lost(claim.device_id);
                    lost = true;
                }
            }
            let arriving =
                lost || mine.iter().any(|c| c.needs_reattach && inside.contains(&c.device_id));
            if arriving && !lost {
                let strays: Vec<&ClaimRow> = mine
                    .iter()
                    .filter(|c| !inside.contains(&c.device_id) && (c.pending || !c.is_lasting()))
                    .collect();
                if !strays.is_empty() {
                    step_revision(tx)?;
                }
                for claim in strays {
                    release::delete(tx, claim, "released", "not in the incoming guest", context)?;
                }
                nova_metadata::refresh(tx, claimant.instance)?;
            }
            Ok(Entered { adopted, arriving })
        })
    }

    /// Claims the devices of an incoming guest, all or nothing, until its next [`Store::enter`] or
    /// start: devices for `ours`, and those of handwritten hostdevs. A device whose address is
    /// outdated is replaced by the only device of its kind, or with `equivalent` by any device of
    /// its kind.
    ///
    /// libvirt asks before it looks whether the guest runs. Where it does, by its claims, the
    /// answer is the same and nothing is written.
    ///
    /// # Errors
    /// When the database cannot be written; then nothing was taken.
    pub fn receive(
        &mut self,
        claimant: &Claimant,
        ours: &[ClaimRequest],
        by_hand: &[Holding],
        equivalent: bool,
        verifier: &mut dyn ClaimVerifier,
        context: &Context,
    ) -> Result<Received, StoreError> {
        self.write(|tx, hints| {
            release::sweep(tx, context)?;
            let mine = release::held(tx, claimant.instance)?;
            let runs = mine.iter().any(|c| c.is_of_a_run(&context.boot_id));
            if runs {
                tx.execute_batch("SAVEPOINT look")?;
            }
            let received = Arrival { tx, hints, claimant, mine, context }
                .settle(ours, by_hand, equivalent, verifier)?;
            if runs {
                tx.execute_batch("ROLLBACK TO look; RELEASE look")?;
            }
            Ok(received)
        })
    }
}

fn adopt(
    tx: &Tx<'_>,
    hints: &Hints,
    claimant: &Claimant,
    holdings: &[Holding],
    stage: Stage,
    verifier: &mut dyn ClaimVerifier,
    context: &Context,
) -> Result<Vec<Adoption>, TxError> {
    release::sweep(tx, context)?;
    let mine = release::held(tx, claimant.instance)?;
    // What is adopted for one holding does not decide which device the next one means.
    let mut finder = Finder::new(tx, &mine, claimant, verifier);
    let mut found =
        holdings.iter().take(MAX_HOLDINGS).map(|h| finder.find(h)).collect::<Sql<Vec<_>>>()?;
    found.resize_with(holdings.len(), || None);
    // Two hostdevs may mean one device: if one of them has our alias, both are ours.
    let ours: BTreeSet<DeviceId> =
        found.iter().flatten().filter(|f| f.ours).map(|f| f.device.entry.id).collect();
    let mut adopted = Vec::new();
    // What was inserted here. A claim is read once, however many hostdevs there are.
    let mut new = BTreeSet::new();
    if found.iter().any(Option::is_some) {
        hints.add(HintSubject::Instance(claimant.instance))?;
    }
    for found in found {
        let Some(found) = found else {
            adopted.push(Adoption::Unknown);
            continue;
        };
        let device = &found.device;
        let id = device.entry.id;
        if let Some(claim) = release::holder(tx, id, claimant.instance)? {
            adopted.push(Adoption::HeldBy(Box::new(found.device), Box::new(claim)));
            continue;
        }
        if stage == Stage::Starting && device.is_set_aside() && device.entry.instance_uuid.is_none()
        {
            adopted.push(Adoption::SetAside(Box::new(found.device)));
            continue;
        }
        device::set_location(tx, id, &found.seen)?;
        adopted.push(match mine.iter().find(|c| c.device_id == id) {
            Some(claim) => {
                keep(tx, claim, ours.contains(&id), stage, context)?;
                Adoption::AlreadyYours(id)
            }
            None if new.insert(id) => {
                insert(tx, claimant, id, stage == Stage::Running, None, context)?;
                Adoption::New(id)
            }
            None => Adoption::AlreadyYours(id),
        });
    }
    nova_metadata::refresh(tx, claimant.instance)?;
    Ok(adopted)
}

/// A device that a holding means.
struct MatchedDevice {
    device: Record,
    /// Where it really is.
    seen: Location,
    /// The alias says so, and a claim of this instance that is not by hand.
    ours: bool,
}

/// Maximum number of hostdevs of a domain that are checked. No guest can have more USB devices. The
/// write lock is held during the check, and the domain's author decides how long its XML is.
pub const MAX_HOLDINGS: usize = 1024;

/// Identity that a holding names in addition to an address and a port.
type NamedIdentity = (Option<DeviceId>, Option<UsbId>);

/// Finds out which devices holdings mean. The stored address is a memory, so the ports are asked.
/// Rows are read once for each id or kind that is named, and each port is asked once, however many
/// holdings there are.
struct Finder<'a> {
    tx: &'a Tx<'a>,
    /// Claims of the instance.
    mine: &'a [ClaimRow],
    claimant: &'a Claimant,
    verifier: &'a mut dyn ClaimVerifier,
    candidates: BTreeMap<NamedIdentity, Rc<[Record]>>,
    seen: BTreeMap<DeviceId, Option<Location>>,
}

impl<'a> Finder<'a> {
    fn new(
        tx: &'a Tx<'a>,
        mine: &'a [ClaimRow],
        claimant: &'a Claimant,
        verifier: &'a mut dyn ClaimVerifier,
    ) -> Self {
        let (candidates, seen) = <_>::default();
        Self { tx, mine, claimant, verifier, candidates, seen }
    }

    fn look(&mut self, device: &Record) -> Option<&Location> {
        let verifier = &mut *self.verifier;
        let seen =
            self.seen.entry(device.entry.id).or_insert_with(|| match verifier.verify(device) {
                Verified::Here(seen) => Some(seen),
                Verified::Not(_) => None,
            });
        seen.as_ref()
    }

    /// The device that a holding names; `None` if it cannot be identified. Among several
    /// candidates, the device that the instance already holds is chosen.
    fn find(&mut self, holding: &Holding) -> Sql<Option<MatchedDevice>> {
        let claim = self.claim(holding)?;
        if claim.is_none()
            && holding.usb.is_none()
            && holding.address.is_none()
            && holding.port.is_none()
        {
            return Ok(None);
        }
        let id = claim.map(|c| c.device_id);
        let ours = claim.is_some_and(|c| !c.by_hand);
        let mut there = self.matching(holding, id, true, usize::MAX)?;
        if there.is_empty() {
            // Two are as many as cannot be told apart.
            there = self.matching(holding, id, false, 2)?;
        }
        let only = there.pop();
        Ok(if there.is_empty() {
            only.map(|(device, seen)| MatchedDevice { device, seen, ours })
        } else {
            None
        })
    }

    /// The claim of this instance that the alias names, if the source names a device of that kind.
    fn claim(&self, holding: &Holding) -> Sql<Option<&'a ClaimRow>> {
        let Some(claim) = self.mine.iter().find(|c| Some(c.device_id) == holding.id) else {
            return Ok(None);
        };
        let is_kind: bool = self
            .tx
            .prepare_cached(
                "SELECT EXISTS (SELECT 1 FROM usb_devices WHERE id = ?1 AND (?2 IS NULL OR \
                    vendor_id = ?2) AND (?3 IS NULL OR product_id = ?3))",
            )?
            .query_row(
                params![
                    sql_id(claim.device_id),
                    holding.usb.map(|u| u.vendor.to_string()),
                    holding.usb.map(|u| u.product.to_string())
                ],
                |row| row.get(0),
            )?;
        Ok(is_kind.then_some(claim))
    }

    /// The devices that are plugged in and that the id and the kind fit.
    fn candidates(&mut self, named: NamedIdentity) -> Sql<Rc<[Record]>> {
        if let Some(known) = self.candidates.get(&named) {
            return Ok(known.clone());
        }
        let (id, usb) = named;
        // Spelled so that an index finds them.
        let mut sql = "SELECT * FROM usb_devices WHERE deleted = 0 AND present = 1".to_owned();
        let mut values = Vec::new();
        if let Some(id) = id {
            sql.push_str(" AND id = ?");
            values.push(Value::from(sql_id(id)));
        }
        if let Some(usb) = usb {
            sql.push_str(" AND vendor_id = ? AND product_id = ?");
            values.extend([usb.vendor.to_string().into(), usb.product.to_string().into()]);
        }
        sql.push_str(" ORDER BY id");
        let read: Rc<[Record]> = self
            .tx
            .prepare_cached(&sql)?
            .query_map(params_from_iter(values), Record::read)?
            .collect::<Sql<_>>()?;
        self.candidates.insert(named, read.clone());
        Ok(read)
    }

    /// At most `most` devices that are where the holding has them, and are the instance's (`mine`)
    /// or not.
    fn matching(
        &mut self,
        holding: &Holding,
        id: Option<DeviceId>,
        mine: bool,
        most: usize,
    ) -> Sql<Vec<(Record, Location)>> {
        let mut there = Vec::new();
        for device in self.candidates((id, holding.usb))?.iter() {
            let is_mine = device.entry.instance_uuid == Some(self.claimant.instance);
            // The stored address may be outdated: check the port, but only of possible candidates.
            // Without a path, the device is on the recorded bus or cannot be identified.
            let recorded = &device.entry.port_path;
            let elsewhere = device.entry.path.is_none()
                && (holding.address.is_some_and(|a| a.bus() != recorded.bus())
                    || holding.port.as_ref().is_some_and(|port| port != recorded));
            if is_mine != mine || elsewhere {
                continue;
            }
            if let Some(seen) = self.look(device)
                && holding.address.is_none_or(|a| a == seen.address)
                && holding.port.as_ref().is_none_or(|port| *port == seen.port)
            {
                there.push((device.clone(), seen.clone()));
                // No two devices have one address.
                if holding.address.is_some() || there.len() == most {
                    break;
                }
            }
        }
        Ok(there)
    }
}

/// Brings a claim of the instance in line with a guest that starts or runs with its device.
fn keep(tx: &Tx<'_>, claim: &ClaimRow, ours: bool, stage: Stage, context: &Context) -> Sql<()> {
    let set =
        |presence| release::set_presence(tx, std::slice::from_ref(claim), context, |_| presence);
    match stage {
        Stage::Running if claim.pending => Ok(()),
        Stage::Running => set(release::GuestPresence::Inside),
        Stage::Starting => {
            // A starting guest has no QEMU yet. A claim that says otherwise is left from a run
            // whose end was not recorded, and only a saved guest has our alias then.
            let left = ours && claim.is_allocated();
            set(release::GuestPresence::Coming { arriving: is_coming(claim, context) || left })?;
            if !ours && !claim.by_hand {
                tx.prepare_cached("UPDATE claims SET by_hand = 1 WHERE device_id = ?1")?
                    .execute([sql_id(claim.device_id)])?;
                if claim.is_lasting() {
                    tx.mark_lasting();
                }
            }
            Ok(())
        }
    }
}

/// Whether a restore or a migration that goes on has named the device of this claim.
fn is_coming(claim: &ClaimRow, context: &Context) -> bool {
    claim.pending
        || claim.incoming_since.is_some_and(|at| at >= context.uptime - context.pending_grace)
}

/// Writes a claim without a request. `pending`: for an incoming guest.
fn insert(
    tx: &Tx<'_>,
    claimant: &Claimant,
    id: DeviceId,
    runs: bool,
    pending: Option<f64>,
    context: &Context,
) -> Sql<()> {
    step_revision(tx)?;
    tx.prepare_cached(&format!(
        "INSERT INTO claims (created_at, device_id, instance_uuid, domain, project_id, state, \
            hold, pending_since, arrived, boot_id, revision, descriptors, used, seen_in_guest, \
            by_hand, generation)
         VALUES ({NOW}, ?1, ?2, ?3, ?4, iif(?5, 'allocated', 'claimed'), 'running', ?6, ?6 IS NOT \
         NULL, ?7, (SELECT max(revision) FROM compute_nodes),
                 (SELECT descriptors FROM usb_devices WHERE id = ?1), ?5, ?5, 1,
                 iif(?5, (SELECT generation FROM usb_devices WHERE id = ?1), NULL))"
    ))?
    .execute(params![
        sql_id(id),
        claimant.instance.to_string(),
        claimant.domain,
        claimant.project.as_ref().map(ToString::to_string),
        runs,
        pending,
        context.boot_id,
    ])?;
    if runs {
        quarantine::note_use(tx, id)?;
    }
    refresh(tx, id)?;
    let detail = match pending {
        None => "found in the domain's own XML",
        Some(_) => "found in the domain's own XML, pending",
    };
    record(tx, context, &Event::of("adopted", claimant).about(id).with(detail.into()))
}

/// A guest that comes in.
struct Arrival<'a> {
    tx: &'a Tx<'a>,
    hints: &'a Hints,
    claimant: &'a Claimant,
    mine: Vec<ClaimRow>,
    context: &'a Context,
}

impl Arrival<'_> {
    fn settle(
        &self,
        ours: &[ClaimRequest],
        by_hand: &[Holding],
        equivalent: bool,
        verifier: &mut dyn ClaimVerifier,
    ) -> Result<Received, TxError> {
        let found = self.find(ours, by_hand, equivalent, verifier)?;
        for device in found.iter().flatten().map(|(device, _)| device) {
            if let Some(claim) = release::holder(self.tx, device.entry.id, self.claimant.instance)?
            {
                return Ok(Received::HeldBy(Box::new(device.clone()), Box::new(claim)));
            }
            if device.is_set_aside() && device.entry.instance_uuid.is_none() {
                return Ok(Received::SetAside(Box::new(device.clone())));
            }
        }
        let mut granted = Vec::new();
        if !ours.is_empty() {
            let mut choice =
                Choice::new(self.tx, self.claimant, &[], ClaimMode::Provisional, verifier)?;
            let taken = found.iter().flatten().map(|(device, _)| device.entry.id);
            choice.pass_over(taken, "it is in another <hostdev> of this domain");
            match claim::take_of(choice, self.hints, ours, self.context)? {
                Claimed::Granted(devices) => granted = devices,
                Claimed::Short(short) => return Ok(Received::Short(short)),
                Claimed::Unfit(why) => return Ok(Received::Unfit(why)),
            }
        }
        for (device, seen) in found.iter().flatten() {
            self.claim(device.entry.id, seen)?;
        }
        nova_metadata::refresh(self.tx, self.claimant.instance)?;
        let by_hand = found
            .into_iter()
            .map(|f| f.map(|(device, seen)| (device.entry.id, seen.address)))
            .collect();
        Ok(Received::Granted { ours: granted, by_hand })
    }

    /// Finds the devices of handwritten hostdevs: first the devices at the addresses in the XML,
    /// then those that have moved.
    fn find(
        &self,
        ours: &[ClaimRequest],
        by_hand: &[Holding],
        equivalent: bool,
        verifier: &mut dyn ClaimVerifier,
    ) -> Sql<Vec<Option<(Record, Location)>>> {
        let mut finder = Finder::new(self.tx, &self.mine, self.claimant, verifier);
        let mut taken: BTreeSet<DeviceId> =
            ours.iter().filter_map(|w| w.request.selector.id).collect();
        let mut found = Vec::new();
        for holding in by_hand.iter().take(MAX_HOLDINGS) {
            let device = finder.find(holding)?.map(|f| (f.device, f.seen));
            found.push(device.filter(|(device, _)| taken.insert(device.entry.id)));
        }
        // A device that virt-usb gave to the instance is not a handwritten one.
        taken.extend(self.mine.iter().filter(|c| !c.by_hand).map(|c| c.device_id));
        for (holding, found) in by_hand.iter().zip(&mut found) {
            if found.is_none()
                && let Some(moved) = self.moved(&mut finder, holding, &taken, equivalent)?
            {
                taken.insert(moved.0.entry.id);
                *found = Some(moved);
            }
        }
        found.resize_with(by_hand.len(), || None);
        Ok(found)
    }

    /// The device of a hostdev whose address is out of date, or another host's.
    fn moved(
        &self,
        finder: &mut Finder<'_>,
        holding: &Holding,
        taken: &BTreeSet<DeviceId>,
        equivalent: bool,
    ) -> Sql<Option<(Record, Location)>> {
        if holding.usb.is_none() || (holding.address.is_none() && !equivalent) {
            return Ok(None);
        }
        let anywhere = Holding { usb: holding.usb, ..Holding::default() };
        let mut mine = finder.matching(&anywhere, None, true, usize::MAX)?;
        mine.retain(|(device, _)| !taken.contains(&device.entry.id));
        if mine.len() == 1 {
            return Ok(mine.pop());
        }
        let mut all = finder.matching(&anywhere, None, false, usize::MAX)?;
        all.extend(mine);
        all.retain(|(device, _)| !taken.contains(&device.entry.id));
        if all.len() > 1 && !equivalent {
            return Ok(None);
        }
        // The instance's, then what is offered, then what only the rules keep back, then what
        // cannot be had.
        let rank = |device: &Record| match device.entry.instance_uuid {
            Some(holder) if holder == self.claimant.instance => 0,
            Some(_) => 3,
            None if device.is_set_aside() => 3,
            None => 1 + u8::from(device.entry.status_reason.is_some()),
        };
        all.sort_by_key(|(device, _)| (rank(device), device.entry.id));
        Ok(all.into_iter().next())
    }

    fn claim(&self, id: DeviceId, seen: &Location) -> Result<(), TxError> {
        self.hints.add(HintSubject::Instance(self.claimant.instance))?;
        device::set_location(self.tx, id, seen)?;
        match self.mine.iter().find(|c| c.device_id == id) {
            Some(claim) if claim.pending => {
                step_revision(self.tx)?;
                self.tx
                    .prepare_cached(
                        "UPDATE claims SET by_hand = 1, request = NULL, hold = \
                        'running', arrived = 1, pending_since = ?2, revision = (SELECT \
                        max(revision) FROM compute_nodes) WHERE id = ?1",
                    )?
                    .execute(params![claim.id, self.context.uptime])?;
            }
            Some(_) => name_incoming(self.tx, id, self.context)?,
            None => {
                insert(self.tx, self.claimant, id, false, Some(self.context.uptime), self.context)?;
            }
        }
        Ok(())
    }
}
