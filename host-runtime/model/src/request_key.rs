//! Keys of a device request: the one definition of their names and values.
//!
//! The parsers of this crate read the keys. The schema of the API, the validator of Nova's extra
//! specs (`install/nova`) and the lists of keys in messages are made from [`REQUEST_KEYS`]. The
//! test program `selectors` of `tests/suite` holds all of them against the parsers, and against
//! every text that lists the keys.

use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;

use crate::flavor::MAX_DEVICES;
use crate::{Class, DeviceId};

/// Key of a device request, with the values that it takes.
#[derive(Debug, Clone, Copy)]
pub struct RequestKey {
    /// Name of the key in JSON.
    pub name: &'static str,
    /// Description of a value, as the end of a message: "wanted a port path".
    pub description: &'static str,
    /// JSON numbers that the key takes.
    pub numbers: Numbers,
    /// Texts that the key takes: a regular expression of ECMA-262 for the whole text.
    pub pattern: fn() -> String,
    /// Whether case does not matter in a text, and `_` and a space are read as `-`. The pattern
    /// matches at least the text in lower case with hyphens.
    pub is_folded: bool,
    /// Whether the value is a list of such values, or one of them in place of a list of one.
    pub is_list: bool,
    /// JSON values that are accepted: cases for tests of everything that reads requests.
    pub accepted: &'static [&'static str],
    /// JSON values that are refused.
    pub refused: &'static [&'static str],
}

/// JSON numbers that a key takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Numbers {
    /// No numbers: the value is text.
    None,
    /// Any number, which is read as the text that writes it.
    Any,
    /// Whole numbers of this range. `8.0` is whole.
    Whole {
        /// The smallest number of the range.
        min: u64,
        /// The largest number of the range.
        max: u64,
    },
}

/// Number of keys that select devices. The key `count` comes after them.
pub const SELECTOR_KEYS: usize = REQUEST_KEYS.len() - 1;

