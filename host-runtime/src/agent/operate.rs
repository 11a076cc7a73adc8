//! Operations of users: attach a device, detach a device, start a guest with its devices. They work
//! with and without an agent. Each is written to the inventory first, so that the agent can
//! complete it.

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

/// Error of an operation.
#[derive(Debug, thiserror::Error)]
pub enum OperateError {
    /// The operation is refused, for this reason.
    #[error("{0}")]
    Refused(String),
    /// The devices of this host cannot satisfy the requests.
    #[error("{}", message::shortages(claimant, short, usize::MAX, host))]
    Short {
        /// Instance that requested the devices.
        claimant: Claimant,
        /// Each unsatisfied request, with the matching devices.
        short: Vec<Shortage>,
        /// Facts about the host for the message.
        host: message::Host,
    },
    /// The instance has nothing to detach.
    #[error(
        "{0} has no such device and no such assignment: 'virt-usb claims' shows what each \
        instance holds"
    )]
    Nothing(String),
    /// The connection to libvirt was lost during an attach.
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

fn too_many<T>(claimant: &Claimant, e: TooMany) -> Result<T, OperateError> {
    refused(format!("{}: {e}", claimant.domain))
}

/// Result of an attach.
#[derive(Debug, Clone, PartialEq)]
pub struct Attached {
    /// Whether the guest is running and has the devices. Otherwise it gets them at its next start.
    pub live: bool,
    /// Newly attached devices.
    pub new: Vec<Record>,
    /// Devices that the guest already had.
    pub already: Vec<Record>,
}

/// Maximum number of attempts of a detach while the instance receives other devices.
const MAX_DETACH_ATTEMPTS: usize = 8;

/// Assignments and claims of an instance that a detach ends.
#[derive(Default)]
struct Detachment {
    /// Numbers of the assignments that no device serves now.
    assignments: Vec<i64>,
    /// Claims to end.
    claims: Vec<ClaimRow>,
    /// Result for each selector: the device, or `None` if only an assignment ends.
    found: Vec<Option<Record>>,
}

