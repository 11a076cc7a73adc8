//! `fleet simulate`: simulates many hosts on one machine, with a real etcd. Inventories, publishers
//! and the scheduler's view are real; devices and guests are simulated. Invariants are checked
//! during the run and at the end.
//!
//! | invariant | checked |
//! |---|---|
//! | no device is in two guests | at each start |
//! | a host's revision never falls | at each document |
//! | no two devices have the same id | at the end |
//! | the watcher knows the same documents as a new list | at the end |
//! | the document of each running host equals its inventory; a stopped host has none | at the end |
//! | the filter finds as many hosts as the inventories | at the end |

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use etcd_client::DeleteOptions;
use serde::Serialize;
use tokio::runtime::Runtime;
use tokio::sync::Notify;
use tokio::task::JoinHandle;
use virt_usb_config::{Config, Fleet};
use virt_usb_filter_host::{Filter, Question};
use virt_usb_model::{
    BusAddress, Class, Device, DeviceId, DeviceKey, Flavor, HostDocument, InstanceId, PortPath,
    Serial, UsbId, Whitelist,
};
use virt_usb_store::claim::{
    ClaimMode, ClaimRequest, ClaimVerifier, Claimant, Claimed, Granted, Verified,
};
use virt_usb_store::flaps::Limits;
use virt_usb_store::release::Extent;
use virt_usb_store::{Context, Record, Store};

use super::publisher::Publisher;
use crate::discovery::Snapshot;
use crate::metrics::Metrics;
use crate::timeouts::STORE_LOCK_TIMEOUT;
use virt_usb_fleet::etcd::Etcd;
use virt_usb_fleet::join;
use virt_usb_fleet::reader::{Reader, Sink};
use virt_usb_fleet::scheduler::View;

/// Timeout for the watcher to receive all changes.
const SETTLE_TIMEOUT: Duration = Duration::from_secs(60);
/// Duration of the assumption for a guest that starts.
const ASSUME_DURATION: Duration = Duration::from_secs(10);
/// Number of different kinds of devices.
const KINDS: u64 = 8;

/// Parameters of the simulation.
#[derive(Debug)]
pub(crate) struct Options {
    /// Endpoints and prefix. The simulation uses keys below the prefix, and removes them at the
    /// end.
    pub(crate) fleet: Fleet,
    pub(crate) filter: Filter,
    pub(crate) hosts: u32,
    /// Number of devices on each host, plugged in or not.
    pub(crate) devices: u32,
    /// Changes per second on all hosts together.
    pub(crate) churn: u32,
    pub(crate) time: Duration,
    pub(crate) seed: u64,
}

/// Results of the simulation.
#[derive(Debug, Default, Serialize)]
pub(crate) struct Report {
    pub(crate) hosts: u32,
    pub(crate) devices: u32,
    pub(crate) seed: u64,
    /// Number of changes of each kind.
    pub(crate) done: BTreeMap<&'static str, u64>,
    /// Number of documents that the watcher received.
    pub(crate) documents: usize,
    /// Changes made per second.
    pub(crate) changes_per_second: f64,
    /// Time from a change in an inventory to the watcher, in milliseconds.
    pub(crate) lag_ms: Lag,
    /// Mean size of a document in bytes.
    pub(crate) mean_document: usize,
    pub(crate) largest_document: usize,
    /// Size of etcd's database in bytes.
    pub(crate) db_size: i64,
    /// Violated invariants. Must be empty.
    pub(crate) broken: Vec<String>,
}

#[derive(Debug, Default, Serialize)]
pub(crate) struct Lag {
    pub(crate) p50: f64,
    pub(crate) p99: f64,
    pub(crate) max: f64,
}

/// Random numbers by SplitMix64 (Steele, Lea, Flood 2014).
struct Rng(u64);

impl Rng {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ z >> 31) % bound.max(1)
    }

    fn index(&mut self, len: usize) -> usize {
        usize::try_from(self.below(len as u64)).unwrap_or_default()
    }
}

/// The watcher: measures the delay of documents, and passes them to the scheduler's view.
#[derive(Clone)]
struct Watcher {
    view: Arc<View>,
    received: Arc<Mutex<Received>>,
}

