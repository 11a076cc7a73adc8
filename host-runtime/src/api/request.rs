//! Strict parsing of requests. An error response has Nova's format and names the place.

use std::error::Error as _;
use std::fmt::Write as _;
use std::time::Duration;

use axum::body::Body;
use axum::extract::rejection::QueryRejection;
use axum::extract::{FromRequest, FromRequestParts, Path, Query, Request};
use axum::http::HeaderMap;
use axum::http::header::CONTENT_TYPE;
use axum::http::request::Parts;
use http_body_util::{BodyExt as _, LengthLimitError, Limited};
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use super::error::{ApiError, sentence};
use super::identity::Caller;

/// Maximum size of a body, in bytes.
const MAX_BODY_BYTES: usize = 64 << 10;
/// Timeout for the arrival of a body.
const BODY_TIMEOUT: Duration = Duration::from_secs(10);

/// Id of a request in its response and in the log: `req-` and a UUID, as in OpenStack.
pub(super) struct RequestId(pub(super) String);

impl RequestId {
    pub(super) fn new() -> Self {
        let mut bytes = [0_u8; 16];
        // Without random bytes the id is not unique. The id is no secret.
        let _ = getrandom::fill(&mut bytes);
        bytes[6] = bytes[6] & 0x0f | 0x40;
        bytes[8] = bytes[8] & 0x3f | 0x80;
        let mut text = "req-".to_owned();
        for (at, byte) in bytes.iter().enumerate() {
            let dash = if matches!(at, 4 | 6 | 8 | 10) { "-" } else { "" };
            // Writing to a String cannot fail.
            let _ = write!(text, "{dash}{byte:02x}");
        }
        Self(text)
    }
}

/// Caller that the authentication layer has identified.
pub(super) struct Authenticated(Caller);

impl From<Authenticated> for Caller {
    fn from(Authenticated(caller): Authenticated) -> Self {
        caller
    }
}

impl<S: Sync> FromRequestParts<S> for Authenticated {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, ApiError> {
        // The authentication layer of every route adds the caller. Without it, the request would be
        // rejected.
        parts.extensions.get::<Caller>().cloned().map(Self).ok_or_else(ApiError::unauthorized)
    }
}

/// Parsed parameters of the path.
pub(super) struct Named<T>(pub(super) T);

impl<T: DeserializeOwned + Send, S: Send + Sync> FromRequestParts<S> for Named<T> {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        let named = Path::<T>::from_request_parts(parts, state).await;
        named
            .map(|Path(named)| Self(named))
            .map_err(|e| ApiError::bad_request(sentence(&e.body_text())))
    }
}

/// The parsed query of a request.
pub(super) struct Asked<T>(pub(super) T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequestParts<S> for Asked<T> {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        let asked = Query::<T>::from_request_parts(parts, state).await;
        // The source names the key. The outer error adds only that a query was deserialized.
        let why = |e: QueryRejection| e.source().map_or_else(|| e.body_text(), ToString::to_string);
        asked.map(|Query(asked)| Self(asked)).map_err(|e| ApiError::bad_request(sentence(&why(e))))
    }
}

/// A body that is a JSON object.
pub(super) struct Content(pub(super) Map<String, Value>);

impl<S: Send + Sync> FromRequest<S> for Content {
    type Rejection = ApiError;

    async fn from_request(request: Request, _: &S) -> Result<Self, ApiError> {
        let kind = request
            .headers()
            .get(CONTENT_TYPE)
            .and_then(|kind| kind.to_str().ok())
            .unwrap_or_default();
        let kind = kind.split(';').next().unwrap_or_default().trim();
        if !kind.eq_ignore_ascii_case("application/json") {
            return Err(ApiError::bad_media_type());
        }
        let bytes = tokio::time::timeout(BODY_TIMEOUT, read(request.into_body()));
        let bytes = bytes.await.map_err(|_| ApiError::timeout())??;
        let text = str::from_utf8(&bytes).map_err(|e| {
            ApiError::bad_request(format!(
                "The body is not UTF-8: byte {} is invalid.",
                e.valid_up_to()
            ))
        })?;
        match virt_usb_model::unique_json(text) {
            Ok(Value::Object(object)) => Ok(Self(object)),
            Ok(_) => Err(ApiError::bad_request("The body is not a JSON object.")),
            Err(e) if e.is_data() => Err(ApiError::bad_request(format!("The body holds {e}."))),
            Err(e) => Err(ApiError::bad_request(format!("The body is not JSON: {e}."))),
        }
    }
}

/// Reads the text of a form, within the limits on its size and time.
pub(super) async fn form(headers: &HeaderMap, body: Body) -> Result<String, ApiError> {
    let kind = headers.get(CONTENT_TYPE).and_then(|kind| kind.to_str().ok()).unwrap_or_default();
    if !kind.starts_with("application/x-www-form-urlencoded") {
        return Err(ApiError::bad_media_type().saying("The body is not a form."));
    }
    let bytes =
        tokio::time::timeout(BODY_TIMEOUT, read(body)).await.map_err(|_| ApiError::timeout())??;
    String::from_utf8(bytes).map_err(|_| ApiError::bad_request("The form is not UTF-8."))
}

async fn read(body: Body) -> Result<Vec<u8>, ApiError> {
    match Limited::new(body, MAX_BODY_BYTES).collect().await {
        Ok(collected) => Ok(collected.to_bytes().into()),
        Err(e) if e.downcast_ref::<LengthLimitError>().is_some() => {
            Err(ApiError::too_large(MAX_BODY_BYTES))
        }
        Err(e) => Err(ApiError::bad_request(format!("The body is incomplete: {e}."))),
    }
}

/// Name and value of the action in a body, which must be its only key.
pub(super) fn action(content: &Map<String, Value>) -> Result<(&str, &Value), ApiError> {
    let mut keys = content.iter();
    match (keys.next(), keys.next()) {
        (Some((name, value)), None) => Ok((name, value)),
        (None, _) => Err(ApiError::bad_request("The body names no action.")),
        _ => Err(ApiError::bad_request("The body names more than one action.")),
    }
}

/// Checks that the value of an action without parameters is null.
pub(super) fn null(name: &str, value: &Value) -> Result<(), ApiError> {
    match value {
        Value::Null => Ok(()),
        _ => Err(ApiError::bad_request(format!("{name} wants null: {{\"{name}\":null}}."))),
    }
}

/// Checks that a value is an object that has no keys except these.
pub(super) fn object<'a>(
    value: &'a Value,
    place: &str,
    keys: &[&str],
) -> Result<&'a Map<String, Value>, ApiError> {
    let Some(object) = value.as_object() else {
        return Err(ApiError::bad_request(format!("{place} is not a JSON object.")));
    };
    match object.keys().find(|key| !keys.contains(&key.as_str())) {
        Some(key) => Err(ApiError::bad_request(format!(
            "{place} has the key {key:?}, wanted: {}.",
            keys.join(", ")
        ))),
        None => Ok(object),
    }
}

/// Response to an unknown path.
pub(super) async fn nowhere() -> ApiError {
    ApiError::not_found("The resource could not be found.")
}

/// Response to a method that a resource does not have.
pub(super) async fn no_method() -> ApiError {
    ApiError::bad_method()
}
