//! Response bodies of the API, key by key: one definition for the API and for its client.
//!
//! A client ignores keys that it does not know, and does without those that an older API does not
//! have: such a field is an `Option`, or has a default.
//!
//! | module | contents |
//! |---|---|
//! | this one | claims, events, flavors, grants, hosts, servers, lists and errors |
//! | `device` | a device, counts of devices |
//! | `rows` | for clients: the inventory's rows of responses |

mod device;
mod rows;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use virt_usb_model::{
    DeviceId, DeviceRequest, Flavor, Grant, InstanceId, ProjectId, RedirectionRequest, Selector,
};
use virt_usb_store::events::EventRow;
use virt_usb_store::problems::Problem;
use virt_usb_store::{ClaimRow, Owner, StoredFlavor, StoredGrant};

pub(crate) use device::{Totals, UsbDevice};
pub(crate) use rows::rows;

/// A page of the list of devices.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub(crate) struct UsbDevices {
    pub(crate) usb_devices: Vec<UsbDevice>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) usb_devices_links: Vec<Link>,
}

/// Response with one device.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub(crate) struct UsbDeviceShown {
    pub(crate) usb_device: UsbDevice,
}

/// Claims, and problems of their instances.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub(crate) struct Claims {
    /// Claims, ordered by device.
    pub(crate) usb_claims: Vec<UsbClaim>,
    /// Problems, ordered by instance.
    pub(crate) usb_problems: Vec<UsbProblem>,
}

/// A claim on a device.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub(crate) struct UsbClaim {
    id: i64,
    /// Time of the claim (UTC, ISO 8601).
    created_at: String,
    #[schema(value_type = u64)]
    usb_device_id: DeviceId,
    #[schema(value_type = String)]
    instance_uuid: InstanceId,
    /// Name of the domain at the time of the claim.
    domain: String,
    project_id: Option<String>,
    /// Position of the request among those of the instance; null if the device was found in the
    /// domain's own XML.
    request: Option<u32>,
    /// State of the claim: `claimed` or `allocated`.
    state: String,
    /// Lifetime of the claim: `running` (until the instance stops) or `instance`.
    hold: String,
    /// Whether the claim is for an incoming restore or migration that is not confirmed yet.
    #[serde(default)]
    #[schema(required)]
    pending: bool,
    #[serde(default)]
    #[schema(required)]
    boot_id: String,
    /// Revision of the inventory at the last change of the claim.
    #[serde(default)]
    #[schema(required)]
    revision: i64,
    /// The device is being detached from the guest.
    #[serde(default)]
    #[schema(required)]
    ending: bool,
    /// The guest was restored or migrated with the device, which must be reattached.
    #[serde(default)]
    #[schema(required)]
    needs_reattach: bool,
}

impl From<&ClaimRow> for UsbClaim {
    fn from(claim: &ClaimRow) -> Self {
        Self {
            id: claim.id,
            created_at: claim.created_at.clone(),
            usb_device_id: claim.device_id,
            instance_uuid: claim.instance_uuid,
            domain: claim.domain.clone(),
            project_id: claim.project_id.clone(),
            request: claim.request,
            state: claim.state.clone(),
            hold: claim.hold.clone(),
            pending: claim.pending,
            boot_id: claim.boot_id.clone(),
            revision: claim.revision,
            ending: claim.ending,
            needs_reattach: claim.needs_reattach,
        }
    }
}

/// A problem that keeps an instance from its devices.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub(crate) struct UsbProblem {
    #[schema(value_type = String)]
    instance_uuid: InstanceId,
    /// Subject of the problem: `device 5`, `redirection 0`, `start`.
    about: String,
    /// Name of the domain.
    domain: String,
    /// Time at which the problem began (UTC, ISO 8601).
    since: String,
    what: String,
}

impl From<&Problem> for UsbProblem {
    fn from(problem: &Problem) -> Self {
        Self {
            instance_uuid: problem.instance_uuid,
            about: problem.about.clone(),
            domain: problem.domain.clone(),
            since: problem.since.clone(),
            what: problem.what.clone(),
        }
    }
}

/// A page of the audit trail.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub(crate) struct UsbEvents {
    /// Events, newest first.
    pub(crate) events: Vec<UsbEvent>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) events_links: Vec<Link>,
}

/// An entry of the audit trail.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub(crate) struct UsbEvent {
    /// Id of the event; later events have higher ids.
    pub(crate) id: i64,
    /// Time of the event (UTC, ISO 8601).
    at: String,
    /// Type of the event: `claimed`, `allocated`, `released`, `refused`, ...
    event: String,
    #[schema(value_type = Option<String>)]
    instance_uuid: Option<InstanceId>,
    /// Name of the domain at the time of the event.
    domain: Option<String>,
    project_id: Option<String>,
    #[schema(value_type = Option<u64>)]
    usb_device_id: Option<DeviceId>,
    /// Program or caller that caused the event; null if the caller may not see it.
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
            instance_uuid: row.instance_uuid,
            domain: row.domain,
            project_id: row.project_id,
            usb_device_id: row.device_id,
            actor: Some(row.actor).filter(|actor| !actor.is_empty()),
            detail: row.detail,
        }
    }
}

