//! The devices' thread: scans the devices after events, and records them in the inventory.
//!
//! ```text
//!  hotplug ─┐                   quiet for 15 ms,
//!  SIGHUP ──┼─► DeviceSignal ─► or 1 s since    ─► scan ─► plan ─► store ─► Signal::Devices
//!  clock ───┘                   the first event
//! ```
//! This thread never calls libvirt, so the inventory stays up to date even if libvirt does not
//! answer. It notifies systemd's watchdog as long as the guests' thread runs as well ([`Pulse`]).

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender};
use std::time::{Duration, Instant};

use virt_usb_config::{host_env, rules};
use virt_usb_model::device::Problem;
use virt_usb_store::{Store, StoreError};

use super::live_config::{CONFIG_CHECK_INTERVAL, Edits, LiveConfig};
use super::signals::{DeviceSignal, Pulse, Signal};
use super::{ACTOR, guest_uses};
use crate::discovery::UsbSource;
use crate::hypervisor::Supervised;
use crate::inventory;
use crate::metrics::Metrics;

/// Time without a signal after which a burst has ended.
const QUIET_INTERVAL: Duration = Duration::from_millis(15);
/// Maximum duration of a burst.
const MAX_BURST_DURATION: Duration = Duration::from_secs(1);
/// Wait before a failed scan is retried for the first time.
const FIRST_RETRY_INTERVAL: Duration = Duration::from_secs(1);
/// Interval at which old events are pruned.
const PRUNE_INTERVAL: Duration = Duration::from_secs(24 * 3600);

/// The agent's files with their identities. If a file is replaced, other programs use the new one,
/// and held devices would be given to other guests.
pub(crate) struct Files(Vec<(PathBuf, FileId)>);

/// Device and inode of a file.
type FileId = (u64, u64);

impl Files {
    /// Records the current identities of the files.
    pub(crate) fn new(paths: Vec<PathBuf>) -> std::io::Result<Self> {
        paths
            .into_iter()
            .map(|path| Ok((path.clone(), file_id(&path)?)))
            .collect::<Result<_, _>>()
            .map(Self)
    }

    fn check(&self) -> Result<(), String> {
        // Do not open the files: closing one would drop SQLite's locks (store, files.rs).
        match self.0.iter().find(|(path, id)| !file_id(path).is_ok_and(|now| now == *id)) {
            None => Ok(()),
            Some((path, _)) => Err(format!(
                "{} was removed or replaced while the agent ran: the agent restarts and adopts \
                 the devices in the guests",
                path.display()
            )),
        }
    }
}

fn file_id(path: &Path) -> std::io::Result<FileId> {
    std::fs::metadata(path).map(|found| (found.dev(), found.ino()))
}

/// State of the devices' thread.
pub(crate) struct Devices {
    pub(crate) rules: LiveConfig,
    pub(crate) source: Box<dyn UsbSource + Send>,
    pub(crate) store: Store,
    pub(crate) host: String,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) files: Files,
    /// Problems of the last scan.
    pub(crate) reported: Vec<Problem>,
    /// Scan interval if hotplug events do not arrive.
    pub(crate) without_events: Option<Duration>,
    /// Connection to libvirt, whose domains may use devices without a claim.
    pub(crate) hypervisor: Arc<Supervised>,
    pub(crate) pulse: Pulse,
    pub(crate) guests: Sender<Signal>,
    /// Called after each scan. A simulation starts the domains of the file here.
    pub(crate) after: Box<dyn Fn() + Send>,
}

impl Devices {
    /// Scans on request and at intervals, until the thread is stopped. Calls `ready` once, after
    /// the first scan.
    ///
    /// # Errors
    /// If the agent cannot continue, because its files were replaced. The guests' thread then
    /// stops, too.
    pub(crate) fn run(
        mut self,
        signals: &Receiver<DeviceSignal>,
        ready: impl FnOnce(),
    ) -> Result<(), String> {
        let done = self.follow(signals, ready);
        drop(self.guests.send(Signal::Stop));
        done
    }

