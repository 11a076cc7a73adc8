//! The requests of a flavor.
//!
//! ```json
//! {"usb_devices": [{"id": 5}, {"vendor_id": "0529", "product_id": "0001", "count": 2}],
//!  "usb_redirection_devices": [{"bus": "usb", "type": "spicevmc"}]}
//! ```

use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use core::fmt;
use core::str::FromStr;

use serde::Serialize;
use serde_json::Value;

use crate::json::{FromJson, Object, twice, unique, whole};
use crate::request_key::{REQUEST_KEY_NAMES, SELECTOR_KEYS, selector_names};
use crate::{
    Class, Device, DeviceId, DevicePath, ParseError, PortPath, ProductId, VendorId, printable,
};

/// The most devices that one request, or one flavor in all, may ask for: USB's own limit of devices
/// on a bus.
pub const MAX_DEVICES: u32 = 127;
/// The most redirection devices of one flavor; QEMU's xhci controller has no more ports.
pub const MAX_REDIRECTIONS: usize = 15;
/// The longest flavor text read, in bytes.
pub const MAX_TEXT: usize = 64 * 1024;

/// Selector of a request: a device must match all of its keys.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash, Serialize)]
pub struct Selector {
    /// One device of the inventory.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub id: Option<DeviceId>,
    /// Vendor of the device.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vendor_id: Option<VendorId>,
    /// Product of the device.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub product_id: Option<ProductId>,
    /// Serial of the device, compared exactly.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub serial: Option<String>,
    /// The port that it is plugged into. Bus numbers are assigned at boot: what is stored names the
    /// path instead.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub port: Option<PortPath>,
    /// The socket that it is plugged into, whatever the bus numbers are.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path: Option<DevicePath>,
    /// A class of the device or of one of its interfaces.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub class: Option<Class>,
    /// Tags that it must carry, all of them.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub tags: Vec<String>,
}

impl Selector {
    /// Whether the selector names each of the first [`SELECTOR_KEYS`] keys of
    /// [`crate::request_key::REQUEST_KEYS`].
    ///
    /// A new field does not compile here before its key is in the table.
    pub const fn named(&self) -> [bool; SELECTOR_KEYS] {
        let Self { id, vendor_id, product_id, serial, port, path, class, tags } = self;
        [
            id.is_some(),
            vendor_id.is_some(),
            product_id.is_some(),
            serial.is_some(),
            port.is_some(),
            path.is_some(),
            class.is_some(),
            !tags.is_empty(),
        ]
    }

    /// Whether a device fits, given its inventory id and tags.
    pub fn matches(&self, id: DeviceId, device: &Device, tags: &[String]) -> bool {
        let key = &device.key;
        // All fields are named, here and where selectors become SQL and keys of the index: a new
        // field that one of them ignores does not compile.
        let Self { id: wanted, vendor_id, product_id, serial, port, path, class, tags: all } = self;
        wanted.is_none_or(|want| want == id)
            && vendor_id.is_none_or(|want| want == key.usb.vendor)
            && product_id.is_none_or(|want| want == key.usb.product)
            && serial.as_deref().is_none_or(|want| key.serial.text() == Some(want))
            && port.as_ref().is_none_or(|want| *want == key.port)
            && path.as_ref().is_none_or(|want| key.path.as_ref() == Some(want))
            && class.is_none_or(|want| device.is_of(want))
            && all.iter().all(|want| tags.contains(want))
    }
}

/// One entry of `usb_devices`: `count` devices that the selector matches.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize)]
pub struct DeviceRequest {
    /// Devices that can serve the request.
    #[serde(flatten)]
    pub selector: Selector,
    /// How many, 1 to [`MAX_DEVICES`].
    #[serde(skip_serializing_if = "is_one")]
    pub count: u32,
}

#[allow(clippy::trivially_copy_pass_by_ref, reason = "serde passes a reference")]
const fn is_one(count: &u32) -> bool {
    *count == 1
}

const RIGHT_SELECTOR: &str = "an object such as {\"vendor_id\":\"0529\",\"product_id\":\"0001\"}";

impl Selector {
    fn read(object: &Object<'_>) -> Result<Self, ParseError> {
        Ok(Self {
            id: object.take("id")?,
            vendor_id: object.take("vendor_id")?,
            product_id: object.take("product_id")?,
            serial: object.take::<SerialText>("serial")?.map(|t| t.0),
            port: object.take("port")?,
            path: object.take("path")?,
            class: object.take("class")?,
            tags: object.list::<Tag>("tags")?.into_iter().map(|t| t.0).collect(),
        })
    }

