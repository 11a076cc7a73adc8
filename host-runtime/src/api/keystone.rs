//! Validation of tokens by Keystone, OpenStack's identity service.
//!
//! The agent authenticates as a service user. It gets a token of its own with `POST
//! /v3/auth/tokens`, and validates each token of a caller with `GET /v3/auth/tokens` ([Identity API
//! v3](https://docs.openstack.org/api-ref/identity/v3/)). In Keystone, the role `service` permits
//! the validation of other users' tokens.
//!
//! A validation is cached for `cache` seconds for read-only requests, and never longer than the
//! token is valid. Before a change, the token is validated again, so a revoked token cannot change
//! anything. While Keystone is unreachable, only cached tokens are accepted.

use std::collections::HashMap;
use std::error::Error as _;
use std::io::Read as _;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use jiff::Timestamp;
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::sync::Semaphore;
use ureq::Agent;
use ureq::http::{Request, Response, StatusCode};
use virt_usb_config as config;
use virt_usb_filter_host::sha256;
use virt_usb_model::{ProjectId, clean_start, printable};

use super::identity::{Answer, AuthError, Caller, Freshness, Identity, Role};
use crate::client;
use crate::metrics::Metrics;

/// Maximum number of concurrent validations.
pub(super) const PLACES: usize = 8;
/// Timeout for a free place among the validations, and for a request to Keystone.
const KEYSTONE_TIMEOUT: Duration = Duration::from_secs(10);
/// Timeout for a connection to Keystone.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Time for which a rejection is cached.
const REFUSED: Duration = Duration::from_secs(5);
/// Pause after a rejected password, because Keystone may lock out a user after several of them.
const PAUSE: Duration = Duration::from_secs(30);
/// Remaining lifetime below which the service's own token is replaced, in seconds.
const LEFT: i64 = 60;
/// Maximum number of cached tokens.
const KNOWN: usize = 4096;
/// Maximum length of a token, in bytes. Keystone's tokens have fewer than 300 bytes.
const MAX_TOKEN_BYTES: usize = 8 << 10;
/// Maximum size of a response, in bytes.
const MAX_RESPONSE_BYTES: u64 = 1 << 20;
/// Maximum length of a name in the audit trail, in characters. A longer name is replaced by the
/// user's id.
const MAX_NAME_CHARS: usize = 64;

/// Result of a validation.
#[derive(Debug, Clone)]
struct Found {
    at: Instant,
    /// Caller of the token and its expiry, or the reason for the rejection.
    result: Result<(Caller, Timestamp), AuthError>,
}

/// Token of the service user.
struct Own {
    token: String,
    until: Timestamp,
}

/// Reason why the service user has no token.
struct Failed {
    at: Instant,
    why: String,
    /// Whether the password was rejected.
    refused: bool,
}

impl From<String> for Failed {
    fn from(why: String) -> Self {
        Self { at: Instant::now(), why, refused: false }
    }
}

/// Credentials for Keystone, and the reason why they recently failed.
#[derive(Default)]
struct Service {
    own: Option<Own>,
    /// The last attempt to get a token, if it failed.
    failed: Option<Failed>,
}

/// A Keystone that validates tokens.
#[derive(Clone)]
pub struct Keystone(Arc<Inner>);

struct Inner {
    config: config::Keystone,
    metrics: Arc<Metrics>,
    client: OnceLock<Agent>,
    service: Mutex<Service>,
    /// Cached results, by the hash of the token.
    known: Mutex<HashMap<[u8; 32], Found>>,
    /// Reason why Keystone cannot validate tokens; empty if it can.
    trouble: Mutex<String>,
    places: Arc<Semaphore>,
}

impl Keystone {
    /// Creates a validator from the configuration, without a request to Keystone.
    pub fn new(config: config::Keystone, metrics: Arc<Metrics>) -> Self {
        Self(Arc::new(Inner {
            config,
            metrics,
            client: OnceLock::new(),
            service: Mutex::default(),
            known: Mutex::default(),
            trouble: Mutex::default(),
            places: Arc::new(Semaphore::new(PLACES)),
        }))
    }

