//! Ids: of a kind of device (vendor, product), of a device, of an instance, of a project.

use alloc::borrow::ToOwned;
use alloc::format;
use alloc::string::{String, ToString};
use core::fmt;
use core::str::FromStr;

use serde::{Serialize, Serializer};
use serde_json::Value;

use crate::ParseError;
use crate::json::{FromJson, number};

macro_rules! hex_id {
    ($name:ident, $what:literal) => {
        #[doc = concat!("A \
            USB ", $what, " id, 16 bits, from the device descriptor (USB 2.0, table 9-8).")]
        ///
        /// Written as four hexadecimal digits (`0529`), the way `lsusb` and sysfs write it. Read
        /// from one to four hexadecimal digits with or without `0x`; a JSON or TOML *number* is
        /// taken as its value.
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(u16);

        impl $name {
            /// From the number in a descriptor. Every 16-bit value is one.
            pub const fn new(value: u16) -> Self {
                Self(value)
            }
            /// The id as a number.
            pub const fn get(self) -> u16 {
                self.0
            }
        }

        impl FromStr for $name {
            type Err = ParseError;
            fn from_str(text: &str) -> Result<Self, ParseError> {
                hex4(text).map(Self).ok_or_else(|| {
                    ParseError::new(
                        format!("{text:?}"),
                        concat!(
                            "a ",
                            $what,
                            " id of one to four hexadecimal digits such as \"0529\" or \"0x0529\""
                        ),
                    )
                })
            }
        }

        impl FromJson for $name {
            fn from_json(value: &Value) -> Result<Self, ParseError> {
                match value {
                    Value::String(text) => text.parse(),
                    Value::Number(n) => number(value)
                        .and_then(|n| u16::try_from(n).ok())
                        .map(Self)
                        .ok_or_else(|| {
                            ParseError::new(n, concat!("a ", $what, " id from 0 to 65535 (0xffff)"))
                        }),
                    other => Err(ParseError::new(
                        other,
                        concat!(
                            "a ",
                            $what,
                            " id such \
                        as \"0529\""
                        ),
                    )),
                }
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:04x}", self.0)
            }
        }
        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(self, f)
            }
        }
        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }
    };
}

hex_id!(VendorId, "vendor");
hex_id!(ProductId, "product");

fn hex4(text: &str) -> Option<u16> {
    let digits = text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")).unwrap_or(text);
    let plain = (1..=4).contains(&digits.len()) && digits.bytes().all(|b| b.is_ascii_hexdigit());
    plain.then(|| u16::from_str_radix(digits, 16).ok()).flatten()
}

/// `vendor:product`: a kind of device, never one device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct UsbId {
    /// Vendor of the device.
    pub vendor: VendorId,
    /// Product, in the vendor's own numbering.
    pub product: ProductId,
}

impl UsbId {
    /// From the numbers in a device descriptor.
    pub const fn new(vendor: u16, product: u16) -> Self {
        Self { vendor: VendorId::new(vendor), product: ProductId::new(product) }
    }
}

impl fmt::Display for UsbId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.vendor, self.product)
    }
}

/// A device's id in the inventory, from 1 to 2⁵³ − 1, so that every JSON reader keeps it whole.
///
/// Unique over the fleet: `(compute_node_id − 1) × 1 000 000 + n`. Never used again for another
/// device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(transparent)]
pub struct DeviceId(u64);

impl DeviceId {
    /// The largest id: 2⁵³ − 1.
    pub const MAX: u64 = (1 << 53) - 1;

    /// `None` unless `1 <= value <= MAX`.
    pub const fn new(value: u64) -> Option<Self> {
        if value >= 1 && value <= Self::MAX { Some(Self(value)) } else { None }
    }
    /// The id as a number.
    pub const fn get(self) -> u64 {
        self.0
    }
}

impl FromStr for DeviceId {
    type Err = ParseError;
    fn from_str(text: &str) -> Result<Self, ParseError> {
        let digits = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
        digits.then(|| text.parse().ok().and_then(Self::new)).flatten().ok_or_else(|| {
            ParseError::new(format!("{text:?}"), "a device id, a whole number from 1")
        })
    }
}

impl FromJson for DeviceId {
    fn from_json(value: &Value) -> Result<Self, ParseError> {
        match value {
            Value::String(text) => text.parse(),
            other => number(other)
                .and_then(Self::new)
                .ok_or_else(|| ParseError::new(other, "a device id, a whole number from 1")),
        }
    }
}

impl fmt::Display for DeviceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// An instance's UUID (RFC 9562), kept in lower case with hyphens, as libvirt writes it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct InstanceId([u8; 16]);

