//! Names for devices without string descriptors, from <http://www.linux-usb.org/usb-ids.html>,
//! compiled in.

use usb_ids::FromId;
use virt_usb_model::{UsbId, clean_text};

/// Name of the vendor in usb.ids.
pub(super) fn vendor(usb: UsbId) -> Option<String> {
    usb_ids::Vendor::from_id(usb.vendor.get()).and_then(|vendor| clean_text(vendor.name()))
}

/// Name of the product in usb.ids.
pub(super) fn product(usb: UsbId) -> Option<String> {
    usb_ids::Device::from_vid_pid(usb.vendor.get(), usb.product.get())
        .and_then(|device| clean_text(device.name()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_kinds_have_names() {
        let root_hub = UsbId::new(0x1d6b, 2);
        assert_eq!(vendor(root_hub).unwrap(), "Linux Foundation");
        assert_eq!(product(root_hub).unwrap(), "2.0 root hub");
        assert_eq!(vendor(UsbId::new(0xdead, 0xbeef)), None);
        assert_eq!(product(UsbId::new(0x1d6b, 0xbeef)), None);
    }
}
