//! Executes the plan for one instance, until no steps remain. Leaves all decisions to the planner
//! if possible. The execution may be killed at any moment, and a step may be executed twice.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use virt_usb_config::host_env;
use virt_usb_config::{AttachFailurePolicy, Config};
use virt_usb_domxml::{Domain, UsbHostdev, XmlError, redirdev_element};
use virt_usb_hook::verify::{
    Delivery, NO_SPICE, Ports, claimant, hostdev, is_device, port_speeds, refuse_taken_aliases,
    room, slowed,
};
use virt_usb_model::{DeviceId, InstanceId, SpeedMask};
use virt_usb_store::adopt::Stage;
use virt_usb_store::claim::{ClaimVerifier, Claimant, Granted, Verified};
use virt_usb_store::events::Filter;
use virt_usb_store::release::{Extent, Witness};
use virt_usb_store::{ClaimRow, Context, Durability, Record, Store, StoreError};

use super::observe::{View, guest};
use super::plan::{ABOUT_LIBVIRT, ABOUT_STOP, Absence, Guest, Seen, Step, about_device};
use crate::discovery::host_driver;
use crate::hypervisor::{Failure, Hypervisor};
use crate::metrics::Metrics;
use crate::timeouts::STORE_LOCK_TIMEOUT;

/// Maximum number of rounds. The plan is made again after each round; more rounds mean that another
/// program interferes.
const MAX_ROUNDS: usize = 8;
/// Timeout for a device to disappear from the live XML after a detach.
const DETACH_TIMEOUT: Duration = Duration::from_secs(5);
/// Interval at which the live XML is read during a detach.
const DETACH_POLL_INTERVAL: Duration = Duration::from_millis(20);
/// Time for which the host's drivers may have a device while its guest configures it.
const CONFIGURE_GRACE: Duration = Duration::from_secs(2);
/// Maximum number of times within [`REATTACH_PERIOD`] that the agent reattaches a device that a
/// driver of the host takes back.
const MAX_REATTACHES: usize = 3;
/// Period in which reattaches are counted.
const REATTACH_PERIOD: Duration = Duration::from_secs(600);

/// A worker that carries out plans.
pub struct Worker {
    /// The current configuration.
    pub config: Arc<Config>,
    /// Connection to the hypervisor.
    pub hypervisor: Arc<dyn Hypervisor>,
    /// Connection to the inventory.
    pub store: Store,
    /// Metrics of the agent.
    pub metrics: Arc<Metrics>,
    /// Name of the program in the audit trail.
    pub actor: String,
}

/// Absence of a guest in earlier checks.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct ObservedAbsence {
    /// Duration of the absence.
    pub gone: Absence,
    /// Claims of the instance during the absence, from [`marks`]; `None` for any claims.
    pub claims: Option<Vec<(i64, i64)>>,
}

/// Marks that show whether claims have changed.
pub fn marks(claims: &[ClaimRow]) -> Vec<(i64, i64)> {
    claims.iter().map(|c| (c.id, c.revision)).collect()
}

/// State of a guest at the last check.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Found {
    /// The guest is running.
    #[default]
    Running,
    /// The guest is not running.
    Absent {
        /// Whether libvirt has a domain with this UUID.
        is_known: bool,
    },
    /// libvirt does not run the guest, although its QEMU runs on this host.
    Unknown,
}

/// Result of the work on one instance.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Report {
    /// State of the guest.
    pub found: Found,
    /// Subjects of failed steps, which are retried.
    pub failed: BTreeSet<String>,
    /// Whether something else must be retried later.
    pub later: bool,
    /// Subjects of steps that were not tried because they wait for a retry.
    pub blocked: BTreeSet<String>,
    /// Whether a step was executed.
    pub changed: bool,
}

