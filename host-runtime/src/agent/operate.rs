//! Operations of users: attach a device, detach one, start a guest with its devices, with or
//! without an agent. Each is written to the inventory first, so the agent can complete it.

use std::collections::BTreeSet;

use virt_usb_config::Config;
use virt_usb_hook::call::{Call, HookCaller, Operation};
use virt_usb_hook::input::Input;
use virt_usb_hook::verify::{Ports, claimant};
use virt_usb_hook::{message, run};
use virt_usb_model::{DeviceId, DeviceRequest, InstanceId, Selector, UnavailableReason};
use virt_usb_store::claim::{Claimant, Obstacle, SHOWN, Shortage, Why};
use virt_usb_store::problems::Problem;
use virt_usb_store::release::Extent;
use virt_usb_store::{Assignment, ClaimRow, Given, Record, Source, StoreError, TooMany};

use super::work::{Live, ObservedAbsence, Report, WorkError, Worker};
use crate::hypervisor::{Failure, Libvirt, Started};

/// An operation that could not be carried out.
#[derive(Debug, thiserror::Error)]
pub enum OperateError {
    /// The operation is refused, for this reason.
    #[error("{0}")]
    Refused(String),
    /// Devices of this host cannot serve it.
    #[error("{}", message::shortages(claimant, short, usize::MAX, host))]
    Short {
        /// Instance that requested the devices.
        claimant: Claimant,
        /// Each request that cannot be served, with what there is.
        short: Vec<Shortage>,
        /// Facts about the host for the message.
        host: message::Host,
    },
    /// There is no such thing to be taken back.
    #[error(
        "{0} has no such device and no such assignment: 'virt-usb claims' shows what each \
        instance holds"
    )]
    Nothing(String),
    /// libvirt was lost while it attached a device.
    #[error(
        "the device may or may not be attached to {0}, because {1}: it is detached once libvirt \
         answers again"
    )]
    Unsure(String, Failure),
    /// Work on the guest failed.
    #[error(transparent)]
    Work(#[from] WorkError),
}

impl From<StoreError> for OperateError {
    fn from(e: StoreError) -> Self {
        Self::Work(e.into())
    }
}

impl From<Failure> for OperateError {
    fn from(e: Failure) -> Self {
        Self::Work(e.into())
    }
}

fn refused<T>(why: impl Into<String>) -> Result<T, OperateError> {
    Err(OperateError::Refused(why.into()))
}

fn too_many<T>(whom: &Claimant, e: TooMany) -> Result<T, OperateError> {
    refused(format!("{}: {e}", whom.domain))
}

/// Result of an attach.
#[derive(Debug, Clone, PartialEq)]
pub struct Attached {
    /// Whether they are in the guest; else it does not run, and gets them at its next start.
    pub live: bool,
    /// Devices that the guest has newly.
    pub new: Vec<Record>,
    /// Devices that the guest already had.
    pub already: Vec<Record>,
}

/// Maximum number of times that a detach is decided again because the instance was given more
/// devices in the meantime.
const TRIES: usize = 8;

/// Assignments and claims of an instance to take back.
#[derive(Default)]
struct Meant {
    /// Assignments that no device serves now, by their numbers.
    ending: Vec<i64>,
    /// Claims to end.
    leaving: Vec<ClaimRow>,
    /// One answer a selector: the device, or none where only an assignment ends.
    found: Vec<Option<Record>>,
}

