//! The inventory of one host in SQLite: devices, claims, assignments, flavors, grants, audit
//! events.
//!
//! This file is the authority over the devices of its host. Claims are made under SQLite's write
//! lock: if two instances request the same device, one gets it and the other is refused. No network
//! is needed.
//!
//! | module | what it does |
//! |---|---|
//! | `open` | opens, makes, migrates; durability; lock deadline |
//! | [`hints`] | whether the database may know something, without opening it |
//! | [`claim`] | takes all of an instance's devices, or none |
//! | [`release`] | confirms, gives back, voids |
//! | [`adopt`] | takes over what a domain's own XML already holds |
//! | [`reconcile`] | brings the rows in line with what is plugged in |
//! | [`forget`] | removes rows of devices that are gone for good |
//! | `flavors`, `grants`, `assignments`, `owners`, [`events`], [`problems`] | the other tables |
//! | [`maintain`] | check, backup, prune |
//! | [`watch`] | what there is at one moment, and whether it has changed since |
//! | [`rules`] | what the configuration held when it was last read |
//! | [`recover`] | restore, rebuild: another content in the inventory's place |
//! | [`user`] | with whose rights all of it is done: those of the folder's owner |
//!
//! Invariants, each held by one piece of code:
//! - `usb_devices.status`, `status_reason`, `instance_uuid` and `deleted` are derived, in
//!   `device::refresh`, and written by `device::write_state` alone.
//! - A device has at most one claim: `claims.device_id` is unique.
//! - An id is never used again: rows of devices that went are kept, marked deleted, and come back
//!   with their device, until they are forgotten ([`forget`]).
//! - A hint is never missing for a row that is there: see [`hints`].
//! - Root touches nothing in `state_dir`: the connection is reached through `Store::conn` alone,
//!   which makes the thread the folder's owner (see [`user`]).

pub mod adopt;
mod allocate;
mod assignments;
pub mod claim;
mod claim_write;
mod device;
mod error;
pub mod events;
mod files;
pub mod flaps;
mod flavors;
pub mod forget;
mod grants;
pub mod hints;
pub mod maintain;
mod nova_metadata;
mod open;
mod origin;
mod owners;
mod places;
pub mod problems;
pub mod quarantine;
mod query;
pub mod reconcile;
pub mod recover;
pub mod release;
pub mod renumber;
pub mod rules;
mod salvage;
pub mod user;
pub mod watch;

use std::path::{Path, PathBuf};
use std::time::Duration;

pub use assignments::{Assignment, Given, Source, TooMany};
pub use device::{ClaimRow, Location, Record};
pub use error::StoreError;
pub use flavors::StoredFlavor;
pub use grants::StoredGrant;
pub use open::{Durability, SCHEMA};
pub use origin::Origin;
pub use owners::Owner;

/// The database's name inside `state_dir`.
pub const FILE_NAME: &str = "inventory.sqlite";
/// The number of a host that has joined no fleet.
pub const LONE_NODE: u64 = 1;

/// An open inventory. Each thread opens its own.
#[derive(Debug)]
pub struct Store {
    database: open::Database,
    path: PathBuf,
    /// Identity of the file when it was opened.
    file: Option<files::Identity>,
    hints: hints::Hints,
    durability: Durability,
    lock_timeout: Duration,
    deadline: open::Deadline,
    /// Source of the devices that [`Store::reconcile`] records, if [`Store::admit`] was called.
    origin: Option<Origin>,
}

impl Store {
    /// Closes the store in a process that is about to exit: the kernel frees memory and locks
    /// faster than SQLite does, and closing does nothing else in a store that was opened by
    /// [`Store::open`].
    pub fn leave(mut self) {
        self.database.be_root_again();
        std::mem::forget(self);
    }

    /// The database's file.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

/// When and on whose behalf something is written.
#[derive(Debug, Clone, PartialEq)]
pub struct Context {
    /// The boot id, `/proc/sys/kernel/random/boot_id`: a claim does not outlive it.
    pub boot_id: String,
    /// Seconds since boot, sleep included, which no clock change moves: `/proc/uptime`.
    pub uptime: f64,
    /// How long a pending claim of this boot may stay unconfirmed, in seconds.
    pub pending_grace: f64,
    /// The program and what it is doing, for the audit: `hook prepare`.
    pub actor: String,
}

/// SQL for the present moment: UTC, ISO 8601 with milliseconds.
pub(crate) const NOW: &str = "strftime('%Y-%m-%dT%H:%M:%fZ', 'now')";
