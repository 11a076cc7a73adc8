//! An API in the inventory's place: what a command asks and does with `--url`. Answers become the
//! rows that the inventory would give, and are shown by the same code.

use std::fmt::Display;
use std::time::Duration;

use anyhow::{Context as _, anyhow, bail};
use serde_json::{Map, Value, json};
use ureq::Agent;
use ureq::http::{Request, StatusCode, Uri};
use virt_usb_model::host::{self, HostDocument};
use virt_usb_model::{DeviceId, DeviceRequest, Flavor, Grant, InstanceId, ProjectId};
use virt_usb_store::events::EventRow;
use virt_usb_store::forget::Forgotten;
use virt_usb_store::maintain::HostRow;
use virt_usb_store::problems::Problem;
use virt_usb_store::quarantine::Wished;
use virt_usb_store::{ClaimRow, Owner, Record, StoredFlavor, StoredGrant};

use super::arguments::Api;
use super::named_resources::Named;
use crate::agent::operate::Attached;
use crate::client;

/// Longer than the API itself takes at most.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(150);
const CONNECTING: Duration = Duration::from_secs(10);
/// A page of a list is far smaller.
const LARGEST: u64 = 64 << 20;

/// An API, and who asks it.
pub(super) struct Remote {
    agent: Agent,
    /// Without a slash at its end.
    url: String,
    token: String,
}

impl Remote {
    /// The API at that address; nothing is asked yet.
    ///
    /// # Errors
    /// What is wrong with the address, the token's file or the certificate's.
    pub(super) fn open(url: &str, options: &Api) -> anyhow::Result<Self> {
        let Some(file) = &options.token_file else {
            bail!(
                "--url needs --token-file FILE, or VIRT_USB_TOKEN_FILE: create a token on the \
                 host with 'virt-usb token add'"
            );
        };
        let token = std::fs::read_to_string(file)
            .with_context(|| format!("cannot read the token in {}", file.display()))?;
        let token = token.trim();
        if token.is_empty() || !token.bytes().all(|b| b.is_ascii_graphic()) {
            bail!(
                "{} holds no token: wanted one line, as 'virt-usb token add' prints it",
                file.display()
            );
        }
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
        let agent = client::agent(options.cacert.as_deref(), CONNECTING, REQUEST_TIMEOUT)
            .context("--cacert")?;
        Ok(Self { agent, url: url.trim_end_matches('/').to_owned(), token: token.to_owned() })
    }

    /// Asks, and returns the answer's JSON; `null` where there is none.
    fn ask(
        &self,
        method: &str,
        path: &str,
        body: Option<&Value>,
    ) -> anyhow::Result<Result<Value, Refused>> {
        let url = format!("{}/v2.1/{path}", self.url);
        let request =
            Request::builder().method(method).uri(&url).header("X-Auth-Token", &self.token);
        let sent = match body {
            Some(body) => {
                let request =
                    request.header("Content-Type", "application/json").body(body.to_string())?;
                self.agent.run(request)
            }
            None => self.agent.run(request.body(())?),
        };
        let mut response = sent.with_context(|| format!("cannot reach the API at {}", self.url))?;
        let status = response.status();
        let id = response.headers().get("x-openstack-request-id").and_then(|id| id.to_str().ok());
        let id = id.map(ToOwned::to_owned);
        let text = response.body_mut().with_config().limit(LARGEST).read_to_string();
        let text =
            text.with_context(|| format!("the response of the API at {} is incomplete", self.url))?;
        let value: Option<Value> = match text.is_empty() {
            true => Some(Value::Null),
            false => serde_json::from_str(&text).ok(),
        };
        match (status.is_success(), value) {
            (true, Some(value)) => Ok(Ok(value)),
            (false, Some(value)) => Ok(Err(Refused::new(status, &value, id))),
            (_, None) => {
                bail!(
                    "at {} there is no API of virt-usb: its response ({status}) is not JSON",
                    self.url
                )
            }
        }
    }

    fn get(&self, path: &str) -> anyhow::Result<Value> {
        Ok(self.ask("GET", path, None)??)
    }

