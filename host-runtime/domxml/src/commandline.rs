//! USB host devices in `<qemu:commandline>`: libvirt hands these arguments to QEMU unread, so no
//! hostdev shows them.
//!
//! The properties are those of QEMU's `usb-host` (`hw/usb/host-libusb.c`); the spellings are those
//! of `-device` (`system/vl.c`, `util/keyval.c`): `usb-host,hostbus=1,hostport=1.4`, or a JSON
//! object.

use std::collections::BTreeMap;

use virt_usb_model::{BusAddress, UsbId, members};

use crate::device::{host_port, number};
use crate::domain::UsbHostdev;

/// The driver's name.
const DRIVER: &str = "usb-host";
/// The longest argument that is read, in bytes: a `usb-host` with all of its properties has some
/// hundred.
const MAX_ARGUMENT: usize = 4096;

/// Whether the argument behind this one is a device.
pub(crate) fn is_device_option(argument: &str) -> bool {
    matches!(argument, "-device" | "--device")
}

/// The host device that the value of `-device` names; `None` for any other device.
pub(crate) fn usb_host(value: &str) -> Option<UsbHostdev> {
    if value.len() > MAX_ARGUMENT {
        return None;
    }
    let properties =
        if value.trim_start().starts_with('{') { members(value)? } else { options(value) };
    let get = |name: &str| properties.get(name).map(String::as_str);
    if get("driver") != Some(DRIVER) {
        return None;
    }
    let value = |name: &str| number(get(name)?);
    let id = |name: &str| value(name)?.try_into().ok();
    let (bus, device) = (value("hostbus"), value("hostaddr"));
    let byte = |number: Option<u32>| number?.try_into().ok();
    Some(UsbHostdev {
        usb: id("vendorid")
            .zip(id("productid"))
            .map(|(vendor, product)| UsbId::new(vendor, product)),
        address: get("hostdevice")
            .and_then(node)
            .or_else(|| BusAddress::new(byte(bus)?, byte(device)?)),
        port: bus.zip(get("hostport")).and_then(|(bus, port)| host_port(bus, port)),
        ..UsbHostdev::default()
    })
}

/// `usb-host,id=stick,vendorid=0x0529`: the first value without a name is the driver's. A comma in
/// a value is doubled.
fn options(value: &str) -> BTreeMap<String, String> {
    const COMMA: char = '\u{0}';
    let mut properties = BTreeMap::new();
    for (at, option) in value.replace(",,", &COMMA.to_string()).split(',').enumerate() {
        let (name, value) = match option.split_once('=') {
            Some((name, value)) => (name, value),
            None if at == 0 => ("driver", option),
            None => continue,
        };
        properties.insert(name.to_owned(), value.replace(COMMA, ","));
    }
    properties
}

/// `/dev/bus/usb/001/005`: these numbers are decimal, whatever they begin with.
fn node(path: &str) -> Option<BusAddress> {
    let (bus, device) = path.strip_prefix("/dev/bus/usb/")?.split_once('/')?;
    BusAddress::new(bus.parse().ok()?, device.parse().ok()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(value: &str) -> (Option<String>, Option<String>, Option<String>) {
        let device = usb_host(value).unwrap();
        (
            device.usb.map(|u| u.to_string()),
            device.address.map(|a| a.to_string()),
            device.port.map(|p| p.to_string()),
        )
    }

    #[test]
    fn the_device_is_read_in_every_spelling() {
        let some = |text: &str| Some(text.to_owned());
        let cases = [
            ("usb-host,vendorid=0x0529,productid=0x1", (some("0529:0001"), None, None)),
            ("usb-host,vendorid=1321,productid=1,id=a,,b", (some("0529:0001"), None, None)),
            ("driver=usb-host,hostbus=1,hostaddr=5", (None, some("usb_1_5"), None)),
            ("usb-host,id=x,hostbus=1,hostport=1.4", (None, None, some("1-1.4"))),
            ("usb-host,hostdevice=/dev/bus/usb/001/012", (None, some("usb_1_12"), None)),
            (r#"{"driver":"usb-host","hostbus":1,"hostport":"1.4"}"#, (None, None, some("1-1.4"))),
            (
                r#" {"driver":"usb-host","vendorid":1321,"productid":1}"#,
                (some("0529:0001"), None, None),
            ),
            ("usb-host", (None, None, None)),
            ("usb-host,hostport=1.4", (None, None, None)),
            ("usb-host,vendorid=0x10529,productid=1", (None, None, None)),
            ("usb-host,hostbus=1,hostport=", (None, None, None)),
        ];
        for (value, wanted) in cases {
            assert_eq!(read(value), wanted, "{value}");
        }
        for other in
            ["usb-hostile", "usb-tablet,id=usb-host", "", "{", "[]", r#"{"driver":7}"#, "a=b"]
        {
            assert_eq!(usb_host(other), None, "{other}");
        }
    }
}
