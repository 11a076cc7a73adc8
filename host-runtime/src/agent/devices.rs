//! The devices' thread: from events to rows.
//!
//! ```text
//!  hotplug ─┐                 quiet for 15 ms,
//!  SIGHUP ──┼─► DeviceSignal ─► or 1 s since    ───► scan ─► plan ─► store ─► the guests' thread is told
//!  clock ───┘                 the first event
//! ```
//! It never asks libvirt, so that the inventory is true whatever the guests do. systemd's watchdog
//! hears from it as long as the guests' thread goes on as well ([`Pulse`]).

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender};
use std::time::{Duration, Instant};

use virt_usb_config::{host_env, rules};
use virt_usb_model::device::Problem;
use virt_usb_store::{Store, StoreError};

use super::live_config::{CONFIG_LOOK_INTERVAL, Edits, LiveConfig};
use super::signals::{DeviceSignal, Pulse, Signal};
use super::{ACTOR, guest_uses};
use crate::discovery::UsbSource;
use crate::hypervisor::Supervised;
use crate::inventory;
use crate::metrics::Metrics;

/// A burst has ended when nothing has come for so long …
const QUIET: Duration = Duration::from_millis(15);
/// … and is looked at after so long in any case.
const ENOUGH: Duration = Duration::from_secs(1);
/// Until a scan that failed is tried again.
const FIRST_RETRY: Duration = Duration::from_secs(1);
/// How often old events are pruned.
const PRUNE: Duration = Duration::from_secs(24 * 3600);

/// The files that the agent works with, and which they are: one that was replaced while it runs
/// would go on without it, and a held device would be given away.
pub(crate) struct Files(Vec<(PathBuf, FileId)>);

/// Device and inode.
type FileId = (u64, u64);

impl Files {
    /// The files as they are now.
    pub(crate) fn new(paths: Vec<PathBuf>) -> std::io::Result<Self> {
        paths
            .into_iter()
            .map(|path| Ok((path.clone(), file_id(&path)?)))
            .collect::<Result<_, _>>()
            .map(Self)
    }

