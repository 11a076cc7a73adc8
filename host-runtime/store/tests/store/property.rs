//! Random lives of an inventory, with crashes and reboots, step by step against the model.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use proptest::prelude::*;
use tempfile::TempDir;
use virt_usb_model::{
    BusAddress, Device, DeviceId, DeviceRequest, InstanceId, PortPath, ProjectId, RuleVerdict,
    Status,
};
use virt_usb_store::adopt::{Adoption, Holding, Received, Stage};
use virt_usb_store::claim::{
    ClaimMode, ClaimRequest, ClaimVerifier, Claimant, Claimed, Granted, Verified,
};
use virt_usb_store::hints::{HintSubject, may_know};
use virt_usb_store::release::{Extent, Witness};
use virt_usb_store::{ClaimRow, Context, Location, Record, Source, Store};

use crate::common::*;
use crate::model::*;

/// One physical device's situation: plugged in, at its other port, withheld.
type Slot = (bool, bool, bool);

#[derive(Debug, Clone)]
enum Step {
    /// The world becomes this; whether discovery sees it.
    World([Slot; 6], bool),
    Claim {
        who: u32,
        wants: Vec<(usize, u32)>,
        lasting: bool,
        pending: bool,
        prefer: Option<usize>,
        fits: bool,
    },
    Confirm {
        who: u32,
        in_guest: u8,
        started: bool,
    },
    /// A restore or a migration, of a guest that may run.
    Receive {
        who: u32,
        hostdevs: Vec<(usize, u8)>,
        wants: Vec<(usize, u32)>,
        lasting: bool,
        equivalent: bool,
    },
    /// A prepare with these hostdevs in the XML.
    Enter {
        who: u32,
        hostdevs: Vec<(usize, u8)>,
    },
    OutOfGuest(u32),
    Release(u32),
    Force(u32),
    /// A flavor's requests, with `hold = "instance"`.
    Assign(u32, Vec<usize>),
    /// An operator assigns one more.
    More(u32, usize),
    /// An operator takes one of his back, and decided that before others claimed something (true).
    Dismiss(u32, usize, bool),
    Adopt {
        who: u32,
        slot: usize,
        by: u8,
        running: bool,
    },
    Flavor(usize, bool),
    Time(u8),
    /// Whether the kernel finds the two controllers in the other order this time.
    Reboot(bool),
    Reopen,
    /// The whole audit goes: nothing is decided by it.
    Prune,
    /// A simulated power cut: the files as they are at this moment, without the shared memory.
    Image,
}

fn step() -> impl Strategy<Value = Step> {
    let slot =
        || (prop::bool::weighted(0.8), prop::bool::weighted(0.2), prop::bool::weighted(0.15));
    let wants = || prop::collection::vec((0..REQUESTS.len(), 1..=2u32), 0..=3);
    let prefer = prop::option::weighted(0.3, 0..6usize);
    let (pending, fits) = (prop::bool::weighted(0.3), prop::bool::weighted(0.9));
    let hostdevs = || prop::collection::vec((0..6usize, 0..BY), 0..=3);
    prop_oneof![
        4 => (prop::array::uniform6(slot()), prop::bool::weighted(0.8))
            .prop_map(|(w, seen)| Step::World(w, seen)),
        8 => (0..3u32, wants(), (any::<bool>(), pending, prefer, fits)).prop_map(
            |(who, wants, (lasting, pending, prefer, fits))| {
                Step::Claim { who, wants, lasting, pending, prefer, fits }
            }
        ),
        3 => (0..3u32, any::<u8>(), any::<bool>())
            .prop_map(|(who, in_guest, started)| Step::Confirm { who, in_guest, started }),
        4 => (0..3u32, hostdevs(), wants(), any::<bool>(), any::<bool>()).prop_map(
            |(who, hostdevs, wants, lasting, equivalent)| {
                Step::Receive { who, hostdevs, wants, lasting, equivalent }
            }
        ),
        4 => (0..3u32, hostdevs()).prop_map(|(who, hostdevs)| Step::Enter { who, hostdevs }),
        1 => (0..3u32).prop_map(Step::OutOfGuest),
        3 => (0..3u32).prop_map(Step::Release),
        1 => (0..3u32).prop_map(Step::Force),
        1 => (0..3u32, prop::collection::vec(0..REQUESTS.len(), 0..3))
            .prop_map(|(who, r)| Step::Assign(who, r)),
        1 => (0..3u32, 0..REQUESTS.len()).prop_map(|(who, request)| Step::More(who, request)),
        1 => (0..3u32, 0..3usize, any::<bool>())
            .prop_map(|(who, nth, late)| Step::Dismiss(who, nth, late)),
        2 => (0..3u32, 0..6usize, 0..BY, any::<bool>())
            .prop_map(|(who, slot, by, running)| Step::Adopt { who, slot, by, running }),
        1 => (0..3usize, any::<bool>()).prop_map(|(name, set)| Step::Flavor(name, set)),
        2 => (1..100u8).prop_map(Step::Time),
        1 => any::<bool>().prop_map(Step::Reboot),
        1 => Just(Step::Reopen),
        1 => Just(Step::Prune),
        1 => Just(Step::Image),
    ]
}

