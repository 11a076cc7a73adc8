//! What the kernel says of the device at a port, right now.
//!
//! The inventory's address is a memory; this is the fact. Sources: `Documentation/ABI/testing/sysfs-bus-usb` and
//! `Documentation/ABI/stable/sysfs-bus-usb` of the kernel.

use std::io::{self, Read};
use std::path::{Path, PathBuf};

use virt_usb_model::{BusAddress, Class, PortPath, UsbId, VendorId, clean_text};

/// Who is at a port, and under which address.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seen {
    /// idVendor and idProduct.
    pub usb: UsbId,
    /// The serial number, cleaned as discovery cleans it.
    pub serial: Option<String>,
    /// busnum and devnum.
    pub address: BusAddress,
}

/// The port could not be read: not the same as empty.
#[derive(Debug, thiserror::Error)]
#[error("cannot read {path}: {reason}")]
pub struct SysfsError {
    path: PathBuf,
    reason: String,
}

/// The folder in which the kernel shows the device at `port`.
pub fn device_dir(sysfs_root: &Path, port: &PortPath) -> PathBuf {
    sysfs_root.join("bus/usb/devices").join(port.to_string())
}

/// Reads the device at `port`; `None` when nothing is plugged in there.
///
/// # Errors
/// When the folder is there but does not say who it is.
pub fn at_port(sysfs_root: &Path, port: &PortPath) -> Result<Option<Seen>, SysfsError> {
    seen(&device_dir(sysfs_root, port))
}

/// Reads the device whose folder this is, at a port or a root hub's.
fn seen(dir: &Path) -> Result<Option<Seen>, SysfsError> {
    // idVendor first: a device that goes away while it is read leaves no half answer.
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
    Ok(Some(Seen { usb: UsbId { vendor, product }, serial: serial.as_deref().and_then(clean_text), address }))
}

/// A hub of this host that `wanted` is true of, by the kernel's name for it: root hubs (`usb1`) too. What cannot be read is none.
pub fn hub(sysfs_root: &Path, wanted: impl Fn(UsbId, BusAddress) -> bool) -> Option<String> {
    let all = std::fs::read_dir(sysfs_root.join("bus/usb/devices")).ok()?;
    all.flatten().find_map(|entry| {
        let dir = entry.path();
        let class = attribute(&dir, "bDeviceClass").ok()??;
        if class.parse::<Class>().ok()? != Class::HUB {
            return None;
        }
        let hub = seen(&dir).ok()??;
        wanted(hub.usb, hub.address).then(|| entry.file_name().to_string_lossy().into_owned())
    })
}

/// One attribute, without its line end; `None` when it is not there (or its device went away). Bytes that are not
/// UTF-8 are replaced: serials come from outsiders.
///
/// # Errors
/// Anything but "not there": permission denied, an I/O error.
pub fn attribute(dir: &Path, name: &str) -> Result<Option<String>, SysfsError> {
    let path = dir.join(name);
    // sysfs gives a whole attribute, at most a page, in one read.
    let mut page = [0; 4096];
    let read = std::fs::File::open(&path).and_then(|mut file| file.read(&mut page));
    match read {
        Ok(length) => Ok(Some(
            String::from_utf8_lossy(page.get(..length).unwrap_or_default()).trim_end_matches('\n').to_owned(),
        )),
        Err(e) if is_absent(&e) => Ok(None),
        Err(e) => Err(SysfsError { path, reason: e.to_string() }),
    }
}

/// The device or its attribute is not there: no such file, or it vanished between open and read.
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
        assert_eq!(hub(root.path(), |_, a| a == at(2, 1)).as_deref(), Some("usb2"));
        assert_eq!(hub(root.path(), |_, a| a == at(2, 7)), None);
        assert_eq!(hub(root.path(), |usb, _| usb == UsbId::new(0x1d6b, 2)).as_deref(), Some("usb2"));
        assert_eq!(hub(&root.path().join("nowhere"), |_, _| true), None);
    }

    #[test]
    fn reads_who_is_there_and_tells_empty_from_unreadable() {
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
