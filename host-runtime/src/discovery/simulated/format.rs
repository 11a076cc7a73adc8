//! Parses the simulation file. Unknown keys are errors, because a misspelt key would simulate
//! something else.

use std::collections::{BTreeSet, HashMap};
use std::fmt::Display;
use std::str::FromStr;

use toml::{Table, Value};
use virt_usb_model::{
    BusAddress, Class, Device, DeviceKey, DevicePath, ParseError, PortPath, ProductId, Serial,
    UsbId, VendorId, clean_text,
};

use super::Entry;
use crate::discovery::names;
use crate::discovery::sysfs::CLAIMED;
use crate::discovery::ties::{Nodes, Ties};

const KEYS: &[&str] = &[
    "vendor",
    "product",
    "bus",
    "device",
    "port",
    "path",
    "serial",
    "class",
    "interfaces",
    "speed",
    "manufacturer",
    "product_name",
    "driver",
    "host_use",
    "descriptors",
    "generation",
    "authorized",
    "opened_by",
    "nodes",
    "unreadable",
];

/// Parses the devices of a file, in its order.
pub(super) fn parse(text: &str) -> Result<Vec<Entry>, String> {
    let table: Table = text.parse().map_err(|e: toml::de::Error| syntax(&e, text))?;
    // The simulated hypervisor parses the domains.
    if let Some(key) = table.keys().find(|key| *key != "device" && *key != "domain") {
        return Err(format!(
            "unknown key {key:?}: each device is a [[device]] of its own, each domain a [[domain]]"
        ));
    }
    let tables = match table.get("device") {
        None => &[][..],
        Some(Value::Array(tables)) => tables,
        Some(other) => {
            return Err(format!("device: found {}, wanted [[device]]", other.type_str()));
        }
    };
    let numbered = tables.iter().enumerate().map(|(i, value)| (i + 1, value));
    let entries: Vec<Entry> = numbered
        .map(|(n, value)| entry(value).map_err(|what| format!("device {n}: {what}")))
        .collect::<Result<_, _>>()?;
    distinct("port", entries.iter().map(|entry| entry.device.key.port.to_string()))?;
    distinct("bus and device", entries.iter().map(|entry| entry.device.address.to_string()))?;
    check_controllers(&entries)?;
    Ok(entries)
}

