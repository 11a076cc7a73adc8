//! The guest's USB controllers and what is plugged into them, counted the way libvirt counts
//! (`src/conf/domain_addr.c`, `virDomainUSBAddress*`).
//!
//! libvirt keeps a tree of ports for every controller index, reserves what has an address, and
//! gives everything else the first free port, hubs last. On hot-plug it adds nothing: what does not
//! fit is refused. So the same tree is built here, with one thing that libvirt does not know and
//! QEMU insists on: the speeds that a port serves ([`SpeedMask`]).

use std::collections::BTreeMap;
use std::fmt;

use virt_usb_model::SpeedMask;

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

/// The port that a further device gets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AssignedPort {
    /// The speeds of the port.
    pub speeds: SpeedMask,
    /// Where it is, when the device's element has to name it.
    pub port: Option<GuestPort>,
}

/// A USB port of the guest: what `<address type='usb'/>` says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GuestPort {
    /// Index of the controller.
    bus: u32,
    path: Path,
}

impl fmt::Display for GuestPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let path = self.path.iter().take_while(|port| **port > 0).map(ToString::to_string);
        write!(f, "bus='{}' port='{}'", self.bus, path.collect::<Vec<_>>().join("."))
    }
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

    /// Whether the domain declares that it has no USB, so that no device can be added.
    fn is_disabled(&self) -> bool {
        let none = |c: &Controller| c.model == "none" || (c.model.is_empty() && self.is_s390());
        self.controllers.iter().any(none)
    }

    /// Whether devices for ports of these speeds can be added.
    ///
    /// Nothing to add always fits. Each device needs a free port that serves it; see [`Fit`].
    pub fn fit(&self, wants: &[SpeedMask]) -> Fit {
        if wants.is_empty() {
            return Fit::Fits;
        }
        if self.is_disabled() {
            return if matches!(self.usual(), Usual::Impossible) { Fit::NoPci } else { Fit::NoUsb };
        }
        if self.has_controller() {
            return self
                .tree(&self.controllers)
                .free()
                .take(wants)
                .map_or_else(Fit::TooFew, |()| Fit::Fits);
        }
        let otherwise = match self.usual() {
            Usual::Impossible => return Fit::NoPci,
            Usual::Absent => Fit::NoController,
            Usual::Model(model) => {
                if self.tree(&[Controller::of(model)]).free().take(wants).is_ok() {
                    return Fit::Fits;
                }
                Fit::NeedsController
            }
        };
        let ours = Controller { ports: Some(INJECTED_PORTS), ..Controller::of("qemu-xhci") };
        self.tree(&[ours]).free().take(wants).map_or_else(Fit::TooFew, |()| otherwise)
    }

    /// The ports that further devices get, one for each of `wants`, for which [`fit`](Self::fit)
    /// has said yes.
    ///
    /// libvirt takes the first free port, whatever its speed. Where that one does not serve the
    /// device, the first free one that does is named.
    pub fn place(&self, wants: &[SpeedMask]) -> Vec<AssignedPort> {
        let mut tree = match self.usual() {
            Usual::Model(model) if !self.has_controller() => self.tree(&[Controller::of(model)]),
            _ => self.tree(&self.controllers),
        };
        wants.iter().map_while(|want| tree.place(*want)).collect()
    }

    /// How many ports more the xHCI controllers of the domain could have: QEMU gives one up to 15.
    pub fn spare_xhci_ports(&self) -> usize {
        self.xhcis().map(|ports| INJECTED_PORTS - ports).sum()
    }

    /// Whether a controller of the domain serves devices of every speed.
    pub fn has_xhci(&self) -> bool {
        self.xhcis().next().is_some()
    }

    /// The ports of each xHCI controller.
    fn xhcis(&self) -> impl Iterator<Item = usize> {
        let hosts = self.controllers.iter().filter(|c| c.companion().is_none());
        let ports = hosts.map(|c| c.ports(&self.arch));
        ports.filter(|(_, serves)| *serves == Serves::All).map(|(ports, _)| ports)
    }

    /// The lowest index that no USB controller of the domain has.
    pub fn next_index(&self) -> u32 {
        let mut taken: Vec<u32> = self.controllers.iter().filter_map(|c| c.index).collect();
        // A controller without an index gets one at its definition: the lowest that is left.
        for _ in self.controllers.iter().filter(|c| c.index.is_none() && c.companion().is_none()) {
            taken.push(lowest_beside(&taken));
        }
        lowest_beside(&taken)
    }

    /// The machine, for messages: `aarch64 virt`.
    pub fn machine(&self) -> String {
        [self.arch.as_str(), self.machine.as_str()].join(" ").trim().to_owned()
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
            "input" => {
                tag.is("bus", "usb") || (tag.get("bus").is_none() && tag.is("type", "tablet"))
            }
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

    /// The controller that libvirt adds where none is declared (`qemuDomainDefAddDefaultDevices` in
    /// `src/qemu/qemu_postparse.c`, and `qemuDomainSupportsPCI`).
    ///
    /// What libvirt passes to a hook has the controller that it added. So a document without one is
    /// unfinished, or its machine gets none. On ppc64 and its like the model depends on the version
    /// of QEMU, and a keyboard and a mouse come with it: nothing is assumed there.
    fn usual(&self) -> Usual {
        let machine = self.machine.as_str();
        match self.arch.as_str() {
            "" | "x86_64" | "i686" => match machine {
                "isapc" | "microvm" => Usual::Impossible,
                "q35" => Usual::Model("qemu-xhci"),
                m if m.starts_with("pc-q35") => Usual::Model("qemu-xhci"),
                // `pc`, `pc-i440fx-…`, and what libvirt takes when no machine is given.
                _ => Usual::Model("piix3-uhci"),
            },
            "aarch64" | "armv7l" | "armv7b" | "armv6l" => match machine {
                // The two boards for which QEMU had `-usb` from early on: an OHCI controller.
                m if m == "versatilepb" || m.starts_with("realview-eb") => {
                    Usual::Model("piix3-uhci")
                }
                m if is_virt(m) => Usual::Absent,
                _ => Usual::Impossible,
            },
            "riscv32" | "riscv64" if !is_virt(machine) => Usual::Impossible,
            _ => Usual::Absent,
        }
    }

    fn tree(&self, controllers: &[Controller]) -> Tree {
        let mut tree = Tree::new(controllers, self.arch.as_str());
        // Addressed hubs first, the outer before the inner, so that what stands behind them finds
        // its port.
        let mut addressed: Vec<&Plugged> =
            self.plugged.iter().filter(|p| !p.path.is_empty()).collect();
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
        tree
    }
}

