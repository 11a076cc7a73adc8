//! Joins and leaves a fleet, and reports the fleet's status.

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::{Context as _, bail};
use etcd_client::{Compare, CompareOp, GetOptions, KeyValue, Txn, TxnOp};
use serde::Serialize;
use virt_usb_config::Fleet;
use virt_usb_model::HostDocument;

use crate::etcd::{Connection, Error, Etcd, name};
use crate::keys::{self, Keys, Node};

/// The first number that a fleet gives. Number 1 means a host that has joined no fleet.
const FIRST_NUMBER: u64 = 2;
/// Revision after which etcd should have compacted its first revision.
const COMPACTED_BY_REVISION: i64 = 10_000;
/// Maximum number of attempts to join while other hosts join at the same moment.
const MAX_JOIN_ATTEMPTS: usize = 100;

/// Membership of a machine in the fleet.
pub struct Membership {
    /// Number of the machine. `None` if it has never joined.
    pub number: Option<u64>,
    /// The machine and host that have that number now.
    pub node: Option<Node>,
}

/// Returns this machine's name in the fleet.
///
/// # Errors
/// If the machine id cannot be read.
pub fn this_machine(fleet: &Fleet) -> Result<String, Error> {
    let path = &fleet.machine_id;
    let error = |why: String| Error::File { path: path.clone(), why };
    let id = std::fs::read_to_string(path).map_err(|e| error(e.to_string()))?;
    // 32 hexadecimal digits (machine-id(5)), or "uninitialized" in an image that was never booted.
    let id = id.trim();
    if id.len() < 16 || !id.bytes().all(|byte| byte.is_ascii_hexdigit() || byte == b'-') {
        return Err(error(
            "it contains no machine id: 'systemd-machine-id-setup' creates one".into(),
        ));
    }
    Ok(keys::machine(id))
}

/// Reads the number of a machine, and the machine and host that have this number now.
///
/// # Errors
/// If etcd does not respond.
pub async fn membership(
    etcd: &Etcd,
    connection: &mut Connection,
    keys: &Keys,
    machine: &str,
) -> Result<Membership, Error> {
    let number =
        get(etcd, connection, keys.machine(machine)).await?.and_then(|text| text.parse().ok());
    let node = match number {
        Some(number) => get(etcd, connection, keys.node(number)).await?,
        None => None,
    };
    Ok(Membership { number, node: node.and_then(|text| serde_json::from_str(&text).ok()) })
}

/// Whether the machine is in the fleet.
pub async fn is_member(
    etcd: &Etcd,
    connection: &mut Connection,
    keys: &Keys,
    machine: &str,
) -> Result<bool, Error> {
    let membership = membership(etcd, connection, keys, machine).await?;
    Ok(membership.node.is_some_and(|node| node.machine == machine))
}

async fn get(
    etcd: &Etcd,
    connection: &mut Connection,
    key: String,
) -> Result<Option<String>, Error> {
    let answer = etcd.within("read the fleet's keys", connection.client.get(key, None)).await?;
    Ok(answer.kvs().first().map(|kv| String::from_utf8_lossy(kv.value()).into_owned()))
}

/// Joins the fleet under this host's name. Returns the number of this machine, which is the same
/// each time it joins.
///
/// # Errors
/// If etcd does not respond or refuses, or if another machine has that name.
pub async fn join(fleet: &Fleet, host: &str) -> anyhow::Result<u64> {
    if !keys::is_name(host) {
        bail!(
            "this host's name is {host:?}: in a fleet it may contain only letters, digits, '.', \
                '_' and '-'; 'hostnamectl set-hostname' changes it"
        );
    }
    let machine = this_machine(fleet)?;
    let mut etcd = Etcd::new(fleet.clone());
    let mut connection = etcd.connect().await?;
    let keys = etcd.keys();
    let me = Node { machine: machine.clone(), host: host.to_owned() };
    for _ in 0..MAX_JOIN_ATTEMPTS {
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
                    another name, or, if that machine no longer exists, run 'virt-usb fleet leave \
                    --host {host}'"
            );
        }
        let at: u64 = next
            .as_deref()
            .map_or(Ok(FIRST_NUMBER), str::parse)
            .with_context(|| keys.next_number())?;
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
        // The host had another name before.
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
    bail!("too many hosts join the fleet at the same time: try again")
}

