//! API calls for devices: list, show, and the changes of an administrator.

use std::fmt::Display;

use axum::Json;
use axum::extract::OriginalUri;
use axum::http::StatusCode;
use serde::Deserialize;
use utoipa::{IntoParams, ToSchema};
use virt_usb_model::flavor::MAX_TAGS;
use virt_usb_model::{DeviceId, InstanceId, ParseError, ProductId, Status, VendorId, clean_text};
use virt_usb_store::Record;
use virt_usb_store::forget::Forgotten;
use virt_usb_store::quarantine::Wished;

use super::Api;
use super::actions::DeviceAction;
use super::authorize::Authorized;
use super::error::{ApiError, sentence};
use super::identity::Caller;
use super::inventory::Snapshot;
use super::paging::{limit, next, page};
use super::request::{Asked, Content, Named};
use super::request_schemas::DeviceActionRequest;
use super::responses::{UsbDevice, UsbDeviceShown as Shown, UsbDevices};

/// Device in the path of a request.
#[derive(Deserialize)]
pub(super) struct DeviceName {
    pub(super) usb_device_id: String,
}

/// Filter, order and page of the list.
#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct Query {
    status: Option<String>,
    vendor_id: Option<String>,
    product_id: Option<String>,
    serial: Option<String>,
    tag: Option<String>,
    instance_uuid: Option<String>,
    /// Include devices that were unplugged while no instance held them; for administrators.
    deleted: Option<bool>,
    sort_key: Option<SortKey>,
    sort_dir: Option<SortDir>,
    limit: Option<u32>,
    /// Id of the last device of the previous page.
    marker: Option<u64>,
}

#[derive(Clone, Copy, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub(super) enum SortKey {
    Id,
    Status,
    VendorId,
    ProductId,
    PortPath,
    UpdatedAt,
}

#[derive(Clone, Copy, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub(super) enum SortDir {
    Asc,
    Desc,
}

/// Query of the list, and the URI for the link to the next page.
type ListQuery = (Asked<Query>, OriginalUri);

/// Parameter of the list that only administrators may set.
pub(super) const DELETED: &str = "deleted=true";

/// The parameter that determines which role the list requires.
pub(super) fn kind_of_list((Asked(query), _): &ListQuery) -> Result<&str, ApiError> {
    Ok(if query.deleted == Some(true) { DELETED } else { "" })
}

pub(super) fn missing(name: impl Display) -> ApiError {
    ApiError::not_found(format!("USB device {name} could not be found."))
}

/// Devices, filtered, sorted, in pages
#[utoipa::path(get, path = "/os-usb-devices", tag = "devices",
    operation_id = "list_usb_devices", params(Query),
    responses((status = 200, description = "The devices", body = UsbDevices)))]
pub(super) async fn list(
    auth: Authorized,
    (Asked(query), OriginalUri(uri)): ListQuery,
) -> Result<Json<UsbDevices>, ApiError> {
    let (inventory, caller) = (&auth.api.inventory, auth.caller());
    let snapshot = if query.deleted == Some(true) {
        tokio::task::block_in_place(|| inventory.with_deleted())?
    } else {
        inventory.now()?
    };
    let wanted = Wanted::read(&query)?;
    let is_wanted = |record: &&Record| wanted.matches(&snapshot, caller, record);
    let mut found: Vec<&Record> = snapshot.seen(caller).filter(is_wanted).collect();
    if let Some(key) = query.sort_key {
        found.sort_by_cached_key(|r| sort_text(r, key));
    }
    if query.sort_dir == Some(SortDir::Desc) {
        found.reverse();
    }
    let (page, more) =
        page(found, limit(query.limit)?, query.marker.as_ref(), |r| r.entry.id.get())?;
    Ok(Json(UsbDevices {
        usb_devices: page.into_iter().map(|record| snapshot.shown(record, caller)).collect(),
        usb_devices_links: more.iter().map(|marker| next(&uri, &marker.to_string())).collect(),
    }))
}

