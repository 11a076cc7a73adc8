//! The other hosts of the fleet as published, which the API and the portal of each host show. An
//! unreachable host is shown with its last known state.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use tokio::time::Instant;
use virt_usb_config::Fleet;
use virt_usb_model::{
    DeviceId, DeviceRequest, Flavor, HostDocument, InstanceId, ProjectId, Status,
    UnavailableReason, clean_text,
};
use virt_usb_store::renumber::IDS_A_HOST;
use virt_usb_store::{ClaimRow, Record};

use virt_usb_fleet::Error;
use virt_usb_fleet::keys::{Keys, Node};
use virt_usb_fleet::reader::{Reader, Sink};

/// Time after the last request to the API at which following the fleet stops. A host whose API is
/// not used puts no load on etcd.
const IDLE_TIMEOUT: Duration = Duration::from_secs(600);
/// Timeout of the first request for the list of the fleet. After that, it sees the known state.
const LIST_TIMEOUT: Duration = Duration::from_secs(3);

/// Another host of the fleet.
#[derive(Debug, Clone, Default)]
pub(crate) struct Peer {
    pub(crate) name: String,
    pub(crate) number: u64,
    /// Whether the host's document is published now.
    pub(crate) reachable: bool,
    pub(crate) revision: u64,
    /// Devices, sorted by id.
    pub(crate) devices: Vec<Record>,
    /// Claims by device, as far as they are published.
    pub(crate) claims: HashMap<DeviceId, ClaimRow>,
    pub(crate) servers: Vec<Server>,
}

/// A guest of a host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Server {
    pub(crate) id: InstanceId,
    pub(crate) name: String,
    pub(crate) running: bool,
    /// Owner project, if known.
    pub(crate) project: Option<ProjectId>,
    /// Whether the domain's own metadata names the owner.
    pub(crate) by_domain: bool,
    /// Assigned devices, which the guest gets at each start.
    pub(crate) requests: Vec<DeviceRequest>,
}

/// A [`Server`] in its published form.
#[derive(Serialize, Deserialize)]
struct Published {
    id: String,
    name: String,
    running: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    project_id: Option<String>,
    #[serde(default)]
    by_domain: bool,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    usb_devices_requests: Vec<serde_json::Value>,
}

/// Serializes a host's guests.
pub(crate) fn publish(servers: &[Server]) -> String {
    let publish = |server: &Server| Published {
        id: server.id.to_string(),
        name: server.name.clone(),
        running: server.running,
        project_id: server.project.as_ref().map(ToString::to_string),
        by_domain: server.by_domain,
        usb_devices_requests: server
            .requests
            .iter()
            .filter_map(|r| serde_json::to_value(r).ok())
            .collect(),
    };
    let all: Vec<Published> = servers.iter().map(publish).collect();
    serde_json::to_string(&all).unwrap_or_default()
}

/// Parses a host's guests. Guests that cannot be parsed are left out.
fn read(text: &str) -> Vec<Server> {
    let all: Vec<Published> = serde_json::from_str(text).unwrap_or_default();
    let one = |published: Published| {
        let list = serde_json::Value::Array(published.usb_devices_requests).to_string();
        Some(Server {
            id: published.id.parse().ok()?,
            name: clean_text(&published.name)?,
            running: published.running,
            project: published.project_id.and_then(|project| project.parse().ok()),
            by_domain: published.by_domain,
            requests: Flavor::parse_lists(Some(&list), None)
                .map(|f| f.usb_devices)
                .unwrap_or_default(),
        })
    };
    all.into_iter().filter_map(one).collect()
}

/// Snapshot of all other hosts, by number.
pub(crate) type Hosts = Arc<BTreeMap<u64, Arc<Peer>>>;

/// The known state of the other hosts. Clones share their content.
#[derive(Debug, Clone)]
pub(crate) struct Peers {
    state: Arc<Mutex<State>>,
    /// Time of the last request to the API, if there was one.
    last_request: Arc<watch::Sender<Option<Instant>>>,
    /// Whether the first list is complete, or has failed because etcd is unreachable.
    settled: Arc<watch::Sender<bool>>,
}

