//! API calls for hosts, in the format of Nova's hypervisors.

use axum::Json;
use axum::body::Bytes;
use axum::http::header::{CONTENT_TYPE, HeaderName};
use serde::Deserialize;

use super::Api;
use super::authorize::Authorized;
use super::error::ApiError;
use super::identity::Caller;
use super::inventory::Snapshot;
use super::request::Named;
use super::responses::{
    Hypervisor, HypervisorDetail as Shown, HypervisorSummary as Listed, Hypervisors, Totals,
};
use crate::publish::peers::Peer;

/// Host in the path of a request.
#[derive(Deserialize)]
pub(super) struct HostName {
    hypervisor_hostname: String,
}

fn own(api: &Api, snapshot: &Snapshot, caller: &Caller) -> Listed {
    let known = snapshot.own.host.as_ref();
    let seen = snapshot.own_devices().filter(|record| snapshot.sees(caller, record));
    Listed {
        id: snapshot.number(),
        hypervisor_hostname: api.host.clone(),
        state: "up".to_owned(),
        status: "enabled".to_owned(),
        usb_device_totals: Totals::of(seen),
        revision: known.filter(|_| caller.is_admin()).map(|host| host.revision),
        scanned_at: known.and_then(|host| host.scanned_at.clone()),
    }
}

fn other(other: &Peer, snapshot: &Snapshot, caller: &Caller) -> Listed {
    let seen = other.devices.iter().filter(|record| snapshot.sees(caller, record));
    Listed {
        id: other.number,
        hypervisor_hostname: other.name.clone(),
        state: if other.reachable { "up" } else { "down" }.to_owned(),
        status: "enabled".to_owned(),
        usb_device_totals: Totals::of(seen),
        revision: Some(other.revision).filter(|_| caller.is_admin()),
        scanned_at: None,
    }
}

/// Hosts, with the number of devices in each state
#[utoipa::path(get, path = "/os-hypervisors", tag = "hypervisors",
    operation_id = "list_hypervisors",
    responses((status = 200, description = "The hosts", body = Hypervisors)))]
pub(super) async fn list(auth: Authorized, (): ()) -> Result<Json<Hypervisors>, ApiError> {
    let (snapshot, caller) = (auth.api.inventory.now()?, auth.caller());
    let mut hypervisors: Vec<Listed> =
        snapshot.others.values().map(|one| other(one, &snapshot, caller)).collect();
    hypervisors.push(own(&auth.api, &snapshot, caller));
    hypervisors.sort_by_key(|listed| listed.id);
    Ok(Json(Hypervisors { hypervisors }))
}

/// A host and its devices
#[utoipa::path(get, path = "/os-hypervisors/{hypervisor_hostname}", tag = "hypervisors",
    operation_id = "show_hypervisor",
    params(("hypervisor_hostname" = String, Path, description = "The host's name")),
    responses((status = 200, description = "The host", body = Hypervisor)))]
pub(super) async fn show(
    auth: Authorized,
    Named(HostName { hypervisor_hostname: name }): Named<HostName>,
) -> Result<([(HeaderName, &'static str); 1], Bytes), ApiError> {
    let (api, caller) = (&auth.api, auth.caller());
    let snapshot = api.inventory.now()?;
    let body = if name == api.host {
        snapshot.answer(caller, || {
            let devices = snapshot.own_devices().filter(|record| snapshot.sees(caller, record));
            let usb_device_stats = devices.map(|record| snapshot.shown(record, caller)).collect();
            let shown = Shown { usb_device_stats, listed: own(api, &snapshot, caller) };
            serde_json::to_vec(&Hypervisor { hypervisor: shown }).map(Bytes::from)
        })
    } else {
        let Some(found) = snapshot.others.values().find(|other| other.name == name) else {
            return Err(ApiError::not_found(format!("Compute host {name} could not be found.")));
        };
        let devices = found.devices.iter().filter(|record| snapshot.sees(caller, record));
        let usb_device_stats = devices.map(|record| snapshot.shown(record, caller)).collect();
        let shown = Shown { usb_device_stats, listed: other(found, &snapshot, caller) };
        serde_json::to_vec(&Hypervisor { hypervisor: shown }).map(Bytes::from)
    };
    let body = body.map_err(|e| ApiError::internal(e.to_string()))?;
    Ok(([(CONTENT_TYPE, "application/json")], body))
}