impl Worker {
    /// Attaches the requested devices to a running guest, and assigns them to its instance for each
    /// later start. If the guest is not running, only assigns them. Attaches either all devices or
    /// none.
    ///
    /// # Errors
    /// [`OperateError::Refused`] or [`OperateError::Short`] if the instance cannot have the
    /// devices. Nothing is changed then.
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
            let claimant = self.claimant_of(instance)?;
            let short = self.unsatisfiable(&claimant, &missing)?;
            if !short.is_empty() {
                return Err(self.short(claimant, short));
            }
            self.store
                .assign_more(&claimant, &missing, &context)?
                .or_else(|e| too_many(&claimant, e))?;
            return Ok(Attached { live: false, new: Vec::new(), already });
        };
        let domain = running.domain().map_err(WorkError::from)?;
        let claimant = claimant(&self.store, &domain, instance)?;
        let config = self.config.clone();
        let mut verifier =
            Live { ports: Ports { sysfs_root: &config.sysfs_root }, domain: &domain };
        let (new, already, assigned) =
            match self.store.give(&claimant, requests, &mut verifier, &context)? {
                Given::Granted { new, already, assigned } => (new, already, assigned),
                Given::Short(short) => return Err(self.short(claimant, short)),
                Given::Unfit(why) => return refused(format!("{}: {why}", claimant.domain)),
                Given::TooMany(e) => return too_many(&claimant, e),
            };
        if !new.is_empty()
            && let Err(why) = self.attach_claimed(instance, &claimant, &new)
        {
            // Undo only what was done here: other operators may change this instance at the same
            // time.
            self.store.restart_lock_timeout();
            self.store.dismiss(&claimant, None, &assigned, &new, |_, _| false, &context)?;
            // If this fails, the agent completes it.
            drop(self.finish(instance, &claimant, &new));
            return Err(match why {
                OperateError::Work(WorkError::Hypervisor(
                    e @ (Failure::Away(_) | Failure::Silent(_)),
                )) => OperateError::Unsure(claimant.domain, e),
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

    /// Attaches the devices of new claims to the guest.
    fn attach_claimed(
        &mut self,
        instance: InstanceId,
        claimant: &Claimant,
        new: &[ClaimRow],
    ) -> Result<(), OperateError> {
        let report = self.converge(instance, &ObservedAbsence::default(), &BTreeSet::new())?;
        let claims = self.store.claims_of(instance)?;
        let now = |was: &ClaimRow| claims.iter().find(|c| c.id == was.id);
        if new.iter().all(|was| now(was).is_some_and(|c| c.is_allocated() && !c.ending)) {
            return Ok(());
        }
        let why = match self.obstacle(instance, &report)? {
            Some(why) => why,
            None if new.iter().any(|was| now(was).is_none_or(|c| c.ending)) => {
                "it was detached at the same time".to_owned()
            }
            None => "libvirt is busy with the guest: try again".to_owned(),
        };
        refused(format!("the device cannot be attached to {}: {why}", claimant.domain))
    }

    /// Detaches devices from an instance, and ends their claims and assignments. Each selector must
    /// match one device or assignment. Returns the device for each selector, or `None` if only an
    /// assignment has ended.
    ///
    /// # Errors
    /// [`OperateError::Nothing`] or [`OperateError::Refused`] if a selector matches nothing or
    /// several devices. Nothing is changed then. If a device cannot be detached now, the agent
    /// retries.
    pub fn take(
        &mut self,
        instance: InstanceId,
        selectors: &[Selector],
    ) -> Result<Vec<Option<Record>>, OperateError> {
        self.store.restart_lock_timeout();
        let claimant = self.claimant_of(instance)?;
        let context = self.context()?;
        for _ in 0..MAX_DETACH_ATTEMPTS {
            let held = self.store.claims_of(instance)?;
            let devices = self.store.devices()?;
            let Detachment { assignments, claims, found } =
                self.select(&claimant, selectors, &held, &devices)?;
            let serves = |request: &DeviceRequest, device: DeviceId| {
                devices.iter().any(|r| r.entry.id == device && r.is_selected_by(&request.selector))
            };
            if self.store.dismiss(
                &claimant,
                Some(&held),
                &assignments,
                &claims,
                serves,
                &context,
            )? {
                self.finish(instance, &claimant, &claims)?;
                return Ok(found);
            }
        }
        refused(format!(
            "{} received another device during each attempt: try again",
            claimant.domain
        ))
    }

    /// Finds the assignments and claims that match an operator's selectors.
    fn select(
        &self,
        claimant: &Claimant,
        selectors: &[Selector],
        held: &[ClaimRow],
        devices: &[Record],
    ) -> Result<Detachment, OperateError> {
        let mut assigned = self.operators(claimant.instance)?;
        let mut all = Detachment::default();
        for selector in selectors {
            let taken = |r: &Record| all.found.iter().flatten().any(|f| f.entry.id == r.entry.id);
            let claim = |r: &Record| held.iter().find(|c| c.device_id == r.entry.id);
            let matching = devices.iter().filter(|r| r.is_selected_by(selector) && !taken(r));
            let matching: Vec<(&Record, &ClaimRow)> =
                matching.filter_map(|r| Some((r, claim(r)?))).collect();
            match matching.as_slice() {
                [] => {
                    let stored = self.store.as_stored(selector)?;
                    let is = |a: &Assignment| [selector, &stored].contains(&&a.request.selector);
                    let Some(at) = assigned.iter().position(is) else {
                        return Err(OperateError::Nothing(claimant.domain.clone()));
                    };
                    all.assignments.push(assigned.remove(at).id);
                    all.found.push(None);
                }
                [(record, claim)] => {
                    all.found.push(Some((*record).clone()));
                    all.claims.push((*claim).clone());
                }
                several => {
                    let ids: Vec<String> =
                        several.iter().map(|(r, _)| message::device(r)).collect();
                    return refused(format!(
                        "{} has {} matching devices: name one by its id: {}",
                        claimant.domain,
                        several.len(),
                        ids.join(", ")
                    ));
                }
            }
        }
        Ok(all)
    }

    /// Ends marked claims, as the agent would.
    fn finish(
        &mut self,
        instance: InstanceId,
        claimant: &Claimant,
        marked: &[ClaimRow],
    ) -> Result<(), OperateError> {
        if marked.is_empty() {
            return Ok(());
        }
        let context = self.context()?;
        let report = self.converge(instance, &ObservedAbsence::default(), &BTreeSet::new())?;
        let mut claims = self.store.claims_of(instance)?;
        // A claim that was made again in the meantime stays.
        claims.retain(|c| c.ending && marked.iter().any(|was| was.id == c.id));
        if claims.is_empty() {
            return Ok(());
        }
        if self.hypervisor.look(instance)?.is_some() {
            let why = self.obstacle(instance, &report)?;
            let why = why.unwrap_or_else(|| "libvirt is busy with the guest".to_owned());
            return refused(format!(
                "{} still has the device: {why}; the agent retries",
                claimant.domain
            ));
        }
        if self.hypervisor.process(instance).is_some() {
            return refused(format!(
                "{} still has the device: its QEMU runs on this host, but this libvirt does not \
                 know the guest",
                claimant.domain
            ));
        }
        // The guest is not running, so the claims end without a detach.
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

    /// Returns the requests that no device of the inventory can satisfy, including removed devices.
    /// With them, every start would be refused.
    fn unsatisfiable(
        &self,
        claimant: &Claimant,
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
                    _ if !record.is_for(claimant.project.as_ref()) => Why::Project,
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
    fn claimant_of(&self, instance: InstanceId) -> Result<Claimant, OperateError> {
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

/// Starts a domain with an XML that contains its devices.
///
/// # Errors
/// If the hook or libvirt refuses the start. The domain holds no devices then.
pub fn start(
    worker: &mut Worker,
    libvirt: &Libvirt,
    instance: InstanceId,
    name: &str,
) -> Result<(Started, Vec<String>), OperateError> {
    // A saved image contains hostdevs. The hook's `restore` gives them their current devices.
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
