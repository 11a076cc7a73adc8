//! The calls of the scheduler. Every response is JSON. An error is `{"error": "…"}`, and never
//! looks like "no host".

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::body::Bytes;
use axum::extract::{DefaultBodyLimit, MatchedPath, Path, Request, State};
use axum::http::{StatusCode, header};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::{delete, get, post};
use axum::{Json, Router};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::json;
use virt_usb_filter_host::{Error, Question, Rejection, Verdict};
use virt_usb_model::{Flavor, ProjectId};

use super::flavors::Flavors;
use super::view::{Chosen, View};

/// Maximum size of a request's body in bytes, enough for the names of a hundred thousand hosts.
const MAX_BODY_BYTES: usize = 8 << 20;
/// Number of hosts in a response, if the request does not set `limit`.
const DEFAULT_LIMIT: u32 = 10;
/// Maximum duration of an assumption, in seconds.
const MAX_ASSUME_SECONDS: u64 = 3600;

struct Service {
    view: Arc<View>,
    flavors: Flavors,
    max_age: Duration,
}

pub(super) fn router(view: Arc<View>, flavors: Flavors, max_age: Duration) -> Router {
    let service = Arc::new(Service { view, flavors, max_age });
    Router::new()
        .route("/select", post(select))
        .route("/explain", post(explain))
        .route("/assumptions", get(assumptions))
        .route("/assumptions/{token}", delete(cancel))
        .route("/health", get(health))
        .route("/metrics", get(metrics))
        .method_not_allowed_fallback(|| async {
            RequestError::new(
                StatusCode::METHOD_NOT_ALLOWED,
                "the method is not allowed here: see docs/src/scheduler.md",
            )
        })
        .fallback(|| async {
            RequestError::new(
                StatusCode::NOT_FOUND,
                "there is /select, /explain, /assumptions, /health and /metrics",
            )
        })
        .layer(DefaultBodyLimit::max(MAX_BODY_BYTES))
        .layer(from_fn_with_state(service.clone(), count))
        .with_state(service)
}

/// Error of a request.
struct RequestError {
    status: StatusCode,
    why: String,
}

impl RequestError {
    fn new(status: StatusCode, why: impl Into<String>) -> Self {
        Self { status, why: why.into() }
    }

    fn bad(why: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, why)
    }
}

impl IntoResponse for RequestError {
    fn into_response(self) -> Response {
        (self.status, Json(json!({ "error": self.why }))).into_response()
    }
}