/// Controller that libvirt adds to a domain that declares none.
enum Usual {
    /// libvirt adds a controller of this model.
    Model(&'static str),
    /// libvirt adds no controller, but accepts a declared one.
    Absent,
    /// There can be none.
    Impossible,
}

/// The generic machine of an architecture that has boards too; what libvirt takes when no machine
/// is given.
fn is_virt(machine: &str) -> bool {
    machine.is_empty() || machine == "virt" || machine.starts_with("virt-")
}

fn lowest_beside(taken: &[u32]) -> u32 {
    (0..).find(|index| !taken.contains(index)).unwrap_or_default()
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
    fn of(model: &str) -> Self {
        Self { model: model.to_owned(), ..Self::default() }
    }

    /// The two ports of its EHCI controller that a UHCI companion serves; `None` if it is not a
    /// companion.
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
        let or =
            |usual: usize, most: usize| self.ports.filter(|&n| n > 0).unwrap_or(usual).min(most);
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
        let (companions, hosts): (Vec<_>, Vec<_>) =
            controllers.iter().partition(|c| c.companion().is_some());
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

    /// Takes the port that an address names. What names none that is there takes nothing: libvirt
    /// refuses it.
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
        let mut buses =
            self.0.iter_mut().filter(|(index, _)| plugged.bus.is_none_or(|bus| bus == **index));
        buses.find_map(|(_, ports)| assign(ports, plugged.hub, &|_| true, &[]));
    }

    /// Takes the port that a device of these speeds is to have.
    fn place(&mut self, want: SpeedMask) -> Option<AssignedPort> {
        let serving = |serves: Serves| serves.speeds().meets(want);
        let first = self.0.values().find_map(|ports| first_free(ports, 1));
        let named = !first.is_some_and(serving);
        self.0.iter_mut().find_map(|(&bus, ports)| {
            let (serves, path) = assign(ports, false, &serving, &[])?;
            let port = named.then_some(GuestPort { bus, path });
            Some(AssignedPort { speeds: serves.speeds(), port })
        })
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

/// A port's number at each hub on the way to it, from 1; 0 behind its end.
type Path = [u8; MAX_TIERS];

/// Takes the first free port that will do; what it serves, and where it is. `above` is where these
/// ports are.
fn assign(
    ports: &mut [Port],
    hub: bool,
    will_do: &dyn Fn(Serves) -> bool,
    above: &[u8],
) -> Option<(Serves, Path)> {
    let path = |at: usize| [above, &[u8::try_from(at + 1).unwrap_or(u8::MAX)]].concat();
    let free = ports.iter_mut().enumerate().find(|(_, port)| !port.used && will_do(port.serves));
    if let Some((at, port)) = free {
        port.plug(hub);
        let mut whole = [0; MAX_TIERS];
        whole.iter_mut().zip(path(at)).for_each(|(to, from)| *to = from);
        return Some((port.serves, whole));
    }
    let is_deep = above.len() + 1 >= MAX_TIERS;
    let mut hubs = ports.iter_mut().enumerate().filter(|_| !is_deep);
    hubs.find_map(|(at, port)| assign(port.hub.as_mut()?, hub, will_do, &path(at)))
}

/// Devices that the first free port serves.
fn first_free(ports: &[Port], tier: usize) -> Option<Serves> {
    let free = ports.iter().find(|port| !port.used).map(|port| port.serves);
    let hubs = || ports.iter().filter_map(|port| port.hub.as_deref()).filter(|_| tier < MAX_TIERS);
    free.or_else(|| hubs().find_map(|inner| first_free(inner, tier + 1)))
}
