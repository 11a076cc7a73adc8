//! The REST API in OpenStack's style: shows devices and servers, attaches and detaches, with
//! authorization.
//!
//! ```text
//!  TCP, TLS ─┐                        ┌─ identity: which caller? (401)
//!            ├─► listen ─► observe ───┤
//!  unix ─────┘  (limits)  (id, log)   └─ tenant: the token's project? (400)
//!                                            │
//!               routes: handler, policy ─► authorize: has the caller the role? (403)
//!                                            │
//!                                         handler ─► policy: may the caller see it? (404)
//!                                            ├─► inventory ──► store (read once for all readers)
//!                                            └─► agent::operate (attach, detach)
//! ```
//! | module | what it does |
//! |---|---|
//! | `listen` | sockets, limits, shutdown |
//! | [`identity`], [`tokens`], [`keystone`] | authentication |
//! | [`policy`] | rules of authorization, as pure functions |
//! | `authorize` | checks the role before a handler runs |
//! | `routes` | the table of routes: handler and policy of each |
//! | `request`, `paging` | parsing of requests |
//! | `error` | errors in Nova's format |
//! | `responses`, `actions` | bodies of responses and of requests, for the API and for its client |
//! | `request_schemas`, `openapi` | the OpenAPI description |
//! | `hypervisors`, `servers`, `devices`, `claims`, `flavors`, `grants`, `events` | the handlers |
//! | `fleet` | requests to other hosts, and from them |
//! | `rate_limit` | rate limits |
//! | `portal` | web pages |
//! | `inventory` | snapshots of the inventory, shared by many readers |
//!
//! The API has its own threads. The agent keeps serving guests if the API fails.

pub(crate) mod actions;
mod authorize;
mod claims;
mod devices;
mod error;
mod events;
mod flavors;
mod fleet;
mod grants;
mod hypervisors;
pub mod identity;
mod inventory;
pub mod keystone;
mod listen;
mod openapi;
mod paging;
pub mod policy;
mod portal;
mod rate_limit;
mod request;
mod request_schemas;
pub(crate) mod responses;
mod routes;
mod servers;
pub mod tokens;

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use axum::Router;
use axum::extract::rejection::RawPathParamsRejection;
use axum::extract::{RawPathParams, Request, State};
use axum::http::Method;
use axum::http::header::{
    CACHE_CONTROL, CONNECTION, HeaderName, HeaderValue, X_CONTENT_TYPE_OPTIONS,
};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse as _, Response};
use axum::routing::get;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use virt_usb_config::Config;
use virt_usb_config::host_env;
use virt_usb_model::ProjectId;
use virt_usb_store::{Context, Durability, Store};

use crate::hypervisor::Supervised;
use crate::metrics::Metrics;
use crate::publish::peers::Peers;
use crate::timeouts::STORE_LOCK_TIMEOUT;
use error::ApiError;
use identity::{AuthError, Caller, Freshness, Identity, Role};
use inventory::Inventory;
use request::RequestId;
use virt_usb_fleet::http_server::Peer;

pub use listen::{Listening, start};

/// Maximum number of concurrent attach and detach operations, which wait for libvirt.
const TURNS: usize = 8;
/// Maximum number of concurrent calls that wait for disks or for libvirt.
const WORKS: usize = 32;
/// Time that an attach or a detach waits for its turn.
const TURN_TIME: Duration = Duration::from_secs(30);
/// Time after which an attach or a detach gives up its turn, because libvirt may never answer it.
const TURN_LENGTH: Duration = Duration::from_secs(5);
/// Maximum number of operations that take longer and have given up their turn: slightly more than
/// the number of calls that may be unanswered.
const LONG_TURNS: usize = 16;
/// Timeout of a request.
const REQUEST_TIME: Duration = Duration::from_secs(120);

/// Shared state of the API's handlers.
pub struct Api {
    /// Returns the current configuration.
    pub config: Box<dyn Fn() -> Arc<Config> + Send + Sync>,
    /// Connection to the hypervisor.
    pub hypervisor: Arc<Supervised>,
    /// Metrics of the agent.
    pub metrics: Arc<Metrics>,
    /// This host's name.
    pub host: String,
    /// Validator of tokens.
    pub identity: Arc<dyn Identity>,
    inventory: Inventory,
    portal: portal::Portal,
    rates: rate_limit::Rates,
    /// Whether the API is shutting down.
    ending: watch::Sender<bool>,
    works: Arc<Semaphore>,
    turns: Arc<Semaphore>,
}

impl Api {
    /// Creates the state, with the inventory in the configured `state_dir`.
    pub fn new(
        config: Box<dyn Fn() -> Arc<Config> + Send + Sync>,
        hypervisor: Arc<Supervised>,
        metrics: Arc<Metrics>,
        host: String,
        identity: Arc<dyn Identity>,
    ) -> Self {
        let others = config().fleet.as_ref().map(|_| Peers::new(host.clone()));
        let inventory = Inventory::new(config().state_dir.clone(), others);
        let (works, turns) = (Arc::new(Semaphore::new(WORKS)), Arc::new(Semaphore::new(TURNS)));
        Self {
            config,
            hypervisor,
            metrics,
            host,
            identity,
            inventory,
            portal: portal::Portal::default(),
            rates: rate_limit::Rates::default(),
            ending: watch::Sender::default(),
            works,
            turns,
        }
    }

