//! The guest and its host, as the store asks about them while it chooses devices.

use std::path::Path;
use std::time::Duration;

use virt_usb_domxml::{Domain, Edits, Fit, Hostdev, UsbHostdev};
use virt_usb_model::{InstanceId, PortPath, Speed};
use virt_usb_store::adopt::Holding;
use virt_usb_store::claim::{Asker, Granted, Judge, Verified};
use virt_usb_store::{Context, Durability, Record, Store, StoreError};

use crate::answer::Answer;
use crate::config::{Config, HoldPolicy};
use crate::machine;
use crate::run::Fault;
use crate::sysfs;

/// How long all waits for the store's lock may last together.
const PATIENCE: Duration = Duration::from_secs(2);

/// Opens the store for one call.
pub(crate) fn open(config: &Config, op: &str, concerned: bool) -> Result<(Store, Context), Fault> {
    let fault = |e: &dyn std::fmt::Display| Fault::of(concerned, e);
    // A quarantine must survive a power cut, as what is held for the instance must.
    let lasts = config.hold == HoldPolicy::Instance || config.whitelist.rules.iter().any(|r| r.one_time_use);
    let durability = if lasts { Durability::Power } else { Durability::Boot };
    let context = machine::context(config, format!("hook {op}")).map_err(|e| fault(&e))?;
    let store = Store::open(&config.state_dir, PATIENCE, durability).map_err(|e| fault(&e))?;
    Ok((store, context))
}

/// For whom devices are claimed.
///
/// # Errors
/// When the inventory cannot be read.
pub fn asker(store: &Store, domain: &Domain, instance: InstanceId) -> Result<Asker, StoreError> {
    store.asker(instance, &domain.name, domain.project.as_ref())
}

/// Looks at ports, nothing else.
pub struct Ports<'a> {
    /// Where sysfs is mounted.
    pub sysfs_root: &'a Path,
}

impl Ports<'_> {
    /// Whether the device is at this port.
    fn verify_at(&self, port: &PortPath, candidate: &Record) -> Verified {
        let entry = &candidate.entry;
        match sysfs::at_port(self.sysfs_root, port) {
            Ok(Some(seen)) if seen.usb == candidate.usb() && seen.serial == entry.serial => {
                Verified::Here(seen.address)
            }
            Ok(Some(seen)) => {
                let serial = seen.serial.map(|s| format!(" serial {s}")).unwrap_or_default();
                Verified::Not(format!("port {port} now holds {}{serial}", seen.usb))
            }
            Ok(None) => Verified::Not(format!("nothing is plugged in at port {port}")),
            Err(e) => Verified::Not(e.to_string()),
        }
    }
}

impl Judge for Ports<'_> {
    /// The recorded port has the bus number of the boot in which it was recorded: where the path is known, the path decides.
    fn verify(&mut self, candidate: &Record) -> Verified {
        let recorded = &candidate.entry.port_path;
        let Some(path) = &candidate.entry.path else { return self.verify_at(recorded, candidate) };
        let mut found = None;
        if sysfs::path_of(self.sysfs_root, recorded).as_ref() == Some(path) {
            found = Some(self.verify_at(recorded, candidate));
        }
        if let Some(here @ Verified::Here(_)) = found {
            return here;
        }
        for port in sysfs::ports_of(self.sysfs_root, path).iter().filter(|port| *port != recorded) {
            match self.verify_at(port, candidate) {
                here @ Verified::Here(_) => return here,
                not @ Verified::Not(_) => found = found.or(Some(not)),
            }
        }
        found.unwrap_or_else(|| {
            Verified::Not(format!(
                "this host has no USB port {path}: its controller is gone or has another place"
            ))
        })
    }
    fn fits(&mut self, _: &[Granted]) -> Result<(), String> {
        Ok(())
    }
}

/// Looks at ports, and at whether the guest can take the devices.
pub(crate) struct Guest<'a> {
    pub(crate) ports: Ports<'a>,
    pub(crate) domain: &'a Domain,
    /// How many redirection devices the flavor asks for.
    pub(crate) redirections: usize,
    /// What is to be changed in the XML: known once [`Judge::fits`] said yes.
    pub(crate) edits: Edits,
}

impl<'a> Guest<'a> {
    pub(crate) fn new(sysfs_root: &'a Path, domain: &'a Domain, redirections: usize) -> Self {
        Self { ports: Ports { sysfs_root }, domain, redirections, edits: Edits::default() }
    }

    /// What has to be injected for these devices and redirections, if the guest can take it.
    pub(crate) fn plan(&mut self, chosen: &[Granted]) -> Result<(), String> {
        self.refuse_strangers(chosen)?;
        let new: Vec<&Granted> = chosen.iter().filter(|g| !self.has(g)).collect();
        let redirdevs = self.missing_redirdevs();
        if let (Some(first), false) = (redirdevs.first(), self.domain.spice) {
            return Err(format!("asks for usb_redirection_devices[{first}], but {NO_SPICE}"));
        }
        let speeds: Vec<Option<Speed>> =
            new.iter().map(|g| g.device.entry.speed).chain(redirdevs.iter().map(|_| None)).collect();
        let devices = new.iter().map(|g| format!("usb_devices[{}]", g.request));
        let mut asked: Vec<String> =
            devices.chain(redirdevs.iter().map(|n| format!("usb_redirection_devices[{n}]"))).collect();
        asked.dedup();
        let controller =
            room(self.domain, &speeds).map_err(|why| format!("asks for {}, but {why}", asked.join(", ")))?;
        let hostdevs = new.iter().map(|g| hostdev(&g.device)).collect();
        self.edits = Edits { hostdevs, redirdevs, controller, ..Edits::default() };
        Ok(())
    }

