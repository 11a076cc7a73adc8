//! The device at a port, as sysfs shows it now.
//!
//! The address in the inventory may be outdated; the one in sysfs is current. Format:
//! `Documentation/ABI/testing/sysfs-bus-usb` and `Documentation/ABI/stable/sysfs-bus-usb` of the
//! kernel.

use std::io::{self, Read};
use std::path::{Path, PathBuf};

use virt_usb_model::{BusAddress, Class, DevicePath, PortPath, UsbId, VendorId, clean_text};

/// A device at a port and its address.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seen {
    /// Vendor and product ids, from `idVendor` and `idProduct`.
    pub usb: UsbId,
    /// Serial number, cleaned as discovery cleans it.
    pub serial: Option<String>,
    /// Bus and device numbers, from `busnum` and `devnum`.
    pub address: BusAddress,
}

/// An attribute in sysfs cannot be read. This does not mean that the port is empty.
#[derive(Debug, thiserror::Error)]
#[error("cannot read {path}: {reason}")]
pub struct SysfsError {
    path: PathBuf,
    reason: String,
}

/// Directory of the device at `port` in sysfs.
pub fn device_dir(sysfs_root: &Path, port: &PortPath) -> PathBuf {
    sysfs_root.join("bus/usb/devices").join(port.to_string())
}

/// Reads the device at `port`. `None` if the port is empty.
///
/// # Errors
/// If the device's directory exists but cannot be read.
pub fn at_port(sysfs_root: &Path, port: &PortPath) -> Result<Option<Seen>, SysfsError> {
    seen(&device_dir(sysfs_root, port))
}

/// Reads the device or root hub in the directory `dir`.
fn seen(dir: &Path) -> Result<Option<Seen>, SysfsError> {
    // Read idVendor first: a device that is unplugged during the read leaves no partial result.
    let Some(vendor) = attribute(dir, "idVendor")? else { return Ok(None) };
    let Some(product) = attribute(dir, "idProduct")? else { return Ok(None) };
    let serial = attribute(dir, "serial")?;
    let (Some(bus), Some(device)) = (attribute(dir, "busnum")?, attribute(dir, "devnum")?) else {
        return Ok(None);
    };
    let wrong = |name: &str, text: &str| SysfsError {
        path: dir.join(name),
        reason: format!("{text:?} is not a number that USB allows"),
    };
    let vendor: VendorId = vendor.parse().map_err(|_| wrong("idVendor", &vendor))?;
    let product = product.parse().map_err(|_| wrong("idProduct", &product))?;
    let address = bus
        .parse()
        .ok()
        .zip(device.parse().ok())
        .and_then(|(bus, device)| BusAddress::new(bus, device))
        .ok_or_else(|| wrong("devnum", &device))?;
    Ok(Some(Seen {
        usb: UsbId { vendor, product },
        serial: serial.as_deref().and_then(clean_text),
        address,
    }))
}

/// Returns the path of a port, which may be empty. `None` if sysfs does not show the port's root
/// hub below its controller.
///
/// A socket of USB 3 has a port at a hub of USB 2 and one at a hub of USB 3, each the other's
/// `peer`. Both have the path of the USB 2 port, because a device may fall back from one to the
/// other without being moved.
pub fn path_of(sysfs_root: &Path, port: &PortPath) -> Option<DevicePath> {
    let devices = sysfs_root.join("bus/usb/devices");
    let (controller, version) = root_hub(&devices, port.bus())?;
    let own = DevicePath::new(&controller, version, port.ports());
    let peer = || {
        let peer = peer(&devices, port)?;
        let (controller, below) = root_hub(&devices, peer.bus())?;
        (below < version).then(|| DevicePath::new(&controller, below, peer.ports()))?
    };
    peer().or(own)
}

