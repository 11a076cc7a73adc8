//! Metrics of the agent in the text format of Prometheus (OpenMetrics), and the server for them.

mod serve;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::{Registry, Unit};
use rustix::time::{ClockId, clock_gettime};
use virt_usb_store::{ClaimRow, Record};

use crate::hypervisor::Failure;
use virt_usb_fleet::http_server::expiry;

type Labels = Vec<(&'static str, String)>;

pub(crate) use serve::serve;

/// Load of the agent's workers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Load {
    /// Number of busy threads.
    pub(crate) busy: usize,
    /// Number of threads that have lost their slots to others.
    pub(crate) slow: usize,
    /// Time for which the oldest job has waited for a thread.
    pub(crate) waiting: Duration,
}

/// Methods of the API that are counted by name.
const METHODS: [&str; 4] = ["GET", "POST", "PUT", "DELETE"];
/// Results of an attach or a detach.
const ATTACH_RESULTS: [&str; 11] = [
    "done",
    "busy",
    "guest-gone",
    "guest-hung",
    "libvirt-away",
    "libvirt-silent",
    "no-free-port",
    "no-spice",
    "no-usb-bus",
    "not-there",
    "refused",
];

/// Metrics of the agent.
pub struct Metrics {
    registry: Registry,
    devices: Family<Labels, Gauge<i64, AtomicI64>>,
    claims: Family<Labels, Gauge<i64, AtomicI64>>,
    problems: Gauge<i64, AtomicI64>,
    discovery: Histogram,
    attach: Histogram,
    attaches: Family<Labels, Counter>,
    detaches: Family<Labels, Counter>,
    flaps: Counter,
    scans: Family<Labels, Counter>,
    passes: Histogram,
    connected: Gauge<i64, AtomicI64>,
    connections: Counter,
    last_pass: Gauge<f64, AtomicU64>,
    workers: Family<Labels, Gauge<i64, AtomicI64>>,
    oldest_job: Gauge<f64, AtomicU64>,
    unanswered: Gauge<i64, AtomicI64>,
    hooks: Family<Labels, Histogram>,
    answers: Family<Labels, Histogram>,
    lookups: Family<Labels, Counter>,
    published: Counter,
    /// Absent on a host without a fleet.
    fleet: Family<Labels, Gauge<i64, AtomicI64>>,
    scan_interval: Gauge<f64, AtomicU64>,
    last_scan: Gauge<f64, AtomicU64>,
    revision: Gauge<i64, AtomicI64>,
    process: Process,
    /// Certificate of the API, if it has one.
    certificate: Mutex<Option<PathBuf>>,
    expiry: Family<Labels, Gauge<i64, AtomicI64>>,
    moments: Mutex<Moments>,
    /// Whether the API's network address is served.
    pub(crate) api_served: Arc<AtomicBool>,
    /// Whether the metrics are served.
    metrics_served: Arc<AtomicBool>,
    blocked: Gauge<i64, AtomicI64>,
    /// Label sets of the last update, so that missing ones are set to 0.
    shown: Mutex<Shown>,
}

/// Times of the last events.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Moments {
    /// Start of the agent.
    pub(crate) started: Instant,
    /// End of the last pass over all guests.
    pub(crate) passed: Option<Instant>,
    /// End of the last scan without an error.
    pub(crate) scanned: Option<Instant>,
    /// Time of the connection to libvirt. `None` if there is none.
    pub(crate) connected: Option<Instant>,
    /// Time when the connection to libvirt was lost. `None` if it was never lost, or is connected.
    pub(crate) lost: Option<Instant>,
}

impl Default for Moments {
    fn default() -> Self {
        Self { started: Instant::now(), passed: None, scanned: None, connected: None, lost: None }
    }
}

#[derive(Default)]
struct Shown {
    devices: BTreeMap<Labels, i64>,
    claims: BTreeMap<Labels, i64>,
}