/// All keys, in the order in which a request is written: those of [`crate::Selector`], in the order
/// of [`crate::Selector::named`], then `count`.
pub const REQUEST_KEYS: [RequestKey; 9] = [
    RequestKey {
        name: "id",
        description: "a device id, a whole number from 1",
        numbers: Numbers::Whole { min: 1, max: DeviceId::MAX },
        pattern: || whole_pattern(DeviceId::MAX),
        is_folded: false,
        is_list: false,
        accepted: &["1", "5.0", "\"5\"", "\"005\"", "9007199254740991", "\"9007199254740991\""],
        refused: &["0", "-1", "1.5", "9007199254740992", "\"9007199254740992\"", "\"0\"", "\"+5\""],
    },
    RequestKey {
        name: "vendor_id",
        description: "one to four hexadecimal digits, or a number",
        numbers: Numbers::Whole { min: 0, max: 0xffff },
        pattern: hex_id_pattern,
        is_folded: false,
        is_list: false,
        accepted: &["\"0529\"", "\"0x529\"", "\"0XaB\"", "0", "1321", "65535"],
        refused: &["\"\"", "\"0x\"", "\"05290\"", "\"05zz\"", "\" 529\"", "65536", "-1", "true"],
    },
    RequestKey {
        name: "product_id",
        description: "one to four hexadecimal digits, or a number",
        numbers: Numbers::Whole { min: 0, max: 0xffff },
        pattern: hex_id_pattern,
        is_folded: false,
        is_list: false,
        accepted: &["\"0001\"", "\"0x1\"", "\"FFFF\"", "0", "1", "65535.0"],
        refused: &["\"\"", "\"0x\"", "\"00010\"", "\"g\"", "1.5", "65536", "[\"0001\"]"],
    },
    RequestKey {
        name: "serial",
        description: "1 to 126 printable characters, compared exactly",
        numbers: Numbers::Any,
        pattern: || r"^[^\u0000-\u001f\u007f-\u009f]{1,126}$".to_string(),
        is_folded: false,
        is_list: false,
        accepted: &["\"HL-0001\"", "\" \"", "\"\\u00fc\"", "123", "1.5"],
        refused: &["\"\"", "\"a\\u0000\"", "\"a\\n\"", "\"\\u0085\"", "true", "[\"A\"]"],
    },
    RequestKey {
        name: "port",
        description: "a port path: the bus, then the port at each hub",
        numbers: Numbers::None,
        pattern: || format!(r"^{PORT}-{PORT}(\.{PORT}){{0,6}}$"),
        is_folded: false,
        is_list: false,
        accepted: &["\"1-1\"", "\"1-1.4\"", "\"01-001\"", "\"255-1.2.3.4.5.6.255\""],
        refused: &["\"1-0\"", "\"256-1\"", "\"1-1.2.3.4.5.6.7.8\"", "\"1-\"", "\"1-0001\"", "1"],
    },
    RequestKey {
        name: "path",
        description: "a device path: the controller, the USB version of its root hub, the port \
            at each hub",
        numbers: Numbers::None,
        pattern: || {
            let controller = "[A-Za-z0-9_.:@,+-]{1,200}";
            format!(r"^{controller}-usbv0{{0,2}}[1-9]-0:{PORT}(\.{PORT}){{0,6}}$")
        },
        is_folded: false,
        is_list: false,
        accepted: &["\"pci-0000:00:14.0-usbv2-0:1.4\"", "\"platform-x@1,2+3-usbv01-0:255\""],
        refused: &["\"pci-0-usbv0-0:1\"", "\"-usbv2-0:1\"", "\"a-usbv2-0:0\"", "\"a b-usbv2-0:1\""],
    },
    RequestKey {
        name: "class",
        description: "two hexadecimal digits, a number, or a name such as mass-storage",
        numbers: Numbers::Whole { min: 0, max: 0xff },
        pattern: || {
            let names: Vec<&str> = Class::names().collect();
            format!("^((0[xX])?[0-9a-fA-F]{{1,2}}|{})$", names.join("|"))
        },
        is_folded: true,
        is_list: false,
        accepted: &["\"08\"", "\"0XfF\"", "8", "255.0", "\"mass-storage\"", "\"Mass_storage\""],
        refused: &["\"\"", "\"0x\"", "\"008\"", "256", "\"usb-stick\"", "\"mass--storage\"", "{}"],
    },
    RequestKey {
        name: "tags",
        description: "one tag or a list of tags, each of 1 to 64 letters, digits and -_.:/",
        numbers: Numbers::None,
        pattern: tag_pattern,
        is_folded: false,
        is_list: true,
        accepted: &["\"erp\"", "[\"erp\"]", "[\"a/b\", \"c_d.e:f-9\"]", "\"\\u00fc\""],
        refused: &["\"\"", "[\"\"]", "\"a b\"", "[\"a\", \"b,c\"]", "1", "[1]", "{}"],
    },
    RequestKey {
        name: "count",
        description: "a number of devices, 1 if absent",
        numbers: Numbers::Whole { min: 1, max: MAX_DEVICES as u64 },
        pattern: || whole_pattern(MAX_DEVICES.into()),
        is_folded: false,
        is_list: false,
        accepted: &["1", "\"1\"", "2", "127", "\"0127\"", "3.0"],
        refused: &["0", "128", "\"128\"", "\"\"", "-1", "1.5", "true", "[1]"],
    },
];

/// Names of all keys, in their order.
pub const REQUEST_KEY_NAMES: [&str; REQUEST_KEYS.len()] = {
    let mut names = [""; REQUEST_KEYS.len()];
    let mut at = 0;
    while at < names.len() {
        names[at] = REQUEST_KEYS[at].name;
        at += 1;
    }
    names
};

/// Names of the keys that select devices, in their order.
pub fn selector_names() -> &'static [&'static str] {
    REQUEST_KEY_NAMES.split_at(SELECTOR_KEYS).0
}

