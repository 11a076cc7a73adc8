//! The plugged-in devices, as the kernel shows them in sysfs.
//!
//! Every device has a directory `bus/usb/devices/<port>`
//! (`Documentation/ABI/stable/sysfs-bus-usb`), with the directories of its interfaces,
//! `<port>:<configuration>.<number>`. The identity of a device is read with
//! [`virt_usb_config::sysfs::at_port`], which the hook uses to verify it later.

use std::fs;
use std::io::{self, Read as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use virt_usb_config::sysfs::{Seen, at_port, attribute, device_dir, path_of};
use virt_usb_model::device::Problem;
use virt_usb_model::{BusAddress, Class, Descriptors, DevicePath, PortPath, Speed, clean_text};

use super::{about, about_all};

/// The generic driver that every configured device has.
const GENERIC_DRIVER: &str = "usb";

/// Directory of the controllers in a simulated tree.
pub(super) const CONTROLLERS: &str = ".controllers";

/// Driver of interfaces that a program, such as QEMU, has claimed.
pub(crate) const CLAIMED: &str = "usbfs";

/// USB devices in sysfs.
#[derive(Debug, Default)]
pub(super) struct Scan {
    pub(super) plugged: Vec<Plugged>,
    /// Ports with a device that cannot be read.
    pub(super) unreadable: Vec<PortPath>,
    pub(super) problems: Vec<Problem>,
}

/// A plugged-in device in sysfs.
#[derive(Debug)]
pub(super) struct Plugged {
    pub(super) port: PortPath,
    pub(super) path: Option<DevicePath>,
    pub(super) dir: PathBuf,
    pub(super) seen: Seen,
    /// Whether there is an attribute `serial`, which may be blank.
    pub(super) has_serial: bool,
    pub(super) class: Option<Class>,
    pub(super) speed: Option<Speed>,
    pub(super) manufacturer: Option<String>,
    pub(super) product: Option<String>,
    pub(super) interfaces: Vec<Interface>,
    /// Driver of the device as a whole, if it is not the generic one (`usbip-host`).
    pub(super) driver: Option<String>,
    /// Whether all interfaces could be read.
    pub(super) whole: bool,
    pub(super) descriptors: Option<Descriptors>,
    /// Inode of the directory, which is new each time that the device is plugged in.
    pub(super) generation: Option<i64>,
}

/// An interface of a device in sysfs.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Interface {
    /// Codes of class, subclass and protocol.
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
    /// Names of the bound drivers, sorted, without duplicates, joined by commas.
    pub(super) fn drivers(&self) -> Option<String> {
        let mut drivers: Vec<&str> = self
            .interfaces
            .iter()
            .filter_map(|i| i.driver.as_deref())
            .chain(self.driver.as_deref())
            .collect();
        drivers.sort_unstable();
        drivers.dedup();
        (!drivers.is_empty()).then(|| drivers.join(","))
    }

    pub(super) fn is_bound_to(&self, driver: &str) -> bool {
        self.interfaces.iter().any(|i| i.driver.as_deref() == Some(driver))
    }
}

/// Returns a driver of the device's interfaces other than usbfs, if there is one now.
pub(crate) fn host_driver(sysfs_root: &Path, port: &PortPath) -> Option<String> {
    let (dir, prefix) = (device_dir(sysfs_root, port), format!("{port}:"));
    let entries = fs::read_dir(&dir).ok()?.flatten();
    let interfaces =
        entries.filter(|entry| entry.file_name().to_string_lossy().starts_with(&prefix));
    let drivers = interfaces.filter_map(|entry| fs::read_link(entry.path().join("driver")).ok());
    let mut names =
        drivers.filter_map(|link| Some(link.file_name()?.to_string_lossy().into_owned()));
    names.find(|name| name != CLAIMED)
}

/// Reads the directories of all devices. A machine without USB has no `bus/usb`. A machine without
/// sysfs is a problem of the whole scan.
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
                scan.problems
                    .push(about_all(format!("cannot read sysfs at {}: {e}", sysfs_root.display())));
            }
        }
        Err(e) => scan.problems.push(unreadable(&e)),
    }
    scan
}

impl Scan {
    /// Reads an entry of `bus/usb/devices`. Skips interfaces (`1-1:1.0`) and root hubs (`usb1`).
    fn take(&mut self, sysfs_root: &Path, name: &str) {
        if name.contains(':') || is_root_hub(name) || name == CONTROLLERS {
            return;
        }
        match name.parse() {
            Ok(port) => self.take_port(sysfs_root, port),
            Err(_) => self.problems.push(Problem {
                place: name.to_owned(),
                what: "is among the USB devices in sysfs, but its name is not a port path".into(),
            }),
        }
    }

