//! The host document: what a host tells the world about its devices.
//!
//! One format everywhere: what the API serves, what a shared inventory holds, what a scheduler's
//! filter is fed and what `virt-usb devices --json` prints (its `devices`).

use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;

use serde::Serialize;
use serde_json::Value;

use crate::json::{FromJson, Object, parse_text, whole};
use crate::{
    BusAddress, Class, DeviceId, DevicePath, InstanceId, ParseError, PortPath, ProductId,
    ProjectId, Serial, Speed, Status, VendorId,
};

/// The version of the format; a reader refuses another.
pub const VERSION: u64 = 1;

/// One host and its devices at one moment.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct HostDocument {
    version: u64,
    /// The host's name.
    pub host: String,
    /// Number of the host in the fleet, from 1; 1 is a host that has not joined a fleet.
    pub compute_node_id: u64,
    /// Grows with every change of the inventory, never falls.
    pub revision: u64,
    /// All devices that are plugged in or held, by id.
    pub devices: Vec<DeviceEntry>,
}

impl HostDocument {
    /// A document of the current [`VERSION`].
    pub const fn new(
        host: String,
        compute_node_id: u64,
        revision: u64,
        devices: Vec<DeviceEntry>,
    ) -> Self {
        Self { version: VERSION, host, compute_node_id, revision, devices }
    }

    /// The JSON text for other hosts, without parts that readers do not need. If it would be longer
    /// than `limit` bytes, it leaves out the names of makers and products first, then the paths,
    /// and then devices: first unavailable ones, then held ones, then available ones.
    pub fn published(&self, limit: usize) -> Published {
        let lean = |words: bool, paths: bool| -> Vec<(u8, String)> {
            let text = |device| {
                serde_json::to_string(&Lean::new(device, words, paths)).unwrap_or_default()
            };
            self.devices.iter().map(|device| (device.rank(), text(device))).collect()
        };
        let head = serde_json::to_string(&Self { devices: Vec::new(), ..self.clone() })
            .unwrap_or_default();
        let head = head.strip_suffix("]}").unwrap_or_default();
        let size = |devices: &[(u8, String)]| {
            head.len() + 2 + devices.iter().map(|(_, text)| text.len() + 1).sum::<usize>()
        };
        let mut devices = lean(true, true);
        for paths in [true, false] {
            if size(&devices) > limit {
                devices = lean(false, paths);
            }
        }
        let all = devices.len();
        for rank in 0..3 {
            let mut over = size(&devices).saturating_sub(limit);
            // The last ones first.
            let mut kept = Vec::new();
            while let Some((of, text)) = devices.pop() {
                if over > 0 && of == rank {
                    over = over.saturating_sub(text.len() + 1);
                } else {
                    kept.push((of, text));
                }
            }
            kept.reverse();
            devices = kept;
        }
        let left_out = all - devices.len();
        let list: Vec<String> = devices.into_iter().map(|(_, text)| text).collect();
        Published { text: alloc::format!("{head}{}]}}", list.join(",")), left_out }
    }

    /// Reads the JSON text.
    ///
    /// # Errors
    /// Says which device and which key was wrong.
    pub fn parse(text: &str) -> Result<Self, ParseError> {
        let value = parse_text(text)?;
        let object = Object::new(
            &value,
            "a host document",
            &["version", "host", "compute_node_id", "revision", "devices"],
        )?;
        match object.raw("version").and_then(whole) {
            Some(VERSION) => {}
            _ => {
                let found =
                    object.raw("version").map_or_else(|| "none".to_string(), ToString::to_string);
                return Err(ParseError::new(
                    found,
                    alloc::format!("{VERSION}: another version needs another virt-usb"),
                )
                .at("version"));
            }
        }
        let number = |key: &str| {
            object
                .raw(key)
                .and_then(whole)
                .ok_or_else(|| ParseError::new("no such number", "a whole number").at(key))
        };
        let host = object
            .take("host")?
            .ok_or_else(|| ParseError::new("no name", "the host's name").at("host"))?;
        let compute_node_id = number("compute_node_id")?;
        let mut devices: Vec<DeviceEntry> = object.list("devices")?;
        for device in devices.iter_mut().filter(|device| device.compute_node_id == 0) {
            device.compute_node_id = compute_node_id;
        }
        Ok(Self::new(host, compute_node_id, number("revision")?, devices))
    }
}

