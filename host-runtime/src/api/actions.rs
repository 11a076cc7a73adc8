//! Actions on devices and servers: the bodies of requests, for the API and for its client.

use serde::{Serialize, Serializer};
use serde_json::{Map, Value, json};
use virt_usb_model::flavor::Tag;
use virt_usb_model::{DeviceRequest, Flavor, ParseError, ProjectId};

use super::error::{ApiError, sentence};
use super::request::{action, null, object};

/// Maximum length of the reason of a disabled device, in characters.
const MAX_REASON_CHARACTERS: usize = 255;

/// A change of a device by an administrator.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum DeviceAction {
    /// Make a disabled device available.
    Enable,
    /// Make the device unavailable, for this reason.
    Disable(Option<String>),
    /// End the quarantine of the device.
    ClearQuarantine,
    /// Add tags to the device.
    AddTags(Vec<String>),
    /// Remove tags from the device.
    RemoveTags(Vec<String>),
}

impl DeviceAction {
    /// Reads the body of a request.
    pub(super) fn read(content: &Map<String, Value>) -> Result<Self, ApiError> {
        let (name, value) = action(content)?;
        let without_parameters = |change| null(name, value).map(|()| change);
        match name {
            "enable" => without_parameters(Self::Enable),
            "clear_quarantine" => without_parameters(Self::ClearQuarantine),
            "disable" => match object(value, name, &["reason"])?.get("reason") {
                None | Some(Value::Null) => Ok(Self::Disable(None)),
                Some(Value::String(why)) if why.chars().count() <= MAX_REASON_CHARACTERS => {
                    Ok(Self::Disable(Some(why.clone())))
                }
                Some(_) => Err(ApiError::bad_request(format!(
                    "disable.reason: wanted text of at most {MAX_REASON_CHARACTERS} characters."
                ))),
            },
            "add_tags" => tags(name, value).map(Self::AddTags),
            "remove_tags" => tags(name, value).map(Self::RemoveTags),
            other => Err(unknown(other)),
        }
    }
}

fn unknown(action: &str) -> ApiError {
    ApiError::bad_request(format!("Unknown action: {action}."))
}

fn tags(name: &str, value: &Value) -> Result<Vec<String>, ApiError> {
    let Some(Value::Array(tags)) = object(value, name, &["tags"])?.get("tags") else {
        return Err(ApiError::bad_request(format!("{name} wants a list: {{\"tags\":[\"erp\"]}}.")));
    };
    let tag = |value: &Value| {
        let tag: Result<Tag, _> = value.as_str().unwrap_or_default().parse();
        tag.map(Tag::into_text)
            .map_err(|e| ApiError::bad_request(sentence(&e.at("tags").to_string())))
    };
    tags.iter().map(tag).collect()
}

impl Serialize for DeviceAction {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let body = match self {
            Self::Enable => json!({ "enable": null }),
            Self::Disable(reason) => json!({ "disable": { "reason": reason } }),
            Self::ClearQuarantine => json!({ "clear_quarantine": null }),
            Self::AddTags(tags) => json!({ "add_tags": { "tags": tags } }),
            Self::RemoveTags(tags) => json!({ "remove_tags": { "tags": tags } }),
        };
        body.serialize(serializer)
    }
}

/// A change of a server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum ServerAction {
    /// Attach devices that match these requests.
    Attach(Vec<DeviceRequest>),
    /// Detach the devices that match these requests.
    Detach(Vec<DeviceRequest>),
    /// Set the owner project.
    SetOwner(ProjectId),
    /// Remove the owner project that was set.
    ClearOwner,
}

/// Key of the requests in an action.
pub(super) const REQUESTS: &str = "usb_devices_requests";

impl ServerAction {
    /// Reads the action of this name.
    pub(super) fn read(name: &str, value: &Value) -> Result<Self, ApiError> {
        match name {
            "attach_usb_devices" => requests(name, value).map(Self::Attach),
            "detach_usb_devices" => requests(name, value).map(Self::Detach),
            "set_usb_owner" => project(name, value).map(Self::SetOwner),
            "clear_usb_owner" => null(name, value).map(|()| Self::ClearOwner),
            other => Err(unknown(other)),
        }
    }
}

/// Reads the requests of an action.
pub(super) fn requests(name: &str, value: &Value) -> Result<Vec<DeviceRequest>, ApiError> {
    let object = object(value, name, &[REQUESTS])?;
    let Some(Value::Array(list)) = object.get(REQUESTS) else {
        return Err(ApiError::bad_request(format!(
            "{name} wants a list: {{\"{REQUESTS}\":[{{\"id\":1}}]}}."
        )));
    };
    if list.is_empty() {
        return Err(ApiError::bad_request(format!("{REQUESTS} is empty.")));
    }
    let text = Value::Array(list.clone()).to_string();
    let flavor = Flavor::parse_lists(Some(&text), None).map_err(|e| {
        ApiError::bad_request(sentence(&e.to_string().replacen("usb_devices", REQUESTS, 1)))
    })?;
    Ok(flavor.usb_devices)
}

fn project(name: &str, value: &Value) -> Result<ProjectId, ApiError> {
    let Some(Value::String(project)) = object(value, name, &["project_id"])?.get("project_id")
    else {
        return Err(ApiError::bad_request(format!(
            "{name} wants a project: {{\"project_id\":\"...\"}}."
        )));
    };
    project
        .parse()
        .map_err(|e: ParseError| ApiError::bad_request(sentence(&e.at("project_id").to_string())))
}

impl Serialize for ServerAction {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let body = match self {
            Self::Attach(requests) => json!({ "attach_usb_devices": { REQUESTS: requests } }),
            Self::Detach(requests) => json!({ "detach_usb_devices": { REQUESTS: requests } }),
            Self::SetOwner(project) => json!({ "set_usb_owner": { "project_id": project } }),
            Self::ClearOwner => json!({ "clear_usb_owner": null }),
        };
        body.serialize(serializer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(action: &impl Serialize) -> Map<String, Value> {
        match serde_json::to_value(action).unwrap() {
            Value::Object(body) => body,
            other => panic!("{other} is no body"),
        }
    }

    #[test]
    fn the_api_reads_what_its_client_writes() {
        let tags = vec!["erp".to_owned(), "blue".to_owned()];
        for action in [
            DeviceAction::Enable,
            DeviceAction::Disable(None),
            DeviceAction::Disable(Some("lent".into())),
            DeviceAction::ClearQuarantine,
            DeviceAction::AddTags(tags.clone()),
            DeviceAction::RemoveTags(tags),
        ] {
            assert_eq!(DeviceAction::read(&written(&action)), Ok(action));
        }
        let requests = Flavor::parse_lists(Some(r#"[{"id":5},{"vendor_id":"0529"}]"#), None);
        let requests = requests.unwrap().usb_devices;
        for action in [
            ServerAction::Attach(requests.clone()),
            ServerAction::Detach(requests),
            ServerAction::SetOwner("p1".parse().unwrap()),
            ServerAction::ClearOwner,
        ] {
            let body = written(&action);
            let (name, value) = super::action(&body).unwrap();
            assert_eq!(ServerAction::read(name, value), Ok(action));
        }
    }
}
