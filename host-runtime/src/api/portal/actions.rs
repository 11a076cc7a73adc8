//! Portal pages that attach and detach a device: a confirmation, then the progress, then the
//! result.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use axum::http::header::{HeaderValue, REFRESH};
use axum::response::Response;
use maud::{Markup, html};
use serde::Deserialize;
use tokio::sync::watch;
use virt_usb_model::{DeviceRequest, Flavor, Status};
use virt_usb_store::Record;

use super::super::authorize::Authorized;
use super::super::error::{ApiError, sentence};
use super::super::policy::Call;
use super::super::request::{Asked, Named};
use super::super::responses::UsbDevice;
use super::super::servers::{Server, perform};
use super::pages::{csrf, name, page, see};
use super::session::{Sent, Signed, make_room, secret};

/// Time to wait for the result before the progress page is shown, which then refreshes itself.
const AT_ONCE: Duration = Duration::from_millis(800);
/// Maximum number of remembered actions.
const MOST: usize = 1024;
/// Maximum number of remembered actions of one caller.
const MOST_EACH: usize = 16;
/// Maximum number of devices to choose from; search finds the others.
const CHOICE: usize = 500;

/// An attach or detach that has begun.
#[derive(Clone)]
struct Action {
    /// Id of the session that began the action.
    owner: String,
    /// Name of the session's caller.
    caller: String,
    title: String,
    server: String,
    begun: Instant,
    /// Result of the action; `None` while it is running.
    outcome: watch::Receiver<Option<Result<String, ApiError>>>,
}

/// Remembered actions by their random ids.
#[derive(Default)]
pub(super) struct ActionLog(Mutex<HashMap<String, Action>>);

impl ActionLog {
    fn add(&self, action: Action) -> Result<String, ApiError> {
        let id = secret()?;
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        make_room(&mut all, MOST_EACH, |other| other.caller == action.caller, |other| other.begun);
        make_room(&mut all, MOST, |_| true, |other| other.begun);
        all.insert(id.clone(), action);
        Ok(id)
    }

    fn of(&self, owner: &str, id: &str) -> Option<Action> {
        let all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.get(id).filter(|action| action.owner == owner).cloned()
    }
}

/// Form fields of an attach or detach.
#[derive(Deserialize)]
pub(super) struct Form {
    #[serde(default)]
    device: String,
    #[serde(default)]
    server: String,
    /// A request as in a flavor, instead of a device.
    #[serde(default)]
    request: String,
}

impl Form {
    fn request(&self) -> Result<DeviceRequest, ApiError> {
        let text = match self.request.as_str() {
            "" => format!(
                "[{{\"id\":{}}}]",
                self.device
                    .trim()
                    .parse::<u64>()
                    .map_err(|_| ApiError::bad_request("Choose a device."))?
            ),
            request => format!("[{request}]"),
        };
        let parsed = Flavor::parse_lists(Some(&text), None)
            .map_err(|e| ApiError::bad_request(sentence(&e.to_string())))?;
        let mut requests = parsed.usb_devices.into_iter();
        match (requests.next(), requests.next()) {
            (Some(request), None) => Ok(DeviceRequest { count: 1, ..request }),
            _ => Err(ApiError::bad_request("Choose one device.")),
        }
    }
}

fn option(device: &UsbDevice) -> String {
    let serial =
        device.serial.as_deref().map(|serial| format!(", serial {serial}")).unwrap_or_default();
    format!(
        "{} ({}:{}{serial}, port {})",
        name(device),
        device.vendor_id,
        device.product_id,
        device.port_path
    )
}

/// Form that attaches a device to a server. Offers a choice only for what the query leaves open.
pub(super) async fn attach_page(
    auth: Authorized,
    (signed, Asked(form)): (Signed, Asked<Form>),
) -> Result<Response, ApiError> {
    let servers: Vec<Server> = if form.server.is_empty() {
        auth.servers()?
    } else {
        vec![auth.server(&form.server).await?]
    };
    let devices: Vec<UsbDevice> = if form.device.is_empty() {
        let (snapshot, caller) = (auth.api.inventory.now()?, auth.caller());
        let is_free = |record: &&Record| record.entry.state() == Ok(Status::Available);
        let free = snapshot.seen(caller).filter(is_free);
        free.take(CHOICE).map(|record| snapshot.shown(record, caller)).collect()
    } else {
        vec![auth.device(&form.device)?.1]
    };
    let main = html! {
        @if servers.is_empty() {
            p.bad { "Your project has no servers." }
        } @else if devices.is_empty() {
            p.bad { "No devices available." }
        } @else {
            form.stack method="post" action="/portal/attach" {
                (csrf(&signed))
                label for="device" { "Device" }
                select id="device" name="device" {
                    @for device in &devices { option value=(device.id) { (option(device)) } }
                }
                label for="server" { "Server" }
                select id="server" name="server" {
                    @for server in &servers {
                        option value=(server.id) {
                            (server.name)
                            @if !server.running { " (stopped; attaches at its next start)" }
                        }
                    }
                }
                p.note { "A running server gets the device immediately. Every server gets it \
                    again at each start, until it is detached." }
                div.actions { button { "Attach" } a href="/portal/" { "Cancel" } }
            }
        }
    };
    Ok(page("Attach device", Some(&signed), &main))
}

