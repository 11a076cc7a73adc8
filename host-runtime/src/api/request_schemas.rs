//! Schemas of the request bodies: strict, but as tolerant as the model's parsers. A derived schema
//! cannot express that a key excludes another, or that a number may be text.

use std::borrow::Cow;

use serde_json::{Map, Value, json};
use utoipa::openapi::{RefOr, Schema};
use utoipa::{PartialSchema, ToSchema};
use virt_usb_model::flavor::{MAX_DEVICES, MAX_REDIRECTIONS};
use virt_usb_model::grant::MAX_ENTRIES;
use virt_usb_model::request_key::{
    Numbers, REQUEST_KEYS, RequestKey, SELECTOR_KEYS, hex_id_pattern, tag_pattern, whole_pattern,
};
use virt_usb_model::{DeviceId, Status};

use super::paging::LAST_MARKER;

/// Pattern of a UUID: 32 hexadecimal digits; hyphens are ignored.
const UUID: &str = "^(-*[0-9a-fA-F]){32}-*$";
/// Pattern of a project id: no white space and no control characters.
const PROJECT: &str =
    r"^[^\u0000-\u0020\u007f-\u00a0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]{1,255}$";
/// Pattern of the name of a stored flavor or a grant.
const NAME: &str = r"^[^@\u0000-\u001f\u007f-\u009f\u061c\u200b-\u200f\u2028-\u202e\u2066-\u2069\ufeff][^\u0000-\u001f\u007f-\u009f\u061c\u200b-\u200f\u2028-\u202e\u2066-\u2069\ufeff]{0,254}$";

/// Schema of a parameter with this name, in any path or query; `None` to use the schema of its
/// call.
pub(super) fn parameter(name: &str) -> Option<RefOr<Schema>> {
    let text = |pattern: &str| json!({ "type": "string", "pattern": pattern });
    let number =
        |least: u64, most: u64| json!({ "type": "integer", "minimum": least, "maximum": most });
    let schema = match name {
        "tenant_id" => text(PROJECT),
        "server_id" | "instance_uuid" => text(UUID),
        "usb_device_id" => number(1, DeviceId::MAX),
        "flavor_name" | "grant_name" => text(NAME),
        "vendor_id" | "product_id" => text(&hex_id_pattern()),
        "status" => json!({ "type": "string", "enum": Status::NAMES }),
        "limit" => number(1, u32::MAX.into()),
        "marker" => number(0, LAST_MARKER),
        _ => return None,
    };
    Some(described(schema))
}

/// Parses a schema of this module; these texts are always valid.
fn described(schema: Value) -> RefOr<Schema> {
    serde_json::from_value::<Schema>(schema).unwrap_or_default().into()
}