impl Worker {
    /// Gives an instance what the requests ask for: into the guest at once where it runs, and at
    /// each of its starts. All or nothing.
    ///
    /// # Errors
    /// [`OperateError::Refused`], [`OperateError::Short`] where it cannot have them; then
    /// everything is as it was.
    pub fn give(
        &mut self,
        instance: InstanceId,
        requests: &[DeviceRequest],
    ) -> Result<Attached, OperateError> {
        self.store.restart_lock_timeout();
        let context = self.context()?;
        let Some(running) = self.hypervisor.look(instance)? else {
            let mut already = Vec::new();
            let mut missing = Vec::new();
            for request in requests {
                match self.has_already(instance, request)? {
                    Some(record) => already.push(record),
                    None => missing.push(request.clone()),
                }
            }
            let whom = self.whom(instance)?;
            let short = self.hopeless(&whom, &missing)?;
            if !short.is_empty() {
                return Err(self.short(whom, short));
            }
            self.store.assign_more(&whom, &missing, &context)?.or_else(|e| too_many(&whom, e))?;
            return Ok(Attached { live: false, new: Vec::new(), already });
        };
        let domain = running.domain().map_err(WorkError::from)?;
        let whom = claimant(&self.store, &domain, instance)?;
        let config = self.config.clone();
        let mut verifier =
            Live { ports: Ports { sysfs_root: &config.sysfs_root }, domain: &domain };
        let (new, already, assigned) =
            match self.store.give(&whom, requests, &mut verifier, &context)? {
                Given::Granted { new, already, assigned } => (new, already, assigned),
                Given::Short(short) => return Err(self.short(whom, short)),
                Given::Unfit(why) => return refused(format!("{}: {why}", whom.domain)),
                Given::TooMany(e) => return too_many(&whom, e),
            };
        if !new.is_empty()
            && let Err(why) = self.bring(instance, &whom, &new)
        {
            // Others may do the same for this instance at this moment: what is undone is what was
            // done here.
            self.store.restart_lock_timeout();
            self.store.dismiss(&whom, None, &assigned, &new, |_, _| false, &context)?;
            // What cannot be finished here the agent finishes.
            drop(self.finish(instance, &whom, &new));
            return Err(match why {
                OperateError::Work(WorkError::Hypervisor(
                    e @ (Failure::Away(_) | Failure::Silent(_)),
                )) => OperateError::Unsure(whom.domain, e),
                why => why,
            });
        }
        let devices = self.store.devices()?;
        let of = |ids: &[DeviceId]| {
            devices.iter().filter(|r| ids.contains(&r.entry.id)).cloned().collect()
        };
        let new: Vec<DeviceId> = new.iter().map(|c| c.device_id).collect();
        Ok(Attached { live: true, new: of(&new), already: of(&already) })
    }

    /// Brings what was claimed into the guest.
    fn bring(
        &mut self,
        instance: InstanceId,
        whom: &Claimant,
        new: &[ClaimRow],
    ) -> Result<(), OperateError> {
        let report = self.converge(instance, &ObservedAbsence::default(), &BTreeSet::new())?;
        let claims = self.store.claims_of(instance)?;
        let now = |was: &ClaimRow| claims.iter().find(|c| c.id == was.id);
        if new.iter().all(|was| now(was).is_some_and(|c| c.state == "allocated" && !c.ending)) {
            return Ok(());
        }
        let why = match self.obstacle(instance, &report)? {
            Some(why) => why,
            None if new.iter().any(|was| now(was).is_none_or(|c| c.ending)) => {
                "it was detached at the same time".to_owned()
            }
            None => "libvirt is busy with the guest: try again".to_owned(),
        };
        refused(format!("the device cannot be attached to {}: {why}", whom.domain))
    }

    /// Takes devices back from an instance: out of the guest where it runs, out of its assignments,
    /// and free for others. Each selector means one; the answer holds the device, or none where
    /// only an assignment has ended.
    ///
    /// # Errors
    /// [`OperateError::Nothing`], [`OperateError::Refused`] where it has no such device, or
    /// several: then everything is as it was. Once a device is to leave the guest it will: where it
    /// cannot at once, the agent retries.
    pub fn take(
        &mut self,
        instance: InstanceId,
        selectors: &[Selector],
    ) -> Result<Vec<Option<Record>>, OperateError> {
        self.store.restart_lock_timeout();
        let whom = self.whom(instance)?;
        let context = self.context()?;
        for _ in 0..TRIES {
            let held = self.store.claims_of(instance)?;
            let devices = self.store.devices()?;
            let Meant { ending, leaving, found } = self.meant(&whom, selectors, &held, &devices)?;
            let serves = |request: &DeviceRequest, device: DeviceId| {
                devices.iter().any(|r| r.entry.id == device && r.is_selected_by(&request.selector))
            };
            if self.store.dismiss(&whom, Some(&held), &ending, &leaving, serves, &context)? {
                self.finish(instance, &whom, &leaving)?;
                return Ok(found);
            }
        }
        refused(format!("{} received another device during each attempt: try again", whom.domain))
    }

