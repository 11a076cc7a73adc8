//! Errors in Nova's format: `{"itemNotFound":{"code":404,"message":"…"}}`.

use std::time::Duration;

use axum::Json;
use axum::http::HeaderValue;
use axum::http::StatusCode;
use axum::http::header::{RETRY_AFTER, WWW_AUTHENTICATE};
use axum::response::{IntoResponse, Response};
use virt_usb_store::StoreError;

use super::policy::Authorization;
use super::responses::{Fault, FaultReason};
use crate::agent::work::WorkError;
use crate::hypervisor::Failure;
use virt_usb_fleet::replicated::ChangeError;

/// A call that could not be served. Nothing was changed by it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct ApiError {
    pub(super) status: StatusCode,
    /// One sentence that the caller can act on.
    pub(super) message: String,
    /// Value of Retry-After, in seconds.
    retry_after: Option<u64>,
    /// Details that only the log gets.
    pub(super) private: Option<String>,
}

impl ApiError {
    fn new(status: StatusCode, message: impl Into<String>) -> Self {
        Self { status, message: message.into(), retry_after: None, private: None }
    }

    /// Replaces the message.
    pub(super) fn saying(self, message: impl Into<String>) -> Self {
        Self { message: message.into(), ..self }
    }

    /// Adds details that only the log gets.
    pub(super) fn and_privately(self, private: String) -> Self {
        Self { private: Some(private), ..self }
    }

    pub(super) fn bad_request(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, message)
    }

    pub(super) fn unauthorized() -> Self {
        Self::new(
            StatusCode::UNAUTHORIZED,
            "The request you have made requires authentication: send a valid token in \
                X-Auth-Token.",
        )
    }

    pub(super) fn forbidden() -> Self {
        Self::new(
            StatusCode::FORBIDDEN,
            "Policy doesn't allow this to be performed with the token's role.",
        )
    }

    pub(super) fn not_found(message: impl Into<String>) -> Self {
        Self::new(StatusCode::NOT_FOUND, message)
    }

    pub(super) fn bad_method() -> Self {
        Self::new(StatusCode::METHOD_NOT_ALLOWED, "This resource has no such method.")
    }

    pub(super) fn timeout() -> Self {
        Self::new(StatusCode::REQUEST_TIMEOUT, "The body did not arrive in time.")
    }

    pub(super) fn conflict(message: impl Into<String>) -> Self {
        Self::new(StatusCode::CONFLICT, message)
    }

    pub(super) fn too_large(most: usize) -> Self {
        Self::new(StatusCode::PAYLOAD_TOO_LARGE, format!("The body is larger than {most} bytes."))
    }

    pub(super) fn bad_media_type() -> Self {
        Self::new(
            StatusCode::UNSUPPORTED_MEDIA_TYPE,
            "The body must be JSON, and Content-Type must say application/json.",
        )
    }

    /// Rate limit exceeded; `wait` is the number of seconds until the next attempt.
    pub(super) fn too_often(wait: u64) -> Self {
        let message = format!("Rate limit exceeded: try again in {wait} s.");
        Self { retry_after: Some(wait), ..Self::new(StatusCode::TOO_MANY_REQUESTS, message) }
    }

    /// Time until the next attempt.
    pub(super) fn retry_after(&self) -> Option<Duration> {
        self.retry_after.map(Duration::from_secs)
    }

    pub(super) fn unavailable(message: impl Into<String>) -> Self {
        Self { retry_after: Some(5), ..Self::new(StatusCode::SERVICE_UNAVAILABLE, message) }
    }

    /// An internal error, whose cause only the log gets.
    pub(super) fn internal(private: impl Into<String>) -> Self {
        let message = "virt-usb cannot serve this request now. The agent's log on the host shows \
            why, by the request id.";
        let private = Some(private.into());
        Self { private, ..Self::new(StatusCode::INTERNAL_SERVER_ERROR, message) }
    }

    /// The token cannot be validated now, for a reason that only the log gets.
    pub(super) fn cannot_tell(private: String) -> Self {
        Self::away(
            "Tokens cannot be validated now. The agent's log on the host shows why.",
            private,
        )
    }

    /// The error response of another host.
    pub(super) fn of_other(status: u16, message: Option<&str>, host: &str) -> Self {
        let status = StatusCode::from_u16(status)
            .ok()
            .filter(|status| status.is_client_error() || status.is_server_error());
        match (status, message) {
            (Some(StatusCode::SERVICE_UNAVAILABLE), Some(message)) => Self::unavailable(message),
            (Some(status), Some(message)) => Self::new(status, message),
            _ => Self::internal(format!("the response of host {host} cannot be read")),
        }
    }

    pub(super) fn fleet_away(private: String) -> Self {
        Self::away(
            "This host cannot reach other hosts now. The agent's log on the host shows why.",
            private,
        )
    }

    pub(super) const fn status(&self) -> StatusCode {
        self.status
    }

    pub(super) fn message(&self) -> &str {
        &self.message
    }

    fn away(message: impl Into<String>, private: impl Into<String>) -> Self {
        Self { private: Some(private.into()), ..Self::unavailable(message) }
    }

    /// Nova's name of the error.
    fn name(&self) -> &'static str {
        match self.status.as_u16() {
            400 => "badRequest",
            401 => "unauthorized",
            403 => "forbidden",
            404 => "itemNotFound",
            405 => "badMethod",
            408 => "requestTimeout",
            409 => "conflictingRequest",
            413 | 429 => "overLimit",
            415 => "badMediaType",
            503 => "serviceUnavailable",
            _ => "computeFault",
        }
    }

    /// Returns `Ok` if the verdict allows the call; `missing` is the error for a caller who may not
    /// know that the object exists.
    pub(super) fn unless(
        verdict: Authorization,
        missing: impl FnOnce() -> Self,
    ) -> Result<(), Self> {
        match verdict {
            Authorization::Allowed => Ok(()),
            Authorization::Forbidden => Err(Self::forbidden()),
            Authorization::Hidden => Err(missing()),
        }
    }
}

