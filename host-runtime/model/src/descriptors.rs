//! A device's descriptors, to tell whether it is still what it was.
//!
//! The kernel's `descriptors` attribute (Documentation/ABI/testing/sysfs-bus-usb): the device
//! descriptor of 18 bytes, then each configuration with all that belongs to it, as the device sent
//! them (USB 2.0, 9.6).

use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use core::fmt::{self, Write};
use core::str::FromStr;

use crate::ParseError;

/// bDescriptorType of a device, a configuration and an interface.
const DEVICE: u8 = 1;
const CONFIGURATION: u8 = 2;
const INTERFACE: u8 = 4;

/// All descriptors of one device, as it sent them.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct Descriptors(Vec<u8>);

impl Descriptors {
    /// The most bytes that are kept: a device with many alternate settings has a few thousand.
    pub const MOST: usize = 16 << 10;

    /// From the bytes that the kernel shows, the first [`MOST`](Self::MOST) of them; none when
    /// there are none.
    pub fn new(mut bytes: Vec<u8>) -> Option<Self> {
        bytes.truncate(Self::MOST);
        (!bytes.is_empty()).then_some(Self(bytes))
    }

    /// As the device sent them.
    pub fn bytes(&self) -> &[u8] {
        &self.0
    }

    /// Describes how `later` differs; `None` if it is equal, or if the device shows another vendor
    /// and product. Only a declared alias may do that ([`Aliases`](crate::Aliases)), and then
    /// everything differs.
    pub fn difference(&self, later: &Self) -> Option<String> {
        // idVendor and idProduct of the device descriptor.
        if self == later || self.0.get(8..12) != later.0.get(8..12) {
            return None;
        }
        let (was, is) = (self.summary(), later.summary());
        let mut parts: Vec<String> = Vec::new();
        if was.interfaces != is.interfaces {
            parts.push(format!(
                "interfaces {} before, {} now",
                list(&was.interfaces),
                list(&is.interfaces)
            ));
        }
        if was.class != is.class {
            parts.push(format!("class {} before, {} now", triple(was.class), triple(is.class)));
        }
        if was.configurations != is.configurations {
            parts.push(format!(
                "{} configuration(s) before, {} now",
                was.configurations, is.configurations
            ));
        }
        if was.release != is.release {
            parts.push(format!("release {:04x} before, {:04x} now", was.release, is.release));
        }
        Some(match parts.is_empty() {
            true => format!(
                "{} bytes of descriptors before, {} now, with other content",
                self.0.len(),
                later.0.len()
            ),
            false => parts.join("; "),
        })
    }

    fn summary(&self) -> Summary {
        let mut summary = Summary::default();
        let mut rest = self.0.as_slice();
        // bLength, bDescriptorType; a length of less than these two would never end.
        while let [length @ 2..=u8::MAX, kind, ..] = *rest {
            let (one, behind) = rest.split_at(usize::from(length).min(rest.len()));
            match (kind, one) {
                (DEVICE, [_, _, _, _, class, subclass, protocol, _, _, _, _, _, low, high, ..]) => {
                    summary.class = [*class, *subclass, *protocol];
                    summary.release = u16::from_le_bytes([*low, *high]);
                }
                (CONFIGURATION, _) => summary.configurations += 1,
                (INTERFACE, [_, _, _, _, _, class, subclass, protocol, ..]) => {
                    summary.interfaces.push([*class, *subclass, *protocol]);
                }
                _ => {}
            }
            rest = behind;
        }
        summary
    }
}

/// Readable summary of a device.
#[derive(Default, PartialEq)]
struct Summary {
    class: [u8; 3],
    release: u16,
    configurations: usize,
    /// Class, subclass and protocol of each setting, in order.
    interfaces: Vec<[u8; 3]>,
}

fn triple([class, subclass, protocol]: [u8; 3]) -> String {
    format!("{class:02x}/{subclass:02x}/{protocol:02x}")
}

/// Lists the first dozen interfaces, because more would not be read.
fn list(interfaces: &[[u8; 3]]) -> String {
    let shown: Vec<String> = interfaces.iter().take(12).map(|i| triple(*i)).collect();
    match shown.as_slice() {
        [] => "none".to_string(),
        _ if interfaces.len() > shown.len() => format!("{} …", shown.join(" ")),
        _ => shown.join(" "),
    }
}

/// Formats the descriptors as hexadecimal digits.
impl fmt::Display for Descriptors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Descriptors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Descriptors(")?;
        fmt::Display::fmt(self, f)?;
        f.write_char(')')
    }
}