/// In how many ways a hostdev names its device: see [`Life::holding`].
const BY: u8 = 8;

/// Overlapping on purpose.
const REQUESTS: [&str; 7] = [
    ANY,
    r#"{"vendor_id":"0529","product_id":"0001"}"#,
    r#"{"vendor_id":"0529","product_id":"0002"}"#,
    r#"{"serial":"S1"}"#,
    r#"{"path":"pci-0000:01:00.0-usbv2-0:2"}"#,
    r#"{"class":"03","vendor_id":"0529"}"#,
    r#"{"tags":["erp","blue"]}"#,
];

fn project(who: u32) -> Option<ProjectId> {
    ["red", "blue"].get(who as usize).map(|name| name.parse().unwrap())
}

/// Six devices on two controllers: two with serials, four without; two for one project only, two
/// with a second tag. Twins are in the same port of either controller: `swapped` gives them each
/// other's port path.
fn physical(
    slot: usize,
    moved: bool,
    number: u8,
    withheld: bool,
    swapped: bool,
) -> (Device, RuleVerdict) {
    let serial = (slot < 2).then(|| format!("S{slot}"));
    let controller = 1 + slot % 2;
    let port = port(controller, 1 + slot / 2 + 3 * usize::from(moved), swapped);
    let controller = u8::try_from(controller).unwrap();
    let device =
        on_controller(controller, 1 + u16::from(slot < 4), serial.as_deref(), &port, number);
    let mut verdict = offered();
    verdict.withheld = withheld.then_some(WITHHELD);
    if slot >= 4 {
        verdict.projects = vec!["red".parse().unwrap()];
    }
    if slot % 2 == 1 {
        verdict.tags.push("blue".into());
    }
    (device, verdict)
}

/// A port of a controller, 1 or 2, in the numbers of this boot.
fn port(controller: usize, number: usize, swapped: bool) -> PortPath {
    let bus = if swapped { 3 - controller } else { controller };
    format!("{bus}-{number}").parse().unwrap()
}

struct Eyes<'a> {
    world: &'a [(Device, RuleVerdict)],
    fits: bool,
}

impl ClaimVerifier for Eyes<'_> {
    fn verify(&mut self, candidate: &Record) -> Verified {
        let is = |d: &Device| d.key.is(&candidate.key()) && d.key.is_at_place_of(&candidate.key());
        let there = self.world.iter().find(|(d, _)| is(d));
        there.map_or(Verified::Not("nothing there".into()), |(d, _)| {
            Verified::Here(Location { port: d.key.port.clone(), address: d.address })
        })
    }
    fn fits(&mut self, _: &[Granted]) -> Result<(), String> {
        if self.fits { Ok(()) } else { Err("no port left".into()) }
    }
}

struct Life {
    dir: TempDir,
    store: Option<Store>,
    model: Model,
    world: Vec<(Device, RuleVerdict)>,
    number: u8,
    boot: u32,
    uptime: f64,
    /// Whether the buses of the two controllers have each other's number.
    swapped: bool,
}

impl Life {
    fn new() -> Self {
        let (dir, store) = inventory();
        drop(store);
        let store = Some(hook(dir.path()).unwrap());
        let (model, world) = (Model::default(), Vec::new());
        let mut life =
            Self { dir, store, model, world, number: 0, boot: 1, uptime: 50.0, swapped: false };
        life.run(&Step::World([(true, false, false); 6], true));
        life
    }

    fn context(&self) -> Context {
        Context { uptime: self.uptime, ..boot(self.boot) }
    }

