//! A device as discovery sees it.

use alloc::string::String;
use alloc::vec::Vec;

use serde::Serialize;

use crate::{BusAddress, Class, Descriptors, DeviceKey, Speed};

/// A device as discovery saw it: plain data from any source.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Device {
    /// Identity of the device.
    pub key: DeviceKey,
    /// Where it is now.
    pub address: BusAddress,
    /// bDeviceClass of the device descriptor.
    pub class: Class,
    /// bInterfaceClass of each interface of the active configuration, ascending, each once.
    pub interfaces: Vec<Class>,
    /// The speed it runs at; `None` when neither libusb nor sysfs knew.
    pub speed: Option<Speed>,
    /// iManufacturer, or the vendor's name in usb.ids.
    pub manufacturer: Option<String>,
    /// iProduct, or the product's name in usb.ids.
    pub product: Option<String>,
    /// The kernel drivers bound to its interfaces, ascending, each once, joined by commas.
    pub driver: Option<String>,
    /// Use of the device by the host, in words (`mounted on /boot`); `None` if the host does not
    /// use it.
    pub host_use: Option<String>,
    /// Descriptors, byte for byte; `None` if sysfs does not have them.
    pub descriptors: Option<Descriptors>,
    /// Tells one stay in its port from the next, even under the same address: the inode of its
    /// sysfs folder. `None` where that is not known. It means nothing in another boot.
    pub generation: Option<i64>,
}

impl Device {
    /// Whether the device or one of its interfaces is of `class`.
    pub fn is_of(&self, class: Class) -> bool {
        self.class == class || self.interfaces.contains(&class)
    }
    /// Hubs are never offered: a guest with a hub would get every device behind it.
    pub fn is_hub(&self) -> bool {
        self.is_of(Class::HUB)
    }
}

/// A part of the scan that could not be read. Problems are carried along, because unreadable is not
/// absent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Problem {
    /// The port path (`1-1.4`) or file that it is about; empty for the whole scan.
    pub place: String,
    /// Description of the problem.
    pub what: String,
}