#[derive(Debug, Default)]
struct State {
    /// Name of this host, whose own documents are ignored.
    own: String,
    nodes: BTreeMap<u64, Node>,
    /// The last document of each host, and whether it is still published.
    documents: HashMap<String, (Arc<HostDocument>, bool)>,
    servers: HashMap<String, Vec<Server>>,
    hosts: Hosts,
    /// Error of the connection to etcd. `None` while connected.
    disconnected: Option<String>,
}

impl Peers {
    pub(crate) fn new(own: String) -> Self {
        let state = Arc::new(Mutex::new(State { own, ..State::default() }));
        Self {
            state,
            last_request: Arc::new(watch::Sender::new(None)),
            settled: Arc::new(watch::Sender::new(false)),
        }
    }

    /// Records a request to the API, which starts or continues following the fleet. Waits a short
    /// time for the first list.
    pub(crate) async fn wake(&self) {
        self.last_request.send_replace(Some(Instant::now()));
        let mut settled = self.settled.subscribe();
        // After the timeout, the caller sees the known state.
        drop(tokio::time::timeout(LIST_TIMEOUT, settled.wait_for(|settled| *settled)).await);
    }

    /// Follows the fleet forever, except while the API is idle.
    pub(crate) async fn follow(mut self, fleet: &Fleet) {
        let mut reader = Reader::new(fleet, Keys::new(fleet.prefix.clone()).all().to_owned());
        let mut requests = self.last_request.subscribe();
        let (last_request, settled) = (self.last_request.clone(), self.settled.clone());
        loop {
            let is_recent =
                |last: &Option<Instant>| last.is_some_and(|last| last.elapsed() < IDLE_TIMEOUT);
            if requests.wait_for(is_recent).await.is_err() {
                return;
            }
            tokio::select! {
                () = reader.follow(&mut self) => {}
                () = idle(&last_request) => {}
            }
            settled.send_replace(false);
        }
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns the current snapshot, which is the same `Arc` as before if nothing has changed.
    pub(crate) fn now(&self) -> Hosts {
        // Counts as a request, so that an open live page keeps the fleet followed.
        self.last_request.send_if_modified(|last| {
            *last = last.map(|_| Instant::now());
            false
        });
        self.state().hosts.clone()
    }
}

/// Waits until the API was idle for [`IDLE_TIMEOUT`].
async fn idle(last_request: &watch::Sender<Option<Instant>>) {
    loop {
        let last = *last_request.borrow();
        let until = last.map(|last| last + IDLE_TIMEOUT).filter(|until| *until > Instant::now());
        let Some(until) = until else { return };
        tokio::time::sleep_until(until).await;
    }
}

impl State {
    /// Rebuilds the peer with that number from the known keys.
    fn refresh(&mut self, number: u64) {
        let peer = self.peer(number);
        let hosts = Arc::make_mut(&mut self.hosts);
        match peer {
            Some(peer) => drop(hosts.insert(number, Arc::new(peer))),
            None => drop(hosts.remove(&number)),
        }
    }

    fn refresh_of(&mut self, host: &str) {
        let numbers: Vec<u64> = self
            .nodes
            .iter()
            .filter(|(_, node)| node.host == host)
            .map(|(number, _)| *number)
            .collect();
        for number in numbers {
            self.refresh(number);
        }
    }