    fn run(&mut self, step: &Step) {
        let context = self.context();
        let boot_id = context.boot_id.clone();
        let mut store = self.store.take().unwrap();
        match step {
            Step::World(slots, seen) => {
                self.change_world(slots);
                if *seen {
                    scan(&mut store, &self.world, &context).unwrap();
                    self.model.sweep(&boot_id, self.uptime);
                    self.see(&store);
                }
            }
            Step::Claim { who, .. } => self.claim(&mut store, *who, step),
            Step::Receive { who, .. } => self.receive(&mut store, *who, step),
            Step::Enter { who, hostdevs } => self.enter(&mut store, *who, hostdevs),
            Step::Confirm { who, in_guest, started } => {
                let ids: Vec<_> = self.model.rows.keys().copied().collect();
                let ids: Vec<_> =
                    ids.into_iter().filter(|id| in_guest >> (id.get() % 8) & 1 == 1).collect();
                let witness = if *started { Witness::Start } else { Witness::Look };
                let left = store.confirm(instance(*who), &ids, witness, &context).unwrap();
                assert!(
                    left.iter()
                        .all(|id| self.model.of(instance(*who)).contains(id) && !ids.contains(id))
                );
                self.model.set_states(instance(*who), Some(&ids), *started, &boot_id);
            }
            Step::OutOfGuest(who) => {
                store.out_of_guest(instance(*who), &context).unwrap();
                self.model.set_states(instance(*who), None, false, &boot_id);
            }
            Step::Release(who) | Step::Force(who) => {
                let force = matches!(step, Step::Force(_));
                let extent = if force { Extent::Everything } else { Extent::Run };
                let freed = store.release(instance(*who), extent, "a test", &context).unwrap();
                let expected = self.model.release(instance(*who), force, &boot_id);
                assert_eq!(freed.into_iter().collect::<BTreeSet<_>>(), expected);
                let again = store.release(instance(*who), extent, "a test", &context).unwrap();
                assert_eq!(again, [], "released twice");
            }
            Step::Assign(who, which) => {
                let requests: Vec<_> = which.iter().map(|r| request(REQUESTS[*r])).collect();
                store.assign(&claimant(*who), Source::Flavor, &requests, &context).unwrap();
                self.model.assign(instance(*who), requests);
            }
            Step::More(who, which) => {
                let request = request(REQUESTS[*which]);
                store
                    .assign_more(&claimant(*who), std::slice::from_ref(&request), &context)
                    .unwrap()
                    .unwrap();
                self.model
                    .assignments
                    .entry(instance(*who))
                    .or_default()
                    .push((Source::Operator, request));
            }
            Step::Dismiss(who, nth, late) => self.dismiss(&mut store, *who, *nth, *late),
            Step::Adopt { who, .. } => self.adopt(&mut store, *who, step),
            Step::Flavor(name, set) => {
                let name = ["small", "large key", "größer"][*name];
                let flavor = virt_usb_model::Flavor {
                    usb_devices: vec![request(ANY)],
                    ..Default::default()
                };
                let changed = if *set {
                    self.model.flavors.insert(name.into())
                        == store.set_flavor(name, &flavor, &context).unwrap()
                } else {
                    self.model.flavors.remove(name) == store.remove_flavor(name, &context).unwrap()
                };
                assert!(changed, "says whether that changed anything");
            }
            Step::Time(seconds) => self.uptime += f64::from(*seconds),
            Step::Reboot(swap) => {
                (self.boot, self.uptime) = (self.boot + 1, 5.0);
                if *swap {
                    self.swap_buses();
                }
            }
            Step::Reopen => {
                drop(store);
                store = hook(self.dir.path()).unwrap();
            }
            Step::Prune => forget_the_audit(self.dir.path()),
            Step::Image => {
                let image = tempfile::tempdir().unwrap();
                copy(self.dir.path(), image.path());
                store = hook(image.path()).unwrap();
                self.dir = image;
            }
        }
        self.store = Some(store);
    }

    fn change_world(&mut self, slots: &[Slot; 6]) {
        let before = std::mem::take(&mut self.world);
        for (slot, &(plugged, moved, withheld)) in slots.iter().enumerate() {
            if !plugged {
                continue;
            }
            self.number = self.number % 120 + 1;
            let (mut device, verdict) = physical(slot, moved, self.number, withheld, self.swapped);
            // Still there: the same number. Came back or moved: a new one.
            if let Some(address) = where_is(&before, &device) {
                device.address = address;
            }
            self.world.push((device, verdict));
        }
        // Numbers are unique on a bus.
        let mut used = BTreeSet::new();
        for (device, _) in &mut self.world {
            while !used.insert(device.address) {
                self.number = self.number % 120 + 1;
                device.address = BusAddress::new(device.address.bus(), self.number).unwrap();
            }
        }
    }

