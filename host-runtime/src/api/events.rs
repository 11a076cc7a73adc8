//! API calls for the audit trail: of a device, of a server, and of all.

use axum::Json;
use axum::extract::OriginalUri;
use serde::Deserialize;
use utoipa::IntoParams;
use virt_usb_model::ProjectId;
use virt_usb_store::events::{EventRow, Filter};

use super::authorize::Authorized;
use super::devices::DeviceName;
use super::error::ApiError;
use super::identity::Caller;
use super::paging::{event, limit, next};
use super::request::{Asked, Named};
use super::responses::{UsbEvent, UsbEvents as Events};
use super::servers::ServerName;

/// Number of events that are read at a time.
const CHUNK: u32 = 1001;

/// Page of a list of events.
#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct Query {
    limit: Option<u32>,
    /// Id of the last event of the previous page.
    marker: Option<u64>,
}

/// Audit trail of a device, newest first
///
/// Administrators see all events. Other callers see the events of their project and, without actor
/// and reason, the events while no instance held the device.
#[utoipa::path(get, path = "/os-usb-devices/{usb_device_id}/events", tag = "events",
    operation_id = "list_usb_device_events",
    params(("usb_device_id" = u64, Path, description = "The device's id"), Query),
    responses((status = 200, description = "The events", body = Events)))]
pub(super) async fn of_device(
    auth: Authorized,
    (Named(device), page): (Named<DeviceName>, Page),
) -> Result<Json<Events>, ApiError> {
    let device = auth.device(&device.usb_device_id)?.0;
    answer(&auth, Filter { device: Some(device), ..Filter::default() }, page).await
}

/// Audit trail of a server, newest first
#[utoipa::path(get, path = "/servers/{server_id}/os-usb-events", tag = "events",
    operation_id = "list_server_usb_events",
    params(("server_id" = String, Path, description = "The server's UUID"), Query),
    responses((status = 200, description = "The events", body = Events)))]
pub(super) async fn of_server(
    auth: Authorized,
    (Named(server), page): (Named<ServerName>, Page),
) -> Result<Json<Events>, ApiError> {
    let server = auth.server(&server.server_id).await?;
    answer(&auth, Filter { instance: Some(server.id), ..Filter::default() }, page).await
}

/// Audit trail, newest first: all of it for administrators, otherwise that of the caller's project
#[utoipa::path(get, path = "/os-usb-events", tag = "events",
    operation_id = "list_usb_events", params(Query),
    responses((status = 200, description = "The events", body = Events)))]
pub(super) async fn list(auth: Authorized, page: Page) -> Result<Json<Events>, ApiError> {
    answer(&auth, Filter::default(), page).await
}

/// Requested page: its query, and the URI for the link to the next page.
type Page = (Asked<Query>, OriginalUri);

async fn answer(
    auth: &Authorized,
    filter: Filter,
    (Asked(query), OriginalUri(uri)): Page,
) -> Result<Json<Events>, ApiError> {
    let limit = limit(query.limit)?;
    let before = event(query.marker)?;
    let (events, more) = read(auth, filter, before, limit).await?;
    let events_links = events.last().filter(|_| more).map(|last| next(&uri, &last.id.to_string()));
    let events = events.into_iter().map(UsbEvent::from).collect();
    Ok(Json(Events { events, events_links: events_links.into_iter().collect() }))
}

/// The events that the caller may see, newest first, before the event with this id, and whether
/// there are more. If the id is 0, begins with the newest event.
pub(super) async fn read(
    auth: &Authorized,
    filter: Filter,
    before: i64,
    limit: usize,
) -> Result<(Vec<EventRow>, bool), ApiError> {
    let of_device = filter.device.is_some();
    let caller = auth.caller().clone();
    let found = auth.api.blocking(move |api| {
        let (store, mut found) = (api.store()?, Vec::new());
        let mut filter = Filter { before, limit: CHUNK, ..filter };
        // Most events may belong to other projects, so one chunk may not fill the page.
        loop {
            let events = store.events(&filter)?;
            let Some(oldest) = events.first() else { return Ok(found) };
            filter.before = oldest.id;
            found.extend(
                events.into_iter().rev().filter_map(|event| shown(&caller, event, of_device)),
            );
            if found.len() > limit {
                return Ok(found);
            }
        }
    });
    let mut events = found.await?;
    let more = events.len() > limit;
    events.truncate(limit);
    Ok((events, more))
}

/// The part of an event that the caller may see. A caller who may see a device may see the events
/// that happened while no instance held it, but not their reason or actor, which could name others.
fn shown(caller: &Caller, event: EventRow, of_device: bool) -> Option<EventRow> {
    let project: Option<ProjectId> =
        event.project_id.as_deref().and_then(|project| project.parse().ok());
    if caller.is_admin() || caller.owns(project.as_ref()) {
        return Some(event);
    }
    let bare = of_device && event.instance_uuid.is_none();
    bare.then(|| EventRow {
        domain: None,
        project_id: None,
        actor: String::new(),
        detail: None,
        ..event
    })
}
