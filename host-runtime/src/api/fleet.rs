//! The API of a host in a fleet. It shows the other hosts, and sends requests for their servers to
//! their agents.

use std::sync::Arc;

use axum::http::StatusCode;
use serde_json::{Value, json};
use virt_usb_config::Fleet;
use virt_usb_model::{DeviceRequest, InstanceId};

use super::Api;
use super::actions::{REQUESTS, requests};
use super::authorize::Authorized;
use super::error::ApiError;
use super::identity::{Caller, Role};
use super::policy::Call;
use super::responses::Acted;
use super::servers::perform;
use crate::publish::requests::{self as through, Answer, Doer, Doing, Request, Unanswered};

/// Follows the fleet, and serves the requests of other hosts, until the runtime ends.
pub(super) async fn follow(api: Arc<Api>, fleet: Fleet) {
    let Some(others) = api.inventory.following() else { return };
    let doer: Arc<dyn Doer> = api.clone();
    tokio::join!(others.follow(&fleet), through::serve(fleet.clone(), api.host.clone(), doer));
}

impl Authorized {
    /// Sends the call to the agent of another host, and returns its result.
    pub(super) async fn ask_elsewhere(
        &self,
        host: &str,
        server: InstanceId,
        wanted: &[DeviceRequest],
    ) -> Result<Acted, ApiError> {
        let (api, caller) = (&self.api, self.caller());
        let Some(fleet) = (api.config)().fleet.clone() else {
            return Err(ApiError::unavailable("This host is no longer in a fleet."));
        };
        let request = Request {
            call: if self.call() == Call::Attach { "attach" } else { "detach" }.to_owned(),
            server: server.to_string(),
            usb_devices_requests: serde_json::to_value(wanted).unwrap_or_default(),
            caller: caller.name.clone(),
            project_id: caller.project.as_ref().map(ToString::to_string),
            role: caller.role.to_string(),
            from: api.host.clone(),
        };
        match through::ask(&fleet, host, &request).await {
            Ok(Answer { status: 202, body }) => serde_json::from_value(body).map_err(|e| {
                ApiError::internal(format!(
                    "host {host} has completed the request, but its response cannot be read: {e}"
                ))
            }),
            Ok(Answer { status, body }) => {
                Err(ApiError::of_other(status, body["message"].as_str(), host))
            }
            Err(Unanswered::Unreachable) => Err(ApiError::unavailable(format!(
                "Host {host} is unreachable: nothing was done. Try again when it is back."
            ))),
            Err(Unanswered::Late) => Err(ApiError::unavailable(format!(
                "Host {host} did not begin in time: the request was cancelled."
            ))),
            Err(Unanswered::Unknown) => Err(ApiError::unavailable(format!(
                "Host {host} did not report the result in time. Check which devices the server has."
            ))),
            Err(Unanswered::Etcd(e)) => Err(ApiError::fleet_away(e.to_string())),
        }
    }
}

impl Api {
    /// Handles a request from another host's API as if a local client had made it.
    async fn answer(self: &Arc<Self>, request: &Request) -> Result<Acted, ApiError> {
        let bad = |what: &str| {
            ApiError::bad_request(format!("{what} of a request through etcd cannot be read."))
        };
        let role: Role = request.role.parse().map_err(|_| bad("The role"))?;
        let project = request.project_id.as_deref().map(str::parse).transpose();
        let project = project.map_err(|_| bad("The project"))?;
        let caller = Caller { name: format!("{}@{}", request.caller, request.from), project, role };
        let call = match request.call.as_str() {
            "attach" => Call::Attach,
            "detach" => Call::Detach,
            _ => return Err(bad("The call")),
        };
        self.inventory.wake().await;
        let auth = Authorized::new(self, caller, call)?;
        let server = auth.server(&request.server).await?;
        if let Some(host) = &server.host {
            return Err(ApiError::conflict(format!(
                "Instance {} is on host {host} now.",
                server.id
            )));
        }
        let wanted = requests(REQUESTS, &json!({ REQUESTS: request.usb_devices_requests }))?;
        perform(auth, server, wanted).await
    }

    /// Error that describes the state of a server, after an interrupted agent had begun a request.
    async fn state(self: &Arc<Self>, request: &Request) -> ApiError {
        let id: Option<InstanceId> = request.server.parse().ok();
        let has = self.inventory.now().map(|snapshot| {
            let mine =
                snapshot.own_devices().filter(|r| r.entry.instance_uuid == id && id.is_some());
            mine.map(|r| format!("{} ({})", r.entry.id, r.entry.status)).collect::<Vec<_>>()
        });
        let state = match has {
            Ok(has) if has.is_empty() => "the server has no device".to_owned(),
            Ok(has) => format!("the server has device {}", has.join(", ")),
            Err(_) => "the inventory cannot be read now".to_owned(),
        };
        ApiError::unavailable(format!(
            "The result is unknown: the agent was interrupted, and does not repeat the request. \
             The state is: {state}."
        ))
    }
}

fn answered(result: Result<Acted, ApiError>) -> Answer {
    match result {
        Ok(acted) => {
            let body = serde_json::to_value(acted).unwrap_or(Value::Null);
            Answer { status: StatusCode::ACCEPTED.as_u16(), body }
        }
        Err(fault) => {
            if let Some(why) = &fault.private {
                tracing::error!("{}: {why}", fault.message());
            }
            Answer { status: fault.status().as_u16(), body: json!({ "message": fault.message() }) }
        }
    }
}

impl Doer for Api {
    fn act(self: Arc<Self>, request: Request) -> Doing {
        Box::pin(async move { answered(self.answer(&request).await) })
    }

    fn look(self: Arc<Self>, request: Request) -> Doing {
        Box::pin(async move { answered(Err(self.state(&request).await)) })
    }
}
