//! A device, and counts of devices.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use virt_usb_model::Status;
use virt_usb_store::{ClaimRow, Record};

use crate::api::identity::Caller;
use crate::api::policy::may_know_holder;

/// A device, as its caller may see it.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub(crate) struct UsbDevice {
    pub(crate) id: u64,
    pub(crate) compute_node_id: u64,
    /// Address on the host: `usb_<bus>_<device>`.
    pub(crate) address: String,
    /// Four hexadecimal digits.
    pub(crate) product_id: String,
    /// Four hexadecimal digits.
    pub(crate) vendor_id: String,
    pub(crate) bus_id: String,
    /// Device number on the bus.
    pub(crate) device_id: String,
    /// Last number of the port path.
    pub(crate) port_id: String,
    /// State of the device: `available`, `claimed`, `allocated`, `removed`, `unavailable`.
    pub(crate) status: String,
    /// Note of the operator about the device.
    pub(crate) extra_info: String,
    /// Instance that holds the device, if the caller may see it; otherwise empty.
    pub(crate) instance_uuid: String,
    /// Reason of `unavailable`: `whitelist`, `host-use`, `disabled`, `quarantined`, `flapping`,
    /// `unreachable`.
    pub(crate) status_reason: Option<String>,
    /// Port path: `1-1.4`.
    pub(crate) port_path: String,
    pub(crate) serial: Option<String>,
    /// Kind of the serial: `unique`, `duplicate`, `missing`.
    #[serde(default)]
    #[schema(required)]
    pub(crate) serial_kind: String,
    /// Path of the port, independent of the number of the bus: `pci-0000:00:14.0-usbv2-0:1.4`.
    pub(crate) path: Option<String>,
    /// Two hexadecimal digits.
    pub(crate) class: String,
    #[serde(default)]
    #[schema(required)]
    pub(crate) interface_classes: Vec<String>,
    /// Speed of the connection: `low`, `full`, `high`, `super`, `super-plus`.
    pub(crate) speed: Option<String>,
    pub(crate) manufacturer: Option<String>,
    pub(crate) product_name: Option<String>,
    #[serde(default)]
    #[schema(required)]
    pub(crate) tags: Vec<String>,
    /// Domain name of the instance that holds the device, if the caller may see it.
    pub(crate) held_by: Option<String>,
    /// Time of the claim (UTC, ISO 8601), if the caller may see it.
    pub(crate) held_since: Option<String>,
    /// Host that the device is plugged into.
    #[serde(default)]
    pub(crate) hypervisor_hostname: String,
    /// Projects that the device is restricted to; only for administrators.
    pub(crate) projects: Option<Vec<String>>,
    /// Use of the device by the host; only for administrators.
    pub(crate) host_use: Option<String>,
    pub(crate) created_at: Option<String>,
    pub(crate) updated_at: Option<String>,
    /// Time of the unplug, if no instance held the device then.
    pub(crate) deleted_at: Option<String>,
    /// Kernel drivers that the device is bound to. Only administrators see this and the next keys.
    pub(crate) driver: Option<String>,
    /// Reason why an operator has disabled the device.
    pub(crate) disabled: Option<String>,
    /// Reason of the quarantine, which an operator must end.
    pub(crate) quarantined: Option<String>,
    /// End of the pause of a flapping device, which is unavailable until then.
    pub(crate) flapping_until: Option<String>,
    /// How the device differs from its last claim, if it was quarantined after that.
    pub(crate) altered: Option<String>,
}

impl UsbDevice {
    /// State of the device; `None` if this version does not know it.
    pub(in crate::api) fn state(&self) -> Option<Status> {
        Status::from_columns(&self.status, self.status_reason.as_deref()).ok()
    }

    pub(in crate::api) fn new(
        record: &Record,
        host: &str,
        claim: Option<&ClaimRow>,
        caller: &Caller,
    ) -> Self {
        let e = &record.entry;
        let known = claim.filter(|claim| may_know_holder(caller, claim));
        let admin = caller.is_admin();
        Self {
            id: e.id.get(),
            compute_node_id: e.compute_node_id,
            address: e.address.to_string(),
            product_id: e.product_id.to_string(),
            vendor_id: e.vendor_id.to_string(),
            bus_id: e.bus_id.to_string(),
            device_id: e.device_id.to_string(),
            port_id: e.port_id.to_string(),
            status: e.status.clone(),
            extra_info: e.extra_info.clone().unwrap_or_default(),
            instance_uuid: known.map(|claim| claim.instance_uuid.to_string()).unwrap_or_default(),
            status_reason: e.status_reason.clone(),
            port_path: e.port_path.to_string(),
            serial: e.serial.clone(),
            serial_kind: e.serial_kind.clone(),
            path: e.path.as_ref().map(ToString::to_string),
            class: e.class.to_string(),
            interface_classes: e.interface_classes.iter().map(ToString::to_string).collect(),
            speed: e.speed.map(|speed| speed.to_string()),
            manufacturer: e.manufacturer.clone(),
            product_name: e.product_name.clone(),
            tags: e.tags.clone(),
            held_by: known.map(|claim| claim.domain.clone()),
            // Other hosts do not publish the time of a claim.
            held_since: known.map(|claim| claim.created_at.clone()).filter(|at| !at.is_empty()),
            hypervisor_hostname: host.to_owned(),
            projects: admin.then(|| e.projects.iter().map(ToString::to_string).collect()),
            host_use: e.host_use.clone().filter(|_| admin),
            created_at: record.created_at.clone(),
            updated_at: record.updated_at.clone(),
            deleted_at: record.deleted_at.clone(),
            driver: e.driver.clone().filter(|_| admin),
            disabled: record.disabled.clone().filter(|_| admin),
            quarantined: record.quarantined.clone().filter(|_| admin),
            flapping_until: record.flapping_until.clone().filter(|_| admin),
            altered: record.altered().filter(|_| admin),
        }
    }
}

/// Number of devices of a host in each state.
#[derive(Debug, Default, Serialize, Deserialize, ToSchema)]
pub(crate) struct Totals {
    pub(crate) total: usize,
    pub(crate) available: usize,
    pub(crate) claimed: usize,
    pub(crate) allocated: usize,
    pub(crate) removed: usize,
    pub(crate) unavailable: usize,
}

impl Totals {
    pub(crate) fn of<'a>(devices: impl Iterator<Item = &'a Record>) -> Self {
        let mut totals = Self::default();
        for device in devices {
            totals.total += 1;
            match device.entry.state() {
                Ok(Status::Available) => totals.available += 1,
                Ok(Status::Claimed) => totals.claimed += 1,
                Ok(Status::Allocated) => totals.allocated += 1,
                Ok(Status::Removed) => totals.removed += 1,
                // A reason that another version of another host gives is no offer.
                Ok(Status::Unavailable(_)) | Err(_) => totals.unavailable += 1,
            }
        }
        totals
    }
}
