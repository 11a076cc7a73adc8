//! API calls for servers: their devices, attach and detach, and their owner.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::SystemTime;

use axum::Json;
use axum::http::StatusCode;
use axum::response::{IntoResponse as _, Response};
use jiff::Timestamp;
use serde::Deserialize;
use utoipa::IntoParams;
use virt_usb_domxml::Domain;
use virt_usb_model::{DeviceRequest, InstanceId, ProjectId, Selector};
use virt_usb_store::claim::{Obstacle, Shortage, Why};
use virt_usb_store::{Record, StoreError};

use super::Api;
use super::actions::ServerAction;
use super::authorize::Authorized;
use super::devices::missing;
use super::error::{ApiError, sentence};
use super::identity::Caller;
use super::inventory::Snapshot;
use super::policy::{Authorization, Call, may_know_holder, may_with_server};
use super::request::{Asked, Content, Named, action};
use super::request_schemas::ServerActionRequest;
use super::responses::{
    Acted, Owners, ServerDetail as Described, ServerShown as Shown, ServerSummary as Listed,
    Servers, UsbOwner,
};
use crate::agent::operate::{Attached, OperateError};
use crate::agent::work::Worker;
use crate::hypervisor::{Hypervisor as _, Known};
use crate::publish::peers::{self, Peer};

/// Server in the path of a request.
#[derive(Deserialize)]
pub(super) struct ServerName {
    pub(super) server_id: String,
}

/// A server that the caller may see.
#[derive(Debug, Clone)]
pub(super) struct Server {
    pub(super) id: InstanceId,
    pub(super) name: String,
    pub(super) running: bool,
    /// Owner project, if known.
    pub(super) owner: Option<ProjectId>,
    /// Whether the domain itself names the owner.
    pub(super) by_domain: bool,
    /// Name of the server's host, if that is another host than this one.
    pub(super) host: Option<String>,
    /// Time at which this host asked libvirt about the server.
    pub(super) seen: Option<Timestamp>,
}

impl Server {
    fn new(id: InstanceId, domain: &Domain, running: bool, snapshot: &Snapshot) -> Self {
        let by_domain = domain.project.is_some();
        let owner = domain.project.clone().or_else(|| snapshot.owner(id).cloned());
        let seen = moment(SystemTime::now());
        Self { id, name: domain.name.clone(), running, owner, by_domain, host: None, seen }
    }

    /// A server in the last known state.
    fn known(known: &Known, snapshot: &Snapshot) -> Self {
        let seen = moment(known.seen);
        Self { seen, ..Self::new(known.instance, &known.domain, known.running, snapshot) }
    }

    fn elsewhere(host: &Peer, server: &peers::Server) -> Self {
        let peers::Server { id, ref name, running, by_domain, .. } = *server;
        let (name, owner) = (name.clone(), server.project.clone());
        Self { id, name, running, owner, by_domain, host: Some(host.name.clone()), seen: None }
    }

    /// Status in Nova's terms.
    const fn status(&self) -> &'static str {
        if self.running { "ACTIVE" } else { "SHUTOFF" }
    }
}

/// A time in milliseconds, like all times of the API.
fn moment(time: SystemTime) -> Option<Timestamp> {
    Timestamp::try_from(time).ok()?.round(jiff::Unit::Millisecond).ok()
}

fn no_server(id: &str) -> ApiError {
    ApiError::not_found(format!("Instance {id} could not be found."))
}

impl Authorized {
    /// The server with this UUID.
    ///
    /// # Errors
    /// 404 if there is no such server, or if the caller may not make the call for it.
    pub(super) async fn server(&self, name: &str) -> Result<Server, ApiError> {
        let (api, call) = (&self.api, self.call());
        let id: InstanceId = name.parse().map_err(|_| no_server(name))?;
        // A read-only call does not wait for libvirt.
        let known = api.hypervisor.guest(id).filter(|_| call == Call::LookAt);
        let found = match known {
            Some(known) => Some(Server::known(&known, &*api.inventory.now()?)),
            None => api.blocking(move |api| api.find(id)).await?,
        };
        let Some(server) = found else { return Err(no_server(name)) };
        let verdict = may_with_server(self.caller(), call, server.owner.as_ref());
        ApiError::unless(verdict, || no_server(name))?;
        Ok(server)
    }