fn sort_text(record: &Record, key: SortKey) -> String {
    let e = &record.entry;
    match key {
        SortKey::Id => format!("{:020}", e.id.get()),
        SortKey::Status => e.status.clone(),
        SortKey::VendorId => e.vendor_id.to_string(),
        SortKey::ProductId => e.product_id.to_string(),
        SortKey::PortPath => e.port_path.to_string(),
        SortKey::UpdatedAt => record.updated_at.clone().unwrap_or_default(),
    }
}

/// A parsed query, with the same parsers as all other input.
struct Wanted<'a> {
    query: &'a Query,
    vendor: Option<VendorId>,
    product: Option<ProductId>,
    instance: Option<InstanceId>,
}

impl<'a> Wanted<'a> {
    fn read(query: &'a Query) -> Result<Self, ApiError> {
        fn value<T: std::str::FromStr<Err = ParseError>>(
            key: &str,
            text: Option<&String>,
        ) -> Result<Option<T>, ApiError> {
            let wrong = |e: ParseError| ApiError::bad_request(sentence(&e.at(key).to_string()));
            text.map(|text| text.parse().map_err(wrong)).transpose()
        }
        if let Some(status) = &query.status
            && !Status::NAMES.contains(&status.as_str())
        {
            let wrong = ParseError::new(
                format!("{status:?}"),
                format!("one of {}", Status::NAMES.join(", ")),
            );
            return Err(ApiError::bad_request(sentence(&wrong.at("status").to_string())));
        }
        Ok(Self {
            query,
            vendor: value("vendor_id", query.vendor_id.as_ref())?,
            product: value("product_id", query.product_id.as_ref())?,
            instance: value("instance_uuid", query.instance_uuid.as_ref())?,
        })
    }

    /// Whether a device matches. The filter by instance uses only what the caller may see, so that
    /// it reveals nothing else.
    fn matches(&self, snapshot: &Snapshot, caller: &Caller, record: &Record) -> bool {
        let e = &record.entry;
        self.query.status.as_ref().is_none_or(|status| *status == e.status)
            && self.vendor.is_none_or(|vendor| vendor == e.vendor_id)
            && self.product.is_none_or(|product| product == e.product_id)
            && self.query.serial.as_ref().is_none_or(|serial| e.serial.as_ref() == Some(serial))
            && self.query.tag.as_ref().is_none_or(|tag| e.tags.contains(tag))
            && self.instance.is_none_or(|instance| snapshot.shows_holder(caller, record, instance))
    }
}

impl Authorized {
    /// The device with this id.
    ///
    /// # Errors
    /// 404 if there is no such device, or if the caller may not make the call for it.
    pub(super) fn device(&self, name: &str) -> Result<(DeviceId, UsbDevice), ApiError> {
        let (inventory, caller) = (&self.api.inventory, self.caller());
        let id = name.parse::<DeviceId>().map_err(|_| missing(name))?;
        let mut snapshot = inventory.now()?;
        // Administrators can still see a device that was unplugged.
        if snapshot.device(id).is_none() && caller.is_admin() {
            snapshot = tokio::task::block_in_place(|| inventory.with_deleted())?;
        }
        let record = snapshot.device(id).ok_or_else(|| missing(name))?;
        ApiError::unless(snapshot.may(caller, self.call(), record), || missing(name))?;
        Ok((id, snapshot.shown(record, caller)))
    }
}

/// Show a device
#[utoipa::path(get, path = "/os-usb-devices/{usb_device_id}", tag = "devices",
    operation_id = "show_usb_device",
    params(("usb_device_id" = u64, Path, description = "The device's id")),
    responses((status = 200, description = "The device", body = Shown)))]
pub(super) async fn show(
    auth: Authorized,
    Named(DeviceName { usb_device_id: name }): Named<DeviceName>,
) -> Result<Json<Shown>, ApiError> {
    let (_, usb_device) = auth.device(&name)?;
    Ok(Json(Shown { usb_device }))
}

/// Enable, disable, clear quarantine, tag: for administrators
#[utoipa::path(post, path = "/os-usb-devices/{usb_device_id}/action", tag = "devices",
    operation_id = "act_on_usb_device",
    params(("usb_device_id" = u64, Path, description = "The device's id")),
    request_body = DeviceActionRequest,
    responses((status = 200, description = "The device after the change", body = Shown)))]