/// An error that prevents all work on an instance.
#[derive(Debug, thiserror::Error)]
pub enum WorkError {
    /// Error of the inventory.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// Error of libvirt.
    #[error(transparent)]
    Hypervisor(#[from] Failure),
    /// Error of the boot id or the uptime.
    #[error(transparent)]
    Machine(#[from] host_env::BootError),
    /// Error of the domain's XML.
    #[error("cannot read the domain's XML: {0}")]
    Xml(XmlError),
}

impl From<XmlError> for WorkError {
    fn from(e: XmlError) -> Self {
        Self::Xml(e)
    }
}

/// Result of a step.
enum Outcome {
    Done,
    /// The step does not apply now. An event makes the instance due again.
    Moot,
    /// The step does not apply yet, and no event will make the instance due.
    Later,
    Failed(String),
}

impl Worker {
    /// Opens the inventory of this configuration, which must exist.
    ///
    /// # Errors
    /// If the inventory cannot be opened.
    pub fn open(
        config: Arc<Config>,
        hypervisor: Arc<dyn Hypervisor>,
        metrics: Arc<Metrics>,
        actor: &str,
    ) -> Result<Self, StoreError> {
        let store = Store::open(&config.state_dir, STORE_LOCK_TIMEOUT, Durability::Power)?;
        Ok(Self { config, hypervisor, store, metrics, actor: actor.to_owned() })
    }

    /// Plans and executes steps until the guest has the devices of its instance. `absence` is the
    /// observed absence of the guest, `blocked` the subjects of steps that wait for a retry.
    ///
    /// # Errors
    /// If libvirt or the inventory cannot be used. Steps that were executed before remain.
    pub fn converge(
        &mut self,
        instance: InstanceId,
        absence: &ObservedAbsence,
        blocked: &BTreeSet<String>,
    ) -> Result<Report, WorkError> {
        let mut report = Report::default();
        let mut tried = BTreeSet::new();
        for _ in 0..MAX_ROUNDS {
            self.store.restart_lock_timeout();
            let running = self.hypervisor.look(instance)?;
            let guest = match &running {
                Some(running) => Some(guest(running, &self.config, &self.store)?),
                None => None,
            };
            let view = View::read_about(&self.store, instance, guest.as_ref())?;
            let seen = match &guest {
                Some(guest) => Seen::Running(guest),
                None => self.absence(instance, absence, &view, &mut report)?,
            };
            let mut steps = view.plan(instance, seen, &self.config);
            report.blocked =
                steps.iter().filter_map(Step::about).filter(|a| blocked.contains(a)).collect();
            steps.retain(|s| {
                s.about().is_none_or(|a| !blocked.contains(&a) && !report.failed.contains(&a))
            });
            // A step that is planned again after its execution had no effect.
            steps.retain(|s| !tried.contains(&format!("{s:?}")));
            if steps.is_empty() {
                break;
            }
            let mut has_detached = false;
            for step in steps {
                // After a detach, the guest has other free ports: plan again.
                if has_detached && matches!(step, Step::Attach { .. } | Step::Redirect { .. }) {
                    break;
                }
                tried.insert(format!("{step:?}"));
                tracing::debug!(%instance, ?step, "instance {instance}: {step:?}");
                let at = Work { worker: self, instance, guest: guest.as_ref(), view: &view };
                match at.run(&step)? {
                    Outcome::Done => {
                        report.changed = true;
                        has_detached |=
                            matches!(step, Step::Detach { .. } | Step::TakenBack { .. });
                    }
                    Outcome::Moot => {}
                    Outcome::Later => report.later = true,
                    Outcome::Failed(what) => {
                        if let Some(about) = step.about() {
                            self.note(instance, guest.as_ref(), &view, &about, Some(&what))?;
                            report.failed.insert(about);
                        }
                    }
                }
            }
        }
        Ok(report)
    }

    /// Whether the guest counts as absent because libvirt does not run it. An agent that queries
    /// another libvirt than the guest's would release the guest's devices.
    fn absence<'a>(
        &mut self,
        instance: InstanceId,
        absence: &ObservedAbsence,
        view: &View,
        report: &mut Report,
    ) -> Result<Seen<'a>, WorkError> {
        let process = view.knows(instance).then(|| self.hypervisor.process(instance)).flatten();
        let Some(pid) = process else {
            let is_known = self.hypervisor.xml(instance)?.is_some();
            report.found = Found::Absent { is_known };
            // The observed absence does not apply to newer claims, or if the domain is defined
            // again.
            let is_same = absence
                .claims
                .as_ref()
                .is_none_or(|claims| *claims == marks(view.claims(instance)));
            return Ok(Seen::Absent(Absence {
                seconds: if is_same { absence.gone.seconds } else { 0.0 },
                undefined: absence.gone.undefined.filter(|_| !is_known),
            }));
        };
        report.found = Found::Unknown;
        let why = "its QEMU runs on this host, but not under the agent's libvirt: check that \
            libvirt_uri names the libvirt that runs it. The guest keeps its devices";
        tracing::debug!(%instance, pid, "instance {instance}: its QEMU is process {pid}");
        self.note(instance, None, view, ABOUT_LIBVIRT, Some(why))?;
        Ok(Seen::Unknown)
    }

