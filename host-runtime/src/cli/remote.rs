//! The API in place of the inventory: what a command asks and changes with `--url`. Responses
//! become rows of the inventory, and are shown by the same code.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, bail};
use serde::de::{DeserializeOwned, IgnoredAny};
use ureq::Agent;
use ureq::http::{Request, StatusCode, Uri};
use virt_usb_model::{DeviceId, DeviceRequest, HostDocument, InstanceId, ParseError, ProjectId};
use virt_usb_store::events::EventRow;
use virt_usb_store::forget::Forgotten;
use virt_usb_store::maintain::HostRow;
use virt_usb_store::problems::Problem;
use virt_usb_store::quarantine::Wished;
use virt_usb_store::{ClaimRow, Owner, Record};

use super::arguments::Api;
use super::named_resources::Named;
use super::response::{self, Refused, Unreadable};
use crate::agent::operate::Attached;
use crate::api::actions::{DeviceAction, ServerAction};
use crate::api::responses::{
    Acted, Claims, Hypervisor, Hypervisors, Link, Owners, Servers, UsbDevice, UsbDeviceShown,
    UsbDevices, UsbEvent, UsbEvents, rows,
};
use crate::client;

/// Timeout for a request. The API itself takes less.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(150);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// Maximum size of a response, in bytes. A page of a list is far smaller.
const MAX_RESPONSE_BYTES: u64 = 64 << 20;
/// Number of entries to request with each page of a list.
const PAGE: usize = 1000;
/// Base URL on a unix socket, where no name is resolved.
const LOCAL_URL: &str = "http://127.0.0.1";

/// An API, and the token of the caller.
pub(super) struct Remote {
    agent: Agent,
    /// Base URL, without a slash at its end.
    url: String,
    /// Address of the API, for messages.
    address: String,
    /// Token of the caller; `None` on a unix socket, whose file mode admits the caller.
    token: Option<String>,
}

impl Remote {
    /// Returns the API at that address, without a request.
    ///
    /// # Errors
    /// If the address, the token file or the certificate file is invalid.
    pub(super) fn open(url: &str, options: &Api) -> anyhow::Result<Self> {
        let Some(file) = &options.token_file else {
            bail!(
                "--url needs --token-file FILE, or VIRT_USB_TOKEN_FILE: create a token on the \
                 host with 'virt-usb token add'"
            );
        };
        let token = token(file)?;
        let uri: Uri = url.parse().with_context(|| format!("--url {url}"))?;
        if !matches!(uri.scheme_str(), Some("http" | "https"))
            || uri.host().is_none()
            || uri.query().is_some()
        {
            bail!("--url {url}: wanted an address such as https://host.example:8790");
        }
        if client::is_open(&uri) {
            bail!(
                "--url {url}: without TLS, the token could be read on the network: wanted \
                 https://, or an address of this machine such as http://127.0.0.1:8790"
            );
        }
        let agent = client::agent(options.cacert.as_deref(), CONNECT_TIMEOUT, REQUEST_TIMEOUT)
            .context("--cacert")?;
        let url = url.trim_end_matches('/').to_owned();
        Ok(Self { agent, address: url.clone(), url, token: Some(token) })
    }

    /// Returns the API at that unix socket, without a request.
    pub(super) fn local(socket: PathBuf) -> Self {
        let address = socket.display().to_string();
        let agent = client::local_agent(socket, REQUEST_TIMEOUT);
        Self { agent, url: LOCAL_URL.to_owned(), address, token: None }
    }

