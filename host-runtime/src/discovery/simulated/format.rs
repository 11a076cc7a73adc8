//! The file format of the simulation: strict, because a misspelt key would simulate something else.

use std::collections::HashMap;
use std::fmt::Display;
use std::str::FromStr;

use toml::{Table, Value};
use virt_usb_model::{
    BusAddress, Class, Device, DeviceKey, ParseError, PortPath, ProductId, Serial, Speed, UsbId, VendorId, clean_text,
};

use super::Entry;
use crate::discovery::names;

const KEYS: &[&str] = &[
    "vendor",
    "product",
    "bus",
    "device",
    "port",
    "serial",
    "class",
    "interfaces",
    "speed",
    "manufacturer",
    "product_name",
    "driver",
    "host_use",
    "unreadable",
];

/// The devices of a file, in its order.
pub(super) fn parse(text: &str) -> Result<Vec<Entry>, String> {
    let table: Table = text.parse().map_err(|e: toml::de::Error| syntax(&e, text))?;
    if let Some(key) = table.keys().find(|key| *key != "device") {
        return Err(format!("unknown key {key:?}: each device is a [[device]] of its own"));
    }
    let tables = match table.get("device") {
        None => &[][..],
        Some(Value::Array(tables)) => tables,
        Some(other) => return Err(format!("device: found {}, wanted [[device]]", other.type_str())),
    };
    let numbered = tables.iter().enumerate().map(|(i, value)| (i + 1, value));
    let entries: Vec<Entry> =
        numbered.map(|(n, value)| entry(value).map_err(|what| format!("device {n}: {what}"))).collect::<Result<_, _>>()?;
    distinct("port", entries.iter().map(|entry| entry.device.key.port.to_string()))?;
    distinct("bus and device", entries.iter().map(|entry| entry.device.address.to_string()))?;
    Ok(entries)
}

fn distinct(what: &str, values: impl Iterator<Item = String>) -> Result<(), String> {
    let mut seen = HashMap::new();
    for (value, n) in values.zip(1..) {
        if let Some(earlier) = seen.insert(value.clone(), n) {
            return Err(format!("device {n}: {what}: {value} is device {earlier}'s already"));
        }
    }
    Ok(())
}

fn entry(value: &Value) -> Result<Entry, String> {
    let table = value.as_table().ok_or_else(|| format!("found {}, wanted [[device]]", value.type_str()))?;
    if let Some(key) = table.keys().find(|key| !KEYS.contains(&key.as_str())) {
        return Err(unknown(key));
    }
    Fields(table).entry()
}

fn unknown(key: &str) -> String {
    let near = KEYS.iter().map(|known| (strsim::damerau_levenshtein(key, known), *known)).min();
    match near {
        Some((distance, known)) if distance <= 1 + known.len() / 3 => {
            format!("unknown key {key:?}: did you mean {known:?}?")
        }
        _ => format!("unknown key {key:?}: the keys are {}", KEYS.join(", ")),
    }
}

struct Fields<'a>(&'a Table);