    fn store(&self) -> Result<Store, virt_usb_store::StoreError> {
        Store::open(&(self.config)().state_dir, STORE_LOCK_TIMEOUT, Durability::Power)
    }

    /// Context for changes in the store, which the audit trail attributes to this caller.
    fn context(&self, caller: &Caller) -> Result<Context, ApiError> {
        let context = host_env::context(&(self.config)(), format!("api {}", caller.name));
        context.map_err(|e| ApiError::internal(e.to_string()))
    }

    /// Runs work that waits for disks or for libvirt without blocking other requests. Once begun,
    /// the work completes even if its client disconnects, and keeps its place until then.
    async fn blocking<T: Send + 'static>(
        self: &Arc<Self>,
        work: impl FnOnce(&Self) -> Result<T, ApiError> + Send + 'static,
    ) -> Result<T, ApiError> {
        let api = self.clone();
        let place = self.works.clone().acquire_owned().await;
        let done = tokio::task::spawn_blocking(move || {
            let _place = place;
            work(&api)
        });
        done.await.unwrap_or_else(|e| Err(ApiError::internal(e.to_string())))
    }

    /// Validates a token. An address that sends too many wrong tokens must wait.
    async fn caller(
        &self,
        token: &str,
        peer: Option<Peer>,
        freshness: Freshness,
    ) -> Result<Caller, ApiError> {
        // Guesses must not keep other callers waiting.
        if let Some(Peer::Remote(from)) = peer
            && let Some(wait) = self.rates.waits(from)
            && self.identity.caller(token, Freshness::CachedOnly).await.is_err()
        {
            return Err(wait);
        }
        match (self.identity.caller(token, freshness).await, peer) {
            (Ok(caller), _) => Ok(caller),
            (Err(AuthError::Unavailable(why)), _) => Err(ApiError::cannot_tell(why)),
            (Err(AuthError::Unusable(why)), _) => Err(ApiError::forbidden().saying(why)),
            (Err(AuthError::InvalidToken), Some(Peer::Remote(from))) => {
                self.rates.guess(from)?;
                Err(ApiError::unauthorized())
            }
            (Err(AuthError::InvalidToken), _) => Err(ApiError::unauthorized()),
        }
    }

    /// Counts a change against the caller's rate limit. Reads, and root on the host itself, are
    /// exempt.
    fn limit_changes(
        &self,
        caller: &Caller,
        peer: Option<Peer>,
        method: &Method,
    ) -> Result<(), ApiError> {
        if method.is_safe() || matches!(peer, Some(Peer::Local { .. })) {
            return Ok(());
        }
        self.rates.change(&caller.name)
    }

    /// Runs an attach or detach. The number of concurrent operations is limited, but an operation
    /// that waits long for libvirt gives up its turn. Once begun, an operation completes even if
    /// its client disconnects.
    async fn acting<T: Send + 'static>(
        self: &Arc<Self>,
        work: impl FnOnce(&Self) -> Result<T, ApiError> + Send + 'static,
    ) -> Result<T, ApiError> {
        let turn = Arc::new(Mutex::new(Some(self.turn().await?)));
        let give_back = |turn: &Mutex<Option<_>>| {
            drop(turn.lock().unwrap_or_else(PoisonError::into_inner).take());
        };
        let (api, own_turn) = (self.clone(), turn.clone());
        let done = tokio::task::spawn_blocking(move || {
            let done = work(&api);
            give_back(&own_turn);
            done
        });
        tokio::spawn(async move {
            tokio::time::sleep(TURN_LENGTH).await;
            give_back(&turn);
        });
        done.await.unwrap_or_else(|e| Err(ApiError::internal(e.to_string())))
    }

    async fn turn(&self) -> Result<OwnedSemaphorePermit, ApiError> {
        match tokio::time::timeout(TURN_TIME, self.turns.clone().acquire_owned()).await {
            Ok(Ok(turn)) => Ok(turn),
            _ => Err(ApiError::unavailable(
                "Too many devices are being attached and detached: try again.",
            )),
        }
    }
}

fn router(api: Arc<Api>) -> Router {
    let calls = routes::router()
        .method_not_allowed_fallback(request::no_method)
        .route_layer(from_fn_with_state(api.clone(), authenticate));
    Router::new()
        .nest("/v2/{tenant_id}", calls.clone())
        .nest("/v2.1/{tenant_id}", calls.clone())
        .nest("/v2.1", calls.clone())
        .nest("/v3", calls)
        .route("/openapi.json", get(openapi::show))
        .merge(portal::routes())
        .method_not_allowed_fallback(request::no_method)
        .fallback(request::nowhere)
        .layer(from_fn_with_state(api.clone(), observe))
        .with_state(api)
}

