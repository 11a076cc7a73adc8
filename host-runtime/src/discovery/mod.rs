//! Discovery of the USB devices: one trait, a real source and a simulated one.
//!
//! ```text
//!   sysfs ──┐
//!           ├─► LibUsb ────┐
//!   libusb ─┘              ├─► UsbSource::snapshot ─► Snapshot { devices, hubs, problems, ties }
//!   TOML ─────► Simulated ─┘
//! ```
//!
//! A [`Snapshot`] is plain data from any source. It contains the problems of the scan: a device
//! that could not be read never counts as absent ([`Snapshot::is_unsure`], [`Snapshot::failed`]).
//!
//! What is deliberately absent: a source never writes, never claims, and never talks to a device
//! whose strings the kernel has already read; it may be in use by a guest.

mod context;
mod host_use;
pub mod hotplug;
mod libusb;
mod listed;
mod names;
mod simulated;
mod sysfs;
pub mod ties;

use std::collections::{BTreeMap, HashMap};

use virt_usb_model::device::Problem;
use virt_usb_model::{Aliases, Device, DeviceKey, PortPath, Serial, UsbId};
use virt_usb_store::reconcile::SeenKeys;

pub use libusb::LibUsb;
pub use simulated::{SimError, Simulated, origin};
pub(crate) use sysfs::{CLAIMED, host_driver};
use ties::{GuestUses, Ties};

/// A source of devices.
pub trait UsbSource {
    /// Scans the devices once. A scan never fails; what cannot be read is a problem of the
    /// snapshot.
    fn snapshot(&self) -> Snapshot;
}

/// Result of one scan.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Snapshot {
    /// The devices except hubs, sorted by port path.
    pub devices: Vec<Device>,
    /// The external hubs, sorted by port path. Hubs are never offered. Root hubs have no port path,
    /// and are left out.
    pub hubs: Vec<Device>,
    /// Problems of the scan. Unreadable is not absent.
    pub problems: Vec<Problem>,
    /// Ties of devices to the host, by port.
    pub ties: BTreeMap<PortPath, Ties>,
    /// Uses of the devices by guests, filled in by a caller that queries libvirt.
    pub guests: GuestUses,
}

impl Snapshot {
    /// The plugged-in devices, as keys for a query of the inventory.
    pub fn seen<'a>(
        &'a self,
        aliases: &'a Aliases,
    ) -> SeenKeys<'a, impl Iterator<Item = &'a DeviceKey>> {
        SeenKeys { keys: self.devices.iter().map(|device| &device.key), aliases }
    }

    /// Whether the scan as a whole failed. A missing device then does not count as absent.
    pub fn failed(&self) -> bool {
        self.problems.iter().any(|problem| problem.place.is_empty())
    }

    /// Whether there is a problem about this port or the whole scan. A device that is missing at
    /// the port may then still be plugged in.
    pub fn is_unsure(&self, port: &PortPath) -> bool {
        let port = port.to_string();
        self.problems.iter().any(|problem| problem.place.is_empty() || problem.place == port)
    }

    /// Sorts the devices, separates hubs, and marks duplicate serials. All serials in `found` are
    /// [`Serial::Unique`].
    fn new(mut found: Vec<Device>, mut problems: Vec<Problem>) -> Self {
        found.sort_by(|a, b| a.key.port.cmp(&b.key.port));
        problems.sort_by(|a, b| (&a.place, &a.what).cmp(&(&b.place, &b.what)));
        problems.dedup();
        mark_duplicates(&mut found);
        let (hubs, devices) = found.into_iter().partition(Device::is_hub);
        Self { devices, hubs, problems, ..Self::default() }
    }
}

fn mark_duplicates(found: &mut [Device]) {
    let mut carriers: HashMap<(UsbId, String), usize> = HashMap::new();
    for device in found.iter() {
        if let Some(text) = device.key.serial.text() {
            *carriers.entry((device.key.usb, text.to_owned())).or_default() += 1;
        }
    }
    for device in found {
        if let Some(text) = device.key.serial.text().map(ToOwned::to_owned) {
            let duplicate = carriers.get(&(device.key.usb, text.clone())).is_some_and(|&n| n > 1);
            device.key.serial = Serial::new(Some(text), duplicate);
        }
    }
}

/// Creates a problem about `port`.
fn about(port: &PortPath, what: impl Into<String>) -> Problem {
    Problem { place: port.to_string(), what: what.into() }
}

/// Creates a problem about the whole scan.
fn about_all(what: impl Into<String>) -> Problem {
    Problem { place: String::new(), what: what.into() }
}