impl From<Error> for RequestError {
    fn from(e: Error) -> Self {
        match e {
            Error::Refused(why) => Self::bad(why),
            broken @ Error::Broken { .. } => {
                tracing::error!("{broken}");
                Self::new(StatusCode::INTERNAL_SERVER_ERROR, broken.to_string())
            }
        }
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Select {
    flavor: serde_json::Value,
    project: Option<String>,
    hosts: Option<Vec<String>>,
    limit: Option<u32>,
    /// Duration of the assumption in seconds.
    assume: Option<u64>,
}

#[derive(Serialize)]
struct Selected {
    /// Number of hosts that can serve the flavor, including those beyond `limit`.
    matched: u32,
    placements: Vec<Chosen>,
    #[serde(skip_serializing_if = "Option::is_none")]
    token: Option<String>,
    /// Number of hosts by the reason why they cannot serve. Empty if a host can.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    reasons: BTreeMap<String, usize>,
    /// Number of known hosts.
    hosts: usize,
    /// Age of the fleet view in seconds.
    age: u64,
}

async fn select(
    State(service): State<Arc<Service>>,
    body: Bytes,
) -> Result<Json<Selected>, RequestError> {
    let request: Select = read(&body)?;
    let question = service.question(&request.flavor, request.project.as_deref())?;
    if request.assume.is_some_and(|seconds| !(1..=MAX_ASSUME_SECONDS).contains(&seconds)) {
        return Err(RequestError::bad(format!("assume: wanted 1 to {MAX_ASSUME_SECONDS} seconds")));
    }
    let age = service.check_age()?;
    let assume = request.assume.map(Duration::from_secs);
    let limit = request.limit.unwrap_or(DEFAULT_LIMIT);
    let candidates = request.hosts.as_deref();
    let answer = tokio::task::block_in_place(|| {
        let selected = service.view.select(&question, candidates, limit, assume)?;
        let mut reasons = BTreeMap::new();
        if selected.matched == 0 {
            let candidates = candidates.map(|hosts| hosts.iter().collect::<HashSet<_>>());
            let is_candidate =
                |host: &String| candidates.as_ref().is_none_or(|hosts| hosts.contains(host));
            for (_, why) in
                service.view.rejected(&question)?.into_iter().filter(|(host, _)| is_candidate(host))
            {
                *reasons.entry(why.reason.name().to_owned()).or_default() += 1;
            }
        }
        Ok::<_, Error>((selected, reasons))
    });
    let (selected, reasons) = answer?;
    Ok(Json(Selected {
        matched: selected.matched,
        placements: selected.chosen,
        token: selected.token,
        reasons,
        hosts: service.view.hosts(),
        age: age.as_secs(),
    }))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Explain {
    flavor: serde_json::Value,
    project: Option<String>,
    host: Option<String>,
}

#[derive(Serialize)]
struct Explained {
    /// Verdict about each host.
    verdicts: BTreeMap<String, ExplainedVerdict>,
    age: u64,
}

#[derive(Serialize)]
struct ExplainedVerdict {
    #[serde(flatten)]
    verdict: Verdict,
    /// Reason of a rejection, in words.
    #[serde(skip_serializing_if = "Option::is_none")]
    because: Option<String>,
}

impl ExplainedVerdict {
    fn new(verdict: Verdict) -> Self {
        let because = match &verdict {
            Verdict::Rejected(why) => Some(why.to_string()),
            Verdict::Accepted { .. } => None,
        };
        Self { verdict, because }
    }
}

/// Explains the verdict about one host, or about all hosts that cannot serve the flavor.
async fn explain(
    State(service): State<Arc<Service>>,
    body: Bytes,
) -> Result<Json<Explained>, RequestError> {
    let request: Explain = read(&body)?;
    let question = service.question(&request.flavor, request.project.as_deref())?;
    let age = service.check_age()?.as_secs();
    let verdicts = tokio::task::block_in_place(|| match &request.host {
        Some(host) => {
            let verdict = service.view.explain(&question, host)?;
            Ok::<_, Error>(BTreeMap::from([(host.clone(), ExplainedVerdict::new(verdict))]))
        }
        None => {
            let explained = |(host, why): (String, Rejection)| {
                (host, ExplainedVerdict::new(Verdict::Rejected(why)))
            };
            Ok(service.view.rejected(&question)?.into_iter().map(explained).collect())
        }
    })?;
    Ok(Json(Explained { verdicts, age }))
}

async fn assumptions(State(service): State<Arc<Service>>) -> Response {
    Json(json!({ "assumptions": service.view.assumed() })).into_response()
}

async fn cancel(State(service): State<Arc<Service>>, Path(token): Path<String>) -> Response {
    match service.view.cancel(&token) {
        Some(_) => StatusCode::NO_CONTENT.into_response(),
        None => RequestError::new(
            StatusCode::NOT_FOUND,
            "there is no such token: it has expired, or its host has published its devices since",
        )
        .into_response(),
    }
}

async fn health(State(service): State<Arc<Service>>) -> Response {
    let sync = service.view.sync().clone();
    let (age, hosts) = (service.view.age(), service.view.hosts());
    let ready = sync.listed && age <= service.max_age;
    let status = if ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    let body = json!({
        "ready": ready,
        "hosts": hosts,
        "age": age.as_secs(),
        "disconnected": sync.disconnected.map(|(_, why)| why),
        "refused": sync.refused,
    });
    (status, Json(body)).into_response()
}

async fn metrics(State(service): State<Arc<Service>>) -> Response {
    let (view, metrics) = (&service.view, &service.view.metrics);
    let whole = |n: usize| i64::try_from(n).unwrap_or(i64::MAX);
    metrics.hosts.set(whole(view.hosts()));
    metrics.assumed.set(whole(view.assumed().len()));
    metrics.connected.set(i64::from(view.sync().disconnected.is_none()));
    let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    ([(header::CONTENT_TYPE, kind)], metrics.text()).into_response()
}

impl Service {
    /// Parses a request's flavor and project. The flavor is a JSON object as in `flavor set`, its
    /// list of devices alone, or the name of a flavor of the fleet.
    fn question(
        &self,
        flavor: &serde_json::Value,
        project: Option<&str>,
    ) -> Result<Question, RequestError> {
        let text = flavor.to_string();
        let read = match flavor {
            serde_json::Value::Array(_) => Flavor::parse_lists(Some(&text), None),
            serde_json::Value::String(name) => {
                let name = name.strip_prefix('@').unwrap_or(name);
                let none = || match self.flavors.listed() {
                    true => RequestError::new(
                        StatusCode::NOT_FOUND,
                        format!("the fleet has no flavor named {name:?}"),
                    ),
                    false => RequestError::new(
                        StatusCode::SERVICE_UNAVAILABLE,
                        "the fleet's flavors are not known yet",
                    ),
                };
                self.flavors.find(name).ok_or_else(none)?
            }
            _ => Flavor::parse(&text),
        };
        let flavor = read.map_err(|e| RequestError::bad(format!("flavor: {e}")))?;
        let project: Option<ProjectId> = project
            .map(str::parse)
            .transpose()
            .map_err(|e| RequestError::bad(format!("project: {e}")))?;
        Ok(Question { project, ..Question::new(flavor) })
    }

    /// Returns the age of the fleet view.
    ///
    /// # Errors
    /// If the view is incomplete, or older than `--max-age`.
    fn check_age(&self) -> Result<Duration, RequestError> {
        let sync = self.view.sync().clone();
        let disconnected = sync.disconnected.map(|(since, why)| (since.elapsed(), why));
        let unavailable =
            |why: String| Err(RequestError::new(StatusCode::SERVICE_UNAVAILABLE, why));
        match disconnected {
            Some((_, why)) if !sync.listed => {
                unavailable(format!("the fleet is not known yet: {why}"))
            }
            Some((age, why)) if age > self.max_age => {
                unavailable(format!("no connection to the fleet for {} s: {why}", age.as_secs()))
            }
            Some((age, _)) => Ok(age),
            None => Ok(Duration::ZERO),
        }
    }
}

fn read<T: DeserializeOwned>(body: &[u8]) -> Result<T, RequestError> {
    let wrong =
        |e: &dyn std::fmt::Display| RequestError::bad(format!("the body cannot be read: {e}"));
    let text = str::from_utf8(body).map_err(|e| wrong(&e))?;
    let value = virt_usb_model::unique_json(text).map_err(|e| wrong(&e))?;
    serde_json::from_value(value).map_err(|e| wrong(&e))
}

/// Counts requests by path and status.
async fn count(
    State(service): State<Arc<Service>>,
    path: Option<MatchedPath>,
    request: Request,
    next: Next,
) -> Response {
    let begun = Instant::now();
    let path = match path.as_ref().map(MatchedPath::as_str) {
        Some("/select") => "/select",
        Some("/explain") => "/explain",
        Some("/assumptions" | "/assumptions/{token}") => "/assumptions",
        Some(_) => "/health",
        None => "other",
    };
    let response = next.run(request).await;
    service.view.metrics.answered(path, response.status().as_u16(), begun.elapsed().as_secs_f64());
    response
}