    /// Everything of a list that comes in pages.
    fn pages(&self, path: &str, key: &str, most: usize) -> anyhow::Result<Vec<Value>> {
        let (mut all, mut marker) = (Vec::new(), String::new());
        loop {
            let sign = if path.contains('?') { '&' } else { '?' };
            let mut answer =
                self.get(&format!("{path}{sign}limit={}{marker}", (most - all.len()).min(1000)))?;
            let page = list(&mut answer, key)?;
            let last = page.last().and_then(|one| one["id"].as_i64());
            all.extend(page);
            let more =
                answer[format!("{key}_links")].as_array().is_some_and(|links| !links.is_empty());
            match last.filter(|_| more && all.len() < most) {
                Some(last) => marker = format!("&marker={last}"),
                None => return Ok(all),
            }
        }
    }

    pub(super) fn hosts(&self) -> anyhow::Result<Vec<HostRow>> {
        list(&mut self.get("os-hypervisors")?, "hypervisors")?.iter().map(host).collect()
    }

    /// The documents of all hosts; for administrators.
    pub(super) fn documents(&self) -> anyhow::Result<Vec<HostDocument>> {
        let document = |known: HostRow| {
            let mut answer = self.get(&format!("os-hypervisors/{}", quoted(&known.host)))?;
            if answer["hypervisor"]["revision"].is_null() {
                bail!(
                    "host documents need an administrator's token: they contain data of other \
                     projects"
                );
            }
            let HostRow { id, host, revision, .. } = self::host(&answer["hypervisor"])?;
            let devices = records(&list(&mut answer["hypervisor"], "usb_device_stats")?)?;
            Ok(HostDocument::new(
                host,
                id,
                revision,
                devices.into_iter().map(|r| r.entry).collect(),
            ))
        };
        self.hosts()?.into_iter().map(document).collect()
    }

    pub(super) fn devices(&self, deleted: bool) -> anyhow::Result<Vec<Record>> {
        let path = if deleted { "os-usb-devices?deleted=true" } else { "os-usb-devices" };
        records(&self.pages(path, "usb_devices", usize::MAX)?)
    }

    /// All devices that were ever seen, each with what is different from what it was when it was
    /// claimed last.
    pub(super) fn set_aside(&self) -> anyhow::Result<Vec<(Record, Option<String>)>> {
        let all = self.pages("os-usb-devices?deleted=true", "usb_devices", usize::MAX)?;
        let altered: Vec<Option<String>> =
            all.iter().map(|device| text(device, "altered")).collect();
        Ok(records(&all)?.into_iter().zip(altered).collect())
    }

    pub(super) fn claims(&self) -> anyhow::Result<(Vec<ClaimRow>, Vec<Problem>)> {
        let mut answer = self.get("os-usb-claims")?;
        let claims =
            list(&mut answer, "usb_claims")?.iter().map(claim).collect::<anyhow::Result<_>>()?;
        let problems = list(&mut answer, "usb_problems")?
            .iter()
            .map(problem)
            .collect::<anyhow::Result<_>>()?;
        Ok((claims, problems))
    }

