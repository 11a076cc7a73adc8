//! *Who a device is*: what stays the same when it is plugged in again.

use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;
use core::fmt;

use serde::Serialize;

use crate::{DevicePath, ParseError, PortPath, UsbId};

/// A device's serial number, as far as it tells devices apart.
///
/// Some vendors put the same serial on a whole production run. A serial that was seen on two
/// devices of the same kind identifies neither, and neither does a placeholder such as `0001`
/// ([`is_worthless`]).
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(tag = "kind", content = "value", rename_all = "lowercase")]
pub enum Serial {
    /// Only one device of this kind with this serial has been seen.
    Unique(String),
    /// At least two devices of this kind carry it: only the port tells them apart.
    Duplicate(String),
    /// A placeholder that many devices carry, whether or not a second one was seen here.
    Worthless(String),
    /// The device has none (iSerialNumber is 0).
    Missing,
}

/// Words that devices carry in place of a serial, their letters and digits in lower case. Sources:
/// firmware templates of board vendors and the examples of the LUFA, TinyUSB and Linux gadget
/// sources; counterfeits of FTDI adapters (`a5xk3rjt`, `a50285bi`).
const PLACEHOLDERS: &[&str] = &[
    "a50285bi",
    "a5xk3rjt",
    "default",
    "defaultstring",
    "empty",
    "na",
    "noserial",
    "none",
    "notavailable",
    "notset",
    "null",
    "serial",
    "serialnumber",
    "sn",
    "tobefilledbyoem",
    "unknown",
];

/// Whether a serial is a placeholder that identifies no device. Case, spaces and `-_.:` do not
/// count; in words no sign but letters and digits does. A placeholder is
///
/// - one of a list of words, such as `None`;
/// - one character several times, or one digit: `0`, `FFFFFFFF`;
/// - zeros and a one: `0001` (Silicon Labs CP210x and many others);
/// - four or more digits that count up from 0 or 1: `123456789`, `123456789ABC` (JMicron),
///   `0123456789ABCDEF` (Android, Realtek), `0123456789.0123456789.0123456789` (Linux gadget
///   examples);
/// - all digits in another usual order: `987654321`, `1234567890ABCDEF`.
pub fn is_worthless(serial: &str) -> bool {
    let plain = serial.trim().to_lowercase();
    let marks: Vec<char> = plain
        .chars()
        .filter(|c| !c.is_whitespace() && !matches!(c, '-' | '_' | '.' | ':'))
        .collect();
    match marks.as_slice() {
        [] => true,
        [one] => one.is_ascii_digit(),
        [first, rest @ ..] => {
            rest.iter().all(|c| c == first)
                || matches!(marks.as_slice(), [zeros @ .., '1'] if zeros.iter().all(|c| *c == '0'))
                || counts_up(&marks)
                || is_word(&plain)
        }
    }
}

/// `1234`, `0123456789`, `1234567890`, `0123456789abcdef`, also several times.
fn counts_up(digits: &[char]) -> bool {
    let follows = |base: u32, one: char, next: char| match (one.to_digit(base), next.to_digit(base))
    {
        (Some(last), Some(next)) if last == base - 1 => next < 2,
        (Some(one), Some(next)) => next == one + 1,
        _ => false,
    };
    let all = |base| {
        digits.windows(2).all(|pair| matches!(pair, [one, next] if follows(base, *one, *next)))
    };
    matches!(digits, ['0', '1', '2', '3', ..] | ['1', '2', '3', '4', ..]) && (all(10) || all(16))
}

/// A word of the list, or a row of keys.
fn is_word(plain: &str) -> bool {
    let word: String = plain.chars().filter(char::is_ascii_alphanumeric).collect();
    PLACEHOLDERS.contains(&word.as_str())
        || matches!(word.as_str(), "987654321" | "9876543210" | "0987654321" | "1234567890abcdef")
}

impl Serial {
    /// The text of the descriptor, if there is one.
    pub fn text(&self) -> Option<&str> {
        match self {
            Self::Unique(text) | Self::Duplicate(text) | Self::Worthless(text) => Some(text),
            Self::Missing => None,
        }
    }
    /// `unique`, `duplicate`, `worthless` or `missing`: the spelling of the inventory.
    pub const fn kind(&self) -> &'static str {
        match self {
            Self::Unique(_) => "unique",
            Self::Duplicate(_) => "duplicate",
            Self::Worthless(_) => "worthless",
            Self::Missing => "missing",
        }
    }
    /// The kinds of an existing serial, as [`kind`](Self::kind) spells them, and `missing`.
    pub const KINDS: &[&str] = &["unique", "duplicate", "worthless", "missing"];

    /// From the descriptor's text and whether another device of the kind carries the same.
    pub fn new(text: Option<String>, duplicate: bool) -> Self {
        match text {
            None => Self::Missing,
            Some(text) if is_worthless(&text) => Self::Worthless(text),
            Some(text) if duplicate => Self::Duplicate(text),
            Some(text) => Self::Unique(text),
        }
    }
}