    /// The servers that the caller may make the call for, by name.
    ///
    /// # Errors
    /// 503 if libvirt has not listed this host's servers yet.
    pub(super) fn servers(&self) -> Result<Vec<Server>, ApiError> {
        let is_visible = |server: &Server| {
            may_with_server(self.caller(), self.call(), server.owner.as_ref())
                == Authorization::Allowed
        };
        let Some(known) = self.api.hypervisor.known() else {
            return Err(ApiError::unavailable(
                "The servers of this host are not known yet: try again.",
            ));
        };
        let snapshot = self.api.inventory.now()?;
        let mut found: Vec<Server> =
            known.iter().map(|known| Server::known(known, &snapshot)).collect();
        let here: HashSet<InstanceId> = found.iter().map(|server| server.id).collect();
        for other in snapshot.others.values() {
            let servers = other.servers.iter().filter(|server| !here.contains(&server.id));
            found.extend(servers.map(|server| Server::elsewhere(other, server)));
        }
        found.retain(is_visible);
        found.sort_by(|a, b| (&a.name, a.id).cmp(&(&b.name, b.id)));
        Ok(found)
    }
}

impl Api {
    /// Requests that are assigned to the server at each start, with their times, if known.
    pub(super) async fn assigned(
        self: &Arc<Self>,
        server: &Server,
    ) -> Result<Vec<(DeviceRequest, Option<String>)>, ApiError> {
        let id = server.id;
        if server.host.is_some() {
            let snapshot = self.inventory.now()?;
            let requests = snapshot.other_server(id).map(|(_, server)| server.requests.clone());
            return Ok(requests
                .unwrap_or_default()
                .into_iter()
                .map(|request| (request, None))
                .collect());
        }
        let assigned = self.blocking(move |api| Ok(api.store()?.assignments(id)?)).await?;
        Ok(assigned.into_iter().map(|a| (a.request, Some(a.created_at))).collect())
    }

    /// Finds the server. If libvirt no longer knows it, its claims describe it.
    fn find(&self, id: InstanceId) -> Result<Option<Server>, ApiError> {
        let running = self.hypervisor.look(id)?.is_some();
        let snapshot = self.inventory.now()?;
        if let Some(xml) = self.hypervisor.xml(id)? {
            let domain = virt_usb_domxml::read(xml.as_bytes())
                .map_err(|e| ApiError::internal(format!("cannot read the domain's XML: {e}")))?;
            return Ok(Some(Server::new(id, &domain, running, &snapshot)));
        }
        let held = snapshot.own_devices().find(|r| r.entry.instance_uuid == Some(id));
        if let Some(claim) = held.and_then(|r| snapshot.claim(r.entry.id)) {
            let owner = claim.claimant().project;
            let by_domain = owner.is_some() && snapshot.owner(id).is_none();
            return Ok(Some(Server {
                id,
                name: claim.domain.clone(),
                running,
                owner,
                by_domain,
                host: None,
                seen: None,
            }));
        }
        Ok(snapshot.other_server(id).map(|(other, server)| Server::elsewhere(other, server)))
    }
}

impl From<Server> for Listed {
    fn from(server: Server) -> Self {
        let status = server.status().to_owned();
        Self {
            id: server.id,
            name: server.name,
            status,
            project_id: server.owner,
            seen_at: server.seen.map(|seen| seen.to_string()),
        }
    }
}

/// Filter of the list of servers.
#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct Query {
    /// Exact name of the server.
    name: Option<String>,
}

/// Servers, by name
#[utoipa::path(get, path = "/servers", tag = "servers",
    operation_id = "list_servers", params(Query),
    responses((status = 200, description = "The servers", body = Servers)))]
pub(super) async fn list(
    auth: Authorized,
    Asked(query): Asked<Query>,
) -> Result<Json<Servers>, ApiError> {
    let mut servers = auth.servers()?;
    servers.retain(|server| query.name.as_ref().is_none_or(|name| *name == server.name));
    Ok(Json(Servers { servers: servers.into_iter().map(Listed::from).collect() }))
}

/// List the owners that administrators have set: for administrators
#[utoipa::path(get, path = "/os-usb-owners", tag = "servers",
    operation_id = "list_usb_owners",
    responses((status = 200, description = "The owners", body = Owners)))]
pub(super) async fn owners(auth: Authorized, (): ()) -> Result<Json<Owners>, ApiError> {
    let owners = auth.api.blocking(|api| Ok(api.store()?.owners()?)).await?;
    Ok(Json(Owners { usb_owners: owners.into_iter().map(UsbOwner::from).collect() }))
}

/// Show a server with its devices and requests
#[utoipa::path(get, path = "/servers/{server_id}/os-usb-devices", tag = "servers",
    operation_id = "show_server_usb_devices",
    params(("server_id" = String, Path, description = "The server's UUID")),
    responses((status = 200, description = "The server", body = Shown)))]
pub(super) async fn show(
    auth: Authorized,
    Named(ServerName { server_id }): Named<ServerName>,
) -> Result<Json<Shown>, ApiError> {
    let server = auth.server(&server_id).await?;
    describe(&auth, server).await.map(Json)
}