/// Histogram with buckets from a millisecond to half a minute.
fn seconds() -> Histogram {
    Histogram::new([
        0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0,
    ])
}

impl Default for Metrics {
    fn default() -> Self {
        let mut registry = Registry::with_prefix("virt_usb");
        let metrics = Self {
            devices: Family::default(),
            claims: Family::default(),
            problems: Gauge::default(),
            discovery: seconds(),
            attach: seconds(),
            attaches: Family::default(),
            detaches: Family::default(),
            flaps: Counter::default(),
            scans: Family::default(),
            passes: seconds(),
            connected: Gauge::default(),
            connections: Counter::default(),
            last_pass: Gauge::default(),
            workers: Family::default(),
            oldest_job: Gauge::default(),
            unanswered: Gauge::default(),
            hooks: Family::new_with_constructor(seconds),
            answers: Family::new_with_constructor(seconds),
            lookups: Family::default(),
            published: Counter::default(),
            fleet: Family::default(),
            scan_interval: Gauge::default(),
            last_scan: Gauge::default(),
            revision: Gauge::default(),
            process: Process::default(),
            certificate: Mutex::default(),
            expiry: Family::default(),
            moments: Mutex::default(),
            api_served: Arc::default(),
            metrics_served: Arc::default(),
            blocked: Gauge::default(),
            shown: Mutex::default(),
            registry: Registry::default(),
        };
        metrics.register_devices(&mut registry);
        metrics.register_libvirt(&mut registry);
        metrics.register_services(&mut registry);
        metrics.process.register(&mut registry);
        metrics.begin();
        Self { registry, ..metrics }
    }
}

impl Metrics {
    fn register_devices(&self, registry: &mut Registry) {
        registry.register("devices", "Devices by status and status_reason", self.devices.clone());
        registry.register("claims", "Claims by state and hold", self.claims.clone());
        registry.register(
            "problems",
            "Problems that keep instances from getting their devices",
            self.problems.clone(),
        );
        registry.register_with_unit(
            "discovery",
            "Time from the first event of a burst until the inventory is updated",
            Unit::Seconds,
            self.discovery.clone(),
        );
        registry.register_with_unit(
            "attach",
            "Time to attach a device, including libvirt's",
            Unit::Seconds,
            self.attach.clone(),
        );
        registry.register("attaches", "Attach operations, by result", self.attaches.clone());
        registry.register("detaches", "Detach operations, by result", self.detaches.clone());
        registry.register("flaps", "Devices that were replugged", self.flaps.clone());
        registry.register("scans", "Scans of all devices, by result", self.scans.clone());
    }

    fn register_libvirt(&self, registry: &mut Registry) {
        registry.register_with_unit(
            "pass",
            "Time of a pass over all guests",
            Unit::Seconds,
            self.passes.clone(),
        );
        registry.register(
            "libvirt_connected",
            "1 while libvirt is reachable",
            self.connected.clone(),
        );
        registry.register(
            "libvirt_connections",
            "Connections made to libvirt",
            self.connections.clone(),
        );
        registry.register(
            "libvirt_unanswered",
            "Calls that libvirt has not answered for 5 s or longer",
            self.unanswered.clone(),
        );
        registry.register(
            "last_pass_timestamp_seconds",
            "When the last pass over all guests ended, or the agent started, in seconds since 1970",
            self.last_pass.clone(),
        );
        registry.register(
            "last_scan_timestamp_seconds",
            "When the last scan without an error ended, or the agent started, in seconds since \
                1970",
            self.last_scan.clone(),
        );
        registry.register(
            "scan_interval_seconds",
            "Configured time between two scans and passes",
            self.scan_interval.clone(),
        );
        registry.register(
            "libvirt_blocked",
            "1 while the agent makes no calls about guests, because libvirt does not answer about \
             too many",
            self.blocked.clone(),
        );
        registry.register(
            "workers",
            "Threads that work on guests, by whether others wait for them",
            self.workers.clone(),
        );
        registry.register(
            "oldest_job_seconds",
            "How long the oldest job has waited for a thread",
            self.oldest_job.clone(),
        );
    }

