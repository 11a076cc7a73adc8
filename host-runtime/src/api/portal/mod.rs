//! The portal: web pages for the functions of the API. No page needs a script; one script keeps
//! open pages up to date.
//!
//! ```text
//!  browser ─► session (cookie, token, secret of the form) ─► role check ─► page or action
//!     ▲                                                                        │
//!     └── live (server-sent events) ◄── inventory        the functions of the API's handlers
//! ```
//! | module | what it does |
//! |---|---|
//! | `session` | signed-in users; verifies that a form comes from this portal |
//! | `pages` | layout, names of states |
//! | `sign_in`, `devices`, `servers`, `flavors`, `audit` | the pages |
//! | `actions` | attaches and detaches a device |
//! | `live` | notifies open pages of changes |
//!
//! The portal has no policy of its own. [`routes`] registers each page with a call, whose role the
//! user must have. A page shows and does what the API allows for the same token.

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
use axum::extract::{FromRequest, Request};
use axum::middleware::{Next, from_fn};
use axum::response::Response;
use axum::routing::{MethodFilter, MethodRouter, get, post};

use super::Api;
use super::authorize::{Handler, Policy, guard};
use super::error::ApiError;
use super::policy::Call;
use super::policy::Call::{Attach, ChangeDevice, ChangeFlavor, ChangeOwner, Detach, Look, LookAt};
use session::Signed;

/// State of the portal, in memory only.
#[derive(Default)]
pub(super) struct Portal {
    sessions: session::Sessions,
    actions: actions::ActionLog,
    watchers: live::Watchers,
}

/// Routes of the portal. A page that needs a caller is registered with its call.
pub(super) fn routes() -> Router<Arc<Api>> {
    let pages = Router::new()
        .route("/portal/", page(LookAt, devices::list))
        .route("/portal/devices/{usb_device_id}", page(LookAt, devices::show))
        .route("/portal/devices/{usb_device_id}/change", form(ChangeDevice, devices::change))
        .route("/portal/servers", page(LookAt, servers::list))
        .route("/portal/servers/{server_id}", page(LookAt, servers::show))
        .route("/portal/servers/{server_id}/owner", form(ChangeOwner, servers::own))
        .route("/portal/attach", page(Attach, actions::attach_page))
        .route("/portal/attach", form(Attach, actions::begin))
        .route("/portal/detach", page(Detach, actions::detach_page))
        .route("/portal/detach", form(Detach, actions::begin))
        .route("/portal/actions/{id}", page(LookAt, actions::show))
        .route("/portal/flavors", page(Look, flavors::list))
        .route("/portal/flavors", form(ChangeFlavor, flavors::store))
        .route("/portal/flavors/new", page(ChangeFlavor, flavors::form))
        .route("/portal/flavors/remove", page(ChangeFlavor, flavors::removal))
        .route("/portal/flavors/remove", form(ChangeFlavor, flavors::remove))
        .route("/portal/events", page(LookAt, audit::list))
        .route("/portal/live", page(LookAt, live::live))
        // Pages without a role check.
        .route("/portal/sign-in", get(sign_in::show).post(sign_in::sign_in))
        .route("/portal/sign-out", post(sign_in::sign_out))
        .method_not_allowed_fallback(super::request::no_method)
        .layer(from_fn(for_people));
    Router::new()
        .route("/", get(|| async { pages::see("/portal/") }))
        .route("/portal", get(|| async { pages::see("/portal/") }))
        .route("/portal/style.css", get(pages::style))
        .route("/portal/live.js", get(pages::script))
        .merge(pages)
}

/// Serves a page to signed-in users who have the role for the call.
fn page<I, M>(call: Call, handler: impl Handler<I>) -> MethodRouter<Arc<Api>>
where
    I: FromRequest<Arc<Api>, M> + Send + 'static,
{
    guard::<Signed, I, M>(MethodFilter::GET, Policy::Always(call), handler)
}

/// Handles a form of signed-in users who have the role for the call.
fn form<I, M>(call: Call, handler: impl Handler<I>) -> MethodRouter<Arc<Api>>
where
    I: FromRequest<Arc<Api>, M> + Send + 'static,
{
    guard::<Signed, I, M>(MethodFilter::POST, Policy::Always(call), handler)
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
