//! `virt-usb doctor`: checks this host and says how to fix what it finds. It reads and changes
//! nothing.
//!
//! Each check has a file of its own and an entry in [`CHECKS`]. A check runs in its own thread and
//! has [`CHECK_TIMEOUT`], so one that waits for a hung service does not hold up the others.
//! A check says nothing about what an earlier check already reports.

mod address;
mod agent;
mod api;
mod configuration;
mod devices;
mod fleet;
mod guests;
mod hook;
mod inventory;
mod keystone;
mod libvirt;
mod log;
mod machine;
mod metrics;
mod problems;
mod process;
mod tokens;
mod udev;

use std::fmt::Display;
use std::io::ErrorKind;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

use serde::Serialize;
use virt_usb_config::Config;
use virt_usb_store::{Durability, FILE_NAME, Store, StoreError};

const VERSION: &str = env!("CARGO_PKG_VERSION");
/// Timeout for the connection to a service of this host.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Timeout for a whole check. libvirt alone may take 30 s to answer, and an etcd member 8 s.
const CHECK_TIMEOUT: Duration = Duration::from_secs(60);

/// Check of a host with a readable configuration.
struct Check {
    name: &'static str,
    run: fn(&Host, &Report),
    /// Level of the finding if the check has no result.
    no_result: Level,
    /// Whether the check reads `state_dir`, which belongs to the agent's user.
    reads_state: bool,
}

/// The checks, in the order in which they report.
const CHECKS: &[Check] = &[
    Check { name: "hook", run: hook::confinement, no_result: Level::Broken, reads_state: false },
    Check { name: "hook", run: hook::containers, no_result: Level::Warning, reads_state: true },
    Check {
        name: "configuration",
        run: configuration::check,
        no_result: Level::Broken,
        reads_state: false,
    },
    Check { name: "machine", run: machine::check, no_result: Level::Broken, reads_state: false },
    Check { name: "log", run: log::check, no_result: Level::Warning, reads_state: false },
    Check { name: "udev", run: udev::check, no_result: Level::Warning, reads_state: false },
    Check { name: "agent", run: agent::check, no_result: Level::Broken, reads_state: true },
    Check { name: "metrics", run: metrics::check, no_result: Level::Warning, reads_state: true },
    Check { name: "api", run: api::check, no_result: Level::Warning, reads_state: true },
    Check { name: "inventory", run: inventory::check, no_result: Level::Broken, reads_state: true },
    Check { name: "problems", run: problems::check, no_result: Level::Warning, reads_state: true },
    Check { name: "fleet", run: fleet::check, no_result: Level::Warning, reads_state: false },
    Check { name: "tokens", run: tokens::check, no_result: Level::Warning, reads_state: true },
    Check { name: "keystone", run: keystone::check, no_result: Level::Warning, reads_state: false },
    Check { name: "libvirt", run: libvirt::check, no_result: Level::Broken, reads_state: false },
    Check { name: "guest", run: guests::check, no_result: Level::Warning, reads_state: true },
    Check { name: "device", run: devices::check, no_result: Level::Warning, reads_state: true },
];

/// Severity of a finding, in ascending order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Level {
    /// Nothing to fix.
    Ok,
    /// Some functions do not work.
    Warning,
    /// Guests that request devices do not get them, or the check has no result.
    Broken,
}

/// One result of a check.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// Name of the check: `hook`, `agent`, …
    pub check: &'static str,
    /// Severity of the finding.
    pub level: Level,
    /// Description of what was found.
    pub what: String,
    /// Advice on how to fix it.
    pub fix: Option<String>,
}

impl Finding {
    fn new(check: &'static str, level: Level, what: impl Display, fix: Option<&str>) -> Self {
        Self { check, level, what: what.to_string(), fix: fix.map(str::to_owned) }
    }
}

/// Files and directories to check.
#[derive(Debug, Clone)]
pub struct Places {
    /// Configuration file. `None` for the default one.
    pub config: Option<PathBuf>,
    /// Folder of libvirt's hooks.
    pub hooks: PathBuf,
    /// Folder in which daemons leave their process ids and sockets.
    pub run: PathBuf,
}

/// The host that is checked.
struct Host {
    places: Places,
    config: Config,
}

impl Host {
    fn store(&self) -> Result<Store, StoreError> {
        Store::open(
            &self.config.state_dir,
            crate::timeouts::COMMAND_LOCK_TIMEOUT,
            Durability::Power,
        )
    }
}

/// Where a check reports its findings.
struct Report {
    check: &'static str,
    to: Sender<Finding>,
}

impl Report {
    fn add(&self, level: Level, what: impl Display, fix: Option<String>) {
        // After the timeout the receiver is gone.
        drop(self.to.send(Finding { check: self.check, level, what: what.to_string(), fix }));
    }