/// Asks for confirmation: the guest sees an unplug.
pub(super) async fn detach_page(
    auth: Authorized,
    (signed, Asked(form)): (Signed, Asked<Form>),
) -> Result<Response, ApiError> {
    let server = auth.server(&form.server).await?;
    let what = if form.request.is_empty() {
        option(&auth.device(&form.device)?.1)
    } else {
        form.request()?.to_string()
    };
    let main = html! {
        p { "Detach " b { (what) } " from " b { (server.name) } "?" }
        @if server.running { p.busy { "The server sees this as an unplug. First stop the programs \
            that use the device, and unmount its file systems." } }
        form.actions method="post" action="/portal/detach" {
            (csrf(&signed))
            input type="hidden" name="server" value=(server.id);
            input type="hidden" name="device" value=(form.device);
            input type="hidden" name="request" value=(form.request);
            button { "Detach" }
            a href={ "/portal/servers/" (server.id) } { "Cancel" }
        }
    };
    Ok(page("Detach device", Some(&signed), &main))
}

/// Begins to attach or detach, as the call says, and shows the action's page. The action continues
/// even if the browser disconnects.
pub(super) async fn begin(
    auth: Authorized,
    Sent(signed, form): Sent<Form>,
) -> Result<Response, ApiError> {
    let request = form.request()?;
    let server = auth.server(&form.server).await?;
    let attach = auth.call() == Call::Attach;
    let (to, mut outcome) = watch::channel(None);
    let action = Action {
        owner: signed.id,
        caller: signed.caller.name.clone(),
        title: format!(
            "{} {}",
            if attach { "Attaching to" } else { "Detaching from" },
            server.name
        ),
        server: server.id.to_string(),
        begun: Instant::now(),
        outcome: outcome.clone(),
    };
    let id = auth.api.portal.actions.add(action)?;
    tokio::spawn(async move {
        let server_name = server.name.clone();
        let done = perform(auth, server, vec![request]).await;
        let told = done.map(|acted| {
            let names: Vec<String> = acted.usb_devices.iter().map(name).collect();
            match (attach, acted.live, names.is_empty()) {
                (true, true, _) => format!("{server_name} has {}.", names.join(", ")),
                (true, false, _) => format!("{server_name} gets the device at its next start."),
                (false, _, true) => format!("{server_name} no longer gets the device."),
                (false, _, false) => format!("{server_name} released {}.", names.join(", ")),
            }
        });
        to.send_replace(Some(told));
    });
    // Most actions end before a user could read a progress page.
    drop(tokio::time::timeout(AT_ONCE, outcome.wait_for(Option::is_some)).await);
    Ok(see(&format!("/portal/actions/{id}")))
}

/// Action in the path of a request.
#[derive(Deserialize)]
pub(super) struct ActionName {
    id: String,
}

pub(super) async fn show(
    auth: Authorized,
    (signed, Named(ActionName { id })): (Signed, Named<ActionName>),
) -> Result<Response, ApiError> {
    let gone = || {
        ApiError::not_found("This action is no longer known. The server's page shows its devices.")
    };
    let action = auth.api.portal.actions.of(&signed.id, &id).ok_or_else(gone)?;
    let outcome = action.outcome.borrow().clone();
    let links = html! { p.actions {
        a href={ "/portal/servers/" (action.server) } { "Back to server" }
        a href="/portal/" { "Back to devices" }
    } };
    let (main, done): (Markup, bool) = match &outcome {
        None => (
            html! { p.busy role="status" {
                "In progress for " (action.begun.elapsed().as_secs())
                " s. Waiting for libvirt and the guest. This page refreshes automatically."
            } },
            false,
        ),
        Some(Ok(told)) => (html! { p.good role="status" { (told) } }, true),
        Some(Err(fault)) => {
            (html! { p.bad role="alert" { (fault.message) } p { "Nothing was changed." } }, true)
        }
    };
    let mut page = page(&action.title, Some(&signed), &html! { (main) (links) });
    if !done {
        page.headers_mut().insert(REFRESH, HeaderValue::from_static("1"));
    }
    Ok(page)
}
