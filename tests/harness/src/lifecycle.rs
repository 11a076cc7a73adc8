//! The calls of a life cycle, and libvirt's reaction when one of them fails.
//!
//! ```text
//! start            prepare ─► start ─► started           a failure ─► stopped ─► release failed
//! restore, migrate filter ─► prepare ─► start ─► started a failed filter ─► nothing
//! stop, destroy, … stopped ─► release REASON             failures are ignored
//! daemon restart   reconnect                             failed: killed, stopped ─► release daemon
//! ```
//!
//! Sources: `qemuProcessStart`, `qemuProcessStop`, `qemuProcessReconnect`
//! (src/qemu/qemu_process.c), `qemuDomainRestoreInternal` (src/qemu/qemu_driver.c),
//! `qemuMigrationDstPrepareFresh` and what it calls (src/qemu/qemu_migration.c). Both filters run
//! before the domain is on libvirt's list: so nothing follows a refusal.

use serde::{Deserialize, Serialize};

use crate::call::Settings;
use crate::chain::{HookError, Hooks, Request};
use crate::domain::Domain;
use crate::record::{CallRecord, Outcome, OutputFate};

/// Caller of `prepare`, `start` and `started`, which determines how their output is used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Initiator {
    /// libvirtd: it throws the output away.
    #[default]
    Libvirt,
    /// A caller with a filter contract, as KubeVirt's sidecar: it starts what was printed.
    Filter,
}

/// A life cycle.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Cycle {
    /// The domain is started.
    Start,
    /// The guest shut down.
    Stop,
    /// The domain was destroyed.
    Destroy,
    /// Crash of QEMU.
    Crash,
    /// The guest was saved.
    Save,
    /// The guest has left for another host.
    MigrateAway,
    /// A saved guest comes back.
    Restore,
    /// A guest arrives from another host.
    Migrate,
    /// The daemon was restarted while the guest ran.
    RestartDaemon,
}

impl Cycle {
    /// As it is written on the command line and in a scenario.
    pub fn name(self) -> &'static str {
        match self {
            Self::Start => "start",
            Self::Stop => "stop",
            Self::Destroy => "destroy",
            Self::Crash => "crash",
            Self::Save => "save",
            Self::MigrateAway => "migrate-away",
            Self::Restore => "restore",
            Self::Migrate => "migrate",
            Self::RestartDaemon => "restart-daemon",
        }
    }

    /// Whether the guest must be running before it.
    pub fn needs_running(self) -> bool {
        !matches!(self, Self::Start | Self::Restore | Self::Migrate)
    }
}

/// Something has just happened; for those who watch.
#[derive(Debug)]
pub enum Event<'a> {
    /// A step begins.
    Begin {
        /// Action of the life cycle.
        action: &'a str,
        /// The scenario's own words on it.
        say: Option<&'a str>,
        /// To which domain.
        domain: Option<&'a Domain>,
    },
    /// A call has ended.
    Called(&'a CallRecord),
    /// A step has ended.
    End(&'a crate::record::Play),
}

/// Result of a life cycle.
#[derive(Debug, Clone)]
pub struct Played {
    /// The calls, in order.
    pub calls: Vec<CallRecord>,
    /// How it ended.
    pub outcome: Outcome,
    /// The live definition when it ended; `None` when the guest does not run.
    pub live: Option<Domain>,
    /// Remarks for the reader.
    pub remarks: Vec<String>,
}

/// Calls hooks in libvirt's order.
pub struct Player<'a> {
    /// Hooks to call.
    pub hooks: &'a Hooks,
    /// Settings of the calls.
    pub settings: &'a Settings,
    /// The caller that the calls are simulated for.
    pub caller: Initiator,
}

/// A life cycle under way.
struct Run<'p, 'w> {
    player: &'p Player<'p>,
    watch: &'w mut dyn FnMut(Event<'_>),
    calls: Vec<CallRecord>,
    remarks: Vec<String>,
}

/// Use of a call's output.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Use {
    Nothing,
    /// The output replaces the XML, within the changes that libvirt allows a filter.
    Filter,
    /// The output replaces the XML.
    Definition,
}

