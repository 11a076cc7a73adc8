//! Sessions of signed-in users. A session is a random number in a cookie. The session's token stays
//! in memory and is validated again for each page, so a session ends when its token expires or is
//! removed. All sessions end when the agent stops.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use axum::extract::{FromRequest, FromRequestParts, OptionalFromRequestParts, Request};
use axum::http::HeaderMap;
use axum::http::header::{COOKIE, HOST, HeaderName, ORIGIN};
use axum::http::request::Parts;
use axum::response::{IntoResponse, Response};
use serde::de::DeserializeOwned;
use virt_usb_filter_host::{hex, sha256};

use super::super::error::{ApiError, sentence};
use super::super::identity::{AuthError, Caller};
use super::super::policy::{Authorization, Call, may};
use super::super::request::form;
use super::super::{Api, freshness};
use super::pages::see;

/// Name of the session cookie.
const COOKIE_NAME: &str = "virt-usb-portal";
/// Idle time after which a session ends.
const IDLE: Duration = Duration::from_secs(3600);
/// Maximum lifetime of a session.
const LIFETIME: Duration = Duration::from_secs(12 * 3600);
/// Maximum number of sessions; one more ends the session that has been idle longest.
const MOST: usize = 1024;
/// Maximum number of sessions per caller, so that repeated sign-ins end only the caller's own.
const MOST_EACH: usize = 16;

struct Session {
    token: String,
    /// Name of the session's caller.
    whose: String,
    csrf: String,
    begun: Instant,
    used: Instant,
}

impl Session {
    fn is_over(&self) -> bool {
        self.used.elapsed() > IDLE || self.begun.elapsed() > LIFETIME
    }
}

/// All sessions by the hash of their number, so that the lookup time reveals nothing about them.
#[derive(Default)]
pub(in super::super) struct Sessions(Mutex<HashMap<String, Session>>);

/// Returns 256 random bits in hexadecimal digits.
pub(super) fn secret() -> Result<String, ApiError> {
    let mut bytes = [0; 32];
    getrandom::fill(&mut bytes).map_err(|e| ApiError::internal(e.to_string()))?;
    Ok(hex(&bytes))
}

fn hash(secret: &str) -> String {
    hex(&sha256(secret.as_bytes()))
}

impl Sessions {
    /// Begins a session and returns its cookie.
    pub(super) fn begin(
        &self,
        token: String,
        whose: &str,
        encrypted: bool,
    ) -> Result<String, ApiError> {
        let (number, now) = (secret()?, Instant::now());
        let session =
            Session { token, whose: whose.to_owned(), csrf: secret()?, begun: now, used: now };
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.retain(|_, session| !session.is_over());
        make_room(&mut all, MOST_EACH, |session| session.whose == whose, |session| session.used);
        make_room(&mut all, MOST, |_| true, |session| session.used);
        all.insert(hash(&number), session);
        let secure = if encrypted { "; Secure" } else { "" };
        Ok(format!("{}{secure}", cookie(&number, LIFETIME.as_secs())))
    }

    fn use_it(&self, id: &str) -> Option<(String, String)> {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if all.get(id)?.is_over() {
            all.remove(id);
            return None;
        }
        let session = all.get_mut(id)?;
        session.used = Instant::now();
        Some((session.token.clone(), session.csrf.clone()))
    }

    /// Token of a session that has not ended. Live updates do not count as use of the session.
    pub(super) fn token(&self, id: &str) -> Option<String> {
        let all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.get(id).filter(|session| !session.is_over()).map(|session| session.token.clone())
    }

    /// Ends a session and returns the header that deletes its cookie.
    pub(super) fn end(&self, id: &str) -> String {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).remove(id);
        cookie("", 0)
    }
}

/// Removes the oldest matching entries until fewer than `most` remain.
pub(super) fn make_room<T>(
    all: &mut HashMap<String, T>,
    most: usize,
    of: impl Fn(&T) -> bool,
    age: impl Fn(&T) -> Instant,
) {
    while all.values().filter(|one| of(one)).count() >= most {
        let oldest = all.iter().filter(|(_, one)| of(one)).min_by_key(|(_, one)| age(one));
        let Some(id) = oldest.map(|(id, _)| id.clone()) else { return };
        all.remove(&id);
    }
}