/// A port number at a hub, 1 to 255, in up to three digits.
const PORT: &str = "(0{0,2}[1-9]|0?[1-9][0-9]|1[0-9]{2}|2[0-4][0-9]|25[0-5])";

/// Pattern of a vendor or product id.
pub fn hex_id_pattern() -> String {
    "^(0[xX])?[0-9a-fA-F]{1,4}$".to_string()
}

/// Pattern of a tag.
pub fn tag_pattern() -> String {
    r"^[\p{L}\p{N}_.:/-]{1,64}$".to_string()
}

/// Pattern of the decimal digits of 1 to `max`, with leading zeros.
pub fn whole_pattern(max: u64) -> String {
    let digits = max.to_string();
    let rest = |count: usize| match count {
        0 => String::new(),
        1 => "[0-9]".to_string(),
        _ => format!("[0-9]{{{count}}}"),
    };
    // Fewer digits; then, digit by digit, the same beginning and a smaller digit; then `max`.
    let mut alternatives = match digits.len() {
        1 => Vec::new(),
        2 => alloc::vec!["[1-9]".to_string()],
        3 => alloc::vec!["[1-9][0-9]?".to_string()],
        length => alloc::vec![format!("[1-9][0-9]{{0,{}}}", length - 2)],
    };
    for (at, digit) in digits.char_indices() {
        let (beginning, _) = digits.split_at(at);
        let smaller: Vec<char> = ('0'..digit).skip(usize::from(at == 0)).collect();
        let one = match smaller.as_slice() {
            [] => continue,
            [only] => only.to_string(),
            [first, .., last] => format!("[{first}-{last}]"),
        };
        alternatives.push(format!("{beginning}{one}{}", rest(digits.len() - at - 1)));
    }
    alternatives.push(digits);
    match alternatives.as_slice() {
        [one] => format!("^0*{one}$"),
        _ => format!("^0*({})$", alternatives.join("|")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{DeviceRequest, Flavor};

    /// A request with this value at the key, and with what the key needs beside it.
    fn request(key: &RequestKey, value: &str) -> Result<DeviceRequest, crate::ParseError> {
        let beside = match key.name {
            "product_id" | "count" => r#""vendor_id":"0529","#,
            _ => "",
        };
        let text = format!("[{{{beside}\"{}\":{value}}}]", key.name);
        Flavor::parse_lists(Some(&text), None).map(|mut flavor| flavor.usb_devices.remove(0))
    }

    #[test]
    fn each_key_accepts_and_refuses_its_examples() {
        for key in &REQUEST_KEYS {
            for value in key.accepted {
                assert!(request(key, value).is_ok(), "{} {value}", key.name);
            }
            for value in key.refused {
                assert!(request(key, value).is_err(), "{} {value}", key.name);
            }
        }
    }

    #[test]
    fn each_key_is_read_matched_and_written_at_its_place() {
        for (at, key) in REQUEST_KEYS.iter().enumerate().take(SELECTOR_KEYS) {
            for value in key.accepted {
                let request = request(key, value).unwrap();
                let named = request.selector.named();
                assert_eq!(named.get(at), Some(&true), "{} {value}", key.name);
                let written = serde_json::to_value(&request).unwrap();
                assert!(written.get(key.name).is_some(), "{}: {written}", key.name);
                let keys = written.as_object().unwrap().len();
                assert_eq!(keys, named.iter().filter(|is| **is).count(), "{written}");
            }
        }
    }

    #[test]
    fn a_pattern_of_whole_numbers_ends_at_its_largest() {
        assert_eq!(whole_pattern(1), "^0*1$");
        assert_eq!(whole_pattern(20), "^0*([1-9]|1[0-9]|20)$");
        assert_eq!(whole_pattern(127), "^0*([1-9][0-9]?|1[0-1][0-9]|12[0-6]|127)$");
    }
}
