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
use virt_usb_store::claim::{Asker, Claimed, Standing, Want};
use virt_usb_store::give_back::Extent;
use virt_usb_store::problems::Problem;
use virt_usb_store::{Record, Source, StoreError};

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
pub enum Attached {
    /// It is in the guest.
    Now(Vec<Record>),
    /// The guest does not run: it gets it at its next start.
    AtNextStart,
    /// It had it already.
    Already(Box<Record>),
}

impl Worker {
    /// Gives an instance what the request asks for: into the guest at once where it runs, and at each of its starts. All or nothing.
    ///
    /// # Errors
    /// [`OperateError::Refused`] where it cannot have it; then everything is as it was.
    pub fn give(&mut self, instance: InstanceId, request: &DeviceRequest) -> Result<Attached, OperateError> {
        self.store.restart_patience();
        if let Some(record) = self.has_already(instance, request)? {
            return Ok(Attached::Already(Box::new(record)));
        }
        let context = self.context()?;
        let running = self.hypervisor.look(instance)?;
        let before: Vec<DeviceRequest> = self.operators(instance)?;
        let after: Vec<DeviceRequest> = before.iter().chain([request]).cloned().collect();
        let Some(running) = running else {
            let whom = Asker { instance, domain: self.name(instance)?, project: None };
            self.store.assign(&whom, Source::Operator, &after, &context)?;
            return Ok(Attached::AtNextStart);
        };
        let domain = running.domain().map_err(WorkError::from)?;
        let whom = asker(instance, &domain);
        let held = self.held(instance)?;
        self.store.assign(&whom, Source::Operator, &after, &context)?;
        let undo = |this: &mut Self| -> Result<(), OperateError> {
            this.store.assign(&whom, Source::Operator, &before, &context)?;
            for device in this.held(instance)?.difference(&held) {
                this.take_out(instance, &whom, *device)?;
            }
            Ok(())
        };
        if let Err(why) = self.claim(&domain, &whom, request) {
            undo(self)?;
            return Err(why);
        }
        let new: Vec<DeviceId> = self.held(instance)?.difference(&held).copied().collect();
        let report = self.converge(instance, Gone::default(), &BTreeSet::new())?;
        let claims = self.store.claims_of(instance)?;
        let inside = |id: &DeviceId| claims.iter().any(|c| c.device_id == *id && c.state == "allocated");
        if !new.iter().all(inside) {
            let why = self.obstacle(instance, &report)?;
            let why = why.unwrap_or_else(|| "libvirt is busy with the guest: try again".to_owned());
            undo(self)?;
            self.converge(instance, Gone::default(), &report.failed)?;
            return refused(format!("{} cannot be given it: {why}", domain.name));
        }
        let devices = self.store.devices()?;
        Ok(Attached::Now(devices.into_iter().filter(|r| new.contains(&r.entry.id)).collect()))
    }

    /// Takes a device back from an instance: out of the guest where it runs, out of its assignments, and free for others.
    ///
    /// # Errors
    /// [`OperateError::Refused`] where it has no such device, or several.
    pub fn take(
        &mut self,
        instance: InstanceId,
        selector: &Selector,
    ) -> Result<Option<Record>, OperateError> {
        self.store.restart_patience();
        let held = self.held(instance)?;
        let devices = self.store.devices()?;
        let meant: Vec<&Record> =
            devices.iter().filter(|r| held.contains(&r.entry.id) && selects(selector, r)).collect();
        let name = self.name(instance)?;
        match meant.as_slice() {
            [] => self.unassign(instance, name, selector).map(|()| None),
            [record] => {
                let whom = Asker { instance, domain: name, project: None };
                self.take_out(instance, &whom, record.entry.id)?;
                Ok(Some((*record).clone()))
            }
            several => {
                let ids: Vec<String> = several.iter().map(|r| message::device(r)).collect();
                refused(format!(
                    "{name} has {} of them: name one by its id: {}",
                    several.len(),
                    ids.join(", ")
                ))
            }
        }
    }

    /// An assignment that no device serves now.
    fn unassign(
        &mut self,
        instance: InstanceId,
        name: String,
        selector: &Selector,
    ) -> Result<(), OperateError> {
        let before = self.operators(instance)?;
        let Some(at) = before.iter().position(|r| r.selector == *selector) else {
            return refused(format!(
                "{name} has no such device, and none assigned: 'virt-usb claims' shows who has what"
            ));
        };
        let mut after = before;
        after.remove(at);
        let context = self.context()?;
        let whom = Asker { instance, domain: name, project: None };
        self.store.assign(&whom, Source::Operator, &after, &context)?;
        Ok(())
    }

    /// Marks the claim and finishes it: whoever looks at this instance would.
    fn take_out(&mut self, instance: InstanceId, whom: &Asker, device: DeviceId) -> Result<(), OperateError> {
        let context = self.context()?;
        let record = self.store.devices()?.into_iter().find(|r| r.entry.id == device);
        let serves = |request: &DeviceRequest| record.as_ref().is_some_and(|r| selects(&request.selector, r));
        self.store.dismiss(whom, device, serves, &context)?;
        let report = self.converge(instance, Gone::default(), &BTreeSet::new())?;
        let claim = self.store.claims_of(instance)?.into_iter().find(|c| c.device_id == device);
        match claim {
            None => Ok(()),
            // Its guest does not run: there is nothing to wait for.
            Some(claim) if self.hypervisor.look(instance)?.is_none() => {
                self.store.release_device(instance, device, Some(claim.revision), "detached", &context)?;
                Ok(())
            }
            Some(_) => {
                let why = self.obstacle(instance, &report)?;
                let why = why.unwrap_or_else(|| "libvirt is busy with the guest".to_owned());
                refused(format!("{} still has it: {why}; the agent goes on trying", whom.domain))
            }
        }
    }

    /// What is noted to stand in the way of what has just failed.
    fn obstacle(&self, instance: InstanceId, report: &Report) -> Result<Option<String>, OperateError> {
        let about = |p: &Problem| p.instance_uuid == instance && report.failed.contains(&p.about);
        Ok(self.store.problems()?.into_iter().find(about).map(|p| p.what))
    }

    fn claim(&mut self, domain: &Domain, whom: &Asker, request: &DeviceRequest) -> Result<(), OperateError> {
        let context = self.context()?;
        let wants = [Want { request: request.clone(), lasting: true, by_hand: false }];
        let config = self.config.clone();
        let mut judge = Live { ports: Ports { sysfs_root: &config.sysfs_root }, domain };
        match self.store.claim(whom, &wants, &[], Standing::More, &mut judge, &context)? {
            Claimed::Granted(_) => Ok(()),
            Claimed::Short(short) => refused(message::shortages(whom, &short)),
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

    fn operators(&self, instance: InstanceId) -> Result<Vec<DeviceRequest>, OperateError> {
        let all = self.store.assignments(instance)?;
        Ok(all.into_iter().filter(|a| a.source == Source::Operator).map(|a| a.request).collect())
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