    fn check(&self) -> Result<(), ParseError> {
        if !self.named().contains(&true) {
            return Err(names_nothing("a request that names nothing"));
        }
        if self.product_id.is_some() && self.vendor_id.is_none() {
            return Err(ParseError::new(
                "a product_id alone",
                "the vendor_id too: product ids are the vendor's own",
            ));
        }
        Ok(())
    }
}

impl FromJson for Selector {
    fn from_json(value: &Value) -> Result<Self, ParseError> {
        let selector = Self::read(&Object::new(value, RIGHT_SELECTOR, selector_names())?)?;
        if !selector.named().contains(&true) {
            return Err(names_nothing(value));
        }
        selector.check()?;
        Ok(selector)
    }
}

impl FromJson for DeviceRequest {
    fn from_json(value: &Value) -> Result<Self, ParseError> {
        let object = Object::new(value, RIGHT_SELECTOR, &REQUEST_KEY_NAMES)?;
        let selector = Selector::read(&object)?;
        if !selector.named().contains(&true) {
            return Err(names_nothing(value));
        }
        let count = match object.raw("count") {
            None => 1,
            Some(value) => whole(value)
                .and_then(|n| u32::try_from(n).ok())
                .filter(|n| (1..=MAX_DEVICES).contains(n))
                .ok_or_else(|| {
                    ParseError::new(value, format!("a count from 1 to {MAX_DEVICES}")).at("count")
                })?,
        };
        let request = Self { selector, count };
        request.check()?;
        Ok(request)
    }
}

fn names_nothing(found: impl fmt::Display) -> ParseError {
    ParseError::new(found, format!("at least one of {}", selector_names().join(", ")))
}

impl DeviceRequest {
    /// Whether a request that was put together, rather than read, is one that could be read.
    ///
    /// # Errors
    /// Names the key that is wrong.
    pub fn check(&self) -> Result<(), ParseError> {
        let Self { selector, count } = self;
        selector.check()?;
        if !(1..=MAX_DEVICES).contains(count) {
            return Err(
                ParseError::new(count, format!("a count from 1 to {MAX_DEVICES}")).at("count")
            );
        }
        if selector.id.is_some() && *count > 1 {
            return Err(ParseError::new(count, "1: an id names one device").at("count"));
        }
        Ok(())
    }
}

/// The longest name of a stored flavor, in characters.
pub const MAX_NAME: usize = 255;

/// Whether a stored flavor may have this name: 1 to [`MAX_NAME`] printable characters, the first no
/// `@`, which marks one in Nova's extra specs.
pub fn is_name(name: &str) -> bool {
    (1..=MAX_NAME).contains(&name.chars().count())
        && name.chars().all(|c| printable(c) == c)
        && !name.starts_with('@')
}

/// Whether all requests of an instance together are within bounds.
///
/// # Errors
/// Says how many devices there are, or which request is wrong.
pub fn check_requests(requests: &[DeviceRequest]) -> Result<(), ParseError> {
    for (number, request) in requests.iter().enumerate() {
        request.check().map_err(|e| e.at(&format!("[{number}]")).at("usb_devices"))?;
    }
    let devices: u64 = requests.iter().map(|r| u64::from(r.count)).sum();
    if devices > u64::from(MAX_DEVICES) {
        return Err(ParseError::new(
            format!("{devices} devices in all"),
            format!("at most {MAX_DEVICES}"),
        )
        .at("usb_devices"));
    }
    Ok(())
}

impl fmt::Display for DeviceRequest {
    /// The request as JSON, the way it is written in a flavor.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&serde_json::to_string(self).map_err(|_| fmt::Error)?)
    }
}

/// A serial: text of 1 to 126 characters; a bare number is taken as its digits.
struct SerialText(String);

impl FromJson for SerialText {
    fn from_json(value: &Value) -> Result<Self, ParseError> {
        let text = match value {
            Value::Number(n) => n.to_string(),
            other => String::from_json(other)?,
        };
        let fits = (1..=126).contains(&text.chars().count()) && !text.chars().any(char::is_control);
        if fits {
            Ok(Self(text))
        } else {
            Err(ParseError::new(format!("{text:?}"), "1 to 126 printable characters"))
        }
    }
}

