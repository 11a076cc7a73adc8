//! Joining a fleet, leaving it, and how it is with it.

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::{Context as _, bail};
use etcd_client::{Compare, CompareOp, GetOptions, KeyValue, Txn, TxnOp};
use serde::Serialize;
use virt_usb_config::Fleet;
use virt_usb_model::HostDocument;

use crate::etcd::{Connection, Error, Etcd, name};
use crate::keys::{self, Keys, Node};

/// The first number that is given: 1 is a host that has joined no fleet.
const FIRST: u64 = 2;
/// After so many changes etcd should have forgotten the first.
const REMEMBERED: i64 = 10_000;
/// Others join at the same moment: it is tried again so often.
const ROUNDS: usize = 100;

/// Where a machine stands.
pub struct Place {
    /// Number of this machine; none: it has not joined.
    pub number: Option<u64>,
    /// Who has that number now.
    pub node: Option<Node>,
}

/// The machine's name in the fleet.
///
/// # Errors
/// When its id cannot be read.
pub fn this_machine(fleet: &Fleet) -> Result<String, Error> {
    let path = &fleet.machine_id;
    let fault = |why: String| Error::File { path: path.clone(), why };
    let id = std::fs::read_to_string(path).map_err(|e| fault(e.to_string()))?;
    // 32 hexadecimal digits (machine-id(5)); "uninitialized" is what an image holds that was never
    // booted.
    let id = id.trim();
    if id.len() < 16 || !id.bytes().all(|byte| byte.is_ascii_hexdigit() || byte == b'-') {
        return Err(fault("it holds no machine id: 'systemd-machine-id-setup' makes one".into()));
    }
    Ok(keys::machine(id))
}

/// Reads which number this machine has, and whether another host has its name.
///
/// # Errors
/// When etcd does not answer.
pub async fn place(
    etcd: &Etcd,
    connection: &mut Connection,
    keys: &Keys,
    machine: &str,
) -> Result<Place, Error> {
    let number =
        get(etcd, connection, keys.machine(machine)).await?.and_then(|text| text.parse().ok());
    let node = match number {
        Some(number) => get(etcd, connection, keys.node(number)).await?,
        None => None,
    };
    Ok(Place { number, node: node.and_then(|text| serde_json::from_str(&text).ok()) })
}

/// Whether the machine is in the fleet.
pub async fn is_member(
    etcd: &Etcd,
    connection: &mut Connection,
    keys: &Keys,
    machine: &str,
) -> Result<bool, Error> {
    let place = place(etcd, connection, keys, machine).await?;
    Ok(place.node.is_some_and(|node| node.machine == machine))
}

async fn get(
    etcd: &Etcd,
    connection: &mut Connection,
    key: String,
) -> Result<Option<String>, Error> {
    let answer = etcd.within("read the fleet's keys", connection.client.get(key, None)).await?;
    Ok(answer.kvs().first().map(|kv| String::from_utf8_lossy(kv.value()).into_owned()))
}

