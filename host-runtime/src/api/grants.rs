//! API calls for grants, which make devices available to certain projects. For administrators.

use axum::Json;
use axum::http::StatusCode;
use serde::Deserialize;
use serde_json::Value;
use virt_usb_model::Grant;
use virt_usb_model::flavor::{MAX_NAME, is_name};

use super::authorize::Authorized;
use super::error::{ApiError, sentence};
use super::request::{Content, Named};
use super::request_schemas::GrantRequest;
use super::responses::{UsbGrant, UsbGrantShown as Shown, UsbGrants as Grants};
use virt_usb_fleet::replicated::change;

/// Grant in the path of a request.
#[derive(Deserialize)]
pub(super) struct GrantName {
    grant_name: String,
}

fn missing(name: &str) -> ApiError {
    ApiError::not_found(format!("USB grant {name} could not be found."))
}

/// Stored grants: for administrators
#[utoipa::path(get, path = "/os-usb-grants", tag = "grants",
    operation_id = "list_usb_grants",
    responses((status = 200, description = "The grants", body = Grants)))]
pub(super) async fn list(auth: Authorized, (): ()) -> Result<Json<Grants>, ApiError> {
    let stored = auth.api.blocking(|api| Ok(api.store()?.grants()?)).await?;
    Ok(Json(Grants { usb_grants: stored.into_iter().map(UsbGrant::from).collect() }))
}

/// One grant: for administrators
#[utoipa::path(get, path = "/os-usb-grants/{grant_name}", tag = "grants",
    operation_id = "show_usb_grant",
    params(("grant_name" = String, Path, description = "The grant's name")),
    responses((status = 200, description = "The grant", body = Shown)))]
pub(super) async fn show(
    auth: Authorized,
    Named(GrantName { grant_name: name }): Named<GrantName>,
) -> Result<Json<Shown>, ApiError> {
    let found = auth
        .api
        .blocking(move |api| api.store()?.grant(&name)?.ok_or_else(|| missing(&name)))
        .await?;
    Ok(Json(Shown { usb_grant: found.into() }))
}

/// Store a grant: for administrators
#[utoipa::path(put, path = "/os-usb-grants/{grant_name}", tag = "grants",
    operation_id = "set_usb_grant",
    params(("grant_name" = String, Path, description = "The grant's name")),
    request_body = GrantRequest,
    responses((status = 200, description = "The stored grant", body = Shown)))]
pub(super) async fn set(
    auth: Authorized,
    (Named(GrantName { grant_name: name }), Content(content)): (Named<GrantName>, Content),
) -> Result<Json<Shown>, ApiError> {
    if !is_name(&name) {
        return Err(ApiError::bad_request(format!(
            "{name:?} is not a valid name for a grant: wanted 1 to {MAX_NAME} printable \
             characters, not beginning with @."
        )));
    }
    let grant = Grant::parse(&Value::Object(content).to_string())
        .map_err(|e| ApiError::bad_request(sentence(&e.to_string())))?;
    let caller = auth.caller().clone();
    let stored = auth.api.blocking(move |api| {
        let mut store = api.store()?;
        change(&(api.config)(), &mut store, &name, Some(&grant), &api.context(&caller)?)?;
        store.grant(&name)?.ok_or_else(|| missing(&name))
    });
    Ok(Json(Shown { usb_grant: stored.await?.into() }))
}

/// Remove a grant: for administrators
#[utoipa::path(delete, path = "/os-usb-grants/{grant_name}", tag = "grants",
    operation_id = "remove_usb_grant",
    params(("grant_name" = String, Path, description = "The grant's name")),
    responses((status = 204, description = "The grant was removed")))]
pub(super) async fn remove(
    auth: Authorized,
    Named(GrantName { grant_name: name }): Named<GrantName>,
) -> Result<StatusCode, ApiError> {
    let caller = auth.caller().clone();
    let removed = auth.api.blocking(move |api| {
        let context = api.context(&caller)?;
        let removed = change::<Grant>(&(api.config)(), &mut api.store()?, &name, None, &context)?;
        if removed { Ok(StatusCode::NO_CONTENT) } else { Err(missing(&name)) }
    });
    removed.await
}