/// An operator gives a device no more tags than this.
pub const MAX_TAGS: usize = 127;

/// A tag: 1 to 64 letters, digits and `-_.:/`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Tag(pub(crate) String);

impl Tag {
    /// The tag's text.
    pub fn into_text(self) -> String {
        self.0
    }
}

impl FromJson for Tag {
    fn from_json(value: &Value) -> Result<Self, ParseError> {
        String::from_json(value)?.parse()
    }
}

impl FromStr for Tag {
    type Err = ParseError;
    fn from_str(text: &str) -> Result<Self, ParseError> {
        let plain = |c: char| c.is_alphanumeric() || "-_.:/".contains(c);
        if (1..=64).contains(&text.chars().count()) && text.chars().all(plain) {
            Ok(Self(text.to_string()))
        } else {
            Err(ParseError::new(format!("{text:?}"), "a tag of 1 to 64 letters, digits and -_.:/"))
        }
    }
}

/// One entry of `usb_redirection_devices`: a USB port that a SPICE client fills. There is one kind
/// of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
pub struct RedirectionRequest {
    bus: Usb,
    r#type: Spicevmc,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
enum Usb {
    Usb,
}
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
enum Spicevmc {
    Spicevmc,
}

impl RedirectionRequest {
    /// The one kind: a spicevmc channel on the USB bus.
    pub const SPICEVMC: Self = Self { bus: Usb::Usb, r#type: Spicevmc::Spicevmc };
}

impl FromJson for RedirectionRequest {
    fn from_json(value: &Value) -> Result<Self, ParseError> {
        let object = Object::new(value, RIGHT_REDIRECTION, &["bus", "type"])?;
        let one = |key: &str, wanted: &str| match object.take::<String>(key)? {
            Some(text) if text == wanted => Ok(()),
            Some(text) => Err(ParseError::new(
                format!("{text:?}"),
                format!("{wanted:?}, the only one there is"),
            )
            .at(key)),
            None => Err(ParseError::new(format!("no key {key:?}"), RIGHT_REDIRECTION)),
        };
        one("bus", "usb")?;
        one("type", "spicevmc")?;
        Ok(Self::SPICEVMC)
    }
}

const RIGHT_REDIRECTION: &str = "{\"bus\":\"usb\",\"type\":\"spicevmc\"}";
const RIGHT_FLAVOR: &str = "{\"usb_devices\":[{\"vendor_id\":\"0529\",\"product_id\":\"0001\"}],\
                            \"usb_redirection_devices\":[{\"bus\":\"usb\",\"type\":\"spicevmc\"}]}";

/// All that a flavor asks for. May be empty: such a flavor asks for nothing.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Flavor {
    /// Devices of the host, to be passed through.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub usb_devices: Vec<DeviceRequest>,
    /// Ports for devices of the client, to be redirected.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub usb_redirection_devices: Vec<RedirectionRequest>,
}

impl Flavor {
    /// Reads the JSON object with the keys `usb_devices` and `usb_redirection_devices`.
    ///
    /// # Errors
    /// Says which entry was wrong and shows the right spelling.
    pub fn parse(text: &str) -> Result<Self, ParseError> {
        let value = checked(text, RIGHT_FLAVOR)?;
        let object =
            Object::new(&value, RIGHT_FLAVOR, &["usb_devices", "usb_redirection_devices"])?;
        Self {
            usb_devices: object.list("usb_devices")?,
            usb_redirection_devices: object.list("usb_redirection_devices")?,
        }
        .bounded()
    }

    /// Reads the two lists as Nova's extra specs hold them, each the JSON list alone (or one entry
    /// without the brackets, or the whole object).
    ///
    /// # Errors
    /// As [`Flavor::parse`].
    pub fn parse_lists(
        devices: Option<&str>,
        redirection: Option<&str>,
    ) -> Result<Self, ParseError> {
        Self {
            usb_devices: list(devices, "usb_devices")?,
            usb_redirection_devices: list(redirection, "usb_redirection_devices")?,
        }
        .bounded()
    }

    /// Whether the flavor requests nothing.
    pub const fn is_empty(&self) -> bool {
        self.usb_devices.is_empty() && self.usb_redirection_devices.is_empty()
    }

