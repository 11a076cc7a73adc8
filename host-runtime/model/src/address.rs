//! *Where a device is now*: its address on the bus and the port that it is plugged into.

use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use core::fmt;
use core::str::FromStr;

use serde::{Serialize, Serializer};
use serde_json::Value;

use crate::ParseError;
use crate::json::FromJson;

/// Bus and device number: what libvirt is given. Changes at every replug.
///
/// A bus is 1–255, a device 1–127 (USB 2.0, 8.3.2.1). Displays as `usb_<bus>_<device>`, the
/// spelling of the inventory's `address` column; [`FromStr`] reads that and `BBB:DDD`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BusAddress {
    bus: u8,
    device: u8,
}

impl BusAddress {
    /// `None` unless bus is at least 1 and device 1–127.
    pub const fn new(bus: u8, device: u8) -> Option<Self> {
        if bus >= 1 && device >= 1 && device <= 127 { Some(Self { bus, device }) } else { None }
    }
    /// The bus number, 1–255.
    pub const fn bus(self) -> u8 {
        self.bus
    }
    /// The device number on that bus, 1–127.
    pub const fn device(self) -> u8 {
        self.device
    }
}

impl fmt::Display for BusAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "usb_{}_{}", self.bus, self.device)
    }
}

impl FromStr for BusAddress {
    type Err = ParseError;
    fn from_str(text: &str) -> Result<Self, ParseError> {
        let pair = match text.strip_prefix("usb_") {
            Some(rest) => rest.split_once('_'),
            None => text.split_once(':'),
        };
        pair.and_then(|(bus, device)| Self::new(decimal(bus)?, decimal(device)?)).ok_or_else(|| {
            ParseError::new(
                format!("{text:?}"),
                "a bus address such as usb_2_3 (bus 1-255, device 1-127)",
            )
        })
    }
}

impl Serialize for BusAddress {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// The physical port: the bus, then the port number at each hub on the way, `1-1.4`. The kernel's
/// own name for the device's folder under `/sys/bus/usb/devices`. One to seven ports of 1–255 (USB
/// allows seven tiers).
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PortPath {
    bus: u8,
    ports: Vec<u8>,
}

impl PortPath {
    /// `None` unless there are one to seven ports, each at least 1, on a bus of at least 1.
    pub fn new(bus: u8, ports: &[u8]) -> Option<Self> {
        let fits = bus >= 1 && (1..=7).contains(&ports.len()) && !ports.contains(&0);
        fits.then(|| Self { bus, ports: ports.to_vec() })
    }
    /// The bus (root hub) that the path starts from.
    pub const fn bus(&self) -> u8 {
        self.bus
    }
    /// The port at each hub, from the root on; never empty.
    pub fn ports(&self) -> &[u8] {
        &self.ports
    }
    /// The last number: the port at the hub that the device is plugged into.
    pub fn port_id(&self) -> u8 {
        self.ports.last().copied().unwrap_or_default()
    }
}

impl fmt::Display for PortPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.bus)?;
        for (i, port) in self.ports.iter().enumerate() {
            write!(f, "{}{port}", if i == 0 { '-' } else { '.' })?;
        }
        Ok(())
    }
}
impl fmt::Debug for PortPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for PortPath {
    type Err = ParseError;
    fn from_str(text: &str) -> Result<Self, ParseError> {
        let path = || {
            let (bus, ports) = text.split_once('-')?;
            let ports: Vec<u8> = ports.split('.').map(decimal).collect::<Option<_>>()?;
            Self::new(decimal(bus)?, &ports)
        };
        path().ok_or_else(|| {
            ParseError::new(
                format!("{text:?}"),
                "a port path such as \"1-1.4\" (bus, then the port at each hub)",
            )
        })
    }
}

impl FromJson for PortPath {
    fn from_json(value: &Value) -> Result<Self, ParseError> {
        String::from_json(value)?.parse()
    }
}

impl Serialize for PortPath {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.to_string())
    }
}

/// Where a device is plugged in, independent of bus numbers: the controller, the USB version of its
/// root hub, and the port at each hub, as in `pci-0000:00:14.0-usbv2-0:1.4`. This is udev's
/// `ID_PATH_WITH_USB_REVISION` (systemd, `src/udev/udev-builtin-path_id.c`).
///
/// The kernel assigns bus numbers at boot, in the order in which it finds the controllers. A
/// [`PortPath`] begins with a bus number, so it may name another socket after a reboot. A device
/// path names the same socket.
///
/// A socket of USB 3 has a port at two root hubs. It has one path here: that of its USB 2 port.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DevicePath {
    controller: String,
    version: u8,
    ports: Vec<u8>,
}

