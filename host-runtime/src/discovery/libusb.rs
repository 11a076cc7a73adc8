//! The real source, which combines libusb's list with the kernel's sysfs.
//!
//! The two are joined by bus and device number. If both know a device, sysfs determines its
//! identity and port (which the hook verifies), and libusb adds the descriptors. If only one knows
//! it, the device is listed from that one, with a problem that says so. A device whose serial
//! cannot be read has no identity: it becomes a problem, never a device without a serial, because
//! that would be another device in the inventory.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use virt_usb_config::Config;
use virt_usb_model::device::Problem;
use virt_usb_model::{BusAddress, Class, Device, DeviceKey, PortPath, Serial};

use super::host_use::HostUse;
use super::listed::{Listed, Strings, Wanted, read_all};
use super::sysfs::{CLAIMED, Plugged, Scan, scan};
use super::ties::Ties;
use super::{Snapshot, UsbSource, about, about_all, context, names};

/// Wait before a second scan if libusb and sysfs disagree. They disagree for a moment while a
/// device is plugged in or unplugged.
const RESCAN_DELAY: Duration = Duration::from_millis(30);

/// Source of the USB devices of this machine.
#[derive(Debug, Clone)]
pub struct LibUsb {
    sysfs_root: PathBuf,
    procfs_root: PathBuf,
}

impl LibUsb {
    /// Creates a source that uses the mount points of sysfs and procfs in `config`. libusb itself
    /// always uses `/sys`.
    pub fn new(config: &Config) -> Self {
        Self { sysfs_root: config.sysfs_root.clone(), procfs_root: config.procfs_root.clone() }
    }
}

impl UsbSource for LibUsb {
    fn snapshot(&self) -> Snapshot {
        let mut view = View::read(&self.sysfs_root, context::devices);
        if !view.agrees() {
            std::thread::sleep(RESCAN_DELAY);
            view = View::read(&self.sysfs_root, context::devices);
        }
        context::exit_replaced();
        if !view.agrees() {
            drop(view);
            view = View::read(&self.sysfs_root, context::devices_of_new_context);
        }
        view.merge(&HostUse::new(&self.sysfs_root, &self.procfs_root))
    }
}

/// State of both sources at one time. Reading it uses the kernel's data and does not access a
/// device.
struct View {
    sysfs: Scan,
    listed: rusb::Result<(Vec<Listed>, Vec<String>)>,
}

impl View {
    fn read(
        sysfs_root: &Path,
        devices: impl FnOnce() -> rusb::Result<Vec<rusb::Device<rusb::Context>>>,
    ) -> Self {
        Self { sysfs: scan(sysfs_root), listed: devices().map(read_all) }
    }

    fn agrees(&self) -> bool {
        let Ok((listed, wrong)) = &self.listed else { return self.sysfs.is_empty() };
        // The kernel shows a device before all of its attributes. Without its serial, it would be
        // another device. A new device can have the address of a device that libusb still lists,
        // because udev has not reported the removal yet.
        let same =
            |l: &Listed, p: &Plugged| p.seen.usb == l.usb() && (p.has_serial || !l.has_serial());
        let known = |l: &Listed| {
            let plugged = l.address().and_then(|address| self.sysfs.by_address(address));
            plugged.is_some_and(|plugged| same(l, plugged))
        };
        let whole = self.sysfs.unreadable.is_empty() && wrong.is_empty();
        whole && listed.len() == self.sysfs.plugged.len() && listed.iter().all(known)
    }

    fn merge(&self, host: &HostUse<'_>) -> Snapshot {
        let mut merge = Merge { problems: self.sysfs.problems.clone(), ..Merge::default() };
        let listed = merge.listed(self);
        for plugged in &self.sysfs.plugged {
            let twin = listed
                .and_then(|all| all.iter().find(|l| l.address() == Some(plugged.seen.address)));
            if listed.is_some() && twin.is_none() {
                merge.problem(&plugged.port, "sysfs shows it, but libusb does not list it");
            }
            merge.add_plugged(plugged, twin, host);
        }
        for listed in listed.into_iter().flatten() {
            merge.add_listed(listed, &self.sysfs);
        }
        Snapshot { ties: merge.ties, ..Snapshot::new(merge.found, merge.problems) }
    }
}