    fn take_port(&mut self, sysfs_root: &Path, port: PortPath) {
        let dir = device_dir(sysfs_root, &port);
        let before = match at_port(sysfs_root, &port) {
            Ok(Some(seen)) => seen,
            Ok(None) if is_gone(&dir) => return,
            Ok(None) => {
                return self.lost(port, "sysfs does not show its vendor, product and address");
            }
            Err(e) => return self.lost(port, &e.to_string()),
        };
        let path = path_of(sysfs_root, &port);
        let plugged = self.read(port, path, dir, before);
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

    fn read(
        &mut self,
        port: PortPath,
        path: Option<DevicePath>,
        dir: PathBuf,
        seen: Seen,
    ) -> Plugged {
        let mut get = |name: &str| self.note(&port, attribute(&dir, name));
        let speed = get("speed").and_then(|text| text.trim().parse().ok());
        let manufacturer = get("manufacturer").as_deref().and_then(clean_text);
        let product = get("product").as_deref().and_then(clean_text);
        let has_serial = get("serial").is_some();
        let driver = self.driver(&port, &dir).filter(|name| name != GENERIC_DRIVER);
        let class = self.code(&port, &dir, "bDeviceClass").map(Class::new);
        let problems = self.problems.len();
        let interfaces = self.interfaces(&port, &dir);
        let whole = self.problems.len() == problems;
        let descriptors = descriptors(&dir);
        let generation =
            fs::metadata(&dir).ok().and_then(|folder| i64::try_from(folder.ino()).ok());
        Plugged {
            port,
            path,
            dir,
            seen,
            has_serial,
            class,
            speed,
            manufacturer,
            product,
            interfaces,
            driver,
            whole,
            descriptors,
            generation,
        }
    }

    fn interfaces(&mut self, port: &PortPath, dir: &Path) -> Vec<Interface> {
        let prefix = format!("{port}:");
        let entries = fs::read_dir(dir).and_then(Iterator::collect::<io::Result<Vec<_>>>);
        let entries = match entries {
            Ok(entries) => entries,
            Err(e) => {
                self.problems.push(about(
                    port,
                    format!("cannot list its interfaces in {}: {e}", dir.display()),
                ));
                return Vec::new();
            }
        };
        let mut names: Vec<_> = entries.iter().map(fs::DirEntry::file_name).collect();
        names.sort();
        let own = names.iter().filter(|name| name.to_string_lossy().starts_with(&prefix));
        own.filter_map(|name| self.interface(port, &dir.join(name))).collect()
    }

    fn interface(&mut self, port: &PortPath, dir: &Path) -> Option<Interface> {
        let mut code = |name: &str| self.code(port, dir, name);
        let class = [
            code("bInterfaceClass")?,
            code("bInterfaceSubClass").unwrap_or(0),
            code("bInterfaceProtocol").unwrap_or(0),
        ];
        Some(Interface { class, driver: self.driver(port, dir) })
    }

    /// Reads a class, subclass or protocol code.
    fn code(&mut self, port: &PortPath, dir: &Path, name: &str) -> Option<u8> {
        let text = self.note(port, attribute(dir, name))?;
        let code = u8::from_str_radix(text.trim(), 16).ok();
        if code.is_none() {
            let file = dir.join(name);
            self.problems.push(about(port, format!("{} contains {text:?}", file.display())));
        }
        code
    }

    /// Reads the name of the driver from the link `driver`.
    fn driver(&mut self, port: &PortPath, dir: &Path) -> Option<String> {
        let link = dir.join("driver");
        match fs::read_link(&link) {
            Ok(target) => target.file_name().and_then(|name| clean_text(&name.to_string_lossy())),
            Err(e) if e.kind() == io::ErrorKind::NotFound => None,
            Err(e) => {
                self.problems
                    .push(about(port, format!("cannot read the link {}: {e}", link.display())));
                None
            }
        }
    }

    fn note<E: ToString>(
        &mut self,
        port: &PortPath,
        read: Result<Option<String>, E>,
    ) -> Option<String> {
        read.unwrap_or_else(|e| {
            self.problems.push(about(port, e.to_string()));
            None
        })
    }
}

fn is_root_hub(name: &str) -> bool {
    name.strip_prefix("usb")
        .is_some_and(|number| !number.is_empty() && number.bytes().all(|b| b.is_ascii_digit()))
}

fn is_gone(dir: &Path) -> bool {
    fs::read_dir(dir).is_err_and(|e| e.kind() == io::ErrorKind::NotFound)
}

/// Reads the device's descriptors. `None` if they cannot be read; they are then not compared.
fn descriptors(dir: &Path) -> Option<Descriptors> {
    let mut bytes = Vec::new();
    let file = fs::File::open(dir.join("descriptors")).ok()?;
    file.take(Descriptors::MOST as u64 + 1).read_to_end(&mut bytes).ok()?;
    Descriptors::new(bytes)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    /// Creates a sysfs with these files below `bus/usb/devices`.
    fn sysfs(files: &[(&str, &str)]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for (path, text) in files {
            let path = root.path().join("bus/usb/devices").join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, format!("{text}\n")).unwrap();
        }
        root
    }