impl DevicePath {
    /// The longest controller name, in bytes.
    const MAX_CONTROLLER: usize = 200;

    /// `None` unless the controller has 1 to 200 letters, digits and `-_.:@,+`, the USB version is
    /// 1 to 9, and there are one to seven ports, each at least 1.
    pub fn new(controller: &str, version: u8, ports: &[u8]) -> Option<Self> {
        let plain = |b: u8| b.is_ascii_alphanumeric() || b"-_.:@,+".contains(&b);
        let named =
            (1..=Self::MAX_CONTROLLER).contains(&controller.len()) && controller.bytes().all(plain);
        let fits = named
            && (1..=9).contains(&version)
            && (1..=7).contains(&ports.len())
            && !ports.contains(&0);
        fits.then(|| Self { controller: controller.to_string(), version, ports: ports.to_vec() })
    }
    /// The controller, such as `pci-0000:00:14.0`.
    pub fn controller(&self) -> &str {
        &self.controller
    }
    /// The major USB version of the root hub: 1, 2 or 3.
    pub const fn version(&self) -> u8 {
        self.version
    }
    /// The port at each hub, from the root hub on; never empty.
    pub fn ports(&self) -> &[u8] {
        &self.ports
    }
}

impl fmt::Display for DevicePath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-usbv{}-0", self.controller, self.version)?;
        for (i, port) in self.ports.iter().enumerate() {
            write!(f, "{}{port}", if i == 0 { ':' } else { '.' })?;
        }
        Ok(())
    }
}
impl fmt::Debug for DevicePath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for DevicePath {
    type Err = ParseError;
    fn from_str(text: &str) -> Result<Self, ParseError> {
        let path = || {
            let (controller, rest) = text.rsplit_once("-usbv")?;
            let (version, ports) = rest.split_once("-0:")?;
            let ports: Vec<u8> = ports.split('.').map(decimal).collect::<Option<_>>()?;
            Self::new(controller, decimal(version)?, &ports)
        };
        path().ok_or_else(|| {
            ParseError::new(
                format!("{text:?}"),
                "a device path such as \"pci-0000:00:14.0-usbv2-0:1.4\" ('virt-usb devices --json' \
                    shows it)",
            )
        })
    }
}

impl FromJson for DevicePath {
    fn from_json(value: &Value) -> Result<Self, ParseError> {
        String::from_json(value)?.parse()
    }
}

impl Serialize for DevicePath {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.to_string())
    }
}

fn decimal(text: &str) -> Option<u8> {
    let digits = (1..=3).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_digit());
    digits.then(|| text.parse().ok()).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_and_ports_read_what_they_write() {
        for text in ["usb_2_3", "usb_255_127"] {
            assert_eq!(text.parse::<BusAddress>().unwrap().to_string(), text);
        }
        assert_eq!("003:017".parse::<BusAddress>().unwrap(), BusAddress::new(3, 17).unwrap());
        for text in ["usb_0_1", "usb_1_128", "usb_1", "usb_1_2_3", "1-2", "", "usb_+1_2"] {
            assert!(text.parse::<BusAddress>().is_err(), "{text}");
        }
        for text in ["1-1", "1-1.4", "12-3.1.2.255"] {
            assert_eq!(text.parse::<PortPath>().unwrap().to_string(), text);
        }
        for text in
            ["usb1", "1-", "1-0", "1-1.", "1-1..2", "0-1", "1-1.2.3.4.5.6.7.8", "1-1:1.0", "1-+1"]
        {
            assert!(text.parse::<PortPath>().is_err(), "{text}");
        }
        for text in [
            "pci-0000:00:14.0-usbv2-0:1.4",
            "platform-dummy_hcd.0-usbv3-0:1",
            "a-usbv2-0:1-usbv1-0:1.2.3.4.5.6.255",
        ] {
            assert_eq!(text.parse::<DevicePath>().unwrap().to_string(), text);
        }
        for text in [
            "",
            "-usbv2-0:1",
            "pci-0000:00:14.0-usb-0:1.4",
            "pci-0000:00:14.0-usbv0-0:1",
            "pci-0000:00:14.0-usbv2-0:0",
            "pci-0000:00:14.0-usbv2-0:1.",
            "pci-0000:00:14.0-usbv2-0:1.2.3.4.5.6.7.8",
            "pci-0000:00:14.0-usbv2-0:1.4:1.0",
            "pci 0-usbv2-0:1",
            "1-1.4",
        ] {
            assert!(text.parse::<DevicePath>().is_err(), "{text}");
        }
        let port: PortPath = "12-1.4".parse().unwrap();
        assert_eq!((port.bus(), port.ports(), port.port_id()), (12, &[1, 4][..], 4));
    }
}
