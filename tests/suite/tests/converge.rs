//! The agent on random lives of a host: devices come, go, move and change places, guests start,
//! stop and vanish, users attach and detach, and the worker is cut off at any call to the
//! hypervisor. Real: the store, the hook, sysfs files, planner and worker. Simulated: devices and
//! hypervisor.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test's helpers fail the test")]

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use proptest::prelude::*;
use virt_usb::agent::operate::Attached;
use virt_usb::agent::plan::Absence;
use virt_usb::agent::work::{ObservedAbsence, Worker};
use virt_usb::discovery::{Simulated, UsbSource};
use virt_usb::hypervisor::{Event, Failure, Hypervisor, Running, SimulatedHypervisor};
use virt_usb::inventory;
use virt_usb_config::host_env;
use virt_usb_config::{AttachFailurePolicy, Config, Log, ReplugPolicy};
use virt_usb_domxml::Domain;
use virt_usb_hook::verify::Ports;
use virt_usb_model::{Aliases, BusAddress, DeviceId, DeviceRequest, Flavor, InstanceId};
use virt_usb_store::flaps::Limits;
use virt_usb_store::{Record, Store};
use virt_usb_suite::cases;

/// A hypervisor that fails after a number of calls, before or after it has carried out the last
/// one.
struct Fused {
    inner: Arc<SimulatedHypervisor>,
    fuse: AtomicUsize,
    /// An action of another program just before a device is attached.
    meanwhile: Mutex<Option<Box<dyn FnOnce() + Send>>>,
}

const NEVER: usize = usize::MAX / 2;

impl Fused {
    fn call<T>(&self, act: impl FnOnce() -> Result<T, Failure>) -> Result<T, Failure> {
        let away = || Failure::Away("cut off".into());
        let before = self.fuse.fetch_sub(1, Ordering::SeqCst);
        if before == 0 || before > NEVER {
            self.fuse.store(usize::MAX, Ordering::SeqCst);
            return Err(away());
        }
        let done = act();
        // The call was carried out, but its answer is lost.
        if before == 1 { Err(away()) } else { done }
    }
}

impl Hypervisor for Fused {
    fn running(&self) -> Result<Vec<InstanceId>, Failure> {
        self.call(|| self.inner.running())
    }
    fn all(&self) -> Result<Vec<InstanceId>, Failure> {
        self.call(|| self.inner.all())
    }
    fn look(&self, instance: InstanceId) -> Result<Option<Running>, Failure> {
        self.call(|| self.inner.look(instance))
    }
    fn xml(&self, instance: InstanceId) -> Result<Option<String>, Failure> {
        self.call(|| self.inner.xml(instance))
    }
    fn attach(&self, instance: InstanceId, device: &str) -> Result<(), Failure> {
        if let Some(act) = self.meanwhile.lock().unwrap().take() {
            act();
        }
        self.call(|| self.inner.attach(instance, device))
    }
    fn detach(&self, instance: InstanceId, alias: &str) -> Result<(), Failure> {
        self.call(|| self.inner.detach(instance, alias))
    }
    fn stop(&self, instance: InstanceId) -> Result<(), Failure> {
        self.call(|| self.inner.stop(instance))
    }
    fn is_busy(&self, instance: InstanceId) -> Result<bool, Failure> {
        self.call(|| self.inner.is_busy(instance))
    }
    fn process(&self, instance: InstanceId) -> Option<u32> {
        self.inner.process(instance)
    }
    fn identity(&self) -> Result<String, Failure> {
        self.call(|| self.inner.identity())
    }
}

/// Two identical keys without serials, two with one each, and a fifth of another kind.
const KINDS: [(&str, Option<&str>); 5] =
    [("0001", None), ("0001", None), ("0002", Some("A")), ("0002", Some("B")), ("0003", None)];
const PORTS: usize = 6;

struct World {
    dir: tempfile::TempDir,
    config: Config,
    simulated: Arc<SimulatedHypervisor>,
    hypervisor: Arc<Fused>,
    worker: Worker,
    /// Device and number at each port.
    plugged: BTreeMap<usize, (usize, u8)>,
    number: u8,
    domains: Vec<Option<bool>>,
    _events: std::sync::mpsc::Receiver<Event>,
}

fn instance(n: usize) -> InstanceId {
    format!("0000000{n}-2222-4333-8444-555555555555").parse().unwrap()
}

/// Requests of the domains: one key of the twins; both with a serial; none.
const FLAVORS: [&str; 3] = [
    r#"{"usb_devices":[{"vendor_id":"0529","product_id":"0001"}]}"#,
    r#"{"usb_devices":[{"vendor_id":"0529","product_id":"0002","count":2}]}"#,
    r#"{"usb_devices":[]}"#,
];

