//! Portal page of the audit trail: which server got which device, when and why.

use axum::response::Response;
use maud::{Markup, html};
use serde::Deserialize;
use virt_usb_store::events::{EventRow, Filter};

use super::super::authorize::Authorized;
use super::super::error::ApiError;
use super::super::events;
use super::super::request::Asked;
use super::pages::{page, table, time};
use super::session::Signed;

/// Number of events per page.
const PAGE: usize = 100;

/// Position in the audit trail.
#[derive(Deserialize)]
pub(super) struct Query {
    #[serde(default)]
    before: i64,
}

/// Renders events as a table, with a server column unless they are of one server.
pub(super) fn rows(story: &[EventRow], of_one: bool) -> Markup {
    let row = |event: &EventRow| {
        html! {
            td { (time(&event.at)) }
            td { (event.event) }
            td {
                @if let Some(id) = event.device_id { a href={ "/portal/devices/" (id) } { (id) } }
            }
            @if !of_one {
                td {
                    @if let (Some(id), Some(domain)) = (event.instance_uuid, &event.domain) {
                        a href={ "/portal/servers/" (id) } { (domain) }
                    }
                }
            }
            td { (event.actor) }
            td.text { (event.detail.as_deref().unwrap_or_default()) }
        }
    };
    let rows: Vec<Markup> = story.iter().map(row).collect();
    let mut heads = vec!["Time (UTC)", "Event", "Device", "Server", "Actor", "Details"];
    if of_one {
        heads.remove(3);
    }
    html! {
        @if rows.is_empty() { p { "No events visible to you." } }
        @else { (table("Events, newest first", &heads, &rows)) }
    }
}

pub(super) async fn list(
    auth: Authorized,
    (signed, Asked(query)): (Signed, Asked<Query>),
) -> Result<Response, ApiError> {
    let (story, more) = events::read(&auth, Filter::default(), query.before.max(0), PAGE).await?;
    let last = story.last().map_or(0, |event| event.id);
    let main = html! {
        div id="events" data-live[query.before == 0] { (rows(&story, false)) }
        @if more { p { a href={ "/portal/events?before=" (last) } { "Older" } } }
    };
    Ok(page("Audit", Some(&signed), &main))
}