    /// The assignments and claims that an operator's selectors name.
    fn meant(
        &self,
        whom: &Claimant,
        selectors: &[Selector],
        held: &[ClaimRow],
        devices: &[Record],
    ) -> Result<Meant, OperateError> {
        let mut assigned = self.operators(whom.instance)?;
        let mut all = Meant::default();
        for selector in selectors {
            let taken = |r: &Record| all.found.iter().flatten().any(|f| f.entry.id == r.entry.id);
            let claim = |r: &Record| held.iter().find(|c| c.device_id == r.entry.id);
            let meant = devices.iter().filter(|r| r.is_selected_by(selector) && !taken(r));
            let meant: Vec<(&Record, &ClaimRow)> =
                meant.filter_map(|r| Some((r, claim(r)?))).collect();
            match meant.as_slice() {
                [] => {
                    let stored = self.store.as_stored(selector)?;
                    let is = |a: &Assignment| [selector, &stored].contains(&&a.request.selector);
                    let Some(at) = assigned.iter().position(is) else {
                        return Err(OperateError::Nothing(whom.domain.clone()));
                    };
                    all.ending.push(assigned.remove(at).id);
                    all.found.push(None);
                }
                [(record, claim)] => {
                    all.found.push(Some((*record).clone()));
                    all.leaving.push((*claim).clone());
                }
                several => {
                    let ids: Vec<String> =
                        several.iter().map(|(r, _)| message::device(r)).collect();
                    return refused(format!(
                        "{} has {} matching devices: name one by its id: {}",
                        whom.domain,
                        several.len(),
                        ids.join(", ")
                    ));
                }
            }
        }
        Ok(all)
    }

    /// Completes claims that were marked, as the agent would.
    fn finish(
        &mut self,
        instance: InstanceId,
        whom: &Claimant,
        leaving: &[ClaimRow],
    ) -> Result<(), OperateError> {
        if leaving.is_empty() {
            return Ok(());
        }
        let context = self.context()?;
        let report = self.converge(instance, &ObservedAbsence::default(), &BTreeSet::new())?;
        let mut claims = self.store.claims_of(instance)?;
        // A claim that was made again in the meantime stays.
        claims.retain(|c| c.ending && leaving.iter().any(|was| was.id == c.id));
        if claims.is_empty() {
            return Ok(());
        }
        if self.hypervisor.look(instance)?.is_some() {
            let why = self.obstacle(instance, &report)?;
            let why = why.unwrap_or_else(|| "libvirt is busy with the guest".to_owned());
            return refused(format!(
                "{} still has the device: {why}; the agent retries",
                whom.domain
            ));
        }
        if self.hypervisor.process(instance).is_some() {
            return refused(format!(
                "{} still has the device: its QEMU runs on this host, but this libvirt does not \
                 know the guest",
                whom.domain
            ));
        }
        // Its guest does not run: there is nothing to wait for.
        for claim in claims {
            let (device, revision) = (claim.device_id, claim.revision);
            self.store.release_device(instance, device, Some(revision), "detached", &context)?;
        }
        Ok(())
    }

    /// The recorded problem that explains the failure.
    fn obstacle(
        &self,
        instance: InstanceId,
        report: &Report,
    ) -> Result<Option<String>, OperateError> {
        let about = |p: &Problem| p.instance_uuid == instance && report.failed.contains(&p.about);
        Ok(self.store.problems()?.into_iter().find(about).map(|p| p.what))
    }

    fn short(&self, claimant: Claimant, short: Vec<Shortage>) -> OperateError {
        let host = message::Host::of(&self.config, &self.store, &short);
        OperateError::Short { claimant, short, host }
    }

