//! The devices' thread: from events to rows.
//!
//! ```text
//!  hotplug ─┐                 quiet for 15 ms,
//!  SIGHUP ──┼─► Nudge ─► ──── or 1 s since    ───► scan ─► plan ─► store ─► the guests' thread is told
//!  clock ───┘                 the first event
//! ```
//! It never asks libvirt, so that the inventory is true whatever the guests do, and it is this thread that systemd's watchdog watches.

use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, Instant};

use virt_usb_hook::config::{Config, DEFAULT_PATH};
use virt_usb_hook::machine;
use virt_usb_store::{Store, StoreError};

use super::guests::Signal;
use super::metrics::Metrics;
use super::{ACTOR, Stamp, stamp};
use crate::discovery::UsbSource;
use crate::inventory;

/// A burst has ended when nothing has come for so long …
const QUIET: Duration = Duration::from_millis(15);
/// … and is looked at after so long in any case.
const ENOUGH: Duration = Duration::from_secs(1);
/// How often the configuration's file is looked at.
const LOOK: Duration = Duration::from_secs(2);
/// How often old events are pruned.
const PRUNE: Duration = Duration::from_secs(24 * 3600);

/// What the thread is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Nudge {
    /// A device came or went.
    Usb,
    /// Read the configuration again.
    Reload,
    /// End.
    Stop,
}

/// The configuration that counts now.
#[derive(Clone)]
pub(super) struct Rules {
    file: Option<PathBuf>,
    now: Arc<RwLock<Arc<Config>>>,
}

impl Rules {
    pub(super) fn new(file: Option<PathBuf>, config: Config) -> Self {
        Self { file, now: Arc::new(RwLock::new(Arc::new(config))) }
    }

    pub(super) fn now(&self) -> Arc<Config> {
        self.now.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Reads the file again. What is wrong changes nothing; what cannot change while the agent runs stays, and is told.
    fn reload(&self) {
        let was = self.now();
        let read = match Config::load(self.file.as_deref()) {
            Ok(read) => read,
            Err(e) => {
                tracing::error!("{e}; the rules before count on");
                return;
            }
        };
        let fixed = [
            ("state_dir", read.state_dir != was.state_dir),
            ("sysfs_root", read.sysfs_root != was.sysfs_root),
            ("procfs_root", read.procfs_root != was.procfs_root),
            ("libvirt_uri", read.libvirt_uri != was.libvirt_uri),
            ("metrics", read.metrics != was.metrics),
        ];
        for (key, _) in fixed.iter().filter(|(_, changed)| *changed) {
            tracing::warn!("{key} has changed: it counts from the agent's next start on");
        }
        let next = Config {
            state_dir: was.state_dir.clone(),
            sysfs_root: was.sysfs_root.clone(),
            procfs_root: was.procfs_root.clone(),
            libvirt_uri: was.libvirt_uri.clone(),
            metrics: was.metrics.clone(),
            ..read
        };
        if next != *was {
            tracing::info!("the configuration was read again");
            *self.now.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(next);
        }
    }

    /// What tells one state of the file from another.
    fn stamp(&self) -> Option<Stamp> {
        stamp(self.file.as_deref().unwrap_or(Path::new(DEFAULT_PATH)))
    }
}

/// The thread's belongings.
pub(super) struct Devices {
    pub(super) rules: Rules,
    pub(super) source: Box<dyn UsbSource + Send>,
    pub(super) store: Store,
    pub(super) host: String,
    pub(super) metrics: Arc<Metrics>,
    pub(super) guests: Sender<Signal>,
    /// Called after each scan: where devices are simulated, domains start when their devices are there.
    pub(super) after: Box<dyn Fn() + Send>,
}

impl Devices {
    /// Scans when it is told to, and at intervals, until it is told to stop. `ready` is called once, after the first scan.
    pub(super) fn run(mut self, nudges: &Receiver<Nudge>, ready: impl FnOnce()) {
        self.scan(Instant::now());
        ready();
        let watchdog = sd_notify::watchdog_enabled().map(|limit| limit / 2);
        let mut last_scan = Instant::now();
        let (mut last_prune, mut stamp) = (None::<Instant>, self.rules.stamp());
        loop {
            // An error here is a service manager that is not there.
            drop(sd_notify::notify(&[sd_notify::NotifyState::Watchdog]));
            if last_prune.is_none_or(|at| at.elapsed() > PRUNE) {
                last_prune = Some(Instant::now());
                self.prune();
            }
            let until_scan = self.rules.now().scan_interval.saturating_sub(last_scan.elapsed());
            let wait = until_scan.min(LOOK).min(watchdog.unwrap_or(LOOK)).max(Duration::from_millis(1));
            let first = match nudges.recv_timeout(wait) {
                Ok(nudge) => Some(nudge),
                Err(RecvTimeoutError::Timeout) => None,
                Err(RecvTimeoutError::Disconnected) => return,
            };
            let began = Instant::now();
            let mut seen = Heard::default();
            seen.hear(first);
            if first == Some(Nudge::Usb) {
                seen.burst(nudges, began);
            }
            if seen.stop {
                return;
            }
            let changed = self.rules.stamp();
            if seen.reload || changed != stamp {
                stamp = changed;
                self.rules.reload();
                seen.usb = true;
            }
            if seen.usb || last_scan.elapsed() >= self.rules.now().scan_interval {
                self.scan(began);
                last_scan = Instant::now();
            }
        }
    }

