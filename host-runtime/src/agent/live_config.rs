//! The configuration that counts now, and when its file is read again.

use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, Instant};

use virt_usb_config::{Config, ConfigError, DEFAULT_PATH};

use virt_usb_fleet::stamp::{Stamp, stamp};

/// How often the configuration's file is looked at.
pub(super) const CONFIG_LOOK_INTERVAL: Duration = Duration::from_secs(2);
/// How long it must stay the same before it is read.
const SETTLE: Duration = Duration::from_millis(500);
/// The configuration that counts now.
#[derive(Clone)]
pub(crate) struct LiveConfig {
    file: Option<PathBuf>,
    /// As the file was right before it was read first.
    pub(super) first: Option<Stamp>,
    /// As it was read first: what the simulation has changed is no change of the file.
    read: Arc<Config>,
    now: Arc<RwLock<Arc<Config>>>,
}

impl LiveConfig {
    /// Reads the configuration for the first time.
    ///
    /// # Errors
    /// What is wrong with it.
    pub(crate) fn read(file: Option<PathBuf>) -> Result<Self, ConfigError> {
        let first = stamp(path(file.as_deref()));
        let read = Arc::new(Config::load(file.as_deref())?);
        Ok(Self { file, first, now: Arc::new(RwLock::new(read.clone())), read })
    }

    #[cfg(test)]
    pub(super) fn of(config: Config) -> Self {
        let read = Arc::new(config);
        Self { file: None, first: None, now: Arc::new(RwLock::new(read.clone())), read }
    }

    /// With another configuration than that of the file: a simulation's.
    pub(crate) fn with(self, config: Config) -> Self {
        Self { now: Arc::new(RwLock::new(Arc::new(config))), ..self }
    }

    pub(crate) fn now(&self) -> Arc<Config> {
        self.now.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Reloads the configuration; returns whether anything changed. An invalid file changes
    /// nothing. A key that cannot change while the agent runs keeps its value, and the agent
    /// reports it.
    pub(super) fn reload(
        &self,
        admit: impl FnOnce(&Config, Option<&Path>) -> anyhow::Result<()>,
    ) -> bool {
        let was = self.now();
        // Without the file, the defaults would apply, which offer every device to all projects.
        let path = path(self.file.as_deref());
        if self.first.is_some() && !path.exists() {
            tracing::error!("{} was removed; the previous rules stay in effect", path.display());
            return false;
        }
        let read = match Config::load(self.file.as_deref()) {
            Ok(read) => read,
            Err(e) => {
                tracing::error!("{e}; the previous rules stay in effect");
                return false;
            }
        };
        if let Err(e) = admit(&read, self.file.as_deref()) {
            tracing::error!("{e:#}; the previous rules stay in effect");
            return false;
        }
        let first = &self.read;
        let fixed = [
            ("state_dir", read.state_dir != first.state_dir),
            ("sysfs_root", read.sysfs_root != first.sysfs_root),
            ("procfs_root", read.procfs_root != first.procfs_root),
            ("libvirt_uri", read.libvirt_uri != first.libvirt_uri),
            ("metrics", read.metrics != first.metrics),
            ("api", read.api != first.api),
            ("api_certificate, api_key", read.api_tls != first.api_tls),
            ("fleet", read.fleet != first.fleet),
            ("keystone", read.keystone != first.keystone),
        ];
        for (key, _) in fixed.iter().filter(|(_, changed)| *changed) {
            tracing::warn!("{key} has changed: restart the agent to apply it");
        }
        let next = Config {
            state_dir: was.state_dir.clone(),
            sysfs_root: was.sysfs_root.clone(),
            procfs_root: was.procfs_root.clone(),
            libvirt_uri: was.libvirt_uri.clone(),
            metrics: was.metrics.clone(),
            api: was.api,
            api_tls: was.api_tls.clone(),
            fleet: was.fleet.clone(),
            ..read
        };
        let changed = next != *was;
        if changed {
            tracing::info!("the configuration was reloaded");
            *self.now.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(next);
        }
        changed
    }

    /// Stamp that changes with the file's content, owner or mode.
    pub(super) fn stamp(&self) -> Option<Stamp> {
        stamp(path(self.file.as_deref()))
    }
}

fn path(file: Option<&Path>) -> &Path {
    file.unwrap_or(Path::new(DEFAULT_PATH))
}

/// Decides when to reload a changed configuration: after two equal reads, because an editor that
/// rewrites a file empties it first.
pub(super) struct Edits {
    /// Stamp of the file when it was read.
    read: Option<Stamp>,
    /// Whether a reload was requested, even without a change.
    asked: bool,
    /// Stamp that differs from `read`, and when it was first seen.
    seen: Option<(Option<Stamp>, Instant)>,
}

impl Edits {
    pub(super) const fn new(read: Option<Stamp>) -> Self {
        Self { read, asked: false, seen: None }
    }

