//! The inventory's rows of the API's responses, for clients that show both alike.

use std::str::FromStr;

use virt_usb_model::{DeviceEntry, DeviceId, Flavor, Grant, HostDocument, ParseError, Status};
use virt_usb_store::events::EventRow;
use virt_usb_store::maintain::HostRow;
use virt_usb_store::problems::Problem;
use virt_usb_store::{ClaimRow, Owner, Record, StoredFlavor, StoredGrant};

use super::{
    HypervisorDetail, HypervisorSummary, UsbClaim, UsbDevice, UsbEvent, UsbFlavor, UsbFlavorShown,
    UsbFlavors, UsbGrant, UsbGrantShown, UsbGrants, UsbOwner, UsbProblem,
};

impl TryFrom<UsbDevice> for Record {
    type Error = ParseError;

    /// # Errors
    /// Names the key whose value this version cannot read. Fields that the API does not show are
    /// empty.
    fn try_from(device: UsbDevice) -> Result<Self, ParseError> {
        let (created_at, updated_at) = (device.created_at.clone(), device.updated_at.clone());
        let (deleted_at, disabled) = (device.deleted_at.clone(), device.disabled.clone());
        let (quarantined, flapping_until) =
            (device.quarantined.clone(), device.flapping_until.clone());
        let present = device.status != Status::Removed.name();
        let entry = DeviceEntry::try_from(device)?;
        Ok(Self {
            created_at,
            updated_at,
            deleted: if deleted_at.is_some() { entry.id.get() } else { 0 },
            deleted_at,
            present,
            withheld: None,
            disabled,
            quarantined,
            flapping_until,
            rule_withheld: None,
            rule_tags: Vec::new(),
            rule_projects: Vec::new(),
            one_time_use: false,
            own_tags: Vec::new(),
            descriptors: None,
            generation: None,
            used_as: None,
            entry,
        })
    }
}

impl TryFrom<UsbDevice> for DeviceEntry {
    type Error = ParseError;

    /// # Errors
    /// Names the key whose value this version cannot read.
    fn try_from(device: UsbDevice) -> Result<Self, ParseError> {
        let id = DeviceId::new(device.id)
            .ok_or_else(|| ParseError::new(device.id, "a device's id").at("id"))?;
        let address: virt_usb_model::BusAddress = read("address", &device.address)?;
        let port_path: virt_usb_model::PortPath = read("port_path", &device.port_path)?;
        Ok(Self {
            id,
            compute_node_id: device.compute_node_id,
            address,
            product_id: read("product_id", &device.product_id)?,
            vendor_id: read("vendor_id", &device.vendor_id)?,
            bus_id: address.bus(),
            device_id: address.device(),
            port_id: port_path.port_id(),
            // A state that this version does not know is shown unchanged.
            status: device.status,
            status_reason: device.status_reason,
            extra_info: Some(device.extra_info).filter(|info| !info.is_empty()),
            instance_uuid: match device.instance_uuid.as_str() {
                "" => None,
                instance => Some(read("instance_uuid", instance)?),
            },
            port_path,
            serial_kind: match (device.serial_kind.as_str(), &device.serial) {
                ("", Some(_)) => "unique".to_owned(),
                ("", None) => "missing".to_owned(),
                (kind, _) => kind.to_owned(),
            },
            serial: device.serial,
            class: read("class", &device.class)?,
            interface_classes: read_all("interface_classes", &device.interface_classes)?,
            speed: device.speed.map(|speed| read("speed", &speed)).transpose()?,
            manufacturer: device.manufacturer,
            product_name: device.product_name,
            driver: device.driver,
            host_use: device.host_use,
            path: device.path.map(|path| read("path", &path)).transpose()?,
            tags: device.tags,
            projects: read_all("projects", &device.projects.unwrap_or_default())?,
        })
    }
}

fn read<T: FromStr<Err = ParseError>>(key: &str, text: &str) -> Result<T, ParseError> {
    text.parse().map_err(|e: ParseError| e.at(key))
}

fn read_all<T: FromStr<Err = ParseError>>(
    key: &str,
    texts: &[String],
) -> Result<Vec<T>, ParseError> {
    let each = texts.iter().enumerate();
    each.map(|(at, text)| read(&format!("[{at}]"), text).map_err(|e| e.at(key))).collect()
}

