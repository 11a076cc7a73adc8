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

/// Text that came from a device or another outsider, made safe to print and to store: control and invisible
/// formatting characters become U+FFFD, white space at the ends goes, and at most 126 characters stay (a USB string descriptor holds no more,
/// USB 2.0, 9.6.7). Empty text is none.
pub fn clean_text(text: &str) -> Option<String> {
    let trimmed = text.trim_matches(|c: char| c.is_whitespace() || c == '\0');
    let clean: String = trimmed.chars().take(126).map(printable).collect();
    (!clean.is_empty()).then_some(clean)
}

/// The character, or U+FFFD for one that a terminal obeys, that is not seen, or that turns the order of a line around.
pub const fn printable(c: char) -> char {
    let hidden = matches!(
        c,
        '\0'..='\u{1f}' | '\u{7f}'..='\u{9f}' | '\u{61c}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}' | '\u{feff}'
    );
    if hidden { '\u{fffd}' } else { c }
}

/// What could not be read while looking for devices. Carried along: unreadable is not absent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Problem {
    /// The port path (`1-1.4`) or file that it is about; empty for the whole scan.
    pub place: String,
    /// What went wrong, in words.
    pub what: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_from_devices_is_harmless() {
        assert_eq!(clean_text("  HASP key\n"), Some("HASP key".into()));
        assert_eq!(clean_text("a\u{1b}[31mb\u{202e}c"), Some("a\u{fffd}[31mb\u{fffd}c".into()));
        assert_eq!(clean_text(" \0 "), None);
        assert_eq!(clean_text(&"x".repeat(500)).unwrap().len(), 126);
    }
}