    fn register_services(&self, registry: &mut Registry) {
        registry.register_with_unit(
            "hook",
            "Calls of the hook, by operation and exit status",
            Unit::Seconds,
            self.hooks.clone(),
        );
        registry.register_with_unit(
            "api",
            "Requests to the API, by method and status",
            Unit::Seconds,
            self.answers.clone(),
        );
        registry.register(
            "api_certificate_expiry_timestamp_seconds",
            "When the API's certificate expires, in seconds since 1970",
            self.expiry.clone(),
        );
        registry.register(
            "keystone_lookups",
            "Token validations by Keystone, by result",
            self.lookups.clone(),
        );
        registry.register(
            "fleet_connected",
            "1 while this host is published in the fleet",
            self.fleet.clone(),
        );
        registry.register(
            "fleet_publications",
            "Host documents published to the fleet",
            self.published.clone(),
        );
        registry.register(
            "fleet_revision",
            "Inventory revision last published to the fleet",
            self.revision.clone(),
        );
        let version = vec![("version", env!("CARGO_PKG_VERSION").to_owned())];
        let build = Info::new(version);
        registry.register("build", "The agent's version", build);
    }
}

/// The current time in seconds since 1970.
fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64()
}

/// Resources of the agent's process (proc_pid_status(5)), with the names that Prometheus's clients
/// use.
#[derive(Default)]
struct Process {
    cpu: Gauge<f64, AtomicU64>,
    resident: Gauge<i64, AtomicI64>,
    descriptors: Gauge<i64, AtomicI64>,
    threads: Gauge<i64, AtomicI64>,
}

impl Process {
    fn register(&self, registry: &mut Registry) {
        let process = registry.sub_registry_with_prefix("process");
        process.register("cpu_seconds", "CPU time, user and system", self.cpu.clone());
        process.register("resident_memory_bytes", "Memory in use", self.resident.clone());
        process.register("open_fds", "Open file descriptors", self.descriptors.clone());
        process.register("threads", "Threads", self.threads.clone());
    }

    /// Updates the values. Those that cannot be read stay unchanged.
    fn update(&self) {
        if let Ok(found) = std::fs::read_dir("/proc/self/fd") {
            // One of the descriptors is that of the directory itself.
            self.descriptors.set(i64::try_from(found.count()).unwrap_or(i64::MAX) - 1);
        }
        let cpu = clock_gettime(ClockId::ProcessCPUTime);
        self.cpu.set(cpu.tv_sec as f64 + cpu.tv_nsec as f64 / 1e9);
        let Ok(status) = std::fs::read_to_string("/proc/self/status") else { return };
        let field = |name: &str| -> Option<i64> {
            let line =
                status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
            line.split_whitespace().next()?.parse().ok()
        };
        field("Threads").map(|threads| self.threads.set(threads));
        field("VmRSS").map(|kib| self.resident.set(kib.saturating_mul(1024)));
    }
}