impl HypervisorDetail {
    /// The host's document; `None` if the caller is no administrator, and does not see all of it.
    ///
    /// # Errors
    /// Names the device and the key whose value this version cannot read.
    pub(crate) fn document(self) -> Result<Option<HostDocument>, ParseError> {
        let HypervisorSummary { id, hypervisor_hostname, revision, .. } = self.listed;
        let Some(revision) = revision else { return Ok(None) };
        let devices = rows("usb_device_stats", self.usb_device_stats)?;
        Ok(Some(HostDocument::new(hypervisor_hostname, id, revision, devices)))
    }
}

/// Converts the entries of the list with this key.
///
/// # Errors
/// Names the entry and its key whose value this version cannot read.
pub(crate) fn rows<T, Row: TryFrom<T, Error = ParseError>>(
    key: &str,
    list: Vec<T>,
) -> Result<Vec<Row>, ParseError> {
    let place = |at: usize, e: ParseError| e.at(&format!("[{at}]")).at(key);
    let each = list.into_iter().enumerate();
    each.map(|(at, entry)| Row::try_from(entry).map_err(|e| place(at, e))).collect()
}

impl From<HypervisorSummary> for HostRow {
    fn from(host: HypervisorSummary) -> Self {
        let HypervisorSummary { id, hypervisor_hostname, usb_device_totals, .. } = host;
        Self {
            id,
            host: hypervisor_hostname,
            // Only administrators get this value.
            revision: host.revision.unwrap_or_default(),
            scanned_at: host.scanned_at,
            devices: usb_device_totals.total as u64,
            available: usb_device_totals.available as u64,
        }
    }
}

impl From<UsbClaim> for ClaimRow {
    fn from(claim: UsbClaim) -> Self {
        Self {
            id: claim.id,
            created_at: claim.created_at,
            device_id: claim.usb_device_id,
            instance_uuid: claim.instance_uuid,
            domain: claim.domain,
            project_id: claim.project_id,
            request: claim.request,
            state: claim.state,
            hold: claim.hold,
            pending: claim.pending,
            boot_id: claim.boot_id,
            revision: claim.revision,
            ending: claim.ending,
            needs_reattach: claim.needs_reattach,
            by_hand: claim.request.is_none(),
            incoming_since: None,
            descriptors: None,
            used: false,
            serial_shared: false,
            seen_in_guest: false,
            unsure: false,
            generation: None,
        }
    }
}

impl From<UsbProblem> for Problem {
    fn from(problem: UsbProblem) -> Self {
        let UsbProblem { instance_uuid, about, domain, since, what } = problem;
        Self { instance_uuid, about, domain, since, what }
    }
}

impl From<UsbEvent> for EventRow {
    fn from(event: UsbEvent) -> Self {
        Self {
            id: event.id,
            at: event.at,
            event: event.event,
            instance_uuid: event.instance_uuid,
            domain: event.domain,
            project_id: event.project_id,
            device_id: event.usb_device_id,
            actor: event.actor.unwrap_or_default(),
            detail: event.detail,
        }
    }
}

impl From<UsbFlavor> for StoredFlavor {
    fn from(flavor: UsbFlavor) -> Self {
        let UsbFlavor { name, created_at, updated_at, usb_devices, usb_redirection_devices } =
            flavor;
        let flavor = Flavor { usb_devices, usb_redirection_devices };
        Self { name, created_at, updated_at, flavor }
    }
}

impl From<UsbGrant> for StoredGrant {
    fn from(grant: UsbGrant) -> Self {
        let UsbGrant { name, created_at, updated_at, usb_devices, projects } = grant;
        Self { name, created_at, updated_at, grant: Grant { usb_devices, projects } }
    }
}

impl From<UsbFlavors> for Vec<StoredFlavor> {
    fn from(list: UsbFlavors) -> Self {
        list.usb_flavors.into_iter().map(StoredFlavor::from).collect()
    }
}

impl From<UsbFlavorShown> for StoredFlavor {
    fn from(shown: UsbFlavorShown) -> Self {
        shown.usb_flavor.into()
    }
}

impl From<UsbGrants> for Vec<StoredGrant> {
    fn from(list: UsbGrants) -> Self {
        list.usb_grants.into_iter().map(StoredGrant::from).collect()
    }
}

impl From<UsbGrantShown> for StoredGrant {
    fn from(shown: UsbGrantShown) -> Self {
        shown.usb_grant.into()
    }
}

impl From<UsbOwner> for Owner {
    fn from(owner: UsbOwner) -> Self {
        let UsbOwner { instance_uuid, created_at, domain, project_id } = owner;
        Self { instance_uuid, created_at, domain, project_id }
    }
}