    /// Requests that no device ever seen on this host could serve: a start would always be refused.
    fn hopeless(
        &self,
        whom: &Claimant,
        requests: &[DeviceRequest],
    ) -> Result<Vec<Shortage>, OperateError> {
        let all = self.store.all_devices()?;
        let mut short = Vec::new();
        for (number, request) in requests.iter().enumerate() {
            let matching: Vec<&Record> =
                all.iter().filter(|r| r.is_selected_by(&request.selector)).collect();
            let obstacle = |record: &&Record| {
                let why = match record.rule_withheld {
                    Some(UnavailableReason::Whitelist) => Why::Unavailable,
                    _ if !record.is_for(whom.project.as_ref()) => Why::Project,
                    _ => return None,
                };
                Some(Obstacle { device: (*record).clone(), why })
            };
            let obstacles: Vec<Obstacle> = matching.iter().filter_map(obstacle).collect();
            let (total, got) = (matching.len(), matching.len() - obstacles.len());
            if got < request.count as usize {
                let matching = obstacles.into_iter().take(SHOWN).collect();
                let got = u32::try_from(got).unwrap_or(u32::MAX);
                short.push(Shortage { number, request: request.clone(), got, matching, total });
            }
        }
        Ok(short)
    }

    /// A device that is requested by its id and that the instance already has.
    fn has_already(
        &self,
        instance: InstanceId,
        request: &DeviceRequest,
    ) -> Result<Option<Record>, OperateError> {
        let Some(id) = request.selector.id.filter(|_| request.count == 1) else { return Ok(None) };
        let mine = |r: &Record| r.entry.id == id && r.entry.instance_uuid == Some(instance);
        Ok(self.store.devices()?.into_iter().find(mine))
    }

    fn operators(&self, instance: InstanceId) -> Result<Vec<Assignment>, OperateError> {
        let mut all = self.store.assignments(instance)?;
        all.retain(|a| a.source == Source::Operator);
        Ok(all)
    }

    /// Name and owner of the instance, from its domain or its claims.
    fn whom(&self, instance: InstanceId) -> Result<Claimant, OperateError> {
        if let Some(xml) = self.hypervisor.xml(instance)? {
            let domain = virt_usb_domxml::read(xml.as_bytes()).map_err(WorkError::from)?;
            return Ok(claimant(&self.store, &domain, instance)?);
        }
        let claims = self.store.claims_of(instance)?;
        match claims.first() {
            Some(claim) => Ok(claim.claimant()),
            None => Ok(self.store.claimant(instance, &instance.to_string(), None)?),
        }
    }
}

/// Starts a domain with its devices in the XML that starts it.
///
/// # Errors
/// The hook's words, or libvirt's; then nothing is held for it.
pub fn start(
    worker: &mut Worker,
    libvirt: &Libvirt,
    instance: InstanceId,
    name: &str,
) -> Result<(Started, Vec<String>), OperateError> {
    // Its image holds its devices: the hook's restore filter gives it those of now.
    if libvirt.is_saved(instance)? {
        let started = libvirt.start(instance, None)?;
        return Ok((started, Vec::new()));
    }
    let definition = libvirt.definition(instance)?;
    let call = Call {
        config: None,
        name: name.to_owned(),
        op: "prepare".to_owned(),
        operation: Operation::Gate,
        caller: HookCaller::Starter,
    };
    let config = Config::clone(&worker.config);
    let answer = run::handle_with(Ok(config), &call, Input::Xml(definition.into_bytes())).answer;
    if let Some(why) = answer.refusal {
        return refused(why);
    }
    let xml = answer
        .xml
        .map(String::from_utf8)
        .transpose()
        .map_err(|e| OperateError::Refused(format!("cannot read the domain's XML: {e}")))?;
    match libvirt.start(instance, xml.as_deref()) {
        Ok(started) => Ok((started, answer.warnings)),
        Err(why) => {
            // If libvirt refused before it called the hook, no other program releases the claims; a
            // guest that runs anyway keeps its devices.
            if libvirt.definition(instance).is_ok() {
                let context = worker.context()?;
                worker.store.restart_lock_timeout();
                worker.store.release(instance, Extent::Run, "it did not start", &context)?;
            }
            Err(WorkError::from(why).into())
        }
    }
}