/// A document on its way to others.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Published {
    /// The JSON text.
    pub text: String,
    /// How many devices are not in it, for want of room.
    pub left_out: usize,
}

/// One device of the document. The keys are the columns of the inventory's `usb_devices`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct DeviceEntry {
    /// Id of the device in the fleet.
    pub id: DeviceId,
    /// The host that it is plugged into.
    pub compute_node_id: u64,
    /// `usb_<bus>_<device>`.
    pub address: BusAddress,
    /// Product id of the device.
    pub product_id: ProductId,
    /// Vendor id of the device.
    pub vendor_id: VendorId,
    /// Bus number of the device.
    pub bus_id: u8,
    /// Device number on the bus.
    pub device_id: u8,
    /// Last number of the port path.
    pub port_id: u8,
    /// The state's name.
    pub status: String,
    /// Why it is unavailable.
    pub status_reason: Option<String>,
    /// Free text of the operator.
    pub extra_info: Option<String>,
    /// Instance that holds the device.
    pub instance_uuid: Option<InstanceId>,
    /// Port path of the device.
    pub port_path: PortPath,
    /// Serial number of the device.
    pub serial: Option<String>,
    /// `unique`, `duplicate`, `worthless` or `missing`.
    pub serial_kind: String,
    /// Value of bDeviceClass.
    pub class: Class,
    /// bInterfaceClass of each interface.
    pub interface_classes: Vec<Class>,
    /// Speed, where known.
    pub speed: Option<Speed>,
    /// Name of the manufacturer.
    pub manufacturer: Option<String>,
    /// Name of the product.
    pub product_name: Option<String>,
    /// Kernel drivers bound.
    pub driver: Option<String>,
    /// Use of the device by the host.
    pub host_use: Option<String>,
    /// The socket that it is plugged into, whatever the bus numbers are; `None` where that is not
    /// known.
    pub path: Option<DevicePath>,
    /// Tags of the device.
    pub tags: Vec<String>,
    /// The only projects that get it; empty: every one.
    pub projects: Vec<ProjectId>,
}

impl DeviceEntry {
    /// The state, from its two columns.
    ///
    /// # Errors
    /// If the columns do not name one: an entry that was parsed always does.
    pub fn state(&self) -> Result<Status, ParseError> {
        Status::from_columns(&self.status, self.status_reason.as_deref())
    }

    /// Order in which devices are left out: 0 for unavailable, 1 for held, 2 for available devices.
    fn rank(&self) -> u8 {
        match self.status.as_str() {
            "available" => 2,
            "claimed" | "allocated" => 1,
            _ => 0,
        }
    }
}

/// An entry without what is empty and what follows from the rest, its keys in the same order.
#[derive(Serialize)]
struct Lean<'a> {
    id: DeviceId,
    address: BusAddress,
    product_id: ProductId,
    vendor_id: VendorId,
    status: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    status_reason: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    extra_info: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    instance_uuid: Option<InstanceId>,
    port_path: &'a PortPath,
    #[serde(skip_serializing_if = "Option::is_none")]
    serial: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    serial_kind: Option<&'a str>,
    class: Class,
    #[serde(skip_serializing_if = "<[_]>::is_empty")]
    interface_classes: &'a [Class],
    #[serde(skip_serializing_if = "Option::is_none")]
    speed: Option<Speed>,
    #[serde(skip_serializing_if = "Option::is_none")]
    manufacturer: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    product_name: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    driver: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    host_use: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    path: Option<&'a DevicePath>,
    #[serde(skip_serializing_if = "<[_]>::is_empty")]
    tags: &'a [String],
    #[serde(skip_serializing_if = "<[_]>::is_empty")]
    projects: &'a [ProjectId],
}

impl<'a> Lean<'a> {
    /// With or without what only people read, with or without the path.
    fn new(entry: &'a DeviceEntry, words: bool, paths: bool) -> Self {
        let text = |text: &'a Option<String>| text.as_deref().filter(|_| words);
        // A serial that identifies nothing: readers of older releases know one word for that.
        let kind = match entry.serial_kind.as_str() {
            "worthless" => "duplicate",
            kind => kind,
        };
        Self {
            id: entry.id,
            address: entry.address,
            product_id: entry.product_id,
            vendor_id: entry.vendor_id,
            status: &entry.status,
            status_reason: entry.status_reason.as_deref(),
            extra_info: text(&entry.extra_info),
            instance_uuid: entry.instance_uuid,
            port_path: &entry.port_path,
            serial: entry.serial.as_deref(),
            serial_kind: Some(kind).filter(|kind| *kind != implied_kind(entry.serial.as_deref())),
            class: entry.class,
            interface_classes: &entry.interface_classes,
            speed: entry.speed,
            manufacturer: text(&entry.manufacturer),
            product_name: text(&entry.product_name),
            driver: text(&entry.driver),
            host_use: text(&entry.host_use),
            tags: &entry.tags,
            projects: &entry.projects,
            path: entry.path.as_ref().filter(|_| paths),
        }
    }
}