/// Checks that each bus has one root hub, and each root hub one bus.
fn check_controllers(entries: &[Entry]) -> Result<(), String> {
    let mut seen: Vec<(u8, &str, u8)> = Vec::new();
    for (n, entry) in (1..).zip(entries) {
        let Some(path) = &entry.device.key.path else { continue };
        let hub = (entry.device.key.port.bus(), path.controller(), path.version());
        let other = seen.iter().find(|known| {
            **known != hub && (known.0 == hub.0 || (known.1, known.2) == (hub.1, hub.2))
        });
        if let Some((bus, controller, version)) = other {
            return Err(format!(
                "device {n}: path: found {path} on bus {}, but bus {bus} is \
                    {controller}-usbv{version}",
                hub.0
            ));
        }
        seen.push(hub);
    }
    Ok(())
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
    let table =
        value.as_table().ok_or_else(|| format!("found {}, wanted [[device]]", value.type_str()))?;
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
        let usb = UsbId {
            vendor: self.needed("vendor", vendor)?,
            product: self.needed("product", product)?,
        };
        let address = self.address()?;
        let port: PortPath =
            self.needed("port", |value| parsed(value, "a port path such as \"1-1.4\""))?;
        if port.bus() != address.bus() {
            return Err(format!(
                "port: found {port} on bus {}: a port path begins with the bus",
                address.bus()
            ));
        }
        let path: Option<DevicePath> =
            self.optional("path", |value| parsed(value, "a device path"))?;
        if let Some(path) = path.as_ref().filter(|path| path.ports() != port.ports()) {
            return Err(format!(
                "path: found {path} at port {port}: both end with the same chain of ports"
            ));
        }
        let class = self.optional("class", class)?.unwrap_or(Class::new(0));
        Ok(Entry {
            device: Device {
                key: DeviceKey {
                    usb,
                    serial: Serial::new(self.words("serial")?, false),
                    port,
                    path,
                },
                address,
                class,
                interfaces: self.interfaces(class)?,
                speed: self.optional("speed", |value| parsed(value, "a speed"))?,
                manufacturer: self.words("manufacturer")?.or_else(|| names::vendor(usb)),
                product: self.words("product_name")?.or_else(|| names::product(usb)),
                driver: self.optional("driver", drivers)?,
                host_use: self.words("host_use")?,
                descriptors: self.optional("descriptors", |value| {
                    parsed(value, "descriptors in hexadecimal digits")
                })?,
                generation: self.optional("generation", |value| parsed(value, "a whole number"))?,
            },
            ties: self.ties()?,
            unreadable: self.optional("unreadable", truth)?.unwrap_or(false),
        })
    }

    fn ties(&self) -> Result<Ties, String> {
        let claimed = self
            .words("driver")?
            .is_some_and(|names| names.split(',').any(|n| n.trim() == CLAIMED));
        let unknown = || claimed.then(|| "claimed by a program (usbfs)".to_owned());
        let opened = self.words("opened_by")?.map(|who| format!("open in {who}"));
        let nodes =
            Nodes { paths: self.optional("nodes", paths)?.unwrap_or_default(), ..Nodes::default() };
        Ok(Ties {
            nodes,
            open: opened.or_else(unknown).into_iter().collect(),
            unauthorized: !self.optional("authorized", truth)?.unwrap_or(true),
        })
    }

    fn address(&self) -> Result<BusAddress, String> {
        let number = |value: &Value| parsed::<u8>(value, "a whole number");
        let (bus, device) = (self.needed("bus", number)?, self.needed("device", number)?);
        BusAddress::new(bus, device).ok_or_else(|| {
            format!("device: found bus {bus} device {device}, wanted bus 1-255 and device 1-127")
        })
    }

    fn interfaces(&self, class_of_device: Class) -> Result<Vec<Class>, String> {
        let usual = if class_of_device.get() == 0 { Class::new(0xff) } else { class_of_device };
        let mut interfaces = self.optional("interfaces", classes)?.unwrap_or_else(|| vec![usual]);
        interfaces.sort_unstable();
        interfaces.dedup();
        Ok(interfaces)
    }

    fn words(&self, key: &str) -> Result<Option<String>, String> {
        Ok(self
            .optional(key, |value| value.as_str().ok_or_else(|| wanted(value, "a string")))?
            .and_then(clean_text))
    }

    fn optional<'v, T>(
        &'v self,
        key: &str,
        read: impl Fn(&'v Value) -> Result<T, String>,
    ) -> Result<Option<T>, String> {
        self.0.get(key).map(read).transpose().map_err(|what| format!("{key}: {what}"))
    }

    fn needed<'v, T>(
        &'v self,
        key: &str,
        read: impl Fn(&'v Value) -> Result<T, String>,
    ) -> Result<T, String> {
        self.optional(key, read)?.ok_or_else(|| format!("{key} is missing"))
    }
}

fn vendor(value: &Value) -> Result<VendorId, String> {
    id(value, VendorId::new)
}

fn product(value: &Value) -> Result<ProductId, String> {
    id(value, ProductId::new)
}

/// Parses an id: hexadecimal text, or a number, as in the whitelist.
fn id<T: FromStr<Err = ParseError>>(
    value: &Value,
    from_number: impl Fn(u16) -> T,
) -> Result<T, String> {
    match value {
        Value::Integer(n) => u16::try_from(*n)
            .map(from_number)
            .map_err(|_| wanted(n, "an id from 0 to 65535 (0xffff)")),
        other => parsed(other, "an id such as \"0529\""),
    }
}

