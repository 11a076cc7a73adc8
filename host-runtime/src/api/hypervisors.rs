//! Hosts, as Nova's hypervisors.

use std::sync::Arc;

use axum::Json;
use axum::body::Bytes;
use axum::extract::State;
use axum::http::header::{CONTENT_TYPE, HeaderName};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use virt_usb_store::LONE_NODE;

use super::Api;
use super::documents::{Totals, UsbDevice};
use super::fault::Fault;
use super::identity::Caller;
use super::inventory::Snapshot;
use super::policy::{Call, may};
use super::request::{Asks, Named};

/// A path's host.
#[derive(Deserialize)]
pub(super) struct HostName {
    hypervisor_hostname: String,
}

#[derive(Serialize, ToSchema)]
#[schema(as = HypervisorSummary)]
pub(super) struct Listed {
    id: u64,
    hypervisor_hostname: String,
    /// As Nova has it.
    state: &'static str,
    /// As Nova has it.
    status: &'static str,
    usb_device_totals: Totals,
    /// The inventory's, for administrators: it grows with every change.
    revision: Option<u64>,
    /// When its devices were looked for last, completely; UTC, ISO 8601.
    scanned_at: Option<String>,
}

/// The devices promised first, as they have always been.
#[derive(Serialize, ToSchema)]
#[schema(as = HypervisorDetail)]
pub(super) struct Shown {
    usb_device_stats: Vec<UsbDevice>,
    #[serde(flatten)]
    listed: Listed,
}

#[derive(Serialize, ToSchema)]
pub(super) struct Hypervisors {
    hypervisors: Vec<Listed>,
}

#[derive(Serialize, ToSchema)]
pub(super) struct Hypervisor {
    hypervisor: Shown,
}

fn listed(api: &Api, snapshot: &Snapshot, caller: &Caller) -> Listed {
    let known = snapshot.host.as_ref();
    Listed {
        id: known.map_or(LONE_NODE, |host| host.id),
        hypervisor_hostname: api.host.clone(),
        state: "up",
        status: "enabled",
        usb_device_totals: Totals::of(snapshot.seen(caller)),
        revision: known.filter(|_| caller.is_admin()).map(|host| host.revision),
        scanned_at: known.and_then(|host| host.scanned_at.clone()),
    }
}

/// Hosts, and how many devices of each state
#[utoipa::path(get, path = "/os-hypervisors", tag = "hypervisors", operation_id = "list_hypervisors",
    responses((status = 200, description = "The hosts", body = Hypervisors)))]
pub(super) async fn list(
    State(api): State<Arc<Api>>,
    Asks(caller): Asks,
) -> Result<Json<Hypervisors>, Fault> {
    Fault::unless(may(&caller, Call::Look), Fault::forbidden)?;
    let snapshot = api.inventory.now()?;
    Ok(Json(Hypervisors { hypervisors: vec![listed(&api, &snapshot, &caller)] }))
}

/// A host and its devices
#[utoipa::path(get, path = "/os-hypervisors/{hypervisor_hostname}", tag = "hypervisors", operation_id = "show_hypervisor",
    params(("hypervisor_hostname" = String, Path, description = "The host's name")),
    responses((status = 200, description = "The host", body = Hypervisor)))]
pub(super) async fn show(
    State(api): State<Arc<Api>>,
    Asks(caller): Asks,
    Named(HostName { hypervisor_hostname: name }): Named<HostName>,
) -> Result<([(HeaderName, &'static str); 1], Bytes), Fault> {
    Fault::unless(may(&caller, Call::Look), Fault::forbidden)?;
    if name != api.host {
        return Err(Fault::not_found(format!("Compute host {name} could not be found.")));
    }
    let snapshot = api.inventory.now()?;
    let body = snapshot.answer(&caller, || {
        let usb_device_stats = snapshot.seen(&caller).map(|record| snapshot.shown(record, &caller)).collect();
        let shown = Shown { usb_device_stats, listed: listed(&api, &snapshot, &caller) };
        serde_json::to_vec(&Hypervisor { hypervisor: shown }).map(Bytes::from)
    });
    let body = body.map_err(|e| Fault::internal(e.to_string()))?;
    Ok(([(CONTENT_TYPE, "application/json")], body))
}