    fn bounded(self) -> Result<Self, ParseError> {
        check_requests(&self.usb_devices)?;
        let redirections = self.usb_redirection_devices.len();
        if redirections > MAX_REDIRECTIONS {
            return Err(ParseError::new(
                format!("{redirections} entries"),
                format!("at most {MAX_REDIRECTIONS}"),
            )
            .at("usb_redirection_devices"));
        }
        Ok(self)
    }
}

impl core::str::FromStr for Flavor {
    type Err = ParseError;
    /// As [`Flavor::parse`].
    fn from_str(text: &str) -> Result<Self, ParseError> {
        Self::parse(text)
    }
}

impl fmt::Display for Flavor {
    /// The flavor as JSON, ids in their usual spelling.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&serde_json::to_string(self).map_err(|_| fmt::Error)?)
    }
}

fn list<T: FromJson>(text: Option<&str>, key: &str) -> Result<Vec<T>, ParseError> {
    const KEYS: [&str; 2] = ["usb_devices", "usb_redirection_devices"];
    let Some(text) = text.filter(|t| !t.trim().is_empty()) else { return Ok(Vec::new()) };
    let value = checked(text, RIGHT_FLAVOR).map_err(|e| e.at(key))?;
    if value.get(key).is_none() {
        let object = Value::Object([(key.to_string(), value)].into_iter().collect());
        return Object::new(&object, RIGHT_FLAVOR, &[key])?.list(key);
    }
    // The whole flavor in place of one list: the other list would be lost.
    let object = Object::new(&value, RIGHT_FLAVOR, &KEYS)?;
    let other = KEYS.into_iter().find(|k| {
        *k != key && object.raw(k).is_some_and(|v| v.as_array().is_none_or(|a| !a.is_empty()))
    });
    match other {
        Some(other) => Err(ParseError::new(
            format!("the key {other:?} beside it"),
            format!("{key} alone: the other list has a place of its own"),
        )
        .at(key)),
        None => object.list(key),
    }
}

