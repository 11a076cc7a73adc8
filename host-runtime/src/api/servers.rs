//! Servers: what they have, attach, detach.

use std::collections::HashSet;
use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use utoipa::ToSchema;
use virt_usb_model::{DeviceRequest, Flavor, InstanceId, ProjectId, Selector};
use virt_usb_store::claim::{Shortage, Why};
use virt_usb_store::{Record, StoreError};

use super::Api;
use super::devices::missing;
use super::documents::UsbDevice;
use super::fault::{Fault, sentence};
use super::identity::Caller;
use super::inventory::Snapshot;
use super::openapi::ServerActionRequest;
use super::policy::{Call, Verdict, may, may_know_holder, may_with_server};
use super::request::{Asks, Content, Named, action, object};
use crate::agent::operate::{Attached, OperateError};
use crate::agent::work::Worker;

/// A path's server.
#[derive(Deserialize)]
pub(super) struct ServerName {
    pub(super) server_id: String,
}

/// A server that the caller may know of.
#[derive(Debug, Clone)]
pub(super) struct Server {
    pub(super) id: InstanceId,
    pub(super) name: String,
    pub(super) running: bool,
}

fn no_server(id: &str) -> Fault {
    Fault::not_found(format!("Instance {id} could not be found."))
}

impl Api {
    /// The server, where the caller may do this with it.
    pub(super) async fn server(
        self: &Arc<Self>,
        caller: &Caller,
        call: Call,
        name: &str,
    ) -> Result<Server, Fault> {
        // Who may not do it at all hears so, whether there is such a server or not.
        Fault::unless(may(caller, call), || no_server(name))?;
        let id: InstanceId = name.parse().map_err(|_| no_server(name))?;
        let found = self.blocking(move |api| api.find(id)).await?;
        let Some((server, owner)) = found else { return Err(no_server(name)) };
        Fault::unless(may_with_server(caller, call, owner.as_ref()), || no_server(name))?;
        Ok(server)
    }

    /// The servers that the caller may know of, by name.
    pub(super) async fn servers(self: &Arc<Self>, caller: &Caller) -> Result<Vec<Server>, Fault> {
        Fault::unless(may(caller, Call::LookAt), Fault::forbidden)?;
        let caller = caller.clone();
        let found = self.blocking(move |api| {
            let running: HashSet<InstanceId> = api.hypervisor.running()?.into_iter().collect();
            let mut found = Vec::new();
            for id in api.hypervisor.all()? {
                // One that has gone meanwhile, or whose XML cannot be read, is nobody's.
                let Some(xml) = api.hypervisor.xml(id)? else { continue };
                let Ok(domain) = virt_usb_domxml::read(xml.as_bytes()) else { continue };
                if may_with_server(&caller, Call::LookAt, domain.project.as_ref()) == Verdict::Allowed {
                    found.push(Server { id, name: domain.name, running: running.contains(&id) });
                }
            }
            found.sort_by(|a, b| (&a.name, a.id).cmp(&(&b.name, b.id)));
            Ok(found)
        });
        found.await
    }

    /// The server and whose it is; of one that libvirt does not know any more what it still holds tells.
    fn find(&self, id: InstanceId) -> Result<Option<(Server, Option<ProjectId>)>, Fault> {
        let running = self.hypervisor.look(id)?.is_some();
        if let Some(xml) = self.hypervisor.xml(id)? {
            let domain = virt_usb_domxml::read(xml.as_bytes())
                .map_err(|e| Fault::internal(format!("cannot read the domain's XML: {e}")))?;
            return Ok(Some((Server { id, name: domain.name, running }, domain.project)));
        }
        let snapshot = self.inventory.now()?;
        let held = snapshot.devices.iter().find(|r| r.entry.instance_uuid == Some(id));
        let claim = held.and_then(|r| snapshot.claim(r.entry.id));
        Ok(claim.map(|claim| {
            let owner = claim.project_id.as_deref().and_then(|project| project.parse().ok());
            (Server { id, name: claim.domain.clone(), running }, owner)
        }))
    }
}

#[derive(Serialize, ToSchema)]
#[schema(as = Server)]
pub(super) struct Shown {
    server: Described,
}

/// What came of an action.
#[derive(Serialize, ToSchema)]
#[schema(as = ServerAction)]
pub(super) struct Acted {
    /// Those that were attached or detached, as they are now.
    pub(super) usb_devices: Vec<UsbDevice>,
    /// Whether the server runs; if not, what is attached comes at its next start.
    pub(super) live: bool,
}