    /// Sends a request, whose body is JSON text, and reads the response. An empty response reads as
    /// `null`.
    ///
    /// # Errors
    /// [`Refused`] if the API refuses the request, [`Unreadable`] if it responds with something
    /// else than this version reads.
    fn send<T: DeserializeOwned>(
        &self,
        method: &str,
        path: &str,
        body: Option<String>,
    ) -> anyhow::Result<T> {
        let mut request =
            Request::builder().method(method).uri(format!("{}/v2.1/{path}", self.url));
        if let Some(token) = &self.token {
            request = request.header("X-Auth-Token", token);
        }
        let sent = match body {
            Some(body) => {
                self.agent.run(request.header("Content-Type", "application/json").body(body)?)
            }
            None => self.agent.run(request.body(())?),
        };
        let mut response =
            sent.with_context(|| format!("cannot reach the API at {}", self.address))?;
        let status = response.status();
        let id = response.headers().get("x-openstack-request-id").and_then(|id| id.to_str().ok());
        let id = id.map(ToOwned::to_owned);
        let text = response.body_mut().with_config().limit(MAX_RESPONSE_BYTES).read_to_string();
        let text = text.with_context(|| {
            format!("the response of the API at {} is incomplete", self.address)
        })?;
        let text = if text.is_empty() { "null" } else { &text };
        if serde_json::from_str::<IgnoredAny>(text).is_err() {
            bail!(
                "at {} there is no API of virt-usb: its response ({status}) is not JSON",
                self.address
            );
        }
        if !status.is_success() {
            bail!(Refused::new(status, text, id));
        }
        Ok(response::read(text)?)
    }

    fn get<T: DeserializeOwned>(&self, path: &str) -> anyhow::Result<T> {
        self.send("GET", path, None)
    }

    /// Returns all entries of a list that comes in pages, at most `limit`.
    fn pages<P: Page>(&self, path: &str, limit: usize) -> anyhow::Result<Vec<P::Entry>> {
        let (mut all, mut marker) = (Vec::new(), String::new());
        loop {
            let sign = if path.contains('?') { '&' } else { '?' };
            let count = (limit - all.len()).min(PAGE);
            let page: P = self.get(&format!("{path}{sign}limit={count}{marker}"))?;
            let (entries, links) = page.into_parts();
            let last = entries.last().map(P::marker);
            all.extend(entries);
            match last.filter(|_| !links.is_empty() && all.len() < limit) {
                Some(last) => marker = format!("&marker={last}"),
                None => return Ok(all),
            }
        }
    }

    pub(super) fn hosts(&self) -> anyhow::Result<Vec<HostRow>> {
        let hosts: Hypervisors = self.get("os-hypervisors")?;
        Ok(hosts.hypervisors.into_iter().map(HostRow::from).collect())
    }

    /// Returns the documents of all hosts; for administrators.
    pub(super) fn documents(&self) -> anyhow::Result<Vec<HostDocument>> {
        let document = |known: HostRow| {
            let path = format!("os-hypervisors/{}", quoted(&known.host));
            let host: Hypervisor = self.get(&path)?;
            match host.hypervisor.document().map_err(Unreadable::from)? {
                Some(document) => Ok(document),
                None => bail!(
                    "host documents need an administrator's token: they contain data of other \
                     projects"
                ),
            }
        };
        self.hosts()?.into_iter().map(document).collect()
    }

    pub(super) fn devices(&self, deleted: bool) -> anyhow::Result<Vec<Record>> {
        records(self.shown_devices(deleted)?)
    }

    /// Returns all devices that were ever seen, each with how it differs from its last claim.
    pub(super) fn set_aside(&self) -> anyhow::Result<Vec<(Record, Option<String>)>> {
        let mut all = self.shown_devices(true)?;
        let altered: Vec<Option<String>> = all.iter_mut().map(|one| one.altered.take()).collect();
        Ok(records(all)?.into_iter().zip(altered).collect())
    }

    fn shown_devices(&self, deleted: bool) -> anyhow::Result<Vec<UsbDevice>> {
        let path = if deleted { "os-usb-devices?deleted=true" } else { "os-usb-devices" };
        self.pages::<UsbDevices>(path, usize::MAX)
    }

    pub(super) fn claims(&self) -> anyhow::Result<(Vec<ClaimRow>, Vec<Problem>)> {
        let Claims { usb_claims, usb_problems } = self.get("os-usb-claims")?;
        let claims = usb_claims.into_iter().map(ClaimRow::from).collect();
        Ok((claims, usb_problems.into_iter().map(Problem::from).collect()))
    }