    /// Every device stays where it is, and its bus gets the other number.
    fn swap_buses(&mut self) {
        self.swapped = !self.swapped;
        for (device, _) in &mut self.world {
            let bus = 3 - device.address.bus();
            device.address = BusAddress::new(bus, device.address.device()).unwrap();
            device.key.port = PortPath::new(bus, device.key.port.ports()).unwrap();
        }
    }

    /// Updates the model after a scan; ids come from the store: known ones return, new ones were
    /// never seen before.
    fn see(&mut self, store: &Store) {
        let rows = store.devices().unwrap();
        for row in self.model.rows.values_mut() {
            row.present = false;
        }
        for (device, verdict) in &self.world {
            let row = rows.iter().find(|r| r.key() == device.key).unwrap();
            let highest = self.model.rows.keys().max().copied();
            let id = *self.model.ids.entry(identity(device)).or_insert_with(|| {
                assert!(
                    highest.is_none_or(|h| row.entry.id > h),
                    "{} was used before",
                    row.entry.id
                );
                row.entry.id
            });
            assert_eq!(row.entry.id, id, "{} keeps its id", device.key);
            assert_eq!(row.entry.address, device.address);
            self.model.rows.insert(
                id,
                Row { device: device.clone(), verdict: verdict.clone(), present: true },
            );
        }
    }

    fn claim(&mut self, store: &mut Store, who: u32, step: &Step) {
        let Step::Claim { wants, lasting, pending, prefer, fits, .. } = step else {
            unreachable!()
        };
        let context = self.context();
        self.model.sweep(&context.boot_id, self.uptime);
        let claimant = Claimant { project: project(who), ..claimant(who) };
        let wants = wanted(wants, *lasting);
        let prefer: Vec<DeviceId> =
            prefer.iter().filter_map(|n| self.model.rows.keys().nth(*n).copied()).collect();
        let standing = if *pending { ClaimMode::Provisional } else { ClaimMode::Replace };
        let eligible: Vec<_> = wants
            .iter()
            .map(|w| {
                self.model.eligible(
                    &self.world,
                    claimant.instance,
                    claimant.project.as_ref(),
                    &w.request,
                    *pending,
                )
            })
            .collect();
        let rows: Vec<_> = wants
            .iter()
            .zip(&eligible)
            .flat_map(|(w, row)| std::iter::repeat_n(row.clone(), w.request.count as usize))
            .collect();
        let mut eyes = Eyes { world: &self.world, fits: *fits };
        let before = self.model.of(claimant.instance);
        let outcome =
            store.claim(&claimant, &wants, &prefer, standing, &mut eyes, &context).unwrap();
        match outcome {
            Claimed::Short(short) => {
                assert!(!can_serve(&rows, &mut Vec::new()), "refused what could be had: {short:?}");
                assert!(!short.is_empty() && short.iter().all(|s| s.got < s.request.count));
            }
            Claimed::Unfit(why) => assert!(!fits && why == "no port left"),
            Claimed::Granted(granted) => {
                assert!(*fits);
                assert_eq!(granted.len(), rows.len(), "all or nothing");
                let ids: BTreeSet<_> = granted.iter().map(|g| g.device.entry.id).collect();
                assert_eq!(ids.len(), granted.len(), "one device, one request");
                for g in &granted {
                    let id = g.device.entry.id;
                    assert!(eligible[g.request].contains(&id), "{id} for request {}", g.request);
                    assert_eq!(
                        Some(g.device.entry.address),
                        where_is(&self.world, &self.model.rows[&id].device)
                    );
                    assert_eq!(g.already, before.contains(&id));
                }
                let since = pending.then_some(self.uptime);
                self.model.grant(
                    claimant.instance,
                    &ids,
                    &prefer,
                    *lasting,
                    since,
                    &context.boot_id,
                );
                let rows = store.claims().unwrap();
                let again =
                    store.claim(&claimant, &wants, &prefer, standing, &mut eyes, &context).unwrap();
                let Claimed::Granted(again) = again else { panic!("claimed twice: {again:?}") };
                let same =
                    |g: &[Granted]| g.iter().map(|g| g.device.entry.id).collect::<BTreeSet<_>>();
                assert_eq!(same(&again), ids);
                assert!(again.iter().all(|g| g.already));
                // A firm claim that serves a request of an incoming guest is left alone, its place
                // among the requests too: which device serves which may differ the second time.
                let place = |mut c: ClaimRow| {
                    c.request = c.request.filter(|_| !pending);
                    // One that is pending has a new time, which is a change.
                    c.revision = 0;
                    c
                };
                let now: Vec<_> = store.claims().unwrap().into_iter().map(place).collect();
                if prefer.is_empty() {
                    assert_eq!(
                        now,
                        rows.into_iter().map(place).collect::<Vec<_>>(),
                        "claimed twice is the same claim"
                    );
                }
            }
        }
    }

