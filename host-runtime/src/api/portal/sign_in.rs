//! Portal pages to sign in with a token, and to sign out.

use std::sync::Arc;

use axum::Extension;
use axum::body::Body;
use axum::extract::State;
use axum::http::header::{HeaderValue, SET_COOKIE};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use maud::{Markup, html};
use serde::Deserialize;

use super::super::Api;
use super::super::error::{ApiError, sentence};
use super::super::identity::Freshness;
use super::super::request::form;
use super::pages::{page, see};
use super::session::{Sent, Signed, is_from_here};
use virt_usb_fleet::http_server::Peer;

/// Form for the token. `wrong` is set after an invalid token.
fn token_form(api: &Api, wrong: bool) -> Markup {
    let keystone = (api.config)().keystone.is_some();
    html! {
        @if wrong { p.bad role="alert" { "Invalid or expired token. The host's administrator \
            creates tokens with 'virt-usb token add'." } }
        form.stack method="post" action="/portal/sign-in" {
            label for="token" { "Token" }
            input id="token" name="token" type="password" autocomplete="current-password"
                required autofocus spellcheck="false" aria-invalid=[wrong.then_some("true")];
            button { "Sign in" }
        }
        p.note {
            @if keystone { "Use an OpenStack token ('openstack token issue'), or a token that \
                begins with vusb_. " } @else { "A token begins with vusb_. " }
            "The token determines your project and your role."
        }
    }
}

pub(super) async fn show(State(api): State<Arc<Api>>, signed: Option<Signed>) -> Response {
    match signed {
        Some(_) => see("/portal/"),
        None => page("Sign in", None, &token_form(&api, false)),
    }
}

#[derive(Deserialize)]
struct Given {
    token: String,
}

pub(super) async fn sign_in(
    State(api): State<Arc<Api>>,
    peer: Option<Extension<Peer>>,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, ApiError> {
    // Otherwise another site could sign its visitors in with a token of its choice.
    is_from_here(&headers)?;
    let text = form(&headers, body).await?;
    let Given { token } = serde_urlencoded::from_str(&text)
        .map_err(|e| ApiError::bad_request(sentence(&format!("The form is invalid: {e}"))))?;
    match api.caller(token.trim(), peer.map(|Extension(peer)| peer), Freshness::Live).await {
        Ok(caller) => {
            let encrypted = (api.config)().api_tls.is_some();
            let cookie =
                api.portal.sessions.begin(token.trim().to_owned(), &caller.name, encrypted)?;
            Ok(with_cookie(see("/portal/"), &cookie))
        }
        Err(fault) if fault.status == StatusCode::UNAUTHORIZED => {
            let mut page = page("Sign in", None, &token_form(&api, true));
            *page.status_mut() = StatusCode::FORBIDDEN;
            Ok(page)
        }
        Err(fault) => Err(fault),
    }
}

#[derive(Deserialize)]
pub(super) struct Nothing {}

pub(super) async fn sign_out(
    State(api): State<Arc<Api>>,
    Sent(signed, Nothing {}): Sent<Nothing>,
) -> Response {
    with_cookie(see("/portal/sign-in"), &api.portal.sessions.end(&signed.id))
}

fn with_cookie(response: Response, cookie: &str) -> Response {
    let value = HeaderValue::from_str(cookie).ok();
    (value.map(|value| [(SET_COOKIE, value)]), response).into_response()
}