/// All stored flavors.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub(crate) struct UsbFlavors {
    pub(crate) usb_flavors: Vec<UsbFlavor>,
}

/// One stored flavor.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub(crate) struct UsbFlavorShown {
    pub(crate) usb_flavor: UsbFlavor,
}

/// A stored flavor.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub(crate) struct UsbFlavor {
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

/// All stored grants.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub(crate) struct UsbGrants {
    pub(crate) usb_grants: Vec<UsbGrant>,
}

/// One stored grant.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub(crate) struct UsbGrantShown {
    pub(crate) usb_grant: UsbGrant,
}

/// A stored grant.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub(crate) struct UsbGrant {
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

/// All hosts that the API knows.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub(crate) struct Hypervisors {
    pub(crate) hypervisors: Vec<HypervisorSummary>,
}

/// Response with one host.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub(crate) struct Hypervisor {
    pub(crate) hypervisor: HypervisorDetail,
}

/// Entry of the list of hosts.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub(crate) struct HypervisorSummary {
    pub(crate) id: u64,
    pub(crate) hypervisor_hostname: String,
    /// State in Nova's terms: `up`, or `down` if the fleet has no current data of the host.
    #[serde(default)]
    #[schema(required)]
    pub(crate) state: String,
    /// Status in Nova's terms.
    #[serde(default)]
    #[schema(required)]
    pub(crate) status: String,
    pub(crate) usb_device_totals: Totals,
    /// Revision of the inventory, which grows with every change; only for administrators.
    pub(crate) revision: Option<u64>,
    /// Time of the last complete discovery (UTC, ISO 8601).
    pub(crate) scanned_at: Option<String>,
}

// The devices are the first key, as in the first version of the API.
/// Host with its devices.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub(crate) struct HypervisorDetail {
    pub(crate) usb_device_stats: Vec<UsbDevice>,
    #[serde(flatten)]
    pub(crate) listed: HypervisorSummary,
}

/// Servers that the caller may see.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub(crate) struct Servers {
    pub(crate) servers: Vec<ServerSummary>,
}

/// Entry of the list of servers.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub(crate) struct ServerSummary {
    #[schema(value_type = String)]
    pub(crate) id: InstanceId,
    pub(crate) name: String,
    /// Status in Nova's terms: `ACTIVE`, `SHUTOFF`.
    #[serde(default)]
    #[schema(required)]
    pub(crate) status: String,
    /// Owner project, if known.
    #[schema(value_type = Option<String>)]
    pub(crate) project_id: Option<ProjectId>,
    /// Time at which the host last asked libvirt about the server (UTC, ISO 8601); null if unknown.
    pub(crate) seen_at: Option<String>,
}

/// Response with one server.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
#[schema(as = Server)]
pub(crate) struct ServerShown {
    pub(crate) server: ServerDetail,
}

/// A server with its devices and requests.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub(crate) struct ServerDetail {
    #[serde(flatten)]
    pub(crate) listed: ServerSummary,
    pub(crate) usb_devices: Vec<UsbDevice>,
    /// Requests that are satisfied at each start, with any available device.
    #[schema(value_type = Vec<super::request_schemas::UsbDeviceRequest>)]
    pub(crate) usb_devices_requests: Vec<DeviceRequest>,
}

/// Result of an action.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
#[schema(as = ServerAction)]
pub(crate) struct Acted {
    /// The attached or detached devices, in their new state.
    pub(crate) usb_devices: Vec<UsbDevice>,
    /// Whether the server is running. If not, it gets attached devices at its next start.
    pub(crate) live: bool,
    /// Ids of the devices that the server already had.
    pub(crate) already: Vec<u64>,
}

/// All owners that administrators have set.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub(crate) struct Owners {
    pub(crate) usb_owners: Vec<UsbOwner>,
}

/// Owner of a server, as set by an administrator.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub(crate) struct UsbOwner {
    #[schema(value_type = String)]
    instance_uuid: InstanceId,
    /// Time at which the owner was set (UTC, ISO 8601).
    created_at: String,
    /// Name of the domain when the owner was set.
    domain: String,
    #[schema(value_type = String)]
    project_id: ProjectId,
}

impl From<Owner> for UsbOwner {
    fn from(owner: Owner) -> Self {
        let Owner { instance_uuid, created_at, domain, project_id } = owner;
        Self { instance_uuid, created_at, domain, project_id }
    }
}

/// Link to the next page.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub(crate) struct Link {
    pub(crate) href: String,
    rel: String,
}

impl Link {
    pub(super) fn next(href: String) -> Self {
        Self { href, rel: "next".to_owned() }
    }
}

/// Body of an error response, by Nova's name of the error.
pub(crate) type Fault = std::collections::BTreeMap<String, FaultReason>;

/// Reason of an error response.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct FaultReason {
    #[serde(default)]
    pub(crate) code: u16,
    pub(crate) message: String,
}