fn cookie(value: &str, seconds: u64) -> String {
    format!("{COOKIE_NAME}={value}; Path=/portal; HttpOnly; SameSite=Strict; Max-Age={seconds}")
}

fn number(headers: &HeaderMap) -> Option<&str> {
    let lines = headers.get_all(COOKIE).iter().filter_map(|line| line.to_str().ok());
    lines
        .flat_map(|line| line.split(';'))
        .find_map(|pair| pair.trim().strip_prefix(COOKIE_NAME)?.strip_prefix('='))
}

/// A signed-in user.
#[derive(Debug, Clone)]
pub(super) struct Signed {
    pub(super) caller: Caller,
    /// Secret that a form must contain; other sites cannot know it.
    pub(super) csrf: String,
    /// Id of the session.
    pub(super) id: String,
}

impl Signed {
    /// Whether the user has the role for this call, so that pages show its links and forms.
    pub(super) fn may(&self, call: Call) -> bool {
        may(&self.caller, call) == Authorization::Allowed
    }

    async fn of(parts: &Parts, api: &Arc<Api>) -> Result<Option<Self>, ApiError> {
        let Some(id) = number(&parts.headers).map(hash) else { return Ok(None) };
        let Some((token, csrf)) = api.portal.sessions.use_it(&id) else { return Ok(None) };
        match api.identity.caller(&token, freshness(&parts.method)).await {
            Ok(caller) => Ok(Some(Self { caller, csrf, id })),
            Err(AuthError::InvalidToken | AuthError::Unusable(_)) => {
                api.portal.sessions.end(&id);
                Ok(None)
            }
            Err(AuthError::Unavailable(why)) => Err(ApiError::cannot_tell(why)),
        }
    }
}

impl From<Signed> for Caller {
    fn from(signed: Signed) -> Self {
        signed.caller
    }
}

impl FromRequestParts<Arc<Api>> for Signed {
    type Rejection = Response;

    async fn from_request_parts(parts: &mut Parts, api: &Arc<Api>) -> Result<Self, Response> {
        // The role check and the handler share one validation of the token.
        if let Some(signed) = parts.extensions.get::<Self>() {
            return Ok(signed.clone());
        }
        match Self::of(parts, api).await {
            Ok(Some(signed)) => {
                parts.extensions.insert(signed.clone());
                Ok(signed)
            }
            Ok(None) => Err(see("/portal/sign-in")),
            Err(fault) => Err(fault.into_response()),
        }
    }
}

impl OptionalFromRequestParts<Arc<Api>> for Signed {
    type Rejection = Response;

    async fn from_request_parts(
        parts: &mut Parts,
        api: &Arc<Api>,
    ) -> Result<Option<Self>, Response> {
        Self::of(parts, api).await.map_err(IntoResponse::into_response)
    }
}

/// Refuses a form from another site, by the headers with which browsers name its origin.
pub(super) fn is_from_here(headers: &HeaderMap) -> Result<(), ApiError> {
    let text = |name: &HeaderName| headers.get(name).and_then(|value| value.to_str().ok());
    let site = headers.get("sec-fetch-site").and_then(|value| value.to_str().ok());
    let origin =
        text(&ORIGIN).map(|origin| origin.split_once("://").map_or(origin, |(_, host)| host));
    let here = site.is_none_or(|site| matches!(site, "same-origin" | "none"))
        && origin.is_none_or(|origin| Some(origin) == text(&HOST));
    if here { Ok(()) } else { Err(foreign()) }
}

fn foreign() -> ApiError {
    ApiError::forbidden().saying(
        "This form does not belong to your session: open the page again, and resend the form.",
    )
}

/// A form sent by a signed-in user from a page of the same session.
pub(super) struct Sent<T>(pub(super) Signed, pub(super) T);