    fn follow(
        &mut self,
        signals: &Receiver<DeviceSignal>,
        ready: impl FnOnce(),
    ) -> Result<(), String> {
        let mut wait_for_next = self.scan(Instant::now(), None);
        ready();
        let watchdog = sd_notify::watchdog_enabled().map(|limit| limit / 2);
        let mut last_scan = Instant::now();
        let (mut last_prune, mut edits) = (None::<Instant>, Edits::new(self.rules.first));
        loop {
            self.files.check()?;
            // An error here means that there is no service manager.
            if self.pulse.is_alive() {
                drop(sd_notify::notify(&[sd_notify::NotifyState::Watchdog]));
            }
            if last_prune.is_none_or(|at| at.elapsed() > PRUNE_INTERVAL) {
                last_prune = Some(Instant::now());
                self.prune();
            }
            // Retry a failed scan before the next regular one.
            let interval = self.rules.now().scan_interval;
            let interval = self.without_events.map_or(interval, |shorter| shorter.min(interval));
            let pause = wait_for_next.map_or(interval, |wait| wait.min(interval));
            let until_scan = pause.saturating_sub(last_scan.elapsed());
            let wait = until_scan
                .min(edits.next_check())
                .min(watchdog.unwrap_or(CONFIG_CHECK_INTERVAL))
                .max(Duration::from_millis(1));
            let first = match signals.recv_timeout(wait) {
                Ok(signal) => Some(signal),
                Err(RecvTimeoutError::Timeout) => None,
                Err(RecvTimeoutError::Disconnected) => return Ok(()),
            };
            let began = Instant::now();
            let mut received = Received::default();
            received.add(first);
            if first == Some(DeviceSignal::Usb) {
                received.add_burst(signals, began);
            }
            if received.stop {
                return Ok(());
            }
            if edits.settled(self.rules.stamp(), received.reload, Instant::now()) {
                self.store.restart_lock_timeout();
                if self.rules.reload(|read, file| Ok(rules::admit(&self.store, read, file)?)) {
                    // Intervals and policies of the guests' thread may have changed.
                    drop(self.guests.send(Signal::Devices));
                }
                received.usb = true;
            }
            if received.usb || last_scan.elapsed() >= pause {
                wait_for_next = self.scan(began, wait_for_next);
                last_scan = Instant::now();
            }
        }
    }

    /// Scans all devices. If something could not be read or recorded, returns the time until the
    /// retry: a second at first, then twice the last wait, which is `waited`.
    fn scan(&mut self, began: Instant, waited: Option<Duration>) -> Option<Duration> {
        let again = Some(waited.map_or(FIRST_RETRY_INTERVAL, |waited| waited.saturating_mul(2)));
        self.metrics.interval(self.rules.now().scan_interval);
        let next = match self.record_devices() {
            Ok(scan) => {
                self.metrics.scanned(began.elapsed(), !scan.failed, scan.returned);
                if scan.changed {
                    drop(self.guests.send(Signal::Devices));
                }
                again.filter(|_| scan.unsure)
            }
            Err(e) => {
                self.metrics.scanned(began.elapsed(), false, 0);
                tracing::error!("cannot record the devices: {e}; the agent retries");
                again
            }
        };
        tracing::debug!("a scan took {:.1?}", began.elapsed());
        (self.after)();
        next
    }

    fn record_devices(&mut self) -> Result<Scan, String> {
        let config = self.rules.now();
        let context = host_env::context(&config, ACTOR).map_err(|e| e.to_string())?;
        let mut snapshot = self.source.snapshot();
        snapshot.guests = guest_uses::of(self.hypervisor.known(), &snapshot);
        self.report_problems(&snapshot.problems);
        self.store.restart_lock_timeout();
        let whitelist =
            inventory::located(&config.whitelist, &mut self.store, &snapshot, &config.sysfs_root)
                .map_err(|e| e.to_string())?;
        let plan = |known: &[virt_usb_store::Record]| {
            inventory::plan(&snapshot, known, &whitelist, &config.aliases)
        };
        let seen = snapshot.seen(&config.aliases);
        let done = self.store.reconcile(&self.host, &config.flapping, seen, plan, &context);
        let done = done.map_err(|e| e.to_string())?;
        self.store.note_rules(rules::remembered(&config)).map_err(|e| e.to_string())?;
        for change in &done {
            tracing::info!(device = %change.id, "device {} {}", change.id, change.what);
            if let Some(altered) = &change.altered {
                tracing::error!(device = %change.id, "device {}: {altered}", change.id);
            }
        }
        let returned = done.iter().filter(|d| d.what == "returned").count();
        let (failed, unsure) = (snapshot.failed(), !snapshot.problems.is_empty());
        Ok(Scan { failed, unsure, returned, changed: !done.is_empty() })
    }

    /// Reports a problem when it appears and when it is solved.
    fn report_problems(&mut self, problems: &[Problem]) {
        let name = |problem: &Problem| match problem.place.as_str() {
            "" => "the whole scan".to_owned(),
            place => place.to_owned(),
        };
        for problem in problems.iter().filter(|problem| !self.reported.contains(problem)) {
            let place = name(problem);
            tracing::warn!(place, "could not be read: {place}: {}", problem.what);
        }
        let persists = |old: &Problem| problems.iter().any(|problem| problem.place == old.place);
        let mut solved: Vec<String> =
            self.reported.iter().filter(|old| !persists(old)).map(name).collect();
        solved.dedup();
        for place in solved {
            tracing::info!(place, "can be read again: {place}");
        }
        self.reported = problems.to_vec();
    }