    fn dismiss(&mut self, store: &mut Store, who: u32, nth: usize, late: bool) {
        let mine = instance(who);
        let all = store.assignments(mine).unwrap();
        let Some(ended) = all.iter().filter(|a| a.source == Source::Operator).nth(nth) else {
            return;
        };
        let held = if late { Vec::new() } else { store.claims_of(mine).unwrap() };
        let serves = |_: &DeviceRequest, _| panic!("no claim is to end");
        let done = store
            .dismiss(&claimant(who), Some(&held), &[ended.id], &[], serves, &self.context())
            .unwrap();
        assert_eq!(
            done,
            !late || self.model.of(mine).is_empty(),
            "with claims that were not looked at"
        );
        if done {
            let at = all.iter().position(|a| a.id == ended.id).unwrap();
            self.model.assignments.get_mut(&mine).unwrap().remove(at);
        }
    }

    fn adopt(&mut self, store: &mut Store, who: u32, step: &Step) {
        let Step::Adopt { slot, by, running, .. } = step else { unreachable!() };
        let Some((device, _)) = self.world.get(*slot) else { return };
        let context = self.context();
        self.model.sweep(&context.boot_id, self.uptime);
        let holding = self.holding(device, *by);
        let mine = instance(who);
        let meant = self.meant(mine, &holding);
        let stage = if *running { Stage::Running } else { Stage::Starting };
        let mut eyes = Eyes { world: &self.world, fits: true };
        let claimant = Claimant { project: project(who), ..claimant(who) };
        let adopted =
            store.adopt(&claimant, &[holding], stage, &mut eyes, &context).unwrap().remove(0);
        let Some((id, ours)) = meant else {
            assert_eq!(adopted, Adoption::Unknown);
            return;
        };
        if !running {
            self.adopted_at_start(mine, id, ours, &adopted, &context.boot_id);
            return;
        }
        match (self.model.claims.get_mut(&id), adopted) {
            (Some(claim), Adoption::HeldBy(record, _)) => {
                assert!(claim.instance != mine && record.entry.id == id);
            }
            (Some(claim), Adoption::AlreadyYours(yours)) => {
                assert!(claim.instance == mine && yours == id);
                if claim.pending.is_none() {
                    (claim.allocated, claim.named) = (!claim.needs_reattach, None);
                    claim.seen |= claim.allocated;
                }
            }
            (None, Adoption::New(new)) => {
                assert_eq!(new, id);
                let boot = context.boot_id;
                self.model.claims.insert(id, found(mine, true, boot));
            }
            (claim, adopted) => panic!("{claim:?}: {adopted:?}"),
        }
    }

    /// Ways in which a user may name a device in a hostdev.
    fn holding(&self, device: &Device, by: u8) -> Holding {
        let id = self.model.ids.get(&identity(device)).copied();
        let (usb, address) = (Some(device.key.usb), Some(device.address));
        let none = Holding::default();
        match by {
            // As virt-usb does.
            0 => Holding { id, usb, address, ..none },
            1 => Holding { address, ..none },
            2 => Holding { usb, address, ..none },
            3 => Holding { usb, ..none },
            4 => Holding { port: Some(device.key.port.clone()), ..none },
            // `<source/>`, and one with an alias of our form.
            5 => Holding { id, ..none },
            // An address from before a replug.
            6 => Holding { usb, address: BusAddress::new(1, 127), ..none },
            // An alias of our form that means another device.
            _ => Holding { id: self.model.rows.keys().next().copied(), usb, address, ..none },
        }
    }

    fn is_kind(&self, id: DeviceId, holding: &Holding) -> bool {
        holding.usb.is_none_or(|usb| usb == self.model.rows[&id].device.key.usb)
    }

