//! Consistent snapshots for programs that watch the inventory, and changes since a snapshot.

use std::path::Path;
use std::time::Duration;

use crate::events::{EventRow, Filter};
use crate::maintain::HostRow;
use crate::problems::Problem;
use crate::{ClaimRow, Durability, Owner, Record, Store, StoreError};

/// A consistent snapshot of devices, claims, problems and events: it contains the device of every
/// claim.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Moment {
    /// Hosts, ordered by id.
    pub hosts: Vec<HostRow>,
    /// Devices that are plugged in or held, ordered by id.
    pub devices: Vec<Record>,
    /// All claims, ordered by device.
    pub claims: Vec<ClaimRow>,
    /// Owners that administrators have set, ordered by instance.
    pub owners: Vec<Owner>,
    /// All problems, ordered by instance.
    pub problems: Vec<Problem>,
    /// The newest events, oldest first.
    pub events: Vec<EventRow>,
}

impl Store {
    /// Takes a snapshot, with the newest `events` events.
    ///
    /// # Errors
    /// When the database cannot be read.
    pub fn moment(&self, events: u32) -> Result<Moment, StoreError> {
        let conn = self.conn()?;
        let _moment = conn.unchecked_transaction().map_err(|e| self.fault(&e))?;
        Ok(Moment {
            hosts: self.hosts()?,
            devices: self.devices()?,
            claims: self.claims()?,
            owners: self.owners()?,
            problems: self.problems()?,
            events: match events {
                0 => Vec::new(),
                limit => self.events(&Filter { limit, ..Filter::default() })?,
            },
        })
    }
}

/// A store for programs that watch the inventory for hours: it reports writes, and stays with the
/// inventory when its file is replaced.
#[derive(Debug)]
pub struct Watched {
    store: Store,
    lock_timeout: Duration,
    /// SQLite's own counter: another value than before once another connection has committed.
    seen: Option<i64>,
}

impl Watched {
    /// Opens the inventory in `state_dir`, which must be there, as [`Store::open`] does.
    ///
    /// # Errors
    /// As [`Store::open`].
    pub fn open(state_dir: &Path, lock_timeout: Duration) -> Result<Self, StoreError> {
        let store = Store::open(state_dir, lock_timeout, Durability::Power)?;
        Ok(Self { store, lock_timeout, seen: None })
    }

    /// The store, to be read.
    pub const fn store(&self) -> &Store {
        &self.store
    }

    /// Whether there is something new since this was asked last, or an error was given; the first
    /// time there is.
    ///
    /// # Errors
    /// When the database cannot be read, or the file that has taken its place cannot be opened.
    pub fn has_news(&mut self) -> Result<bool, StoreError> {
        let mut before = self.seen.take();
        self.store.restart_lock_timeout();
        if self.store.stay().is_err() {
            let dir = self.store.path().parent().unwrap_or(Path::new("/")).to_path_buf();
            self.store = Store::open(&dir, self.lock_timeout, Durability::Power)?;
            before = None;
        }
        let now = self.store.conn()?.pragma_query_value(None, "data_version", |row| row.get(0));
        let now = now.map_err(|e| self.store.fault(&e))?;
        self.seen = Some(now);
        Ok(before != self.seen)
    }
}
