//! The configuration in effect, and the reload of its file.

use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, Instant};

use virt_usb_config::{Config, ConfigError, DEFAULT_PATH};

use virt_usb_fleet::stamp::{Stamp, stamp};

/// Interval at which the file is checked for changes.
pub(super) const CONFIG_CHECK_INTERVAL: Duration = Duration::from_secs(2);
/// Time for which a changed file must stay the same before it is read.
const SETTLE_INTERVAL: Duration = Duration::from_millis(500);

/// The configuration in effect. Clones share their content.
#[derive(Clone)]
pub(crate) struct LiveConfig {
    file: Option<PathBuf>,
    /// Stamp of the file immediately before it was first read.
    pub(super) first: Option<Stamp>,
    /// The configuration as first read, without the changes of a simulation.
    read: Arc<Config>,
    now: Arc<RwLock<Arc<Config>>>,
}

impl LiveConfig {
    /// Reads the configuration for the first time.
    ///
    /// # Errors
    /// If the configuration is invalid or cannot be read.
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

    /// Replaces the configuration by that of a simulation.
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
        let current = self.now();
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
            state_dir: current.state_dir.clone(),
            sysfs_root: current.sysfs_root.clone(),
            procfs_root: current.procfs_root.clone(),
            libvirt_uri: current.libvirt_uri.clone(),
            metrics: current.metrics.clone(),
            api: current.api,
            api_tls: current.api_tls.clone(),
            fleet: current.fleet.clone(),
            ..read
        };
        let changed = next != *current;
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

/// Decides when to reload a changed configuration: after two equal checks, because an editor that
/// rewrites a file empties it first.
pub(super) struct Edits {
    /// Stamp of the file when it was read.
    read: Option<Stamp>,
    /// Whether a reload was requested, even without a change.
    requested: bool,
    /// Stamp that differs from `read`, and the time when it was first seen.
    seen: Option<(Option<Stamp>, Instant)>,
}

impl Edits {
    pub(super) const fn new(read: Option<Stamp>) -> Self {
        Self { read, requested: false, seen: None }
    }

    /// Time until the next check of the file.
    pub(super) fn next_check(&self) -> Duration {
        if self.seen.is_some() { SETTLE_INTERVAL } else { CONFIG_CHECK_INTERVAL }
    }

    /// Whether to reload now.
    pub(super) fn settled(&mut self, stamp: Option<Stamp>, requested: bool, now: Instant) -> bool {
        self.requested |= requested;
        if !self.requested && stamp == self.read {
            self.seen = None;
            return false;
        }
        match self.seen {
            Some((before, at)) if before == stamp => {
                let settled = now.saturating_duration_since(at) >= SETTLE_INTERVAL;
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
    fn an_invalid_file_is_refused_and_a_valid_one_applies() {
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
            "a missing file changes nothing"
        );
    }

    #[test]
    fn a_file_is_read_after_two_equal_checks() {
        let stamp = |size| Some((1, 1, size, (0, 0)));
        let start = Instant::now();
        let after = |ms| start + Duration::from_millis(ms);
        let mut edits = Edits::new(stamp(9));
        assert!(!edits.settled(stamp(9), false, after(0)));
        assert_eq!(edits.next_check(), CONFIG_CHECK_INTERVAL);
        assert!(!edits.settled(stamp(0), false, after(1)), "an editor empties it");
        assert_eq!(edits.next_check(), SETTLE_INTERVAL);
        assert!(!edits.settled(stamp(5), false, after(600)), "and writes it");
        assert!(!edits.settled(stamp(5), false, after(601)), "an immediate check is too early");
        assert!(edits.settled(stamp(5), false, after(1100)));
        assert!(!edits.settled(stamp(5), false, after(9000)), "once");
        assert!(!edits.settled(stamp(0), false, after(9001)));
        assert!(!edits.settled(stamp(5), false, after(9900)), "the stamp is that of the last read");
        assert!(!edits.settled(stamp(5), true, after(10_000)), "requested");
        assert!(!edits.settled(None, false, after(10_100)));
        assert!(!edits.settled(stamp(5), false, after(10_700)));
        assert!(edits.settled(stamp(5), false, after(11_300)));
    }
}