/// Condition that the key has that value or, without a value, does not exist.
fn same(key: String, value: Option<&str>) -> Compare {
    match value {
        Some(value) => Compare::value(key, CompareOp::Equal, value),
        None => Compare::version(key, CompareOp::Equal, 0),
    }
}

/// Removes the host from the fleet. Returns false if it was not a member. The machine keeps its
/// number.
///
/// # Errors
/// If etcd does not respond or refuses.
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

/// Status of the fleet.
#[derive(Debug, Serialize)]
pub struct Status {
    /// Status of each endpoint.
    pub endpoints: Vec<Endpoint>,
    /// Number of this host. `None` if it has not joined.
    pub number: Option<u64>,
    /// The revision that this host has published. `None` if it has published no document.
    pub published: Option<u64>,
    /// Number of hosts that have joined.
    pub hosts: usize,
    /// Names of the hosts without a document.
    pub unreachable: Vec<String>,
    /// Number of devices of all reachable hosts.
    pub devices: usize,
    /// Number of devices that can be claimed.
    pub available: usize,
    /// Whether etcd was never compacted, although it should have been.
    pub never_compacted: bool,
}

/// Status of an endpoint.
#[derive(Debug, Serialize)]
pub struct Endpoint {
    /// URL of the endpoint.
    pub endpoint: String,
    /// Error of the connection. `None` if the endpoint responds.
    pub fault: Option<String>,
    /// Version of etcd.
    pub version: Option<String>,
    /// Whether this member leads the cluster.
    pub is_leader: bool,
    /// Size of the database file in bytes.
    pub db_size: Option<i64>,
    /// Bytes of the database file in use.
    pub db_used: Option<i64>,
    /// Active alarms, for example `NOSPACE`.
    pub alarms: Vec<String>,
}

/// Reads the status of the fleet.
///
/// # Errors
/// If no etcd endpoint responds, or etcd refuses.
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
                match etcd.within("read its status", connection.client.status()).await {
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
    let membership = membership(&etcd, &mut connection, &keys, &machine).await?;
    let joined: BTreeSet<String> = below(&etcd, &mut connection, &keys.nodes())
        .await?
        .into_iter()
        .filter_map(|(_, text)| serde_json::from_str(&text).ok())
        .map(|node: Node| node.host)
        .collect();
    let mut found = Status {
        endpoints,
        number: membership
            .number
            .filter(|_| membership.node.is_some_and(|node| node.machine == machine)),
        published: None,
        hosts: joined.len(),
        unreachable: Vec::new(),
        devices: 0,
        available: 0,
        never_compacted: connection.revision > COMPACTED_BY_REVISION && {
            let first = GetOptions::new().with_revision(1).with_keys_only();
            etcd.within(
                "read the fleet's keys",
                connection.client.get(keys.next_number(), Some(first)),
            )
            .await
            .is_ok()
        },
    };
    let mut published = BTreeSet::new();
    for (name, text) in below(&etcd, &mut connection, &keys.hosts()).await? {
        let Ok(document) = HostDocument::parse(&text) else { continue };
        if name == host {
            found.published = Some(document.revision);
        }
        found.devices += document.devices.len();
        found.available += document.devices.iter().filter(|d| d.status == "available").count();
        published.insert(name);
    }
    found.unreachable = joined.difference(&published).cloned().collect();
    Ok(found)
}

/// Lists all keys below the prefix, without the prefix, with their values.
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
