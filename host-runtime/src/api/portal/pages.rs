//! Layout of all portal pages, and the names of devices and states.

use axum::http::header::{
    CONTENT_SECURITY_POLICY, CONTENT_TYPE, HeaderName, LOCATION, REFERRER_POLICY,
};
use axum::http::{HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use maud::{DOCTYPE, Markup, html};
use virt_usb_model::{Status, UnavailableReason};

use super::super::error::ApiError;
use super::super::responses::UsbDevice;
use super::session::Signed;

/// Content security policy: only resources of this server.
const POLICY: &str = "default-src 'none'; style-src 'self'; script-src 'self'; connect-src 'self'; \
    img-src 'self' data:; form-action 'self'; base-uri 'none'; frame-ancestors 'none'";

const STYLE: &str = include_str!("style.css");
const SCRIPT: &str = include_str!("live.js");

/// A complete page with status 200.
pub(super) fn page(title: &str, signed: Option<&Signed>, main: &Markup) -> Response {
    answer(StatusCode::OK, title, signed, main)
}

fn answer(status: StatusCode, title: &str, signed: Option<&Signed>, main: &Markup) -> Response {
    let links = [
        ("/portal/", "Devices"),
        ("/portal/servers", "Servers"),
        ("/portal/flavors", "Flavors"),
        ("/portal/events", "Audit"),
    ];
    let whole = html! {
        (DOCTYPE)
        html lang="en" {
            head {
                meta charset="utf-8";
                meta name="viewport" content="width=device-width, initial-scale=1";
                meta name="color-scheme" content="light dark";
                title { (title) " – virt-usb" }
                link rel="stylesheet" href="/portal/style.css";
                link rel="icon" href="data:,";
                @if signed.is_some() { script src="/portal/live.js" defer {} }
            }
            body {
                a.skip href="#main" { "Skip to content" }
                header {
                    a.brand href="/portal/" { "virt-usb" }
                    @if let Some(signed) = signed {
                        nav aria-label="Pages" {
                            @for (to, name) in links {
                                @let current = (name == title).then_some("page");
                                a href=(to) aria-current=[current] { (name) }
                            }
                        }
                        form method="post" action="/portal/sign-out" {
                            (csrf(signed))
                            span.who { (signed.caller.name) ", " (signed.caller.role) }
                            button.plain { "Sign out" }
                        }
                    }
                }
                main id="main" tabindex="-1" {
                    h1 { (title) }
                    (main)
                }
                p.status role="status" id="status" {}
            }
        }
    };
    let mut response = (status, whole.into_string()).into_response();
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/html; charset=utf-8"));
    headers.insert(CONTENT_SECURITY_POLICY, HeaderValue::from_static(POLICY));
    headers.insert(REFERRER_POLICY, HeaderValue::from_static("same-origin"));
    response
}

/// Page that shows an error.
pub(super) fn refusal(fault: &ApiError) -> Response {
    let title = match fault.status.as_u16() {
        401 | 403 => "Not allowed",
        404 => "Not found",
        409 => "Conflict",
        413 | 429 => "Too many requests",
        500.. => "Temporarily unavailable",
        _ => "Invalid request",
    };
    let main = html! {
        p.bad { (fault.message) }
        p { a href="/portal/" { "Back to devices" } }
    };
    answer(fault.status, title, None, &main)
}

/// Redirects to another page.
pub(super) fn see(place: &str) -> Response {
    let place = HeaderValue::from_str(place).unwrap_or(HeaderValue::from_static("/portal/"));
    (StatusCode::SEE_OTHER, [(LOCATION, place)]).into_response()
}

type Asset = ([(HeaderName, &'static str); 1], &'static str);

pub(super) async fn style() -> Asset {
    ([(CONTENT_TYPE, "text/css; charset=utf-8")], STYLE)
}

pub(super) async fn script() -> Asset {
    ([(CONTENT_TYPE, "text/javascript; charset=utf-8")], SCRIPT)
}

pub(super) fn csrf(signed: &Signed) -> Markup {
    html! { input type="hidden" name="csrf" value=(signed.csrf); }
}

/// Display name of a device.
pub(super) fn name(device: &UsbDevice) -> String {
    let kind = || format!("{}:{}", device.vendor_id, device.product_id);
    match (&device.manufacturer, &device.product_name) {
        (Some(maker), Some(product)) if !product.starts_with(maker.as_str()) => {
            format!("{maker} {product}")
        }
        (_, Some(product)) => product.clone(),
        (Some(maker), None) => format!("{maker} {}", kind()),
        (None, None) => kind(),
    }
}

/// Display name and colour of a device's state.
pub(super) fn words(device: &UsbDevice) -> (&'static str, &'static str) {
    use UnavailableReason::{Disabled, Flapping, HostUse, Quarantined, Unreachable, Whitelist};
    match device.state() {
        Some(Status::Available) => ("available", "good"),
        Some(Status::Claimed) => ("claimed", "busy"),
        Some(Status::Allocated) => ("allocated", "busy"),
        Some(Status::Removed) => ("removed", "off"),
        Some(Status::Unavailable(Whitelist)) => ("not whitelisted", "off"),
        Some(Status::Unavailable(HostUse)) => ("used by the host", "off"),
        Some(Status::Unavailable(Disabled)) => ("disabled", "bad"),
        Some(Status::Unavailable(Quarantined)) => ("quarantined", "bad"),
        Some(Status::Unavailable(Flapping)) => ("flapping", "bad"),
        Some(Status::Unavailable(Unreachable)) => ("host unreachable", "bad"),
        None => ("unavailable", "off"),
    }
}

pub(super) fn state(device: &UsbDevice) -> Markup {
    let (words, colour) = words(device);
    html! { span class={ "state " (colour) } { (words) } }
}

/// A time, shortened for display and complete in `datetime`.
pub(super) fn time(at: &str) -> Markup {
    let short = at.get(..19).map_or_else(|| at.to_owned(), |short| short.replace('T', " "));
    html! { time datetime=(at) { (short) } }
}

/// Link to an action. Its accessible name also names the object.
pub(super) fn action_link(to: &str, action: &str, object: &str) -> Markup {
    html! { a href=(to) aria-label={ (action) " " (object) } { (action) } }
}

/// Encodes a value for a query string.
pub(super) fn quoted(text: &str) -> String {
    serde_urlencoded::to_string([("", text)]).unwrap_or_default().trim_start_matches('=').to_owned()
}

/// A table that scrolls if it is wider than the screen.
pub(super) fn table(caption: &str, heads: &[&str], rows: &[Markup]) -> Markup {
    html! {
        div.wide role="region" aria-label=(caption) tabindex="0" {
            table {
                caption { (caption) }
                thead { tr { @for head in heads { th scope="col" { (head) } } } }
                tbody { @for row in rows { tr { (row) } } }
            }
        }
    }
}