    /// Time until the next look at the file.
    pub(super) fn next_look(&self) -> Duration {
        if self.seen.is_some() { SETTLE } else { CONFIG_LOOK_INTERVAL }
    }

    /// Whether to reload now.
    pub(super) fn settled(&mut self, stamp: Option<Stamp>, asked: bool, now: Instant) -> bool {
        self.asked |= asked;
        if !self.asked && stamp == self.read {
            self.seen = None;
            return false;
        }
        match self.seen {
            Some((before, at)) if before == stamp => {
                let settled = now.saturating_duration_since(at) >= SETTLE;
                if settled {
                    *self = Self::new(stamp);
                }
                settled
            }
            _ => {
                self.seen = Some((stamp, now));
                false
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bad_edit_is_refused_and_a_good_one_counts() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("config.toml");
        std::fs::write(&file, "scan_interval = 7\n").unwrap();
        let rules = LiveConfig::read(Some(file.clone())).unwrap();
        std::fs::write(&file, "scan_interval = 'often'\n").unwrap();
        rules.reload(|_, _| Ok(()));
        assert_eq!(rules.now().scan_interval, Duration::from_secs(7));
        let before = rules.stamp();
        std::fs::write(
            &file,
            "scan_interval = 9\nstate_dir = '/elsewhere'\nusb_white_list_switch = 'on'\n",
        )
        .unwrap();
        assert_ne!(rules.stamp(), before);
        rules.reload(|_, _| Ok(()));
        assert_eq!(rules.now().scan_interval, Duration::from_secs(9));
        assert!(rules.now().whitelist.on);
        assert_eq!(rules.now().state_dir, Config::default().state_dir, "from the next start on");
        std::fs::remove_file(&file).unwrap();
        rules.reload(|_, _| Ok(()));
        assert_eq!(
            rules.now().scan_interval,
            Duration::from_secs(9),
            "a file that is gone changes nothing"
        );
    }

    #[test]
    fn a_file_is_read_after_two_equal_looks() {
        let stamp = |size| Some((1, 1, size, (0, 0)));
        let start = Instant::now();
        let after = |ms| start + Duration::from_millis(ms);
        let mut edits = Edits::new(stamp(9));
        assert!(!edits.settled(stamp(9), false, after(0)));
        assert_eq!(edits.next_look(), CONFIG_LOOK_INTERVAL);
        assert!(!edits.settled(stamp(0), false, after(1)), "an editor empties it");
        assert_eq!(edits.next_look(), SETTLE);
        assert!(!edits.settled(stamp(5), false, after(600)), "and writes it");
        assert!(!edits.settled(stamp(5), false, after(601)), "a look at once says nothing");
        assert!(edits.settled(stamp(5), false, after(1100)));
        assert!(!edits.settled(stamp(5), false, after(9000)), "once");
        assert!(!edits.settled(stamp(0), false, after(9001)));
        assert!(!edits.settled(stamp(5), false, after(9900)), "it is as it was read");
        assert!(!edits.settled(stamp(5), true, after(10_000)), "asked for");
        assert!(!edits.settled(None, false, after(10_100)));
        assert!(!edits.settled(stamp(5), false, after(10_700)));
        assert!(edits.settled(stamp(5), false, after(11_300)));
    }
}