#[derive(Default)]
struct Received {
    /// The last document of each host, and its revision.
    now: HashMap<String, (u64, Vec<u8>)>,
    /// Revisions that were written and not received yet.
    written: HashMap<String, VecDeque<(u64, Instant)>>,
    lag: Vec<f64>,
    documents: usize,
    bytes: usize,
    largest: usize,
    broken: Vec<String>,
}

impl Watcher {
    fn received(&self) -> std::sync::MutexGuard<'_, Received> {
        self.received.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn written(&self, host: &str, revision: u64) {
        self.received()
            .written
            .entry(host.to_owned())
            .or_default()
            .push_back((revision, Instant::now()));
    }
}

impl Sink for Watcher {
    fn put(&mut self, key: &str, value: &[u8], revision: i64) {
        self.view.put(key, value, revision);
        let now = Instant::now();
        let mut received = self.received();
        let document = match HostDocument::parse(&String::from_utf8_lossy(value)) {
            Ok(document) => document,
            Err(e) => return received.broken.push(format!("the document of {key}: {e}")),
        };
        received.documents += 1;
        received.bytes += value.len();
        received.largest = received.largest.max(value.len());
        let before = received.now.insert(key.to_owned(), (document.revision, value.to_vec()));
        if let Some((before, _)) = before.filter(|(before, _)| *before > document.revision) {
            received
                .broken
                .push(format!("the revision of {key} fell from {before} to {}", document.revision));
        }
        let waiting = received.written.entry(key.to_owned()).or_default();
        let mut lags = Vec::new();
        while waiting.front().is_some_and(|(revision, _)| *revision <= document.revision) {
            lags.extend(waiting.pop_front().map(|(_, at)| (now - at).as_secs_f64() * 1e3));
        }
        received.lag.extend(lags);
    }

    fn removed(&mut self, key: &str) {
        self.view.removed(key);
        self.received().now.remove(key);
    }

    fn listed(&mut self) {
        self.view.listed();
    }

    fn disconnected(&mut self, why: &virt_usb_fleet::Error) {
        self.view.disconnected(why);
    }
}

/// A simulated host.
struct Host {
    name: String,
    dir: PathBuf,
    fleet: Fleet,
    store: Store,
    /// Whether each of its devices is plugged in.
    plugged: Vec<bool>,
    guests: Vec<InstanceId>,
    writes: Arc<Notify>,
    /// Task of the publisher. `None` while the host is stopped.
    publishing: Option<JoinHandle<()>>,
}

/// Verifier that accepts every device.
struct AcceptAll;

impl ClaimVerifier for AcceptAll {
    fn verify(&mut self, candidate: &Record) -> Verified {
        Verified::Here(candidate.location())
    }

    fn fits(&mut self, _: &[Granted]) -> Result<(), String> {
        Ok(())
    }
}

fn kind(number: u64) -> UsbId {
    UsbId::new(0x0529, 1 + u16::try_from(number % KINDS).unwrap_or_default())
}

/// Device `n` of a host, counted from 0. `None` if the buses have no more ports.
fn device(host: u32, n: usize) -> Option<Device> {
    const PER_BUS: usize = 120;
    let bus = u8::try_from(1 + n / PER_BUS).ok()?;
    let number = u8::try_from(1 + n % PER_BUS).ok()?;
    Some(Device {
        key: DeviceKey {
            usb: kind(u64::from(host) + n as u64),
            serial: Serial::Unique(format!("H{host}-{n}")),
            port: PortPath::new(bus, &[1 + number / 15, 1 + number % 15])?,
            path: None,
        },
        address: BusAddress::new(bus, number)?,
        class: Class::new(0),
        interfaces: vec![Class::new(0xff)],
        speed: None,
        manufacturer: None,
        product: Some("HASP HL 3.25".to_owned()),
        driver: None,
        host_use: None,
        descriptors: None,
        generation: None,
    })
}

