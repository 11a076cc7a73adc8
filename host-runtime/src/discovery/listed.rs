//! Devices that libusb lists.
//!
//! libusb takes descriptors from the kernel's cache and does not need to open a device for them.
//! Only string descriptors cost a transfer, and they are requested only if sysfs has none.

use std::time::Duration;

use rusb::{Context, DeviceDescriptor};
use virt_usb_model::{BusAddress, Class, PortPath, Speed, UsbId, clean_text};

/// Timeout for one string descriptor. Most devices need less than 1 ms.
const STRING_TIMEOUT: Duration = Duration::from_millis(200);

/// One device in libusb's list.
pub(super) struct Listed {
    device: rusb::Device<Context>,
    descriptor: DeviceDescriptor,
}

/// Reads the descriptors of all devices except root hubs. Also returns the problems.
pub(super) fn read_all(devices: Vec<rusb::Device<Context>>) -> (Vec<Listed>, Vec<String>) {
    let mut listed = Vec::new();
    let mut wrong = Vec::new();
    for device in devices {
        match device.device_descriptor() {
            Ok(descriptor) => listed.push(Listed { device, descriptor }),
            Err(e) => {
                let (bus, number) = (device.bus_number(), device.address());
                wrong.push(format!(
                    "libusb cannot read the descriptor of bus {bus} device {number}: {e}"
                ));
            }
        }
    }
    listed.retain(|listed| !listed.is_root_hub());
    (listed, wrong)
}

impl Listed {
    /// Whether this is a root hub, which has no port.
    fn is_root_hub(&self) -> bool {
        self.class() == Class::HUB && self.ports().is_empty()
    }

    fn ports(&self) -> Vec<u8> {
        self.device.port_numbers().unwrap_or_default()
    }

    /// Describes the device, as in `0529:0001 (bus 1 device 5)`.
    pub(super) fn describe(&self) -> String {
        format!(
            "{} (bus {} device {})",
            self.usb(),
            self.device.bus_number(),
            self.device.address()
        )
    }

    pub(super) fn usb(&self) -> UsbId {
        UsbId::new(self.descriptor.vendor_id(), self.descriptor.product_id())
    }

    /// Address of the device. `None` if USB does not allow the numbers.
    pub(super) fn address(&self) -> Option<BusAddress> {
        BusAddress::new(self.device.bus_number(), self.device.address())
    }

    /// Port path of the device in libusb's view, which leaves out hubs that libusb does not list.
    /// If sysfs shows the device, its port path takes precedence.
    pub(super) fn port(&self) -> Option<PortPath> {
        PortPath::new(self.device.bus_number(), &self.ports())
    }

    pub(super) fn class(&self) -> Class {
        Class::new(self.descriptor.class_code())
    }

    /// Classes of the interfaces of the active configuration, or of the first if none is active.
    pub(super) fn interfaces(&self) -> rusb::Result<Vec<Class>> {
        let active = self.device.active_config_descriptor();
        let config = active.or_else(|_| self.device.config_descriptor(0))?;
        if config.num_interfaces() == 0 {
            return Ok(Vec::new());
        }
        let settings = config.interfaces().flat_map(|interface| interface.descriptors());
        Ok(settings.map(|setting| Class::new(setting.class_code())).collect())
    }

    pub(super) fn speed(&self) -> Option<Speed> {
        Some(match self.device.speed() {
            rusb::Speed::Low => Speed::Low,
            rusb::Speed::Full => Speed::Full,
            rusb::Speed::High => Speed::High,
            rusb::Speed::Super => Speed::Super,
            rusb::Speed::SuperPlus => Speed::SuperPlus,
            _ => return None,
        })
    }

    pub(super) fn has_serial(&self) -> bool {
        self.descriptor.serial_number_string_index().is_some()
    }

    /// The wanted strings that the device has.
    pub(super) fn has(&self, wanted: Wanted) -> Wanted {
        Wanted {
            serial: wanted.serial && self.has_serial(),
            manufacturer: wanted.manufacturer
                && self.descriptor.manufacturer_string_index().is_some(),
            product: wanted.product && self.descriptor.product_string_index().is_some(),
        }
    }

    /// Opens the device and requests the wanted strings that it [has](Self::has). Does not open the
    /// device if there are none. Stops at the first failure, because a device that does not respond
    /// would cost the timeout each time.
    pub(super) fn strings(&self, wanted: Wanted) -> Strings {
        let mut strings = Strings::default();
        let wanted = self.has(wanted);
        if wanted != Wanted::default() {
            let read = self.read_strings(wanted, &mut strings);
            strings.failure = read.err().map(|e| format!("libusb cannot read its strings: {e}"));
        }
        strings
    }

    fn read_strings(&self, wanted: Wanted, strings: &mut Strings) -> rusb::Result<()> {
        let handle = self.device.open()?;
        let Some(&language) = handle.read_languages(STRING_TIMEOUT)?.first() else { return Ok(()) };
        let read = |wanted: bool, index: Option<u8>| match index.filter(|_| wanted) {
            None => Ok(None),
            Some(index) => handle
                .read_string_descriptor(language, index, STRING_TIMEOUT)
                .map(|text| clean_text(&text)),
        };
        strings.serial = read(wanted.serial, self.descriptor.serial_number_string_index())?;
        strings.product = read(wanted.product, self.descriptor.product_string_index())?;
        strings.manufacturer =
            read(wanted.manufacturer, self.descriptor.manufacturer_string_index())?;
        Ok(())
    }
}

/// Strings that sysfs lacks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Wanted {
    pub(super) serial: bool,
    pub(super) manufacturer: bool,
    pub(super) product: bool,
}

/// Strings that a device returned.
#[derive(Debug, Default)]
pub(super) struct Strings {
    pub(super) serial: Option<String>,
    pub(super) product: Option<String>,
    pub(super) manufacturer: Option<String>,
    pub(super) failure: Option<String>,
}