    fn peer(&self, number: u64) -> Option<Peer> {
        let node = self.nodes.get(&number).filter(|node| node.host != self.own)?;
        let name = node.host.clone();
        let servers = self.servers.get(&name).cloned().unwrap_or_default();
        // Ignore a document with the number of another host.
        let known =
            self.documents.get(&name).filter(|(document, _)| document.compute_node_id == number);
        let Some((document, reachable)) = known else {
            return Some(Peer { name, number, servers, ..Peer::default() });
        };
        let first = (number - 1) * IDS_A_HOST;
        let own = |id: DeviceId| (first + 1..=first + IDS_A_HOST).contains(&id.get());
        let mut devices: Vec<Record> = Vec::new();
        let mut claims = HashMap::new();
        for entry in document.devices.iter().filter(|entry| own(entry.id)) {
            if let Some(instance) = entry.instance_uuid {
                let server = servers.iter().find(|server| server.id == instance);
                claims.insert(entry.id, claim(entry.id, instance, &entry.status, server));
            }
            devices.push(record(entry.clone(), *reachable));
        }
        devices.sort_by_key(|record| record.entry.id);
        devices.dedup_by_key(|record| record.entry.id);
        let revision = document.revision;
        Some(Peer { name, number, reachable: *reachable, revision, devices, claims, servers })
    }
}

impl Sink for Peers {
    fn put(&mut self, key: &str, value: &[u8], _: i64) {
        let text = String::from_utf8_lossy(value);
        let mut state = self.state();
        match key.split_once('/') {
            Some(("hosts", host)) => {
                // Ignore a document that names another host. An unreadable document counts as
                // missing.
                let read = HostDocument::parse(&text).ok().filter(|document| document.host == host);
                match read {
                    Some(document) => {
                        drop(state.documents.insert(host.to_owned(), (Arc::new(document), true)));
                    }
                    None => state.mark_unreachable(host),
                }
                state.refresh_of(host);
            }
            Some(("servers", host)) => {
                state.servers.insert(host.to_owned(), read(&text));
                state.refresh_of(host);
            }
            Some(("nodes", number)) => {
                if let (Ok(number), Ok(node)) =
                    (number.parse(), serde_json::from_str::<Node>(&text))
                {
                    state.nodes.insert(number, node);
                    state.refresh(number);
                }
            }
            _ => {}
        }
    }

    fn removed(&mut self, key: &str) {
        let mut state = self.state();
        match key.split_once('/') {
            Some(("hosts", host)) => {
                state.mark_unreachable(host);
                state.refresh_of(host);
            }
            Some(("nodes", number)) => {
                if let Ok(number) = number.parse() {
                    if let Some(node) = state.nodes.remove(&number) {
                        state.documents.remove(&node.host);
                        state.servers.remove(&node.host);
                    }
                    state.refresh(number);
                }
            }
            // Keep the known guests of a host whose lease has ended: they name the owners of its
            // devices.
            _ => {}
        }
    }

    fn listed(&mut self) {
        self.settled.send_replace(true);
        if self.state().disconnected.take().is_some() {
            tracing::info!("following the fleet again");
        }
    }