/// A snapshot under construction.
#[derive(Default)]
struct Merge {
    found: Vec<Device>,
    problems: Vec<Problem>,
    ties: BTreeMap<PortPath, Ties>,
}

impl Merge {
    /// Returns libusb's list. `None` if libusb failed, which is not a problem if sysfs shows no
    /// devices either: on a machine without USB, libusb may be unable to start.
    fn listed<'a>(&mut self, view: &'a View) -> Option<&'a [Listed]> {
        match &view.listed {
            Ok((listed, wrong)) => {
                self.problems.extend(wrong.iter().map(about_all));
                Some(listed)
            }
            Err(_) if view.sysfs.is_empty() => None,
            Err(e) => {
                self.problems.push(about_all(format!(
                    "libusb cannot list the devices, so only data from sysfs is shown: {e}"
                )));
                None
            }
        }
    }

    /// Adds a device that sysfs shows.
    fn add_plugged(&mut self, plugged: &Plugged, listed: Option<&Listed>, host: &HostUse<'_>) {
        let usb = plugged.seen.usb;
        let strings = self.missing_names(plugged, listed);
        if !plugged.has_serial && listed.is_some_and(Listed::has_serial) {
            self.problem(
                &plugged.port,
                "has a serial number that the kernel could not read: treated as missing",
            );
        }
        let mut interfaces: Vec<Class> =
            plugged.interfaces.iter().map(|i| Class::new(i.class[0])).collect();
        interfaces.extend(
            listed.map(|listed| self.interfaces(listed, &plugged.port)).unwrap_or_default(),
        );
        let (host_use, ties) = host.of(plugged, &mut self.problems);
        self.ties.insert(plugged.port.clone(), ties);
        self.found.push(Device {
            key: DeviceKey {
                usb,
                serial: Serial::new(plugged.seen.serial.clone(), false),
                port: plugged.port.clone(),
                path: plugged.path.clone(),
            },
            address: plugged.seen.address,
            class: plugged.class.or(listed.map(Listed::class)).unwrap_or(Class::new(0)),
            interfaces: ascending(interfaces),
            speed: plugged.speed.or_else(|| listed.and_then(Listed::speed)),
            manufacturer: plugged
                .manufacturer
                .clone()
                .or(strings.manufacturer)
                .or_else(|| names::vendor(usb)),
            product: plugged.product.clone().or(strings.product).or_else(|| names::product(usb)),
            driver: plugged.drivers(),
            host_use,
            descriptors: plugged.descriptors.clone(),
            generation: plugged.generation,
        });
    }

    /// Requests names that sysfs lacks from the device itself, unless a guest or another program
    /// uses it.
    fn missing_names(&mut self, plugged: &Plugged, listed: Option<&Listed>) -> Strings {
        let Some(listed) = listed.filter(|_| !plugged.is_bound_to(CLAIMED)) else {
            return Strings::default();
        };
        let wanted = Wanted {
            serial: false,
            manufacturer: plugged.manufacturer.is_none(),
            product: plugged.product.is_none(),
        };
        let strings = listed.strings(wanted);
        self.problems.extend(strings.failure.iter().map(|what| about(&plugged.port, what)));
        strings
    }

    fn interfaces(&mut self, listed: &Listed, port: &PortPath) -> Vec<Class> {
        listed.interfaces().unwrap_or_else(|e| {
            self.problem(port, &format!("libusb cannot read its configuration: {e}"));
            Vec::new()
        })
    }

    /// Adds a device that libusb lists, unless sysfs shows it too.
    fn add_listed(&mut self, listed: &Listed, sysfs: &Scan) {
        let address = listed.address();
        if address.is_some_and(|address| sysfs.by_address(address).is_some()) {
            return;
        }
        let name = listed.describe();
        let Some(port) = listed.port() else {
            return self.problems.push(about_all(format!("libusb lists {name} without a port")));
        };
        if sysfs.unreadable.contains(&port) {
            return; // There is a problem for this port already.
        }
        let Some(address) = address else {
            return self.problem(
                &port,
                &format!("libusb lists {name}, but USB does not allow its numbers"),
            );
        };
        self.problem(&port, &format!("libusb lists {name}, but sysfs does not show it"));
        self.libusb_alone(listed, port, address);
    }

    fn libusb_alone(&mut self, listed: &Listed, port: PortPath, address: BusAddress) {
        let usb = listed.usb();
        let strings = listed.strings(Wanted { serial: true, manufacturer: true, product: true });
        self.problems.extend(strings.failure.iter().map(|what| about(&port, what)));
        if strings.failure.is_some() && listed.has_serial() && strings.serial.is_none() {
            return self.problem(
                &port,
                "has a serial number that could not be read: cannot tell which device it is",
            );
        }
        let interfaces = self.interfaces(listed, &port);
        self.found.push(Device {
            key: DeviceKey { usb, serial: Serial::new(strings.serial, false), port, path: None },
            address,
            class: listed.class(),
            interfaces: ascending(interfaces),
            speed: listed.speed(),
            manufacturer: strings.manufacturer.or_else(|| names::vendor(usb)),
            product: strings.product.or_else(|| names::product(usb)),
            driver: None,
            host_use: Some(
                "sysfs does not show it, so virt-usb cannot tell whether the host uses it".into(),
            ),
            descriptors: None,
            generation: None,
        });
    }

    fn problem(&mut self, port: &PortPath, what: &str) {
        self.problems.push(about(port, what));
    }
}