impl World {
    fn new(replug: ReplugPolicy) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let kernel = dir.path().join("proc/sys/kernel/random");
        std::fs::create_dir_all(&kernel).unwrap();
        std::fs::write(kernel.join("boot_id"), "11111111-1111-4111-8111-111111111111\n").unwrap();
        std::fs::write(dir.path().join("proc/uptime"), "1000.00 1.00\n").unwrap();
        let config = Config {
            state_dir: dir.path().join("state"),
            sysfs_root: dir.path().join("sys"),
            procfs_root: dir.path().join("proc"),
            log: Log::Off,
            replug,
            flapping: Limits { limit: 0, ..Limits::default() },
            ..Config::default()
        };
        let store = Store::create(&config.state_dir, Duration::from_secs(5)).unwrap();
        let (to, events) = channel();
        let simulated = Arc::new(SimulatedHypervisor::new(config.clone(), to));
        let fuse = AtomicUsize::new(NEVER);
        let hypervisor =
            Arc::new(Fused { inner: simulated.clone(), fuse, meanwhile: Mutex::default() });
        let worker = Worker {
            config: Arc::new(config.clone()),
            hypervisor: hypervisor.clone(),
            store,
            metrics: Arc::default(),
            actor: "test".into(),
        };
        let mut world = Self {
            dir,
            config,
            simulated,
            hypervisor,
            worker,
            plugged: BTreeMap::new(),
            number: 1,
            domains: vec![None; 3],
            _events: events,
        };
        world.scan();
        world
    }

    fn plug(&mut self, device: usize, port: usize) {
        if self.plugged.contains_key(&port) || self.plugged.values().any(|(d, _)| *d == device) {
            return;
        }
        self.number = self.number % 120 + 1;
        self.plugged.insert(port, (device, self.number));
        self.show();
    }

    fn show(&self) {
        let mut text = String::new();
        for (port, (device, number)) in &self.plugged {
            let (product, serial) = KINDS[*device];
            let serial = serial.map(|s| format!("serial = '{s}'")).unwrap_or_default();
            writeln!(
                text,
                "[[device]]\nvendor = '0529'\nproduct = '{product}'\nbus = 1\ndevice = \
                    {number}\nport = '1-{}'\nspeed = 'full'\n{serial}",
                port + 1
            )
            .unwrap();
        }
        std::fs::write(self.file(), text).unwrap();
        Simulated::load(&self.file()).unwrap().write_sysfs(&self.config.sysfs_root).unwrap();
    }

    fn file(&self) -> std::path::PathBuf {
        self.dir.path().join("devices.toml")
    }

    fn scan(&mut self) {
        if !self.file().exists() {
            self.show();
        }
        let snapshot = Simulated::load(&self.file()).unwrap().snapshot();
        let context = host_env::context(&self.config, "test").unwrap();
        let plan = |known: &[Record]| {
            inventory::plan(&snapshot, known, &self.config.whitelist, &self.config.aliases)
        };
        let seen = snapshot.seen(&self.config.aliases);
        self.worker.store.reconcile("host", &self.config.flapping, seen, plan, &context).unwrap();
    }

    fn domains(&mut self) {
        let mut text = String::new();
        for (n, running) in self.domains.iter().enumerate() {
            let Some(running) = running else { continue };
            writeln!(
                text,
                "[[domain]]\nname = 'vm{n}'\nuuid = '{}'\nrunning = {running}\nflavor = '{}'",
                instance(n),
                FLAVORS[n]
            )
            .unwrap();
        }
        // A start that the hook refuses is a domain that does not run.
        drop(self.simulated.apply(&text).unwrap());
    }

    fn live(&self) -> Vec<(InstanceId, Domain)> {
        let running = self.simulated.running().unwrap();
        let running = running.into_iter().filter_map(|id| self.simulated.look(id).unwrap());
        running.map(|r| (r.instance, virt_usb_domxml::read(r.xml.as_bytes()).unwrap())).collect()
    }

    /// Rule 2, which holds at every moment: no address is in two guests, and what we put there is
    /// who it is said to be.
    fn is_safe(&self) -> Result<(), TestCaseError> {
        let mut seen = BTreeSet::new();
        for (_, domain) in self.live() {
            for hostdev in &domain.hostdevs {
                prop_assert!(
                    seen.insert(hostdev.address),
                    "{:?} is in two guests",
                    hostdev.address
                );
            }
        }
        Ok(())
    }

    /// Scans and checks all instances until nothing is left to do, as the agent does after a start,
    /// with all grace periods over.
    fn settle(&mut self) -> bool {
        self.hypervisor.fuse.store(NEVER, Ordering::SeqCst);
        self.scan();
        let gone = Absence { seconds: 1000.0, undefined: None };
        let mut changed = false;
        for n in 0..3 {
            let undefined = self.domains[n].is_none().then_some(1000.0);
            let absence = ObservedAbsence { gone: Absence { undefined, ..gone }, claims: None };
            let report = self.worker.converge(instance(n), &absence, &BTreeSet::new()).unwrap();
            changed |= report.changed;
        }
        changed
    }

    fn is_settled(&self) -> Result<(), TestCaseError> {
        self.is_safe()?;
        let live = self.live();
        let claims = self.worker.store.claims().unwrap();
        let devices: BTreeMap<DeviceId, Record> =
            self.worker.store.devices().unwrap().into_iter().map(|r| (r.entry.id, r)).collect();
        for claim in &claims {
            let record = &devices[&claim.device_id];
            let runs = live.iter().find(|(id, _)| *id == claim.instance_uuid);
            prop_assert!(runs.is_some() || claim.is_lasting(), "an orphan: {claim:?}");
            prop_assert!(!claim.ending, "never finished: {claim:?}");
            prop_assert!(runs.is_none() || !claim.needs_reattach, "never reattached: {claim:?}");
            let Some((_, domain)) = runs else {
                prop_assert_eq!(&claim.state, "claimed");
                continue;
            };
            let inside = domain.hostdevs.iter().any(|h| h.address == Some(record.entry.address));
            // A user has attached it to another guest by hand: this is reported, and not undone.
            let elsewhere = live.iter().filter(|(id, _)| *id != claim.instance_uuid);
            let by_hand = |(_, d): &(InstanceId, Domain)| {
                d.hostdevs
                    .iter()
                    .any(|h| h.injected().is_none() && h.address == Some(record.entry.address))
            };
            if record.present && elsewhere.clone().any(by_hand) {
                prop_assert!(!self.worker.store.problems().unwrap().is_empty());
                continue;
            }
            prop_assert_eq!(record.present, inside, "{:?} of {:?}", record.entry, domain.hostdevs);
            prop_assert_eq!(claim.is_allocated(), inside, "{:?}", claim);
        }
        for (id, domain) in &live {
            for hostdev in &domain.hostdevs {
                let held = claims.iter().any(|c| {
                    c.instance_uuid == *id
                        && Some(devices[&c.device_id].entry.address) == hostdev.address
                });
                let let_go = self.simulated.let_go(*id);
                prop_assert!(
                    !held || hostdev.alias.as_ref().is_none_or(|alias| !let_go.contains(alias)),
                    "QEMU does not have {:?} of {}",
                    hostdev,
                    domain.name
                );
                let by_hand = hostdev.injected().is_none();
                let nobodys = !devices
                    .values()
                    .any(|r| r.present && Some(r.entry.address) == hostdev.address);
                let anothers = claims.iter().any(|c| {
                    c.instance_uuid != *id
                        && Some(devices[&c.device_id].entry.address) == hostdev.address
                });
                prop_assert!(
                    held || (by_hand && (nobodys || anothers)),
                    "no instance holds {:?} of {}",
                    hostdev,
                    domain.name
                );
            }
        }
        // What is plugged in is in the inventory, once.
        let present: BTreeSet<BusAddress> =
            devices.values().filter(|r| r.present).map(|r| r.entry.address).collect();
        let plugged: BTreeSet<BusAddress> =
            self.plugged.values().map(|(_, n)| BusAddress::new(1, *n).unwrap()).collect();
        prop_assert_eq!(present, plugged);
        prop_assert_eq!(self.worker.store.check().unwrap(), Vec::<String>::new());
        Ok(())
    }
}