/// Returns the port that a path names during this boot, and the port of the same socket at the
/// other hub.
pub fn ports_of(sysfs_root: &Path, path: &DevicePath) -> Vec<PortPath> {
    let devices = sysfs_root.join("bus/usb/devices");
    let buses = std::fs::read_dir(&devices).into_iter().flatten().flatten().filter_map(|entry| {
        let name = entry.file_name();
        name.to_str()?.strip_prefix("usb")?.parse::<u8>().ok()
    });
    let own = |bus: &u8| {
        root_hub(&devices, *bus)
            .is_some_and(|(name, version)| name == path.controller() && version == path.version())
    };
    let port = buses.into_iter().find(own).and_then(|bus| PortPath::new(bus, path.ports()));
    let peer = port.as_ref().and_then(|port| peer(&devices, port));
    port.into_iter().chain(peer).collect()
}

/// Controller and major USB version of a bus's root hub.
fn root_hub(devices: &Path, bus: u8) -> Option<(String, u8)> {
    let dir = devices.join(format!("usb{bus}"));
    let controller = controller(&std::fs::read_link(&dir).ok()?)?;
    // " 2.00", " 3.10"
    let version = attribute(&dir, "version").ok()??;
    let major = version.trim().split('.').next()?.parse().ok()?;
    Some((controller, major))
}

/// Name of a controller, from the directory of its root hub
/// (`…/devices/pci0000:00/0000:00:14.0/usb1`). Built as udev builds `ID_PATH`: the PCI function
/// that is next to the hub, then the platform device below it.
fn controller(root_hub: &Path) -> Option<String> {
    let names: Vec<&str> = root_hub.iter().map(|name| name.to_str()).collect::<Option<_>>()?;
    let (_, above) = names.split_last()?;
    let start = above.iter().rposition(|name| *name == "devices")?;
    let chain = above.get(start + 1..)?;
    let function = chain.iter().rposition(|name| is_pci_function(name));
    let below = chain.get(function.map_or(0, |at| at + 1)..)?;
    let platform = match below {
        [] => None,
        // The kernel numbers such devices in the order of their creation. The name of the parent is
        // stable.
        [.., parent, name] if name.ends_with(".auto") => {
            let kind = name.split('.').next().unwrap_or(name);
            Some(format!("platform-{parent}-{kind}"))
        }
        [.., name] => Some(format!("platform-{}", name.trim_end_matches(".auto"))),
    };
    let function = function.and_then(|at| chain.get(at)).map(|name| format!("pci-{name}"));
    match (function, platform) {
        (Some(function), Some(platform)) => Some(format!("{function}-{platform}")),
        (one, other) => one.or(other),
    }
}

/// Whether this is the name of a PCI function, such as `0000:00:14.0`.
fn is_pci_function(name: &str) -> bool {
    let parts: Vec<&str> = name.split([':', '.']).collect();
    let hex = |text: &&str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_hexdigit());
    parts.len() == 4 && parts.iter().all(hex) && name.rfind(':') < name.find('.')
}

/// The port at the other hub of the same socket (`peer`, Documentation/ABI/testing/sysfs-bus-usb).
fn peer(devices: &Path, port: &PortPath) -> Option<PortPath> {
    let (number, above) = port.ports().split_last()?;
    let folder = match PortPath::new(port.bus(), above) {
        None => format!("usb{bus}/{bus}-0:1.0/usb{bus}-port{number}", bus = port.bus()),
        Some(hub) => format!("{hub}/{hub}:1.0/{hub}-port{number}"),
    };
    let link = std::fs::read_link(devices.join(folder).join("peer")).ok()?;
    // usb2-port4, or 2-4-port3
    let (hub, number) = link.file_name()?.to_str()?.rsplit_once("-port")?;
    let number: u8 = number.parse().ok()?;
    match hub.strip_prefix("usb") {
        Some(bus) => PortPath::new(bus.parse().ok()?, &[number]),
        None => {
            let hub: PortPath = hub.parse().ok()?;
            let ports: Vec<u8> = hub.ports().iter().copied().chain([number]).collect();
            PortPath::new(hub.bus(), &ports)
        }
    }
}

