//! Verifies candidates for the store while it allocates devices: whether a device is at its port,
//! and whether the guest has ports for it.

use std::iter::repeat;
use std::path::Path;
use std::time::Duration;

use virt_usb_config::Config;
use virt_usb_config::host_env;
use virt_usb_config::sysfs;
use virt_usb_domxml::{
    AssignedPort, Domain, Edits, Fit, GuestPort, Hostdev, TooFew, UsbBus, UsbHostdev,
};
use virt_usb_model::{Class, DeviceId, InstanceId, PortPath, Speed, SpeedMask};
use virt_usb_store::adopt::Holding;
use virt_usb_store::claim::{ClaimVerifier, Claimant, Granted, Verified};
use virt_usb_store::{Context, Durability, Location, Record, Store, StoreError};

use crate::answer::Answer;
use crate::call::HookCaller;
use crate::job::HookError;

/// Timeout for the store's lock, for all waits of a call together.
const STORE_LOCK_TIMEOUT: Duration = Duration::from_secs(2);

/// Opens the store for one call of the hook.
pub(crate) fn open(
    config: &Config,
    op: &str,
    concerned: bool,
) -> Result<(Store, Context), HookError> {
    let error = |e: &dyn std::fmt::Display| HookError::of(concerned, e);
    let context = host_env::context(config, format!("hook {op}")).map_err(|e| error(&e))?;
    let store = Store::open_for_call(&config.state_dir, STORE_LOCK_TIMEOUT, Durability::Boot)
        .map_err(|e| error(&e))?;
    Ok((store, context))
}

/// Returns the instance and owner for which devices are claimed.
///
/// # Errors
/// If the inventory cannot be read.
pub fn claimant(
    store: &Store,
    domain: &Domain,
    instance: InstanceId,
) -> Result<Claimant, StoreError> {
    store.claimant(instance, &domain.name, domain.project.as_ref())
}

/// Verifier of the device at a port. It accepts every device for the guest.
pub struct Ports<'a> {
    /// Mount point of sysfs.
    pub sysfs_root: &'a Path,
}

impl Ports<'_> {
    /// Checks whether the device is at this port.
    fn verify_at(&self, port: &PortPath, candidate: &Record) -> Verified {
        let entry = &candidate.entry;
        match sysfs::at_port(self.sysfs_root, port) {
            Ok(Some(seen)) if seen.usb == candidate.usb() && seen.serial == entry.serial => {
                Verified::Here(Location { port: port.clone(), address: seen.address })
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

impl ClaimVerifier for Ports<'_> {
    /// Checks whether the device is at its port. The recorded port contains the bus number of an
    /// earlier boot, which may have changed, so a known path takes precedence.
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
                "this host has no USB port {path}: its controller was removed or moved"
            ))
        })
    }
    fn fits(&mut self, _: &[Granted]) -> Result<(), String> {
        Ok(())
    }
}

/// Verifier of the device at a port and of the guest's ports.
pub(crate) struct Guest<'a> {
    pub(crate) ports: Ports<'a>,
    pub(crate) domain: &'a Domain,
    /// Number of redirection devices that the flavor requests.
    pub(crate) redirections: usize,
    /// Devices in the domain's own XML.
    pub(crate) inside: &'a [DeviceId],
    /// Way in which the guest gets the devices.
    delivery: Delivery,
    /// Edits of the XML, set by [`ClaimVerifier::fits`].
    pub(crate) edits: Edits,
    /// Warnings about slow devices, set together with the edits.
    pub(crate) warnings: Vec<String>,
}

impl<'a> Guest<'a> {
    pub(crate) fn new(
        sysfs_root: &'a Path,
        domain: &'a Domain,
        redirections: usize,
        inside: &'a [DeviceId],
        caller: HookCaller,
    ) -> Self {
        let delivery = Delivery::of(caller);
        let (edits, warnings) = (Edits::default(), Vec::new());
        Self {
            ports: Ports { sysfs_root },
            domain,
            redirections,
            inside,
            delivery,
            edits,
            warnings,
        }
    }

    /// Plans the elements to inject for these devices and redirections, or explains why the guest
    /// cannot take them.
    pub(crate) fn plan(&mut self, chosen: &[Granted]) -> Result<(), String> {
        let has = |g: &&Granted| self.inside.contains(&g.device.entry.id);
        let new: Vec<&Granted> = chosen.iter().filter(|g| !has(g)).collect();
        refuse_taken_aliases(self.domain, &new)?;
        let redirdevs = self.missing_redirdevs();
        if let (Some(first), false) = (redirdevs.first(), self.domain.spice) {
            return Err(format!("asks for usb_redirection_devices[{first}], but {NO_SPICE}"));
        }
        let speeds: Vec<SpeedMask> = new
            .iter()
            .map(|g| port_speeds(&g.device))
            .chain(redirdevs.iter().map(|_| SpeedMask::ANY))
            .collect();
        let devices = new.iter().map(|g| format!("usb_devices[{}]", g.request));
        let mut requests: Vec<String> = devices
            .chain(redirdevs.iter().map(|n| format!("usb_redirection_devices[{n}]")))
            .collect();
        requests.dedup();
        let controller = room(self.domain, &speeds, self.delivery)
            .map_err(|why| format!("asks for {}, but {why}", requests.join(", ")))?;
        let places = if controller { Vec::new() } else { self.domain.bus.place(&speeds) };
        let devices =
            || new.iter().map(|g| &g.device).zip(places.iter().map(Some).chain(repeat(None)));
        self.warnings =
            devices().filter_map(|(device, at)| slowed(self.domain, device, at?)).collect();
        let hostdevs =
            devices().map(|(device, at)| hostdev(device, at.and_then(|at| at.port))).collect();
        self.edits = Edits { hostdevs, redirdevs, controller, ..Edits::default() };
        Ok(())
    }