    pub(super) fn context(&self) -> Result<Context, WorkError> {
        Ok(host_env::context(&self.config, &self.actor)?)
    }

    fn note(
        &mut self,
        instance: InstanceId,
        guest: Option<&Guest>,
        view: &View,
        about: &str,
        what: Option<&str>,
    ) -> Result<(), WorkError> {
        let context = self.context()?;
        let claimant = claimant_of(&self.store, instance, guest, view)?;
        if self.store.note_problem(&claimant, about, what, &context)? {
            let domain = &claimant.domain;
            match what {
                Some(what) => {
                    tracing::warn!(%domain, %instance, about, "{domain}: {about}: {what}");
                }
                None => tracing::info!(%domain, %instance, about, "{domain}: {about}: solved"),
            }
        }
        Ok(())
    }

    /// Waits until the live XML no longer shows the alias.
    fn wait_until_gone(&self, instance: InstanceId, alias: &str) -> Result<bool, WorkError> {
        let until = Instant::now() + DETACH_TIMEOUT;
        loop {
            let Some(running) = self.hypervisor.look(instance)? else { return Ok(true) };
            if !running.domain()?.hostdevs.iter().any(|h| h.alias.as_deref() == Some(alias)) {
                return Ok(true);
            }
            if Instant::now() >= until {
                return Ok(false);
            }
            std::thread::sleep(DETACH_POLL_INTERVAL);
        }
    }
}

/// Name and owner of the instance, from the running domain or from its claims.
fn claimant_of(
    store: &Store,
    instance: InstanceId,
    guest: Option<&Guest>,
    view: &View,
) -> Result<Claimant, StoreError> {
    match (guest, view.claims(instance)) {
        (Some(guest), _) => claimant(store, &guest.domain, instance),
        (None, [claim, ..]) => Ok(claim.claimant()),
        (None, []) => store.claimant(instance, &instance.to_string(), None),
    }
}

/// Context of the execution of a step.
struct Work<'a> {
    worker: &'a mut Worker,
    instance: InstanceId,
    guest: Option<&'a Guest>,
    view: &'a View,
}