#[derive(Debug, Clone)]
enum Act {
    Plug(usize, usize),
    Unplug(usize),
    /// Two devices change places between two scans.
    Swap(usize, usize),
    Domain(usize, Option<bool>),
    Vanish(usize),
    Scan,
    /// Works on one instance, cut off after a number of calls.
    Work(usize, usize),
    ByHand(usize, usize),
    /// Takes the first device out of a guest with his own hands.
    TakeByHand(usize),
    /// Saves a guest and restores it.
    Restore(usize),
    Give(usize, usize),
    Take(usize, usize),
}

fn acts() -> impl Strategy<Value = Vec<Act>> {
    let act = prop_oneof![
        4 => (0..KINDS.len(), 0..PORTS).prop_map(|(d, p)| Act::Plug(d, p)),
        3 => (0..PORTS).prop_map(Act::Unplug),
        1 => (0..PORTS, 0..PORTS).prop_map(|(a, b)| Act::Swap(a, b)),
        5 => (0..3usize, prop::sample::select(vec![None, Some(false), Some(true), Some(true)]))
            .prop_map(|(n, to)| Act::Domain(n, to)),
        1 => (0..3usize).prop_map(Act::Vanish),
        4 => Just(Act::Scan),
        6 => (0..3usize, prop_oneof![Just(NEVER), 0..8usize])
            .prop_map(|(n, fuse)| Act::Work(n, fuse)),
        1 => (0..3usize, 0..PORTS).prop_map(|(n, p)| Act::ByHand(n, p)),
        1 => (0..3usize).prop_map(Act::TakeByHand),
        2 => (0..3usize).prop_map(Act::Restore),
        2 => (0..3usize, 1..6usize).prop_map(|(n, d)| Act::Give(n, d)),
        2 => (0..3usize, 1..6usize).prop_map(|(n, d)| Act::Take(n, d)),
    ];
    prop::collection::vec(act, 1..50)
}