    /// Checks that Keystone accepts the service user, and returns the user's roles.
    ///
    /// # Errors
    /// The reason, if Keystone cannot be asked or rejects the service user.
    pub fn check(&self) -> Result<Vec<String>, String> {
        let token = self.0.own_token()?;
        match self.0.validate(&token)? {
            Some(answer) => Ok(answer.token.roles.into_iter().map(|role| role.name).collect()),
            None => Err("it rejects the token that it has just issued".into()),
        }
    }

    async fn look_up(&self, token: &str, freshness: Freshness) -> Result<Caller, AuthError> {
        if token.is_empty()
            || token.len() > MAX_TOKEN_BYTES
            || !token.bytes().all(|b| b.is_ascii_graphic())
        {
            return Err(AuthError::InvalidToken);
        }
        let hash = sha256(token.as_bytes());
        if let Some(found) = self.0.remembered(&hash, freshness) {
            return found;
        }
        if freshness == Freshness::CachedOnly {
            return Err(AuthError::InvalidToken);
        }
        let place =
            tokio::time::timeout(KEYSTONE_TIMEOUT, self.0.places.clone().acquire_owned()).await;
        let Ok(Ok(place)) = place else {
            return Err(AuthError::Unavailable(format!(
                "Keystone at {} responds too slowly: {PLACES} tokens are being validated",
                self.0.config.url
            )));
        };
        // Another thread may have validated the same token in the meantime.
        if let Some(found) = self.0.remembered(&hash, freshness) {
            return found;
        }
        let (inner, token) = (self.0.clone(), token.to_owned());
        let asked = tokio::task::spawn_blocking(move || {
            let _place = place;
            inner.ask(&token, hash)
        });
        asked.await.unwrap_or_else(|e| Err(AuthError::Unavailable(e.to_string())))
    }
}

impl Identity for Keystone {
    fn caller<'a>(&'a self, token: &'a str, freshness: Freshness) -> Answer<'a> {
        Box::pin(self.look_up(token, freshness))
    }
}

impl Inner {
    /// The cached result, if it is still valid for this request.
    fn remembered(
        &self,
        hash: &[u8; 32],
        freshness: Freshness,
    ) -> Option<Result<Caller, AuthError>> {
        let known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let found = known.get(hash)?;
        match &found.result {
            // A rejected token does not become valid soon.
            Err(why) => (found.at.elapsed() < REFUSED).then(|| Err(why.clone())),
            Ok((_, until)) if Timestamp::now() >= *until => Some(Err(AuthError::InvalidToken)),
            Ok((caller, _)) => (freshness != Freshness::Live
                && found.at.elapsed() < self.config.cache)
                .then(|| Ok(caller.clone())),
        }
    }

    /// Validates a token with Keystone, and caches the result. Blocks on the network.
    fn ask(&self, token: &str, hash: [u8; 32]) -> Result<Caller, AuthError> {
        // Time of the request: the response may already be outdated when it arrives.
        let at = Instant::now();
        let answer = self.validate(token);
        let outcome = match &answer {
            Ok(Some(_)) => "known",
            Ok(None) => "unknown",
            Err(_) => "away",
        };
        self.metrics.looked_up(outcome);
        self.log_trouble(answer.as_ref().err());
        let result = match answer {
            Err(why) => return Err(AuthError::Unavailable(why)),
            Ok(None) => Err(AuthError::InvalidToken),
            Ok(Some(answer)) => answer.caller(&self.config),
        };
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if known.len() >= KNOWN {
            let longest = self.config.cache.max(REFUSED);
            known.retain(|_, found| found.at.elapsed() < longest);
        }
        while known.len() >= KNOWN {
            let oldest = known.iter().min_by_key(|(_, found)| found.at).map(|(hash, _)| *hash);
            oldest.and_then(|hash| known.remove(&hash));
        }
        known.insert(hash, Found { at, result: result.clone() });
        result.map(|(caller, _)| caller)
    }