impl Host {
    fn scan(&mut self, number: u32, context: &Context) -> anyhow::Result<()> {
        let devices = self.plugged.iter().enumerate().filter(|(_, plugged)| **plugged);
        let devices = devices.filter_map(|(n, _)| device(number, n)).collect();
        let snapshot = Snapshot { devices, ..Snapshot::default() };
        // Simulated devices reconnect more often than real ones.
        let limits = Limits { limit: 0, ..Limits::default() };
        let (whitelist, aliases) = (Whitelist::default(), virt_usb_model::Aliases::default());
        let plan =
            |known: &[Record]| crate::inventory::plan(&snapshot, known, &whitelist, &aliases);
        self.store.restart_lock_timeout();
        self.store.reconcile(&self.name, &limits, snapshot.seen(&aliases), plan, context)?;
        Ok(())
    }

    fn revision(&self) -> anyhow::Result<u64> {
        Ok(self.store.host_document()?.map_or(0, |document| document.revision))
    }

    fn start(&mut self, runtime: &Runtime) {
        let publisher = Publisher {
            fleet: self.fleet.clone(),
            config: Config { state_dir: self.dir.clone(), ..Config::default() },
            host: self.name.clone(),
            hypervisor: None,
            metrics: Arc::new(Metrics::default()),
        };
        self.publishing = Some(runtime.spawn(publisher.publish(Some(self.writes.clone()))));
    }

    fn stop(&mut self) {
        if let Some(publishing) = self.publishing.take() {
            publishing.abort();
        }
    }
}

/// Runs the simulation. Calls `progress` at the beginning of each phase.
///
/// # Errors
/// If the simulation cannot run. Violated invariants are not errors, but part of the report.
pub(crate) fn run(options: &Options, progress: impl Fn(&str)) -> anyhow::Result<Report> {
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let mut random = [0; 4];
    let _ = getrandom::fill(&mut random);
    let folder: String = random.iter().map(|byte| format!("{byte:02x}")).collect();
    let mut fleet = options.fleet.clone();
    fleet.prefix = format!("{}simulation-{folder}/", fleet.prefix);
    let result = simulate(options, &fleet, &runtime, &progress);
    progress("cleaning up");
    let cleaned = runtime.block_on(clean(&fleet));
    runtime.shutdown_timeout(Duration::from_secs(1));
    let report = result?;
    cleaned
        .with_context(|| format!("the simulation's keys remain in etcd, below {}", fleet.prefix))?;
    Ok(report)
}

async fn clean(fleet: &Fleet) -> anyhow::Result<()> {
    let mut etcd = Etcd::new(fleet.clone());
    let mut connection = etcd.connect().await?;
    let all = DeleteOptions::new().with_range(virt_usb_fleet::etcd::after(&fleet.prefix));
    etcd.within("remove the simulation", connection.client.delete(fleet.prefix.clone(), Some(all)))
        .await?;
    Ok(())
}

struct Simulation<'a> {
    options: &'a Options,
    runtime: &'a Runtime,
    watcher: Watcher,
    hosts: Vec<Host>,
    context: Context,
    rng: Rng,
    /// The guest of each device that is in use.
    held: HashMap<DeviceId, InstanceId>,
    report: Report,
}

