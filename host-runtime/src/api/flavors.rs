//! Stored flavors.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use utoipa::ToSchema;
use virt_usb_model::Flavor;
use virt_usb_model::flavor::{MAX_NAME, is_name};

use super::Api;
use super::documents::UsbFlavor;
use super::fault::{Fault, sentence};
use super::openapi::FlavorRequest;
use super::policy::{Call, may};
use super::request::{Asks, Content, Named};

/// A path's flavor.
#[derive(Deserialize)]
pub(super) struct FlavorName {
    flavor_name: String,
}

#[derive(Serialize, ToSchema)]
#[schema(as = UsbFlavors)]
pub(super) struct Flavors {
    usb_flavors: Vec<UsbFlavor>,
}

#[derive(Serialize, ToSchema)]
#[schema(as = UsbFlavorShown)]
pub(super) struct Shown {
    usb_flavor: UsbFlavor,
}

fn missing(name: &str) -> Fault {
    Fault::not_found(format!("USB flavor {name} could not be found."))
}

/// Stored flavors
#[utoipa::path(get, path = "/os-usb-flavors", tag = "flavors", operation_id = "list_usb_flavors",
    responses((status = 200, description = "The flavors", body = Flavors)))]
pub(super) async fn list(State(api): State<Arc<Api>>, Asks(caller): Asks) -> Result<Json<Flavors>, Fault> {
    Fault::unless(may(&caller, Call::Look), Fault::forbidden)?;
    let usb_flavors = api.blocking(|api| Ok(api.store()?.flavors()?)).await?;
    Ok(Json(Flavors { usb_flavors: usb_flavors.into_iter().map(UsbFlavor::from).collect() }))
}

/// One flavor
#[utoipa::path(get, path = "/os-usb-flavors/{flavor_name}", tag = "flavors", operation_id = "show_usb_flavor",
    params(("flavor_name" = String, Path, description = "The flavor's name")),
    responses((status = 200, description = "The flavor", body = Shown)))]
pub(super) async fn show(
    State(api): State<Arc<Api>>,
    Asks(caller): Asks,
    Named(FlavorName { flavor_name: name }): Named<FlavorName>,
) -> Result<Json<Shown>, Fault> {
    Fault::unless(may(&caller, Call::Look), Fault::forbidden)?;
    let (wanted, told) = (name.clone(), name);
    let found = api.blocking(move |api| Ok(api.store()?.flavor(&wanted)?)).await?;
    let stored = found.ok_or_else(|| missing(&told))?;
    Ok(Json(Shown { usb_flavor: stored.into() }))
}

/// Store a flavor: for administrators
#[utoipa::path(put, path = "/os-usb-flavors/{flavor_name}", tag = "flavors", operation_id = "set_usb_flavor",
    params(("flavor_name" = String, Path, description = "The flavor's name")), request_body = FlavorRequest,
    responses((status = 200, description = "The flavor as it is now", body = Shown)))]
pub(super) async fn set(
    State(api): State<Arc<Api>>,
    Asks(caller): Asks,
    Named(FlavorName { flavor_name: name }): Named<FlavorName>,
    Content(content): Content,
) -> Result<Json<Shown>, Fault> {
    Fault::unless(may(&caller, Call::ChangeFlavor), Fault::forbidden)?;
    if !is_name(&name) {
        return Err(Fault::bad_request(format!(
            "{name:?} is no name for a flavor: 1 to {MAX_NAME} printable characters, the first no @."
        )));
    }
    let text = Value::Object(content).to_string();
    let flavor = Flavor::parse(&text).map_err(|e| Fault::bad_request(sentence(&e.to_string())))?;
    if flavor.is_empty() {
        return Err(Fault::bad_request("The flavor asks for nothing."));
    }
    let usb_flavor = api.blocking(move |api| {
        let mut store = api.store()?;
        store.set_flavor(&name, &flavor, &api.context(&caller)?)?;
        store.flavor(&name)?.ok_or_else(|| missing(&name))
    });
    Ok(Json(Shown { usb_flavor: usb_flavor.await?.into() }))
}

/// Remove a flavor: for administrators
#[utoipa::path(delete, path = "/os-usb-flavors/{flavor_name}", tag = "flavors", operation_id = "remove_usb_flavor",
    params(("flavor_name" = String, Path, description = "The flavor's name")),
    responses((status = 204, description = "It is gone")))]
pub(super) async fn remove(
    State(api): State<Arc<Api>>,
    Asks(caller): Asks,
    Named(FlavorName { flavor_name: name }): Named<FlavorName>,
) -> Result<StatusCode, Fault> {
    Fault::unless(may(&caller, Call::ChangeFlavor), Fault::forbidden)?;
    let removed = api.blocking(move |api| {
        let removed = api.store()?.remove_flavor(&name, &api.context(&caller)?)?;
        if removed { Ok(()) } else { Err(missing(&name)) }
    });
    removed.await.map(|()| StatusCode::NO_CONTENT)
}
