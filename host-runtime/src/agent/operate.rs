//! What people ask for: give a guest a device, take one back, start a guest with its devices. With an agent or without one: it is all
//! written into the inventory first, and whoever comes by finishes it.

use std::collections::BTreeSet;

use virt_usb_domxml::Domain;
use virt_usb_hook::call::{Call, Caller, Operation};
use virt_usb_hook::config::Config;
use virt_usb_hook::guest::Ports;
use virt_usb_hook::input::Input;
use virt_usb_hook::{message, run};
use virt_usb_model::{Device, DeviceId, DeviceRequest, InstanceId, Selector};
use virt_usb_store::claim::{Asker, Claimed, Shortage, Standing, Want};
use virt_usb_store::give_back::Extent;
use virt_usb_store::problems::Problem;
use virt_usb_store::{Assignment, Record, Source, StoreError};

use super::observe::asker;
use super::plan::Gone;
use super::work::{Live, Report, WorkError, Worker};
use crate::hypervisor::{Failure, Libvirt, Started};

/// What was asked for cannot be.
#[derive(Debug, thiserror::Error)]
pub enum OperateError {
    /// And why.
    #[error("{0}")]
    Refused(String),
    /// Devices of this host cannot serve it.
    #[error("{}", message::shortages(asker, short))]
    Short {
        /// Whoever asked.
        asker: Asker,
        /// Each request that cannot be served, with what there is.
        short: Vec<Shortage>,
    },
    /// There is no such thing to be taken back.
    #[error("{0} has no such device, and none assigned: 'virt-usb claims' shows who has what")]
    Nothing(String),
    /// Something is in the way.
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

/// What came of an attach.
#[derive(Debug, Clone, PartialEq)]
pub struct Attached {
    /// Whether they are in the guest; else it does not run, and gets them at its next start.
    pub live: bool,
    /// Those that it has now and had not before.
    pub new: Vec<Record>,
    /// Those that it had already.
    pub already: Vec<Record>,
}

impl Worker {
    /// Gives an instance what the requests ask for: into the guest at once where it runs, and at each of its starts. All or nothing.
    ///
    /// # Errors
    /// [`OperateError::Refused`], [`OperateError::Short`] where it cannot have them; then everything is as it was.
    pub fn give(
        &mut self,
        instance: InstanceId,
        requests: &[DeviceRequest],
    ) -> Result<Attached, OperateError> {
        self.store.restart_patience();
        let context = self.context()?;
        let running = self.hypervisor.look(instance)?;
        let before = self.operators(instance)?;
        let mut already = Vec::new();
        let mut missing = Vec::new();
        for request in requests {
            match self.has_already(instance, request)? {
                Some(record) => already.push(record),
                // A device is asked for by its id once.
                None if request.selector.id.is_some() && missing.contains(request) => {}
                None if running.is_none()
                    && request.selector.id.is_some()
                    && before.iter().any(|a| a.request == *request) => {}
                None => missing.push(request.clone()),
            }
        }
        let live = running.is_some();
        if missing.is_empty() {
            return Ok(Attached { live, new: Vec::new(), already });
        }
        let Some(running) = running else {
            let whom = Asker { instance, domain: self.name(instance)?, project: None };
            self.store.assign_more(&whom, &missing, &context)?;
            return Ok(Attached { live, new: Vec::new(), already });
        };
        let domain = running.domain().map_err(WorkError::from)?;
        let whom = asker(instance, &domain);
        // Others may do the same for this instance at this moment: what is undone is what was done here.
        let assigned = self.store.assign_more(&whom, &missing, &context)?;
        let new = match self.claim(&domain, &whom, &missing) {
            Ok(new) => new,
            Err(why) => {
                self.store.unassign(&whom, &assigned, &context)?;
                // Somebody else has just given it to this instance.
                for request in &missing {
                    match self.has_already(instance, request)? {
                        Some(record) => already.push(record),
                        None => return Err(why),
                    }
                }
                return Ok(Attached { live, new: Vec::new(), already });
            }
        };
        let report = self.converge(instance, Gone::default(), &BTreeSet::new())?;
        let claims = self.store.claims_of(instance)?;
        let inside = |id: &DeviceId| claims.iter().any(|c| c.device_id == *id && c.state == "allocated");
        if !new.iter().all(inside) {
            let why = self.obstacle(instance, &report)?;
            let why = why.unwrap_or_else(|| "libvirt is busy with the guest: try again".to_owned());
            self.store.unassign(&whom, &assigned, &context)?;
            self.take_out(instance, &whom, &new, |_, _| false)?;
            self.converge(instance, Gone::default(), &report.failed)?;
            return refused(format!("{} cannot be given it: {why}", domain.name));
        }
        let devices = self.store.devices()?;
        let new = devices.into_iter().filter(|r| new.contains(&r.entry.id)).collect();
        Ok(Attached { live, new, already })
    }

