//! What discovery knows of one device.

use alloc::string::String;
use alloc::vec::Vec;

use serde::Serialize;

use crate::{BusAddress, Class, Descriptors, DeviceKey, Speed};

/// One device as discovery saw it: plain data, whoever the source was.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Device {
    /// Who it is.
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
    /// What the host itself uses it for, in words (`mounted on /boot`); `None` when it does not.
    pub host_use: Option<String>,
    /// What it says it is, byte for byte; `None` where sysfs does not tell.
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
    /// Hubs are never offered: whoever gets one gets everything behind it.
    pub fn is_hub(&self) -> bool {
        self.is_of(Class::HUB)
    }
}

/// What could not be read while looking for devices. Carried along: unreadable is not absent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Problem {
    /// The port path (`1-1.4`) or file that it is about; empty for the whole scan.
    pub place: String,
    /// What went wrong, in words.
    pub what: String,
}