    /// The device that a hostdev means, and whether it is one of ours.
    fn meant(&self, mine: InstanceId, holding: &Holding) -> Option<(DeviceId, bool)> {
        let claim = |id: &DeviceId| self.model.claims.get(id).filter(|c| c.instance == mine);
        let named = holding.id.filter(|id| claim(id).is_some() && self.is_kind(*id, holding));
        let anything = holding.usb.is_some() || holding.address.is_some() || holding.port.is_some();
        if named.is_none() && !anything {
            return None;
        }
        let is = |id: DeviceId, row: &Row| {
            let address = where_is(&self.world, &row.device);
            row.present
                && named.is_none_or(|named| named == id)
                && self.is_kind(id, holding)
                && address.is_some_and(|a| {
                    let ports = row.device.key.port.ports();
                    holding.address.is_none_or(|want| want == a)
                        && holding
                            .port
                            .as_ref()
                            .is_none_or(|p| (p.bus(), p.ports()) == (a.bus(), ports))
                })
        };
        let all: Vec<DeviceId> =
            self.model.rows.iter().filter(|(id, row)| is(**id, row)).map(|(id, _)| *id).collect();
        let own: Vec<DeviceId> = all.iter().copied().filter(|id| claim(id).is_some()).collect();
        match (own.as_slice(), all.as_slice()) {
            ([id], _) | ([], [id]) => {
                Some((*id, named.is_some_and(|named| claim(&named).is_some_and(|c| !c.by_hand))))
            }
            _ => None,
        }
    }

    /// Expected result for a device in the XML of a starting guest.
    fn adopted_at_start(
        &mut self,
        mine: InstanceId,
        id: DeviceId,
        ours: bool,
        adopted: &Adoption,
        boot: &str,
    ) {
        match (self.model.claims.get_mut(&id), adopted) {
            (Some(claim), Adoption::HeldBy(record, _)) => {
                assert!(claim.instance != mine && record.entry.id == id);
            }
            (Some(claim), Adoption::AlreadyYours(yours)) => {
                assert!(claim.instance == mine && *yours == id);
                claim.needs_reattach |= claim.pending.is_some()
                    || claim.named.is_some_and(|at| at >= self.uptime - PENDING_GRACE)
                    || (ours && claim.allocated);
                (claim.allocated, claim.pending, claim.named, claim.seen) =
                    (false, None, None, false);
                claim.by_hand |= !ours;
            }
            (None, Adoption::New(new)) => {
                assert_eq!(*new, id);
                self.model.claims.insert(id, found(mine, false, boot.into()));
            }
            (claim, adopted) => panic!("{claim:?}: {adopted:?}"),
        }
    }

    fn enter(&mut self, store: &mut Store, who: u32, hostdevs: &[(usize, u8)]) {
        let context = self.context();
        self.model.sweep(&context.boot_id, self.uptime);
        let claimant = Claimant { project: project(who), ..claimant(who) };
        let holdings = self.holdings(hostdevs);
        let mut eyes = Eyes { world: &self.world, fits: true };
        let entered = store.enter(&claimant, &holdings, &mut eyes, &context).unwrap();
        assert_eq!(entered.adopted.len(), holdings.len());
        let mine = instance(who);
        // Which devices are meant is decided by what the instance held before.
        let meant: Vec<_> = holdings.iter().map(|h| self.meant(mine, h)).collect();
        let ours: BTreeSet<_> =
            meant.iter().flatten().filter(|(_, ours)| *ours).map(|(id, _)| *id).collect();
        let is_inside = |id: &DeviceId| meant.iter().flatten().any(|(inside, _)| inside == id);
        let lost: Vec<_> =
            holdings.iter().map(|h| self.lost(mine, h).filter(|id| !is_inside(id))).collect();
        let mut inside = BTreeSet::new();
        for ((meant, lost), adopted) in meant.iter().zip(&lost).zip(&entered.adopted) {
            match (meant, lost) {
                (None, None) => assert_eq!(*adopted, Adoption::Unknown),
                (None, Some(id)) => assert_eq!(*adopted, Adoption::Lost(*id)),
                (Some((id, _)), _) => {
                    self.adopted_at_start(mine, *id, ours.contains(id), adopted, &context.boot_id);
                    inside.extend(adopted.device());
                }
            }
        }
        let is_lost =
            meant.iter().zip(&lost).any(|(meant, lost)| meant.is_none() && lost.is_some());
        assert_eq!(entered.arriving, self.model.enter(mine, &inside, is_lost));
    }

    /// The device that the alias names, if a restore or a migration claimed it a moment ago.
    fn lost(&self, mine: InstanceId, holding: &Holding) -> Option<DeviceId> {
        let claim =
            self.model.claims.get(&holding.id?).filter(|c| c.instance == mine && !c.by_hand)?;
        let named = claim.named.is_some_and(|at| at >= self.uptime - PENDING_GRACE);
        (claim.pending.is_some() || named).then_some(holding.id?)
    }

    fn holdings(&self, hostdevs: &[(usize, u8)]) -> Vec<Holding> {
        let there = hostdevs.iter().filter_map(|(slot, by)| Some((self.world.get(*slot)?, *by)));
        there.map(|((device, _), by)| self.holding(device, by)).collect()
    }