impl FromStr for InstanceId {
    type Err = ParseError;
    /// Reads 32 hexadecimal digits; hyphens and surrounding white space are passed over, as libvirt
    /// does.
    fn from_str(text: &str) -> Result<Self, ParseError> {
        let wrong = || ParseError::new(format!("{text:?}"), "a UUID of 32 hexadecimal digits");
        let mut bytes = [0; 16];
        let mut digits = 0;
        for c in text.trim().chars().filter(|&c| c != '-') {
            let digit = c.to_digit(16).and_then(|d| u8::try_from(d).ok()).ok_or_else(wrong)?;
            let byte = bytes.get_mut(digits / 2).ok_or_else(wrong)?;
            *byte = *byte << 4 | digit;
            digits += 1;
        }
        if digits == 32 { Ok(Self(bytes)) } else { Err(wrong()) }
    }
}

impl fmt::Display for InstanceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, byte) in self.0.iter().enumerate() {
            if matches!(i, 4 | 6 | 8 | 10) {
                f.write_str("-")?;
            }
            write!(f, "{byte:02x}")?;
        }
        Ok(())
    }
}
impl fmt::Debug for InstanceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}
impl Serialize for InstanceId {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}
impl FromJson for InstanceId {
    fn from_json(value: &Value) -> Result<Self, ParseError> {
        value.as_str().ok_or_else(|| ParseError::new(value, "an instance's UUID"))?.parse()
    }
}

/// A project (tenant): an opaque name of 1 to 255 printable characters without white space.
///
/// Id of a project. Keystone writes UUIDs without hyphens here; the comparison ignores hyphens and
/// case.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(transparent)]
pub struct ProjectId(String);

impl ProjectId {
    /// The id as it was written.
    pub fn as_str(&self) -> &str {
        &self.0
    }
    /// Whether both name one project: a UUID is the same with and without hyphens, in either case.
    pub fn is(&self, other: &Self) -> bool {
        match (self.0.parse::<InstanceId>(), other.0.parse::<InstanceId>()) {
            (Ok(a), Ok(b)) => a == b,
            _ => self == other,
        }
    }
}

impl FromStr for ProjectId {
    type Err = ParseError;
    fn from_str(text: &str) -> Result<Self, ParseError> {
        let fits = (1..=255).contains(&text.chars().count());
        if fits && !text.chars().any(|c| c.is_control() || c.is_whitespace()) {
            Ok(Self(text.to_owned()))
        } else {
            Err(ParseError::new(
                format!("{text:?}"),
                "a project id of 1 to 255 characters without white space",
            ))
        }
    }
}

impl FromJson for ProjectId {
    fn from_json(value: &Value) -> Result<Self, ParseError> {
        value.as_str().ok_or_else(|| ParseError::new(value, "a project id"))?.parse()
    }
}

impl fmt::Display for ProjectId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl From<DeviceId> for String {
    fn from(id: DeviceId) -> String {
        id.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vendor_ids_are_read_as_people_write_them() {
        for text in ["529", "0529", "0x0529", "0X529"] {
            assert_eq!(text.parse::<VendorId>().unwrap().to_string(), "0529", "{text}");
        }
        for text in ["", "0x", "05290", "zz", "-1", "+529", " 529", "0x0x1"] {
            assert!(text.parse::<VendorId>().is_err(), "{text:?}");
        }
        assert_eq!(VendorId::from_json(&serde_json::json!(0x136b)).unwrap().to_string(), "136b");
        assert_eq!(VendorId::from_json(&serde_json::json!(1321.0)).unwrap().to_string(), "0529");
        assert!(VendorId::from_json(&serde_json::json!(70000)).is_err());
        assert!(VendorId::from_json(&serde_json::json!(1.5)).is_err());
    }

    #[test]
    fn device_ids_stay_below_two_to_the_53() {
        assert!("0".parse::<DeviceId>().is_err());
        assert!("9007199254740992".parse::<DeviceId>().is_err());
        assert_eq!("9007199254740991".parse::<DeviceId>().unwrap().get(), DeviceId::MAX);
    }

    #[test]
    fn uuids_compare_without_hyphens_and_case() {
        let a: InstanceId = "9A1F3C52-6C1B-4C6E-9B1C-2B6C3A7D8E9F".parse().unwrap();
        assert_eq!(a, "9a1f3c526c1b4c6e9b1c2b6c3a7d8e9f".parse().unwrap());
        assert_eq!(a.to_string(), "9a1f3c52-6c1b-4c6e-9b1c-2b6c3a7d8e9f");
        assert!("9a1f".parse::<InstanceId>().is_err());
        let p: ProjectId = "9a1f3c526c1b4c6e9b1c2b6c3a7d8e9f".parse().unwrap();
        assert!(p.is(&"9a1f3c52-6c1b-4c6e-9b1c-2b6c3a7d8e9f".parse().unwrap()));
    }
}