    /// Logs once that Keystone cannot be reached, and once that it responds again.
    fn log_trouble(&self, why: Option<&String>) {
        let mut trouble = self.trouble.lock().unwrap_or_else(PoisonError::into_inner);
        match why {
            Some(why) if *why != *trouble => {
                tracing::error!("{why}; Keystone tokens are rejected until it can be reached");
                trouble.clone_from(why);
            }
            None if !trouble.is_empty() => {
                tracing::info!("Keystone at {} answers again", self.config.url);
                trouble.clear();
            }
            _ => {}
        }
    }

    /// Keystone's response about a token; `None` if Keystone does not know it.
    fn validate(&self, token: &str) -> Result<Option<Described>, String> {
        // The service user's token may have been revoked, or Keystone may have new keys. The second
        // attempt uses a new token.
        for last in [false, true] {
            let own = self.own_token()?;
            let request = Request::builder()
                .uri(format!("{}/auth/tokens?nocatalog", self.config.url))
                .header("X-Auth-Token", &own)
                .header("X-Subject-Token", token);
            let request = request.body(()).map_err(|e| e.to_string())?;
            let mut response = self.client()?.run(request).map_err(|e| self.away(&e))?;
            match response.status() {
                StatusCode::OK => return self.read(&mut response).map(Some),
                StatusCode::NOT_FOUND => return Ok(None),
                StatusCode::UNAUTHORIZED if !last => self.forget(&own),
                StatusCode::FORBIDDEN => {
                    return Err(format!(
                        "Keystone at {} does not let the user {} validate tokens: give it the \
                         role \"service\" in the project {}",
                        self.config.url, self.config.user, self.config.project
                    ));
                }
                status => return Err(self.odd(status)),
            }
        }
        Err(self.odd(StatusCode::UNAUTHORIZED))
    }

    fn forget(&self, token: &str) {
        let mut service = self.service.lock().unwrap_or_else(PoisonError::into_inner);
        if service.own.as_ref().is_some_and(|own| own.token == token) {
            service.own = None;
        }
    }

    /// The token of the service user. Concurrent callers wait for one request, and share its result
    /// or error.
    fn own_token(&self) -> Result<String, String> {
        let begun = Instant::now();
        let mut service = self.service.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(own) = &service.own
            && own.until.as_second() - Timestamp::now().as_second() > LEFT
        {
            return Ok(own.token.clone());
        }
        if let Some(failed) = &service.failed
            && (failed.at >= begun || (failed.refused && failed.at.elapsed() < PAUSE))
        {
            return Err(failed.why.clone());
        }
        service.own = None;
        match self.fetch_own() {
            Ok(own) => {
                let token = own.token.clone();
                *service = Service { own: Some(own), failed: None };
                Ok(token)
            }
            Err(failed) => {
                let why = failed.why.clone();
                service.failed = Some(failed);
                Err(why)
            }
        }
    }

    fn fetch_own(&self) -> Result<Own, Failed> {
        let c = &self.config;
        let password = password(c)?;
        let body = json!({ "auth": {
            "identity": { "methods": ["password"], "password": { "user": {
                "name": c.user, "domain": { "name": c.user_domain }, "password": password,
            } } },
            "scope": { "project": { "name": c.project, "domain": { "name": c.project_domain } } },
        } });
        let request = Request::post(format!("{}/auth/tokens?nocatalog", c.url))
            .header("Content-Type", "application/json")
            .body(body.to_string());
        let request = request.map_err(|e| e.to_string())?;
        let mut response = self.client()?.run(request).map_err(|e| self.away(&e))?;
        match response.status() {
            StatusCode::CREATED => {}
            StatusCode::UNAUTHORIZED => {
                let why = format!(
                    "Keystone at {} refuses the user {} of the domain {} in the project {} of the \
                        domain {}, or its password in {}",
                    c.url,
                    c.user,
                    c.user_domain,
                    c.project,
                    c.project_domain,
                    c.password_file.display()
                );
                return Err(Failed { refused: true, ..why.into() });
            }
            status => return Err(self.odd(status).into()),
        }
        let token = response.headers().get("x-subject-token").and_then(|token| token.to_str().ok());
        let Some(token) = token.map(ToOwned::to_owned) else {
            return Err(format!("Keystone at {} issued no token", c.url).into());
        };
        Ok(Own { token, until: self.read(&mut response)?.token.expires_at })
    }