    /// Takes devices back from an instance: out of the guest where it runs, out of its assignments, and free for others. Each selector means
    /// one; the answer holds the device, or none where only an assignment has ended.
    ///
    /// # Errors
    /// [`OperateError::Nothing`], [`OperateError::Refused`] where it has no such device, or several: then everything is as it was. Once a
    /// device is to leave the guest it will: where it cannot at once, the agent goes on trying.
    pub fn take(
        &mut self,
        instance: InstanceId,
        selectors: &[Selector],
    ) -> Result<Vec<Option<Record>>, OperateError> {
        self.store.restart_patience();
        let held = self.held(instance)?;
        let devices = self.store.devices()?;
        let name = self.name(instance)?;
        let mut assigned = self.operators(instance)?;
        let (mut ending, mut found) = (Vec::new(), Vec::<Option<Record>>::new());
        for selector in selectors {
            let taken = |r: &Record| found.iter().flatten().any(|f| f.entry.id == r.entry.id);
            let meant: Vec<&Record> = devices
                .iter()
                .filter(|r| held.contains(&r.entry.id) && selects(selector, r) && !taken(r))
                .collect();
            match meant.as_slice() {
                [] => {
                    let Some(at) = assigned.iter().position(|a| a.request.selector == *selector) else {
                        return Err(OperateError::Nothing(name));
                    };
                    ending.push(assigned.remove(at).id);
                    found.push(None);
                }
                [record] => found.push(Some((*record).clone())),
                several => {
                    let ids: Vec<String> = several.iter().map(|r| message::device(r)).collect();
                    return refused(format!(
                        "{name} has {} of them: name one by its id: {}",
                        several.len(),
                        ids.join(", ")
                    ));
                }
            }
        }
        let whom = Asker { instance, domain: name, project: None };
        let context = self.context()?;
        self.store.unassign(&whom, &ending, &context)?;
        let leaving: Vec<DeviceId> = found.iter().flatten().map(|r| r.entry.id).collect();
        self.take_out(instance, &whom, &leaving, |request, record| selects(&request.selector, record))?;
        Ok(found)
    }

    /// Marks the claims and finishes them: whoever looks at this instance would. With each an assignment ends that `serves` says would be served by
    /// its device.
    fn take_out(
        &mut self,
        instance: InstanceId,
        whom: &Asker,
        devices: &[DeviceId],
        serves: impl Fn(&DeviceRequest, &Record) -> bool,
    ) -> Result<(), OperateError> {
        if devices.is_empty() {
            return Ok(());
        }
        let context = self.context()?;
        let records = self.store.devices()?;
        for device in devices {
            let record = records.iter().find(|r| r.entry.id == *device);
            let serves = |request: &DeviceRequest| record.is_some_and(|record| serves(request, record));
            self.store.dismiss(whom, *device, serves, &context)?;
        }
        let report = self.converge(instance, Gone::default(), &BTreeSet::new())?;
        let mut claims = self.store.claims_of(instance)?;
        claims.retain(|c| devices.contains(&c.device_id));
        if claims.is_empty() {
            return Ok(());
        }
        if self.hypervisor.look(instance)?.is_some() {
            let why = self.obstacle(instance, &report)?;
            let why = why.unwrap_or_else(|| "libvirt is busy with the guest".to_owned());
            return refused(format!("{} still has it: {why}; the agent goes on trying", whom.domain));
        }
        // Its guest does not run: there is nothing to wait for.
        for claim in claims {
            let (device, revision) = (claim.device_id, claim.revision);
            self.store.release_device(instance, device, Some(revision), "detached", &context)?;
        }
        Ok(())
    }

    /// What is noted to stand in the way of what has just failed.
    fn obstacle(&self, instance: InstanceId, report: &Report) -> Result<Option<String>, OperateError> {
        let about = |p: &Problem| p.instance_uuid == instance && report.failed.contains(&p.about);
        Ok(self.store.problems()?.into_iter().find(about).map(|p| p.what))
    }

    /// Claims what is asked for, all or nothing; returns what it has got.
    fn claim(
        &mut self,
        domain: &Domain,
        whom: &Asker,
        requests: &[DeviceRequest],
    ) -> Result<Vec<DeviceId>, OperateError> {
        let context = self.context()?;
        let want = |request: &DeviceRequest| Want { request: request.clone(), lasting: true, by_hand: false };
        let wants: Vec<Want> = requests.iter().map(want).collect();
        let config = self.config.clone();
        let mut judge = Live { ports: Ports { sysfs_root: &config.sysfs_root }, domain };
        match self.store.claim(whom, &wants, &[], Standing::More, &mut judge, &context)? {
            Claimed::Granted(granted) => Ok(granted.iter().map(|g| g.device.entry.id).collect()),
            Claimed::Short(short) => Err(OperateError::Short { asker: whom.clone(), short }),
            Claimed::Unfit(why) => refused(format!("{}: {why}", whom.domain)),
        }
    }

    /// A device that is asked for by its id, and that the instance has.
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

    fn held(&self, instance: InstanceId) -> Result<BTreeSet<DeviceId>, OperateError> {
        Ok(self.store.claims_of(instance)?.iter().map(|c| c.device_id).collect())
    }

    /// As its domain is called, or was when it claimed.
    fn name(&self, instance: InstanceId) -> Result<String, OperateError> {
        if let Some(running) = self.hypervisor.look(instance)? {
            return Ok(running.name);
        }
        let claim = self.store.claims_of(instance)?.into_iter().next();
        Ok(claim.map_or_else(|| instance.to_string(), |c| c.domain))
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
        caller: Caller::Starter,
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
            // Where libvirt has refused before it called the hook nobody else gives it back; a guest that runs after all keeps it.
            if libvirt.definition(instance).is_ok() {
                let context = worker.context()?;
                worker.store.restart_patience();
                worker.store.release(instance, Extent::Run, "it did not start", &context)?;
            }
            Err(WorkError::from(why).into())
        }
    }
}

/// Whether the selector means the device.
pub(crate) fn selects(selector: &Selector, record: &Record) -> bool {
    let entry = &record.entry;
    let device = Device {
        key: record.key(),
        address: entry.address,
        class: entry.class,
        interfaces: entry.interface_classes.clone(),
        speed: entry.speed,
        manufacturer: None,
        product: None,
        driver: None,
        host_use: None,
        descriptors: None,
    };
    selector.matches(entry.id, &device, &entry.tags)
}