fn class(value: &Value) -> Result<Class, String> {
    match value {
        Value::Integer(n) => {
            u8::try_from(*n).map(Class::new).map_err(|_| wanted(n, "a class from 0 to 255 (0xff)"))
        }
        other => parsed(other, "a class such as \"08\""),
    }
}

fn classes(value: &Value) -> Result<Vec<Class>, String> {
    match value {
        Value::Array(values) => values.iter().map(class).collect(),
        one => class(one).map(|class| vec![class]),
    }
}

fn paths(value: &Value) -> Result<BTreeSet<String>, String> {
    let wrong = || wanted(value, "a list of paths below /dev");
    let path = |value: &Value| value.as_str().filter(|p| p.starts_with("/dev/")).map(str::to_owned);
    value.as_array().ok_or_else(wrong)?.iter().map(|value| path(value).ok_or_else(wrong)).collect()
}

/// Parses driver names, which are file names in sysfs.
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

/// Parses a value that is a text or a number.
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
    before.map_or_else(
        || message.clone(),
        |before| format!("line {}: {message}", 1 + before.matches('\n').count()),
    )
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use virt_usb_model::Speed;

    use super::*;

    const KEY: &str =
        "[[device]]\nvendor = '0529'\nproduct = 1\nbus = 1\ndevice = '5'\nport = '1-1.4'\n";

    fn one(more: &str) -> Device {
        parse(&format!("{KEY}{more}")).unwrap().remove(0).device
    }

    #[test]
    fn omitted_keys_have_defaults() {
        let device = one("");
        assert_eq!(device.key.to_string(), "0529:0001 at port 1-1.4");
        assert_eq!(device.address, BusAddress::new(1, 5).unwrap());
        assert_eq!(
            (device.class, device.interfaces.as_slice()),
            (Class::new(0), &[Class::new(0xff)][..])
        );
        assert_eq!(device.manufacturer.as_deref(), Some("Aladdin Knowledge Systems"));
        assert_eq!((device.speed, device.driver, device.host_use), (None, None, None));
        assert_eq!(parse("").unwrap(), []);
    }

    #[test]
    fn the_documented_example() {
        let readme = include_str!("../README.md");
        let example = readme.split("```").nth(1).unwrap().strip_prefix("toml").unwrap();
        let entry = parse(example).unwrap().remove(0);
        assert!(entry.unreadable);
        assert_eq!(entry.device.key.serial.text(), Some("HL-0001"));
        for key in KEYS {
            assert!(
                example.lines().any(|line| line.starts_with(&format!("{key} = "))),
                "{key} is explained"
            );
        }
    }

    #[test]
    fn values_have_several_notations() {
        for (text, speed) in [
            ("'full'", Speed::Full),
            ("12", Speed::Full),
            ("1.5", Speed::Low),
            ("'5000'", Speed::Super),
        ] {
            assert_eq!(one(&format!("speed = {text}")).speed, Some(speed), "{text}");
        }
        for text in ["'mass-storage'", "'08'", "8", "0x08"] {
            assert_eq!(one(&format!("class = {text}")).interfaces, [Class::new(8)], "{text}");
        }
        assert_eq!(
            one("interfaces = ['ff', 3, 'ff']").interfaces,
            [Class::new(3), Class::new(0xff)]
        );
        assert_eq!(
            one("driver = 'usbhid, snd-usb-audio'").driver.as_deref(),
            Some("snd-usb-audio,usbhid")
        );
    }

    #[test]
    fn errors_name_the_device_and_the_key() {
        let error = |more: &str| parse(&format!("{KEY}{more}")).unwrap_err();
        assert_eq!(
            error("serail = 'x'"),
            "device 1: unknown key \"serail\": did you mean \"serial\"?"
        );
        assert!(
            error("colour = 1")
                .starts_with("device 1: unknown key \"colour\": the keys are vendor,")
        );
        assert!(
            error("speed = 'fast'").starts_with("device 1: speed: found \"fast\", wanted a speed")
        );
        assert!(error("nodes = ['sdb']").starts_with("device 1: nodes: found"));
        assert!(error("authorized = 0").starts_with("device 1: authorized: found 0"));
        assert!(
            error("class = 300").starts_with("device 1: class: found 300, wanted a class from 0")
        );
        assert!(error("unreadable = 'yes'").starts_with("device 1: unreadable: found"));
        assert!(error("driver = '../x'").starts_with("device 1: driver: found \"../x\""));
        assert!(error("serial = 5").starts_with("device 1: serial: found 5, wanted a string"));
        assert!(error("serial = ").starts_with("line 7: "));
        assert_eq!(error(KEY), "device 2: port: 1-1.4 is device 1's already");
        let moved = KEY.replace("1-1.4", "1-2");
        assert_eq!(error(&moved), "device 2: bus and device: usb_1_5 is device 1's already");
        let path = "path = 'pci-0000:00:14.0-usbv2-0:1.4'\n";
        assert!(
            error("path = 'pci-0000:00:14.0-usbv2-0:1'").starts_with("device 1: path: found pci-")
        );
        assert!(
            error("path = '1-1.4'")
                .starts_with("device 1: path: found \"1-1.4\", wanted a device path")
        );
        let second = format!("{path}{}", KEY.replace("1-1.4", "1-2").replace("'5'", "6"));
        assert!(parse(&format!("{KEY}{second}path = 'pci-0000:00:14.0-usbv2-0:2'")).is_ok());
        assert_eq!(
            error(&format!("{second}path = 'pci-0000:0a:00.0-usbv2-0:2'")),
            "device 2: path: found pci-0000:0a:00.0-usbv2-0:2 on bus 1, but bus 1 is \
                pci-0000:00:14.0-usbv2"
        );
        let wrong = |from: &str, to: &str| parse(&KEY.replace(from, to)).unwrap_err();
        assert_eq!(wrong("product = 1\n", ""), "device 1: product is missing");
        assert!(
            wrong("'0529'", "'zz'")
                .starts_with("device 1: vendor: found \"zz\", wanted a vendor id")
        );
        assert!(wrong("bus = 1", "bus = 2").starts_with("device 1: port: found 1-1.4 on bus 2"));
        assert!(wrong("'5'", "0").contains("wanted bus 1-255 and device 1-127"));
        assert!(wrong("'5'", "500").starts_with("device 1: device: found"));
        assert!(
            wrong("1-1.4", "usb1")
                .starts_with("device 1: port: found \"usb1\", wanted a port path")
        );
        assert_eq!(
            parse("host = 1").unwrap_err(),
            "unknown key \"host\": each device is a [[device]] of its own, each domain a [[domain]]"
        );
        assert_eq!(parse("device = 1").unwrap_err(), "device: found integer, wanted [[device]]");
        assert_eq!(
            parse("device = [1]").unwrap_err(),
            "device 1: found integer, wanted [[device]]"
        );
    }

    proptest! {
        #[test]
        fn no_text_is_a_panic(text in any::<String>()) {
            let _ = parse(&text);
        }

        #[test]
        fn no_value_is_a_panic(
            key in proptest::sample::select(KEYS),
            value in prop_oneof![
                any::<i64>().prop_map(|n| n.to_string()),
                any::<f64>().prop_filter("TOML", |n| n.is_finite()).prop_map(|n| format!("{n:?}")),
                ".{0,200}".prop_map(|text| format!("{text:?}")),
                proptest::collection::vec(any::<u16>(), 0..4).prop_map(|list| format!("{list:?}")),
                Just("{ a = 1 }".to_owned()),
                Just("1979-05-27".to_owned()),
            ],
        ) {
            let is_other = |line: &&str| !line.starts_with(&format!("{key} "));
            let others: String =
                KEY.lines().filter(is_other).map(|line| format!("{line}\n")).collect();
            let _ = parse(&format!("{others}{key} = {value}\n"));
        }
    }
}