pub(super) async fn act(
    auth: Authorized,
    (Named(DeviceName { usb_device_id: name }), Content(content)): (Named<DeviceName>, Content),
) -> Result<Json<Shown>, ApiError> {
    auth.device(&name)?;
    let usb_device = change(&auth, name, DeviceAction::read(&content)?).await?;
    Ok(Json(Shown { usb_device }))
}

/// Changes a device, and returns its new state.
pub(super) async fn change(
    auth: &Authorized,
    name: String,
    action: DeviceAction,
) -> Result<UsbDevice, ApiError> {
    let (id, _) = auth.device(&name)?;
    refuse_elsewhere(&auth.api, id)?;
    let (actor, told) = (auth.caller().clone(), name.clone());
    auth.api.blocking(move |api| {
        let mut store = api.store()?;
        let context = api.context(&actor)?;
        let wished = match action {
            DeviceAction::Enable => store.set_disabled(id, None, &context),
            DeviceAction::Disable(why) => {
                let why = why.as_deref().and_then(clean_text);
                let why = why.unwrap_or_else(|| format!("by {}", actor.name));
                store.set_disabled(id, Some(&why), &context)
            }
            DeviceAction::ClearQuarantine => store.clear_quarantine(id, &context),
            DeviceAction::AddTags(tags) => store.set_tags(id, &tags, &[], &context),
            DeviceAction::RemoveTags(tags) => {
                let snapshot = api.inventory.now()?;
                let of_rule = snapshot.device(id).and_then(|r| r.tag_of_a_rule(&tags));
                if let Some(tag) = of_rule {
                    return Err(ApiError::conflict(format!(
                        "The tag {tag:?} comes from a whitelist rule: change that rule to remove \
                         it."
                    )));
                }
                store.set_tags(id, &[], &tags, &context)
            }
        };
        match wished? {
            Wished::Unknown => Err(missing(&told)),
            Wished::TooManyTags => Err(ApiError::conflict(format!(
                "USB device {id} would have more than {MAX_TAGS} tags."
            ))),
            Wished::Done(_) | Wished::Already(_) => Ok(()),
        }
    })
    .await?;
    Ok(auth.device(&name)?.1)
}

/// Forget a device that is not plugged in: for administrators
///
/// If the device is plugged in again, it gets a new id.
#[utoipa::path(delete, path = "/os-usb-devices/{usb_device_id}", tag = "devices",
    operation_id = "forget_usb_device",
    params(("usb_device_id" = u64, Path, description = "The device's id")),
    responses((status = 204, description = "The device was forgotten")))]
pub(super) async fn forget(
    auth: Authorized,
    Named(DeviceName { usb_device_id: name }): Named<DeviceName>,
) -> Result<StatusCode, ApiError> {
    let (id, _) = auth.device(&name)?;
    refuse_elsewhere(&auth.api, id)?;
    let caller = auth.caller().clone();
    let forgotten =
        auth.api.blocking(move |api| Ok(api.store()?.forget(id, &api.context(&caller)?)?)).await?;
    match forgotten {
        Forgotten::Done(_) => Ok(StatusCode::NO_CONTENT),
        Forgotten::Unknown => Err(missing(&name)),
        Forgotten::Here(record) => {
            let why = if record.present { "plugged in" } else { "in use" };
            Err(ApiError::conflict(format!(
                "USB device {id} is {why}: only an unplugged device that no instance holds can be \
                 forgotten."
            )))
        }
        Forgotten::Named(_, what) => Err(ApiError::conflict(format!(
            "USB device {id} is named by its id in {what}: change that first."
        ))),
    }
}

/// Rejects a change of a device of another host, whose own API changes it.
fn refuse_elsewhere(api: &Api, id: DeviceId) -> Result<(), ApiError> {
    match api.inventory.now()?.elsewhere(id) {
        Some(other) => Err(ApiError::conflict(format!(
            "USB device {id} is on host {}: use that host's API.",
            other.name
        ))),
        None => Ok(()),
    }
}
