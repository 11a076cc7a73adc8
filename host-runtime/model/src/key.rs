//! *Who a device is*: what stays the same when it is plugged in again.

use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;
use core::fmt;

use serde::Serialize;

use crate::{ParseError, PortPath, UsbId};

/// A device's serial number, as far as it tells devices apart.
///
/// Vendors print the same serial on a whole production run more often than one would think: a serial that was seen
/// on two devices of the same kind identifies neither.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(tag = "kind", content = "value", rename_all = "lowercase")]
pub enum Serial {
    /// Only one device of this kind with this serial has been seen.
    Unique(String),
    /// At least two devices of this kind carry it: only the port tells them apart.
    Duplicate(String),
    /// The device has none (iSerialNumber is 0).
    Missing,
}

impl Serial {
    /// The text of the descriptor, if there is one.
    pub fn text(&self) -> Option<&str> {
        match self {
            Self::Unique(text) | Self::Duplicate(text) => Some(text),
            Self::Missing => None,
        }
    }
    /// `unique`, `duplicate` or `missing`: the spelling of the inventory.
    pub const fn kind(&self) -> &'static str {
        match self {
            Self::Unique(_) => "unique",
            Self::Duplicate(_) => "duplicate",
            Self::Missing => "missing",
        }
    }
    /// From the descriptor's text and whether another device of the kind carries the same.
    pub fn new(text: Option<String>, duplicate: bool) -> Self {
        match text {
            None => Self::Missing,
            Some(text) if duplicate => Self::Duplicate(text),
            Some(text) => Self::Unique(text),
        }
    }
}

/// What identifies a device across replugs: its kind, its serial and, where that does not decide, its port.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DeviceKey {
    /// vendor:product
    pub usb: UsbId,
    /// The serial, and what it is worth.
    pub serial: Serial,
    /// Where it is plugged in.
    pub port: PortPath,
}

impl DeviceKey {
    /// Whether both are one device, seen twice.
    ///
    /// The same kind and the same serial text are needed. Then a serial that is unique on both sides decides
    /// wherever the device is plugged in; otherwise it must be the same port. The same port with another kind or
    /// another serial is another device.
    pub fn is(&self, other: &Self) -> bool {
        self.usb == other.usb
            && self.serial.text() == other.serial.text()
            && (self.port == other.port || (self.serial_decides() && other.serial_decides()))
    }

    const fn serial_decides(&self) -> bool {
        matches!(self.serial, Serial::Unique(_))
    }
}

/// Kinds that one device shows in turn: before and after its firmware is loaded, in use and in its update mode (DFU).
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Aliases(Vec<Vec<UsbId>>);

impl Aliases {
    /// Groups of kinds, `vendor:product` each.
    ///
    /// # Errors
    /// When a group names fewer than two kinds, or a kind stands in two groups.
    pub fn parse(groups: &[Vec<String>]) -> Result<Self, ParseError> {
        let mut read: Vec<Vec<UsbId>> = Vec::new();
        for group in groups {
            let mut kinds: Vec<UsbId> = Vec::new();
            for text in group {
                let kind = text
                    .split_once(':')
                    .and_then(|(vendor, product)| {
                        Some(UsbId { vendor: vendor.parse().ok()?, product: product.parse().ok()? })
                    })
                    .ok_or_else(|| {
                        ParseError::new(format!("{text:?}"), "vendor:product such as \"1a6e:089a\"")
                    })?;
                if kinds.contains(&kind) || read.iter().any(|other| other.contains(&kind)) {
                    return Err(ParseError::new(format!("{text:?} twice"), "each kind once"));
                }
                kinds.push(kind);
            }
            if kinds.len() < 2 {
                return Err(ParseError::new("a list of fewer than two", "the kinds that one device shows"));
            }
            read.push(kinds);
        }
        Ok(Self(read))
    }

    /// Whether a device of the one kind may show itself as the other.
    pub fn join(&self, one: UsbId, other: UsbId) -> bool {
        one != other && self.0.iter().any(|group| group.contains(&one) && group.contains(&other))
    }

    /// Whether both are one device that shows another kind now: where both kinds have a unique serial, that decides; else the port does.
    pub fn is(&self, one: &DeviceKey, other: &DeviceKey) -> bool {
        let same = match one.serial_decides() && other.serial_decides() {
            true => one.serial == other.serial,
            false => one.port == other.port,
        };
        self.join(one.usb, other.usb) && same
    }
}

impl fmt::Display for DeviceKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} at port {}", self.usb, self.port)?;
        match self.serial.text() {
            Some(text) => write!(f, ", serial {text}"),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_with_two_faces_is_one_at_its_port_or_by_its_serial() {
        let group = |kinds: &[&str]| kinds.iter().map(|k| (*k).into()).collect::<Vec<String>>();
        let aliases = Aliases::parse(&[group(&["0529:0001", "0529:0002"]), group(&["1:1", "2:2"])]).unwrap();
        let (one, other) = (key(1, Serial::Missing, "1-1"), key(2, Serial::Unique("A".into()), "1-1"));
        assert!(aliases.is(&one, &other) && aliases.is(&other, &one));
        assert!(!aliases.is(&one, &one), "that is for the key to say");
        assert!(!aliases.is(&one, &key(3, Serial::Missing, "1-1")), "no such alias");
        assert!(!aliases.is(&one, &key(2, Serial::Missing, "1-2")), "another port");
        let unique = |product, port| key(product, Serial::Unique("A".into()), port);
        assert!(aliases.is(&unique(1, "1-1"), &unique(2, "1-2")));
        let stranger = key(2, Serial::Unique("B".into()), "1-1");
        assert!(
            !aliases.is(&unique(1, "1-1"), &stranger),
            "another serial is another device, in that port too"
        );
        for wrong in [
            &[group(&["1:1"])][..],
            &[group(&["1:1", "1:1"])],
            &[group(&["1:1", "2:2"]), group(&["3:3", "2:2"])],
            &[group(&["1", "2:2"])],
        ] {
            assert!(Aliases::parse(wrong).is_err(), "{wrong:?}");
        }
    }

    fn key(product: u16, serial: Serial, port: &str) -> DeviceKey {
        DeviceKey { usb: UsbId::new(0x0529, product), serial, port: port.parse().unwrap() }
    }

    #[test]
    fn a_unique_serial_moves_anything_else_stays_at_its_port() {
        let unique = || Serial::Unique("A".into());
        let twin = || Serial::Duplicate("A".into());
        assert!(key(1, unique(), "1-1").is(&key(1, unique(), "2-4.1")));
        assert!(!key(1, unique(), "1-1").is(&key(2, unique(), "1-1")), "other product");
        assert!(
            !key(1, unique(), "1-1").is(&key(1, Serial::Unique("B".into()), "1-1")),
            "other serial, same port"
        );
        assert!(!key(1, twin(), "1-1").is(&key(1, twin(), "1-2")));
        assert!(key(1, twin(), "1-1").is(&key(1, unique(), "1-1")));
        assert!(!key(1, twin(), "1-1").is(&key(1, unique(), "1-2")));
        assert!(key(1, Serial::Missing, "1-1").is(&key(1, Serial::Missing, "1-1")));
        assert!(!key(1, Serial::Missing, "1-1").is(&key(1, Serial::Missing, "1-2")));
        assert!(!key(1, Serial::Missing, "1-1").is(&key(1, unique(), "1-1")));
    }
}