    /// Oldest first; the newest `limit`, all where that is 0.
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
        // Of both the API has no list: what is not of the instance is left out here.
        let (both, most) = (instance.is_some() && device.is_some(), usize::try_from(limit)?);
        let asked = if limit == 0 || both { usize::MAX } else { most };
        let found = self.pages(&path, "events", asked)?;
        let mut found: Vec<EventRow> = found.iter().map(event).collect::<anyhow::Result<_>>()?;
        if both {
            found.retain(|event| event.instance_uuid == instance);
        }
        if limit > 0 {
            found.truncate(most);
        }
        found.reverse();
        Ok(found)
    }

    /// All flavors, or all grants.
    pub(super) fn named<T: Named>(&self) -> anyhow::Result<Vec<T::Stored>> {
        let mut answer = self.get(&format!("os-usb-{}", T::PLURAL))?;
        list(&mut answer, &format!("usb_{}", T::PLURAL))?.iter().map(T::read).collect()
    }

    /// None: there is none of that name.
    pub(super) fn one_named<T: Named>(&self, name: &str) -> anyhow::Result<Option<T::Stored>> {
        match self.ask("GET", &named_path::<T>(name), None)? {
            Ok(answer) => T::read(&answer[format!("usb_{}", T::NOUN)]).map(Some),
            Err(refused) if refused.status == StatusCode::NOT_FOUND => Ok(None),
            Err(refused) => Err(refused.into()),
        }
    }

    /// Whether that changed anything.
    pub(super) fn set_named<T: Named>(&self, name: &str, wanted: &T) -> anyhow::Result<bool> {
        let known = self.one_named::<T>(name)?.is_some_and(|stored| T::parts(&stored).1 == wanted);
        if !known {
            let body = serde_json::from_str(&wanted.to_string())?;
            self.ask("PUT", &named_path::<T>(name), Some(&body))??;
        }
        Ok(!known)
    }

    /// Whether it was there.
    pub(super) fn remove_named<T: Named>(&self, name: &str) -> anyhow::Result<bool> {
        match self.ask("DELETE", &named_path::<T>(name), None)? {
            Ok(_) => Ok(true),
            Err(refused) if refused.status == StatusCode::NOT_FOUND => Ok(false),
            Err(refused) => Err(refused.into()),
        }
    }

    /// Changes a device, unless `is_so` says that it already is in the wanted state.
    pub(super) fn change(
        &self,
        device: DeviceId,
        action: &Value,
        is_so: impl Fn(&Record) -> bool,
    ) -> anyhow::Result<Wished> {
        let path = format!("os-usb-devices/{device}");
        let was = match self.ask("GET", &path, None)? {
            Ok(answer) => record(&answer["usb_device"])?,
            Err(refused) if refused.status == StatusCode::NOT_FOUND => return Ok(Wished::Unknown),
            Err(refused) => return Err(refused.into()),
        };
        // Asked for though it seems to be so: what the caller may not see seems to be nothing.
        let answer = self.ask("POST", &format!("{path}/action"), Some(action))??;
        let now = Box::new(record(&answer["usb_device"])?);
        Ok(if is_so(&was) { Wished::Already(now) } else { Wished::Done(now) })
    }

    /// Forgets a device that is gone.
    pub(super) fn forget(&self, device: DeviceId) -> anyhow::Result<Forgotten> {
        let path = format!("os-usb-devices/{device}");
        let was = match self.ask("GET", &path, None)? {
            Ok(answer) => record(&answer["usb_device"])?,
            Err(refused) if refused.status == StatusCode::NOT_FOUND => {
                return Ok(Forgotten::Unknown);
            }
            Err(refused) => return Err(refused.into()),
        };
        self.ask("DELETE", &path, None)??;
        Ok(Forgotten::Done(Box::new(was)))
    }

    /// The server of that UUID, or of that name.
    pub(super) fn server(&self, name: &str) -> anyhow::Result<InstanceId> {
        if let Ok(id) = name.parse() {
            return Ok(id);
        }
        let quoted = serde_urlencoded::to_string([("name", name)])?;
        let found = list(&mut self.get(&format!("servers?{quoted}"))?, "servers")?;
        match found.as_slice() {
            [one] => read(one, "id"),
            [] => bail!("the API at {} knows no server {name:?}", self.url),
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
        let mut answer = self.act(server, "attach_usb_devices", request)?;
        let live = answer["live"].as_bool().unwrap_or_default();
        let had: Vec<u64> =
            answer["already"].as_array().into_iter().flatten().filter_map(Value::as_u64).collect();
        let all = records(&list(&mut answer, "usb_devices")?)?;
        let (already, new) =
            all.into_iter().partition(|record| had.contains(&record.entry.id.get()));
        Ok(Attached { live, new, already })
    }

    /// None: only an assignment has ended.
    pub(super) fn detach(
        &self,
        server: InstanceId,
        request: &DeviceRequest,
    ) -> anyhow::Result<Option<Record>> {
        let mut answer = self.act(server, "detach_usb_devices", request)?;
        Ok(records(&list(&mut answer, "usb_devices")?)?.into_iter().next())
    }

    fn act(
        &self,
        server: InstanceId,
        action: &str,
        request: &DeviceRequest,
    ) -> anyhow::Result<Value> {
        let body = json!({ action: { "usb_devices_requests": [request] } });
        Ok(self.ask("POST", &format!("servers/{server}/action"), Some(&body))??)
    }

    pub(super) fn owners(&self) -> anyhow::Result<Vec<Owner>> {
        list(&mut self.get("os-usb-owners")?, "usb_owners")?.iter().map(owner).collect()
    }

    pub(super) fn set_owner(
        &self,
        server: InstanceId,
        project: Option<&ProjectId>,
    ) -> anyhow::Result<()> {
        let body = match project {
            Some(project) => json!({ "set_usb_owner": { "project_id": project } }),
            None => json!({ "clear_usb_owner": null }),
        };
        self.ask("POST", &format!("servers/{server}/action"), Some(&body))??;
        Ok(())
    }
}

