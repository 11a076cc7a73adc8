//! What there is, for many readers at once: read from the store when somebody has written, and not before.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use virt_usb_model::DeviceId;
use virt_usb_store::watch::{Moment, Watched};
use virt_usb_store::{ClaimRow, Record, StoreError};

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