fn by_id(id: usize) -> DeviceRequest {
    let flavor = Flavor::parse_lists(Some(&format!(r#"[{{"id":{id}}}]"#)), None).unwrap();
    flavor.usb_devices.into_iter().next().unwrap()
}

impl World {
    fn act(&mut self, act: &Act) {
        self.hypervisor.fuse.store(NEVER, Ordering::SeqCst);
        match act {
            Act::Plug(device, port) => self.plug(*device, *port),
            Act::Unplug(port) => {
                self.plugged.remove(port);
                self.show();
            }
            Act::Swap(a, b) => {
                let (first, second) = (self.plugged.remove(a), self.plugged.remove(b));
                self.show();
                for (found, to) in [(first, *b), (second, *a)] {
                    if let Some((device, _)) = found {
                        self.plug(device, to);
                    }
                }
            }
            Act::Domain(n, to) => {
                let runs = self.simulated.look(instance(*n)).unwrap().is_some();
                if *to == Some(true) && !runs && self.domains[*n] == Some(true) {
                    // Its start was refused: it is tried again.
                    self.domains[*n] = Some(false);
                    self.domains();
                }
                self.domains[*n] = *to;
                self.domains();
            }
            Act::Vanish(n) => self.simulated.vanish(instance(*n)),
            Act::Scan => self.scan(),
            Act::Work(n, fuse) => {
                self.hypervisor.fuse.store(*fuse, Ordering::SeqCst);
                drop(self.worker.converge(
                    instance(*n),
                    &ObservedAbsence::default(),
                    &BTreeSet::new(),
                ));
            }
            Act::ByHand(n, port) => {
                if let Some((_, number)) = self.plugged.get(port) {
                    let (product, _) = KINDS[self.plugged[port].0];
                    let hostdev = format!(
                        "<hostdev mode='subsystem' type='usb'><source><vendor \
                            id='0x0529'/><product id='0x{product}'/><address bus='1' \
                            device='{number}'/></source><alias name='hostdev{number}'/></hostdev>"
                    );
                    // Another guest may have it: then libvirt refuses.
                    drop(self.simulated.attach(instance(*n), &hostdev));
                }
            }
            Act::TakeByHand(n) => {
                let live = self.live();
                let domain = live.iter().find(|(id, _)| *id == instance(*n)).map(|(_, d)| d);
                if let Some(alias) = domain.and_then(|d| d.hostdevs.first()?.alias.clone()) {
                    self.simulated.detach(instance(*n), &alias).unwrap();
                }
            }
            // Refused where its device is gone or another's: then it does not run. What moved just
            // before without a serial has no row yet: an agent that lives has made one.
            Act::Restore(n) => {
                self.scan();
                drop(self.simulated.save_and_restore(instance(*n)));
            }
            // Refusals are right answers here; what must hold is looked at afterwards.
            Act::Give(n, id) => drop(self.worker.give(instance(*n), &[by_id(*id)])),
            Act::Take(n, id) => drop(self.worker.take(instance(*n), &[by_id(*id).selector])),
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: cases(64), ..ProptestConfig::default() })]

    #[test]
    fn whatever_happens_it_ends_well(acts in acts(), release in any::<bool>()) {
        let policy = if release { ReplugPolicy::Release } else { ReplugPolicy::Reattach };
        let mut world = World::new(policy);
        // A host in the middle of its day.
        let mut morning: Vec<Act> = (0..5).map(|d| Act::Plug(d, d)).chain([Act::Scan]).collect();
        morning.extend((0..3).map(|n| Act::Domain(n, Some(true))));
        morning.extend([Act::Work(0, NEVER), Act::Give(2, 5)]);
        for act in morning.iter().chain(&acts) {
            world.act(act);
            world.is_safe()?;
        }
        world.settle();
        // What was freed may be what another waits for.
        world.settle();
        world.is_settled()?;
        prop_assert!(!world.settle(), "there is always something to do");
    }
}

fn started(world: &mut World, n: usize) {
    world.domains[n] = Some(true);
    world.domains();
}

#[test]
fn a_guest_gets_its_key_and_gets_it_back_after_a_replug() {
    let mut world = World::new(ReplugPolicy::Reattach);
    world.plug(0, 0);
    world.scan();
    started(&mut world, 0);
    assert!(world.live()[0].1.hostdevs.is_empty(), "libvirt throws away what prepare prints");
    assert!(world.settle());
    let first = world.live()[0].1.hostdevs[0].clone();
    assert_eq!((first.alias.as_deref(), first.usb.is_some()), (Some("ua-usb-1"), true));
    world.act(&Act::Unplug(0));
    world.settle();
    assert!(world.live()[0].1.hostdevs.is_empty(), "the stale one is taken out");
    assert_eq!(world.worker.store.devices().unwrap()[0].entry.status, "removed");
    // Another device in that port is not handed over.
    world.plug(4, 0);
    world.settle();
    assert!(world.live()[0].1.hostdevs.is_empty());
    world.act(&Act::Unplug(0));
    world.plug(0, 0);
    world.settle();
    let again = world.live()[0].1.hostdevs[0].clone();
    assert_eq!(again.alias, first.alias);
    assert_ne!(again.address, first.address);
    world.is_settled().unwrap();
}

#[test]
fn a_failed_attach_is_reported_and_can_stop_the_guest() {
    for policy in [AttachFailurePolicy::Keep, AttachFailurePolicy::Stop] {
        let mut world = World::new(ReplugPolicy::Reattach);
        world.worker.config =
            Arc::new(Config { on_attach_failure: policy, ..world.config.clone() });
        world.plug(0, 0);
        world.scan();
        started(&mut world, 0);
        // Another program takes all its ports before the agent comes, with unknown devices.
        for n in 100..115 {
            let other = format!(
                "<hostdev mode='subsystem' type='usb'><source><address bus='9' \
                    device='{n}'/></source><alias name='h{n}'/></hostdev>"
            );
            world.simulated.attach(instance(0), &other).unwrap();
        }
        let report = world
            .worker
            .converge(instance(0), &ObservedAbsence::default(), &BTreeSet::new())
            .unwrap();
        let events = world.worker.store.events(&virt_usb_store::events::Filter::default()).unwrap();
        let told =
            events.iter().find(|e| e.event == "problem").and_then(|e| e.detail.clone()).unwrap();
        assert!(
            told.contains(
                "1 USB port for full-speed devices is needed, 0 are free: add a second \
                    controller"
            ),
            "{told}"
        );
        let runs = !world.live().is_empty();
        assert_eq!(runs, policy == AttachFailurePolicy::Keep);
        assert_eq!(report.failed.is_empty(), !runs);
        let device = events.iter().find(|e| e.event == "problem").and_then(|e| e.device_id);
        assert_eq!(device.is_some(), runs, "an audit of the device shows it");
        if runs {
            world.simulated.detach(instance(0), "h100").unwrap();
            world.settle();
            assert_eq!(world.worker.store.problems().unwrap(), [], "solved");
        } else {
            world.settle();
            let why = world.worker.store.problems().unwrap();
            assert!(
                why.len() == 1 && why[0].what.contains("the guest was stopped"),
                "until its next start: {why:?}"
            );
            assert_eq!(why[0].domain, "vm0");
            world.domains[0] = Some(false);
            world.domains();
            world.worker.config = Arc::new(world.config.clone());
            started(&mut world, 0);
            world.settle();
            assert_eq!(world.worker.store.problems().unwrap(), []);
        }
    }
}

#[test]
fn giving_and_taking_is_all_or_nothing() {
    let mut world = World::new(ReplugPolicy::Reattach);
    for (device, port) in [(0, 0), (1, 1), (2, 2)] {
        world.plug(device, port);
    }
    world.scan();
    started(&mut world, 2);
    let two =
        Flavor::parse_lists(Some(r#"[{"vendor_id":"0529","product_id":"0001","count":2}]"#), None)
            .unwrap();
    let given = world.worker.give(instance(2), &two.usb_devices).unwrap();
    assert_eq!((given.live, given.new.len()), (true, 2));
    assert_eq!(world.worker.give(instance(2), &[by_id(1)]).unwrap().already.len(), 1);
    // Nothing is left of what cannot be.
    let three = Flavor::parse_lists(Some(r#"[{"vendor_id":"0529","count":9}]"#), None).unwrap();
    let why = world.worker.give(instance(2), &three.usb_devices).unwrap_err().to_string();
    assert!(why.contains("vm2 asks for usb_devices[0]"), "{why}");
    assert_eq!(world.worker.store.assignments(instance(2)).unwrap().len(), 1);
    // Two devices match the selector: the operator must choose one.
    let why = world
        .worker
        .take(instance(2), &[two.usb_devices[0].selector.clone()])
        .unwrap_err()
        .to_string();
    assert!(why.contains("has 2 matching devices: name one by its id"), "{why}");
    let taken = world.worker.take(instance(2), &[by_id(1).selector]).unwrap().remove(0).unwrap();
    assert_eq!(taken.entry.id, DeviceId::new(1).unwrap());
    let left = world.worker.store.assignments(instance(2)).unwrap();
    assert_eq!(left[0].request.count, 1, "one of the two is still wanted");
    assert_eq!(world.live()[0].1.hostdevs.len(), 1);
    world.settle();
    world.is_settled().unwrap();
    // At its next start it gets it again, and what was given to it while it did not run.
    world.domains[2] = Some(false);
    world.domains();
    let later = world.worker.give(instance(2), &[by_id(3)]).unwrap();
    assert_eq!(later, Attached { live: false, new: vec![], already: vec![] });
    started(&mut world, 2);
    world.settle();
    assert_eq!(world.live()[0].1.hostdevs.len(), 2);
    // The instance goes for good: so does what was assigned to it.
    world.domains[2] = None;
    world.domains();
    world.settle();
    assert_eq!(world.worker.store.claims().unwrap(), []);
    assert_eq!(world.worker.store.all_assignments().unwrap(), []);
}

impl World {
    /// Whether the device is assigned to the domain, claimed for it, and in its guest: all of it or
    /// nothing.
    fn has_wholly(&self, n: usize, id: usize) -> bool {
        let store = &self.worker.store;
        let assigned = store
            .assignments(instance(n))
            .unwrap()
            .iter()
            .filter(|a| a.request == by_id(id))
            .count();
        let claimed = store
            .claims_of(instance(n))
            .unwrap()
            .iter()
            .filter(|c| Some(c.device_id) == by_id(id).selector.id)
            .count();
        let live = self.live();
        let inside = |(of, domain): &(InstanceId, Domain)| {
            *of == instance(n)
                && domain.hostdevs.iter().any(|h| h.injected() == by_id(id).selector.id)
        };
        let inside = live.iter().filter(|guest| inside(guest)).count();
        assert!(
            [assigned, claimed, inside] == [assigned; 3] && assigned < 2,
            "{assigned} {claimed} {inside}: {:#?} {:#?}",
            store.claims().unwrap(),
            store.events(&virt_usb_store::events::Filter::default()).unwrap()
        );
        assigned == 1
    }
}

impl World {
    /// Another worker at the same time.
    fn another(&self) -> Worker {
        let (config, metrics) = (Arc::new(self.config.clone()), Arc::default());
        Worker::open(config, self.hypervisor.clone(), metrics, "test").unwrap()
    }
}

#[test]
fn a_device_that_is_taken_just_before_it_is_attached_leaves_the_guest() {
    let mut world = World::new(ReplugPolicy::Reattach);
    world.plug(0, 0);
    world.scan();
    started(&mut world, 2);
    let mut taker = world.another();
    *world.hypervisor.meanwhile.lock().unwrap() = Some(Box::new(move || {
        taker.take(instance(2), &[by_id(1).selector]).unwrap();
    }));
    let given = world.worker.give(instance(2), &[by_id(1)]).unwrap_err().to_string();
    assert!(given.contains("it was detached at the same time"), "{given}");
    assert!(!world.has_wholly(2, 1));
    world.settle();
    assert!(!world.has_wholly(2, 1));
}

#[test]
fn an_alias_of_our_form_does_not_make_a_hostdev_ours() {
    let mut world = World::new(ReplugPolicy::Reattach);
    world.plug(0, 0);
    world.plug(1, 1);
    world.scan();
    started(&mut world, 2);
    let number = world.plugged[&1].1;
    let hostdev = format!(
        "<hostdev mode='subsystem' type='usb'><source><vendor id='0x0529'/><product \
            id='0x0001'/><address bus='1' device='{number}'/></source><alias \
            name='ua-usb-1'/></hostdev>"
    );
    world.simulated.attach(instance(2), &hostdev).unwrap();
    world.settle();
    let claims = world.worker.store.claims().unwrap();
    assert_eq!((claims.len(), claims[0].device_id), (1, DeviceId::new(2).unwrap()));
    // Device 1 cannot have its alias, and the other one stays.
    let why = world.worker.give(instance(2), &[by_id(1)]).unwrap_err().to_string();
    assert!(why.contains("virt-usb needs that alias"), "{why}");
    world.settle();
    assert_eq!(world.worker.store.claims().unwrap().len(), 1);
    // The same where device 1 was claimed before.
    let context = host_env::context(&world.config, "test").unwrap();
    let whom = world.worker.store.claimant(instance(2), "vm2", None).unwrap();
    let want =
        virt_usb_store::claim::ClaimRequest { request: by_id(1), lasting: false, number: None };
    let firm = virt_usb_store::claim::ClaimMode::Replace;
    let mut ports = Ports { sysfs_root: &world.config.sysfs_root };
    world.worker.store.claim(&whom, &[want], &[], firm, &mut ports, &context).unwrap();
    world.settle();
    let twin = BusAddress::new(1, number).unwrap();
    assert_eq!(world.live()[0].1.hostdevs.len(), 1);
    assert_eq!(world.live()[0].1.hostdevs[0].address, Some(twin));
}

#[test]
fn a_device_is_given_and_taken_whole_however_often_at_once() {
    let mut world = World::new(ReplugPolicy::Reattach);
    world.plug(0, 0);
    world.scan();
    started(&mut world, 2);
    let (mut giver, mut taker) = (world.another(), world.another());
    std::thread::scope(|scope| {
        scope.spawn(move || (0..40).for_each(|_| drop(giver.give(instance(2), &[by_id(1)]))));
        scope.spawn(move || {
            (0..40).for_each(|_| drop(taker.take(instance(2), &[by_id(1).selector])));
        });
    });
    world.settle();
    world.has_wholly(2, 1);
}

#[test]
fn a_device_is_given_whole_or_not_at_all_wherever_that_is_cut_off() {
    let mut world = World::new(ReplugPolicy::Reattach);
    world.plug(0, 0);
    world.scan();
    started(&mut world, 2);
    let mut outcomes = BTreeSet::new();
    for fuse in 0..16 {
        for give in [true, false] {
            world.hypervisor.fuse.store(fuse, Ordering::SeqCst);
            let done = match give {
                true => world.worker.give(instance(2), &[by_id(1)]).is_ok(),
                false => world.worker.take(instance(2), &[by_id(1).selector]).is_ok(),
            };
            world.settle();
            let has = world.has_wholly(2, 1);
            assert!(!done || has == give, "{fuse}: {give}, but {has}");
            outcomes.insert((give, done, has));
        }
    }
    assert!(
        outcomes
            .is_superset(&[(true, true, true), (true, false, false), (false, true, false)].into()),
        "{outcomes:?}"
    );
}

#[test]
fn no_instance_is_assigned_more_than_a_bus_can_have() {
    let mut world = World::new(ReplugPolicy::Reattach);
    world.domains[2] = Some(false);
    world.domains();
    let ask = |json: &str| Flavor::parse_lists(Some(json), None).unwrap().usb_devices;
    let why =
        world.worker.give(instance(2), &ask(r#"[{"vendor_id":"0529"}]"#)).unwrap_err().to_string();
    assert!(
        why.contains("this host has no such device"),
        "what was never seen is not promised: {why}"
    );
    world.plug(0, 0);
    world.scan();
    let hundred = vec![ask(r#"[{"vendor_id":"0529"}]"#).remove(0); 100];
    world.worker.give(instance(2), &hundred).unwrap();
    let why = world.worker.give(instance(2), &hundred).unwrap_err().to_string();
    assert_eq!(why, "vm2: 200 devices would be assigned to it: at most 127 are allowed");
    assert_eq!(world.worker.store.assignments(instance(2)).unwrap().len(), 100);
}

#[test]
fn a_key_that_shows_another_kind_stays_with_its_guest() {
    let mut world = World::new(ReplugPolicy::Reattach);
    world.config.aliases = Aliases::parse(&[vec!["0529:0001".into(), "0529:0003".into()]]).unwrap();
    world.plug(0, 0);
    world.scan();
    started(&mut world, 0);
    world.settle();
    for other in [4, 0] {
        world.act(&Act::Unplug(0));
        world.plug(other, 0);
        world.settle();
        let claims = world.worker.store.claims().unwrap();
        assert_eq!((claims[0].device_id.get(), claims[0].state.as_str()), (1, "allocated"));
        let live = world.live();
        let product = live[0].1.hostdevs[0].usb.unwrap().product.to_string();
        assert_eq!((live[0].1.hostdevs.len(), product.as_str()), (1, KINDS[other].0));
        world.is_settled().unwrap();
    }
}

#[test]
fn a_key_that_comes_and_goes_is_given_back_once_it_has_stayed() {
    let mut world = World::new(ReplugPolicy::Reattach);
    world.config.flapping = Limits { limit: 3, window: 600, pause: 1, quarantine: 1 };
    world.plug(0, 0);
    world.scan();
    started(&mut world, 0);
    world.settle();
    let replug = |world: &mut World| {
        world.act(&Act::Unplug(0));
        world.settle();
        world.plug(0, 0);
        world.settle();
    };
    for _ in 0..2 {
        replug(&mut world);
        assert_eq!(world.live()[0].1.hostdevs.len(), 1);
    }
    replug(&mut world);
    assert_eq!(world.live()[0].1.hostdevs.len(), 0, "it is not given back at once");
    let why = world.worker.store.problems().unwrap();
    assert!(why[0].what.starts_with("it connects and disconnects too often"), "{why:?}");
    while world.worker.store.devices().unwrap()[0].flapping_until.is_some() {
        std::thread::sleep(Duration::from_millis(50));
        world.scan();
    }
    world.settle();
    assert_eq!(world.live()[0].1.hostdevs.len(), 1);
    assert_eq!(world.worker.store.problems().unwrap(), []);
    // The second time in a day an operator has to look at it.
    for _ in 0..3 {
        replug(&mut world);
    }
    assert_eq!(world.live()[0].1.hostdevs.len(), 0);
    let why = world.worker.store.problems().unwrap();
    assert!(why[0].what.ends_with("then 'virt-usb quarantine clear 1'"), "{why:?}");
    let context = host_env::context(&world.config, "test").unwrap();
    world.worker.store.clear_quarantine(DeviceId::new(1).unwrap(), &context).unwrap();
    world.settle();
    assert_eq!(world.live()[0].1.hostdevs.len(), 1);
    world.is_settled().unwrap();
}

#[test]
fn handwritten_hostdevs_are_adopted_and_conflicts_reported() {
    let mut world = World::new(ReplugPolicy::Reattach);
    world.plug(0, 0);
    world.plug(1, 1);
    world.scan();
    started(&mut world, 2);
    world.act(&Act::ByHand(2, 1));
    world.settle();
    let adopted = world.worker.store.claims().unwrap();
    assert_eq!((adopted.len(), adopted[0].state.as_str()), (1, "allocated"));
    world.is_settled().unwrap();
    let events = world.worker.store.events(&virt_usb_store::events::Filter::default()).unwrap();
    assert!(events.iter().any(|e| e.event == "adopted"));
    // Unplugged and back: its guest's still. Taken out by the hand that gave it: free.
    world.act(&Act::Unplug(1));
    world.settle();
    world.plug(1, 1);
    world.settle();
    let alias = world.live()[0].1.hostdevs[0].alias.clone().unwrap();
    assert_eq!(world.worker.store.claims().unwrap()[0].state, "allocated");
    world.simulated.detach(instance(2), &alias).unwrap();
    world.settle();
    assert_eq!(world.worker.store.claims().unwrap(), []);
    world.is_settled().unwrap();
}

#[test]
fn a_restored_guest_gets_its_key_again_wherever_the_agent_is_killed() {
    for fuse in (0..12).chain([NEVER]) {
        let mut world = World::new(ReplugPolicy::Reattach);
        world.plug(0, 0);
        world.scan();
        started(&mut world, 0);
        world.settle();
        let alias = world.live()[0].1.hostdevs[0].alias.clone().unwrap();
        world.simulated.save_and_restore(instance(0)).unwrap();
        assert_eq!(
            world.simulated.let_go(instance(0)),
            [alias],
            "the XML shows it, QEMU does not have it"
        );
        assert_eq!(world.worker.store.claims().unwrap()[0].state, "claimed", "and so we say");
        world.act(&Act::Work(0, fuse));
        world.settle();
        assert_eq!(world.live()[0].1.hostdevs.len(), 1, "cut off after {fuse} calls");
        assert!(world.simulated.let_go(instance(0)).is_empty(), "cut off after {fuse} calls");
        world.is_settled().unwrap();
    }
}