macro_rules! described {
    ($($(#[$doc:meta])* $name:ident = $schema:expr;)*) => {$(
        $(#[$doc])*
        pub(super) struct $name;

        impl PartialSchema for $name {
            fn schema() -> RefOr<Schema> {
                described($schema)
            }
        }

        impl ToSchema for $name {
            fn name() -> Cow<'static, str> {
                stringify!($name).into()
            }
        }
    )*};
}

described! {
    /// Request of a server or a flavor for devices that match all its keys.
    UsbDeviceRequest = device_request(Some(MAX_DEVICES));
    /// Request to detach a device that matches all its keys.
    UsbDeviceDetachRequest = device_request(Some(1));
    /// Selector of a grant: the devices that match all its keys.
    UsbDeviceSelector = device_request(None);
    /// Request for a USB port for redirection from a SPICE client.
    UsbRedirectionRequest = json!({
        "type": "object",
        "description": "A USB port for redirection from a SPICE client.",
        "required": ["bus", "type"],
        "properties": {
            "bus": { "type": "string", "enum": ["usb"] },
            "type": { "type": "string", "enum": ["spicevmc"] },
        },
        "additionalProperties": false,
    });
    /// Body that stores a flavor: its requests.
    FlavorRequest = flavor_request();
    /// Body that stores a grant: its devices and its projects.
    GrantRequest = json!({
        "type": "object",
        "description": "Devices, and the projects that they are available to.",
        "example": {
            "usb_devices": [{ "vendor_id": "0529", "product_id": "0001" }],
            "projects": ["4f1c0d2e"],
        },
        "required": ["usb_devices", "projects"],
        "properties": {
            "usb_devices": some(&reference("UsbDeviceSelector"), MAX_ENTRIES),
            "projects": some(&json!({ "type": "string", "pattern": PROJECT }), MAX_ENTRIES),
        },
        "additionalProperties": false,
    });
    /// Body with one action on a server.
    ServerActionRequest = json!({
        "description": "Exactly one action.",
        "example": { "attach_usb_devices": { "usb_devices_requests": [{ "id": 1 }] } },
        "oneOf": [
            one("attach_usb_devices", requests("UsbDeviceRequest")),
            one("detach_usb_devices", requests("UsbDeviceDetachRequest")),
            one(
                "set_usb_owner",
                one("project_id", json!({ "type": "string", "pattern": PROJECT })),
            ),
            one("clear_usb_owner", json!({ "type": "null" })),
        ],
    });
    /// Body with one action on a device.
    DeviceActionRequest = json!({
        "description": "Exactly one action.",
        "example": { "disable": { "reason": "lent" } },
        "oneOf": [
            one("enable", json!({ "type": "null" })),
            one("disable", json!({
                "type": "object",
                "properties": {
                    "reason": {
                        "type": ["string", "null"],
                        "maxLength": 255,
                        "description": "Reason why the device is disabled.",
                    },
                },
                "additionalProperties": false,
            })),
            one("clear_quarantine", json!({ "type": "null" })),
            one("add_tags", one("tags", tags(0))),
            one("remove_tags", one("tags", tags(0))),
        ],
    });
}

/// Schema of an object that has exactly this key.
fn one(key: &str, value: Value) -> Value {
    let properties: Map<String, Value> = [(key.to_owned(), value)].into_iter().collect();
    json!({
        "type": "object",
        "required": [key],
        "properties": properties,
        "additionalProperties": false,
    })
}

fn reference(name: &str) -> Value {
    json!({ "$ref": format!("#/components/schemas/{name}") })
}

fn requests(item: &str) -> Value {
    let list = json!({
        "type": "array",
        "minItems": 1,
        "maxItems": MAX_DEVICES,
        "items": reference(item),
        "description": format!("Requests for at most {MAX_DEVICES} devices in total."),
    });
    one("usb_devices_requests", list)
}

fn tags(least: u32) -> Value {
    let tag = json!({ "type": "string", "pattern": tag_pattern() });
    json!({ "type": "array", "minItems": least, "items": tag })
}

/// Schema of a list of items, a single item, or null.
fn list(item: &Value, most: usize) -> Value {
    let items = json!({ "type": "array", "maxItems": most, "items": item });
    json!({ "anyOf": [items, item, { "type": "null" }] })
}

/// Schema of a list of at least one item, or a single item.
fn some(item: &Value, most: usize) -> Value {
    json!({ "anyOf": [{ "type": "array", "minItems": 1, "maxItems": most, "items": item }, item] })
}

fn flavor_request() -> Value {
    let (device, port) = (reference("UsbDeviceRequest"), reference("UsbRedirectionRequest"));
    let devices = MAX_DEVICES as usize;
    let asks = |key: &str, properties: Value| {
        json!({
            "type": "object",
            "required": [key],
            "properties": properties,
            "additionalProperties": false,
        })
    };
    json!({
        "description": format!("Requests of a flavor: at least one, and for at most {MAX_DEVICES} \
            devices in total."),
        "example": { "usb_devices": [{ "vendor_id": "0529", "product_id": "0001" }] },
        "anyOf": [
            asks("usb_devices", json!({
                "usb_devices": some(&device, devices),
                "usb_redirection_devices": list(&port, MAX_REDIRECTIONS),
            })),
            asks("usb_redirection_devices", json!({
                "usb_devices": list(&device, devices),
                "usb_redirection_devices": some(&port, MAX_REDIRECTIONS),
            })),
        ],
    })
}

/// Schema of a device request: keys in `named` must have a value, keys in `nothing` may only be
/// `null`, other keys may have either. `most` is the maximum count; `None` leaves `count` out.
fn device_request(most: Option<u32>) -> Value {
    let (selectors, counts) = REQUEST_KEYS.split_at(SELECTOR_KEYS);
    let describe = |named: &[&str], nothing: &[&str]| {
        let most = if named.contains(&"id") { most.map(|_| 1) } else { most };
        let selectors = selectors.iter().map(|key| match nothing.contains(&key.name) {
            true => (key, json!({ "type": "null" })),
            false => (key, key_schema(key, named.contains(&key.name), None)),
        });
        let counts =
            counts.iter().filter_map(|key| Some((key, key_schema(key, false, Some(most?)))));
        let properties: Map<String, Value> =
            selectors.chain(counts).map(|(key, schema)| (key.name.to_owned(), schema)).collect();
        json!({
            "type": "object",
            "required": named,
            "properties": properties,
            "additionalProperties": false,
        })
    };
    // An id and a vendor change what other keys may be; each of the others can stand alone.
    let exclusive = &["id", "vendor_id", "product_id"];
    let mut any = vec![
        describe(&["id"], &["vendor_id", "product_id"]),
        describe(&["id", "vendor_id"], &[]),
        describe(&["vendor_id"], &["id"]),
    ];
    let names = selectors.iter().map(|key| key.name).filter(|name| !exclusive.contains(name));
    any.extend(names.map(|name| describe(&[name], exclusive)));
    json!({
        "description": "Selector of a device, which must match all keys. An id names one device; \
            a product_id needs the vendor_id.",
        "example": { "id": 1 },
        "anyOf": any,
    })
}

/// Schema of the value of a key, from the model's definition; `null` means the same as a missing
/// key. `most` is the largest number, if it is smaller here than in the definition.
fn key_schema(key: &RequestKey, needed: bool, most: Option<u32>) -> Value {
    let pattern = most.map_or_else(key.pattern, |most| whole_pattern(most.into()));
    let null = (!needed).then_some("null");
    if key.is_list {
        let one = json!({ "type": "string", "pattern": pattern });
        let list = json!({ "type": "array", "minItems": u8::from(needed), "items": one });
        let null = null.map(|kind| json!({ "type": kind }));
        let any: Vec<Value> = [list, one].into_iter().chain(null).collect();
        return json!({ "description": sentence(key.description), "anyOf": any });
    }
    let number = match key.numbers {
        Numbers::None => None,
        Numbers::Any => Some("number"),
        Numbers::Whole { .. } => Some("integer"),
    };
    let kinds: Vec<&str> = ["string"].into_iter().chain(number).chain(null).collect();
    match key.numbers {
        Numbers::None | Numbers::Any => json!({
            "type": kinds,
            "description": sentence(key.description),
            "pattern": pattern,
        }),
        Numbers::Whole { min, max } => json!({
            "type": kinds,
            "description": sentence(key.description),
            "minimum": min,
            "maximum": most.map_or(max, Into::into),
            "pattern": pattern,
        }),
    }
}

/// A phrase as a sentence.
fn sentence(phrase: &str) -> String {
    let mut letters = phrase.chars();
    let first = letters.next().map(|letter| letter.to_ascii_uppercase());
    first.into_iter().chain(letters).chain(['.']).collect()
}