fn simulate(
    options: &Options,
    fleet: &Fleet,
    runtime: &Runtime,
    progress: &impl Fn(&str),
) -> anyhow::Result<Report> {
    let folder = temporary_dir()?;
    let view = Arc::new(View::new(&options.filter));
    let watcher = Watcher { view: view.clone(), received: Arc::default() };
    let context = Context {
        boot_id: "00000000-0000-4000-8000-000000000001".to_owned(),
        uptime: 1000.0,
        pending_grace: 120.0,
        actor: "fleet simulate".to_owned(),
    };
    let mut simulation = Simulation {
        options,
        runtime,
        watcher: watcher.clone(),
        hosts: Vec::new(),
        context,
        rng: Rng(options.seed),
        held: HashMap::new(),
        report: Report {
            hosts: options.hosts,
            devices: options.devices,
            seed: options.seed,
            ..Report::default()
        },
    };
    progress(&format!("{} hosts join", options.hosts));
    for number in 0..options.hosts {
        let host = simulation.join(fleet, &folder.0, number)?;
        simulation.hosts.push(host);
    }
    let mut sink = watcher.clone();
    let mut reader =
        Reader::new(fleet, virt_usb_fleet::keys::Keys::new(fleet.prefix.clone()).hosts());
    let following = runtime.spawn(async move { reader.follow(&mut sink).await });
    for host in &mut simulation.hosts {
        host.start(runtime);
    }
    progress("all publish");
    simulation.settle()?;
    watcher.received().lag.clear();
    progress(&format!("{} changes per second for {} s", options.churn, options.time.as_secs()));
    simulation.churn(&view)?;
    progress("settling");
    simulation.settle()?;
    simulation.check(fleet, &view)?;
    following.abort();
    for host in &mut simulation.hosts {
        host.stop();
    }
    let Simulation { mut report, .. } = simulation;
    let mut received = watcher.received();
    received.lag.sort_by(f64::total_cmp);
    let at = |share: f64| {
        let last = received.lag.len().saturating_sub(1);
        received.lag.get((last as f64 * share).round() as usize).copied().unwrap_or_default()
    };
    report.lag_ms = Lag { p50: at(0.5), p99: at(0.99), max: at(1.0) };
    report.documents = received.documents;
    report.mean_document = received.bytes.checked_div(received.documents).unwrap_or_default();
    report.largest_document = received.largest;
    report.broken.append(&mut received.broken);
    Ok(report)
}

