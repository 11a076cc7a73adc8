//! Portal pages of the devices: the list, and a device with its history.

use axum::response::Response;
use maud::{Markup, html};
use serde::Deserialize;
use virt_usb_model::{Status, UnavailableReason};
use virt_usb_store::events::Filter;

use super::super::actions::DeviceAction;
use super::super::authorize::Authorized;
use super::super::devices::{DeviceName, change as change_device};
use super::super::error::ApiError;
use super::super::events;
use super::super::policy::Call;
use super::super::request::{Asked, Named};
use super::super::responses::{Totals, UsbDevice};
use super::audit::rows;
use super::pages::{action_link, csrf, name, page, quoted, see, state, table, time, words};
use super::session::{Sent, Signed};

/// Number of devices per page.
const PAGE: usize = 100;
/// Number of events on a device's page.
const STORY: usize = 20;

/// Search of the list of devices.
#[derive(Deserialize)]
pub(super) struct Query {
    #[serde(default)]
    q: String,
    #[serde(default)]
    state: String,
    /// Last device of the previous page.
    #[serde(default)]
    after: u64,
}

const STATES: [(&str, &str); 6] = [
    ("", "any"),
    ("available", "available"),
    ("claimed", "claimed"),
    ("allocated", "allocated"),
    ("removed", "removed"),
    ("unavailable", "unavailable"),
];

/// Whether every word of the search occurs in the displayed texts of the device.
fn found(device: &UsbDevice, search: &str) -> bool {
    let all = format!(
        "{} {} {}:{} {} {} {} {} {}",
        name(device),
        device.hypervisor_hostname,
        device.vendor_id,
        device.product_id,
        device.serial.as_deref().unwrap_or_default(),
        device.port_path,
        device.tags.join(" "),
        device.held_by.as_deref().unwrap_or_default(),
        words(device).0,
    )
    .to_lowercase();
    search.to_lowercase().split_whitespace().all(|word| all.contains(word))
}

pub(super) async fn list(
    auth: Authorized,
    (signed, Asked(query)): (Signed, Asked<Query>),
) -> Result<Response, ApiError> {
    let (snapshot, caller) = (auth.api.inventory.now()?, auth.caller());
    let totals = Totals::of(snapshot.seen(caller));
    let after = |record: &&virt_usb_store::Record| record.entry.id.get() > query.after;
    let all = snapshot.seen(caller).filter(after).map(|record| snapshot.shown(record, caller));
    let is_wanted = |device: &UsbDevice| {
        (query.state.is_empty() || query.state == device.status) && found(device, &query.q)
    };
    let mut devices: Vec<UsbDevice> = all.filter(is_wanted).take(PAGE + 1).collect();
    let more = devices.len() > PAGE;
    devices.truncate(PAGE);
    let fleet = !snapshot.others.is_empty();
    let rows: Vec<Markup> = devices.iter().map(|device| row(device, fleet, &signed)).collect();
    let mut columns =
        vec!["Device", "State", "Held by", "Since", "Serial", "USB ID", "Port", "Action"];
    if fleet {
        columns.insert(1, "Host");
    }
    let last = devices.last().map_or(0, |device| device.id);
    let main = html! {
        form.filter role="search" {
            label { "Search" input name="q" type="search" value=(query.q) placeholder="name, \
                serial, tag, server"; }
            label { "State" select name="state" {
                @for (value, word) in STATES {
                    option value=(value) selected[value == query.state] { (word) }
                }
            } }
            button { "Show" }
        }
        div id="devices" data-live {
            p.note {
                @if fleet { (snapshot.others.len() + 1) " hosts: " }
                @else { "Host " (auth.api.host) ": " }
                (totals.total) " devices, " (totals.available) " available, "
                (totals.claimed + totals.allocated) " in use."
            }
            @if rows.is_empty() {
                p {
                    @if query.q.is_empty() && query.state.is_empty() {
                        "No devices visible to you. Plug one in: it appears automatically."
                    } @else { "No devices match." }
                }
            } @else {
                (table("Devices", &columns, &rows))
            }
        }
        @if more {
            @let filter = format!("q={}&state={}", quoted(&query.q), quoted(&query.state));
            p { a href={ "/portal/?" (filter) "&after=" (last) } { "More" } }
        }
    };
    Ok(page("Devices", Some(&signed), &main))
}

/// Link to the server that holds the device, if the caller may see it.
pub(super) fn holder(device: &UsbDevice) -> Markup {
    html! {
        @if let Some(by) = &device.held_by {
            a href={ "/portal/servers/" (device.instance_uuid) } { (by) }
        }
    }
}

/// Link to the page that detaches a device from a server.
pub(super) fn detach_link(server: &str, device: &UsbDevice) -> Markup {
    let to = format!("/portal/detach?server={server}&device={}", device.id);
    action_link(&to, "Detach", &name(device))
}

