//! The guest's USB controllers and what is plugged into them, counted the way libvirt counts
//! (`src/conf/domain_addr.c`, `virDomainUSBAddress*`).
//!
//! libvirt keeps a tree of ports for every controller index, reserves what has an address, and gives everything else
//! the first free port, hubs last. On hot-plug it adds nothing: what does not fit is refused. So the same tree is built
//! here, with one thing that libvirt does not know and QEMU insists on: the speeds that a port serves.

use std::collections::BTreeMap;

use virt_usb_model::Speed;

use crate::device::{Device, Part, number};
use crate::fit::{Fit, Free, Serves};

/// Ports of the controller that is injected; QEMU's and libvirt's maximum for `qemu-xhci`.
pub(crate) const INJECTED_PORTS: usize = 15;
/// Ports of QEMU's `usb-hub` (`VIR_DOMAIN_USB_HUB_PORTS`).
const HUB_PORTS: usize = 8;
/// Tiers in an address (`VIR_DOMAIN_DEVICE_USB_MAX_PORT_DEPTH`).
const MAX_TIERS: usize = 4;
/// More ports than any controller has, whatever `ports=` says.
const MOST_PORTS: usize = 31;

/// A domain's USB controllers, and the devices that occupy their ports.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct UsbBus {
    arch: String,
    machine: String,
    controllers: Vec<Controller>,
    plugged: Vec<Plugged>,
    ccid: bool,
    smartcard: bool,
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Controller {
    index: Option<u32>,
    model: String,
    ports: Option<usize>,
    /// Of a companion: its first port on the EHCI, from 0.
    start_port: Option<usize>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Plugged {
    hub: bool,
    /// Controller index, when it is given.
    bus: Option<u32>,
    /// Ports from the root on, from 1; empty when not given.
    path: Vec<usize>,
}

impl UsbBus {
    /// Whether the domain declares a USB controller, `model='none'` included.
    pub fn has_controller(&self) -> bool {
        !self.controllers.is_empty()
    }

    /// Whether the domain has no USB: nothing can be added to it as it is.
    pub fn is_disabled(&self) -> bool {
        let none = |c: &Controller| c.model == "none" || (c.model.is_empty() && self.is_s390());
        self.controllers.iter().any(none)
            || (self.controllers.is_empty() && self.default_model() == Some("none"))
    }

    /// Whether devices of these speeds (`None`: a redirection, or not known) can be added.
    ///
    /// Nothing to add always fits. Each device needs a free port that serves its speed; see [`Fit`].
    pub fn fit(&self, wants: &[Option<Speed>]) -> Fit {
        if wants.is_empty() {
            return Fit::Fits;
        }
        if self.is_disabled() {
            return Fit::NoUsb;
        }
        if self.has_controller() {
            return match self.free(&self.controllers).take(wants) {
                Ok(()) => Fit::Fits,
                Err(too_few) => too_few,
            };
        }
        let default =
            self.default_model().map(|model| Controller { model: model.to_owned(), ..Default::default() });
        if default.is_some_and(|c| self.free(&[c]).take(wants).is_ok()) {
            return Fit::Fits;
        }
        let ours =
            Controller { model: "qemu-xhci".to_owned(), ports: Some(INJECTED_PORTS), ..Default::default() };
        match self.free(&[ours]).take(wants) {
            Ok(()) => Fit::NeedsController,
            Err(too_few) => too_few,
        }
    }

    pub(crate) fn set_machine(&mut self, arch: &str, machine: &str) {
        arch.clone_into(&mut self.arch);
        machine.clone_into(&mut self.machine);
    }

    /// How many records this holds.
    pub(crate) fn len(&self) -> usize {
        self.controllers.len() + self.plugged.len()
    }

    /// Takes in a device, if it has to do with USB.
    pub(crate) fn add(&mut self, device: &Device<'_>) {
        let tag = &device.node.tag;
        let plugged = match tag.name {
            "controller" if tag.is("type", "usb") => {
                self.controllers.push(controller(device));
                false
            }
            "controller" if tag.is("type", "ccid") => {
                self.ccid = true;
                true
            }
            "smartcard" => {
                self.smartcard = true;
                false
            }
            "hub" => tag.is("type", "usb"),
            "hostdev" => device.is_usb_hostdev(),
            "redirdev" => device.is_usb_redirdev(),
            "input" => tag.is("bus", "usb") || (tag.get("bus").is_none() && tag.is("type", "tablet")),
            "disk" => device.value(Part::Target, "bus") == "usb",
            "serial" | "console" => {
                matches!(device.value(Part::Target, "type").as_str(), "usb" | "usb-serial")
                    || device.value(Part::TargetModel, "name") == "usb-serial"
            }
            "sound" => tag.is("model", "usb"),
            "interface" => device.value(Part::Model, "type") == "usb-net",
            _ => false,
        };
        if plugged {
            self.plugged.push(Plugged::new(device));
        }
    }

    fn is_s390(&self) -> bool {
        self.arch.starts_with("s390")
    }

    /// The controller that libvirt adds where none is declared (`qemuDomainDefAddDefaultDevices`); `none` where
    /// there can be none; nothing where none is added or where it depends on more than the document (on ppc64 the
    /// version of QEMU decides, and a keyboard and a mouse come with it).
    fn default_model(&self) -> Option<&'static str> {
        match self.arch.as_str() {
            "" | "x86_64" | "i686" => Some(match self.machine.as_str() {
                "isapc" => "none",
                "q35" => "qemu-xhci",
                m if m.starts_with("pc-q35") => "qemu-xhci",
                // `pc`, `pc-i440fx-…`, and what libvirt takes when no machine is given.
                _ => "piix3-uhci",
            }),
            _ if self.is_s390() => Some("none"),
            _ => None,
        }
    }

    fn free(&self, controllers: &[Controller]) -> Free {
        let mut tree = Tree::new(controllers, self.arch.as_str());
        // Addressed hubs first, the outer before the inner, so that what stands behind them finds its port.
        let mut addressed: Vec<&Plugged> = self.plugged.iter().filter(|p| !p.path.is_empty()).collect();
        addressed.sort_by_key(|p| (!p.hub, p.path.len()));
        for plugged in addressed {
            tree.reserve(plugged);
        }
        let implied = Plugged { hub: false, bus: None, path: Vec::new() };
        let implied = Some(&implied).filter(|_| self.smartcard && !self.ccid);
        let mut floating: Vec<&Plugged> =
            self.plugged.iter().filter(|p| p.path.is_empty()).chain(implied).collect();
        floating.sort_by_key(|p| !p.hub);
        for plugged in floating {
            tree.assign(plugged);
        }
        tree.free()
    }
}

