//! The vocabulary of virt-usb, without IO.
//!
//! Everything here is plain data that was *parsed*: a value of one of these types is valid, because
//! parsing is the only way to get one. Parsers accept what people write (`"0529"`, `"0x0529"`,
//! `1321`) and every [`ParseError`] says where in the input what was found and what was wanted.
//!
//! | module | contents |
//! |---|---|
//! | [`ids`] | vendor and product ids, device ids, instance and project ids |
//! | [`address`] | *current location of a device*: bus address and port path |
//! | [`key`] | *identity of a device*: ids, serial and port |
//! | [`class`] | USB classes and speeds |
//! | [`device`] | a device as discovery sees it |
//! | [`state`] | states, reasons and legal transitions |
//! | [`event`] | kinds of events of the audit trail |
//! | [`text`] | text of outsiders, made safe to print and to log |
//! | [`flavor`] | requests of a flavor |
//! | [`request_key`] | keys of a request and the values that they take |
//! | [`grant`] | devices that are available to certain projects |
//! | [`descriptors`] | descriptors of a device, and how they have changed |
//! | [`speed_mask`] | guest ports to which QEMU attaches a device |
//! | [`whitelist`] | rules for which devices are offered, and to which projects |
//! | [`matching`] | assignment of devices to the requests of one instance |
//! | [`scheduling`] | questions of a scheduler to the filter, and its answers |
//! | [`host`] | the host document, which a host publishes |
#![no_std]
extern crate alloc;

pub mod address;
pub mod class;
pub mod descriptors;
pub mod device;
mod error;
pub mod event;
pub mod flavor;
pub mod grant;
pub mod host;
pub mod ids;
mod json;
pub mod key;
pub mod matching;
pub mod request_key;
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
pub use event::EventKind;
pub use flavor::{DeviceRequest, Flavor, RedirectionRequest, Selector};
pub use grant::Grant;
pub use host::{DeviceEntry, HostDocument};
pub use ids::{DeviceId, InstanceId, ProductId, ProjectId, UsbId, VendorId};
pub use json::{Unique as UniqueJson, members, unique as unique_json};
pub use key::{Aliases, DeviceKey, Serial};
pub use speed_mask::SpeedMask;
pub use state::{ClaimState, Status, UnavailableReason};
pub use text::{clean, clean_json, clean_lines, clean_start, clean_text, printable};
pub use whitelist::{RuleVerdict, Whitelist, WhitelistRule};
