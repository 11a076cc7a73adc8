//! Keeps the devices of this host and those of a simulation in different inventories. A scan of one
//! in the inventory of the other would record every device as removed, and the agent would detach
//! the devices from the guests.

use rusqlite::Transaction;

use crate::error::Sql;
use crate::{Store, StoreError};

/// The mark of the inventory. An inventory without devices has none.
const MARK: &str = "SELECT max(simulated) FROM compute_nodes WHERE deleted = 0 AND EXISTS (SELECT \
    1 FROM usb_devices WHERE deleted = 0)";

/// Source of the devices in an inventory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    /// The devices that are plugged into this host.
    Host,
    /// A simulation file, or a sysfs tree that was written from one.
    Simulation,
}

impl Store {
    /// Admits scans of that source: checks the inventory now, and in each [`Store::reconcile`],
    /// which marks an inventory without a mark.
    ///
    /// # Errors
    /// If the inventory has devices of the other source, or cannot be read.
    pub fn admit(&mut self, origin: Origin) -> Result<(), StoreError> {
        let found = self.all(MARK, [], |row| row.get::<_, Option<bool>>(0))?.pop().flatten();
        self.origin = Some(origin);
        match refuses(found, origin) {
            true => Err(self.refusal(origin)),
            false => Ok(()),
        }
    }

    pub(crate) fn refusal(&self, origin: Origin) -> StoreError {
        let path = self.path.clone();
        match origin {
            Origin::Host => StoreError::Simulated { path },
            Origin::Simulation => StoreError::NotSimulated { path },
        }
    }
}

const fn refuses(simulated: Option<bool>, origin: Origin) -> bool {
    match origin {
        Origin::Host => matches!(simulated, Some(true)),
        Origin::Simulation => matches!(simulated, Some(false)),
    }
}

/// Checks the mark of the inventory and sets it, if there is none. `Ok(false)`: the inventory has
/// devices of the other source.
pub(crate) fn mark(tx: &Transaction<'_>, origin: Origin) -> Sql<bool> {
    let found: Option<bool> = tx.prepare_cached(MARK)?.query_row([], |row| row.get(0))?;
    if found.is_none() {
        let sql = "UPDATE compute_nodes SET simulated = ?1 WHERE deleted = 0";
        tx.execute(sql, [origin == Origin::Simulation])?;
    }
    Ok(!refuses(found, origin))
}
