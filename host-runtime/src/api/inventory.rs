//! Shared snapshots of the inventory for many readers, read again only after a write.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use axum::body::Bytes;
use virt_usb_model::{DeviceId, InstanceId, ProjectId};
use virt_usb_store::maintain::HostRow;
use virt_usb_store::problems::Problem;
use virt_usb_store::renumber::IDS_A_HOST;
use virt_usb_store::watch::{Moment, Watched};
use virt_usb_store::{ClaimRow, Durability, LONE_NODE, Record, Store, StoreError};

use super::identity::Caller;
use super::policy::{Authorization, Call, may_know_holder, may_with_device};
use super::responses::UsbDevice;
use crate::publish::peers::{Hosts, Peer, Peers, Server};
use crate::timeouts::STORE_LOCK_TIMEOUT;

/// Inventory of this host.
#[derive(Debug, Default)]
pub(super) struct Own {
    /// Entry of this host; `None` before its first discovery.
    pub(super) host: Option<HostRow>,
    /// Devices, ordered by id.
    devices: Vec<Record>,
    claims: HashMap<DeviceId, ClaimRow>,
    owners: HashMap<InstanceId, ProjectId>,
    pub(super) problems: Vec<Problem>,
}

/// State of the inventory and of the other hosts at one moment.
#[derive(Debug, Default)]
pub(super) struct Snapshot {
    pub(super) own: Arc<Own>,
    /// The other hosts, by number.
    pub(super) others: Hosts,
    /// Cached responses by the project that may see them; `None` for administrators.
    answers: Mutex<HashMap<Option<ProjectId>, Bytes>>,
}

/// Maximum number of different groups of readers with a cached response.
const ANSWERS: usize = 64;

impl Own {
    fn new(Moment { hosts, devices, claims, owners, problems, .. }: Moment) -> Self {
        let claims = claims.into_iter().map(|claim| (claim.device_id, claim)).collect();
        let owners =
            owners.into_iter().map(|owner| (owner.instance_uuid, owner.project_id)).collect();
        let host = hosts.into_iter().next();
        Self { host, devices, claims, owners, problems }
    }
}

fn find(devices: &[Record], id: DeviceId) -> Option<&Record> {
    devices.binary_search_by_key(&id, |r| r.entry.id).ok().map(|at| &devices[at])
}

impl Snapshot {
    fn new(own: Arc<Own>, others: Hosts) -> Self {
        Self { own, others, answers: Mutex::default() }
    }

    /// This host's number.
    pub(super) fn number(&self) -> u64 {
        self.own.host.as_ref().map_or(LONE_NODE, |host| host.id)
    }

    /// Devices of all hosts, ordered by id.
    pub(super) fn devices(&self) -> impl Iterator<Item = &Record> {
        let number = self.number();
        let before = self.others.range(..number).flat_map(|(_, other)| other.devices.iter());
        let after = self.others.range(number..).flat_map(|(_, other)| other.devices.iter());
        before.chain(&self.own.devices).chain(after)
    }

    /// Devices of this host, ordered by id.
    pub(super) fn own_devices(&self) -> impl Iterator<Item = &Record> {
        self.own.devices.iter()
    }

    /// The name of the host that has the device.
    fn host_of(&self, record: &Record) -> &str {
        match self.others.get(&record.entry.compute_node_id) {
            Some(other) => &other.name,
            None => self.own.host.as_ref().map_or("", |host| &host.host),
        }
    }