    fn receive(&mut self, store: &mut Store, who: u32, step: &Step) {
        let Step::Receive { hostdevs, wants, lasting, equivalent, .. } = step else {
            unreachable!()
        };
        let context = self.context();
        self.model.sweep(&context.boot_id, self.uptime);
        let (mine, since) = (instance(who), self.uptime);
        let claimant = Claimant { project: project(who), ..claimant(who) };
        let wants = wanted(wants, *lasting);
        let holdings = self.holdings(hostdevs);
        let mut eyes = Eyes { world: &self.world, fits: true };
        store.sweep(&context).unwrap();
        let before = store.claims().unwrap();
        let received =
            store.receive(&claimant, &wants, &holdings, *equivalent, &mut eyes, &context).unwrap();
        let by_hand = self.incoming(mine, &holdings, *equivalent);
        let is_anothers =
            |id: &DeviceId| self.model.claims.get(id).is_some_and(|c| c.instance != mine);
        let rows: Vec<BTreeSet<DeviceId>> = wants
            .iter()
            .flat_map(|w| {
                let project = claimant.project.as_ref();
                let mut row = self.model.eligible(&self.world, mine, project, &w.request, true);
                row.retain(|id| !by_hand.contains(&Some(*id)));
                std::iter::repeat_n(row, w.request.count as usize)
            })
            .collect();
        match received {
            Received::HeldBy(device, claim) => {
                assert!(claim.instance_uuid != mine && by_hand.contains(&Some(device.entry.id)));
                assert_eq!(store.claims().unwrap(), before);
            }
            Received::Short(_) => {
                assert!(!by_hand.iter().flatten().any(is_anothers));
                assert!(!can_serve(&rows, &mut Vec::new()), "refused what could be had");
                assert_eq!(store.claims().unwrap(), before);
            }
            Received::Granted { ours, by_hand: found } => {
                assert!(!by_hand.iter().flatten().any(is_anothers));
                let found: Vec<_> = found.into_iter().map(|f| f.map(|(id, _)| id)).collect();
                assert_eq!(found, by_hand, "{holdings:?}");
                assert_eq!(ours.len(), rows.len(), "all or nothing");
                if self.model.runs(mine, &context.boot_id) {
                    assert_eq!(
                        store.claims().unwrap(),
                        before,
                        "a guest that runs is not disturbed"
                    );
                    return;
                }
                let ids = ours.iter().map(|g| g.device.entry.id).collect();
                self.model.grant(mine, &ids, &[], *lasting, Some(since), &context.boot_id);
                for id in by_hand.into_iter().flatten() {
                    self.model.receive_by_hand(mine, id, since, &context.boot_id);
                }
            }
            other => panic!("{other:?}"),
        }
    }

    /// Devices of the handwritten hostdevs of an incoming guest: first those at the addresses in
    /// the XML, then those that moved.
    fn incoming(
        &self,
        mine: InstanceId,
        holdings: &[Holding],
        equivalent: bool,
    ) -> Vec<Option<DeviceId>> {
        let mut taken = BTreeSet::new();
        let mut found: Vec<Option<DeviceId>> = holdings
            .iter()
            .map(|h| self.meant(mine, h).map(|(id, _)| id).filter(|id| taken.insert(*id)))
            .collect();
        taken.extend(
            self.model
                .claims
                .iter()
                .filter(|(_, c)| c.instance == mine && !c.by_hand)
                .map(|(id, _)| *id),
        );
        for (holding, found) in holdings.iter().zip(&mut found) {
            let is_told = holding.address.is_some() || equivalent;
            if found.is_some() || holding.usb.is_none() || !is_told {
                continue;
            }
            let free = |id: &DeviceId, row: &Row| {
                row.present
                    && !taken.contains(id)
                    && self.is_kind(*id, holding)
                    && where_is(&self.world, &row.device).is_some()
            };
            let all: Vec<DeviceId> = self
                .model
                .rows
                .iter()
                .filter(|(id, row)| free(id, row))
                .map(|(id, _)| *id)
                .collect();
            let holder = |id: &DeviceId| self.model.claims.get(id).map(|c| c.instance);
            let own: Vec<DeviceId> =
                all.iter().copied().filter(|id| holder(id) == Some(mine)).collect();
            let rank = |id: &DeviceId| match holder(id) {
                Some(who) if who == mine => 0,
                Some(_) => 3,
                None => 1 + u8::from(self.model.rows[id].verdict.withheld.is_some()),
            };
            *found = match (own.as_slice(), all.as_slice()) {
                ([id], _) | (_, [id]) => Some(*id),
                (_, several) if equivalent => {
                    several.iter().copied().min_by_key(|id| (rank(id), *id))
                }
                _ => None,
            };
            taken.extend(*found);
        }
        found
    }

