//! The host document: what a host tells the world about its devices.
//!
//! One format everywhere: what the API serves, what a shared inventory holds, what a scheduler's filter is fed and
//! what `virt-usb devices --json` prints (its `devices`).

use alloc::string::{String, ToString};
use alloc::vec::Vec;

use serde::Serialize;
use serde_json::Value;

use crate::json::{FromJson, Object, parse_text, whole};
use crate::{
    BusAddress, Class, DeviceId, InstanceId, ParseError, PortPath, ProductId, ProjectId, Speed, Status,
    VendorId,
};

/// The version of the format; a reader refuses another.
pub const VERSION: u64 = 1;

/// One host and its devices at one moment.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct HostDocument {
    version: u64,
    /// The host's name.
    pub host: String,
    /// Its number in the fleet, from 1; 1 is a host that has joined none.
    pub compute_node_id: u64,
    /// Grows with every change of the inventory, never falls.
    pub revision: u64,
    /// All devices that are plugged in or held, by id.
    pub devices: Vec<DeviceEntry>,
}

impl HostDocument {
    /// A document of the current [`VERSION`].
    pub const fn new(host: String, compute_node_id: u64, revision: u64, devices: Vec<DeviceEntry>) -> Self {
        Self { version: VERSION, host, compute_node_id, revision, devices }
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
                let found = object.raw("version").map_or_else(|| "none".to_string(), ToString::to_string);
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
        let host =
            object.take("host")?.ok_or_else(|| ParseError::new("no name", "the host's name").at("host"))?;
        Ok(Self::new(host, number("compute_node_id")?, number("revision")?, object.list("devices")?))
    }
}

/// One device of the document. The keys are the columns of the inventory's `usb_devices`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct DeviceEntry {
    /// Its id in the fleet.
    pub id: DeviceId,
    /// The host that it is plugged into.
    pub compute_node_id: u64,
    /// `usb_<bus>_<device>`.
    pub address: BusAddress,
    /// Product id.
    pub product_id: ProductId,
    /// Vendor id.
    pub vendor_id: VendorId,
    /// Bus number.
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
    /// Who holds it.
    pub instance_uuid: Option<InstanceId>,
    /// Port path.
    pub port_path: PortPath,
    /// Serial number.
    pub serial: Option<String>,
    /// `unique`, `duplicate` or `missing`.
    pub serial_kind: String,
    /// bDeviceClass.
    pub class: Class,
    /// bInterfaceClass of each interface.
    pub interface_classes: Vec<Class>,
    /// Speed, where known.
    pub speed: Option<Speed>,
    /// Maker's name.
    pub manufacturer: Option<String>,
    /// Product's name.
    pub product_name: Option<String>,
    /// Kernel drivers bound.
    pub driver: Option<String>,
    /// What the host uses it for.
    pub host_use: Option<String>,
    /// Tags.
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
        let entry = Self {
            id: object.take("id")?.ok_or_else(missing("id"))?,
            compute_node_id: object
                .raw("compute_node_id")
                .and_then(whole)
                .ok_or_else(missing("compute_node_id"))?,
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
            serial: text("serial")?,
            serial_kind: text("serial_kind")?.ok_or_else(missing("serial_kind"))?,
            class: object.take("class")?.ok_or_else(missing("class"))?,
            interface_classes: object.list("interface_classes")?,
            speed: object.take("speed")?,
            manufacturer: text("manufacturer")?,
            product_name: text("product_name")?,
            driver: text("driver")?,
            host_use: text("host_use")?,
            tags: object.list("tags")?,
            projects: object.list("projects")?,
        };
        entry.state()?;
        match entry.serial_kind.as_str() {
            "unique" | "duplicate" | "missing" => Ok(entry),
            other => Err(ParseError::new(other, "unique, duplicate or missing").at("serial_kind")),
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
        }
    }

    #[test]
    fn a_document_reads_what_it_writes() {
        let document = HostDocument::new("h1".into(), 1, 7, alloc::vec![entry()]);
        let text = serde_json::to_string(&document).unwrap();
        assert_eq!(HostDocument::parse(&text).unwrap(), document);
    }

    #[test]
    fn errors_name_the_device() {
        let text =
            serde_json::to_string(&HostDocument::new("h1".into(), 1, 7, alloc::vec![entry()])).unwrap();
        let error = HostDocument::parse(&text.replace("usb_1_5", "usb_1_500")).unwrap_err();
        assert_eq!(error.place(), "devices[0].address");
        let error = HostDocument::parse(&text.replace("\"version\":1", "\"version\":2")).unwrap_err();
        assert!(error.to_string().contains("another version"));
    }
}
