//! What the kernel's sysfs tells of the devices that are plugged in.
//!
//! Every device has a folder `bus/usb/devices/<port>` (`Documentation/ABI/stable/sysfs-bus-usb`); the folders of its
//! interfaces, `<port>:<configuration>.<number>`, lie in it. Who a device is, is read through the hook's own
//! [`virt_usb_hook::sysfs::at_port`], so that what is recorded here is what the hook verifies later.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use virt_usb_hook::sysfs::{Seen, at_port, attribute, device_dir};
use virt_usb_model::device::Problem;
use virt_usb_model::{BusAddress, Class, PortPath, Speed, clean_text};

use super::{about, about_all};

/// The drivers of a whole device that mean nothing: every configured device has it.
const GENERIC_DRIVER: &str = "usb";

/// What sysfs shows of the USB devices.
#[derive(Debug, Default)]
pub(super) struct Scan {
    pub(super) plugged: Vec<Plugged>,
    /// Ports at which something is, but it cannot be told what.
    pub(super) unreadable: Vec<PortPath>,
    pub(super) problems: Vec<Problem>,
}

/// One device's folder.
#[derive(Debug)]
pub(super) struct Plugged {
    pub(super) port: PortPath,
    pub(super) dir: PathBuf,
    pub(super) seen: Seen,
    /// Whether there is a `serial` at all: blank is not the same as not readable.
    pub(super) has_serial: bool,
    pub(super) class: Option<Class>,
    pub(super) speed: Option<Speed>,
    pub(super) manufacturer: Option<String>,
    pub(super) product: Option<String>,
    pub(super) interfaces: Vec<Interface>,
    /// The driver of the device as a whole, where it is not the generic one (`usbip-host`).
    pub(super) driver: Option<String>,
}

/// One interface's folder.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Interface {
    /// Class, subclass, protocol.
    pub(super) class: [u8; 3],
    pub(super) driver: Option<String>,
}

impl Scan {
    pub(super) fn by_address(&self, address: BusAddress) -> Option<&Plugged> {
        self.plugged.iter().find(|plugged| plugged.seen.address == address)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.plugged.is_empty() && self.unreadable.is_empty()
    }
}

impl Plugged {
    /// The bound drivers, ascending, each once, joined by commas.
    pub(super) fn drivers(&self) -> Option<String> {
        let mut drivers: Vec<&str> =
            self.interfaces.iter().filter_map(|i| i.driver.as_deref()).chain(self.driver.as_deref()).collect();
        drivers.sort_unstable();
        drivers.dedup();
        (!drivers.is_empty()).then(|| drivers.join(","))
    }

    pub(super) fn is_bound_to(&self, driver: &str) -> bool {
        self.interfaces.iter().any(|i| i.driver.as_deref() == Some(driver))
    }
}

/// Reads all device folders. A machine without USB has none, and no `bus/usb` either; a machine without sysfs is a
/// problem of the whole scan.
pub(super) fn scan(sysfs_root: &Path) -> Scan {
    let mut scan = Scan::default();
    let folder = sysfs_root.join("bus/usb/devices");
    let unreadable = |e: &io::Error| about_all(format!("cannot list {}: {e}", folder.display()));
    match fs::read_dir(&folder) {
        Ok(entries) => {
            for entry in entries {
                match entry {
                    Ok(entry) => scan.take(sysfs_root, &entry.file_name().to_string_lossy()),
                    Err(e) => scan.problems.push(unreadable(&e)),
                }
            }
        }
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            if let Err(e) = fs::read_dir(sysfs_root) {
                scan.problems.push(about_all(format!("cannot read sysfs at {}: {e}", sysfs_root.display())));
            }
        }
        Err(e) => scan.problems.push(unreadable(&e)),
    }
    scan
}

impl Scan {
    /// One name under `bus/usb/devices`: interfaces (`1-1:1.0`) and root hubs (`usb1`) are no devices.
    fn take(&mut self, sysfs_root: &Path, name: &str) {
        if name.contains(':') || is_root_hub(name) {
            return;
        }
        match name.parse() {
            Ok(port) => self.take_port(sysfs_root, port),
            Err(_) => self.problems.push(Problem {
                place: name.to_owned(),
                what: "is among the USB devices in sysfs, but its name is no port path".into(),
            }),
        }
    }