impl Metrics {
    /// Updates the metrics of the inventory.
    pub fn show<'a>(
        &self,
        devices: impl IntoIterator<Item = &'a Record>,
        claims: impl IntoIterator<Item = &'a ClaimRow>,
        problems: usize,
    ) {
        let mut now = Shown::default();
        for record in devices {
            let reason = record.entry.status_reason.clone().unwrap_or_default();
            let labels = vec![("status", record.entry.status.clone()), ("reason", reason)];
            *now.devices.entry(labels).or_default() += 1;
        }
        for claim in claims {
            let labels = vec![("state", claim.state.clone()), ("hold", claim.hold.clone())];
            *now.claims.entry(labels).or_default() += 1;
        }
        let mut shown = self.shown.lock().unwrap_or_else(PoisonError::into_inner);
        let set = |family: &Family<Labels, Gauge<i64, AtomicI64>>,
                   old: &BTreeMap<Labels, i64>,
                   new: &BTreeMap<Labels, i64>| {
            for labels in old.keys().filter(|l| !new.contains_key(*l)) {
                family.get_or_create(labels).set(0);
            }
            for (labels, count) in new {
                family.get_or_create(labels).set(*count);
            }
        };
        set(&self.devices, &shown.devices, &now.devices);
        set(&self.claims, &shown.claims, &now.claims);
        shown.devices.extend(now.devices);
        shown.claims.extend(now.claims);
        self.problems.set(i64::try_from(problems).unwrap_or(i64::MAX));
    }

    pub(crate) fn attached(&self, took: Duration, failure: Option<&Failure>) {
        self.attaches.get_or_create(&vec![("result", result(failure))]).inc();
        if failure.is_none() {
            self.attach.observe(took.as_secs_f64());
        }
    }

    /// Counts an attach that failed because the device was not at its port.
    pub(crate) fn not_there(&self) {
        self.attaches.get_or_create(&vec![("result", "not-there".to_owned())]).inc();
    }

    pub(crate) fn detached(&self, failure: Option<&Failure>) {
        self.detaches.get_or_create(&vec![("result", result(failure))]).inc();
    }

    pub(crate) fn scanned(&self, took: Duration, well: bool, returned: usize) {
        let result = if well { "done" } else { "failed" };
        self.scans.get_or_create(&vec![("result", result.to_owned())]).inc();
        self.discovery.observe(took.as_secs_f64());
        if well {
            self.last_scan.set(now());
            self.moments_mut().scanned = Some(Instant::now());
        }
        self.flaps.inc_by(returned as u64);
    }

    /// Sets the configured time between two scans and passes.
    pub(crate) fn interval(&self, interval: Duration) {
        self.scan_interval.set(interval.as_secs_f64());
    }

    pub(crate) fn passed(&self, took: Duration) {
        self.passes.observe(took.as_secs_f64());
        self.last_pass.set(now());
        self.moments_mut().passed = Some(Instant::now());
    }

    pub(crate) fn connected(&self, is: bool) {
        self.connected.set(i64::from(is));
        let mut moments = self.moments_mut();
        let was = moments.connected.is_some();
        moments.connected = is.then(Instant::now);
        moments.lost = if is { None } else { moments.lost.or_else(|| was.then(Instant::now)) };
        if is {
            self.connections.inc();
        }
    }

    /// Creates all counters with the value 0. If a counter appeared with its first count,
    /// Prometheus would not see that count.
    fn begin(&self) {
        self.last_pass.set(now());
        self.last_scan.set(now());
        for result in ["done", "failed"] {
            drop(self.scans.get_or_create(&vec![("result", result.to_owned())]));
        }
        for result in ATTACH_RESULTS {
            drop(self.attaches.get_or_create(&vec![("result", result.to_owned())]));
            drop(self.detaches.get_or_create(&vec![("result", result.to_owned())]));
        }
        for method in METHODS {
            for status in [500, 503] {
                let labels = vec![("method", method.to_owned()), ("status", status.to_string())];
                drop(self.answers.get_or_create(&labels));
            }
        }
    }

    fn moments_mut(&self) -> MutexGuard<'_, Moments> {
        self.moments.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the metrics are served.
    pub(crate) fn is_served(&self) -> bool {
        self.metrics_served.load(Ordering::Relaxed)
    }

    pub(crate) fn moments(&self) -> Moments {
        *self.moments_mut()
    }

    /// Number of connections made to libvirt.
    pub(crate) fn connections(&self) -> u64 {
        self.connections.get()
    }

    /// Adds a metric for the expiry of the certificate in this file.
    pub(crate) fn watch_certificate(&self, file: PathBuf) {
        *self.certificate.lock().unwrap_or_else(PoisonError::into_inner) = Some(file);
    }

    /// Updates the expiry. If the file cannot be read, the value stays unchanged.
    fn look_at_certificate(&self) {
        let file = self.certificate.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if let Some(Ok(expires)) = file.map(|file| expiry(&file)) {
            let since = expires.duration_since(UNIX_EPOCH).unwrap_or_default();
            let seconds = i64::try_from(since.as_secs()).unwrap_or(i64::MAX);
            self.expiry.get_or_create(&Labels::new()).set(seconds);
        }
    }

    /// Records the load of the workers, and the number of unanswered calls.
    pub(crate) fn working(&self, load: &Load, unanswered: usize, is_blocked: bool) {
        self.blocked.set(i64::from(is_blocked));
        let gauge = |state: &str, count: usize| {
            let labels = vec![("state", state.to_owned())];
            self.workers.get_or_create(&labels).set(i64::try_from(count).unwrap_or(i64::MAX));
        };
        gauge("busy", load.busy - load.slow);
        gauge("slow", load.slow);
        self.oldest_job.set(load.waiting.as_secs_f64());
        self.unanswered.set(i64::try_from(unanswered).unwrap_or(i64::MAX));
    }

    /// Records the published revision; `None` if this host is not published.
    pub(crate) fn fleet(&self, revision: Option<u64>) {
        self.fleet.get_or_create(&Labels::new()).set(i64::from(revision.is_some()));
        if let Some(revision) = revision {
            self.published.inc();
            self.revision.set(i64::try_from(revision).unwrap_or(i64::MAX));
        }
    }

    /// Counts a hook's message, such as `prepare 1234 0`. Other messages are ignored.
    pub(crate) fn hook(&self, message: &str) {
        const KNOWN: [&str; 8] = [
            "prepare",
            "start",
            "started",
            "stopped",
            "release",
            "reconnect",
            "restore",
            "migrate",
        ];
        let mut words = message.split(' ');
        let (Some(op), Some(micros), Some(exit)) = (words.next(), words.next(), words.next())
        else {
            return;
        };
        let (Some(op), Ok(micros)) =
            (KNOWN.iter().find(|known| **known == op), micros.parse::<u32>())
        else {
            return;
        };
        let exit = if exit == "0" { "0" } else { "1" };
        let labels = vec![("operation", (*op).to_owned()), ("exit", exit.to_owned())];
        self.hooks.get_or_create(&labels).observe(f64::from(micros) / 1e6);
    }

    pub(crate) fn answered(&self, method: &str, status: u16, took: Duration) {
        let method = if METHODS.contains(&method) { method } else { "other" };
        let labels = vec![("method", method.to_owned()), ("status", status.to_string())];
        self.answers.get_or_create(&labels).observe(took.as_secs_f64());
    }

    pub(crate) fn looked_up(&self, result: &str) {
        self.lookups.get_or_create(&vec![("result", result.to_owned())]).inc();
    }

    /// Returns all metrics as text.
    pub fn text(&self) -> String {
        self.process.update();
        self.look_at_certificate();
        let mut text = String::new();
        // Writing to a String cannot fail.
        let _ = encode(&mut text, &self.registry);
        text
    }
}

fn result(failure: Option<&Failure>) -> String {
    match failure {
        None => "done",
        Some(Failure::Away(_)) => "libvirt-away",
        Some(Failure::Hung(_)) => "guest-hung",
        Some(Failure::Silent(_)) => "libvirt-silent",
        Some(Failure::Gone) => "guest-gone",
        Some(Failure::Busy(_)) => "busy",
        Some(Failure::Refused(why)) if why.contains("USB bus") => "no-usb-bus",
        Some(Failure::Refused(why)) if why.contains("USB port") => "no-free-port",
        Some(Failure::Refused(why)) if why.contains("SPICE") || why.contains("spice") => "no-spice",
        Some(Failure::Refused(_)) => "refused",
    }
    .to_owned()
}
