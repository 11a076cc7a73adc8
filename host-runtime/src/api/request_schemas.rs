//! Schemas of the request bodies: strict, but as tolerant as the model's parsers. A derived schema
//! cannot express that a key excludes another, or that a number may be text.

use std::borrow::Cow;

use serde_json::{Map, Value, json};
use utoipa::openapi::{RefOr, Schema};
use utoipa::{PartialSchema, ToSchema};
use virt_usb_model::flavor::{MAX_DEVICES, MAX_REDIRECTIONS, REQUEST_KEYS};
use virt_usb_model::grant::MAX_ENTRIES;
use virt_usb_model::{DeviceId, Status};

use super::paging::LAST_MARKER;

/// Pattern of a USB id: one to four hexadecimal digits.
const HEX: &str = "^(0[xX])?[0-9a-fA-F]{1,4}$";
/// Pattern of a UUID: 32 hexadecimal digits; hyphens are ignored.
const UUID: &str = "^(-*[0-9a-fA-F]){32}-*$";
/// Pattern of a tag: letters, digits and some punctuation.
const TAG: &str = r"^[\p{L}\p{N}_.:/-]{1,64}$";
/// Pattern of a project id: no white space and no control characters.
const PROJECT: &str =
    r"^[^\u0000-\u0020\u007f-\u00a0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]{1,255}$";
/// Pattern of the name of a stored flavor or a grant.
const NAME: &str = r"^[^@\u0000-\u001f\u007f-\u009f\u061c\u200b-\u200f\u2028-\u202e\u2066-\u2069\ufeff][^\u0000-\u001f\u007f-\u009f\u061c\u200b-\u200f\u2028-\u202e\u2066-\u2069\ufeff]{0,254}$";

/// Schema of a parameter with this name, in any path or query; `None` to use the schema of its
/// call.
pub(super) fn parameter(name: &str) -> Option<RefOr<Schema>> {
    let text = |pattern| json!({ "type": "string", "pattern": pattern });
    let number =
        |least: u64, most: u64| json!({ "type": "integer", "minimum": least, "maximum": most });
    let schema = match name {
        "tenant_id" => text(PROJECT),
        "server_id" | "instance_uuid" => text(UUID),
        "usb_device_id" => number(1, DeviceId::MAX),
        "flavor_name" | "grant_name" => text(NAME),
        "vendor_id" | "product_id" => text(HEX),
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
    json!({ "type": "array", "minItems": least, "items": { "type": "string", "pattern": TAG } })
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
    let describe = |named: &[&str], nothing: &[&str]| {
        let count = if named.contains(&"id") { most.map(|_| 1) } else { most };
        let describe = |key: &str| match nothing.contains(&key) {
            true => json!({ "type": "null" }),
            false => value(key, named.contains(&key), count.unwrap_or(1)),
        };
        let keys = REQUEST_KEYS.into_iter().filter(|key| *key != "count" || count.is_some());
        let properties: Map<String, Value> =
            keys.map(|key| (key.to_owned(), describe(key))).collect();
        json!({
            "type": "object",
            "required": named,
            "properties": properties,
            "additionalProperties": false,
        })
    };
    let alone = &["id", "vendor_id", "product_id"];
    json!({
        "description": "Selector of a device, which must match all keys. An id names one device; \
            a product_id needs the vendor_id.",
        "example": { "id": 1 },
        "anyOf": [
            describe(&["id"], &["vendor_id", "product_id"]),
            describe(&["id", "vendor_id"], &[]),
            describe(&["vendor_id"], &["id"]),
            describe(&["serial"], alone),
            describe(&["port"], alone),
            describe(&["path"], alone),
            describe(&["class"], alone),
            describe(&["tags"], alone),
        ],
    })
}

/// Pattern of a port number at a hub: 1 to 255, in up to three digits.
const NUMBER: &str = "(0{0,2}[1-9]|0?[1-9][0-9]|1[0-9]{2}|2[0-4][0-9]|25[0-5])";

/// Schema of the value of a key; `null` means the same as a missing key.
fn value(key: &str, needed: bool, most: u32) -> Value {
    let kinds = |kinds: &[&str]| -> Value {
        kinds.iter().copied().chain((!needed).then_some("null")).collect()
    };
    match key {
        "id" => json!({
            "type": kinds(&["integer", "string"]),
            "description": "The device's id.",
            "minimum": 1,
            "maximum": DeviceId::MAX,
            "pattern": "^0*([1-9][0-9]{0,14}|[1-8][0-9]{15})$",
        }),
        "vendor_id" | "product_id" => json!({
            "type": kinds(&["string", "integer"]),
            "description": "One to four hexadecimal digits, or a number.",
            "minimum": 0,
            "maximum": 0xffff,
            "pattern": HEX,
        }),
        "serial" => json!({
            "type": kinds(&["string", "number"]),
            "pattern": r"^[^\u0000-\u001f\u007f-\u009f]{1,126}$",
        }),
        "path" => json!({
            "type": kinds(&["string"]),
            "description": "A device path: the controller, the USB version of its root hub, the \
                port at each hub.",
            "pattern": format!(r"^[A-Za-z0-9_.:@,+-]{{1,200}}-usbv0{{0,2}}[1-9]-0:{NUMBER}(\.{NUMBER}){{0,6}}$"),
        }),
        "port" => {
            json!({
                "type": kinds(&["string"]),
                "description": "A port path.",
                "pattern": format!(r"^{NUMBER}-{NUMBER}(\.{NUMBER}){{0,6}}$"),
            })
        }
        "class" => {
            let names: Vec<&str> =
                (0..=u8::MAX).filter_map(|code| virt_usb_model::Class::new(code).name()).collect();
            json!({
                "type": kinds(&["string", "integer"]),
                "description": "Two hexadecimal digits, a number, or a name.",
                "minimum": 0,
                "maximum": 0xff,
                "pattern": format!("^((0[xX])?[0-9a-fA-F]{{1,2}}|{})$", names.join("|")),
            })
        }
        "tags" => {
            let tag = json!({ "type": "string", "pattern": TAG });
            let nothing = (!needed).then(|| json!({ "type": "null" }));
            let some: Vec<Value> = [tags(needed.into()), tag].into_iter().chain(nothing).collect();
            json!({ "anyOf": some })
        }
        _ => json!({
            "type": ["integer", "string", "null"],
            "description": "Number of devices; 1 if absent.",
            "minimum": 1,
            "maximum": most,
            "pattern": if most == 1 { "^0*1$" } else { "^0*([1-9][0-9]?|1[01][0-9]|12[0-7])$" },
        }),
    }
}