impl From<StoreError> for ApiError {
    fn from(e: StoreError) -> Self {
        Self::away("The inventory cannot be used now: try again.", e.to_string())
    }
}

impl From<ChangeError> for ApiError {
    fn from(e: ChangeError) -> Self {
        match e {
            ChangeError::Store(e) => e.into(),
            ChangeError::Fleet(what, e) => Self::away(
                format!(
                    "The fleet's {what} cannot be changed here now. The agent's log on the host \
                     shows why."
                ),
                e.to_string(),
            ),
        }
    }
}

impl From<Failure> for ApiError {
    fn from(e: Failure) -> Self {
        match e {
            Failure::Away(_) => {
                Self::away("libvirt cannot be reached now: try again.", e.to_string())
            }
            Failure::Silent(_) => Self::away(
                "libvirt does not answer about this server now: try again.",
                e.to_string(),
            ),
            Failure::Hung(_) => {
                Self::away("The server's QEMU is stopped: try again later.", e.to_string())
            }
            Failure::Gone | Failure::Busy(_) | Failure::Refused(_) => {
                Self::conflict(sentence(&e.to_string()))
            }
        }
    }
}

impl From<WorkError> for ApiError {
    fn from(e: WorkError) -> Self {
        match e {
            WorkError::Store(e) => e.into(),
            WorkError::Hypervisor(e) => e.into(),
            WorkError::Machine(_) | WorkError::Xml(_) => Self::internal(e.to_string()),
        }
    }
}

/// Adds a full stop if there is none. The first letter does not change, because it may belong to
/// the name of a key.
pub(super) fn sentence(text: &str) -> String {
    let text = text.trim();
    let end = if text.ends_with(['.', '!', '?']) { "" } else { "." };
    format!("{text}{end}")
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let reason = FaultReason { code: self.status.as_u16(), message: self.message.clone() };
        let body = Fault::from([(self.name().to_owned(), reason)]);
        let mut response = (self.status, Json(body)).into_response();
        let headers = response.headers_mut();
        if self.status == StatusCode::UNAUTHORIZED {
            headers.insert(WWW_AUTHENTICATE, HeaderValue::from_static("X-Auth-Token"));
        }
        if let Some(wait) = self.retry_after {
            headers.insert(RETRY_AFTER, HeaderValue::from(wait));
        }
        response.extensions_mut().insert(self);
        response
    }
}