#[derive(Serialize, ToSchema)]
#[schema(as = ServerDetail)]
struct Described {
    #[schema(value_type = String)]
    id: InstanceId,
    name: String,
    /// As Nova has it: `ACTIVE`, `SHUTOFF`.
    status: &'static str,
    usb_devices: Vec<UsbDevice>,
    /// What it is to have at each start, whoever is free then.
    #[schema(value_type = Vec<super::openapi::UsbDeviceRequest>)]
    usb_devices_requests: Vec<DeviceRequest>,
}

/// What a server has, and is to have
#[utoipa::path(get, path = "/servers/{server_id}/os-usb-devices", tag = "servers", operation_id = "show_server_usb_devices",
    params(("server_id" = String, Path, description = "The server's UUID")),
    responses((status = 200, description = "The server", body = Shown)))]
pub(super) async fn show(
    State(api): State<Arc<Api>>,
    Asks(caller): Asks,
    Named(ServerName { server_id }): Named<ServerName>,
) -> Result<Json<Shown>, Fault> {
    let server = api.server(&caller, Call::LookAt, &server_id).await?;
    let snapshot = api.inventory.now()?;
    let id = server.id;
    let mine = snapshot.devices.iter().filter(|r| r.entry.instance_uuid == Some(id));
    let usb_devices = mine.map(|record| snapshot.shown(record, &caller)).collect();
    let assigned = api.blocking(move |api| Ok(api.store()?.assignments(id)?)).await?;
    let described = Described {
        id,
        name: server.name,
        status: if server.running { "ACTIVE" } else { "SHUTOFF" },
        usb_devices,
        usb_devices_requests: assigned.into_iter().map(|a| a.request).collect(),
    };
    Ok(Json(Shown { server: described }))
}

/// Attach or detach devices, all or nothing
///
/// On a server that runs it is done when it is answered; on one that does not it counts from its next start.
#[utoipa::path(post, path = "/servers/{server_id}/action", tag = "servers", operation_id = "act_on_server",
    params(("server_id" = String, Path, description = "The server's UUID")),
    request_body = ServerActionRequest,
    responses((status = 202, description = "Done", body = Acted)))]
pub(super) async fn act(
    State(api): State<Arc<Api>>,
    Asks(caller): Asks,
    Named(ServerName { server_id }): Named<ServerName>,
    Content(content): Content,
) -> Result<(StatusCode, Json<Acted>), Fault> {
    let (name, value) = action(&content)?;
    let call = match name {
        "attach_usb_devices" => Call::Attach,
        "detach_usb_devices" => Call::Detach,
        other => return Err(Fault::bad_request(format!("There is no such action: {other}."))),
    };
    // Before the body is looked at: who may not do it has nothing to learn from its mistakes.
    let server = api.server(&caller, call, &server_id).await?;
    let requests = requests(name, value)?;
    perform(&api, caller, call, server, requests).await.map(|acted| (StatusCode::ACCEPTED, Json(acted)))
}

/// Attaches to or detaches from a server that the caller may do this with.
pub(super) async fn perform(
    api: &Arc<Api>,
    caller: Caller,
    call: Call,
    server: Server,
    requests: Vec<DeviceRequest>,
) -> Result<Acted, Fault> {
    // What is detached is the server's own, though its device be unplugged or another's by now.
    if call == Call::Attach {
        visible(api, &caller, call, &requests, &server)?;
    }
    let turn = api.turn().await?;
    let done = api.blocking(move |api| {
        let _turn = turn;
        match call {
            Call::Attach => attach(api, &caller, &server, &requests),
            _ => detach(api, &caller, &server, &requests),
        }
    });
    done.await
}

fn requests(name: &str, value: &Value) -> Result<Vec<DeviceRequest>, Fault> {
    const KEY: &str = "usb_devices_requests";
    let object = object(value, name, &[KEY])?;
    let Some(Value::Array(list)) = object.get(KEY) else {
        return Err(Fault::bad_request(format!("{name} wants a list: {{\"{KEY}\":[{{\"id\":1}}]}}.")));
    };
    if list.is_empty() {
        return Err(Fault::bad_request(format!("{KEY} is empty.")));
    }
    let text = Value::Array(list.clone()).to_string();
    let flavor = Flavor::parse_lists(Some(&text), None)
        .map_err(|e| Fault::bad_request(sentence(&e.to_string().replacen("usb_devices", KEY, 1))))?;
    Ok(flavor.usb_devices)
}