fn ascending(mut classes: Vec<Class>) -> Vec<Class> {
    classes.sort_unstable();
    classes.dedup();
    classes
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::discovery::Simulated;

    const KEY: &str = "[[device]]\nvendor = '0529'\nproduct = '0001'\nbus = 1\ndevice = 5\nport = \
        '1-1'\nserial = 'A'\n";

    fn without_libusb(simulated: &str) -> Snapshot {
        let root = tempfile::tempdir().unwrap();
        Simulated::parse(simulated).unwrap().write_sysfs(root.path()).unwrap();
        let view = View { sysfs: scan(root.path()), listed: Err(rusb::Error::Other) };
        view.merge(&HostUse::new(root.path(), root.path()))
    }

    #[test]
    fn libusb_may_fail_only_if_there_are_no_devices() {
        assert_eq!(without_libusb(""), Snapshot::default());
        let snapshot = without_libusb(KEY);
        assert!(snapshot.failed() && snapshot.is_unsure(&"7-7".parse().unwrap()));
        assert!(
            snapshot.problems[0].what.starts_with("libusb cannot list the devices"),
            "{:?}",
            snapshot.problems
        );
        assert_eq!(
            snapshot.devices[0].key.to_string(),
            "0529:0001 at port 1-1, serial A",
            "sysfs shows the device nevertheless"
        );
        assert!(without_libusb(&format!("{KEY}unreadable = true")).failed());
    }

    #[test]
    fn the_simulated_tree_is_the_simulated_snapshot() {
        let file = format!(
            "{KEY}interfaces = ['03', 'ff']\nspeed = 'full'\ndriver = 'usbhid'\nproduct_name = \
                'HASP'\npath = 'pci-0000:00:14.0-usbv2-0:1'"
        );
        let simulated = Simulated::parse(&file).unwrap().snapshot();
        let mut seen = without_libusb(&file).devices;
        assert!(
            seen.iter_mut().all(|device| device.generation.take().is_some()),
            "directories have inodes"
        );
        assert_eq!(seen, simulated.devices);
    }
}