    fn scan(&mut self, began: Instant) {
        match self.look() {
            Ok((well, returned, changed)) => {
                self.metrics.scanned(began.elapsed(), well, returned);
                if changed {
                    drop(self.guests.send(Signal::Devices));
                }
            }
            Err(e) => {
                self.metrics.scanned(began.elapsed(), false, 0);
                tracing::error!("the devices cannot be recorded: {e}; it is tried again at the next scan");
            }
        }
        (self.after)();
    }

    /// Whether all could be read, how many came back, and whether anything changed.
    fn look(&mut self) -> Result<(bool, usize, bool), String> {
        let config = self.rules.now();
        let context = machine::context(&config.procfs_root, ACTOR).map_err(|e| e.to_string())?;
        let snapshot = self.source.snapshot();
        for problem in &snapshot.problems {
            let place = if problem.place.is_empty() { "the whole scan" } else { &problem.place };
            tracing::warn!(place, "could not be read: {place}: {}", problem.what);
        }
        self.store.restart_patience();
        let plan = |known: &[virt_usb_store::Record]| inventory::plan(&snapshot, known, &config.whitelist);
        let done = self.store.reconcile(&self.host, plan, &context).map_err(|e| e.to_string())?;
        for change in &done {
            tracing::info!(device = %change.id, "device {} {}", change.id, change.what);
        }
        let returned = done.iter().filter(|d| d.what == "returned").count();
        Ok((!snapshot.failed(), returned, !done.is_empty()))
    }

    fn prune(&mut self) {
        let days = self.rules.now().events_keep_days;
        self.store.restart_patience();
        let pruned: Result<usize, StoreError> = if days == 0 { Ok(0) } else { self.store.prune_events(days) };
        if let Err(e) = pruned {
            tracing::warn!("old events cannot be removed: {e}");
        }
    }
}

/// What was heard in one go.
#[derive(Default)]
struct Heard {
    usb: bool,
    reload: bool,
    stop: bool,
}

impl Heard {
    fn hear(&mut self, nudge: Option<Nudge>) {
        match nudge {
            Some(Nudge::Usb) => self.usb = true,
            Some(Nudge::Reload) => self.reload = true,
            Some(Nudge::Stop) => self.stop = true,
            None => {}
        }
    }

    /// Waits for the end of a burst: devices come in swarms, behind hubs and at replugs.
    fn burst(&mut self, nudges: &Receiver<Nudge>, began: Instant) {
        while began.elapsed() < ENOUGH && !self.stop {
            match nudges.recv_timeout(QUIET) {
                Ok(nudge) => self.hear(Some(nudge)),
                Err(_) => return,
            }
        }
        // What is left of it is part of what will be seen now.
        while let Ok(nudge) = nudges.try_recv() {
            self.hear(Some(nudge));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::channel;

    #[test]
    fn a_burst_is_one_scan() {
        let (to, from) = channel();
        for _ in 0..1000 {
            to.send(Nudge::Usb).unwrap();
        }
        to.send(Nudge::Reload).unwrap();
        let mut heard = Heard::default();
        heard.hear(from.recv().ok());
        heard.burst(&from, Instant::now());
        assert!(heard.usb && heard.reload && !heard.stop);
        assert_eq!(from.try_recv(), Err(std::sync::mpsc::TryRecvError::Empty));
    }

    #[test]
    fn a_bad_edit_is_refused_and_a_good_one_counts() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("config.toml");
        std::fs::write(&file, "scan_interval = 7\n").unwrap();
        let rules = Rules::new(Some(file.clone()), Config::load(Some(&file)).unwrap());
        std::fs::write(&file, "scan_interval = 'often'\n").unwrap();
        rules.reload();
        assert_eq!(rules.now().scan_interval, Duration::from_secs(7));
        let before = rules.stamp();
        std::fs::write(&file, "scan_interval = 9\nstate_dir = '/elsewhere'\nusb_white_list_switch = 'on'\n")
            .unwrap();
        assert_ne!(rules.stamp(), before);
        rules.reload();
        assert_eq!(rules.now().scan_interval, Duration::from_secs(9));
        assert!(rules.now().whitelist.on);
        assert_eq!(rules.now().state_dir, Config::default().state_dir, "from the next start on");
        std::fs::remove_file(&file).unwrap();
        rules.reload();
        assert_eq!(rules.now().scan_interval, Duration::from_secs(9), "a file that is gone changes nothing");
    }
}
