//! Servers: those that the caller may know of, and one with its devices.

use std::sync::Arc;

use axum::extract::State;
use axum::response::Response;
use maud::{Markup, html};
use virt_usb_store::events::Filter;

use super::super::Api;
use super::super::events;
use super::super::fault::Fault;
use super::super::policy::Call;
use super::super::request::Named;
use super::super::servers::ServerName;
use super::audit::rows;
use super::pages::{name, page, quoted, state, table, time};
use super::session::Signed;

/// So much of a server's story on its page.
const STORY: usize = 20;

fn running(runs: bool) -> Markup {
    html! { span class={ "state " (if runs { "good" } else { "off" }) } { (if runs { "running" } else { "stopped" }) } }
}

pub(super) async fn list(State(api): State<Arc<Api>>, signed: Signed) -> Result<Response, Fault> {
    let servers = api.servers(&signed.caller).await?;
    let snapshot = api.inventory.now()?;
    let held = |id| snapshot.devices.iter().filter(|r| r.entry.instance_uuid == Some(id)).count();
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
                p { "No server of your project is on this host." }
            } @else {
                (table("Servers", &["Server", "State", "USB devices", "UUID"], &rows))
            }
        }
    };
    Ok(page("Servers", Some(&signed), &main))
}

pub(super) async fn show(
    State(api): State<Arc<Api>>,
    signed: Signed,
    Named(ServerName { server_id }): Named<ServerName>,
) -> Result<Response, Fault> {
    let server = api.server(&signed.caller, Call::LookAt, &server_id).await?;
    let id = server.id;
    let assigned = api.blocking(move |api| Ok(api.store()?.assignments(id)?)).await?;
    let filter = Filter { instance: Some(id), ..Filter::default() };
    let (story, _) = events::read(&api, signed.caller.clone(), filter, 0, STORY).await?;
    let snapshot = api.inventory.now()?;
    let mine = snapshot.devices.iter().filter(|r| r.entry.instance_uuid == Some(id));
    let row = |device: super::super::documents::UsbDevice| {
        html! {
            th scope="row" { a href={ "/portal/devices/" (device.id) } { (name(&device)) } }
            td { (state(&device)) }
            td { @if let Some(since) = &device.held_since { (time(since)) } }
            td { (device.serial.as_deref().unwrap_or("none")) }
            td { @if signed.may_act() {
                a href={ "/portal/detach?server=" (id) "&device=" (device.id) } aria-label={ "Detach " (name(&device)) } { "Detach" }
            } }
        }
    };
    let devices: Vec<Markup> = mine.map(|record| row(snapshot.shown(record, &signed.caller))).collect();
    let wish = |assignment: &virt_usb_store::Assignment| {
        let request = assignment.request.to_string();
        html! {
            th scope="row" { code { (request) } }
            td { (time(&assignment.created_at)) }
            td { @if signed.may_act() {
                a href={ "/portal/detach?server=" (id) "&request=" (quoted(&request)) } aria-label={ "Take back " (request) } { "Take back" }
            } }
        }
    };
    let wishes: Vec<Markup> = assigned.iter().map(wish).collect();
    let main = html! {
        div id="server" data-live {
            p { (running(server.running)) " " span.note { (id) } }
            @if devices.is_empty() {
                p { "It has no USB device." }
            } @else {
                (table("What it has", &["Device", "State", "Since", "Serial", "Action"], &devices))
            }
            @if signed.may_act() {
                p.actions { a.button href={ "/portal/attach?server=" (id) } { "Attach a device" } }
            }
            @if !wishes.is_empty() {
                h2 { "What it gets at each start" }
                (table("Assigned", &["Request", "Since", "Action"], &wishes))
            }
            h2 { "What happened" }
            (rows(&story, true))
        }
    };
    Ok(page(&server.name, Some(&signed), &main))
}