    fn client(&self) -> Result<&Agent, String> {
        if let Some(client) = self.client.get() {
            return Ok(client);
        }
        let client = client::agent(self.config.ca.as_deref(), CONNECT_TIMEOUT, KEYSTONE_TIMEOUT);
        let client = client.map_err(|e| format!("keystone.ca: {e:#}"))?;
        Ok(self.client.get_or_init(|| client))
    }

    fn read(&self, response: &mut Response<ureq::Body>) -> Result<Described, String> {
        let text = response.body_mut().with_config().limit(MAX_RESPONSE_BYTES).read_to_string();
        let text = text.map_err(|e| self.away(&e))?;
        serde_json::from_str(&text).map_err(|e| {
            format!(
                "the response of Keystone at {} about a token cannot be read: {e}",
                self.config.url
            )
        })
    }

    fn odd(&self, status: StatusCode) -> String {
        format!("Keystone at {} answers {status}", self.config.url)
    }

    fn away(&self, e: &ureq::Error) -> String {
        let mut why = match e {
            ureq::Error::Timeout(ureq::Timeout::Connect) => {
                format!("no connection within {} s", CONNECT_TIMEOUT.as_secs())
            }
            ureq::Error::Timeout(_) => format!("no answer within {} s", KEYSTONE_TIMEOUT.as_secs()),
            e => e.to_string(),
        };
        let mut cause = e.source();
        while let Some(e) = cause {
            // Some errors repeat the text of their cause.
            if !why.contains(&e.to_string()) {
                why = format!("{why}: {e}");
            }
            cause = e.source();
        }
        format!("Keystone at {} cannot be reached: {why}", self.config.url)
    }
}

fn password(config: &config::Keystone) -> Result<String, String> {
    let path = &config.password_file;
    let mut text = String::new();
    let read = std::fs::File::open(path).and_then(|file| file.take(4096).read_to_string(&mut text));
    read.map_err(|e| format!("keystone.password_file {}: {e}", path.display()))?;
    match text.lines().next() {
        Some(line) if !line.is_empty() => Ok(line.to_owned()),
        _ => Err(format!("keystone.password_file {}: its first line is empty", path.display())),
    }
}

/// Keystone's response about a token, `{"token": {...}}`. Unknown keys are ignored.
#[derive(Debug, Deserialize)]
struct Described {
    token: Token,
}

#[derive(Debug, Deserialize)]
struct Token {
    expires_at: Timestamp,
    user: User,
    project: Option<Project>,
    /// Scope of a system-scoped token: `{"all": true}`.
    system: Option<Value>,
    #[serde(default)]
    roles: Vec<Named>,
}

#[derive(Debug, Deserialize)]
struct User {
    id: String,
    name: String,
    domain: Named,
}

#[derive(Debug, Deserialize)]
struct Project {
    id: String,
}

#[derive(Debug, Deserialize)]
struct Named {
    name: String,
}