impl Simulation<'_> {
    fn join(&self, fleet: &Fleet, folder: &std::path::Path, number: u32) -> anyhow::Result<Host> {
        let name = format!("host-{number:05}");
        let dir = folder.join(&name);
        let mut store = Store::create(&dir, STORE_LOCK_TIMEOUT)?;
        let machine = folder.join(format!("{name}.machine"));
        std::fs::write(&machine, format!("{:032x}", u64::from(number) + 1))?;
        let fleet = Fleet { machine_id: machine, ..fleet.clone() };
        let node = self.runtime.block_on(join::join(&fleet, &name))?;
        store.renumber(&name, node, &self.context)?;
        let plugged = (0..self.options.devices).map(|n| n % 4 != 3).collect();
        let writes = Arc::new(Notify::new());
        let mut host =
            Host { name, dir, fleet, store, plugged, guests: Vec::new(), writes, publishing: None };
        host.scan(number, &self.context)?;
        Ok(host)
    }

    fn churn(&mut self, view: &View) -> anyhow::Result<()> {
        let begun = Instant::now();
        let mut made = 0u32;
        while begun.elapsed() < self.options.time {
            let due = begun + Duration::from_secs(1) * made / self.options.churn.max(1);
            std::thread::sleep(due.saturating_duration_since(Instant::now()));
            let what = self.change(view)?;
            *self.report.done.entry(what).or_default() += 1;
            made += 1;
            if made.is_multiple_of(64) {
                view.tick();
            }
        }
        self.report.changes_per_second = f64::from(made) / begun.elapsed().as_secs_f64();
        Ok(())
    }

    /// Makes one random change. Returns its name for the report.
    fn change(&mut self, view: &View) -> anyhow::Result<&'static str> {
        let at = self.rng.index(self.hosts.len());
        match self.rng.below(100) {
            0..40 => self.plug(at),
            40..70 => self.start(view),
            70..98 => self.stop(),
            _ => {
                let (runtime, host) = (self.runtime, &mut self.hosts[at]);
                if host.publishing.is_some() {
                    host.stop();
                    Ok("host stopped")
                } else {
                    host.start(runtime);
                    Ok("host started again")
                }
            }
        }
    }

    /// Plugs in or unplugs a device that no guest has.
    fn plug(&mut self, at: usize) -> anyhow::Result<&'static str> {
        let slot = self.rng.index(self.hosts[at].plugged.len());
        let host = &mut self.hosts[at];
        if host.publishing.is_none() || host.plugged.is_empty() {
            return Ok("nothing: the host is stopped");
        }
        let number = u32::try_from(at).unwrap_or_default();
        let port = device(number, slot).map(|device| device.key.port);
        let held =
            host.store.devices()?.iter().any(|r| {
                Some(&r.entry.port_path) == port.as_ref() && r.entry.instance_uuid.is_some()
            });
        if held {
            return Ok("nothing: the device is held");
        }
        host.plugged[slot] = !host.plugged[slot];
        let what = if host.plugged[slot] { "plugged in" } else { "unplugged" };
        host.scan(number, &self.context)?;
        self.written(at)?;
        Ok(what)
    }

    /// Starts a guest on the host that the scheduler selects.
    fn start(&mut self, view: &View) -> anyhow::Result<&'static str> {
        let usb = kind(self.rng.below(KINDS));
        let text = format!(
            r#"{{"usb_devices":[{{"vendor_id":"{}","product_id":"{}"}}]}}"#,
            usb.vendor, usb.product
        );
        let flavor = Flavor::parse(&text)?;
        let selected =
            view.select(&Question::new(flavor.clone()), None, 1, Some(ASSUME_DURATION))?;
        let Some(best) = selected.chosen.first() else { return Ok("no host for a guest") };
        let Some(at) = self.hosts.iter().position(|host| host.name == best.placement.host) else {
            bail!("the scheduler names a host that does not exist: {}", best.placement.host);
        };
        let id = u128::from(self.rng.below(u64::MAX)) << 64 | u128::from(self.rng.below(u64::MAX));
        let instance: InstanceId = format!("{id:032x}").parse()?;
        let host = &mut self.hosts[at];
        if host.publishing.is_none() {
            return Ok("start on a host that has just stopped");
        }
        let claimant = Claimant { instance, domain: format!("guest-{id:08x}"), project: None };
        let wants: Vec<ClaimRequest> = flavor
            .usb_devices
            .into_iter()
            .map(|request| ClaimRequest::new(request, false))
            .collect();
        host.store.restart_lock_timeout();
        match host.store.claim(
            &claimant,
            &wants,
            &[],
            ClaimMode::Replace,
            &mut AcceptAll,
            &self.context,
        )? {
            Claimed::Granted(granted) => {
                host.guests.push(instance);
                for device in granted.iter().map(|granted| granted.device.entry.id) {
                    if let Some(other) = self.held.insert(device, instance) {
                        self.report
                            .broken
                            .push(format!("device {device} is in {other} and in {instance}"));
                    }
                }
                self.written(at)?;
                Ok("started")
            }
            Claimed::Short(_) | Claimed::Unfit(_) => {
                Ok("start refused: the scheduler's view was outdated")
            }
        }
    }

    fn stop(&mut self) -> anyhow::Result<&'static str> {
        let with: Vec<usize> = (0..self.hosts.len())
            .filter(|at| self.hosts[*at].publishing.is_some() && !self.hosts[*at].guests.is_empty())
            .collect();
        if with.is_empty() {
            return Ok("nothing: there is no guest");
        }
        let at = with[self.rng.index(with.len())];
        let host = &mut self.hosts[at];
        let which = self.rng.index(host.guests.len());
        let instance = host.guests.swap_remove(which);
        host.store.restart_lock_timeout();
        host.store.release(instance, Extent::Run, "it stops", &self.context)?;
        self.held.retain(|_, holder| *holder != instance);
        self.written(at)?;
        Ok("stopped")
    }

    /// Notifies the publisher and the watcher of a write to the inventory.
    fn written(&self, at: usize) -> anyhow::Result<()> {
        let host = &self.hosts[at];
        self.watcher.written(&host.name, host.revision()?);
        host.writes.notify_one();
        Ok(())
    }

    /// Waits until the watcher has received all changes.
    fn settle(&self) -> anyhow::Result<()> {
        let begun = Instant::now();
        loop {
            let missing = self.missing()?;
            if missing.is_empty() {
                return Ok(());
            }
            if begun.elapsed() > SETTLE_TIMEOUT {
                let few: Vec<String> = missing.into_iter().take(5).collect();
                self.watcher.received().broken.push(format!(
                    "after {SETTLE_TIMEOUT:?} the watcher has not received: {}",
                    few.join(", ")
                ));
                return Ok(());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn missing(&self) -> anyhow::Result<Vec<String>> {
        let mut missing = Vec::new();
        for host in &self.hosts {
            let known = self.watcher.received().now.get(&host.name).map(|(revision, _)| *revision);
            match (&host.publishing, known) {
                (Some(_), known) if known != Some(host.revision()?) => {
                    missing.push(host.name.clone());
                }
                (None, Some(_)) => missing.push(format!("the stop of {}", host.name)),
                _ => {}
            }
        }
        Ok(missing)
    }

    fn check(&mut self, fleet: &Fleet, view: &View) -> anyhow::Result<()> {
        let mut broken = Vec::new();
        let mut listed: HashMap<String, Vec<u8>> = HashMap::new();
        let mut etcd = Etcd::new(fleet.clone());
        self.report.db_size = self.runtime.block_on(async {
            let mut connection = etcd.connect().await?;
            let prefix = etcd.keys().hosts();
            let each = |kv: &etcd_client::KeyValue| {
                let name = virt_usb_fleet::etcd::name(&prefix, kv.key()).unwrap_or_default();
                listed.insert(name, kv.value().to_vec());
            };
            etcd.list(&mut connection, &prefix, each).await?;
            Ok::<_, anyhow::Error>(
                etcd.within("read its status", connection.client.status()).await?.db_size(),
            )
        })?;
        let known: HashMap<String, Vec<u8>> = self
            .watcher
            .received()
            .now
            .iter()
            .map(|(name, (_, text))| (name.clone(), text.clone()))
            .collect();
        if known != listed {
            broken.push(format!(
                "the {} documents of the watcher differ from the {} documents of a new list",
                known.len(),
                listed.len()
            ));
        }
        let mut ids = HashSet::new();
        let mut claims: HashMap<DeviceId, InstanceId> = HashMap::new();
        for host in &self.hosts {
            let own = host.store.host_document()?;
            for device in own.iter().flat_map(|document| &document.devices) {
                if !ids.insert(device.id) {
                    broken.push(format!("two devices have the id {}", device.id));
                }
            }
            claims.extend(
                host.store
                    .claims()?
                    .into_iter()
                    .map(|claim| (claim.device_id, claim.instance_uuid)),
            );
            let published =
                listed.get(&host.name).map(|text| String::from_utf8_lossy(text).into_owned());
            let published = published.map(|text| HostDocument::parse(&text)).transpose()?;
            let expected = own.filter(|_| host.publishing.is_some());
            if published != expected {
                broken.push(format!(
                    "the published document of {} differs from its inventory",
                    host.name
                ));
            }
        }
        if claims != self.held {
            broken.push("the claims in the inventories differ from the guests' devices".to_owned());
        }
        for token in view.assumed().into_keys() {
            view.cancel(&token);
        }
        for number in 0..KINDS {
            let usb = kind(number);
            let text =
                format!(r#"[{{"vendor_id":"{}","product_id":"{}"}}]"#, usb.vendor, usb.product);
            let question = Question::new(Flavor::parse_lists(Some(&text), None)?);
            let found = view.select(&question, None, 1, None)?.matched;
            let mut expected = 0;
            for host in self.hosts.iter().filter(|host| host.publishing.is_some()) {
                let free = |r: &Record| r.usb() == usb && r.entry.status == "available";
                expected += u32::from(host.store.devices()?.iter().any(free));
            }
            if found != expected {
                broken.push(format!(
                    "the filter finds {found} hosts with {usb} free, the inventories have \
                        {expected}"
                ));
            }
        }
        self.report.broken.append(&mut broken);
        Ok(())
    }
}

/// A temporary directory, removed when dropped.
struct TemporaryDir(PathBuf);

impl Drop for TemporaryDir {
    fn drop(&mut self) {
        drop(std::fs::remove_dir_all(&self.0));
    }
}

fn temporary_dir() -> anyhow::Result<TemporaryDir> {
    let mut random = [0; 8];
    let _ = getrandom::fill(&mut random);
    let name: String = random.iter().map(|byte| format!("{byte:02x}")).collect();
    let path = std::env::temp_dir().join(format!("virt-usb-simulation-{name}"));
    std::os::unix::fs::DirBuilderExt::mode(&mut std::fs::DirBuilder::new(), 0o700).create(&path)?;
    Ok(TemporaryDir(path))
}