/// Authenticates the caller, and checks the tenant in the path.
async fn authenticate(
    State(api): State<Arc<Api>>,
    path: Result<RawPathParams, RawPathParamsRejection>,
    mut request: Request,
    next: Next,
) -> Response {
    let tokens: Vec<HeaderValue> =
        request.headers().get_all("x-auth-token").iter().cloned().collect();
    let peer = request.extensions().get::<Peer>().copied();
    let caller = match identify(&api, &tokens, peer, freshness(request.method())).await {
        Ok(caller) => caller,
        Err(fault) => {
            let mut response = fault.into_response();
            // A client that cannot authenticate must not keep a connection.
            response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
            return response;
        }
    };
    let allowed = match &path {
        Ok(path) => match path.iter().find(|(name, _)| *name == "tenant_id") {
            Some((_, tenant)) => check_tenant(&caller, tenant),
            None => Ok(()),
        },
        Err(_) => Err(ApiError::bad_request("The path is not UTF-8.")),
    };
    let mut response = match allowed {
        Err(fault) => fault.into_response(),
        Ok(()) => match api.limit_changes(&caller, peer, request.method()) {
            Err(fault) => fault.into_response(),
            Ok(()) => {
                request.extensions_mut().insert(caller.clone());
                next.run(request).await
            }
        },
    };
    response.extensions_mut().insert(caller);
    response
}

/// How fresh the validation of the token must be for a request with this method.
fn freshness(method: &Method) -> Freshness {
    if method.is_safe() { Freshness::Cached } else { Freshness::Live }
}

/// The caller of a request with these values of `X-Auth-Token`.
async fn identify(
    api: &Api,
    tokens: &[HeaderValue],
    peer: Option<Peer>,
    freshness: Freshness,
) -> Result<Caller, ApiError> {
    match (tokens, peer) {
        ([token], _) => {
            let token = token.to_str().map_err(|_| ApiError::unauthorized())?;
            api.caller(token, peer, freshness).await
        }
        ([], Some(Peer::Local { uid })) => {
            Ok(Caller { name: format!("uid {uid}"), project: None, role: Role::Admin })
        }
        // Of several tokens, a proxy in front may have validated a different one.
        _ => Err(ApiError::unauthorized()),
    }
}

/// Checks that the tenant in the path is the caller's project. Root on the host itself has no
/// project, and may name any tenant.
fn check_tenant(caller: &Caller, tenant: &str) -> Result<(), ApiError> {
    let Some(project) = &caller.project else { return Ok(()) };
    let named: Option<ProjectId> = tenant.parse().ok();
    if named.is_some_and(|named| named.is(project)) {
        return Ok(());
    }
    Err(ApiError::bad_request(format!(
        "Malformed request URL: URL's project_id '{tenant}' doesn't match Context's project_id \
            '{project}'."
    )))
}

/// Gives the request an id and a timeout, and logs it.
async fn observe(State(api): State<Arc<Api>>, request: Request, next: Next) -> Response {
    let id = RequestId::new();
    let peer = request.extensions().get::<Peer>().copied();
    let (method, path) = (request.method().clone(), request.uri().path().to_owned());
    let begun = Instant::now();
    api.inventory.wake().await;
    let mut response = match tokio::time::timeout(REQUEST_TIME, next.run(request)).await {
        Ok(response) => response,
        Err(_) => ApiError::unavailable(
            "The request timed out; the operation continues in the background.",
        )
        .into_response(),
    };
    let headers = response.headers_mut();
    if let Ok(value) = HeaderValue::from_str(&id.0) {
        headers.insert(HeaderName::from_static("x-openstack-request-id"), value.clone());
        headers.insert(HeaderName::from_static("x-compute-request-id"), value);
    }
    headers.entry(CACHE_CONTROL).or_insert(HeaderValue::from_static("no-store"));
    headers.insert(X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    let status = response.status().as_u16();
    api.metrics.answered(method.as_str(), status, begun.elapsed());
    let caller = response.extensions().get::<Caller>().map_or("-", |caller| &caller.name);
    let why = response.extensions().get::<ApiError>().and_then(|fault| fault.private.as_deref());
    let ms = u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX);
    let path: String = path.chars().take(256).collect();
    let text = format!("{} {method} {path} {status} by {caller} in {ms} ms", id.0);
    let from = peer.map(|peer| format!("{peer:?}"));
    match (why, method.as_str(), status) {
        (Some(why), ..) => {
            tracing::error!(request_id = id.0, caller, status, from, "{text}: {why}");
        }
        (None, "GET", 200) => tracing::debug!(request_id = id.0, caller, status, from, "{text}"),
        _ => tracing::info!(request_id = id.0, caller, status, from, "{text}"),
    }
    response
}

/// Name of the unix socket in `state_dir`.
const SOCKET: &str = "api.sock";

pub(crate) fn socket(config: &Config) -> PathBuf {
    config.state_dir.join(SOCKET)
}
