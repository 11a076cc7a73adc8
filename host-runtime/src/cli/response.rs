//! Reading responses of the API: errors that say what an operator can do.

use serde::de::DeserializeOwned;
use serde_path_to_error::Segment;
use ureq::http::StatusCode;
use virt_usb_model::ParseError;

use crate::api::responses::Fault;

/// The API refuses the request.
#[derive(Debug, thiserror::Error)]
#[error(
    "the API responded with {}: {message}{}",
    status.as_u16(),
    id.as_ref().map(|id| format!(" ({id})")).unwrap_or_default()
)]
pub(super) struct Refused {
    pub(super) status: StatusCode,
    message: String,
    /// Request id, which the log of the API's host shows too; `None` if the message says all.
    id: Option<String>,
}

impl Refused {
    /// Reads the body of an error response.
    pub(super) fn new(status: StatusCode, text: &str, id: Option<String>) -> Self {
        let fault: Option<Fault> = serde_json::from_str(text).ok();
        let reason = fault.and_then(|fault| fault.into_values().next());
        let message = reason.map_or_else(
            || status.canonical_reason().unwrap_or("no reason given").to_owned(),
            |reason| reason.message,
        );
        Self { status, message, id: id.filter(|_| status.is_server_error()) }
    }
}

/// A response of another program, or of another version of virt-usb.
#[derive(Debug, thiserror::Error)]
#[error(
    "the API's response cannot be read: {0}; does another version of virt-usb run on that host?"
)]
pub(super) struct Unreadable(String);

impl From<ParseError> for Unreadable {
    fn from(e: ParseError) -> Self {
        Self(e.to_string())
    }
}

/// Reads a response that is JSON.
///
/// # Errors
/// Names the key that is missing or has another type.
pub(super) fn read<T: DeserializeOwned>(text: &str) -> Result<T, Unreadable> {
    let mut json = serde_json::Deserializer::from_str(text);
    serde_path_to_error::deserialize(&mut json).map_err(|e| Unreadable(described(&e)))
}

/// The error without serde's words.
fn described(e: &serde_path_to_error::Error<serde_json::Error>) -> String {
    let is_root = e.path().iter().all(|segment| matches!(segment, Segment::Unknown));
    let place = if is_root { None } else { Some(e.path().to_string()) };
    let error = e.inner().to_string();
    let error = error.split(" at line ").next().unwrap_or_default();
    if let Some(key) = error.strip_prefix("missing field `") {
        let place = place.as_deref().unwrap_or("it");
        return format!("{place} has no \"{}\"", key.trim_end_matches('`'));
    }
    let wrong = ["invalid type: ", "invalid value: "];
    let wrong = wrong.iter().find_map(|start| error.strip_prefix(start));
    let what = match wrong.and_then(|error| error.split_once(", expected ")) {
        Some((found, wanted)) => format!("found {}, wanted {}", kind(found), kind(wanted)),
        None => error.to_owned(),
    };
    place.map_or_else(|| what.clone(), |place| format!("{place}: {what}"))
}

/// Names a type as JSON has it.
fn kind(name: &str) -> &str {
    match name {
        "u64" | "i64" | "u32" | "u16" | "usize" => "a number",
        "sequence" | "a sequence" => "a list",
        "map" | "a map" => "an object",
        name if name.starts_with("struct ") => "an object",
        name => name,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::responses::{Claims, UsbDevices, UsbFlavors};

    fn error<T: DeserializeOwned>(text: &str) -> String {
        read::<T>(text).map(drop).unwrap_err().0
    }

    #[test]
    fn an_error_names_the_key() {
        assert_eq!(error::<UsbDevices>("{}"), "it has no \"usb_devices\"");
        assert_eq!(error::<UsbDevices>("null"), "found null, wanted an object");
        assert_eq!(
            error::<UsbDevices>(r#"{"usb_devices":{}}"#),
            "usb_devices: found an object, wanted a list"
        );
        assert_eq!(
            error::<UsbDevices>(r#"{"usb_devices":[{"compute_node_id":1}]}"#),
            "usb_devices[0] has no \"id\""
        );
        assert_eq!(
            error::<Claims>(r#"{"usb_claims":[{"id":"x"}]}"#),
            "usb_claims[0].id: found string \"x\", wanted a number"
        );
        let flavor = r#"{"usb_flavors":[{"name":"a","created_at":"","updated_at":"",
            "usb_devices":[{"moon":1}],"usb_redirection_devices":[]}]}"#;
        let said = error::<UsbFlavors>(flavor);
        let place = "usb_flavors[0].usb_devices[0]: found key \"moon\", wanted one of id, ";
        assert!(said.starts_with(place), "{said}");
    }

    #[test]
    fn keys_of_a_newer_api_are_ignored_and_those_of_an_older_one_not_missed() {
        let claims = r#"{"usb_claims":[{"id":1,"created_at":"t","usb_device_id":5,
            "instance_uuid":"6f3c9d7e-0b51-4a55-9a3e-0d3b8c1f2a01","domain":"erp",
            "state":"claimed","hold":"running","colour":"red"}],"usb_problems":[],"moon":true}"#;
        let claims: Claims = read(claims).unwrap();
        let row = claims.usb_claims.into_iter().map(virt_usb_store::ClaimRow::from).next().unwrap();
        assert_eq!((row.device_id.get(), row.pending, row.request), (5, false, None));
        let device = r#"{"usb_devices":[{"id":5,"compute_node_id":1,"address":"usb_1_5",
            "product_id":"0001","vendor_id":"0529","bus_id":"1","device_id":"5","port_id":"4",
            "status":"unavailable","status_reason":"eaten","extra_info":"","instance_uuid":"",
            "port_path":"1-1.4","class":"00","serial":"S"}]}"#;
        let device = read::<UsbDevices>(device).unwrap().usb_devices.pop().unwrap();
        let record = virt_usb_store::Record::try_from(device).unwrap();
        assert_eq!(record.entry.serial_kind, "unique");
        assert_eq!(record.entry.status_reason.as_deref(), Some("eaten"));
        assert!(record.entry.state().is_err());
    }

    #[test]
    fn a_refusal_says_what_the_api_says() {
        let text = r#"{"itemNotFound":{"code":404,"message":"No device 9."}}"#;
        let said = |text| Refused::new(StatusCode::NOT_FOUND, text, Some("req-1".into()));
        assert_eq!(said(text).to_string(), "the API responded with 404: No device 9.");
        assert_eq!(said("null").to_string(), "the API responded with 404: Not Found");
        let broken = Refused::new(StatusCode::BAD_GATEWAY, "[]", Some("req-1".into()));
        assert_eq!(broken.to_string(), "the API responded with 502: Bad Gateway (req-1)");
    }
}