    fn ok(&self, what: impl Display) {
        self.add(Level::Ok, what, None);
    }

    fn warn(&self, what: impl Display, fix: impl Display) {
        self.add(Level::Warning, what, Some(fix.to_string()));
    }

    fn broken(&self, what: impl Display, fix: impl Display) {
        self.add(Level::Broken, what, Some(fix.to_string()));
    }
}

/// Runs all checks. `tell` receives each finding as soon as it is made.
pub fn examine(places: &Places, tell: &mut dyn FnMut(&Finding)) -> Vec<Finding> {
    let mut findings = Vec::new();
    let mut tell = |finding: Finding| {
        tell(&finding);
        findings.push(finding);
    };
    let hook_places = places.clone();
    let hook = move |report: &Report| hook::check(&hook_places, report);
    run("hook", CHECK_TIMEOUT, Level::Broken, hook, &mut tell);
    let config = match Config::load(places.config.as_deref()) {
        Ok(config) => config,
        Err(e) => {
            let fix = "correct it: the installed file explains every key";
            tell(Finding::new("configuration", Level::Broken, e, Some(fix)));
            return findings;
        }
    };
    let state = std::fs::read_dir(&config.state_dir);
    // The directory belongs to another user: follow no links there, and do not block on a pipe.
    let inventory = std::fs::File::options()
        .read(true)
        .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
        .open(config.state_dir.join(FILE_NAME));
    let is_closed = [state.err(), inventory.err()]
        .iter()
        .flatten()
        .any(|e| e.kind() == ErrorKind::PermissionDenied);
    if is_closed {
        let what = format!(
            "this user may not read {}: some checks are skipped",
            config.state_dir.display()
        );
        tell(Finding::new("inventory", Level::Warning, what, Some("'sudo virt-usb doctor'")));
    }
    let host = Arc::new(Host { places: places.clone(), config });
    for check in CHECKS.iter().filter(|check| !(is_closed && check.reads_state)) {
        let host = host.clone();
        let work = move |report: &Report| (check.run)(&host, report);
        run(check.name, CHECK_TIMEOUT, check.no_result, work, &mut tell);
    }
    findings
}

/// Runs a check in a thread of its own and passes its findings on, until it ends or times out.
fn run(
    name: &'static str,
    timeout: Duration,
    no_result: Level,
    check: impl FnOnce(&Report) + Send + 'static,
    tell: &mut dyn FnMut(Finding),
) {
    let (to, findings) = channel();
    let report = Report { check: name, to };
    let broken = |what: String| {
        let fix = "report this with the output of 'virt-usb doctor --all'";
        Finding::new(name, Level::Broken, what, Some(fix))
    };
    let thread = std::thread::Builder::new().name(format!("doctor-{name}"));
    let thread = match thread.spawn(move || check(&report)) {
        Ok(thread) => thread,
        Err(e) => return tell(broken(format!("this check cannot start: {e}"))),
    };
    let end = Instant::now() + timeout;
    loop {
        match findings.recv_timeout(end.saturating_duration_since(Instant::now())) {
            Ok(finding) => tell(finding),
            Err(RecvTimeoutError::Disconnected) => {
                if thread.join().is_err() {
                    tell(broken("this check failed".into()));
                }
                return;
            }
            Err(RecvTimeoutError::Timeout) => {
                let what = format!("this check has no result after {} s", timeout.as_secs());
                let fix = "check what it waits for: the service that it queries, or the disk";
                return tell(Finding::new(name, no_result, what, Some(fix)));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn findings(check: impl FnOnce(&Report) + Send + 'static, timeout: Duration) -> Vec<String> {
        let mut told = Vec::new();
        run("test", timeout, Level::Warning, check, &mut |finding| {
            told.push(format!("{:?} {}", finding.level, finding.what));
        });
        told
    }

    #[test]
    fn a_check_that_hangs_is_reported_and_left_behind() {
        let hangs = |report: &Report| {
            report.warn("found before", "fix it");
            std::thread::sleep(Duration::from_secs(3600));
            report.ok("too late");
        };
        let expected = ["Warning found before", "Warning this check has no result after 1 s"];
        assert_eq!(findings(hangs, Duration::from_secs(1)), expected);
    }

    #[test]
    fn a_check_that_fails_is_reported() {
        let fails = |_: &Report| std::panic::resume_unwind(Box::new(()));
        assert_eq!(findings(fails, Duration::from_secs(60)), ["Broken this check failed"]);
        assert_eq!(findings(|report| report.ok("fine"), Duration::from_secs(60)), ["Ok fine"]);
    }
}