impl Fields<'_> {
    fn entry(&self) -> Result<Entry, String> {
        let usb = UsbId { vendor: self.needed("vendor", vendor)?, product: self.needed("product", product)? };
        let address = self.address()?;
        let port: PortPath = self.needed("port", |value| parsed(value, "a port path such as \"1-1.4\""))?;
        if port.bus() != address.bus() {
            return Err(format!("port: found {port} on bus {}: a port path begins with the bus", address.bus()));
        }
        let class = self.optional("class", class)?.unwrap_or(Class::new(0));
        Ok(Entry {
            device: Device {
                key: DeviceKey { usb, serial: Serial::new(self.words("serial")?, false), port },
                address,
                class,
                interfaces: self.interfaces(class)?,
                speed: self.optional("speed", |value| parsed(value, "a speed"))?,
                manufacturer: self.words("manufacturer")?.or_else(|| names::vendor(usb)),
                product: self.words("product_name")?.or_else(|| names::product(usb)),
                driver: self.optional("driver", drivers)?,
                host_use: self.words("host_use")?,
            },
            unreadable: self.optional("unreadable", truth)?.unwrap_or(false),
        })
    }

    fn address(&self) -> Result<BusAddress, String> {
        let number = |value: &Value| parsed::<u8>(value, "a whole number");
        let (bus, device) = (self.needed("bus", number)?, self.needed("device", number)?);
        BusAddress::new(bus, device)
            .ok_or_else(|| format!("device: found bus {bus} device {device}, wanted bus 1-255 and device 1-127"))
    }

    fn interfaces(&self, class_of_device: Class) -> Result<Vec<Class>, String> {
        let usual = if class_of_device.get() == 0 { Class::new(0xff) } else { class_of_device };
        let mut interfaces = self.optional("interfaces", classes)?.unwrap_or_else(|| vec![usual]);
        interfaces.sort_unstable();
        interfaces.dedup();
        Ok(interfaces)
    }

    fn words(&self, key: &str) -> Result<Option<String>, String> {
        Ok(self.optional(key, |value| value.as_str().ok_or_else(|| wanted(value, "a string")))?.and_then(clean_text))
    }

    fn optional<'v, T>(&'v self, key: &str, read: impl Fn(&'v Value) -> Result<T, String>) -> Result<Option<T>, String> {
        self.0.get(key).map(read).transpose().map_err(|what| format!("{key}: {what}"))
    }

    fn needed<'v, T>(&'v self, key: &str, read: impl Fn(&'v Value) -> Result<T, String>) -> Result<T, String> {
        self.optional(key, read)?.ok_or_else(|| format!("{key} is missing"))
    }
}

fn vendor(value: &Value) -> Result<VendorId, String> {
    id(value, VendorId::new)
}

fn product(value: &Value) -> Result<ProductId, String> {
    id(value, ProductId::new)
}

/// Text is hexadecimal, a number is its value: as in the whitelist.
fn id<T: FromStr<Err = ParseError>>(value: &Value, from_number: impl Fn(u16) -> T) -> Result<T, String> {
    match value {
        Value::Integer(n) => u16::try_from(*n).map(from_number).map_err(|_| wanted(n, "an id from 0 to 65535 (0xffff)")),
        other => parsed(other, "an id such as \"0529\""),
    }
}

fn class(value: &Value) -> Result<Class, String> {
    match value {
        Value::Integer(n) => u8::try_from(*n).map(Class::new).map_err(|_| wanted(n, "a class from 0 to 255 (0xff)")),
        other => parsed(other, "a class such as \"08\""),
    }
}

fn classes(value: &Value) -> Result<Vec<Class>, String> {
    match value {
        Value::Array(values) => values.iter().map(class).collect(),
        one => class(one).map(|class| vec![class]),
    }
}

/// Driver names are file names in sysfs.
fn drivers(value: &Value) -> Result<String, String> {
    let text = value.as_str().ok_or_else(|| wanted(value, "a driver's name"))?;
    let mut names: Vec<&str> = text.split(',').map(str::trim).collect();
    let fits = |name: &&str| {
        let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'-');
        !name.is_empty() && name.len() <= 64 && name.bytes().all(plain)
    };
    if !names.iter().all(fits) {
        return Err(wanted(format!("{text:?}"), "drivers' names joined by commas"));
    }
    names.sort_unstable();
    names.dedup();
    Ok(names.join(","))
}

fn truth(value: &Value) -> Result<bool, String> {
    value.as_bool().ok_or_else(|| wanted(value, "true or false"))
}

/// A value that is text, or a number written as such.
fn parsed<T: FromStr<Err: Display>>(value: &Value, what: &str) -> Result<T, String> {
    let text = match value {
        Value::String(text) => text.clone(),
        Value::Integer(_) | Value::Float(_) => value.to_string(),
        other => return Err(wanted(other, what)),
    };
    text.parse().map_err(|e: T::Err| e.to_string()).map_err(|e| match e.starts_with("found") {
        true => e,
        false => wanted(format!("{text:?}"), what),
    })
}

fn wanted(found: impl Display, what: &str) -> String {
    ParseError::new(found, what).to_string()
}

fn syntax(e: &toml::de::Error, text: &str) -> String {
    let before = e.span().and_then(|span| text.get(..span.start));
    let message = e.message().split_whitespace().collect::<Vec<_>>().join(" ");
    before.map_or_else(|| message.clone(), |before| format!("line {}: {message}", 1 + before.matches('\n').count()))
}