    /// The store says what the model says.
    fn compare(&self, before: &BTreeMap<DeviceId, Status>, adopted: bool) {
        let store = self.store.as_ref().unwrap();
        assert_sound(store);
        let claims = store.claims().unwrap();
        let seen: BTreeMap<DeviceId, Claim> = claims
            .iter()
            .map(|c| {
                let claim = Claim {
                    instance: c.instance_uuid,
                    allocated: c.is_allocated(),
                    lasting: c.is_lasting(),
                    // When it began is not shown.
                    pending: self
                        .model
                        .claims
                        .get(&c.device_id)
                        .and_then(|m| m.pending)
                        .filter(|_| c.pending),
                    boot: c.boot_id.clone(),
                    unasked: c.request.is_none(),
                    by_hand: c.by_hand,
                    named: c.incoming_since,
                    needs_reattach: c.needs_reattach,
                    seen: c.seen_in_guest,
                };
                assert_eq!(c.pending, claim.pending.is_some(), "{c:?}");
                (c.device_id, claim)
            })
            .collect();
        assert_eq!(seen.len(), claims.len(), "a device has one owner");
        assert_eq!(seen, self.model.claims);

        let now = self.statuses();
        let rows: BTreeMap<DeviceId, Status> = store
            .devices()
            .unwrap()
            .iter()
            .map(|r| (r.entry.id, r.entry.state().unwrap()))
            .collect();
        assert_eq!(rows, now, "each status follows from the facts");
        for (id, status) in &now {
            if let Some(old) = before.get(id).filter(|old| *old != status && !adopted) {
                assert!(old.may_become(*status), "device {id}: {old} became {status}");
            }
        }
        let flavors: BTreeSet<String> =
            store.flavors().unwrap().into_iter().map(|f| f.name).collect();
        assert_eq!(flavors, self.model.flavors);
        for name in &flavors {
            assert!(may_know(self.dir.path(), HintSubject::Flavor(name)));
        }
        for who in [0, 1, 2].map(instance) {
            self.compare_instance(store, who);
        }
    }

    fn compare_instance(&self, store: &Store, who: InstanceId) {
        let assigned: Vec<_> =
            store.assignments(who).unwrap().into_iter().map(|a| (a.source, a.request)).collect();
        assert_eq!(assigned, self.model.assignments.get(&who).cloned().unwrap_or_default());
        assert!(
            assigned.is_empty() || may_know(self.dir.path(), HintSubject::Assigned(who)),
            "a hint for {who}'s assignments"
        );
        assert!(
            self.model.of(who).is_empty() || may_know(self.dir.path(), HintSubject::Instance(who)),
            "a hint for {who}"
        );
    }

    fn statuses(&self) -> BTreeMap<DeviceId, Status> {
        self.model.rows.keys().filter_map(|id| Some((*id, self.model.status(*id)?))).collect()
    }
}

/// A claim on what was found in the domain's own XML.
fn found(instance: InstanceId, allocated: bool, boot: String) -> Claim {
    Claim {
        instance,
        allocated,
        lasting: false,
        pending: None,
        boot,
        unasked: true,
        by_hand: true,
        named: None,
        needs_reattach: false,
        seen: allocated,
    }
}

fn wanted(wants: &[(usize, u32)], lasting: bool) -> Vec<ClaimRequest> {
    let request =
        |&(which, count): &(usize, u32)| DeviceRequest { count, ..request(REQUESTS[which]) };
    wants.iter().map(|want| ClaimRequest::new(request(want), lasting)).collect()
}

fn copy(from: &Path, to: &Path) {
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.path().is_dir() {
            fs::create_dir(&target).unwrap();
            copy(&entry.path(), &target);
        } else if !entry.file_name().to_str().unwrap().ends_with("-shm") {
            fs::copy(entry.path(), target).unwrap();
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 64,
        max_shrink_iters: 300,
        ..ProptestConfig::default()
    })]
    #[test]
    fn a_life_goes_as_the_model_says(steps in prop::collection::vec(step(), 1..60)) {
        let mut life = Life::new();
        for step in &steps {
            let before = life.statuses();
            life.run(step);
            let may_adopt =
                matches!(step, Step::Adopt { .. } | Step::Enter { .. } | Step::Receive { .. });
            life.compare(&before, may_adopt);
        }
    }
}
