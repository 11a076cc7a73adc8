//! The real source: libusb's list and the kernel's sysfs, put together.
//!
//! The two are joined by bus and device number. Where both know a device, sysfs says who it is and where (that is
//! what the hook verifies) and libusb adds the descriptors. Where only one knows it, the device is listed from that one,
//! with a problem that says so. A serial that cannot be read makes a device nobody's: it becomes a problem, never a
//! device "without serial", because that would be another device in the inventory.

use std::path::PathBuf;
use std::time::Duration;

use virt_usb_hook::config::Config;
use virt_usb_model::device::Problem;
use virt_usb_model::{BusAddress, Class, Device, DeviceKey, PortPath, Serial};

use super::host_use::HostUse;
use super::listed::{Listed, Strings, Wanted, list};
use super::sysfs::{Plugged, Scan, scan};
use super::{Snapshot, UsbSource, about, about_all, names};

/// While a device comes or goes, libusb and sysfs disagree for an instant; only what lasts longer is a problem.
const SECOND_LOOK: Duration = Duration::from_millis(30);

/// The driver of interfaces that a program, QEMU for one, has claimed.
const CLAIMED: &str = "usbfs";

/// The machine's own USB devices.
#[derive(Debug, Clone)]
pub struct LibUsb {
    sysfs_root: PathBuf,
    procfs_root: PathBuf,
}

impl LibUsb {
    /// Looks where `config` says that sysfs and procfs are mounted. libusb itself always looks at `/sys`.
    pub fn new(config: &Config) -> Self {
        Self { sysfs_root: config.sysfs_root.clone(), procfs_root: config.procfs_root.clone() }
    }
}

impl UsbSource for LibUsb {
    fn snapshot(&self) -> Snapshot {
        let first = Look::take(self);
        if first.agreed {
            return first.snapshot();
        }
        std::thread::sleep(SECOND_LOOK);
        Look::take(self).snapshot()
    }
}

/// One look, while it is put together.
struct Look {
    found: Vec<Device>,
    problems: Vec<Problem>,
    /// Whether libusb and sysfs list the same devices.
    agreed: bool,
}

impl Look {
    fn take(source: &LibUsb) -> Self {
        let sysfs = scan(&source.sysfs_root);
        let mut look = Self { found: Vec::new(), problems: sysfs.problems.clone(), agreed: sysfs.unreadable.is_empty() };
        let listed = look.listed(&sysfs);
        let mut host = HostUse::new(&source.sysfs_root, &source.procfs_root);
        for plugged in &sysfs.plugged {
            let twin = listed.as_ref().map(|all| all.iter().find(|l| l.address() == Some(plugged.seen.address)));
            if twin.is_some_and(|twin| twin.is_none()) {
                look.disagree(about(&plugged.port, "sysfs shows it, but libusb does not list it"));
            }
            let host_use = host.of(plugged, &mut look.problems);
            look.both(plugged, twin.flatten(), host_use);
        }
        for listed in listed.iter().flatten() {
            look.only_libusb(listed, &sysfs);
        }
        look
    }

    /// libusb's list; `None` when there is none to compare with.
    fn listed(&mut self, sysfs: &Scan) -> Option<Vec<Listed>> {
        match list() {
            Ok((listed, wrong)) => {
                self.problems.extend(wrong.into_iter().map(about_all));
                Some(listed)
            }
            Err(_) if sysfs.is_empty() => None,
            Err(e) => {
                self.problems.push(about_all(format!("libusb cannot list the devices: {e}; shown is what sysfs tells")));
                None
            }
        }
    }