/// Finds a hub of this host for which `wanted` is true, root hubs (`usb1`) included. Returns the
/// kernel's name of the hub. Hubs that cannot be read are ignored.
pub fn hub(sysfs_root: &Path, wanted: impl Fn(&str, UsbId, BusAddress) -> bool) -> Option<String> {
    let all = std::fs::read_dir(sysfs_root.join("bus/usb/devices")).ok()?;
    all.flatten().find_map(|entry| {
        let dir = entry.path();
        let class = attribute(&dir, "bDeviceClass").ok()??;
        if class.parse::<Class>().ok()? != Class::HUB {
            return None;
        }
        let hub = seen(&dir).ok()??;
        let name = entry.file_name().to_string_lossy().into_owned();
        wanted(&name, hub.usb, hub.address).then_some(name)
    })
}

/// Reads an attribute without its line end. `None` if the attribute or its device does not exist.
/// Bytes that are not UTF-8 are replaced, because serials come from devices.
///
/// # Errors
/// Any other error, for example permission denied.
pub fn attribute(dir: &Path, name: &str) -> Result<Option<String>, SysfsError> {
    let path = dir.join(name);
    // One read returns a whole attribute, which is at most a page.
    let mut page = [0; 4096];
    let read = std::fs::File::open(&path).and_then(|mut file| file.read(&mut page));
    match read {
        Ok(length) => Ok(Some(
            String::from_utf8_lossy(page.get(..length).unwrap_or_default())
                .trim_end_matches('\n')
                .to_owned(),
        )),
        Err(e) if is_absent(&e) => Ok(None),
        Err(e) => Err(SysfsError { path, reason: e.to_string() }),
    }
}

