//! Devices that guests use without a claim: as a disk, a serial port, a network interface or a SCSI
//! adapter, or in a handwritten hostdev of a guest that is not running.
//!
//! ```text
//!   guests' workers: libvirt's XML of all domains ─► Supervised ─┐ (a change: DeviceSignal::Usb)
//!   devices' thread: Snapshot::ties ─────────────────────────────┴─► resolve ─► Snapshot::guests
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use virt_usb_domxml::{Domain, HostPlace, HostSource, UsbHostdev};
use virt_usb_model::{Device, InstanceId, PortPath};

use crate::discovery::Snapshot;
use crate::discovery::ties::{GuestUse, GuestUses, Nodes};
use crate::hypervisor::{Failure, Hypervisor, Known};

/// Uses of one guest, by its XML.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Using {
    domain: String,
    running: bool,
    sources: Vec<HostSource>,
    /// The guest's hostdevs, for a running guest without those that have an alias of virt-usb,
    /// because their claims name the holder.
    hostdevs: Vec<UsbHostdev>,
}

impl Using {
    /// Reads the uses from the guest's XML. `None` if there are none.
    fn new(domain: &Domain, running: bool) -> Option<Self> {
        let is_unclaimed = |h: &&UsbHostdev| !running || h.injected().is_none();
        let hostdevs: Vec<UsbHostdev> =
            domain.host_devices().filter(is_unclaimed).cloned().collect();
        let sources = domain.host_sources.clone();
        let uses_some = !sources.is_empty() || !hostdevs.is_empty();
        uses_some.then(|| Self { domain: domain.name.clone(), running, sources, hostdevs })
    }
}

/// Uses of all guests.
type ByGuest = BTreeMap<InstanceId, Using>;

/// Reads the uses of all guests once, for programs other than the agent.
///
/// # Errors
/// If the hypervisor cannot be queried.
pub fn ask(hypervisor: &dyn Hypervisor, snapshot: &Snapshot) -> Result<GuestUses, Failure> {
    let running: BTreeSet<InstanceId> = hypervisor.running()?.into_iter().collect();
    let mut guests = ByGuest::new();
    for instance in hypervisor.all()? {
        // A device that was unplugged in the meantime, or that cannot be read, has no known use.
        let domain =
            hypervisor.xml(instance)?.and_then(|xml| virt_usb_domxml::read(xml.as_bytes()).ok());
        let using = domain.and_then(|domain| Using::new(&domain, running.contains(&instance)));
        guests.extend(using.map(|using| (instance, using)));
    }
    Ok(GuestUses::Known(resolve(snapshot, &guests, canonical)))
}

/// Uses of the plugged-in devices by the known guests; `None` if not all guests have been read yet.
pub(super) fn of(known: Option<Vec<Known>>, snapshot: &Snapshot) -> GuestUses {
    let Some(known) = known else { return GuestUses::Unknown };
    let using = |known: Known| Some((known.instance, using(&known)?));
    GuestUses::Known(resolve(snapshot, &known.into_iter().filter_map(using).collect(), canonical))
}

/// Whether a guest uses other devices now than before.
pub(crate) fn have_changed(before: Option<&Known>, now: Option<&Known>) -> bool {
    before.and_then(using) != now.and_then(using)
}

fn using(known: &Known) -> Option<Using> {
    Using::new(&known.domain, known.running)
}

/// Resolves all links of a path. `None` if it does not exist.
fn canonical(path: &str) -> Option<String> {
    Some(std::fs::canonicalize(Path::new(path)).ok()?.to_str()?.to_owned())
}

fn resolve(
    snapshot: &Snapshot,
    guests: &ByGuest,
    canonical: impl Fn(&str) -> Option<String>,
) -> BTreeMap<PortPath, Vec<GuestUse>> {
    let mut uses: BTreeMap<PortPath, Vec<GuestUse>> = BTreeMap::new();
    for (instance, using) in guests {
        let mut add = |port: &PortPath, what: &str| {
            let used = GuestUse::new(*instance, &using.domain, using.running, what);
            let all = uses.entry(port.clone()).or_default();
            // The first console repeats the first serial port.
            if !all.iter().any(|one| one.instance == used.instance) {
                all.push(used);
            }
        };
        for source in &using.sources {
            // A path may be a link to the device's node.
            let link = match &source.place {
                HostPlace::Path(path) => canonical(path),
                _ => None,
            };
            let is_of = |nodes: &Nodes| match &source.place {
                HostPlace::Path(path) => {
                    nodes.paths.contains(path)
                        || link.as_ref().is_some_and(|link| nodes.paths.contains(link))
                }
                HostPlace::Network(name) => nodes.networks.contains(name),
                HostPlace::ScsiHost(name) => nodes.scsi_hosts.contains(name),
            };
            for (port, _) in snapshot.ties.iter().filter(|(_, ties)| is_of(&ties.nodes)) {
                add(port, &source.what);
            }
        }
        for hostdev in &using.hostdevs {
            if let Some(device) = named(&snapshot.devices, hostdev) {
                add(&device.key.port, "hostdev");
            }
        }
    }
    uses
}