/// Parses the text as JSON. If it has a spelling of early documents that is not valid JSON, the
/// error shows the right one.
pub(crate) fn checked(text: &str, right: &str) -> Result<Value, ParseError> {
    if text.len() > MAX_TEXT {
        return Err(ParseError::new(
            format!("{} bytes", text.len()),
            format!("at most {MAX_TEXT} bytes"),
        ));
    }
    unique(text).map_err(|e| {
        if let Some(error) = twice(&e) {
            return error;
        }
        let squeezed: String = text.chars().filter(|c| !c.is_whitespace()).collect();
        let early = squeezed.contains(":{[")
            || squeezed.contains("[\"bus\":")
            || squeezed.contains("[\"vendor_id\":")
            || squeezed.contains("[\"id\":");
        if !early {
            return ParseError::new(
                format!(
                    "text that is not JSON \
                ({e})"
                ),
                format!("JSON such as {right}"),
            );
        }
        let right = if squeezed.contains("redirection") || squeezed.contains("spicevmc") {
            "{\"usb_redirection_devices\":[{\"bus\":\"usb\",\"type\":\"spicevmc\"}]}"
        } else {
            "{\"usb_devices\":[{\"vendor_id\":\"0529\",\"product_id\":\"0001\"}]}"
        };
        ParseError::new(
            format!("the spelling {}", text.trim()),
            format!(
                "{right}: a list in square brackets of objects in curly ones, and every word \
                in quotes"
            ),
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn duplicate_keys_are_refused() {
        for (text, key) in [
            (r#"{"usb_devices":[{"vendor_id":"0529","vendor_id":"0403"}]}"#, "vendor_id"),
            (r#"{"usb_devices":[{"id":5}],"usb_devices":[{"id":6}]}"#, "usb_devices"),
        ] {
            let error = Flavor::parse(text).unwrap_err().to_string();
            assert!(error.starts_with(&format!("found the key {key:?} twice")), "{error}");
        }
        let error =
            Flavor::parse_lists(Some(r#"[{"id":5,"id":6}]"#), None).unwrap_err().to_string();
        assert!(error.starts_with("usb_devices: found the key \"id\" twice"), "{error}");
        let grant = r#"{"usb_devices":[{"id":5}],"projects":["a"],"projects":["b"]}"#;
        let error = crate::Grant::parse(grant).unwrap_err().to_string();
        assert!(error.starts_with("found the key \"projects\" twice"), "{error}");
    }

    fn error(text: &str) -> String {
        Flavor::parse(text).unwrap_err().to_string()
    }

    #[test]
    fn common_spellings_are_read_and_normalised() {
        let flavor = Flavor::parse(
            r#"{"usb_devices":[{"id":"5"},{"vendor_id":"0x529","product_id":1,"count":"2"},{"class":"mass-storage","tags":"erp"}],
                "usb_redirection_devices":{"bus":"usb","type":"spicevmc"}}"#,
        )
        .unwrap();
        assert_eq!(
            flavor.to_string(),
            r#"{"usb_devices":[{"id":5},{"vendor_id":"0529","product_id":"0001","count":2},{"class":"08","tags":["erp"]}],"usb_redirection_devices":[{"bus":"usb","type":"spicevmc"}]}"#
        );
        assert_eq!(Flavor::parse(&flavor.to_string()).unwrap(), flavor, "what it writes, it reads");
    }

    #[test]
    fn errors_say_what_and_where() {
        assert_eq!(
            error(r#"{"usb_devices":[{"id":5},{"vendor_id":"05zz"}]}"#),
            "usb_devices[1].vendor_id: found \"05zz\", wanted a vendor id of one to four \
                hexadecimal digits such as \"0529\" or \"0x0529\""
        );
        assert!(
            error(r#"{"usb_devices":[{"product_id":"1"}]}"#)
                .contains("usb_devices[0]: found a product_id alone")
        );
        assert!(error(r#"{"usb_devices":[{}]}"#).contains("at least one of id"));
        assert!(error(r#"{"usb_devices":[{"id":1,"count":2}]}"#).contains("usb_devices[0].count"));
        assert!(
            error(r#"{"usb_devices":[{"vendor_id":"1","count":0}]}"#)
                .contains("count from 1 to 127")
        );
        assert!(
            error(r#"{"usb_device":[]}"#)
                .contains("wanted one of usb_devices, usb_redirection_devices")
        );
        assert!(
            error(r#"{"usb_redirection_devices":[{"bus":"usb","type":"tcp"}]}"#)
                .contains("usb_redirection_devices[0].type")
        );
        assert!(
            error(
                r#"{"usb_devices":[{"vendor_id":"1","count":100},{"vendor_id":"2","count":100}]}"#
            )
            .contains("200 devices")
        );
        assert!(error(&"x".repeat(MAX_TEXT + 1)).contains("65537 bytes"));
    }

    #[test]
    fn the_early_spelling_is_answered_with_the_right_one() {
        let text = error(r#"{"usb_redirection_devices":{["bus": usb, "type": "spicevmc"]}}"#);
        assert!(
            text.contains(
                r#"wanted {"usb_redirection_devices":[{"bus":"usb","type":"spicevmc"}]}"#
            ),
            "{text}"
        );
        let text = error(r#"{"usb_devices":{["vendor_id": 0529]}}"#);
        assert!(
            text.contains(r#"wanted {"usb_devices":[{"vendor_id":"0529","product_id":"0001"}]}"#),
            "{text}"
        );
    }

    #[test]
    fn extra_specs_hold_the_lists_alone() {
        let flavor =
            Flavor::parse_lists(Some(r#"[{"id":5}]"#), Some(r#"{"bus":"usb","type":"spicevmc"}"#))
                .unwrap();
        assert_eq!((flavor.usb_devices.len(), flavor.usb_redirection_devices.len()), (1, 1));
        assert_eq!(
            Flavor::parse_lists(Some(r#"{"usb_devices":[{"id":5}]}"#), None)
                .unwrap()
                .usb_devices
                .len(),
            1
        );
        let whole = r#"{"usb_devices":[{"id":5}],"usb_redirection_devices":[]}"#;
        assert_eq!(Flavor::parse_lists(Some(whole), None).unwrap().usb_devices.len(), 1);
        let both = r#"{"usb_devices":[{"id":5}],"usb_redirection_devices":[{"bus":"usb","type":"spicevmc"}]}"#;
        assert!(
            Flavor::parse_lists(Some(both), None)
                .unwrap_err()
                .to_string()
                .contains("a place of its own")
        );
        assert!(Flavor::parse_lists(None, Some(" ")).unwrap().is_empty());
        let error = Flavor::parse_lists(Some("[{\"id\":0}]"), None).unwrap_err();
        assert_eq!(error.place(), "usb_devices[0].id");
    }
}
