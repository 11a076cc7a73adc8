//! USB classes (the USB-IF's defined class codes) and speeds.

use alloc::format;
use alloc::string::String;
use core::fmt;
use core::str::FromStr;

use serde::{Serialize, Serializer};
use serde_json::Value;

use crate::ParseError;
use crate::json::{FromJson, number};

/// A base class code of a device or an interface, 8 bits
/// (<https://www.usb.org/defined-class-codes>).
///
/// Written as two hexadecimal digits (`08`). Read from one or two hexadecimal digits with or
/// without `0x`, from a number, or from a name: `mass-storage`, `hid`, `printer`, `video`,
/// `smart-card`, …
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Class(u8);

const NAMES: &[(u8, &str)] = &[
    (0x00, "per-interface"),
    (0x01, "audio"),
    (0x02, "communications"),
    (0x03, "hid"),
    (0x05, "physical"),
    (0x06, "image"),
    (0x07, "printer"),
    (0x08, "mass-storage"),
    (0x09, "hub"),
    (0x0a, "cdc-data"),
    (0x0b, "smart-card"),
    (0x0d, "content-security"),
    (0x0e, "video"),
    (0x0f, "healthcare"),
    (0x10, "audio-video"),
    (0x11, "billboard"),
    (0x12, "type-c-bridge"),
    (0xdc, "diagnostic"),
    (0xe0, "wireless"),
    (0xef, "miscellaneous"),
    (0xfe, "application-specific"),
    (0xff, "vendor-specific"),
];

impl Class {
    /// A hub: never offered to anybody.
    pub const HUB: Self = Self(0x09);
    /// Class of mass storage devices.
    pub const MASS_STORAGE: Self = Self(0x08);
    /// Human interface devices: keyboards, mice, many licence keys.
    pub const HID: Self = Self(0x03);

    /// From the number in a descriptor. Every 8-bit value is one.
    pub const fn new(code: u8) -> Self {
        Self(code)
    }
    /// Number of the class.
    pub const fn get(self) -> u8 {
        self.0
    }
    /// Names of all classes that have one, in the order of their codes.
    pub fn names() -> impl Iterator<Item = &'static str> {
        NAMES.iter().map(|(_, name)| *name)
    }
    /// The usual name, where the code has one.
    pub fn name(self) -> Option<&'static str> {
        NAMES.iter().find(|(code, _)| *code == self.0).map(|(_, name)| *name)
    }
}

impl FromStr for Class {
    type Err = ParseError;
    fn from_str(text: &str) -> Result<Self, ParseError> {
        let lower = text.to_ascii_lowercase().replace(['_', ' '], "-");
        if let Some((code, _)) = NAMES.iter().find(|(_, name)| *name == lower) {
            return Ok(Self(*code));
        }
        let digits = lower.strip_prefix("0x").unwrap_or(&lower);
        let plain =
            (1..=2).contains(&digits.len()) && digits.bytes().all(|b| b.is_ascii_hexdigit());
        plain.then(|| u8::from_str_radix(digits, 16).ok()).flatten().map(Self).ok_or_else(|| {
            ParseError::new(
                format!("{text:?}"),
                "a USB class: two hexadecimal digits such as \"08\" or a name such \
                    as \"mass-storage\"",
            )
        })
    }
}

impl FromJson for Class {
    fn from_json(value: &Value) -> Result<Self, ParseError> {
        match number(value) {
            Some(n) => u8::try_from(n)
                .map(Self)
                .map_err(|_| ParseError::new(value, "a USB class from 0 to 255 (0xff)")),
            None => String::from_json(value)?.parse(),
        }
    }
}

impl fmt::Display for Class {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:02x}", self.0)
    }
}
impl fmt::Debug for Class {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}
impl Serialize for Class {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// The speed that a device runs at, or a port offers. Ordered from slow to fast.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Speed {
    /// 1.5 Mbit/s
    Low,
    /// 12 Mbit/s
    Full,
    /// 480 Mbit/s
    High,
    /// 5 Gbit/s
    Super,
    /// 10 Gbit/s and more
    SuperPlus,
}

impl Speed {
    /// The name in the USB specifications.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Low => "low",
            Self::Full => "full",
            Self::High => "high",
            Self::Super => "super",
            Self::SuperPlus => "super-plus",
        }
    }
}

impl fmt::Display for Speed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Speed {
    type Err = ParseError;
    /// Reads a name (`high`) or sysfs's Mbit/s (`480`).
    fn from_str(text: &str) -> Result<Self, ParseError> {
        Ok(match text {
            "low" | "1.5" => Self::Low,
            "full" | "12" => Self::Full,
            "high" | "480" => Self::High,
            "super" | "5000" => Self::Super,
            "super-plus" | "10000" | "20000" | "40000" => Self::SuperPlus,
            other => {
                return Err(ParseError::new(
                    format!("{other:?}"),
                    "a speed: low, full, high, super, super-plus, or Mbit/s as sysfs has it",
                ));
            }
        })
    }
}

impl FromJson for Speed {
    fn from_json(value: &Value) -> Result<Self, ParseError> {
        match value {
            Value::Number(n) => format!("{n}").parse(),
            other => String::from_json(other)?.parse(),
        }
    }
}

impl Serialize for Speed {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::string::ToString;

    #[test]
    fn classes_by_code_and_by_name() {
        for text in ["08", "8", "0x08", "mass-storage", "Mass_Storage"] {
            assert_eq!(text.parse::<Class>().unwrap().to_string(), "08", "{text}");
        }
        for text in ["100", "usb-stick", "", "0x", "+8", "0g"] {
            assert!(text.parse::<Class>().is_err(), "{text}");
        }
        assert_eq!((Class::HUB.get(), Class::HID.get()), (0x09, 0x03));
        assert_eq!(Class::from_json(&serde_json::json!(8.0)).unwrap(), Class::new(8));
        assert!(Class::from_json(&serde_json::json!(8.5)).is_err());
        assert_eq!(
            Class::from_json(&serde_json::json!(255)).unwrap().name(),
            Some("vendor-specific")
        );
    }

    #[test]
    fn speeds_are_ordered() {
        assert!(
            Speed::Low < Speed::Full
                && Speed::High < Speed::Super
                && Speed::Super < Speed::SuperPlus
        );
        for (mbits, name) in [
            ("1.5", "low"),
            ("12", "full"),
            ("480", "high"),
            ("5000", "super"),
            ("20000", "super-plus"),
        ] {
            let speed: Speed = mbits.parse().unwrap();
            assert_eq!((speed.to_string().as_str(), name.parse()), (name, Ok(speed)));
        }
        assert!("fast".parse::<Speed>().is_err());
    }
}