/// The device that a hostdev names: the one at its address or port, or the only one of its kind.
fn named<'a>(devices: &'a [Device], hostdev: &UsbHostdev) -> Option<&'a Device> {
    if !hostdev.names_a_device() {
        return None;
    }
    let mut fitting = devices.iter().filter(|device| {
        hostdev.usb.is_none_or(|usb| usb == device.key.usb)
            && hostdev.address.is_none_or(|address| address == device.address)
            && hostdev.port.as_ref().is_none_or(|port| *port == device.key.port)
    });
    let first = fitting.next()?;
    fitting.next().is_none().then_some(first)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::discovery::{Simulated, UsbSource};

    const DEVICES: &str = "
        [[device]]
        vendor = '0951'
        product = '1666'
        bus = 1
        device = 5
        port = '1-1'
        nodes = ['/dev/sdb', '/dev/sdb1', '/dev/disk/by-id/usb-K']
        [[device]]
        vendor = '0951'
        product = '1666'
        bus = 1
        device = 6
        port = '1-2'
        [[device]]
        vendor = '0403'
        product = '6001'
        bus = 1
        device = 7
        port = '1-3'
        nodes = ['/dev/ttyUSB0']
    ";

    fn used(devices: &str) -> Vec<String> {
        let xml = format!("<domain><name>g</name><devices>{devices}</devices></domain>");
        let domain = virt_usb_domxml::read(xml.as_bytes()).unwrap();
        let instance = "11111111-2222-4333-8444-555555555555".parse().unwrap();
        let guests = Using::new(&domain, true).map(|using| (instance, using)).into_iter().collect();
        let link = |path: &str| (path == "/dev/stick").then(|| "/dev/sdb1".to_owned());
        let uses = resolve(&Simulated::parse(DEVICES).unwrap().snapshot(), &guests, link);
        let shown = uses
            .iter()
            .flat_map(|(port, all)| all.iter().map(move |one| format!("{port} {}", one.what)));
        shown.collect()
    }

    #[test]
    fn each_kind_of_source_finds_its_device() {
        let disk = |path: &str| {
            format!("<disk type='block'><source dev='{path}'/><target dev='vda'/></disk>")
        };
        for path in ["/dev/sdb", "/dev/sdb1", "/dev/disk/by-id/usb-K", "/dev/stick"] {
            assert_eq!(used(&disk(path)), ["1-1 used by guest g as disk vda"], "{path}");
        }
        assert_eq!(used(&disk("/dev/sda")), [""; 0]);
        let serial = "<serial type='dev'><source path='/dev/ttyUSB0'/><target port='0'/></serial>\
            <console type='dev'><source path='/dev/ttyUSB0'/><target port='0'/></console>";
        assert_eq!(used(serial), ["1-3 used by guest g as serial 0"]);
    }

    #[test]
    fn a_hostdev_that_names_a_single_device_is_a_use() {
        let hostdev = |source: &str, more: &str| {
            format!(
                "<hostdev mode='subsystem' type='usb'><source>{source}</source>{more}</hostdev>"
            )
        };
        let kind = "<vendor id='0x0403'/><product id='0x6001'/>";
        assert_eq!(used(&hostdev(kind, "")), ["1-3 used by guest g as hostdev"]);
        assert_eq!(
            used(&hostdev("<address bus='1' device='6'/>", "")),
            ["1-2 used by guest g as hostdev"]
        );
        let twins = "<vendor id='0x0951'/><product id='0x1666'/>";
        assert_eq!(used(&hostdev(twins, "")), [""; 0], "either of two");
        assert_eq!(used(&hostdev("", "")), [""; 0], "any");
        assert_eq!(used(&hostdev(kind, "<alias name='ua-usb-3'/>")), [""; 0], "the agent's own");
    }

    #[test]
    fn uses_are_unknown_until_all_guests_were_read() {
        let snapshot = Snapshot::default();
        assert_eq!(of(None, &snapshot), GuestUses::Unknown);
        assert_eq!(of(Some(Vec::new()), &snapshot), GuestUses::Known(BTreeMap::new()));
    }
}
