//! Portal pages of the servers: the list, and a server with its devices.

use axum::response::Response;
use maud::{Markup, html};
use serde::Deserialize;
use virt_usb_model::ParseError;
use virt_usb_store::events::Filter;

use super::super::authorize::Authorized;
use super::super::error::{ApiError, sentence};
use super::super::events;
use super::super::policy::Call;
use super::super::request::Named;
use super::super::servers::{ServerName, give_to};
use super::audit::rows;
use super::devices::detach_link;
use super::pages::{action_link, csrf, name, page, quoted, see, state, table, time};
use super::session::{Sent, Signed};

/// Number of events on a server's page.
const STORY: usize = 20;

fn running(runs: bool) -> Markup {
    let (word, colour) = if runs { ("running", "good") } else { ("stopped", "off") };
    html! { span class={ "state " (colour) } { (word) } }
}

pub(super) async fn list(auth: Authorized, signed: Signed) -> Result<Response, ApiError> {
    let servers = auth.servers()?;
    let snapshot = auth.api.inventory.now()?;
    let held = |id| snapshot.devices().filter(|r| r.entry.instance_uuid == Some(id)).count();
    let row = |server: &super::super::servers::Server| {
        html! {
            th scope="row" { a href={ "/portal/servers/" (server.id) } { (server.name) } }
            td { (running(server.running)) }
            td { (held(server.id)) }
            td { (server.id) }
        }
    };
    let rows: Vec<Markup> = servers.iter().map(row).collect();
    let main = html! {
        div id="servers" data-live {
            @if rows.is_empty() {
                p { "Your project has no servers." }
            } @else {
                (table("Servers", &["Server", "State", "USB devices", "UUID"], &rows))
            }
        }
    };
    Ok(page("Servers", Some(&signed), &main))
}

pub(super) async fn show(
    auth: Authorized,
    (signed, Named(ServerName { server_id })): (Signed, Named<ServerName>),
) -> Result<Response, ApiError> {
    let server = auth.server(&server_id).await?;
    let id = server.id;
    let assigned = auth.api.assigned(&server).await?;
    let filter = Filter { instance: Some(id), ..Filter::default() };
    let (story, _) = events::read(&auth, filter, 0, STORY).await?;
    let snapshot = auth.api.inventory.now()?;
    let mine = snapshot.devices().filter(|r| r.entry.instance_uuid == Some(id));
    let row = |device: super::super::responses::UsbDevice| {
        html! {
            th scope="row" { a href={ "/portal/devices/" (device.id) } { (name(&device)) } }
            td { (state(&device)) }
            td { @if let Some(since) = &device.held_since { (time(since)) } }
            td { (device.serial.as_deref().unwrap_or("none")) }
            td { @if signed.may(Call::Attach) {
                (detach_link(&id.to_string(), &device))
            } }
        }
    };
    let devices: Vec<Markup> =
        mine.map(|record| row(snapshot.shown(record, auth.caller()))).collect();
    let assignment = |(request, since): &(virt_usb_model::DeviceRequest, Option<String>)| {
        let request = request.to_string();
        html! {
            th scope="row" { code { (request) } }
            td { @if let Some(since) = since { (time(since)) } }
            td { @if signed.may(Call::Attach) {
                @let to = format!("/portal/detach?server={id}&request={}", quoted(&request));
                (action_link(&to, "Detach", &request))
            } }
        }
    };
    let assignments: Vec<Markup> = assigned.iter().map(assignment).collect();
    let owner = server.owner.as_ref().map_or_else(|| "none".to_owned(), ToString::to_string);
    let main = html! {
        div id="server" data-live {
            p { (running(server.running)) " " span.note { (id) } }
            p { "Project: " (owner) }
            @if let Some(host) = &server.host { p { "Host: " (host) } }
            @if devices.is_empty() {
                p { "No USB devices." }
            } @else {
                (table("USB devices", &["Device", "State", "Since", "Serial", "Action"], &devices))
            }
            @if signed.may(Call::Attach) {
                p.actions { a.button href={ "/portal/attach?server=" (id) } { "Attach device" } }
            }
            @if !assignments.is_empty() {
                h2 { "Assigned at each start" }
                (table("Assigned", &["Request", "Since", "Action"], &assignments))
            }
            h2 { "Events" }
            (rows(&story, true))
        }
        @if signed.may(Call::ChangeOwner) && !server.by_domain {
            h2 { "Administration" }
            form.actions method="post" action={ "/portal/servers/" (id) "/owner" } {
                (csrf(&signed))
                label {
                    "Owner project"
                    input name="project" id="project" value=[server.owner.as_ref()];
                }
                button { "Save" }
            }
            p.note { "The domain of this server names no owner. Members of the owner project may \
                attach devices. If the field is empty, only administrators may." }
        }
    };
    Ok(page(&server.name, Some(&signed), &main))
}

/// Form field with the new owner project; empty for no owner.
#[derive(Deserialize)]
pub(super) struct NewOwner {
    project: String,
}

/// Server, and the form with its new owner.
type OwnerForm = (Named<ServerName>, Sent<NewOwner>);

pub(super) async fn own(
    auth: Authorized,
    (Named(ServerName { server_id }), Sent(_, NewOwner { project })): OwnerForm,
) -> Result<Response, ApiError> {
    let server = auth.server(&server_id).await?;
    let project = match project.trim() {
        "" => None,
        text => Some(
            text.parse()
                .map_err(|e: ParseError| ApiError::bad_request(sentence(&e.to_string())))?,
        ),
    };
    let server = give_to(&auth, server, project).await?;
    Ok(see(&format!("/portal/servers/{}", server.id)))
}