impl Described {
    /// The caller that the token identifies, and its expiry.
    fn caller(self, config: &config::Keystone) -> Result<(Caller, Timestamp), AuthError> {
        let Token { expires_at, user, project, system, roles } = self.token;
        if Timestamp::now() >= expires_at {
            return Err(AuthError::InvalidToken);
        }
        if project.is_none() && system.is_none() {
            return Err(AuthError::Unusable("The token has no project scope.".into()));
        }
        // Keystone and its services ignore case in the names of roles.
        let has = |name: &str| roles.iter().any(|role| role.name.eq_ignore_ascii_case(name));
        let meanings =
            config.roles.iter().filter(|(name, _)| has(name)).map(|(_, meaning)| meaning);
        let role = meanings.filter_map(|meaning| meaning.parse::<Role>().ok()).max();
        let Some(role) = role else {
            let wanted = config.roles.keys().map(String::as_str).collect::<Vec<_>>().join(", ");
            return Err(AuthError::Unusable(format!(
                "The token has none of the required roles: {wanted}."
            )));
        };
        let project: Option<ProjectId> = match project {
            Some(project) => {
                let id = project.id.parse();
                Some(id.map_err(|e| {
                    AuthError::Unavailable(format!("Keystone names a project: {e}"))
                })?)
            }
            None if system.is_some_and(|system| system["all"] == true) && role == Role::Admin => {
                None
            }
            None => {
                return Err(AuthError::Unusable(
                    "A system-scoped token needs the role admin; other tokens need a project."
                        .into(),
                ));
            }
        };
        Ok((Caller { name: name(&user), project, role }, expires_at))
    }
}