    fn prune(&mut self) {
        let days = self.rules.now().events_keep_days;
        self.store.restart_lock_timeout();
        let pruned: Result<usize, StoreError> =
            if days == 0 { Ok(0) } else { self.store.prune_events(days) };
        if let Err(e) = pruned {
            tracing::warn!("cannot remove old events: {e}");
        }
        let config = self.rules.now();
        if config.forget_after_days == 0 {
            return;
        }
        self.store.restart_lock_timeout();
        let context = host_env::context(&config, ACTOR).map_err(|e| e.to_string());
        let forget = |context| {
            self.store.forget_old(config.forget_after_days, &context).map_err(|e| e.to_string())
        };
        match context.and_then(forget) {
            Ok(0) => {}
            Ok(count) => {
                tracing::info!(
                    "forgot {count} devices that were unplugged for a long time and never held"
                );
            }
            Err(e) => tracing::warn!("cannot forget unplugged devices: {e}"),
        }
    }
}

/// Result of a scan of all devices.
struct Scan {
    /// Whether the scan failed, so that a missing device means nothing.
    failed: bool,
    /// Whether anything could not be read.
    unsure: bool,
    /// Number of devices that were plugged in again.
    returned: usize,
    changed: bool,
}

/// Signals that were received together.
#[derive(Default)]
struct Received {
    usb: bool,
    reload: bool,
    stop: bool,
}

impl Received {
    fn add(&mut self, signal: Option<DeviceSignal>) {
        match signal {
            Some(DeviceSignal::Usb) => self.usb = true,
            Some(DeviceSignal::Reload) => self.reload = true,
            Some(DeviceSignal::Stop) => self.stop = true,
            None => {}
        }
    }

    /// Adds signals until the end of a burst. Hubs and replugs cause bursts.
    fn add_burst(&mut self, signals: &Receiver<DeviceSignal>, began: Instant) {
        while began.elapsed() < MAX_BURST_DURATION && !self.stop {
            match signals.recv_timeout(QUIET_INTERVAL) {
                Ok(signal) => self.add(Some(signal)),
                Err(_) => return,
            }
        }
        // The next scan covers the rest of the burst.
        while let Ok(signal) = signals.try_recv() {
            self.add(Some(signal));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;

    use virt_usb_config::Config;

    use super::*;

    #[test]
    fn a_burst_is_one_scan() {
        let (to, from) = channel();
        for _ in 0..1000 {
            to.send(DeviceSignal::Usb).unwrap();
        }
        to.send(DeviceSignal::Reload).unwrap();
        let mut received = Received::default();
        received.add(from.recv().ok());
        received.add_burst(&from, Instant::now());
        assert!(received.usb && received.reload && !received.stop);
        assert_eq!(from.try_recv(), Err(std::sync::mpsc::TryRecvError::Empty));
    }

    fn nothing() -> Supervised {
        let config = Config { state_dir: "/nonexistent".into(), ..Config::default() };
        let simulated = crate::hypervisor::SimulatedHypervisor::new(config, channel().0);
        Supervised::new(Arc::new(simulated), crate::hypervisor::Listeners::nobody())
    }

    /// Source without devices, which reports a problem if the field is false.
    struct TestSource(bool);

    impl UsbSource for TestSource {
        fn snapshot(&self) -> crate::discovery::Snapshot {
            let problem =
                virt_usb_model::device::Problem { place: "1-1".into(), what: "EIO".into() };
            crate::discovery::Snapshot {
                problems: if self.0 { vec![] } else { vec![problem] },
                ..Default::default()
            }
        }
    }

    #[test]
    fn an_incomplete_scan_is_retried_with_backoff() {
        let state = tempfile::tempdir().unwrap();
        let config = Config { state_dir: state.path().to_owned(), ..Config::default() };
        let store = Store::create(state.path(), Duration::from_secs(1)).unwrap();
        let mut devices = Devices {
            rules: LiveConfig::of(config),
            source: Box::new(TestSource(false)),
            store,
            host: "host".into(),
            metrics: Arc::default(),
            files: Files::new(vec![]).unwrap(),
            reported: Vec::new(),
            without_events: None,
            hypervisor: Arc::new(nothing()),
            pulse: Pulse::new(),
            guests: channel().0,
            after: Box::new(|| {}),
        };
        let first = devices.scan(Instant::now(), None);
        assert_eq!(first, Some(FIRST_RETRY_INTERVAL));
        assert_eq!(devices.scan(Instant::now(), first), Some(FIRST_RETRY_INTERVAL * 2));
        devices.source = Box::new(TestSource(true));
        assert_eq!(devices.scan(Instant::now(), first), None);
    }
}