fn controller(device: &Device<'_>) -> Controller {
    let tag = &device.node.tag;
    let count = |text: &str| number(text).and_then(|n| usize::try_from(n).ok());
    Controller {
        index: tag.value("index").and_then(|i| number(&i)),
        model: tag.value("model").unwrap_or_default().into_owned(),
        ports: tag.value("ports").and_then(|p| count(&p)),
        start_port: count(&device.value(Part::Master, "startport")),
    }
}

impl Plugged {
    fn new(device: &Device<'_>) -> Self {
        let hub = device.node.tag.name == "hub";
        if device.value(Part::Address, "type") != "usb" {
            return Self { hub, bus: None, path: Vec::new() };
        }
        let port = device.value(Part::Address, "port");
        let path: Option<Vec<usize>> = port
            .split('.')
            .take(MAX_TIERS + 1)
            .map(|p| number(p)?.try_into().ok().filter(|&p| p > 0))
            .collect();
        let path = path.filter(|p| p.len() <= MAX_TIERS).unwrap_or_default();
        Self { hub, bus: number(&device.value(Part::Address, "bus")), path }
    }
}

impl Controller {
    /// Which two ports of its EHCI a UHCI companion serves; `None` for what is no companion.
    fn companion(&self) -> Option<std::ops::Range<usize>> {
        let usual = match self.model.as_str() {
            "ich9-uhci1" => 0,
            "ich9-uhci2" => 2,
            "ich9-uhci3" => 4,
            _ => return None,
        };
        let start = self.start_port.unwrap_or(usual).min(MOST_PORTS);
        Some(start..start + 2)
    }