    /// Devices of the hosts that have changed since the other snapshot.
    pub(super) fn changed_since<'a>(
        &'a self,
        before: &'a Self,
    ) -> impl Iterator<Item = &'a Record> {
        let own = if Arc::ptr_eq(&self.own, &before.own) { &[][..] } else { &self.own.devices };
        let is_same = |number: &u64, other: &Arc<Peer>| {
            before.others.get(number).is_some_and(|known| Arc::ptr_eq(known, other))
        };
        let others = self.others.iter().filter(move |(number, other)| !is_same(number, other));
        own.iter().chain(others.flat_map(|(_, other)| other.devices.iter()))
    }

    /// The other host that the device belongs to; `None` if it belongs to this host or is unknown.
    pub(super) fn elsewhere(&self, device: DeviceId) -> Option<&Peer> {
        let number = (device.get() - 1) / IDS_A_HOST + 1;
        self.others
            .get(&number)
            .map(Arc::as_ref)
            .filter(|other| find(&other.devices, device).is_some())
    }

    /// Server of another host with this id, and that host.
    pub(super) fn other_server(&self, id: InstanceId) -> Option<(&Peer, &Server)> {
        let find = |other: &'_ Arc<Peer>| other.servers.iter().position(|server| server.id == id);
        let (other, at) = self.others.values().find_map(|other| Some((other, find(other)?)))?;
        Some((other, &other.servers[at]))
    }

    /// The response of `make`, computed once for all callers who may see the same devices. It must
    /// not depend on the caller in any other way.
    pub(super) fn answer<E>(
        &self,
        caller: &Caller,
        make: impl FnOnce() -> Result<Bytes, E>,
    ) -> Result<Bytes, E> {
        let who = caller.project.clone().filter(|_| !caller.is_admin());
        let known = self.answers.lock().unwrap_or_else(PoisonError::into_inner).get(&who).cloned();
        if let Some(known) = known {
            return Ok(known);
        }
        let made = make()?;
        let mut answers = self.answers.lock().unwrap_or_else(PoisonError::into_inner);
        if answers.len() < ANSWERS {
            answers.insert(who, made.clone());
        }
        Ok(made)
    }

    pub(super) fn device(&self, id: DeviceId) -> Option<&Record> {
        find(&self.own.devices, id).or_else(|| find(&self.elsewhere(id)?.devices, id))
    }

    /// Claims, ordered by device.
    pub(super) fn claims(&self) -> impl Iterator<Item = &ClaimRow> {
        self.own_devices().filter_map(|record| self.claim(record.entry.id))
    }

    pub(super) fn claim(&self, device: DeviceId) -> Option<&ClaimRow> {
        self.own.claims.get(&device).or_else(|| self.elsewhere(device)?.claims.get(&device))
    }

    /// Owner of an instance, as set by an administrator.
    pub(super) fn owner(&self, instance: InstanceId) -> Option<&ProjectId> {
        self.own.owners.get(&instance)
    }

    /// Whether the caller may make this call for the device.
    pub(super) fn may(&self, caller: &Caller, call: Call, record: &Record) -> Authorization {
        may_with_device(caller, call, record, self.claim(record.entry.id))
    }

    /// Whether the caller may see the device.
    pub(super) fn sees(&self, caller: &Caller, record: &Record) -> bool {
        self.may(caller, Call::LookAt, record) == Authorization::Allowed
    }

    /// Devices that the caller may see.
    pub(super) fn seen(&self, caller: &Caller) -> impl Iterator<Item = &Record> {
        self.devices().filter(move |record| self.sees(caller, record))
    }

    /// Whether the instance holds the device and the caller may know it.
    pub(super) fn shows_holder(
        &self,
        caller: &Caller,
        record: &Record,
        instance: InstanceId,
    ) -> bool {
        let claim = self.claim(record.entry.id);
        claim.is_some_and(|claim| claim.instance_uuid == instance && may_know_holder(caller, claim))
    }

    /// A device as the caller may see it.
    pub(super) fn shown(&self, record: &Record, caller: &Caller) -> UsbDevice {
        UsbDevice::new(record, self.host_of(record), self.claim(record.entry.id), caller)
    }
}

/// The inventory of one `state_dir`, and the rest of the fleet.
pub(super) struct Inventory {
    state_dir: PathBuf,
    others: Option<Peers>,
    open: Mutex<Option<(Watched, Arc<Snapshot>)>>,
}

impl Inventory {
    pub(super) fn new(state_dir: PathBuf, others: Option<Peers>) -> Self {
        Self { state_dir, others, open: Mutex::default() }
    }

    /// Storage for updates of the other hosts; `None` if this host is in no fleet.
    pub(super) fn following(&self) -> Option<Peers> {
        self.others.clone()
    }

    /// Signals that a client is active; see [`Peers::wake`].
    pub(super) async fn wake(&self) {
        if let Some(others) = &self.others {
            others.wake().await;
        }
    }

    fn others(&self) -> Hosts {
        self.others.as_ref().map(Peers::now).unwrap_or_default()
    }

    /// The current snapshot, with devices that were unplugged while no instance held them. Reads
    /// the store each time.
    ///
    /// # Errors
    /// If the store cannot be read.
    pub(super) fn with_deleted(&self) -> Result<Arc<Snapshot>, StoreError> {
        let store = Store::open(&self.state_dir, STORE_LOCK_TIMEOUT, Durability::Boot)?;
        let devices = store.all_devices()?;
        let own = Own::new(Moment { devices, ..store.moment(0)? });
        Ok(Arc::new(Snapshot::new(Arc::new(own), self.others())))
    }

    /// The current snapshot.
    ///
    /// # Errors
    /// If the store cannot be read.
    pub(super) fn now(&self) -> Result<Arc<Snapshot>, StoreError> {
        // Concurrent callers wait for one read, and do not read a second time.
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        let (mut watched, known) = match open.take() {
            Some(known) => known,
            None => (Watched::open(&self.state_dir, STORE_LOCK_TIMEOUT)?, Arc::default()),
        };
        let others = self.others();
        let own = if watched.has_news()? {
            let read = || watched.store().moment(0);
            Some(Arc::new(Own::new(tokio::task::block_in_place(read)?)))
        } else {
            None
        };
        let snapshot = match own {
            None if Arc::ptr_eq(&others, &known.others)
                || (others.is_empty() && known.others.is_empty()) =>
            {
                known
            }
            own => Arc::new(Snapshot::new(own.unwrap_or_else(|| known.own.clone()), others)),
        };
        *open = Some((watched, snapshot.clone()));
        Ok(snapshot)
    }
}