    /// A hostdev with our alias that is not what this instance was given now would start with a device that may be somebody else's:
    /// libvirt starts the XML as it stands, not as we print it.
    fn refuse_strangers(&self, chosen: &[Granted]) -> Result<(), String> {
        for (id, hostdev) in self.domain.hostdevs.iter().filter_map(|h| Some((h.injected()?, h))) {
            let advice =
                "take that <hostdev> out of the domain (virsh edit): it is written anew for each start";
            let Some(granted) = chosen.iter().find(|g| g.device.entry.id == id) else {
                return Err(format!(
                    "has a <hostdev> for device {id} (alias ua-usb-{id}) in its XML that its flavor does not ask for or that it cannot have: {advice}"
                ));
            };
            if hostdev.address.is_some_and(|a| a != granted.device.entry.address)
                || hostdev.usb.is_some_and(|u| u != granted.device.usb())
            {
                return Err(format!(
                    "has a <hostdev> (alias ua-usb-{id}) in its XML with an address that is no longer that of device {id}, which is now {}: {advice}",
                    granted.device.entry.address
                ));
            }
        }
        Ok(())
    }

    /// Whether the XML holds the device already, injected or written by hand.
    fn has(&self, granted: &Granted) -> bool {
        let device = &granted.device;
        self.domain.hostdevs.iter().any(|h| match h.injected() {
            Some(id) => id == device.entry.id,
            None => {
                h.address == Some(device.entry.address)
                    || (granted.already && h.address.is_none() && h.usb == Some(device.usb()))
            }
        })
    }

    /// See [`missing_redirdevs`].
    pub(crate) fn missing_redirdevs(&self) -> Vec<usize> {
        missing_redirdevs(self.domain, self.redirections)
    }
}

/// Of a flavor's so many redirection entries those for which the XML has none yet. Those that somebody else wrote serve the first entries.
pub fn missing_redirdevs(domain: &Domain, redirections: usize) -> Vec<usize> {
    let spicevmc = || domain.redirdevs.iter().filter(|r| r.kind == "spicevmc");
    let foreign = spicevmc().filter(|r| r.injected().is_none()).count();
    (foreign..redirections).filter(|n| !spicevmc().any(|r| r.injected() == Some(*n))).collect()
}

/// Why a redirection cannot be.
pub const NO_SPICE: &str = "has no SPICE graphics to carry it: add <graphics type='spice'/> to the domain (in Nova: spice enabled on the host), \
                            or take the redirection out of the flavor";

/// A hub that the XML gives to the guest: every device behind it, a root hub's whole bus, would leave the host with it.
pub(crate) fn refuse_hubs(config: &Config, domain: &Domain) -> Option<Answer> {
    if domain.hostdevs.is_empty() {
        return None;
    }
    let hub = sysfs::hub(&config.sysfs_root, |usb, address| {
        domain.hostdevs.iter().filter(|h| h.usb.is_some() || h.address.is_some()).any(|hostdev| {
            hostdev.usb.is_none_or(|u| u == usb) && hostdev.address.is_none_or(|a| a == address)
        })
    })?;
    Some(Answer::refused(format!(
        "{} has a <hostdev> for the USB hub {hub} in its own XML, and all that is plugged in there would leave the host with it. \
         Take the <hostdev> out, and give the guest the devices themselves",
        domain.name
    )))
}

/// Whether the guest has USB ports for devices of these speeds (none: a redirection, or not known); true: with a controller of ours.
///
/// # Errors
/// What it lacks, and what to do.
pub fn room(domain: &Domain, speeds: &[Option<Speed>]) -> Result<bool, String> {
    if speeds.is_empty() {
        return Ok(false);
    }
    match domain.bus.fit(speeds) {
        Fit::Fits => Ok(false),
        Fit::NeedsController => Ok(true),
        Fit::NoUsb => Err("it has no USB bus (<controller type='usb' model='none'/>), and libvirt adds none to it: \
                           remove that controller, or in Nova set hw:usb_model=qemu-xhci on the flavor (image: hw_usb_model=qemu-xhci; before Nova 32: image hw_input_bus=usb)"
            .into()),
        Fit::TooFew { needed, free, speed, .. } => {
            let speed = speed.map(|s| format!(" for a {s}-speed device")).unwrap_or_default();
            Err(format!(
                "it needs {needed} USB port(s) more{speed} and has {free} free: give it <controller type='usb' model='qemu-xhci' ports='15'/> \
                 instead of its USB controller (in Nova: hw:usb_model=qemu-xhci on the flavor, which counts where the image says hw_input_bus=virtio)"
            ))
        }
    }
}

impl Judge for Guest<'_> {
    fn verify(&mut self, candidate: &Record) -> Verified {
        self.ports.verify(candidate)
    }
    fn fits(&mut self, chosen: &[Granted]) -> Result<(), String> {
        self.plan(chosen)
    }
}

/// The source that libvirt is given: vendor, product and address together.
pub const fn hostdev(device: &Record) -> Hostdev {
    Hostdev { id: device.entry.id, usb: device.usb(), address: device.entry.address }
}

/// A hostdev of the XML, as the store looks for it.
pub fn holding(hostdev: &UsbHostdev) -> Holding {
    Holding { id: hostdev.injected(), usb: hostdev.usb, address: hostdev.address }
}