    /// Returns the newest `limit` events, oldest first; all of them if `limit` is 0.
    pub(super) fn events(
        &self,
        instance: Option<InstanceId>,
        device: Option<DeviceId>,
        limit: u32,
    ) -> anyhow::Result<Vec<EventRow>> {
        let path = match (instance, device) {
            (_, Some(device)) => format!("os-usb-devices/{device}/events"),
            (Some(instance), None) => format!("servers/{instance}/os-usb-events"),
            (None, None) => "os-usb-events".to_owned(),
        };
        // The API has no list for both: events of other instances are left out here.
        let (both, most) = (instance.is_some() && device.is_some(), usize::try_from(limit)?);
        let asked = if limit == 0 || both { usize::MAX } else { most };
        let found = self.pages::<UsbEvents>(&path, asked)?;
        let mut found: Vec<EventRow> = found.into_iter().map(EventRow::from).collect();
        if both {
            found.retain(|event| event.instance_uuid == instance);
        }
        if limit > 0 {
            found.truncate(most);
        }
        found.reverse();
        Ok(found)
    }

    /// Returns all flavors, or all grants.
    pub(super) fn named<T: Named>(&self) -> anyhow::Result<Vec<T::Stored>> {
        let all: T::List = self.get(&format!("os-usb-{}", T::PLURAL))?;
        Ok(all.into())
    }

    /// Returns the flavor or grant of that name; `None` if there is none.
    pub(super) fn one_named<T: Named>(&self, name: &str) -> anyhow::Result<Option<T::Stored>> {
        Ok(found(self.get::<T::Shown>(&named_path::<T>(name)))?.map(Into::into))
    }

    /// Stores a flavor or grant. Returns whether that changed anything.
    pub(super) fn set_named<T: Named>(&self, name: &str, wanted: &T) -> anyhow::Result<bool> {
        let known = self.one_named::<T>(name)?.is_some_and(|stored| T::parts(&stored).1 == wanted);
        if !known {
            let body = Some(wanted.to_string());
            self.send::<IgnoredAny>("PUT", &named_path::<T>(name), body)?;
        }
        Ok(!known)
    }

    /// Removes a flavor or grant. Returns whether it existed.
    pub(super) fn remove_named<T: Named>(&self, name: &str) -> anyhow::Result<bool> {
        let removed = found(self.send::<IgnoredAny>("DELETE", &named_path::<T>(name), None))?;
        Ok(removed.is_some())
    }

    /// Changes a device, unless `is_so` says that it already is in the wanted state.
    pub(super) fn change(
        &self,
        device: DeviceId,
        action: &DeviceAction,
        is_so: impl Fn(&Record) -> bool,
    ) -> anyhow::Result<Wished> {
        let Some(was) = self.device(device)? else { return Ok(Wished::Unknown) };
        // A device may look as if it were in that state to a caller who does not see all of it, so
        // the request is sent in any case.
        let body = serde_json::to_string(action)?;
        let path = format!("os-usb-devices/{device}/action");
        let now: UsbDeviceShown = self.send("POST", &path, Some(body))?;
        let now = Box::new(record(now)?);
        Ok(if is_so(&was) { Wished::Already(now) } else { Wished::Done(now) })
    }

    /// Forgets an unplugged device.
    pub(super) fn forget(&self, device: DeviceId) -> anyhow::Result<Forgotten> {
        let Some(was) = self.device(device)? else { return Ok(Forgotten::Unknown) };
        self.send::<IgnoredAny>("DELETE", &format!("os-usb-devices/{device}"), None)?;
        Ok(Forgotten::Done(Box::new(was)))
    }

    fn device(&self, device: DeviceId) -> anyhow::Result<Option<Record>> {
        found(self.get(&format!("os-usb-devices/{device}")))?.map(record).transpose()
    }

    /// Returns the server with that UUID or name.
    pub(super) fn server(&self, name: &str) -> anyhow::Result<InstanceId> {
        if let Ok(id) = name.parse() {
            return Ok(id);
        }
        let query = serde_urlencoded::to_string([("name", name)])?;
        let found: Servers = self.get(&format!("servers?{query}"))?;
        match found.servers.as_slice() {
            [one] => Ok(one.id),
            [] => bail!("the API at {} knows no server {name:?}", self.address),
            several => {
                bail!("there are {} servers named {name:?}: use the UUID", several.len())
            }
        }
    }