/// Gives this machine its number, the same each time, and says that it is in the fleet under this
/// host's name.
///
/// # Errors
/// When etcd cannot be asked or refuses, or when another machine has that name.
pub async fn join(fleet: &Fleet, host: &str) -> anyhow::Result<u64> {
    if !keys::is_name(host) {
        bail!(
            "this host's name is {host:?}: in a fleet it must be of letters, digits, '.', '_' and \
                '-', as hostnamectl sets it"
        );
    }
    let machine = this_machine(fleet)?;
    let mut etcd = Etcd::new(fleet.clone());
    let mut connection = etcd.connect().await?;
    let keys = etcd.keys();
    let me = Node { machine: machine.clone(), host: host.to_owned() };
    for _ in 0..ROUNDS {
        let number = get(&etcd, &mut connection, keys.machine(&machine)).await?;
        let named = get(&etcd, &mut connection, keys.name(host)).await?;
        let next = get(&etcd, &mut connection, keys.next_number()).await?;
        let given: Option<u64> = number
            .as_deref()
            .map(str::parse)
            .transpose()
            .with_context(|| keys.machine(&machine))?;
        if let Some(named) =
            named.as_ref().filter(|named| given.map(|n| n.to_string()).as_ref() != Some(*named))
        {
            bail!(
                "another machine is in the fleet as {host:?}, with number {named}: give this host \
                    another name, or say 'virt-usb fleet leave --host {host}' if that one is gone \
                    for good"
            );
        }
        let at: u64 =
            next.as_deref().map_or(Ok(FIRST), str::parse).with_context(|| keys.next_number())?;
        let mine = given.unwrap_or(at);
        let was = get(&etcd, &mut connection, keys.node(mine)).await?;
        let was: Option<Node> = was.and_then(|text| serde_json::from_str(&text).ok());
        let mut still = vec![
            same(keys.machine(&machine), number.as_deref()),
            same(keys.name(host), named.as_deref()),
        ];
        let mut puts = vec![
            TxnOp::put(keys.node(mine), me.text(), None),
            TxnOp::put(keys.name(host), mine.to_string(), None),
        ];
        if given.is_none() {
            still.push(same(keys.next_number(), next.as_deref()));
            puts.push(TxnOp::put(keys.next_number(), (mine + 1).to_string(), None));
            puts.push(TxnOp::put(keys.machine(&machine), mine.to_string(), None));
        }
        // It was called otherwise before.
        if let Some(old) = was.map(|node| node.host).filter(|old| old != host) {
            puts.extend([
                TxnOp::delete(keys.name(&old), None),
                TxnOp::delete(keys.host(&old), None),
            ]);
        }
        let txn = connection.client.txn(Txn::new().when(still).and_then(puts));
        if etcd.within("join the fleet", txn).await?.succeeded() {
            return Ok(mine);
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    bail!("the fleet's numbers change all the time: try again")
}

/// The key holds that; or, with nothing, is not there.
fn same(key: String, value: Option<&str>) -> Compare {
    match value {
        Some(value) => Compare::value(key, CompareOp::Equal, value),
        None => Compare::version(key, CompareOp::Equal, 0),
    }
}

/// Takes the host out of the fleet; false if it was not in it. Its machine keeps its number.
///
/// # Errors
/// When etcd cannot be asked or refuses.
pub async fn leave(fleet: &Fleet, host: &str) -> anyhow::Result<bool> {
    let mut etcd = Etcd::new(fleet.clone());
    let mut connection = etcd.connect().await?;
    let keys = etcd.keys();
    let Some(number) = get(&etcd, &mut connection, keys.name(host)).await? else {
        return Ok(false);
    };
    let node: u64 = number.parse().with_context(|| keys.name(host))?;
    let txn = Txn::new().when([same(keys.name(host), Some(&number))]).and_then([
        TxnOp::delete(keys.node(node), None),
        TxnOp::delete(keys.name(host), None),
        TxnOp::delete(keys.host(host), None),
    ]);
    Ok(etcd.within("leave the fleet", connection.client.txn(txn)).await?.succeeded())
}

/// How it is with the fleet.
#[derive(Debug, Serialize)]
pub struct Status {
    /// Each endpoint, and how it is.
    pub endpoints: Vec<Endpoint>,
    /// This host's number there; none: it has not joined.
    pub number: Option<u64>,
    /// The revision that it has published; none: nothing is there of it.
    pub published: Option<u64>,
    /// How many hosts have joined.
    pub hosts: usize,
    /// Those whose documents are not there, by name.
    pub unreachable: Vec<String>,
    /// Devices of all hosts that can be reached.
    pub devices: usize,
    /// Of these, free to be claimed.
    pub available: usize,
    /// It still remembers its first days: nothing makes it forget.
    pub never_compacted: bool,
}

/// How an endpoint is.
#[derive(Debug, Serialize)]
pub struct Endpoint {
    /// URL of the endpoint.
    pub endpoint: String,
    /// What keeps it from answering; none: it answers.
    pub fault: Option<String>,
    /// Its version.
    pub version: Option<String>,
    /// Whether this member leads the cluster.
    pub is_leader: bool,
    /// How much its database takes, in bytes, and how much of that it uses.
    pub db_size: Option<i64>,
    /// Bytes of the database in use.
    pub db_used: Option<i64>,
    /// What it complains of: `NOSPACE`.
    pub alarms: Vec<String>,
}

/// Looks.
///
/// # Errors
/// When no etcd answers or it refuses.
pub async fn status(fleet: &Fleet, host: &str) -> anyhow::Result<Status> {
    let mut etcd = Etcd::new(fleet.clone());
    let mut endpoints = Vec::new();
    for (at, endpoint) in etcd.endpoints().iter().enumerate() {
        let mut found = Endpoint {
            endpoint: endpoint.clone(),
            fault: None,
            version: None,
            is_leader: false,
            db_size: None,
            db_used: None,
            alarms: Vec::new(),
        };
        match etcd.connect_to(at).await {
            Ok(mut connection) => {
                match etcd.within("ask for its state", connection.client.status()).await {
                    Ok(status) => {
                        found.version = Some(status.version().to_owned());
                        found.is_leader = status
                            .header()
                            .is_some_and(|header| header.member_id() == status.leader());
                        found.db_size = Some(status.db_size());
                        found.db_used = Some(status.raft_used_db_size());
                        found.alarms =
                            status.errors().iter().map(|alarm| alarm.trim().to_owned()).collect();
                    }
                    Err(e) => found.fault = Some(e.to_string()),
                }
            }
            Err(Error::Unreachable(why)) => {
                let own = format!("{endpoint}: ");
                found.fault = Some(why.strip_prefix(&own).unwrap_or(&why).to_owned());
            }
            Err(e) => found.fault = Some(e.to_string()),
        }
        endpoints.push(found);
    }
    let mut connection = etcd.connect().await?;
    let keys = etcd.keys();
    let machine = this_machine(fleet)?;
    let place = place(&etcd, &mut connection, &keys, &machine).await?;
    let joined: BTreeSet<String> = below(&etcd, &mut connection, &keys.nodes())
        .await?
        .into_iter()
        .filter_map(|(_, text)| serde_json::from_str(&text).ok())
        .map(|node: Node| node.host)
        .collect();
    let mut found = Status {
        endpoints,
        number: place.number.filter(|_| place.node.is_some_and(|node| node.machine == machine)),
        published: None,
        hosts: joined.len(),
        unreachable: Vec::new(),
        devices: 0,
        available: 0,
        never_compacted: connection.revision > REMEMBERED && {
            let first = GetOptions::new().with_revision(1).with_keys_only();
            etcd.within(
                "read the fleet's keys",
                connection.client.get(keys.next_number(), Some(first)),
            )
            .await
            .is_ok()
        },
    };
    let mut heard = BTreeSet::new();
    for (name, text) in below(&etcd, &mut connection, &keys.hosts()).await? {
        let Ok(document) = HostDocument::parse(&text) else { continue };
        if name == host {
            found.published = Some(document.revision);
        }
        found.devices += document.devices.len();
        found.available += document.devices.iter().filter(|d| d.status == "available").count();
        heard.insert(name);
    }
    found.unreachable = joined.difference(&heard).cloned().collect();
    Ok(found)
}

/// All that stands below the prefix, by key: without the prefix.
async fn below(
    etcd: &Etcd,
    connection: &mut Connection,
    prefix: &str,
) -> Result<Vec<(String, String)>, Error> {
    let mut all = Vec::new();
    let each = |kv: &KeyValue| {
        let name = name(prefix, kv.key());
        all.extend(name.map(|name| (name, String::from_utf8_lossy(kv.value()).into_owned())));
    };
    etcd.list(connection, prefix, each).await?;
    Ok(all)
}