    /// How many ports it has (`virDomainUSBAddressControllerModelToPorts`) and what they serve.
    fn ports(&self, arch: &str) -> (usize, Serves) {
        let or = |usual: usize, most: usize| self.ports.filter(|&n| n > 0).unwrap_or(usual).min(most);
        match self.model.as_str() {
            "piix3-uhci" | "piix4-uhci" | "vt82c686b-uhci" => (2, Serves::Slow),
            "" if matches!(arch, "" | "x86_64" | "i686") => (2, Serves::Slow),
            "pci-ohci" => (3, Serves::Slow),
            "" if arch.starts_with("ppc") => (3, Serves::Slow),
            "ehci" | "ich9-ehci1" => (6, Serves::High),
            "qusb1" => (or(8, MOST_PORTS), Serves::Slow),
            "qusb2" => (or(8, MOST_PORTS), Serves::Usb2),
            "none" => (0, Serves::Slow),
            // qemu-xhci, nec-xhci, the default elsewhere, and what is newer than this list.
            _ => (or(4, INJECTED_PORTS), Serves::All),
        }
    }
}

#[derive(Debug)]
struct Port {
    serves: Serves,
    used: bool,
    hub: Option<Vec<Port>>,
}

impl Port {
    fn new(serves: Serves) -> Self {
        Self { serves, used: false, hub: None }
    }

    fn plug(&mut self, hub: bool) {
        self.used = true;
        if hub && self.hub.is_none() {
            self.hub = Some((0..HUB_PORTS).map(|_| Port::new(Serves::Slow)).collect());
        }
    }
}

/// Ports by controller index.
struct Tree(BTreeMap<u32, Vec<Port>>);

impl Tree {
    fn new(controllers: &[Controller], arch: &str) -> Self {
        let mut buses: BTreeMap<u32, Vec<Port>> = BTreeMap::new();
        let (companions, hosts): (Vec<_>, Vec<_>) = controllers.iter().partition(|c| c.companion().is_some());
        let mut next = 0;
        for host in hosts {
            while host.index.is_none() && (buses.contains_key(&next) || taken(controllers, next)) {
                next += 1;
            }
            let (count, serves) = host.ports(arch);
            let ports = (0..count).map(|_| Port::new(serves)).collect();
            buses.entry(host.index.unwrap_or(next)).or_insert(ports);
        }
        for companion in companions {
            let ports = buses.get_mut(&companion.index.unwrap_or(0));
            let range = companion.companion().unwrap_or_default();
            for port in ports.into_iter().flatten().skip(range.start).take(range.len()) {
                if port.serves == Serves::High {
                    port.serves = Serves::Usb2;
                }
            }
        }
        Self(buses)
    }

    /// Takes the port that an address names. What names none that is there takes nothing: libvirt refuses it.
    fn reserve(&mut self, plugged: &Plugged) {
        let Some(mut ports) = self.0.get_mut(&plugged.bus.unwrap_or(0)) else { return };
        let Some((last, hubs)) = plugged.path.split_last() else { return };
        for hub in hubs {
            match ports.get_mut(hub - 1).and_then(|port| port.hub.as_mut()) {
                Some(inner) => ports = inner,
                None => return,
            }
        }
        if let Some(port) = ports.get_mut(last - 1) {
            port.plug(plugged.hub);
        }
    }

    /// Takes the first free port, as libvirt does, whatever its speed.
    fn assign(&mut self, plugged: &Plugged) {
        let buses = self.0.iter_mut().filter(|(index, _)| plugged.bus.is_none_or(|bus| bus == **index));
        for (_, ports) in buses {
            if assign(ports, plugged.hub, 1) {
                return;
            }
        }
    }

    fn free(&self) -> Free {
        fn walk<'a>(ports: &'a [Port], free: &mut Vec<&'a Port>) {
            for port in ports {
                if !port.used {
                    free.push(port);
                }
                walk(port.hub.as_deref().unwrap_or_default(), free);
            }
        }
        let mut free = Vec::new();
        for ports in self.0.values() {
            walk(ports, &mut free);
        }
        Free::count(free.iter().map(|port| port.serves))
    }
}

fn taken(controllers: &[Controller], index: u32) -> bool {
    controllers.iter().any(|c| c.index == Some(index))
}

fn assign(ports: &mut [Port], hub: bool, tier: usize) -> bool {
    if let Some(port) = ports.iter_mut().find(|port| !port.used) {
        port.plug(hub);
        return true;
    }
    tier < MAX_TIERS
        && ports.iter_mut().filter_map(|p| p.hub.as_mut()).any(|inner| assign(inner, hub, tier + 1))
}