    pub(super) fn attach(
        &self,
        server: InstanceId,
        request: &DeviceRequest,
    ) -> anyhow::Result<Attached> {
        let acted: Acted = self.act(server, &ServerAction::Attach(vec![request.clone()]))?;
        let all = records(acted.usb_devices)?;
        let (already, new) =
            all.into_iter().partition(|record| acted.already.contains(&record.entry.id.get()));
        Ok(Attached { live: acted.live, new, already })
    }

    /// Detaches a device; `None` if only an assignment ended.
    pub(super) fn detach(
        &self,
        server: InstanceId,
        request: &DeviceRequest,
    ) -> anyhow::Result<Option<Record>> {
        let acted: Acted = self.act(server, &ServerAction::Detach(vec![request.clone()]))?;
        Ok(records(acted.usb_devices)?.into_iter().next())
    }

    fn act<T: DeserializeOwned>(
        &self,
        server: InstanceId,
        action: &ServerAction,
    ) -> anyhow::Result<T> {
        let body = serde_json::to_string(action)?;
        self.send("POST", &format!("servers/{server}/action"), Some(body))
    }

    pub(super) fn owners(&self) -> anyhow::Result<Vec<Owner>> {
        let owners: Owners = self.get("os-usb-owners")?;
        Ok(owners.usb_owners.into_iter().map(Owner::from).collect())
    }

    /// Sets the owner project of a server, or removes it with `None`.
    pub(super) fn set_owner(
        &self,
        server: InstanceId,
        project: Option<&ProjectId>,
    ) -> anyhow::Result<()> {
        let action = project.cloned().map_or(ServerAction::ClearOwner, ServerAction::SetOwner);
        self.act::<IgnoredAny>(server, &action)?;
        Ok(())
    }
}

/// A page of a list.
trait Page: DeserializeOwned {
    /// Type of the list's entries.
    type Entry;

    /// Returns the entries, and links to the next page, if there is one.
    fn into_parts(self) -> (Vec<Self::Entry>, Vec<Link>);
    /// Id of the entry, after which the next page begins.
    fn marker(entry: &Self::Entry) -> String;
}

impl Page for UsbDevices {
    type Entry = UsbDevice;

    fn into_parts(self) -> (Vec<UsbDevice>, Vec<Link>) {
        (self.usb_devices, self.usb_devices_links)
    }

    fn marker(device: &UsbDevice) -> String {
        device.id.to_string()
    }
}

impl Page for UsbEvents {
    type Entry = UsbEvent;

    fn into_parts(self) -> (Vec<UsbEvent>, Vec<Link>) {
        (self.events, self.events_links)
    }

    fn marker(event: &UsbEvent) -> String {
        event.id.to_string()
    }
}

/// Reads the token in this file.
fn token(file: &Path) -> anyhow::Result<String> {
    let token = std::fs::read_to_string(file)
        .with_context(|| format!("cannot read the token in {}", file.display()))?;
    let token = token.trim();
    if token.is_empty() || !token.bytes().all(|b| b.is_ascii_graphic()) {
        bail!(
            "{} holds no token: wanted one line, as 'virt-usb token add' prints it",
            file.display()
        );
    }
    Ok(token.to_owned())
}

/// Returns `None` if the API says that the resource does not exist.
fn found<T>(response: anyhow::Result<T>) -> anyhow::Result<Option<T>> {
    match response {
        Ok(found) => Ok(Some(found)),
        Err(e) => match e.downcast_ref::<Refused>() {
            Some(refused) if refused.status == StatusCode::NOT_FOUND => Ok(None),
            _ => Err(e),
        },
    }
}

fn records(devices: Vec<UsbDevice>) -> anyhow::Result<Vec<Record>> {
    Ok(rows("usb_devices", devices).map_err(Unreadable::from)?)
}

fn record(shown: UsbDeviceShown) -> anyhow::Result<Record> {
    let place = |e: ParseError| Unreadable::from(e.at("usb_device"));
    Ok(Record::try_from(shown.usb_device).map_err(place)?)
}

fn named_path<T: Named>(name: &str) -> String {
    format!("os-usb-{}/{}", T::PLURAL, quoted(name))
}

/// Quotes a name as a part of a path. A name may contain any printable character.
fn quoted(name: &str) -> String {
    name.bytes().map(|byte| format!("%{byte:02X}")).collect()
}