async fn describe(auth: &Authorized, server: Server) -> Result<Shown, ApiError> {
    let (api, caller) = (&auth.api, auth.caller());
    let snapshot = api.inventory.now()?;
    let id = server.id;
    let mine = snapshot.devices().filter(|r| r.entry.instance_uuid == Some(id));
    let usb_devices = mine.map(|record| snapshot.shown(record, caller)).collect();
    let usb_devices_requests =
        api.assigned(&server).await?.into_iter().map(|(request, _)| request).collect();
    Ok(Shown { server: Described { listed: server.into(), usb_devices, usb_devices_requests } })
}

/// Attach or detach devices, all or nothing; set the owner of a server
///
/// On a running server, an attach is complete when the response is sent. On a stopped server, it
/// takes effect at the next start. Administrators set the owner of a server whose domain names
/// none.
#[utoipa::path(post, path = "/servers/{server_id}/action", tag = "servers",
    operation_id = "act_on_server",
    params(("server_id" = String, Path, description = "The server's UUID")),
    request_body = ServerActionRequest,
    responses((status = 202, description = "Devices are attached or detached", body = Acted),
        (status = 200, description = "The server and its owner", body = Shown)))]
pub(super) async fn act(
    auth: Authorized,
    (Named(ServerName { server_id }), Content(content)): ActionInput,
) -> Result<Response, ApiError> {
    let server = auth.server(&server_id).await?;
    // The content is parsed last: it reveals nothing to a caller who may not act on the server.
    let (name, value) = action(&content)?;
    let project = match ServerAction::read(name, value)? {
        ServerAction::Attach(requests) | ServerAction::Detach(requests) => {
            let acted = perform(auth, server, requests).await?;
            return Ok((StatusCode::ACCEPTED, Json(acted)).into_response());
        }
        ServerAction::SetOwner(project) => Some(project),
        ServerAction::ClearOwner => None,
    };
    let server = give_to(&auth, server, project).await?;
    Ok(Json(describe(&auth, server).await?).into_response())
}

/// Server and body of an action.
type ActionInput = (Named<ServerName>, Content);

/// Name of the action, which determines the role that it requires.
pub(super) fn action_name((_, Content(content)): &ActionInput) -> Result<&str, ApiError> {
    Ok(action(content)?.0)
}

/// Sets the owner of a server, or removes it with `None`.
pub(super) async fn give_to(
    auth: &Authorized,
    server: Server,
    project: Option<ProjectId>,
) -> Result<Server, ApiError> {
    if let Some(host) = &server.host {
        return Err(ApiError::conflict(format!(
            "Instance {} is on host {host}: set its owner there.",
            server.id
        )));
    }
    if let (true, Some(owner)) = (server.by_domain, &server.owner) {
        return Err(ApiError::conflict(format!(
            "The domain of instance {} names project {owner} as its owner: an owner set here \
             would have no effect.",
            server.id
        )));
    }
    let caller = auth.caller().clone();
    let given = auth.api.blocking(move |api| {
        api.store()?.set_owner(
            server.id,
            &server.name,
            project.as_ref(),
            &api.context(&caller)?,
        )?;
        Ok(Server { owner: project, ..server })
    });
    given.await
}

/// Attaches devices to the server or detaches them, as the call says. The server is one that
/// [`Authorized::server`] has returned.
pub(super) async fn perform(
    auth: Authorized,
    server: Server,
    requests: Vec<DeviceRequest>,
) -> Result<Acted, ApiError> {
    // A server's own device can be detached even if it is unplugged, or no longer visible.
    if auth.call() == Call::Attach {
        visible(&auth, &requests, &server)?;
    }
    if let Some(host) = &server.host {
        return auth.ask_elsewhere(host, server.id, &requests).await;
    }
    let api = auth.api.clone();
    api.acting(move |api| match auth.call() {
        Call::Attach => attach(api, auth.caller(), &server, &requests),
        _ => detach(api, auth.caller(), &server, &requests),
    })
    .await
}

/// Checks that the caller may see each device that a request names by its id.
fn visible(auth: &Authorized, requests: &[DeviceRequest], server: &Server) -> Result<(), ApiError> {
    let snapshot = auth.api.inventory.now()?;
    for id in requests.iter().filter_map(|r| r.selector.id) {
        let Some(record) = snapshot.device(id) else { return Err(missing(id)) };
        // The devices of the caller's own server are always visible.
        if record.entry.instance_uuid != Some(server.id) {
            let verdict = snapshot.may(auth.caller(), auth.call(), record);
            ApiError::unless(verdict, || missing(id))?;
        }
    }
    Ok(())
}