fn implied_kind(serial: Option<&str>) -> &'static str {
    if serial.is_some() { "unique" } else { "missing" }
}

/// Keys of the inventory that a document may carry and that readers pass over.
const PASSED_OVER: &[&str] =
    &["created_at", "updated_at", "deleted_at", "deleted", "bus_id", "device_id", "port_id"];
const KEYS: &[&str] = &[
    "id",
    "compute_node_id",
    "address",
    "product_id",
    "vendor_id",
    "status",
    "status_reason",
    "extra_info",
    "instance_uuid",
    "port_path",
    "serial",
    "serial_kind",
    "class",
    "interface_classes",
    "speed",
    "manufacturer",
    "product_name",
    "driver",
    "host_use",
    "path",
    "tags",
    "projects",
];

/// Whether a device of a document may have this key.
pub fn is_key(key: &str) -> bool {
    KEYS.contains(&key)
}

impl FromJson for DeviceEntry {
    fn from_json(value: &Value) -> Result<Self, ParseError> {
        let known: Vec<&str> = KEYS.iter().chain(PASSED_OVER).copied().collect();
        let object = Object::new(value, "a device of a host document", &known)?;
        let missing = |key: &'static str| move || ParseError::new("nothing", "a value").at(key);
        let text = |key: &'static str| object.take::<String>(key);
        let address: BusAddress = text("address")?
            .ok_or_else(missing("address"))?
            .parse()
            .map_err(|e: ParseError| e.at("address"))?;
        let port_path: PortPath = object.take("port_path")?.ok_or_else(missing("port_path"))?;
        let serial = text("serial")?;
        let entry = Self {
            id: object.take("id")?.ok_or_else(missing("id"))?,
            // Without one, that of the document.
            compute_node_id: match object.raw("compute_node_id") {
                None => 0,
                Some(number) => whole(number).ok_or_else(|| {
                    ParseError::new(number, "a whole number").at("compute_node_id")
                })?,
            },
            address,
            product_id: object.take("product_id")?.ok_or_else(missing("product_id"))?,
            vendor_id: object.take("vendor_id")?.ok_or_else(missing("vendor_id"))?,
            bus_id: address.bus(),
            device_id: address.device(),
            port_id: port_path.port_id(),
            status: text("status")?.ok_or_else(missing("status"))?,
            status_reason: text("status_reason")?,
            extra_info: text("extra_info")?,
            instance_uuid: object.take("instance_uuid")?,
            port_path,
            serial_kind: match text("serial_kind")? {
                Some(kind) => kind,
                None => implied_kind(serial.as_deref()).to_string(),
            },
            serial,
            class: object.take("class")?.ok_or_else(missing("class"))?,
            interface_classes: object.list("interface_classes")?,
            speed: object.take("speed")?,
            manufacturer: text("manufacturer")?,
            product_name: text("product_name")?,
            driver: text("driver")?,
            host_use: text("host_use")?,
            tags: object.list("tags")?,
            projects: object.list("projects")?,
            path: object.take("path")?,
        };
        entry.state()?;
        match Serial::KINDS.contains(&entry.serial_kind.as_str()) {
            true => Ok(entry),
            false => {
                let right = Serial::KINDS.join(", ");
                Err(ParseError::new(&entry.serial_kind, format!("one of {right}"))
                    .at("serial_kind"))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::UsbId;

    fn entry() -> DeviceEntry {
        let usb = UsbId::new(0x0529, 1);
        DeviceEntry {
            id: DeviceId::new(5).unwrap(),
            compute_node_id: 1,
            address: BusAddress::new(1, 5).unwrap(),
            product_id: usb.product,
            vendor_id: usb.vendor,
            bus_id: 1,
            device_id: 5,
            port_id: 4,
            status: "unavailable".into(),
            status_reason: Some("host-use".into()),
            extra_info: None,
            instance_uuid: None,
            port_path: "1-1.4".parse().unwrap(),
            serial: Some("A".into()),
            serial_kind: "unique".into(),
            class: Class::new(0),
            interface_classes: alloc::vec![Class::new(0xff)],
            speed: Some(Speed::Full),
            manufacturer: None,
            product_name: Some("HASP".into()),
            driver: None,
            host_use: Some("mounted on /".into()),
            tags: alloc::vec!["erp".into()],
            projects: Vec::new(),
            path: Some("pci-0000:00:14.0-usbv2-0:1.4".parse().unwrap()),
        }
    }

    #[test]
    fn a_document_reads_what_it_writes() {
        let document = HostDocument::new("h1".into(), 1, 7, alloc::vec![entry()]);
        let text = serde_json::to_string(&document).unwrap();
        assert_eq!(HostDocument::parse(&text).unwrap(), document);
    }

    #[test]
    fn what_is_published_is_the_same_document_with_less_text() {
        let mut devices = alloc::vec![entry(), entry()];
        devices[1].serial = None;
        devices[1].serial_kind = "missing".into();
        devices[1].compute_node_id = 9;
        let document = HostDocument::new("h1".into(), 9, 7, devices.clone());
        let published = document.published(1 << 20);
        let mut expected = document.clone();
        expected.devices[0].compute_node_id = 9;
        assert_eq!(
            (HostDocument::parse(&published.text).unwrap(), published.left_out),
            (expected, 0)
        );
        let whole = serde_json::to_string(&document).unwrap();
        assert!(published.text.len() * 3 < whole.len() * 2, "{}", published.text);
        for derived in ["null", "[]", "bus_id", "port_id", "serial_kind", "\"compute_node_id\":1"] {
            assert!(!published.text.contains(derived), "{derived}: {}", published.text);
        }
        // A serial that is not unique is said to be.
        let mut twice = entry();
        twice.serial_kind = "duplicate".into();
        let document = HostDocument::new("h1".into(), 1, 7, alloc::vec![twice]);
        assert_eq!(HostDocument::parse(&document.published(1 << 20).text).unwrap(), document);
        let none = HostDocument::new("h\"1".into(), 1, 7, Vec::new());
        assert_eq!(HostDocument::parse(&none.published(0).text).unwrap(), none);
    }

    #[test]
    fn four_thousand_devices_fit_and_free_ones_are_left_out_last() {
        let device = |n: u64, status: &str| {
            let mut one = entry();
            one.id = DeviceId::new(4_999_000_000 + n).unwrap();
            one.compute_node_id = 5000;
            one.serial = Some(alloc::format!("SERIAL-{n:09}"));
            one.status = status.into();
            one.status_reason = (status == "unavailable").then(|| "whitelist".into());
            one.manufacturer = Some("A maker with a long name, Inc.".into());
            one.product_name = Some("A product with an even longer name than that".into());
            one.port_path = "1-1.4.4.4.4".parse().unwrap();
            one
        };
        let status =
            |n: u64| ["available", "allocated", "unavailable"][usize::try_from(n % 3).unwrap()];
        let devices: Vec<DeviceEntry> = (0..4000).map(|n| device(n, status(n))).collect();
        let document = HostDocument::new("compute-0815.example.org".into(), 5000, 1 << 40, devices);
        let published = document.published(1_000_000);
        assert!(
            published.text.len() <= 1_000_000 && published.left_out == 0,
            "{}",
            published.text.len()
        );
        let small = document.published(400_000);
        let read = HostDocument::parse(&small.text).unwrap();
        assert!(small.text.len() <= 400_000 && small.text.len() > 399_000, "{}", small.text.len());
        assert_eq!(read.devices.len() + small.left_out, 4000);
        let count = |status: &str| read.devices.iter().filter(|d| d.status == status).count();
        assert_eq!((count("available"), count("unavailable")), (1334, 0));
        assert!(read.devices.is_sorted_by_key(|d| d.id));
        assert_eq!(document.published(0).left_out, 4000);
    }

    #[test]
    fn errors_name_the_device() {
        let text =
            serde_json::to_string(&HostDocument::new("h1".into(), 1, 7, alloc::vec![entry()]))
                .unwrap();
        let error = HostDocument::parse(&text.replace("usb_1_5", "usb_1_500")).unwrap_err();
        assert_eq!(error.place(), "devices[0].address");
        let error =
            HostDocument::parse(&text.replace("\"version\":1", "\"version\":2")).unwrap_err();
        assert!(error.to_string().contains("another version"));
    }
}