/// Whether the error means that the device or its attribute does not exist, or disappeared between
/// open and read.
fn is_absent(e: &io::Error) -> bool {
    const ENXIO: i32 = 6;
    const ENODEV: i32 = 19;
    matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory)
        || matches!(e.raw_os_error(), Some(ENODEV | ENXIO))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plug(root: &Path, port: &str, attributes: &[(&str, &str)]) {
        let dir = root.join("bus/usb/devices").join(port);
        std::fs::create_dir_all(&dir).unwrap();
        for (name, value) in attributes {
            std::fs::write(dir.join(name), format!("{value}\n")).unwrap();
        }
    }

    #[test]
    fn a_hub_is_found_by_what_a_hostdev_says_of_it() {
        let root = tempfile::tempdir().unwrap();
        let of = |class, product, bus, device| {
            [
                ("bDeviceClass", class),
                ("idVendor", "1d6b"),
                ("idProduct", product),
                ("busnum", bus),
                ("devnum", device),
            ]
        };
        plug(root.path(), "usb2", &of("09", "0002", "2", "1"));
        plug(root.path(), "2-1", &of("00", "0002", "2", "7"));
        plug(root.path(), "2-1:1.0", &[("bInterfaceClass", "09")]);
        let at = |bus, device| BusAddress::new(bus, device).unwrap();
        assert_eq!(hub(root.path(), |_, _, a| a == at(2, 1)).as_deref(), Some("usb2"));
        assert_eq!(hub(root.path(), |_, _, a| a == at(2, 7)), None);
        assert_eq!(
            hub(root.path(), |_, usb, _| usb == UsbId::new(0x1d6b, 2)).as_deref(),
            Some("usb2")
        );
        assert_eq!(hub(&root.path().join("nowhere"), |_, _, _| true), None);
    }

    /// Creates a root hub of that USB version below its controller.
    fn hub_at(root: &Path, bus: u8, folder: &str, version: &str) {
        let dir = root.join("devices").join(folder).join(format!("usb{bus}"));
        std::fs::create_dir_all(&dir).unwrap();
        std::fs::write(dir.join("version"), format!(" {version}\n")).unwrap();
        let link = root.join("bus/usb/devices").join(format!("usb{bus}"));
        std::fs::create_dir_all(link.parent().unwrap()).unwrap();
        std::os::unix::fs::symlink(format!("../../../devices/{folder}/usb{bus}"), link).unwrap();
    }

    fn peers(root: &Path, folder: &str, other: &str) {
        let dir = root.join("bus/usb/devices").join(folder);
        std::fs::create_dir_all(&dir).unwrap();
        std::os::unix::fs::symlink(other, dir.join("peer")).unwrap();
    }

    #[test]
    fn a_path_names_the_controller_and_not_the_bus() {
        let root = tempfile::tempdir().unwrap();
        let root = root.path();
        let path = |port: &str| path_of(root, &port.parse().unwrap()).map(|path| path.to_string());
        assert_eq!(path("1-4"), None, "no root hub");
        for (bus, folder, version) in [
            (1, "pci0000:00/0000:00:14.0", "2.00"),
            (2, "pci0000:00/0000:00:14.0", "3.10"),
            (3, "pci0000:00/0000:00:1c.0/0000:0a:00.0", "1.10"),
            (4, "platform/dummy_hcd.0", "2.00"),
            (5, "platform/soc/fe9c0000.usb/xhci-hcd.3.auto", "2.00"),
            (6, "pci0000:00/0000:00:15.0/xhci-hcd.1", "2.00"),
        ] {
            hub_at(root, bus, folder, version);
        }
        for (port, expected) in [
            ("1-1.4", "pci-0000:00:14.0-usbv2-0:1.4"),
            ("2-7", "pci-0000:00:14.0-usbv3-0:7"),
            ("3-2", "pci-0000:0a:00.0-usbv1-0:2"),
            ("4-1", "platform-dummy_hcd.0-usbv2-0:1"),
            ("5-1", "platform-fe9c0000.usb-xhci-hcd-usbv2-0:1"),
            ("6-1", "pci-0000:00:15.0-platform-xhci-hcd.1-usbv2-0:1"),
        ] {
            assert_eq!(path(port).as_deref(), Some(expected), "{port}");
            let ports = ports_of(root, &expected.parse().unwrap());
            assert_eq!(ports, [port.parse().unwrap()], "{expected}");
        }
        assert_eq!(path("9-1"), None);
        assert!(ports_of(root, &"pci-0000:00:14.0-usbv1-0:4".parse().unwrap()).is_empty());
        // The socket of root port 4 of USB 2 has number 2 at the root hub of USB 3. A hub of USB 3
        // is plugged in there.
        peers(root, "usb2/2-0:1.0/usb2-port2", "../../../usb1/1-0:1.0/usb1-port4");
        peers(root, "usb1/1-0:1.0/usb1-port4", "../../../usb2/2-0:1.0/usb2-port2");
        peers(root, "2-2/2-2:1.0/2-2-port3", "../../../../usb1/1-4/1-4:1.0/1-4-port1");
        peers(root, "1-4/1-4:1.0/1-4-port1", "../../../../usb2/2-2/2-2:1.0/2-2-port3");
        for (port, expected) in [
            ("1-4", "pci-0000:00:14.0-usbv2-0:4"),
            ("2-2", "pci-0000:00:14.0-usbv2-0:4"),
            ("1-4.1", "pci-0000:00:14.0-usbv2-0:4.1"),
            ("2-2.3", "pci-0000:00:14.0-usbv2-0:4.1"),
            ("2-2.1", "pci-0000:00:14.0-usbv3-0:2.1"),
        ] {
            assert_eq!(path(port).as_deref(), Some(expected), "{port}");
        }
        let both = ports_of(root, &"pci-0000:00:14.0-usbv2-0:4.1".parse().unwrap());
        assert_eq!(both, ["1-4.1".parse().unwrap(), "2-2.3".parse().unwrap()]);
    }

    #[test]
    fn an_empty_port_differs_from_an_unreadable_one() {
        let root = tempfile::tempdir().unwrap();
        let port: PortPath = "1-1.4".parse().unwrap();
        assert_eq!(at_port(root.path(), &port).unwrap(), None);
        plug(
            root.path(),
            "1-1.4",
            &[
                ("idVendor", "0529"),
                ("idProduct", "0001"),
                ("busnum", "1"),
                ("devnum", "17"),
                ("serial", "A 1 "),
            ],
        );
        let seen = at_port(root.path(), &port).unwrap().unwrap();
        assert_eq!(seen.address, BusAddress::new(1, 17).unwrap());
        assert_eq!(seen.serial.as_deref(), Some("A 1"));
        plug(root.path(), "1-1.4", &[("devnum", "0")]);
        assert!(at_port(root.path(), &port).unwrap_err().to_string().contains("devnum"));
    }
}