/// The API's answer when it does not do something.
#[derive(Debug, thiserror::Error)]
#[error(
    "the API responded with {}: {message}{}",
    status.as_u16(),
    id.as_ref().map(|id| format!(" ({id})")).unwrap_or_default()
)]
struct Refused {
    status: StatusCode,
    message: String,
    /// By which its host's log tells more; of no use where the message says all.
    id: Option<String>,
}

impl Refused {
    fn new(status: StatusCode, fault: &Value, id: Option<String>) -> Self {
        let message = fault
            .as_object()
            .and_then(|fault| fault.values().next())
            .and_then(|f| text(f, "message"));
        let message = message
            .unwrap_or_else(|| status.canonical_reason().unwrap_or("no reason given").to_owned());
        Self { status, message, id: id.filter(|_| status.is_server_error()) }
    }
}

fn named_path<T: Named>(name: &str) -> String {
    format!("os-usb-{}/{}", T::PLURAL, quoted(name))
}

/// As a part of a path: a name may hold anything that can be printed.
fn quoted(name: &str) -> String {
    name.bytes().map(|byte| format!("%{byte:02X}")).collect()
}

fn list(answer: &mut Value, key: &str) -> anyhow::Result<Vec<Value>> {
    match answer.get_mut(key).map(Value::take) {
        Some(Value::Array(list)) => Ok(list),
        _ => Err(odd(key, "no list")),
    }
}

fn odd(key: &str, what: impl Display) -> anyhow::Error {
    anyhow!("the API's response cannot be read: {key}: {what}; is it an older virt-usb?")
}

fn text(value: &Value, key: &str) -> Option<String> {
    value.get(key)?.as_str().map(ToOwned::to_owned)
}

fn read<T: std::str::FromStr<Err: Display>>(value: &Value, key: &str) -> anyhow::Result<T> {
    text(value, key).ok_or_else(|| odd(key, "no text"))?.parse().map_err(|e: T::Err| odd(key, e))
}

fn read_some<T: std::str::FromStr<Err: Display>>(
    value: &Value,
    key: &str,
) -> anyhow::Result<Option<T>> {
    match value.get(key) {
        None | Some(Value::Null) => Ok(None),
        _ => read(value, key).map(Some),
    }
}

fn number(value: &Value, key: &str) -> anyhow::Result<i64> {
    value.get(key).and_then(Value::as_i64).ok_or_else(|| odd(key, "no number"))
}

fn flag(value: &Value, key: &str) -> anyhow::Result<bool> {
    value.get(key).and_then(Value::as_bool).ok_or_else(|| odd(key, "neither true nor false"))
}

fn device_id(value: &Value) -> anyhow::Result<Option<DeviceId>> {
    let id = value.get("usb_device_id").and_then(Value::as_u64);
    id.map(|id| DeviceId::new(id).ok_or_else(|| odd("usb_device_id", id))).transpose()
}

fn record(device: &Value) -> anyhow::Result<Record> {
    records(std::slice::from_ref(device))?
        .into_iter()
        .next()
        .ok_or_else(|| odd("usb_device", "nothing"))
}

/// Converts the API's devices to records. They are entries of a host document, with text in place
/// of numbers and of unknown values.
fn records(devices: &[Value]) -> anyhow::Result<Vec<Record>> {
    let entry = |device: &Value| {
        let known = device.as_object().into_iter().flatten().filter(|(key, _)| host::is_key(key));
        let value = |value: &Value| if *value == "" { Value::Null } else { value.clone() };
        Value::Object(known.map(|(key, of)| (key.clone(), value(of))).collect::<Map<_, _>>())
    };
    let entries: Vec<Value> = devices.iter().map(entry).collect();
    let document = json!({ "version": host::VERSION, "host": "-", "compute_node_id": 1, "revision": 0, "devices": entries });
    let document = HostDocument::parse(&document.to_string()).map_err(|e| odd("devices", e))?;
    let whole = |(device, entry): (&Value, virt_usb_model::DeviceEntry)| {
        let deleted_at = text(device, "deleted_at");
        Record {
            created_at: text(device, "created_at"),
            updated_at: text(device, "updated_at"),
            deleted: if deleted_at.is_some() { entry.id.get() } else { 0 },
            deleted_at,
            present: entry.status != "removed",
            withheld: None,
            disabled: text(device, "disabled"),
            quarantined: text(device, "quarantined"),
            flapping_until: text(device, "flapping_until"),
            rule_withheld: None,
            rule_tags: Vec::new(),
            rule_projects: Vec::new(),
            one_time_use: false,
            own_tags: Vec::new(),
            descriptors: None,
            generation: None,
            used_as: None,
            entry,
        }
    };
    Ok(devices.iter().zip(document.devices).map(whole).collect())
}

