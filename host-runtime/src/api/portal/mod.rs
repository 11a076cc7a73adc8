//! The portal: web pages for the functions of the API. No page needs a script; one script keeps
//! open pages up to date.
//!
//! ```text
//!  browser ─► session (cookie, token looked up, form's secret) ─► a page's handler ─► the same functions as the API's calls
//!     ▲                                                             │
//!     └────── live (server-sent events) ◄── inventory               └─► hand: attach, detach, with their progress
//! ```
//! | module | what it does |
//! |---|---|
//! | `session` | signed-in users; verifies that a form comes from this portal |
//! | `pages` | layout, names of states |
//! | `sign_in`, `devices`, `servers`, `flavors`, `audit` | the pages |
//! | `actions` | attaches and detaches a device |
//! | `live` | notifies open pages of changes |
//!
//! The portal has no policy of its own. It shows and does what the API allows for the same token.

mod actions;
mod audit;
mod devices;
mod flavors;
mod live;
mod pages;
mod servers;
mod session;
mod sign_in;

use std::sync::Arc;

use axum::Router;
use axum::extract::Request;
use axum::middleware::{Next, from_fn};
use axum::response::Response;
use axum::routing::{get, post};

use super::Api;
use super::error::ApiError;

/// State of the portal, in memory only.
#[derive(Default)]
pub(super) struct Portal {
    sessions: session::Sessions,
    hands: actions::ActionLog,
    watchers: live::Watchers,
}

pub(super) fn routes() -> Router<Arc<Api>> {
    let pages = Router::new()
        .route("/portal/", get(devices::list))
        .route("/portal/sign-in", get(sign_in::show).post(sign_in::sign_in))
        .route("/portal/sign-out", post(sign_in::sign_out))
        .route("/portal/devices/{usb_device_id}", get(devices::show))
        .route("/portal/devices/{usb_device_id}/change", post(devices::change))
        .route("/portal/servers", get(servers::list))
        .route("/portal/servers/{server_id}", get(servers::show))
        .route("/portal/servers/{server_id}/owner", post(servers::own))
        .route("/portal/attach", get(actions::attach_page).post(actions::attach))
        .route("/portal/detach", get(actions::detach_page).post(actions::detach))
        .route("/portal/actions/{id}", get(actions::show))
        .route("/portal/flavors", get(flavors::list).post(flavors::store))
        .route("/portal/flavors/new", get(flavors::form))
        .route("/portal/flavors/remove", get(flavors::removal).post(flavors::remove))
        .route("/portal/events", get(audit::list))
        .route("/portal/live", get(live::live))
        .method_not_allowed_fallback(super::request::no_method)
        .layer(from_fn(for_people));
    Router::new()
        .route("/", get(|| async { pages::see("/portal/") }))
        .route("/portal", get(|| async { pages::see("/portal/") }))
        .route("/portal/style.css", get(pages::style))
        .route("/portal/live.js", get(pages::script))
        .merge(pages)
}

/// Turns an error response into a page.
async fn for_people(request: Request, next: Next) -> Response {
    let response = next.run(request).await;
    match response.extensions().get::<ApiError>() {
        Some(fault) => {
            let mut page = pages::refusal(fault);
            page.extensions_mut().insert(fault.clone());
            page
        }
        None => response,
    }
}