    fn disconnected(&mut self, why: &Error) {
        self.settled.send_replace(true);
        let mut state = self.state();
        if state.disconnected.is_none() {
            tracing::warn!("the API shows the last known state of the fleet: {why}");
        }
        state.disconnected = Some(why.to_string());
    }
}

impl State {
    fn mark_unreachable(&mut self, host: &str) {
        if let Some((_, reachable)) = self.documents.get_mut(host) {
            *reachable = false;
        }
    }
}

/// Converts a published device to a row of the inventory.
pub(crate) fn record(mut entry: virt_usb_model::DeviceEntry, reachable: bool) -> Record {
    if !reachable {
        let status = Status::Unavailable(UnavailableReason::Unreachable);
        entry.status = status.name().to_owned();
        entry.status_reason = Some(UnavailableReason::Unreachable.name().to_owned());
    }
    Record {
        created_at: None,
        updated_at: None,
        deleted: 0,
        deleted_at: None,
        present: entry.status != "removed",
        withheld: None,
        disabled: None,
        quarantined: None,
        flapping_until: None,
        // The reason is the only part of the rules that is published.
        rule_withheld: entry.status_reason.as_deref().and_then(|reason| reason.parse().ok()),
        rule_tags: Vec::new(),
        rule_projects: Vec::new(),
        one_time_use: false,
        own_tags: Vec::new(),
        descriptors: None,
        generation: None,
        used_as: None,
        entry,
    }
}

/// Builds the claim on a published device, as far as its fields are published.
fn claim(
    device: DeviceId,
    instance: InstanceId,
    status: &str,
    server: Option<&Server>,
) -> ClaimRow {
    ClaimRow {
        id: 0,
        created_at: String::new(),
        device_id: device,
        instance_uuid: instance,
        domain: server.map_or_else(|| instance.to_string(), |server| server.name.clone()),
        project_id: server.and_then(|server| server.project.as_ref().map(ToString::to_string)),
        request: None,
        state: if status == "allocated" { "allocated" } else { "claimed" }.to_owned(),
        hold: "running".to_owned(),
        pending: false,
        boot_id: String::new(),
        revision: 0,
        ending: false,
        needs_reattach: false,
        by_hand: false,
        incoming_since: None,
        unsure: false,
        descriptors: None,
        generation: None,
        used: false,
        serial_shared: false,
        seen_in_guest: false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GUEST: &str = "11111111-2222-4333-8444-555555555555";

    fn document(host: &str, number: u64, device: u64) -> String {
        let held = format!(r#""status":"allocated","instance_uuid":"{GUEST}""#);
        format!(
            r#"{{"version":1,"host":"{host}","compute_node_id":{number},"revision":7,"devices":[
            {{"id":{device},"address":"usb_1_5","product_id":"0001","vendor_id":"0529",{held},"port_path":"1-1","class":"00"}}]}}"#
        )
    }

    fn node(host: &str) -> String {
        format!(r#"{{"machine":"m","host":"{host}"}}"#)
    }

    #[test]
    fn only_a_hosts_own_documents_describe_it() {
        let mut others = Peers::new("own".to_owned());
        let put = |others: &mut Peers, key: &str, value: &str| others.put(key, value.as_bytes(), 1);
        put(&mut others, "hosts/a", &document("a", 2, 1_000_001));
        assert!(others.now().is_empty(), "it has not joined");
        put(&mut others, "nodes/2", &node("a"));
        put(&mut others, "nodes/3", &node("own"));
        put(&mut others, "hosts/own", &document("own", 3, 2_000_001));
        let one = |others: &Peers| others.now().get(&2).cloned().unwrap();
        assert_eq!(
            (others.now().len(), one(&others).devices.len(), one(&others).reachable),
            (1, 1, true)
        );
        let server =
            format!(r#"[{{"id":"{GUEST}","name":"erp","running":true,"project_id":"p1"}}]"#);
        put(&mut others, "servers/a", &server);
        let claim = one(&others).claims.values().next().cloned().unwrap();
        assert_eq!((claim.domain.as_str(), claim.project_id.as_deref()), ("erp", Some("p1")));
        // A device id of another host, a document with the number or the name of another host.
        put(&mut others, "hosts/a", &document("a", 2, 5_000_001));
        assert_eq!(one(&others).devices.len(), 0);
        put(&mut others, "hosts/a", &document("a", 3, 2_000_001));
        assert!(!one(&others).reachable);
        put(&mut others, "hosts/a", &document("a", 2, 1_000_001));
        put(&mut others, "hosts/a", &document("b", 2, 1_000_001));
        assert!(!one(&others).reachable);
        // A host that dies keeps its last state, but none of its devices is free.
        put(&mut others, "hosts/a", &document("a", 2, 1_000_001).replace("allocated", "available"));
        assert_eq!(one(&others).devices[0].entry.status, "available");
        others.removed("hosts/a");
        let device = &one(&others).devices[0].entry;
        assert_eq!(
            (device.status.as_str(), device.status_reason.as_deref()),
            ("unavailable", Some("unreachable"))
        );
        device.state().unwrap();
        // A host that leaves is removed.
        others.removed("nodes/2");
        assert!(others.now().is_empty());
    }
}