    fn check(&self) -> Result<(), String> {
        // Only looked at, never opened: that would drop SQLite's locks (store, files.rs).
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

/// The thread's belongings.
pub(crate) struct Devices {
    pub(crate) rules: LiveConfig,
    pub(crate) source: Box<dyn UsbSource + Send>,
    pub(crate) store: Store,
    pub(crate) host: String,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) files: Files,
    /// Problems of the last scan.
    pub(crate) told: Vec<Problem>,
    /// How often to look whatever events there are, where the kernel's events do not arrive.
    pub(crate) without_events: Option<Duration>,
    /// Connection to libvirt, from whose domains the uses without a claim follow.
    pub(crate) hypervisor: Arc<Supervised>,
    pub(crate) pulse: Pulse,
    pub(crate) guests: Sender<Signal>,
    /// Called after each scan: where devices are simulated, domains start when their devices are
    /// there.
    pub(crate) after: Box<dyn Fn() + Send>,
}

impl Devices {
    /// Scans on request and at intervals, until the thread is stopped. Calls `ready` once, after
    /// the first scan.
    ///
    /// # Errors
    /// When the agent cannot continue, because its files were replaced. The guests' thread
    /// stops too.
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
            // An error here is a service manager that is not there.
            if self.pulse.is_there() {
                drop(sd_notify::notify(&[sd_notify::NotifyState::Watchdog]));
            }
            if last_prune.is_none_or(|at| at.elapsed() > PRUNE) {
                last_prune = Some(Instant::now());
                self.prune();
            }
            // What failed is tried again before the next look at all.
            let interval = self.rules.now().scan_interval;
            let interval = self.without_events.map_or(interval, |often| often.min(interval));
            let pause = wait_for_next.map_or(interval, |wait| wait.min(interval));
            let until_scan = pause.saturating_sub(last_scan.elapsed());
            let wait = until_scan
                .min(edits.next_look())
                .min(watchdog.unwrap_or(CONFIG_LOOK_INTERVAL))
                .max(Duration::from_millis(1));
            let first = match signals.recv_timeout(wait) {
                Ok(nudge) => Some(nudge),
                Err(RecvTimeoutError::Timeout) => None,
                Err(RecvTimeoutError::Disconnected) => return Ok(()),
            };
            let began = Instant::now();
            let mut seen = Heard::default();
            seen.hear(first);
            if first == Some(DeviceSignal::Usb) {
                seen.burst(signals, began);
            }
            if seen.stop {
                return Ok(());
            }
            if edits.settled(self.rules.stamp(), seen.reload, Instant::now()) {
                self.store.restart_lock_timeout();
                if self.rules.reload(|read, file| Ok(rules::admit(&self.store, read, file)?)) {
                    // Intervals and policies are theirs too.
                    drop(self.guests.send(Signal::Devices));
                }
                seen.usb = true;
            }
            if seen.usb || last_scan.elapsed() >= pause {
                wait_for_next = self.scan(began, wait_for_next);
                last_scan = Instant::now();
            }
        }
    }

    /// Looks at all devices. What could not be seen or recorded is tried again after the time
    /// returned: a second first, twice as long as `waited` later.
    fn scan(&mut self, began: Instant, waited: Option<Duration>) -> Option<Duration> {
        let again = Some(waited.map_or(FIRST_RETRY, |waited| waited.saturating_mul(2)));
        self.metrics.interval(self.rules.now().scan_interval);
        let next = match self.look() {
            Ok(look) => {
                self.metrics.scanned(began.elapsed(), !look.failed, look.returned);
                if look.changed {
                    drop(self.guests.send(Signal::Devices));
                }
                again.filter(|_| look.unsure)
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

    fn look(&mut self) -> Result<Look, String> {
        let config = self.rules.now();
        let context = host_env::context(&config, ACTOR).map_err(|e| e.to_string())?;
        let mut snapshot = self.source.snapshot();
        snapshot.guests = guest_uses::of(self.hypervisor.known(), &snapshot);
        self.tell_of(&snapshot.problems);
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
        Ok(Look { failed, unsure, returned, changed: !done.is_empty() })
    }

    /// Reports a problem when it appears and when it is solved.
    fn tell_of(&mut self, problems: &[Problem]) {
        let name = |problem: &Problem| match problem.place.as_str() {
            "" => "the whole scan".to_owned(),
            place => place.to_owned(),
        };
        for problem in problems.iter().filter(|problem| !self.told.contains(problem)) {
            let place = name(problem);
            tracing::warn!(place, "could not be read: {place}: {}", problem.what);
        }
        let is_there = |told: &Problem| problems.iter().any(|problem| problem.place == told.place);
        let mut solved: Vec<String> =
            self.told.iter().filter(|told| !is_there(told)).map(name).collect();
        solved.dedup();
        for place in solved {
            tracing::info!(place, "can be read again: {place}");
        }
        self.told = problems.to_vec();
    }

    fn prune(&mut self) {
        let days = self.rules.now().events_keep_days;
        self.store.restart_lock_timeout();
        let pruned: Result<usize, StoreError> =
            if days == 0 { Ok(0) } else { self.store.prune_events(days) };
        if let Err(e) = pruned {
            tracing::warn!("old events cannot be removed: {e}");
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
struct Look {
    /// Nothing can be said of what it lacks.
    failed: bool,
    /// Something could not be read.
    unsure: bool,
    /// How many devices came back.
    returned: usize,
    changed: bool,
}

/// Signals that were received together.
#[derive(Default)]
struct Heard {
    usb: bool,
    reload: bool,
    stop: bool,
}

impl Heard {
    fn hear(&mut self, nudge: Option<DeviceSignal>) {
        match nudge {
            Some(DeviceSignal::Usb) => self.usb = true,
            Some(DeviceSignal::Reload) => self.reload = true,
            Some(DeviceSignal::Stop) => self.stop = true,
            None => {}
        }
    }

    /// Waits for the end of a burst: devices come in swarms, behind hubs and at replugs.
    fn burst(&mut self, signals: &Receiver<DeviceSignal>, began: Instant) {
        while began.elapsed() < ENOUGH && !self.stop {
            match signals.recv_timeout(QUIET) {
                Ok(nudge) => self.hear(Some(nudge)),
                Err(_) => return,
            }
        }
        // What is left of it is part of what will be seen now.
        while let Ok(nudge) = signals.try_recv() {
            self.hear(Some(nudge));
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
        let mut heard = Heard::default();
        heard.hear(from.recv().ok());
        heard.burst(&from, Instant::now());
        assert!(heard.usb && heard.reload && !heard.stop);
        assert_eq!(from.try_recv(), Err(std::sync::mpsc::TryRecvError::Empty));
    }

    fn nothing() -> Supervised {
        let config = Config { state_dir: "/nonexistent".into(), ..Config::default() };
        let simulated = crate::hypervisor::SimulatedHypervisor::new(config, channel().0);
        Supervised::new(Arc::new(simulated), crate::hypervisor::Listeners::nobody())
    }

    struct Eyes(bool);

    impl UsbSource for Eyes {
        fn snapshot(&self) -> crate::discovery::Snapshot {
            let blind =
                virt_usb_model::device::Problem { place: "1-1".into(), what: "is dark".into() };
            crate::discovery::Snapshot {
                problems: if self.0 { vec![] } else { vec![blind] },
                ..Default::default()
            }
        }
    }

    #[test]
    fn what_could_not_be_seen_is_looked_at_again_less_and_less_often() {
        let state = tempfile::tempdir().unwrap();
        let config = Config { state_dir: state.path().to_owned(), ..Config::default() };
        let store = Store::create(state.path(), Duration::from_secs(1)).unwrap();
        let mut devices = Devices {
            rules: LiveConfig::of(config),
            source: Box::new(Eyes(false)),
            store,
            host: "host".into(),
            metrics: Arc::default(),
            files: Files::new(vec![]).unwrap(),
            told: Vec::new(),
            without_events: None,
            hypervisor: Arc::new(nothing()),
            pulse: Pulse::new(),
            guests: channel().0,
            after: Box::new(|| {}),
        };
        let first = devices.scan(Instant::now(), None);
        assert_eq!(first, Some(FIRST_RETRY));
        assert_eq!(devices.scan(Instant::now(), first), Some(FIRST_RETRY * 2));
        devices.source = Box::new(Eyes(true));
        assert_eq!(devices.scan(Instant::now(), first), None);
    }
}
