//! What there is, for many readers at once: read from the store when somebody has written, and not before.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use virt_usb_model::{DeviceId, InstanceId};
use virt_usb_store::watch::{Moment, Watched};
use virt_usb_store::{ClaimRow, Record, StoreError};

use super::documents::UsbDevice;
use super::identity::Caller;
use super::policy::{Call, Verdict, may_know_holder, may_with_device};
use crate::agent::PATIENCE;

/// One moment of the inventory.
#[derive(Debug, Default)]
pub(super) struct Snapshot {
    /// By id.
    pub(super) devices: Vec<Record>,
    claims: HashMap<DeviceId, ClaimRow>,
}

impl Snapshot {
    fn new(Moment { devices, claims, .. }: Moment) -> Self {
        Self { devices, claims: claims.into_iter().map(|claim| (claim.device_id, claim)).collect() }
    }

    pub(super) fn device(&self, id: DeviceId) -> Option<&Record> {
        self.devices.binary_search_by_key(&id, |r| r.entry.id).ok().map(|at| &self.devices[at])
    }

    pub(super) fn claim(&self, device: DeviceId) -> Option<&ClaimRow> {
        self.claims.get(&device)
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