impl Player<'_> {
    /// Plays one life cycle of one domain.
    ///
    /// # Errors
    /// When a hook cannot be called at all.
    pub fn play(
        &self,
        cycle: Cycle,
        domain: &Domain,
        watch: &mut dyn FnMut(Event<'_>),
    ) -> Result<Played, HookError> {
        let mut run = Run { player: self, watch, calls: Vec::new(), remarks: Vec::new() };
        let ended = match cycle {
            Cycle::Start => run.startup(domain.clone())?,
            Cycle::Stop => run.shutdown(domain, "shutdown")?,
            Cycle::Destroy => run.shutdown(domain, "destroyed")?,
            Cycle::Crash => run.shutdown(domain, "crashed")?,
            Cycle::Save => run.shutdown(domain, "saved")?,
            Cycle::MigrateAway => run.shutdown(domain, "migrated")?,
            Cycle::Restore => run.incoming("restore", domain)?,
            Cycle::Migrate => run.incoming("migrate", domain)?,
            Cycle::RestartDaemon => run.reconnect(domain)?,
        };
        let (outcome, live) = ended;
        Ok(Played { calls: run.calls, outcome, live, remarks: run.remarks })
    }

    /// Makes one single call, whatever it is.
    ///
    /// # Errors
    /// When a hook cannot be called at all.
    pub fn single(
        &self,
        request: &Request,
        xml: &[u8],
        watch: &mut dyn FnMut(Event<'_>),
    ) -> Result<Played, HookError> {
        let mut run = Run { player: self, watch, calls: Vec::new(), remarks: Vec::new() };
        let filter = matches!(request.op.as_str(), "migrate" | "restore")
            || self.caller == Initiator::Filter;
        let chained = run.chain(request, xml, filter)?;
        let outcome = match chained.failure {
            Some(message) => Outcome::Refused { op: request.op.clone(), message },
            None => Outcome::Done,
        };
        Ok(Played { calls: run.calls, outcome, live: None, remarks: run.remarks })
    }
}

type Ended = (Outcome, Option<Domain>);

impl Run<'_, '_> {
    fn startup(&mut self, mut domain: Domain) -> Result<Ended, HookError> {
        let good_for = match self.player.caller {
            Initiator::Libvirt => Use::Nothing,
            Initiator::Filter => Use::Definition,
        };
        for op in ["prepare", "start", "started"] {
            let good_for = if op == "prepare" { good_for } else { Use::Nothing };
            match self.step(op, "begin", "", &domain, good_for)? {
                Ok(next) => domain = next,
                Err(message) => return self.abort(op, message, &domain),
            }
        }
        Ok((Outcome::Done, Some(domain)))
    }

    fn abort(&mut self, op: &str, message: String, domain: &Domain) -> Result<Ended, HookError> {
        self.remark(match op {
            "started" => {
                "libvirt kills the guest, which was running already, and cleans up".to_owned()
            }
            _ => "libvirt gives the start up and cleans up".to_owned(),
        });
        self.shutdown(domain, "failed")?;
        Ok((Outcome::Refused { op: op.to_owned(), message }, None))
    }

    /// libvirt goes on whatever these two answer.
    fn shutdown(&mut self, domain: &Domain, reason: &str) -> Result<Ended, HookError> {
        for (op, extra) in [("stopped", ""), ("release", reason)] {
            if self.step(op, "end", extra, domain, Use::Nothing)?.is_err() {
                self.remark(format!("{op} failed; libvirt ignores that and does not report it"));
            }
        }
        Ok((Outcome::Done, None))
    }

    /// Adds a remark about libvirt's next step, unless libvirt would still be waiting.
    fn remark(&mut self, what: String) {
        if self.calls.last().is_none_or(|call| call.hang.is_none()) {
            self.remarks.push(what);
        }
    }

    fn incoming(&mut self, op: &str, domain: &Domain) -> Result<Ended, HookError> {
        match self.step(op, "begin", "", domain, Use::Filter)? {
            Ok(filtered) => self.startup(filtered),
            Err(message) => {
                self.remark(format!(
                    "after a refused {op} libvirt calls no stopped and no release"
                ));
                Ok((Outcome::Refused { op: op.to_owned(), message }, None))
            }
        }
    }

    fn reconnect(&mut self, domain: &Domain) -> Result<Ended, HookError> {
        match self.step("reconnect", "begin", "", domain, Use::Nothing)? {
            Ok(domain) => Ok((Outcome::Done, Some(domain))),
            Err(message) => {
                self.remark(format!(
                    "libvirt KILLS the running guest {} because of this",
                    domain.name
                ));
                self.shutdown(domain, "daemon")?;
                Ok((Outcome::Refused { op: "reconnect".to_owned(), message }, None))
            }
        }
    }

    /// One operation; the domain as it is after it, or libvirt's error.
    fn step(
        &mut self,
        op: &str,
        subop: &str,
        extra: &str,
        domain: &Domain,
        good_for: Use,
    ) -> Result<Result<Domain, String>, HookError> {
        let request = Request {
            name: domain.name.clone(),
            op: op.to_owned(),
            subop: subop.to_owned(),
            extra: extra.to_owned(),
        };
        let chained = self.chain(&request, &domain.xml, good_for != Use::Nothing)?;
        if let Some(message) = chained.failure {
            return Ok(Err(message));
        }
        let Some(output) = chained.output else { return Ok(Ok(domain.clone())) };
        let replaced = match good_for {
            Use::Definition => Domain::parse(output).map_err(|what| format!("XML error: {what}")),
            Use::Filter | Use::Nothing => domain.replaced_by(&output),
        };
        if replaced.is_err()
            && let Some(last) = self.calls.iter_mut().rfind(|call| call.output == OutputFate::Used)
        {
            last.output = OutputFate::Refused;
        }
        Ok(replaced)
    }

    fn chain(
        &mut self,
        request: &Request,
        xml: &[u8],
        filter: bool,
    ) -> Result<crate::chain::Chained, HookError> {
        let chained = self.player.hooks.call(request, xml, filter, self.player.settings)?;
        for link in &chained.links {
            let record = CallRecord::new(link, &request.op, filter);
            (self.watch)(Event::Called(&record));
            self.calls.push(record);
        }
        Ok(chained)
    }
}
