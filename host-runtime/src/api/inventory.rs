//! What there is, for many readers at once: read from the store when somebody has written, and not before.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use axum::body::Bytes;
use virt_usb_model::{DeviceId, InstanceId, ProjectId};
use virt_usb_store::maintain::HostRow;
use virt_usb_store::problems::Problem;
use virt_usb_store::watch::{Moment, Watched};
use virt_usb_store::{ClaimRow, Durability, Record, Store, StoreError};

use super::documents::UsbDevice;
use super::identity::Caller;
use super::policy::{Call, Verdict, may_know_holder, may_with_device};
use crate::agent::PATIENCE;

/// One moment of the inventory.
#[derive(Debug, Default)]
pub(super) struct Snapshot {
    /// This host; none before its first discovery.
    pub(super) host: Option<HostRow>,
    /// By id.
    pub(super) devices: Vec<Record>,
    claims: HashMap<DeviceId, ClaimRow>,
    owners: HashMap<InstanceId, ProjectId>,
    pub(super) problems: Vec<Problem>,
    /// Answers that are asked for again and again, by what their readers may see.
    answers: Mutex<HashMap<Option<ProjectId>, Bytes>>,
}

/// For so many kinds of readers an answer is kept.
const ANSWERS: usize = 64;

impl Snapshot {
    fn new(Moment { hosts, devices, claims, owners, problems, .. }: Moment) -> Self {
        let claims = claims.into_iter().map(|claim| (claim.device_id, claim)).collect();
        let owners = owners.into_iter().map(|owner| (owner.instance_uuid, owner.project_id)).collect();
        let host = hosts.into_iter().next();
        Self { host, devices, claims, owners, problems, answers: Mutex::default() }
    }

    /// What `make` makes, once for all who see the same; it says nothing else of its caller.
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
        self.devices.binary_search_by_key(&id, |r| r.entry.id).ok().map(|at| &self.devices[at])
    }

    /// By device.
    pub(super) fn claims(&self) -> impl Iterator<Item = &ClaimRow> {
        self.devices.iter().filter_map(|record| self.claim(record.entry.id))
    }

    pub(super) fn claim(&self, device: DeviceId) -> Option<&ClaimRow> {
        self.claims.get(&device)
    }

    /// Whose an instance is, as an administrator has said.
    pub(super) fn owner(&self, instance: InstanceId) -> Option<&ProjectId> {
        self.owners.get(&instance)
    }

    /// What the caller may do with a device.
    pub(super) fn may(&self, caller: &Caller, call: Call, record: &Record) -> Verdict {
        may_with_device(caller, call, record, self.claim(record.entry.id))
    }

    /// Whether the caller may know of the device.
    pub(super) fn sees(&self, caller: &Caller, record: &Record) -> bool {
        self.may(caller, Call::LookAt, record) == Verdict::Allowed
    }

    /// The devices that the caller may know of.
    pub(super) fn seen(&self, caller: &Caller) -> impl Iterator<Item = &Record> {
        self.devices.iter().filter(move |record| self.sees(caller, record))
    }

    /// Whether the caller may know that the instance has the device.
    pub(super) fn shows_holder(&self, caller: &Caller, record: &Record, instance: InstanceId) -> bool {
        let claim = self.claim(record.entry.id);
        claim.is_some_and(|claim| claim.instance_uuid == instance && may_know_holder(caller, claim))
    }

    /// A device as the caller may see it.
    pub(super) fn shown(&self, record: &Record, caller: &Caller) -> UsbDevice {
        UsbDevice::new(record, self.claim(record.entry.id), caller)
    }
}

/// The inventory of one `state_dir`.
pub(super) struct Inventory {
    state_dir: PathBuf,
    open: Mutex<Option<(Watched, Arc<Snapshot>)>>,
}

impl Inventory {
    pub(super) fn new(state_dir: PathBuf) -> Self {
        Self { state_dir, open: Mutex::default() }
    }

    /// As it is now, with the devices that were unplugged while nobody had them. Read anew each time.
    ///
    /// # Errors
    /// When it cannot be read.
    pub(super) fn with_deleted(&self) -> Result<Arc<Snapshot>, StoreError> {
        let store = Store::open(&self.state_dir, PATIENCE, Durability::Boot)?;
        let devices = store.all_devices()?;
        Ok(Arc::new(Snapshot::new(Moment { devices, ..store.moment(0)? })))
    }

    /// As it is now.
    ///
    /// # Errors
    /// When it cannot be read.
    pub(super) fn now(&self) -> Result<Arc<Snapshot>, StoreError> {
        // Whoever comes while it is read anew waits for that, and no second one reads it.
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        let (mut watched, known) = match open.take() {
            Some(known) => known,
            None => (Watched::open(&self.state_dir, PATIENCE)?, Arc::default()),
        };
        let snapshot = if watched.has_news()? {
            let read = || watched.store().moment(0);
            Arc::new(Snapshot::new(tokio::task::block_in_place(read)?))
        } else {
            known
        };
        *open = Some((watched, snapshot.clone()));
        Ok(snapshot)
    }
}