    fn both(&mut self, plugged: &Plugged, listed: Option<&Listed>, host_use: Option<String>) {
        let usb = plugged.seen.usb;
        let strings = self.missing_names(plugged, listed);
        if !plugged.has_serial && listed.is_some_and(Listed::has_serial) {
            self.problems.push(about(&plugged.port, "has a serial number that the kernel could not read: taken as missing"));
        }
        let mut interfaces: Vec<Class> = plugged.interfaces.iter().map(|i| Class::new(i.class[0])).collect();
        interfaces.extend(listed.map(|listed| self.interfaces(listed, &plugged.port)).unwrap_or_default());
        self.found.push(Device {
            key: DeviceKey {
                usb,
                serial: Serial::new(plugged.seen.serial.clone(), false),
                port: plugged.port.clone(),
            },
            address: plugged.seen.address,
            class: plugged.class.or(listed.map(Listed::class)).unwrap_or(Class::new(0)),
            interfaces: ascending(interfaces),
            speed: plugged.speed.or_else(|| listed.and_then(Listed::speed)),
            manufacturer: plugged.manufacturer.clone().or(strings.manufacturer).or_else(|| names::vendor(usb)),
            product: plugged.product.clone().or(strings.product).or_else(|| names::product(usb)),
            driver: plugged.drivers(),
            host_use,
        });
    }

    fn interfaces(&mut self, listed: &Listed, port: &PortPath) -> Vec<Class> {
        listed.interfaces().unwrap_or_else(|e| {
            self.problems.push(about(port, format!("libusb cannot read its configuration: {e}")));
            Vec::new()
        })
    }

    /// Asks the device itself for names that sysfs lacks, but never one that somebody uses.
    fn missing_names(&mut self, plugged: &Plugged, listed: Option<&Listed>) -> Strings {
        let Some(listed) = listed.filter(|_| !plugged.is_bound_to(CLAIMED)) else { return Strings::default() };
        let wanted = Wanted {
            serial: false,
            manufacturer: plugged.manufacturer.is_none(),
            product: plugged.product.is_none(),
        };
        let strings = listed.strings(wanted);
        self.problems.extend(strings.failure.iter().map(|what| about(&plugged.port, what.clone())));
        strings
    }

    /// A device that libusb lists and sysfs does not.
    fn only_libusb(&mut self, listed: &Listed, sysfs: &Scan) {
        let address = listed.address();
        if address.is_some_and(|address| sysfs.by_address(address).is_some()) {
            return;
        }
        let Some(port) = listed.port() else {
            return self.disagree(about_all(format!("libusb lists {} at no port", listed.describe())));
        };
        if sysfs.unreadable.contains(&port) {
            return;
        }
        let Some(address) = address else {
            return self.disagree(about(&port, format!("libusb lists {}: numbers that USB does not allow", listed.describe())));
        };
        self.disagree(about(&port, format!("libusb lists {}, but sysfs does not show it", listed.describe())));
        match self.from_libusb(listed, port.clone(), address) {
            Ok(device) => self.found.push(device),
            Err(what) => self.problems.push(about(&port, what)),
        }
    }

    /// `Err` when it cannot be told who the device is.
    fn from_libusb(&mut self, listed: &Listed, port: PortPath, address: BusAddress) -> Result<Device, String> {
        let usb = listed.usb();
        let strings = listed.strings(Wanted { serial: true, manufacturer: true, product: true });
        if let Some(failure) = strings.failure {
            if listed.has_serial() && strings.serial.is_none() {
                return Err(format!("it cannot be told who it is: {failure}"));
            }
            self.problems.push(about(&port, failure));
        }
        let interfaces = self.interfaces(listed, &port);
        Ok(Device {
            key: DeviceKey { usb, serial: Serial::new(strings.serial, false), port },
            address,
            class: listed.class(),
            interfaces: ascending(interfaces),
            speed: listed.speed(),
            manufacturer: strings.manufacturer.or_else(|| names::vendor(usb)),
            product: strings.product.or_else(|| names::product(usb)),
            driver: None,
            host_use: Some("sysfs does not show it, and it cannot be told whether the host uses it".into()),
        })
    }

    fn disagree(&mut self, problem: Problem) {
        self.agreed = false;
        self.problems.push(problem);
    }

    fn snapshot(self) -> Snapshot {
        Snapshot::new(self.found, self.problems)
    }
}

fn ascending(mut classes: Vec<Class>) -> Vec<Class> {
    classes.sort_unstable();
    classes.dedup();
    classes
}