/// Identity of a device across replugs: its vendor and product, its serial and, if that is not
/// unique, its path.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DeviceKey {
    /// Vendor and product id.
    pub usb: UsbId,
    /// The serial, and what it is worth.
    pub serial: Serial,
    /// The port that it is plugged into, as the kernel numbers it during this boot.
    pub port: PortPath,
    /// The socket that it is plugged into, whatever the bus numbers are; `None` where that is not
    /// known.
    pub path: Option<DevicePath>,
}

impl DeviceKey {
    /// Whether both are one device, seen twice.
    ///
    /// The same kind and the same serial text are needed. Then a serial that is unique on both
    /// sides decides wherever the device is plugged in; otherwise it must be the same place. The
    /// same place with another kind or another serial is another device.
    pub fn is(&self, other: &Self) -> bool {
        self.usb == other.usb
            && self.serial.text() == other.serial.text()
            && (self.is_at_place_of(other) || (self.serial_decides() && other.serial_decides()))
    }

    /// Whether both are plugged into one socket. Where one of the paths is not known, the ports
    /// decide. They say nothing about another boot: the inventory sets devices without a path aside
    /// when the host was restarted.
    pub fn is_at_place_of(&self, other: &Self) -> bool {
        match (&self.path, &other.path) {
            (Some(one), Some(other)) => one == other,
            _ => self.port == other.port,
        }
    }

    /// Whether the serial alone identifies the device.
    pub const fn serial_decides(&self) -> bool {
        matches!(self.serial, Serial::Unique(_))
    }
}

/// Kinds that one device shows in turn: before and after its firmware is loaded, in use and in its
/// update mode (DFU).
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Aliases(Vec<Vec<UsbId>>);

impl Aliases {
    /// All kinds that are in a group.
    pub fn kinds(&self) -> impl Iterator<Item = UsbId> + '_ {
        self.0.iter().flatten().copied()
    }

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
                return Err(ParseError::new(
                    "a list of fewer than two",
                    "the kinds that one device shows",
                ));
            }
            read.push(kinds);
        }
        Ok(Self(read))
    }

    /// Whether a device of the one kind may show itself as the other.
    pub fn join(&self, one: UsbId, other: UsbId) -> bool {
        one != other && self.0.iter().any(|group| group.contains(&one) && group.contains(&other))
    }

    /// Whether both are one device that shows another kind now: where both kinds have a unique
    /// serial, that decides; else the port does.
    pub fn is(&self, one: &DeviceKey, other: &DeviceKey) -> bool {
        let same = match one.serial_decides() && other.serial_decides() {
            true => one.serial == other.serial,
            false => one.is_at_place_of(other),
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
        let aliases =
            Aliases::parse(&[group(&["0529:0001", "0529:0002"]), group(&["1:1", "2:2"])]).unwrap();
        let (one, other) =
            (key(1, Serial::Missing, "1-1"), key(2, Serial::Unique("A".into()), "1-1"));
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
        DeviceKey {
            usb: UsbId::new(0x0529, product),
            serial,
            port: port.parse().unwrap(),
            path: None,
        }
    }

    #[test]
    fn a_path_decides_where_both_have_one() {
        let at = |port: &str, path: &str| DeviceKey {
            path: Some(path.parse().unwrap()),
            ..key(1, Serial::Missing, port)
        };
        let (one, other) =
            (at("1-4", "pci-0000:00:14.0-usbv2-0:4"), at("1-4", "pci-0000:0a:00.0-usbv2-0:4"));
        assert!(!one.is(&other), "the buses have swapped their numbers");
        assert!(
            one.is(&at("3-4", "pci-0000:00:14.0-usbv2-0:4")),
            "the same socket, another number"
        );
        assert!(one.is(&key(1, Serial::Missing, "1-4")), "no path on one side");
        assert!(!one.is(&key(1, Serial::Missing, "3-4")));
    }

    #[test]
    fn placeholders_are_no_serials() {
        for text in [
            "0",
            "0000",
            "0001",
            "000000000001",
            "1234",
            "123456789",
            "1234567890",
            "0123456789",
            "0123456789ABCDEF",
            "0123456789abcdef0123456789ABCDEF",
            "123456789ABC",
            "12345678901234567890",
            "FFFFFFFFFFFF",
            "xxxx",
            "None",
            "Not Available",
            "00-00-00",
            "  1 ",
            "01",
            "-",
            "To be filled by O.E.M.",
            "123456789ABCDEF0",
            "1234567890ABCDEF",
            "987654321",
            "0987654321",
            "NA",
            "n/a",
            "(none)",
            "Not Set",
        ] {
            assert!(is_worthless(text), "{text}");
            assert_eq!(Serial::new(Some(text.into()), false).kind(), "worthless", "{text}");
        }
        for text in [
            "A",
            "HL-0001",
            "123",
            "12345601",
            "123123",
            "4C530001",
            "0002",
            "1002",
            "12",
            "00000002",
            "A6008isP",
            "0329",
            "1111112",
            "123457",
            "0123456789ABCDEG",
            "98765432",
            "10",
            "121212",
            "E6616408432B5F2A",
        ] {
            assert_eq!(Serial::new(Some(text.into()), false).kind(), "unique", "{text}");
        }
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