/// A device that is named by its id must be there for the caller, and not only for virt-usb.
fn visible(
    api: &Api,
    caller: &Caller,
    call: Call,
    requests: &[DeviceRequest],
    server: &Server,
) -> Result<(), Fault> {
    let snapshot = api.inventory.now()?;
    for id in requests.iter().filter_map(|r| r.selector.id) {
        let Some(record) = snapshot.device(id) else { return Err(missing(id)) };
        // What one's server has is never hidden.
        if record.entry.instance_uuid != Some(server.id) {
            Fault::unless(snapshot.may(caller, call, record), || missing(id))?;
        }
    }
    Ok(())
}

fn attach(api: &Api, caller: &Caller, server: &Server, requests: &[DeviceRequest]) -> Result<Acted, Fault> {
    let given = api.worker(caller)?.give(server.id, requests);
    let Attached { live, new, already } = given.map_err(|e| fault(api, caller, server, e))?;
    answer(api, caller, live, new.iter().chain(&already))
}

fn detach(api: &Api, caller: &Caller, server: &Server, requests: &[DeviceRequest]) -> Result<Acted, Fault> {
    if let Some(request) = requests.iter().find(|r| r.count != 1) {
        return Err(Fault::bad_request(format!(
            "{request}: each request names one device: leave count out."
        )));
    }
    let selectors: Vec<Selector> = requests.iter().map(|r| r.selector.clone()).collect();
    let taken = api.worker(caller)?.take(server.id, &selectors);
    let taken = taken.map_err(|e| fault(api, caller, server, e))?;
    answer(api, caller, server.running, taken.iter().flatten())
}

/// The devices as they are now.
fn answer<'a>(
    api: &Api,
    caller: &Caller,
    live: bool,
    devices: impl Iterator<Item = &'a Record>,
) -> Result<Acted, Fault> {
    let snapshot = api.inventory.now()?;
    let now = devices.map(|was| snapshot.shown(snapshot.device(was.entry.id).unwrap_or(was), caller));
    Ok(Acted { usb_devices: now.collect(), live })
}

impl Api {
    fn worker(&self, caller: &Caller) -> Result<Worker, StoreError> {
        let actor = format!("api {}", caller.name);
        Worker::open((self.config)(), self.hypervisor.clone(), self.metrics.clone(), &actor)
    }
}

fn fault(api: &Api, caller: &Caller, server: &Server, e: OperateError) -> Fault {
    match e {
        OperateError::Refused(why) => Fault::conflict(sentence(&why)),
        OperateError::Nothing(_) => {
            Fault::not_found(format!("Instance {} has no such USB device, and none assigned.", server.id))
        }
        OperateError::Short { short, .. } => {
            let snapshot = api.inventory.now().unwrap_or_default();
            let told: Vec<String> = short.iter().map(|s| shortage(&snapshot, caller, s)).collect();
            Fault::conflict(told.join(" "))
        }
        OperateError::Work(e) => e.into(),
    }
}

/// What stands in the way of a request, as far as the caller may know of it.
fn shortage(snapshot: &Snapshot, caller: &Caller, short: &Shortage) -> String {
    let obstacles: Vec<String> = short
        .matching
        .iter()
        .filter(|o| snapshot.sees(caller, &o.device))
        .map(|o| {
            let device = format!("USB device {}", o.device.entry.id);
            match &o.why {
                Why::HeldBy(claim) if may_know_holder(caller, claim) => format!(
                    "{device} is held by instance {} ({}) since {}",
                    claim.instance_uuid, claim.domain, claim.created_at
                ),
                Why::HeldBy(_) => format!("{device} is in use"),
                Why::OtherRequest => format!("{device} serves another request of this instance"),
                Why::NotThere(_) => format!("{device} is not plugged in"),
                Why::Project => format!("{device} is given to certain projects only"),
                Why::Unavailable => {
                    let reason = o.device.entry.status_reason.as_deref().unwrap_or("not offered");
                    format!("{device} is unavailable ({reason})")
                }
            }
        })
        .collect();
    let request = &short.request;
    if obstacles.is_empty() {
        format!("No USB device that can be had matches {request}.")
    } else {
        format!("No USB device that can be had matches {request}: {}.", obstacles.join("; "))
    }
}