impl Work<'_> {
    fn run(self, step: &Step) -> Result<Outcome, WorkError> {
        let (instance, context) = (self.instance, self.worker.context()?);
        match step {
            Step::Attach { device } => return self.attach(*device),
            Step::Detach { alias, device } => return self.detach(alias, *device),
            Step::Redirect { n } => return self.redirect(*n),
            Step::TakenBack { alias, device, others } => {
                return self.taken_back(alias, *device, others);
            }
            Step::Adopt { holding, device } => {
                let Some(guest) = self.guest else { return Ok(Outcome::Moot) };
                let mut ports = Ports { sysfs_root: &self.worker.config.sysfs_root };
                let claimant = claimant(&self.worker.store, &guest.domain, instance)?;
                let holding = std::slice::from_ref(holding);
                self.worker.store.adopt(
                    &claimant,
                    holding,
                    Stage::Running,
                    &mut ports,
                    &context,
                )?;
                let domain = &claimant.domain;
                tracing::info!(
                    %domain, %instance, %device,
                    "{domain}: device {device} was found in the guest and is now claimed for it"
                );
            }
            Step::Settle { in_guest } => {
                self.worker.store.confirm(instance, in_guest, Witness::Look, &context)?;
            }
            Step::Release { device, revision, why } => {
                let claim = self.view.claims(instance).iter().find(|c| c.device_id == *device);
                // libvirt may still be carrying out a call whose connection was lost.
                if claim.is_some_and(|c| c.unsure) && self.worker.hypervisor.is_busy(instance)? {
                    return Ok(Outcome::Later);
                }
                if self.worker.store.release_device(
                    instance,
                    *device,
                    Some(*revision),
                    why,
                    &context,
                )? {
                    tracing::info!(%instance, %device, "device {device} was released: {why}");
                }
            }
            Step::OutOfGuest => self.worker.store.out_of_guest(instance, &context)?,
            Step::End => {
                self.worker.store.release(
                    instance,
                    Extent::Gone,
                    "the domain is gone",
                    &context,
                )?;
                tracing::info!(%instance, "instance {instance} is gone: its claims and \
                    assignments are released");
            }
            Step::Note { about, what } => {
                self.worker.note(instance, self.guest, self.view, about, Some(what))?;
            }
            Step::Solved { about } => {
                self.worker.note(instance, self.guest, self.view, about, None)?;
            }
        }
        Ok(Outcome::Done)
    }

    fn attach(self, device: DeviceId) -> Result<Outcome, WorkError> {
        let (Some(guest), Some(record)) = (self.guest, self.view.device(device)) else {
            return Ok(Outcome::Moot);
        };
        let mut ports = Ports { sysfs_root: &self.worker.config.sysfs_root };
        // The address in the inventory may be outdated: check the device at the port first.
        let seen = match ports.verify(record) {
            Verified::Here(seen) => seen,
            // The next scan usually ends the problem.
            Verified::Not(why) => {
                self.worker.metrics.not_there();
                return Ok(Outcome::Failed(format!(
                    "it is not where it was: {why}; the agent retries"
                )));
            }
        };
        let mut record = record.clone();
        record.set_location(seen.clone());
        let claim = self.view.claims(self.instance).iter().find(|c| c.device_id == device);
        if let Some(claim) = claim.filter(|_| record.one_time_use) {
            self.worker.store.mark_used(claim)?;
        }
        if let Some(claim) =
            claim.filter(|c| c.generation.is_some() && c.generation != record.generation)
        {
            self.worker.store.forget_generation(claim)?;
        }
        let began = Instant::now();
        let speeds = [port_speeds(&record)];
        let place = guest.domain.bus.place(&speeds).first().copied();
        let attached = room(&guest.domain, &speeds, Delivery::HotPlug)
            .map_err(Failure::Refused)
            .and_then(|_| {
                let hostdev = hostdev(&record, place.and_then(|place| place.port));
                self.worker.hypervisor.attach(self.instance, &hostdev.element())
            });
        let unsure = matches!(attached, Err(Failure::Away(_)));
        if let Some(claim) = claim.filter(|c| c.unsure || unsure) {
            self.worker.store.mark_unsure(claim, unsure)?;
        }
        // The live XML decides whether the attach has succeeded, not libvirt's result.
        let inside = self.has(&record)?;
        self.worker.metrics.attached(began.elapsed(), attached.as_ref().err());
        match attached {
            // Another program ended the claim in the meantime, and has not seen the device in the
            // guest.
            Ok(()) if !self.is_still_wanted(device)? => {
                self.worker
                    .hypervisor
                    .detach(self.instance, &virt_usb_domxml::hostdev_alias(device))?;
                Ok(Outcome::Moot)
            }
            // Between the check of the port and the attach, another device may have been plugged
            // in.
            Ok(()) if !matches!(ports.verify(&record), Verified::Here(now) if now == seen) => {
                self.worker
                    .hypervisor
                    .detach(self.instance, &virt_usb_domxml::hostdev_alias(device))?;
                self.worker.metrics.not_there();
                Ok(Outcome::Failed(
                    "it was unplugged while being attached; the agent retries".into(),
                ))
            }
            Ok(()) if inside => {
                let (domain, instance) = (&guest.domain.name, self.instance);
                tracing::info!(
                    %domain, %instance, %device,
                    "{domain}: device {device} attached in {:.0?}",
                    began.elapsed()
                );
                if let Some(why) = place.and_then(|place| slowed(&guest.domain, &record, &place)) {
                    tracing::warn!(%domain, %instance, %device, "{why}");
                }
                Ok(Outcome::Done)
            }
            Ok(()) => Ok(Outcome::Failed(
                "libvirt says that it is attached, but the guest's XML does not show it: see \
                    QEMU's log"
                    .into(),
            )),
            Err(_) if inside => Ok(Outcome::Done),
            Err(Failure::Refused(why)) => self.refused(device, why),
            Err(failure) => moot_or_busy(failure),
        }
    }

    /// Handles a refusal of libvirt: stops the guest if the configuration requires that.
    fn refused(self, device: DeviceId, why: String) -> Result<Outcome, WorkError> {
        let claim = self.view.claims(self.instance).iter().find(|c| c.device_id == device);
        let stop = self.worker.config.on_attach_failure == AttachFailurePolicy::Stop;
        let Some(claim) = claim.filter(|_| stop) else { return Ok(Outcome::Failed(why)) };
        // A guest that had the device before keeps running: its start has not failed.
        if claim.seen_in_guest {
            return Ok(Outcome::Failed(why));
        }
        let about = about_device(device);
        let stopped =
            format!("{about}: {why}; the guest was stopped (on_attach_failure = \"stop\")");
        self.worker.note(self.instance, self.guest, self.view, ABOUT_STOP, Some(&stopped))?;
        match self.worker.hypervisor.stop(self.instance) {
            Ok(()) | Err(Failure::Gone) => Ok(Outcome::Done),
            Err(Failure::Refused(not)) => {
                Ok(Outcome::Failed(format!("{why}; the guest cannot be stopped: {not}")))
            }
            Err(failure) => moot_or_busy(failure),
        }
    }

    fn detach(self, alias: &str, device: DeviceId) -> Result<Outcome, WorkError> {
        let done = self.worker.hypervisor.detach(self.instance, alias);
        self.worker.metrics.detached(done.as_ref().err());
        match done {
            Ok(()) if self.worker.wait_until_gone(self.instance, alias)? => {
                tracing::info!(
                    instance = %self.instance, %device,
                    "device {device} detached ({alias})"
                );
                let claim = self.view.claims(self.instance).iter().find(|c| c.device_id == device);
                if let Some(claim) = claim.filter(|c| c.generation.is_some()) {
                    self.worker.store.forget_generation(claim)?;
                }
                Ok(Outcome::Done)
            }
            Ok(()) => Ok(Outcome::Failed(
                "the guest does not release it: it is removed when the guest stops".into(),
            )),
            Err(Failure::Refused(why)) => Ok(Outcome::Failed(why)),
            Err(failure) => moot_or_busy(failure),
        }
    }

    /// Detaches a device that a driver of the host has taken back. This happens if the device loses
    /// its configuration, for example if it is deauthorized and authorized again. The drivers also
    /// have it for a moment while a guest sets the configuration.
    fn taken_back(
        self,
        alias: &str,
        device: DeviceId,
        others: &[DeviceId],
    ) -> Result<Outcome, WorkError> {
        let Some(record) = self.view.device(device) else { return Ok(Outcome::Moot) };
        let driver = || host_driver(&self.worker.config.sysfs_root, &record.entry.port_path);
        // A simulated guest has no QEMU process, and does not take devices from drivers.
        if driver().is_none() || self.worker.hypervisor.process(self.instance).is_none() {
            return Ok(Outcome::Moot);
        }
        std::thread::sleep(CONFIGURE_GRACE);
        let Some(driver) = driver() else { return Ok(Outcome::Moot) };
        if self.attached_lately(device)? >= MAX_REATTACHES {
            return Ok(Outcome::Failed(format!(
                "the host's driver {driver} repeatedly takes it from the guest: keep the driver \
                 from binding to it (modprobe.d, udev), then detach and attach the device"
            )));
        }
        // Record that the guest does not have the device. Otherwise, a device that was attached by
        // hand would count as detached by hand.
        let context = self.worker.context()?;
        self.worker.store.confirm(self.instance, others, Witness::Look, &context)?;
        tracing::warn!(
            instance = %self.instance, %device,
            "the host's driver {driver} has taken device {device} from its guest: the agent \
             attaches it again"
        );
        self.detach(alias, device)
    }

    /// Number of times that the instance has received the device in the last [`REATTACH_PERIOD`].
    fn attached_lately(&self, device: DeviceId) -> Result<usize, WorkError> {
        let filter = Filter {
            instance: Some(self.instance),
            device: Some(device),
            limit: 100,
            ..Filter::default()
        };
        let since =
            Timestamp::now().checked_sub(REATTACH_PERIOD).unwrap_or(Timestamp::MIN).to_string();
        let events = self.worker.store.events(&filter)?;
        Ok(events.iter().filter(|event| event.event == "allocated" && event.at > since).count())
    }

    fn redirect(self, n: usize) -> Result<Outcome, WorkError> {
        let Some(guest) = self.guest else { return Ok(Outcome::Moot) };
        let attached =
            match (guest.domain.spice, room(&guest.domain, &[SpeedMask::ANY], Delivery::HotPlug)) {
                (false, _) => Err(Failure::Refused(NO_SPICE.into())),
                (true, Err(why)) => Err(Failure::Refused(why)),
                (true, Ok(_)) => self.worker.hypervisor.attach(self.instance, &redirdev_element(n)),
            };
        match attached {
            Ok(()) => {
                let (domain, instance) = (&guest.domain.name, self.instance);
                tracing::info!(%domain, %instance, "{domain}: redirection {n} attached");
                Ok(Outcome::Done)
            }
            Err(Failure::Refused(why)) => Ok(Outcome::Failed(why)),
            Err(failure) => moot_or_busy(failure),
        }
    }

    /// Whether the instance should still have the device, by its claim or a newer one. A newer
    /// claim by adoption does not count, because it may be a result of this attach.
    fn is_still_wanted(&self, device: DeviceId) -> Result<bool, WorkError> {
        let planned = self.view.claims(self.instance).iter().find(|c| c.device_id == device);
        let claims = self.worker.store.claims_of(self.instance)?;
        Ok(claims.iter().any(|c| {
            let is_same = planned.is_some_and(|planned| planned.id == c.id);
            c.device_id == device && !c.ending && (is_same || !c.by_hand)
        }))
    }

    /// Whether the live XML shows the device now, with its alias.
    fn has(&self, record: &Record) -> Result<bool, WorkError> {
        let Some(running) = self.worker.hypervisor.look(self.instance)? else { return Ok(false) };
        let ours = |h: &&UsbHostdev| h.injected() == Some(record.entry.id);
        Ok(running.domain()?.hostdevs.iter().filter(ours).any(|h| is_device(h, record)))
    }
}