impl FromStr for Descriptors {
    type Err = ParseError;
    fn from_str(text: &str) -> Result<Self, ParseError> {
        let wrong = || {
            ParseError::new(
                format!("{:?}", text.chars().take(40).collect::<String>()),
                "descriptors in hexadecimal digits",
            )
        };
        let digit = |b: u8| char::from(b).to_digit(16).and_then(|d| u8::try_from(d).ok());
        let pair = |pair: &[u8]| match *pair {
            [high, low] => Some(digit(high)? << 4 | digit(low)?),
            _ => None,
        };
        let bytes: Option<Vec<u8>> = text.as_bytes().chunks(2).map(pair).collect();
        bytes.and_then(Self::new).ok_or_else(wrong)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A stick: one interface, mass storage; with `keys`, a keyboard beside it.
    fn stick(release: u8, keys: bool) -> Descriptors {
        let mut bytes =
            alloc::vec![18, 1, 0, 2, 0, 0, 0, 64, 0x29, 5, 1, 0, 0, release, 1, 2, 3, 1];
        bytes.extend([9, 2, 32, 0, 1, 1, 0, 0x80, 50]);
        bytes.extend([9, 4, 0, 0, 2, 8, 6, 0x50, 0]);
        if keys {
            bytes.extend([9, 4, 1, 0, 1, 3, 1, 1, 0]);
        }
        Descriptors::new(bytes).unwrap()
    }

    #[test]
    fn a_changed_device_is_described() {
        let said = |later: &Descriptors| stick(1, false).difference(later);
        assert_eq!(said(&stick(1, false)), None);
        assert_eq!(
            said(&stick(1, true)).unwrap(),
            "interfaces 08/06/50 before, 08/06/50 03/01/01 now"
        );
        assert_eq!(said(&stick(2, false)).unwrap(), "release 0100 before, 0200 now");
        let mut other = stick(1, false).0;
        other[8] = 0x30;
        assert_eq!(said(&Descriptors::new(other.clone()).unwrap()), None, "another kind");
        (other[8], other[14]) = (0x29, 9);
        assert!(said(&Descriptors::new(other).unwrap()).unwrap().ends_with("with other content"));
        let with =
            |more: &[u8]| Descriptors::new([stick(1, false).bytes(), more].concat()).unwrap();
        let configuration = [9, 2, 9, 0, 0, 2, 0, 0x80, 50];
        assert_eq!(said(&with(&configuration)).unwrap(), "1 configuration(s) before, 2 now");
        let bare = Descriptors::new(stick(1, false).bytes()[..27].to_vec()).unwrap();
        assert_eq!(
            bare.difference(&stick(1, false)).unwrap(),
            "interfaces none before, 08/06/50 now"
        );
        let interface = [9, 4, 1, 0, 1, 3, 1, 1, 0];
        let twelve = said(&with(&interface.repeat(11))).unwrap();
        assert!(twelve.ends_with("03/01/01 now"), "{twelve}");
        let thirteen = said(&with(&interface.repeat(12))).unwrap();
        assert!(thirteen.ends_with("03/01/01 … now"), "{thirteen}");
        assert_eq!(twelve.matches("03/01/01").count(), thirteen.matches("03/01/01").count());
    }

    #[test]
    fn digits_are_read_as_they_are_written_and_nothing_else_is() {
        let one = stick(1, true);
        assert_eq!(one.to_string().parse::<Descriptors>().unwrap(), one);
        for wrong in ["", "1", "0g", "12 ", "é0"] {
            assert!(wrong.parse::<Descriptors>().is_err(), "{wrong}");
        }
        let long = Descriptors::new(alloc::vec![0; Descriptors::MOST + 1]).unwrap();
        assert_eq!(long.bytes().len(), Descriptors::MOST);
    }

    #[test]
    fn nonsense_has_a_difference_too() {
        for bytes in [&[0, 0, 0][..], &[1], &[200, 1], &[2, 4, 2, 4], &[18, 1], &[255, 4, 0]] {
            let nonsense = Descriptors::new(bytes.to_vec()).unwrap();
            let short = Descriptors::new(bytes[..bytes.len() - 1].to_vec());
            assert!(short.is_none_or(|short| nonsense.difference(&short).is_some()));
            assert_eq!(nonsense.difference(&stick(1, false)), None);
            assert_eq!(nonsense.difference(&nonsense), None);
        }
    }
}