    /// Indices of the missing redirections: see [`missing_redirdevs`].
    pub(crate) fn missing_redirdevs(&self) -> Vec<usize> {
        missing_redirdevs(self.domain, self.redirections)
    }
}

/// Refuses a domain in which a hostdev has the alias of one of the new devices but names another
/// device. An alias is unique in a domain.
///
/// # Errors
/// A message that names the device, and what to do.
pub fn refuse_taken_aliases(domain: &Domain, new: &[&Granted]) -> Result<(), String> {
    let taken =
        |g: &&&Granted| domain.hostdevs.iter().any(|h| h.injected() == Some(g.device.entry.id));
    let Some(Granted { device, .. }) = new.iter().find(taken) else { return Ok(()) };
    let (id, address) = (device.entry.id, device.entry.address);
    Err(format!(
        "has a <hostdev> (alias ua-usb-{id}) in its XML with an address that is not that of \
         device {id}, which is {address}, and virt-usb needs that alias: remove that <hostdev> \
         ('virsh edit', or 'virsh detach-device' for a running guest), or change its alias"
    ))
}

/// Indices of the flavor's redirection entries that the XML does not contain yet. Redirections that
/// the domain already has serve the first entries.
pub fn missing_redirdevs(domain: &Domain, redirections: usize) -> Vec<usize> {
    let spicevmc = || domain.redirdevs.iter().filter(|r| r.kind == "spicevmc");
    let foreign = spicevmc().filter(|r| r.injected().is_none()).count();
    (foreign..redirections).filter(|n| !spicevmc().any(|r| r.injected() == Some(*n))).collect()
}

/// Reason why a domain without SPICE cannot have a redirection.
pub const NO_SPICE: &str = "has no SPICE graphics to carry it: add <graphics type='spice'/> to \
    the domain (in Nova: spice enabled on the host), or remove the redirection from the flavor";

/// Refuses a domain whose XML contains a hub. The guest would get every device behind the hub, and
/// with a root hub the whole bus.
pub(crate) fn refuse_hubs(config: &Config, domain: &Domain) -> Option<Answer> {
    if !domain.has_host_devices() {
        return None;
    }
    let hub = sysfs::hub(&config.sysfs_root, |name, usb, address| {
        domain.host_devices().filter(|h| h.names_a_device()).any(|hostdev| {
            hostdev.usb.is_none_or(|u| u == usb)
                && hostdev.address.is_none_or(|a| a == address)
                && hostdev.port.as_ref().is_none_or(|p| p.to_string() == name)
        })
    })?;
    Some(Answer::refused(format!(
        "{} has a <hostdev> for the USB hub {hub} in its own XML, and every device behind that \
         hub would be detached from the host. Remove the <hostdev>, and pass through the devices \
         themselves",
        domain.name
    )))
}

/// Way in which a guest gets its devices.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Delivery {
    /// Either the caller starts the printed XML, or the agent attaches the devices later. The hook
    /// cannot know whether libvirt uses the printed XML; at a start it does not.
    Unknown,
    /// The caller starts the printed XML, which may contain a controller that the hook has added.
    Printed,
    /// The guest is running, so libvirt adds no controller.
    HotPlug,
}

impl Delivery {
    const fn of(caller: HookCaller) -> Self {
        match caller {
            HookCaller::Starter => Self::Printed,
            HookCaller::Process | HookCaller::Simulation => Self::Unknown,
        }
    }
}

/// Speeds of the guest ports to which QEMU can attach the device.
pub fn port_speeds(device: &Record) -> SpeedMask {
    SpeedMask::of(device.entry.speed, device.descriptors.as_ref())
}

