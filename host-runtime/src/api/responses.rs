//! Response bodies, key by key. The first eleven keys of a device, their order and their types are
//! guaranteed by the API; more keys may follow.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use virt_usb_model::{
    DeviceRequest, Flavor, Grant, ProjectId, RedirectionRequest, Selector, Status,
};
use virt_usb_store::events::EventRow;
use virt_usb_store::problems::Problem;
use virt_usb_store::{ClaimRow, Record, StoredFlavor, StoredGrant};

use super::identity::Caller;
use super::policy::may_know_holder;

/// A device, as its caller may see it.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub(super) struct UsbDevice {
    pub(super) id: u64,
    pub(super) compute_node_id: u64,
    /// `usb_<bus>_<device>`.
    pub(super) address: String,
    /// Four hexadecimal digits.
    pub(super) product_id: String,
    /// Four hexadecimal digits.
    pub(super) vendor_id: String,
    pub(super) bus_id: String,
    /// Device number on the bus.
    pub(super) device_id: String,
    /// The last number of its port path.
    pub(super) port_id: String,
    /// `available`, `claimed`, `allocated`, `removed`, `unavailable`.
    pub(super) status: String,
    /// The operator's words.
    pub(super) extra_info: String,
    /// Instance that holds the device, if the caller may see it; otherwise empty.
    pub(super) instance_uuid: String,
    /// Why it is unavailable: `whitelist`, `host-use`, `disabled`, `quarantined`, `flapping`,
    /// `unreachable`.
    pub(super) status_reason: Option<String>,
    /// Where it is plugged in: `1-1.4`.
    pub(super) port_path: String,
    pub(super) serial: Option<String>,
    /// `unique`, `duplicate`, `missing`.
    pub(super) serial_kind: String,
    /// The socket that it is plugged into, whatever number the bus has:
    /// `pci-0000:00:14.0-usbv2-0:1.4`.
    pub(super) path: Option<String>,
    /// Two hexadecimal digits.
    pub(super) class: String,
    pub(super) interface_classes: Vec<String>,
    /// `low`, `full`, `high`, `super`, `super-plus`.
    pub(super) speed: Option<String>,
    pub(super) manufacturer: Option<String>,
    pub(super) product_name: Option<String>,
    pub(super) tags: Vec<String>,
    /// The domain's name, for those who may know.
    pub(super) held_by: Option<String>,
    /// UTC, ISO 8601, for those who may know.
    pub(super) held_since: Option<String>,
    /// The host that it is plugged into.
    #[serde(default)]
    pub(super) hypervisor_hostname: String,
    /// The only projects that get it, for administrators.
    pub(super) projects: Option<Vec<String>>,
    /// Use of the device by the host, for administrators.
    pub(super) host_use: Option<String>,
    pub(super) created_at: Option<String>,
    pub(super) updated_at: Option<String>,
    /// Time of the unplug, if no instance held the device then.
    pub(super) deleted_at: Option<String>,
    /// The kernel drivers that it is bound to, for administrators; so are those that follow.
    pub(super) driver: Option<String>,
    /// Why an operator has disabled it.
    pub(super) disabled: Option<String>,
    /// Why it waits for an operator.
    pub(super) quarantined: Option<String>,
    /// End of the pause of a flapping device, which is unavailable until then.
    pub(super) flapping_until: Option<String>,
    /// How the device differs from its last claim, if it was quarantined after that.
    pub(super) altered: Option<String>,
}

impl UsbDevice {
    /// State of the device; none: not one that this version knows.
    pub(super) fn state(&self) -> Option<Status> {
        Status::from_columns(&self.status, self.status_reason.as_deref()).ok()
    }

    pub(super) fn new(
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
            // Of another host's that is not published.
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

/// A claim on a device.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct UsbClaim {
    id: i64,
    /// UTC, ISO 8601.
    created_at: String,
    usb_device_id: u64,
    instance_uuid: String,
    /// The domain's name then.
    domain: String,
    project_id: Option<String>,
    /// The position of the request among the instance's; none: found in the domain's own XML.
    request: Option<u32>,
    /// State of the claim: `claimed` or `allocated`.
    state: String,
    /// Until when: `running`, `instance`.
    hold: String,
    /// An incoming restore or migration that was not confirmed yet.
    pending: bool,
    boot_id: String,
    /// The inventory's revision at its last change.
    revision: i64,
    /// The device is to leave the guest.
    ending: bool,
    /// The guest was restored or migrated with the device, which must be reattached.
    arrived: bool,
}

impl From<&ClaimRow> for UsbClaim {
    fn from(claim: &ClaimRow) -> Self {
        Self {
            id: claim.id,
            created_at: claim.created_at.clone(),
            usb_device_id: claim.device_id.get(),
            instance_uuid: claim.instance_uuid.to_string(),
            domain: claim.domain.clone(),
            project_id: claim.project_id.clone(),
            request: claim.request,
            state: claim.state.clone(),
            hold: claim.hold.clone(),
            pending: claim.pending,
            boot_id: claim.boot_id.clone(),
            revision: claim.revision,
            ending: claim.ending,
            arrived: claim.arrived,
        }
    }
}

/// A problem that keeps an instance from its devices.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct UsbProblem {
    instance_uuid: String,
    /// `device 5`, `redirection 0`, `start`.
    about: String,
    /// The domain's name.
    domain: String,
    /// UTC, ISO 8601.
    since: String,
    what: String,
}