/// Links to the actions that are possible now.
fn action_links(device: &UsbDevice, signed: &Signed) -> Markup {
    html! {
        @if signed.may(Call::Attach) {
            @if device.held_by.is_some() {
                (detach_link(&device.instance_uuid, device))
            } @else if device.state() == Some(Status::Available) {
                @let to = format!("/portal/attach?device={}", device.id);
                (action_link(&to, "Attach", &name(device)))
            }
        }
    }
}

fn row(device: &UsbDevice, fleet: bool, signed: &Signed) -> Markup {
    html! {
        th scope="row" { a href={ "/portal/devices/" (device.id) } { (name(device)) } }
        @if fleet { td { (device.hypervisor_hostname) } }
        td { (state(device)) }
        td { (holder(device)) }
        td { @if let Some(since) = &device.held_since { (time(since)) } }
        td { (device.serial.as_deref().unwrap_or("none")) }
        td { (device.vendor_id) ":" (device.product_id) }
        td { (device.port_path) }
        td { (action_links(device, signed)) }
    }
}

pub(super) async fn show(
    auth: Authorized,
    (signed, Named(DeviceName { usb_device_id })): (Signed, Named<DeviceName>),
) -> Result<Response, ApiError> {
    let (id, device) = auth.device(&usb_device_id)?;
    let filter = Filter { device: Some(id), ..Filter::default() };
    let (story, _) = events::read(&auth, filter, 0, STORY).await?;
    let main = html! {
        div id="device" data-live {
            dl {
                dt { "State" } dd { (state(&device)) }
                @if device.held_by.is_some() {
                    dt { "Held by" } dd { (holder(&device)) }
                    dt { "Since" } dd { @if let Some(since) = &device.held_since { (time(since)) } }
                }
                dt { "Host" } dd { (device.hypervisor_hostname) }
                dt { "USB ID" } dd { (device.vendor_id) ":" (device.product_id) }
                dt { "Serial" }
                dd { (device.serial.as_deref().unwrap_or("none")) " (" (device.serial_kind) ")" }
                dt { "Port" } dd { (device.port_path) ", " (device.address) }
                @if let Some(path) = &device.path {
                    dt { "Path" } dd { (path) }
                }
                dt { "Speed" } dd { (device.speed.as_deref().unwrap_or("unknown")) }
                @if !device.tags.is_empty() { dt { "Tags" } dd { (device.tags.join(", ")) } }
                @if !device.extra_info.is_empty() { dt { "Note" } dd { (device.extra_info) } }
                @if let Some(used) = &device.host_use { dt { "Used by the host" } dd { (used) } }
            }
            div.actions {
                (action_links(&device, &signed))
                @if signed.may(Call::ChangeFlavor) {
                    a href={ "/portal/flavors/new?device=" (device.id) } { "Create flavor" }
                }
            }
            @if signed.may(Call::ChangeDevice) { (changes(&device, &signed)) }
            h2 { "Events" }
            (rows(&story, false))
        }
    };
    Ok(page(&name(&device), Some(&signed), &main))
}

/// Form with the actions of an administrator.
fn changes(device: &UsbDevice, signed: &Signed) -> Markup {
    let reason = device.state().and_then(Status::reason);
    let is_quarantined =
        matches!(reason, Some(UnavailableReason::Quarantined | UnavailableReason::Flapping));
    html! {
        h2 { "Administration" }
        form.actions method="post" action={ "/portal/devices/" (device.id) "/change" } {
            (csrf(signed))
            @if reason == Some(UnavailableReason::Disabled) {
                button name="change" value="enable" { "Enable" }
            } @else {
                label { "Reason" input name="reason" maxlength="255" id="reason"; }
                button name="change" value="disable" { "Disable" }
            }
            @if is_quarantined {
                button name="change" value="clear_quarantine" { "Clear quarantine" }
            }
        }
    }
}

#[derive(Deserialize)]
pub(super) struct Form {
    change: String,
    #[serde(default)]
    reason: String,
}

pub(super) async fn change(
    auth: Authorized,
    (Named(DeviceName { usb_device_id }), Sent(_, form)): (Named<DeviceName>, Sent<Form>),
) -> Result<Response, ApiError> {
    let change = match form.change.as_str() {
        "enable" => DeviceAction::Enable,
        "disable" => {
            let why: String = form.reason.chars().take(255).collect();
            DeviceAction::Disable(Some(why).filter(|why| !why.trim().is_empty()))
        }
        "clear_quarantine" => DeviceAction::ClearQuarantine,
        other => return Err(ApiError::bad_request(format!("Unknown action: {other}."))),
    };
    let device = change_device(&auth, usb_device_id, change).await?;
    Ok(see(&format!("/portal/devices/{}", device.id)))
}
