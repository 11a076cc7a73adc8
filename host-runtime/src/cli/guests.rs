//! The commands `start`, `attach` and `detach`.

use std::process::ExitCode;
use std::sync::Arc;

use anyhow::{Context as _, bail};
use serde::Serialize;
use virt_usb_hook::message;
use virt_usb_model::{DeviceId, InstanceId};
use virt_usb_store::Record;

use super::Session;
use super::arguments::Device;
use crate::agent::operate::{self, Attached};
use crate::agent::work::Worker;
use crate::hypervisor::{Failure, Libvirt, Started};

/// Connects to libvirt, and creates a worker for its guests.
pub(super) fn open(session: &Session) -> anyhow::Result<(Libvirt, Worker)> {
    let config = session.config()?;
    let libvirt = Libvirt::open(&config.libvirt_uri)?;
    let worker =
        Worker::open(Arc::new(config), Arc::new(libvirt.clone()), Arc::default(), "virt-usb")?;
    Ok((libvirt, worker))
}

pub(super) fn find(libvirt: &Libvirt, name: &str) -> anyhow::Result<InstanceId> {
    match libvirt.resolve(name) {
        Err(Failure::Gone) => {
            bail!("libvirt knows no domain {name:?}: 'virsh list --all' shows the known domains")
        }
        found => Ok(found?),
    }
}

#[derive(Serialize)]
struct Begun {
    instance_uuid: InstanceId,
    restored: bool,
    devices: Vec<DeviceId>,
    warnings: Vec<String>,
}

pub(super) fn start(session: &Session, domain: &str) -> anyhow::Result<ExitCode> {
    if session.guests_api()?.is_some() {
        bail!(
            "the agent simulates its guests: start {domain} with 'running = true' in the \
             simulation file"
        );
    }
    let (libvirt, mut worker) = open(session)?;
    let instance = find(&libvirt, domain)?;
    let (started, warnings) = operate::start(&mut worker, &libvirt, instance, domain)
        .with_context(|| format!("cannot start {domain}"))?;
    worker.store.restart_lock_timeout();
    let held = worker.store.claims()?.into_iter().filter(|c| c.instance_uuid == instance);
    let devices = held.map(|c| c.device_id).collect();
    let begun = Begun {
        instance_uuid: instance,
        restored: started == Started::Restored,
        devices,
        warnings,
    };
    session.out.show(&begun, || {
        let how = if begun.restored { "restored" } else { "started" };
        let ids: Vec<String> = begun.devices.iter().map(ToString::to_string).collect();
        let with =
            if ids.is_empty() { String::new() } else { format!(" with device {}", ids.join(", ")) };
        let warnings: String = begun.warnings.iter().map(|w| format!("\n{w}")).collect();
        format!("{domain} {how}{with}{warnings}")
    })?;
    Ok(ExitCode::SUCCESS)
}

#[derive(Serialize)]
struct Given {
    instance_uuid: InstanceId,
    /// Whether the devices are in the guest; if not, it gets them at its next start.
    live: bool,
    devices: Vec<Record>,
}

pub(super) fn attach(session: &Session, wanted: &Device) -> anyhow::Result<ExitCode> {
    let name = &wanted.instance;
    let (instance, Attached { live, new, already }) = match session.guests_api()? {
        Some(api) => {
            let instance = api.server(name)?;
            (instance, api.attach(instance, &wanted.device)?)
        }
        None => {
            let (libvirt, mut worker) = open(session)?;
            let instance = find(&libvirt, name)?;
            (instance, worker.give(instance, std::slice::from_ref(&wanted.device))?)
        }
    };
    let list =
        |records: &[Record]| records.iter().map(message::device).collect::<Vec<_>>().join(", ");
    let text = match (new.is_empty(), already.is_empty()) {
        (false, _) => format!("{name} has {} now", list(&new)),
        (true, false) => format!("{name} has {} already", list(&already)),
        (true, true) => {
            format!("{name} is not running: it gets {} at its next start", wanted.device)
        }
    };
    let devices = new.into_iter().chain(already).collect();
    session.out.show(&Given { instance_uuid: instance, live, devices }, || text)?;
    Ok(ExitCode::SUCCESS)
}

#[derive(Serialize)]
struct Taken {
    instance_uuid: InstanceId,
    device: Option<Record>,
}

pub(super) fn detach(session: &Session, wanted: &Device) -> anyhow::Result<ExitCode> {
    let name = &wanted.instance;
    if wanted.device.count != 1 {
        bail!("one device at a time: omit count");
    }
    let (instance, device) = match session.guests_api()? {
        Some(api) => {
            let instance = api.server(name)?;
            (instance, api.detach(instance, &wanted.device)?)
        }
        None => {
            let (libvirt, mut worker) = open(session)?;
            let instance = match libvirt.resolve(name) {
                // An undefined domain may still hold devices.
                Err(Failure::Gone) => super::claims::find_instance(&worker.store, name)?,
                found => found?,
            };
            let taken = worker.take(instance, std::slice::from_ref(&wanted.device.selector))?;
            (instance, taken.into_iter().flatten().next())
        }
    };
    let taken = Taken { instance_uuid: instance, device };
    session.out.show(&taken, || match &taken.device {
        Some(device) => format!("{} is free", message::device(device)),
        None => format!("{name} no longer gets {}", wanted.device),
    })?;
    Ok(ExitCode::SUCCESS)
}
