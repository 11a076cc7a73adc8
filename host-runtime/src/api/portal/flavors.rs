//! Portal pages of the flavors: the list, and a form that creates one from a device.

use axum::response::Response;
use maud::{Markup, html};
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::super::authorize::Authorized;
use super::super::error::ApiError;
use super::super::flavors::{all, end, store as store_flavor};
use super::super::policy::Call;
use super::super::request::Asked;
use super::super::responses::UsbDevice;
use super::pages::{action_link, csrf, name, page, quoted, see, table, time};
use super::session::{Sent, Signed};

pub(super) async fn list(auth: Authorized, signed: Signed) -> Result<Response, ApiError> {
    let flavors = all(&auth).await?;
    let row = |stored: &virt_usb_store::StoredFlavor| {
        let flavor = &stored.flavor;
        html! {
            th scope="row" { (stored.name) }
            td.text {
                @for request in &flavor.usb_devices { div { code { (request) } } }
                @for request in &flavor.usb_redirection_devices {
                    div { code { (json!(request)) } }
                }
            }
            td { (time(&stored.updated_at)) }
            td { @if signed.may(Call::ChangeFlavor) {
                @let to = format!("/portal/flavors/remove?name={}", quoted(&stored.name));
                (action_link(&to, "Remove", &stored.name))
            } }
        }
    };
    let rows: Vec<Markup> = flavors.iter().map(row).collect();
    let main = html! {
        @if rows.is_empty() { p { "No flavors yet." } }
        @else { (table("Flavors", &["Name", "Requests", "Changed", "Action"], &rows)) }
        p.note {
            "To request a flavor for a server, set "
            code { "usb:devices=@NAME" }
            " in its extra specs. To create a flavor, open the page of a device."
        }
    };
    Ok(page("Flavors", Some(&signed), &main))
}

/// Device that the new flavor is based on.
#[derive(Deserialize)]
pub(super) struct Query {
    device: String,
}

/// Selector key and value that identify this device, and their label in the form.
fn very(device: &UsbDevice) -> (&'static str, String, &'static str) {
    match &device.serial {
        Some(serial) if device.serial_kind == "unique" => {
            ("serial", serial.clone(), "only this device, by its serial")
        }
        _ => {
            let words = "any device of this kind in this port";
            match &device.path {
                Some(path) => ("path", path.clone(), words),
                None => ("port", device.port_path.clone(), words),
            }
        }
    }
}

pub(super) async fn form(
    auth: Authorized,
    (signed, Asked(query)): (Signed, Asked<Query>),
) -> Result<Response, ApiError> {
    let (_, device) = auth.device(&query.device)?;
    let (_, value, which) = very(&device);
    let main = html! {
        p {
            "A flavor that requests " b { (name(&device)) }
            ". It replaces a flavor with the same name."
        }
        form.stack method="post" action="/portal/flavors" {
            (csrf(&signed))
            input type="hidden" name="device" value=(device.id);
            label for="name" { "Name" }
            input id="name" name="name" required maxlength="255" pattern="[^@].*";
            fieldset {
                legend { "Device" }
                label {
                    input type="radio" name="which" value="kind" checked;
                    "any device of this kind (" (device.vendor_id) ":" (device.product_id) ")"
                }
                label { input type="radio" name="which" value="very"; (which) " (" (value) ")" }
            }
            label for="count" { "Count (any device of this kind)" }
            input id="count" name="count" type="number" min="1" max="127" value="1";
            button { "Create" }
        }
    };
    Ok(page("New flavor", Some(&signed), &main))
}

#[derive(Deserialize)]
pub(super) struct Form {
    device: String,
    name: String,
    which: String,
    #[serde(default)]
    count: String,
}

pub(super) async fn store(
    auth: Authorized,
    Sent(_, form): Sent<Form>,
) -> Result<Response, ApiError> {
    let (_, device) = auth.device(&form.device)?;
    let mut request = Map::new();
    request.insert("vendor_id".into(), json!(device.vendor_id));
    request.insert("product_id".into(), json!(device.product_id));
    match form.which.as_str() {
        "kind" => {
            let count = form.count.trim();
            let count: u32 = if count.is_empty() {
                1
            } else {
                count.parse().map_err(|_| {
                    ApiError::bad_request(format!("count: {count:?} is not a number."))
                })?
            };
            request.insert("count".into(), json!(count));
        }
        "very" => {
            let (key, value, _) = very(&device);
            request.insert(key.into(), Value::String(value));
        }
        _ => {
            return Err(ApiError::bad_request("which: wanted \"kind\" or \"very\"."));
        }
    }
    let text = json!({ "usb_devices": [request] }).to_string();
    store_flavor(&auth, form.name.trim().to_owned(), &text).await?;
    Ok(see("/portal/flavors"))
}

#[derive(Deserialize)]
pub(super) struct Removal {
    name: String,
}

pub(super) async fn removal(
    _: Authorized,
    (signed, Asked(removal)): (Signed, Asked<Removal>),
) -> Response {
    let main = html! {
        p {
            "Remove the flavor " b { (removal.name) }
            "? Servers that request it will not start; running servers keep their devices."
        }
        form.actions method="post" action="/portal/flavors/remove" {
            (csrf(&signed))
            input type="hidden" name="name" value=(removal.name);
            button { "Remove" }
            a href="/portal/flavors" { "Cancel" }
        }
    };
    page("Remove flavor", Some(&signed), &main)
}

pub(super) async fn remove(
    auth: Authorized,
    Sent(_, removal): Sent<Removal>,
) -> Result<Response, ApiError> {
    end(&auth, removal.name).await?;
    Ok(see("/portal/flavors"))
}