impl From<&Problem> for UsbProblem {
    fn from(problem: &Problem) -> Self {
        Self {
            instance_uuid: problem.instance_uuid.to_string(),
            about: problem.about.clone(),
            domain: problem.domain.clone(),
            since: problem.since.clone(),
            what: problem.what.clone(),
        }
    }
}

/// An entry of the audit.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct UsbEvent {
    /// Grows with time.
    id: i64,
    /// UTC, ISO 8601.
    at: String,
    /// Type of the event: `claimed`, `allocated`, `released`, `refused`, ...
    event: String,
    instance_uuid: Option<String>,
    /// The domain's name then.
    domain: Option<String>,
    project_id: Option<String>,
    usb_device_id: Option<u64>,
    /// By which program or caller, doing what; `null`: it is not for the caller to know.
    actor: Option<String>,
    /// Details of the event.
    detail: Option<String>,
}

impl From<EventRow> for UsbEvent {
    fn from(row: EventRow) -> Self {
        Self {
            id: row.id,
            at: row.at,
            event: row.event,
            instance_uuid: row.instance_uuid.map(|instance| instance.to_string()),
            domain: row.domain,
            project_id: row.project_id,
            usb_device_id: row.device_id.map(|device| device.get()),
            actor: Some(row.actor).filter(|actor| !actor.is_empty()),
            detail: row.detail,
        }
    }
}

/// A stored flavor.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct UsbFlavor {
    name: String,
    created_at: String,
    updated_at: String,
    #[schema(value_type = Vec<super::request_schemas::UsbDeviceRequest>)]
    usb_devices: Vec<DeviceRequest>,
    #[schema(value_type = Vec<super::request_schemas::UsbRedirectionRequest>)]
    usb_redirection_devices: Vec<RedirectionRequest>,
}

impl From<StoredFlavor> for UsbFlavor {
    fn from(stored: StoredFlavor) -> Self {
        let StoredFlavor { name, created_at, updated_at, flavor } = stored;
        let Flavor { usb_devices, usb_redirection_devices } = flavor;
        Self { name, created_at, updated_at, usb_devices, usb_redirection_devices }
    }
}

/// A stored grant.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct UsbGrant {
    name: String,
    created_at: String,
    updated_at: String,
    #[schema(value_type = Vec<super::request_schemas::UsbDeviceSelector>)]
    usb_devices: Vec<Selector>,
    #[schema(value_type = Vec<String>)]
    projects: Vec<ProjectId>,
}

impl From<StoredGrant> for UsbGrant {
    fn from(stored: StoredGrant) -> Self {
        let StoredGrant { name, created_at, updated_at, grant } = stored;
        let Grant { usb_devices, projects } = grant;
        Self { name, created_at, updated_at, usb_devices, projects }
    }
}

/// How many devices of a host are in which state.
#[derive(Debug, Default, Serialize, ToSchema)]
pub(super) struct Totals {
    pub(super) total: usize,
    pub(super) available: usize,
    pub(super) claimed: usize,
    pub(super) allocated: usize,
    pub(super) removed: usize,
    pub(super) unavailable: usize,
}

impl Totals {
    pub(super) fn of<'a>(devices: impl Iterator<Item = &'a Record>) -> Self {
        let mut totals = Self::default();
        for device in devices {
            totals.total += 1;
            match device.entry.status.as_str() {
                "available" => totals.available += 1,
                "claimed" => totals.claimed += 1,
                "allocated" => totals.allocated += 1,
                "removed" => totals.removed += 1,
                _ => totals.unavailable += 1,
            }
        }
        totals
    }
}

/// Where the next page is.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Link {
    href: String,
    rel: &'static str,
}

impl Link {
    pub(super) const fn next(href: String) -> Self {
        Self { href, rel: "next" }
    }

    #[cfg(test)]
    pub(super) fn href(&self) -> &str {
        &self.href
    }
}
