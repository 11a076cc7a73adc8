//! The vocabulary of virt-usb, without IO.
//!
//! Everything here is plain data that was *parsed*: a value of one of these types is valid, because
//! parsing is the only way to get one. Parsers accept what people write (`"0529"`, `"0x0529"`,
//! `1321`) and every [`ParseError`] says where in the input what was found and what was wanted.
//!
//! | module | what it holds |
//! |---|---|
//! | [`ids`] | vendor and product ids, device ids, instance and project ids |
//! | [`address`] | *where a device is now*: bus address and port path |
//! | [`key`] | *who a device is*: ids, serial and port |
//! | [`class`] | USB classes and speeds |
//! | [`device`] | what discovery knows of one device |
//! | [`state`] | states, reasons and legal transitions |
//! | [`text`] | text of outsiders, made safe to print and to log |
//! | [`flavor`] | what a flavor asks for |
//! | [`grant`] | which projects may have which devices |
//! | [`descriptors`] | what a device sends of itself, and what has become of it |
//! | [`speed_mask`] | on which guest ports QEMU attaches a device |
//! | [`whitelist`] | which devices are offered, and to whom |
//! | [`matching`] | which devices serve which requests of one instance |
//! | [`scheduling`] | what a scheduler asks the filter, and what it is told |
//! | [`host`] | the host document: what a host tells the world |
#![no_std]
extern crate alloc;

pub mod address;
pub mod class;
pub mod descriptors;
pub mod device;
mod error;
pub mod flavor;
pub mod grant;
pub mod host;
pub mod ids;
mod json;
pub mod key;
pub mod matching;
pub mod scheduling;
pub mod speed_mask;
pub mod state;
pub mod text;
pub mod whitelist;

pub use address::{BusAddress, DevicePath, PortPath};
pub use class::{Class, Speed};
pub use descriptors::Descriptors;
pub use device::Device;
pub use error::ParseError;
pub use flavor::{DeviceRequest, Flavor, RedirectionRequest, Selector};
pub use grant::Grant;
pub use host::{DeviceEntry, HostDocument};
pub use ids::{DeviceId, InstanceId, ProductId, ProjectId, UsbId, VendorId};
pub use json::{Unique as UniqueJson, members, unique as unique_json};
pub use key::{Aliases, DeviceKey, Serial};
pub use speed_mask::SpeedMask;
pub use state::{Hold, Status, UnavailableReason};
pub use text::{clean, clean_json, clean_lines, clean_start, clean_text, printable};
pub use whitelist::{RuleVerdict, Whitelist, WhitelistRule};