    fn key(port: &str) -> Vec<(String, &'static str)> {
        let files = [("idVendor", "0529"), ("idProduct", "0001"), ("busnum", "1"), ("devnum", "5")];
        files.iter().map(|(name, value)| (format!("{port}/{name}"), *value)).collect()
    }

    fn with<'a>(
        base: &'a [(String, &'a str)],
        more: &[(&'a str, &'a str)],
    ) -> Vec<(&'a str, &'a str)> {
        base.iter().map(|(path, text)| (path.as_str(), *text)).chain(more.iter().copied()).collect()
    }

    #[test]
    fn a_machine_without_usb_is_empty_and_without_sysfs_a_problem() {
        let root = tempfile::tempdir().unwrap();
        let none = scan(root.path());
        assert!(none.is_empty() && none.problems.is_empty());
        let problems = scan(&root.path().join("nowhere")).problems;
        assert!(
            problems[0].place.is_empty() && problems[0].what.contains("cannot read sysfs"),
            "{problems:?}"
        );
        let blocked = sysfs(&[]);
        fs::create_dir_all(blocked.path().join("bus/usb")).unwrap();
        fs::write(blocked.path().join("bus/usb/devices"), "").unwrap();
        assert!(scan(blocked.path()).problems[0].what.contains("cannot list"));
    }

    #[test]
    fn a_driver_of_the_host_differs_from_usbfs() {
        let root = tempfile::tempdir().unwrap();
        let port: PortPath = "1-1.4".parse().unwrap();
        let dir = device_dir(root.path(), &port);
        assert_eq!(host_driver(root.path(), &port), None);
        for (interface, driver, expected) in [
            ("1-1.4:1.0", "../../../../drivers/usbfs", None),
            ("1-1.40:1.0", "../../../../drivers/usbhid", None),
            ("1-1.4:1.1", "../../../../drivers/usb-storage", Some("usb-storage")),
        ] {
            fs::create_dir_all(dir.join(interface)).unwrap();
            symlink(driver, dir.join(interface).join("driver")).unwrap();
            assert_eq!(host_driver(root.path(), &port).as_deref(), expected, "{interface}");
        }
    }

    #[test]
    fn attributes_interfaces_and_drivers() {
        let base = key("1-1.4");
        let root = sysfs(&with(
            &base,
            &[
                ("1-1.4/serial", "  HL 1\u{7}"),
                ("1-1.4/speed", "12"),
                ("1-1.4/bDeviceClass", "ef"),
                ("1-1.4/product", "HASP"),
                ("1-1.4/1-1.4:1.0/bInterfaceClass", "03"),
                ("1-1.4/1-1.4:1.1/bInterfaceClass", "08"),
                ("1-1.4/1-1.4:1.1/bInterfaceSubClass", "06"),
                ("usb1/idVendor", "1d6b"),
                ("1-0:1.0/bInterfaceClass", "09"),
            ],
        ));
        let device = root.path().join("bus/usb/devices/1-1.4");
        symlink("../../../drivers/usb", device.join("driver")).unwrap();
        symlink("../../../../drivers/usbhid", device.join("1-1.4:1.0/driver")).unwrap();
        let found = scan(root.path());
        assert_eq!((found.problems.as_slice(), found.plugged.len()), (&[][..], 1));
        let plugged = &found.plugged[0];
        assert_eq!(plugged.seen.serial.as_deref(), Some("HL 1\u{fffd}"));
        assert_eq!(plugged.seen, at_port(root.path(), &plugged.port).unwrap().unwrap());
        assert_eq!((plugged.speed, plugged.class), (Some(Speed::Full), Some(Class::new(0xef))));
        assert_eq!(
            (plugged.product.as_deref(), plugged.manufacturer.as_deref()),
            (Some("HASP"), None)
        );
        assert_eq!(plugged.interfaces[1], Interface { class: [8, 6, 0], driver: None });
        assert_eq!(plugged.drivers().as_deref(), Some("usbhid"));
        assert!(plugged.whole && found.by_address(BusAddress::new(1, 5).unwrap()).is_some());
    }

    #[test]
    fn an_incomplete_device_is_a_problem_at_its_port() {
        let base = key("1-1");
        let root = sysfs(&with(
            &base,
            &[("1-2/idVendor", "0529"), ("odd/idVendor", "0529"), ("1-1/bDeviceClass", "?")],
        ));
        fs::create_dir_all(root.path().join("bus/usb/devices/1-3/idVendor")).unwrap();
        let found = scan(root.path());
        let places: Vec<&str> =
            found.problems.iter().map(|problem| problem.place.as_str()).collect();
        for place in ["1-1", "1-2", "1-3", "odd"] {
            assert!(places.contains(&place), "{place} in {places:?}");
        }
        assert_eq!(found.unreadable.len(), 2);
        assert_eq!(found.plugged.len(), 1, "an invalid class does not hide the device");
    }
}