/// Name of a user for the audit trail. The space distinguishes it from the name of a token in the
/// file.
fn name(user: &User) -> String {
    let whole = format!("{}@{}", user.name, user.domain.name);
    let plain = |c: char| !c.is_whitespace() && printable(c) == c;
    if whole.chars().count() <= MAX_NAME_CHARS && whole.chars().all(plain) {
        return format!("keystone {whole}");
    }
    format!("keystone {}", clean_start(&user.id, MAX_NAME_CHARS))
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU16, AtomicUsize, Ordering};

    use super::*;

    /// A fake Keystone with preset responses.
    struct Fake {
        url: String,
        /// Status of the response about a token.
        status: Arc<AtomicU16>,
        /// Number of requests for the service's own token, and about others' tokens.
        asked: Arc<[AtomicUsize; 2]>,
        folder: tempfile::TempDir,
    }

    fn token(project: &Value, roles: &Value, expires_at: &str) -> Value {
        let domain = json!({ "id": "default", "name": "Default" });
        json!({ "token": {
            "expires_at": expires_at, "project": project, "roles": roles, "methods": ["password"],
            "user": { "id": "u1", "name": "erp", "domain": domain },
        } })
    }

    const FUTURE: &str = "2999-01-01T00:00:00.000000Z";

    impl Fake {
        fn new() -> Self {
            let server = tiny_http::Server::http("127.0.0.1:0").unwrap();
            let url = format!("http://{}/v3", server.server_addr());
            let status = Arc::new(AtomicU16::new(200));
            let asked: Arc<[AtomicUsize; 2]> = Arc::default();
            let (answers, count) = (status.clone(), asked.clone());
            std::thread::spawn(move || {
                for request in server.incoming_requests() {
                    let text =
                        token(&json!({ "id": "p1" }), &json!([{ "name": "member" }]), FUTURE)
                            .to_string();
                    let post = *request.method() == tiny_http::Method::Post;
                    let status = answers.load(Ordering::SeqCst);
                    let own = status == 1401;
                    count[usize::from(!post)].fetch_add(1, Ordering::SeqCst);
                    let status = match (post, own) {
                        (true, true) => 401,
                        (true, false) => 201,
                        (false, _) => status,
                    };
                    let header = tiny_http::Header::from_bytes("X-Subject-Token", "own").unwrap();
                    let response = tiny_http::Response::from_string(if status == 299 {
                        "{".into()
                    } else {
                        text
                    });
                    let status = if status == 299 { 200 } else { status };
                    drop(request.respond(response.with_status_code(status).with_header(header)));
                }
            });
            let folder = tempfile::tempdir().unwrap();
            std::fs::write(folder.path().join("password"), "secret\n").unwrap();
            Self { url, status, asked, folder }
        }

        fn keystone(&self, cache: u64) -> Keystone {
            let file = self.folder.path().join("password");
            let text = format!(
                "[keystone]\nurl = '{}'\ncache = {cache}\npassword_file = '{}'",
                self.url,
                file.display()
            );
            Keystone::new(config::Config::parse(&text).unwrap().keystone.unwrap(), Arc::default())
        }

        fn asked(&self) -> (usize, usize) {
            (self.asked[0].load(Ordering::SeqCst), self.asked[1].load(Ordering::SeqCst))
        }
    }

    fn find(keystone: &Keystone, token: &str, freshness: Freshness) -> Result<String, AuthError> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(keystone.look_up(token, freshness)).map(|caller| caller.name)
    }

    #[test]
    fn a_validation_is_cached_for_requests_that_only_read() {
        let fake = Fake::new();
        let keystone = fake.keystone(3600);
        assert_eq!(
            find(&keystone, "t1", Freshness::CachedOnly),
            Err(AuthError::InvalidToken),
            "not cached, and Keystone is not asked"
        );
        assert_eq!(fake.asked(), (0, 0));
        for _ in 0..3 {
            assert_eq!(find(&keystone, "t1", Freshness::Cached).unwrap(), "keystone erp@Default");
        }
        assert_eq!(find(&keystone, "t1", Freshness::CachedOnly).unwrap(), "keystone erp@Default");
        assert_eq!(fake.asked(), (1, 1));
        find(&keystone, "t1", Freshness::Live).unwrap();
        assert_eq!(fake.asked(), (1, 2), "before a change, the token is validated again");
        fake.status.store(404, Ordering::SeqCst);
        assert_eq!(find(&keystone, "t1", Freshness::Live), Err(AuthError::InvalidToken));
        assert_eq!(
            find(&keystone, "t1", Freshness::Cached),
            Err(AuthError::InvalidToken),
            "a revoked token stays rejected"
        );
        assert_eq!(fake.asked(), (1, 3));
        let uncached = fake.keystone(0);
        fake.status.store(200, Ordering::SeqCst);
        for _ in 0..3 {
            find(&uncached, "t1", Freshness::Cached).unwrap();
        }
        assert_eq!(fake.asked(), (2, 6));
    }

    #[test]
    fn only_cached_tokens_are_accepted_while_keystone_is_unreachable() {
        let fake = Fake::new();
        let keystone = fake.keystone(3600);
        find(&keystone, "t1", Freshness::Cached).unwrap();
        for (status, why) in [
            (500, "answers 500"),
            (503, "answers 503"),
            (302, "answers 302"),
            (401, "answers 401"),
            (403, "does not let the user virt-usb validate tokens: give it the role \"service\""),
            (299, "cannot be read"),
        ] {
            fake.status.store(status, Ordering::SeqCst);
            let answer = find(&keystone, &format!("t{status}"), Freshness::Cached);
            assert!(
                matches!(&answer, Err(AuthError::Unavailable(text)) if text.contains(why)),
                "{status}: {answer:?}"
            );
            assert!(find(&keystone, "t1", Freshness::Cached).is_ok(), "{status}");
            assert!(
                matches!(find(&keystone, "t1", Freshness::Live), Err(AuthError::Unavailable(_))),
                "{status}"
            );
        }
        fake.status.store(200, Ordering::SeqCst);
        find(&keystone, "t500", Freshness::Live).unwrap();
    }

    #[test]
    fn a_password_that_is_refused_is_not_tried_again_at_once() {
        let fake = Fake::new();
        fake.status.store(1401, Ordering::SeqCst);
        let keystone = fake.keystone(60);
        for n in 0..5 {
            let answer = find(&keystone, &format!("t{n}"), Freshness::Cached);
            assert!(
                matches!(&answer, Err(AuthError::Unavailable(why))
                    if why.contains("refuses the user virt-usb")),
                "{answer:?}"
            );
        }
        assert_eq!(fake.asked(), (1, 0));
        let file = fake.folder.path().join("password");
        std::fs::write(&file, "\n").unwrap();
        assert!(fake.keystone(60).check().unwrap_err().ends_with("its first line is empty"));
        std::fs::remove_file(&file).unwrap();
        assert!(fake.keystone(60).check().unwrap_err().contains("keystone.password_file"));
    }

    #[test]
    fn concurrent_callers_wait_together_for_a_keystone_that_hangs() {
        let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let mut fake = Fake::new();
        fake.url = format!("http://{}/v3", silent.local_addr().unwrap());
        let keystone = fake.keystone(60);
        std::thread::scope(|scope| {
            for _ in 0..PLACES {
                scope.spawn(|| {
                    assert!(keystone.0.own_token().unwrap_err().ends_with("no answer within 10 s"));
                });
            }
        });
        silent.set_nonblocking(true).unwrap();
        let calls = std::iter::from_fn(|| silent.accept().ok()).count();
        assert_eq!(calls, 1, "one request serves all callers");
    }

    #[test]
    fn keystone_is_not_asked_about_a_malformed_token() {
        let fake = Fake::new();
        let keystone = fake.keystone(60);
        for no_token in ["", "a b", "a\r\nX-Auth-Token: b", "ü", &"x".repeat(MAX_TOKEN_BYTES + 1)]
        {
            assert_eq!(find(&keystone, no_token, Freshness::Live), Err(AuthError::InvalidToken));
        }
        assert_eq!(fake.asked(), (0, 0));
    }

    #[test]
    fn a_caller_has_the_project_and_the_highest_role_of_the_token() {
        let config = Fake::new().keystone(60).0.config.clone();
        let caller_of =
            |value: Value| serde_json::from_value::<Described>(value).unwrap().caller(&config);
        let project =
            json!({ "id": "p1", "name": "erp", "domain": { "id": "default", "name": "Default" } });
        let role = |names: &[&str]| {
            json!(names.iter().map(|name| json!({ "id": "r", "name": name })).collect::<Vec<_>>())
        };
        let (caller, _) =
            caller_of(token(&project, &role(&["reader", "admin", "member", "x"]), FUTURE)).unwrap();
        assert_eq!((caller.role, caller.project), (Role::Admin, Some("p1".parse().unwrap())));
        assert_eq!(
            caller_of(token(&project, &role(&["Member"]), FUTURE)).unwrap().0.role,
            Role::Member
        );
        let useless = |value: Value, why: &str| {
            let answer = caller_of(value);
            assert!(
                matches!(&answer, Err(AuthError::Unusable(text)) if text.contains(why)),
                "{answer:?}"
            );
        };
        useless(token(&project, &role(&["x"]), FUTURE), "none of the required roles");
        useless(token(&Value::Null, &role(&["admin"]), FUTURE), "no project scope");
        useless(token(&Value::Null, &role(&[]), FUTURE), "no project scope");
        let past = token(&project, &role(&["admin"]), "2020-01-01T00:00:00Z");
        assert_eq!(caller_of(past).unwrap_err(), AuthError::InvalidToken);
        let mut system = token(&Value::Null, &role(&["admin"]), FUTURE);
        system["token"]["system"] = json!({ "all": true });
        let (caller, _) = caller_of(system.clone()).unwrap();
        assert_eq!((caller.role, caller.project), (Role::Admin, None));
        system["token"]["roles"] = role(&["reader"]);
        useless(system, "system-scoped");
    }

    #[test]
    fn a_name_that_could_deceive_is_replaced_by_the_id() {
        let user = |name: &str| name_of(name, "u1");
        assert_eq!(user("erp"), "keystone erp@Default");
        for deceives in ["a b", "a\u{202e}b", "a\nb", &"x".repeat(70)] {
            assert_eq!(user(deceives), "keystone u1");
        }
    }

    fn name_of(name: &str, id: &str) -> String {
        super::name(&User {
            id: id.into(),
            name: name.into(),
            domain: Named { name: "Default".into() },
        })
    }
}