fn attach(
    api: &Api,
    caller: &Caller,
    server: &Server,
    requests: &[DeviceRequest],
) -> Result<Acted, ApiError> {
    let given = api.worker(caller)?.give(server.id, requests);
    let Attached { live, new, already } = given.map_err(|e| fault(api, caller, server, e))?;
    let had = already.iter().map(|record| record.entry.id.get()).collect();
    answer(api, caller, live, new.iter().chain(&already), had)
}

fn detach(
    api: &Api,
    caller: &Caller,
    server: &Server,
    requests: &[DeviceRequest],
) -> Result<Acted, ApiError> {
    if let Some(request) = requests.iter().find(|r| r.count != 1) {
        return Err(ApiError::bad_request(format!(
            "{request}: each request is for one device: omit count."
        )));
    }
    let selectors: Vec<Selector> = requests.iter().map(|r| r.selector.clone()).collect();
    let taken = api.worker(caller)?.take(server.id, &selectors);
    let taken = taken.map_err(|e| match e {
        OperateError::Nothing(_) => {
            let named: Vec<String> = requests.iter().map(ToString::to_string).collect();
            ApiError::not_found(format!(
                "Instance {} ({}) has no such USB device and no such assignment: {}.",
                server.name,
                server.id,
                named.join(", ")
            ))
        }
        e => fault(api, caller, server, e),
    })?;
    answer(api, caller, server.running, taken.iter().flatten(), Vec::new())
}

/// Result of an action, with the current state of the devices.
fn answer<'a>(
    api: &Api,
    caller: &Caller,
    live: bool,
    devices: impl Iterator<Item = &'a Record>,
    already: Vec<u64>,
) -> Result<Acted, ApiError> {
    let snapshot = api.inventory.now()?;
    let now =
        devices.map(|was| snapshot.shown(snapshot.device(was.entry.id).unwrap_or(was), caller));
    Ok(Acted { usb_devices: now.collect(), live, already })
}

impl Api {
    fn worker(&self, caller: &Caller) -> Result<Worker, StoreError> {
        let actor = format!("api {}", caller.name);
        Worker::open((self.config)(), self.hypervisor.clone(), self.metrics.clone(), &actor)
    }
}

fn fault(api: &Api, caller: &Caller, server: &Server, e: OperateError) -> ApiError {
    match e {
        OperateError::Refused(why) => ApiError::conflict(sentence(&why)),
        OperateError::Nothing(_) => ApiError::not_found(format!(
            "Instance {} ({}) has no such USB device and no such assignment.",
            server.name, server.id
        )),
        OperateError::Short { short, .. } => {
            let snapshot = api.inventory.now().unwrap_or_default();
            let told: Vec<String> = short.iter().map(|s| shortage(&snapshot, caller, s)).collect();
            ApiError::conflict(told.join(" "))
        }
        OperateError::Unsure(ref domain, ref failure) => ApiError::unavailable(format!(
            "the device may or may not be attached to {domain}: it is detached once libvirt \
             answers again."
        ))
        .and_privately(failure.to_string()),
        OperateError::Work(e) => e.into(),
    }
}

/// Describes why a request cannot be satisfied, as far as the caller may know, and what to do. The
/// answer is the same for devices that the caller may not see and for devices that do not exist.
fn shortage(snapshot: &Snapshot, caller: &Caller, short: &Shortage) -> String {
    let seen: Vec<&Obstacle> =
        short.matching.iter().filter(|o| snapshot.sees(caller, &o.device)).collect();
    let obstacles: Vec<String> = seen
        .iter()
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
                Why::Project => format!("{device} is available to certain projects only"),
                Why::Unavailable => {
                    let reason = o.device.entry.status_reason.as_deref().unwrap_or("not offered");
                    format!("{device} is unavailable ({reason})")
                }
            }
        })
        .collect();
    let request = &short.request;
    let lead = format!("No available USB device matches {request}");
    match seen.first() {
        None => format!(
            "{lead}: plug it in, or request a device from the list of USB devices \
             (GET os-usb-devices)."
        ),
        Some(first) => format!("{lead}: {}. {}", obstacles.join("; "), advice(&first.why)),
    }
}

/// Advice about a device that cannot be attached.
const fn advice(why: &Why) -> &'static str {
    match why {
        Why::HeldBy(_) => "Request another device, or detach it from that instance.",
        Why::OtherRequest => "Request another device, or plug in one more.",
        Why::NotThere(_) => "Plug it in again.",
        Why::Project => "An administrator can grant it to the project of this instance.",
        Why::Unavailable => "Request another device, or ask an administrator to make it available.",
    }
}