fn host(value: &Value) -> anyhow::Result<HostRow> {
    let whole = |of: &Value, key: &str| of[key].as_u64().ok_or_else(|| odd(key, "no number"));
    let totals = &value["usb_device_totals"];
    Ok(HostRow {
        id: whole(value, "id")?,
        host: read(value, "hypervisor_hostname")?,
        // Only administrators get this value.
        revision: value["revision"].as_u64().unwrap_or_default(),
        scanned_at: text(value, "scanned_at"),
        devices: whole(totals, "total")?,
        available: whole(totals, "available")?,
    })
}

fn claim(value: &Value) -> anyhow::Result<ClaimRow> {
    Ok(ClaimRow {
        id: number(value, "id")?,
        created_at: read(value, "created_at")?,
        device_id: device_id(value)?.ok_or_else(|| odd("usb_device_id", "no number"))?,
        instance_uuid: read(value, "instance_uuid")?,
        domain: read(value, "domain")?,
        project_id: text(value, "project_id"),
        request: value["request"].as_u64().and_then(|n| n.try_into().ok()),
        state: read(value, "state")?,
        hold: read(value, "hold")?,
        pending: flag(value, "pending")?,
        boot_id: read(value, "boot_id")?,
        revision: number(value, "revision")?,
        ending: flag(value, "ending")?,
        arrived: flag(value, "arrived")?,
        by_hand: value["request"].is_null(),
        incoming_since: None,
        unsure: false,
        descriptors: None,
        generation: None,
        used: false,
        serial_shared: false,
        seen_in_guest: false,
    })
}

fn problem(value: &Value) -> anyhow::Result<Problem> {
    Ok(Problem {
        instance_uuid: read(value, "instance_uuid")?,
        about: read(value, "about")?,
        domain: read(value, "domain")?,
        since: read(value, "since")?,
        what: read(value, "what")?,
    })
}

fn event(value: &Value) -> anyhow::Result<EventRow> {
    Ok(EventRow {
        id: number(value, "id")?,
        at: read(value, "at")?,
        event: read(value, "event")?,
        instance_uuid: read_some(value, "instance_uuid")?,
        domain: text(value, "domain"),
        project_id: text(value, "project_id"),
        device_id: device_id(value)?,
        actor: text(value, "actor").unwrap_or_default(),
        detail: text(value, "detail"),
    })
}

pub(super) fn flavor(value: &Value) -> anyhow::Result<StoredFlavor> {
    let asks = part(value, ["usb_devices", "usb_redirection_devices"]);
    Ok(StoredFlavor {
        name: read(value, "name")?,
        created_at: read(value, "created_at")?,
        updated_at: read(value, "updated_at")?,
        flavor: Flavor::parse(&asks).map_err(|e| odd("usb_flavor", e))?,
    })
}

pub(super) fn grant(value: &Value) -> anyhow::Result<StoredGrant> {
    let gives = part(value, ["usb_devices", "projects"]);
    Ok(StoredGrant {
        name: read(value, "name")?,
        created_at: read(value, "created_at")?,
        updated_at: read(value, "updated_at")?,
        grant: Grant::parse(&gives).map_err(|e| odd("usb_grant", e))?,
    })
}

/// Moves these keys of an object into an object of their own.
fn part(value: &Value, keys: [&str; 2]) -> String {
    let part: Map<String, Value> =
        keys.into_iter().map(|key| (key.to_owned(), value[key].clone())).collect();
    Value::Object(part).to_string()
}

fn owner(value: &Value) -> anyhow::Result<Owner> {
    Ok(Owner {
        instance_uuid: read(value, "instance_uuid")?,
        created_at: read(value, "created_at")?,
        domain: read(value, "domain")?,
        project_id: read(value, "project_id")?,
    })
}