/// Checks that the guest has USB ports for devices of these speeds. Returns whether a controller
/// must be added to the printed XML.
///
/// # Errors
/// A message that says what is missing, and what to do.
pub fn room(domain: &Domain, speeds: &[SpeedMask], delivery: Delivery) -> Result<bool, String> {
    let (bus, name) = (&domain.bus, &domain.name);
    match (bus.fit(speeds), delivery) {
        (Fit::Fits, _) => Ok(false),
        // libvirt adds its default controller before it calls the hook. A caller whose XML has none
        // uses the printed XML.
        (Fit::NeedsController, Delivery::Unknown | Delivery::Printed) => Ok(true),
        (Fit::NoController, Delivery::Printed) => Ok(true),
        (Fit::NeedsController, Delivery::HotPlug)
        | (Fit::NoController, Delivery::Unknown | Delivery::HotPlug) => Err(format!(
            "it has no USB controller, and libvirt adds none to a running guest: add {XHCI} to \
             the domain ('virsh edit {name}'), or start it with 'virt-usb start {name}', which \
             adds it"
        )),
        (Fit::NoUsb, _) => Err(format!(
            "it has no USB bus (<controller type='usb' model='none'/>), and libvirt adds none to \
             it: replace that controller with {XHCI}, or in Nova set hw:usb_model=qemu-xhci on \
             the flavor (image: hw_usb_model=qemu-xhci; before Nova 32: image hw_input_bus=usb)"
        )),
        (Fit::NoPci, _) => Err(format!(
            "its machine ({}) has no PCI bus, which a USB controller needs: define it with another \
                machine type (pc or q35 on x86, virt elsewhere)",
            bus.machine()
        )),
        (Fit::TooFew(few), _) => Err(too_few(bus, few)),
    }
}

/// Element of a controller for devices of every speed, for messages.
const XHCI: &str = "<controller type='usb' model='qemu-xhci' ports='15'/>";

/// Explains how many ports are missing, and how to add them.
fn too_few(bus: &UsbBus, few: TooFew) -> String {
    let are = |count: usize| if count == 1 { "is" } else { "are" };
    let ports = if few.needed == 1 { "port" } else { "ports" };
    let speed = few.speed.map(|s| format!(" for {s}-speed devices")).unwrap_or_default();
    let TooFew { needed, free, .. } = few;
    let advice = if !bus.has_controller() {
        format!("declare more than one controller {XHCI} in the domain")
    } else if bus.spare_xhci_ports() >= needed - free {
        "set ports='15' on its qemu-xhci controller".to_owned()
    } else if bus.has_xhci() {
        format!(
            "add a second controller, <controller type='usb' index='{}' model='qemu-xhci' \
             ports='15'/>",
            bus.next_index()
        )
    } else {
        format!(
            "replace its USB controller with {XHCI} (in Nova: hw:usb_model=qemu-xhci on the \
             flavor, which takes effect if the image has hw_input_bus=virtio)"
        )
    };
    format!(
        "{needed} USB {ports}{speed} {} needed, {free} {} free: {advice}",
        are(needed),
        are(free)
    )
}

/// Returns a warning about a disk that would be attached to a slower port.
///
/// The disk keeps its large packets there (512 bytes at high speed, 64 at full speed), which not
/// every driver of a guest supports.
pub fn slowed(domain: &Domain, device: &Record, at: &AssignedPort) -> Option<String> {
    let storage = Class::MASS_STORAGE;
    let is_storage =
        device.entry.class == storage || device.entry.interface_classes.contains(&storage);
    let (speed, port) = (device.entry.speed.filter(|_| is_storage)?, at.speeds.fastest()?);
    // QEMU has no port that is faster than SuperSpeed.
    (port < speed.min(Speed::Super)).then(|| {
        format!(
            "{} is a disk that runs at {speed} speed and gets a {port}-speed port of {}: it is \
             slow, and some guests cannot read it. Replace the guest's USB controller with {XHCI}",
            crate::message::device(device),
            domain.name
        )
    })
}

impl ClaimVerifier for Guest<'_> {
    fn verify(&mut self, candidate: &Record) -> Verified {
        self.ports.verify(candidate)
    }
    fn fits(&mut self, chosen: &[Granted]) -> Result<(), String> {
        self.plan(chosen)
    }
}

/// Builds the hostdev of a device: vendor, product and address together, and the guest's port if it
/// matters.
pub const fn hostdev(device: &Record, guest_port: Option<GuestPort>) -> Hostdev {
    let (id, address) = (device.entry.id, device.entry.address);
    Hostdev { id, usb: device.usb(), address, guest_port }
}

/// Converts a hostdev of the XML to the store's form.
pub fn holding(hostdev: &UsbHostdev) -> Holding {
    Holding {
        id: hostdev.injected(),
        usb: hostdev.usb,
        address: hostdev.address,
        port: hostdev.port.clone(),
    }
}

/// Whether the hostdev of a running guest is the device: by its address or port, or, if it has
/// neither, by its alias.
pub fn is_device(hostdev: &UsbHostdev, record: &Record) -> bool {
    let entry = &record.entry;
    let is_there = match (hostdev.address, &hostdev.port) {
        (Some(address), _) => address == entry.address,
        (None, Some(port)) => *port == entry.port_path,
        (None, None) => hostdev.injected() == Some(entry.id),
    };
    is_there && hostdev.usb.is_none_or(|usb| usb == record.usb())
}