impl<T: DeserializeOwned> FromRequest<Arc<Api>> for Sent<T> {
    type Rejection = Response;

    async fn from_request(request: Request, api: &Arc<Api>) -> Result<Self, Response> {
        let (mut parts, body) = request.into_parts();
        let signed =
            <Signed as FromRequestParts<Arc<Api>>>::from_request_parts(&mut parts, api).await?;
        let read = async {
            is_from_here(&parts.headers)?;
            api.rates.change(&signed.caller.name)?;
            let text = form(&parts.headers, body).await?;
            let wrong = |e: serde_urlencoded::de::Error| {
                ApiError::bad_request(sentence(&format!("The form is invalid: {e}")))
            };
            let fields: Vec<(String, String)> = serde_urlencoded::from_str(&text).map_err(wrong)?;
            let csrf = fields.iter().find(|(name, _)| name == "csrf").map(|(_, value)| hash(value));
            if csrf != Some(hash(&signed.csrf)) {
                return Err(foreign());
            }
            serde_urlencoded::from_str(&text).map_err(wrong)
        };
        match read.await {
            Ok(value) => Ok(Self(signed, value)),
            Err(fault) => Err(fault.into_response()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_session_is_its_cookie_and_nothing_else_is() {
        let sessions = Sessions::default();
        let cookie = sessions.begin("vusb_1".into(), "erp", true).unwrap();
        let mut headers = HeaderMap::new();
        assert_eq!(number(&headers), None);
        let (pair, rest) = cookie.split_once(';').unwrap();
        assert!(
            ["HttpOnly", "SameSite=Strict", "Path=/portal", "Secure"]
                .iter()
                .all(|part| rest.contains(part)),
            "{rest}"
        );
        headers.append(COOKIE, format!("other=1; {pair}").parse().unwrap());
        let id = hash(number(&headers).unwrap());
        assert_eq!(sessions.use_it(&id).unwrap().0, "vusb_1");
        assert_eq!(sessions.use_it(&hash("forged")), None);
        assert!(sessions.end(&id).contains("Max-Age=0"));
        assert_eq!(sessions.use_it(&id), None);
    }

    #[test]
    fn there_is_an_end_to_how_many_there_are() {
        let sessions = Sessions::default();
        for n in 0..MOST + 8 {
            sessions.begin(n.to_string(), &n.to_string(), false).unwrap();
        }
        assert_eq!(sessions.0.lock().unwrap().len(), MOST);
        // A caller with too many sessions ends only its own.
        let all =
            |whose: &str| sessions.0.lock().unwrap().values().filter(|s| s.whose == whose).count();
        let sessions_of_others = MOST - MOST_EACH;
        for _ in 0..2 * MOST {
            sessions.begin("t".into(), "loud", false).unwrap();
        }
        assert_eq!((all("loud"), sessions.0.lock().unwrap().len()), (MOST_EACH, MOST));
        assert_eq!(
            sessions.0.lock().unwrap().values().filter(|s| s.whose != "loud").count(),
            sessions_of_others
        );
    }

    #[test]
    fn a_form_of_another_site_is_not_taken() {
        let asked = |pairs: &[(&'static str, &str)]| {
            let mut headers = HeaderMap::new();
            for (name, value) in pairs {
                headers.insert(*name, value.parse().unwrap());
            }
            is_from_here(&headers).is_ok()
        };
        assert!(asked(&[("host", "127.0.0.1:8790")]));
        assert!(asked(&[
            ("host", "127.0.0.1:8790"),
            ("origin", "http://127.0.0.1:8790"),
            ("sec-fetch-site", "same-origin")
        ]));
        assert!(!asked(&[("host", "127.0.0.1:8790"), ("origin", "http://evil.example")]));
        assert!(!asked(&[("host", "127.0.0.1:8790"), ("origin", "null")]));
        assert!(!asked(&[("host", "127.0.0.1:8790"), ("sec-fetch-site", "cross-site")]));
    }
}