    fn take_port(&mut self, sysfs_root: &Path, port: PortPath) {
        let dir = device_dir(sysfs_root, &port);
        let before = match at_port(sysfs_root, &port) {
            Ok(Some(seen)) => seen,
            Ok(None) if is_gone(&dir) => return,
            Ok(None) => return self.lost(port, "sysfs does not tell its vendor, product and address"),
            Err(e) => return self.lost(port, &e.to_string()),
        };
        let plugged = self.read(port, dir, before);
        match at_port(sysfs_root, &plugged.port) {
            Ok(Some(after)) if after == plugged.seen => self.plugged.push(plugged),
            Ok(None) if is_gone(&plugged.dir) => {}
            _ => self.lost(plugged.port, "was replugged while it was read"),
        }
    }

    fn lost(&mut self, port: PortPath, what: &str) {
        self.problems.push(about(&port, what));
        self.unreadable.push(port);
    }

    fn read(&mut self, port: PortPath, dir: PathBuf, seen: Seen) -> Plugged {
        let mut get = |name: &str| self.note(&port, attribute(&dir, name));
        let class = get("bDeviceClass").and_then(|text| hex(&text)).map(Class::new);
        let speed = get("speed").and_then(|text| text.trim().parse().ok());
        let manufacturer = get("manufacturer").as_deref().and_then(clean_text);
        let product = get("product").as_deref().and_then(clean_text);
        let has_serial = get("serial").is_some();
        let driver = self.driver(&port, &dir).filter(|name| name != GENERIC_DRIVER);
        let interfaces = self.interfaces(&port, &dir);
        Plugged { port, dir, seen, has_serial, class, speed, manufacturer, product, interfaces, driver }
    }

    fn interfaces(&mut self, port: &PortPath, dir: &Path) -> Vec<Interface> {
        let prefix = format!("{port}:");
        let entries = fs::read_dir(dir).and_then(Iterator::collect::<io::Result<Vec<_>>>);
        let entries = match entries {
            Ok(entries) => entries,
            Err(e) => {
                self.problems.push(about(port, format!("cannot list its interfaces in {}: {e}", dir.display())));
                return Vec::new();
            }
        };
        let mut names: Vec<_> = entries.iter().map(fs::DirEntry::file_name).collect();
        names.sort();
        let own = names.iter().filter(|name| name.to_string_lossy().starts_with(&prefix));
        own.filter_map(|name| self.interface(port, &dir.join(name))).collect()
    }

    fn interface(&mut self, port: &PortPath, dir: &Path) -> Option<Interface> {
        let mut get = |name: &str| {
            let text = self.note(port, attribute(dir, name));
            text.and_then(|text| hex(&text))
        };
        let class = [get("bInterfaceClass")?, get("bInterfaceSubClass").unwrap_or(0), get("bInterfaceProtocol").unwrap_or(0)];
        Some(Interface { class, driver: self.driver(port, dir) })
    }

    /// The name that the folder's `driver` link ends in.
    fn driver(&mut self, port: &PortPath, dir: &Path) -> Option<String> {
        let link = dir.join("driver");
        match fs::read_link(&link) {
            Ok(target) => target.file_name().and_then(|name| clean_text(&name.to_string_lossy())),
            Err(e) if e.kind() == io::ErrorKind::NotFound => None,
            Err(e) => {
                self.problems.push(about(port, format!("cannot read the link {}: {e}", link.display())));
                None
            }
        }
    }

    fn note<E: ToString>(&mut self, port: &PortPath, read: Result<Option<String>, E>) -> Option<String> {
        read.unwrap_or_else(|e| {
            self.problems.push(about(port, e.to_string()));
            None
        })
    }
}

fn is_root_hub(name: &str) -> bool {
    name.strip_prefix("usb").is_some_and(|number| !number.is_empty() && number.bytes().all(|b| b.is_ascii_digit()))
}

fn is_gone(dir: &Path) -> bool {
    fs::read_dir(dir).is_err_and(|e| e.kind() == io::ErrorKind::NotFound)
}

fn hex(text: &str) -> Option<u8> {
    u8::from_str_radix(text.trim(), 16).ok()
}