/// Converts failures that are not refusals. libvirt waits half a minute before it reports that it
/// is busy.
fn moot_or_busy(failure: Failure) -> Result<Outcome, WorkError> {
    match failure {
        Failure::Gone => Ok(Outcome::Moot),
        Failure::Hung(why) => Ok(Outcome::Failed(format!("{why}. The agent retries"))),
        Failure::Busy(why) => Ok(Outcome::Failed(format!(
            "libvirt is busy with the guest ({why}): 'virsh domjobinfo' shows the job. The agent \
             retries; if the job hangs, end the guest with 'virsh destroy'"
        ))),
        other => Err(other.into()),
    }
}

/// Verifier for claims of running guests, which checks the free ports of the live domain.
pub struct Live<'a> {
    /// Verifier of the device at a port.
    pub ports: Ports<'a>,
    /// The live domain.
    pub domain: &'a Domain,
}

impl ClaimVerifier for Live<'_> {
    fn verify(&mut self, candidate: &Record) -> Verified {
        self.ports.verify(candidate)
    }

    fn fits(&mut self, chosen: &[Granted]) -> Result<(), String> {
        let there = |record: &Record| self.domain.host_devices().any(|h| is_device(h, record));
        let new: Vec<&Granted> = chosen.iter().filter(|g| !there(&g.device)).collect();
        // A device that the instance holds already may have a stale hostdev, which the agent
        // detaches.
        let first: Vec<&Granted> = new.iter().copied().filter(|g| !g.already).collect();
        refuse_taken_aliases(self.domain, &first).map_err(|why| format!("it {why}"))?;
        let speeds: Vec<SpeedMask> = new.iter().map(|g| port_speeds(&g.device)).collect();
        room(self.domain, &speeds, Delivery::HotPlug).map(drop)
    }
}
