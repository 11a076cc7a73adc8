//! API calls for stored flavors.

use axum::Json;
use axum::http::StatusCode;
use serde::Deserialize;
use serde_json::Value;
use virt_usb_model::Flavor;
use virt_usb_model::flavor::{MAX_NAME, is_name};
use virt_usb_store::StoredFlavor;

use super::authorize::Authorized;
use super::error::{ApiError, sentence};
use super::request::{Content, Named};
use super::request_schemas::FlavorRequest;
use super::responses::{UsbFlavor, UsbFlavorShown as Shown, UsbFlavors as Flavors};
use virt_usb_fleet::replicated::change;

/// Flavor in the path of a request.
#[derive(Deserialize)]
pub(super) struct FlavorName {
    flavor_name: String,
}

fn missing(name: &str) -> ApiError {
    ApiError::not_found(format!("USB flavor {name} could not be found."))
}

/// List the stored flavors
#[utoipa::path(get, path = "/os-usb-flavors", tag = "flavors", operation_id = "list_usb_flavors",
    responses((status = 200, description = "The flavors", body = Flavors)))]
pub(super) async fn list(auth: Authorized, (): ()) -> Result<Json<Flavors>, ApiError> {
    let usb_flavors = all(&auth).await?;
    Ok(Json(Flavors { usb_flavors: usb_flavors.into_iter().map(UsbFlavor::from).collect() }))
}

/// All stored flavors.
pub(super) async fn all(auth: &Authorized) -> Result<Vec<StoredFlavor>, ApiError> {
    auth.api.blocking(|api| Ok(api.store()?.flavors()?)).await
}

/// Show a flavor
#[utoipa::path(get, path = "/os-usb-flavors/{flavor_name}", tag = "flavors",
    operation_id = "show_usb_flavor",
    params(("flavor_name" = String, Path, description = "The flavor's name")),
    responses((status = 200, description = "The flavor", body = Shown)))]
pub(super) async fn show(
    auth: Authorized,
    Named(FlavorName { flavor_name: name }): Named<FlavorName>,
) -> Result<Json<Shown>, ApiError> {
    let (wanted, told) = (name.clone(), name);
    let found = auth.api.blocking(move |api| Ok(api.store()?.flavor(&wanted)?)).await?;
    let stored = found.ok_or_else(|| missing(&told))?;
    Ok(Json(Shown { usb_flavor: stored.into() }))
}

/// Store a flavor: for administrators
#[utoipa::path(put, path = "/os-usb-flavors/{flavor_name}", tag = "flavors",
    operation_id = "set_usb_flavor",
    params(("flavor_name" = String, Path, description = "The flavor's name")),
    request_body = FlavorRequest,
    responses((status = 200, description = "The stored flavor", body = Shown)))]
pub(super) async fn set(
    auth: Authorized,
    (Named(FlavorName { flavor_name: name }), Content(content)): (Named<FlavorName>, Content),
) -> Result<Json<Shown>, ApiError> {
    let text = Value::Object(content).to_string();
    Ok(Json(Shown { usb_flavor: store(&auth, name, &text).await?.into() }))
}

/// Stores a flavor of this JSON.
pub(super) async fn store(
    auth: &Authorized,
    name: String,
    text: &str,
) -> Result<StoredFlavor, ApiError> {
    if !is_name(&name) {
        return Err(ApiError::bad_request(format!(
            "{name:?} is not a valid name for a flavor: wanted 1 to {MAX_NAME} printable \
             characters, not beginning with @."
        )));
    }
    let flavor =
        Flavor::parse(text).map_err(|e| ApiError::bad_request(sentence(&e.to_string())))?;
    if flavor.is_empty() {
        return Err(ApiError::bad_request("The flavor requests nothing."));
    }
    let caller = auth.caller().clone();
    let stored = auth.api.blocking(move |api| {
        let mut store = api.store()?;
        change(&(api.config)(), &mut store, &name, Some(&flavor), &api.context(&caller)?)?;
        store.flavor(&name)?.ok_or_else(|| missing(&name))
    });
    stored.await
}

/// Remove a flavor: for administrators
#[utoipa::path(delete, path = "/os-usb-flavors/{flavor_name}", tag = "flavors",
    operation_id = "remove_usb_flavor",
    params(("flavor_name" = String, Path, description = "The flavor's name")),
    responses((status = 204, description = "The flavor was removed")))]
pub(super) async fn remove(
    auth: Authorized,
    Named(FlavorName { flavor_name: name }): Named<FlavorName>,
) -> Result<StatusCode, ApiError> {
    end(&auth, name).await.map(|()| StatusCode::NO_CONTENT)
}

/// Removes a flavor.
pub(super) async fn end(auth: &Authorized, name: String) -> Result<(), ApiError> {
    let caller = auth.caller().clone();
    let removed = auth.api.blocking(move |api| {
        let context = api.context(&caller)?;
        let removed = change::<Flavor>(&(api.config)(), &mut api.store()?, &name, None, &context)?;
        if removed { Ok(()) } else { Err(missing(&name)) }
    });
    removed.await
}
