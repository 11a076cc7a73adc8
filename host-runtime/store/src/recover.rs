//! Another content in the inventory's place: a backup's, or one that is made of what can still be
//! read of a damaged one.
//!
//! ```text
//!                                          ┌── it can be locked: copy aside ─► lock ─► salvage ─► build beside ─► all pages, one transaction
//!  what stands there, sound or damaged ────┤
//!                                          └── it cannot, or is missing:         salvage a copy ─► build beside ─► move aside ─► rename
//! ```
//! Where SQLite can lock the file, it *stays*: its pages are overwritten in one transaction of its
//! own (the backup API), so that hooks and agent that have it open wait for the lock and then see
//! the new content, and what they wrote until then is in it. A file that is in use must not be
//! renamed: its log is found by name, and whoever still has the old one would write into that of
//! the new (<https://www.sqlite.org/howtocorrupt.html>, 2.4). Where the first page is beyond SQLite
//! nobody can write it either: there the files are moved aside, and the new one is renamed into
//! place. A connection that was opened before says so at its next write ([`StoreError::Replaced`]).
//!
//! Killed anywhere, the old content or the new one is in place, and it can be done again. What was
//! there is never deleted.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::{self, File, TryLockError};
use std::io::{self, ErrorKind};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use rusqlite::backup::{Backup, StepResult};
use rusqlite::types::Value;
use rusqlite::{Connection, ErrorCode, OpenFlags, Row, Transaction, params, params_from_iter};
use rustix::fs::OFlags;
use serde::Serialize;
use virt_usb_model::{DeviceId, DevicePath, InstanceId, PortPath, Serial, UsbId};

use crate::device::{ClaimRow, Record, parse, refresh};
use crate::error::{Sql, bad_row};
use crate::events::{Event, EventRow, record};
use crate::files::{self, with_suffix};
use crate::hints::{self, Hints};
use crate::open::{canonical, enter, user_of};
use crate::reconcile::label;
use crate::release::{HELD_BY_THE_AUDIT, SEEN_BY_THE_AUDIT};
use crate::renumber::{self, IDS};
use crate::salvage::{self, Salvage, Table};
use crate::user::User;
use crate::{
    Assignment, Context, Durability, FILE_NAME, Owner, SCHEMA, Store, StoreError, StoredFlavor,
    StoredGrant, nova_metadata,
};

/// Where the new inventory is built, beside the old one.
const BESIDE: &str = "inventory.sqlite.new";
/// Maximum number of copies of a damaged file, if other processes write to it during the copy.
const TRIES: u32 = 40;
/// Between two of them.
const PAUSE: Duration = Duration::from_millis(20);
/// Number of device ids that are skipped if the assigned ids are not known, so that an id never
/// names another device.
const MARGIN: i64 = 1000;

/// How the inventory is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Health {
    /// There is none.
    Missing,
    /// Nothing is wrong with it.
    Sound,
    /// Something is: the first that was found.
    Damaged(String),
}

/// Options of a restore or rebuild.
#[derive(Debug, Clone, Copy)]
pub struct RebuildRequest<'a> {
    /// `restore` or `rebuild`: in file names and in the audit.
    pub what: &'static str,
    /// Backup to restore; `None` rebuilds from the readable content of the inventory.
    pub backup: Option<&'a Path>,
    /// Whether `fill` adopts what the guests that run have: then a backup's claims need not be
    /// believed.
    pub guests_known: bool,
    /// Ids that are in use elsewhere, in guests that run: no new device gets one.
    pub ids: &'a [DeviceId],
}

/// Result for a table.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Kept {
    /// Name of the table.
    pub table: String,
    /// Rows that were taken over.
    pub rows: usize,
    /// Rows that could be read, and made no sense.
    pub refused: usize,
    /// Whether part of it could not be read.
    pub torn: bool,
}

/// Result of a restore or rebuild.
#[derive(Debug)]
pub struct Recovered {
    /// The new inventory.
    pub store: Store,
    /// Where the one before is.
    pub aside: Option<PathBuf>,
    /// Tables that were kept.
    pub kept: Vec<Kept>,
    /// Number of devices whose ids were assigned but whose rows cannot be read.
    pub lost_devices: u64,
    /// Whether the file stayed and has another content. If not, an agent that runs ends: the file
    /// that it opened was replaced.
    pub in_place: bool,
}

/// How the inventory in `state_dir` is.
///
/// # Errors
/// What keeps it from being looked at, or from being ours: permission, a lock, another program's
/// file, a newer schema.
pub fn health(state_dir: &Path, lock_timeout: Duration) -> Result<Health, StoreError> {
    let look = || {
        let store = quiet(state_dir, lock_timeout)?;
        Ok(match store.version()? {
            None => Health::Missing,
            Some(version) => {
                let faults = if version == SCHEMA { store.faults()? } else { store.integrity()? };
                faults.first().map_or(Health::Sound, |first| Health::Damaged(one_line(first)))
            }
        })
    };
    match look() {
        Err(StoreError::Missing { .. }) => Ok(Health::Missing),
        Err(
            StoreError::Corrupt { what, .. }
            | StoreError::Row { what, .. }
            | StoreError::Other { what, .. },
        ) => Ok(Health::Damaged(one_line(&what))),
        other => other,
    }
}

fn one_line(text: &str) -> String {
    text.lines().map(str::trim).collect::<Vec<_>>().join(" ")
}

/// Opened to be looked at: closing it folds nothing into what may be damaged.
fn quiet(state_dir: &Path, lock_timeout: Duration) -> Result<Store, StoreError> {
    let store = Store::connect(state_dir, lock_timeout, Durability::Power)?;
    store.keep_log()?;
    Ok(store)
}

/// Puts another content in the inventory's place. `fill` brings it in line with the world before
/// anybody sees it: what is plugged in, what the guests have.
///
/// # Errors
/// Why it could not be; then the inventory is what it was.
pub fn replace(
    state_dir: &Path,
    lock_timeout: Duration,
    request: &RebuildRequest<'_>,
    context: &Context,
    fill: &mut dyn FnMut(&mut Store) -> Result<(), StoreError>,
) -> Result<Recovered, StoreError> {
    let backup = request.backup.map(Source::open).transpose()?;
    let _owner = enter(user_of(state_dir)?, state_dir)?;
    files::make_dir(state_dir)?;
    let state_dir = canonical(state_dir)?;
    let path = state_dir.join(FILE_NAME);
    let folder = fs::metadata(&state_dir).map_err(|e| StoreError::file(&state_dir, e))?;
    if files::is_strange_to(&folder) {
        return Err(StoreError::permission(path));
    }
    let _one = one_at_a_time(&state_dir, &path)?;
    let scratch = Scratch::make(&state_dir).map_err(|e| e.of(&path))?;
    Job { state_dir, path, scratch, lock_timeout, request, backup, context }.run(fill)
}

/// Lock on the folder that allows one restore or rebuild at a time. The kernel releases it when the
/// process ends in any way.
fn one_at_a_time(state_dir: &Path, path: &Path) -> Result<File, StoreError> {
    let folder = File::open(state_dir).map_err(|e| StoreError::file(state_dir, e))?;
    match folder.try_lock() {
        Ok(()) => Ok(folder),
        Err(TryLockError::WouldBlock) => Err(StoreError::Recovering { path: path.into() }),
        Err(TryLockError::Error(e)) => Err(StoreError::file(state_dir, e)),
    }
}

/// Folder in which the new inventory is built. The remains of a killed process may be removed.
struct Scratch(PathBuf);

impl Scratch {
    fn make(state_dir: &Path) -> Result<Self, StoreError> {
        let scratch = Self(state_dir.join(BESIDE));
        scratch.clear().map_err(|e| StoreError::file(&scratch.0, e))?;
        files::make_dir(&scratch.0)?;
        Ok(scratch)
    }

    fn clear(&self) -> std::io::Result<()> {
        match fs::remove_dir_all(&self.0) {
            Err(e) if e.kind() != ErrorKind::NotFound => Err(e),
            _ => Ok(()),
        }
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // The next one clears what is left.
        drop(self.clear());
    }
}

struct Job<'a> {
    state_dir: PathBuf,
    path: PathBuf,
    scratch: Scratch,
    lock_timeout: Duration,
    request: &'a RebuildRequest<'a>,
    backup: Option<Source>,
    context: &'a Context,
}

/// A backup, opened with the rights of the user who may put another file in its place: root's tool
/// copies into a folder of the agent's user, who must learn nothing by it.
struct Source {
    path: PathBuf,
    file: File,
    /// Log of an inventory that was copied while it was in use.
    log: Option<File>,
}

impl Source {
    fn open(path: &Path) -> Result<Self, StoreError> {
        let fault = |e| StoreError::file(path, e);
        let _user = User::of(path).and_then(User::enter).map_err(fault)?;
        let open = |path: &Path| {
            // A pipe without a writer would be waited for.
            let flags = i32::try_from(OFlags::NONBLOCK.bits()).unwrap_or_default();
            let file = File::options().read(true).custom_flags(flags).open(path)?;
            match file.metadata()?.is_file() {
                true => Ok(file),
                false => Err(io::Error::other("it is not a regular file")),
            }
        };
        let file = open(path).map_err(fault)?;
        let log = match open(&with_suffix(path, "-wal")) {
            Err(e) if e.kind() == ErrorKind::NotFound => None,
            log => Some(log.map_err(fault)?),
        };
        Ok(Self { path: path.into(), file, log })
    }

    fn copy_to(&self, copy: &Path) -> io::Result<()> {
        io::copy(&mut &self.file, &mut File::create(copy)?)?;
        if let Some(log) = &self.log {
            io::copy(&mut &*log, &mut File::create(with_suffix(copy, "-wal"))?)?;
        }
        Ok(())
    }
}

/// Result of the replacement of the file.
struct Placed {
    aside: Option<PathBuf>,
    built: Built,
    in_place: bool,
}

#[derive(Default)]
struct Built {
    kept: Vec<Kept>,
    lost_devices: u64,
}

type Fill<'a> = &'a mut dyn FnMut(&mut Store) -> Result<(), StoreError>;

impl Job<'_> {
    fn run(&self, fill: Fill<'_>) -> Result<Recovered, StoreError> {
        let mut new = self.begin()?;
        let placed = match self.overwrite(&mut new, fill)? {
            Some(placed) => placed,
            None => self.exchange(new, fill)?,
        };
        let mut store = Store::create(&self.state_dir, self.lock_timeout)?;
        store.mend_hints()?;
        let Placed { aside, built, in_place } = placed;
        Ok(Recovered { store, aside, kept: built.kept, lost_devices: built.lost_devices, in_place })
    }

    /// The new inventory as it begins: empty, or the backup's content.
    fn begin(&self) -> Result<Store, StoreError> {
        let Some(source) = &self.backup else {
            return Store::create(&self.scratch.0, self.lock_timeout).map_err(|e| e.of(&self.path));
        };
        let backup = source.path.as_path();
        let found = source.file.metadata().map_err(|e| StoreError::file(backup, e))?;
        if files::identity(&self.path) == Some(files::of(&found)) {
            return Err(unsound(backup, "it is the inventory itself"));
        }
        let copy = self.scratch.0.join(FILE_NAME);
        files::make_file(&copy).map_err(|e| e.of(&self.path))?;
        source.copy_to(&copy).map_err(|e| StoreError::file(&self.path, e))?;
        let refuse = |e: StoreError| match e {
            StoreError::Corrupt { what, .. }
            | StoreError::Row { what, .. }
            | StoreError::Other { what, .. } => unsound(backup, &what),
            other => other.of(backup),
        };
        let look = || {
            let store = quiet(&self.scratch.0, self.lock_timeout)?;
            if store.version()?.is_none() {
                return Err(unsound(backup, "it is empty"));
            }
            match store.integrity()?.first() {
                Some(first) => Err(unsound(backup, &one_line(first))),
                None => Ok(()),
            }
        };
        look().map_err(refuse)?;
        let store = Store::create(&self.scratch.0, self.lock_timeout).map_err(refuse)?;
        match store.faults().map_err(refuse)?.first() {
            Some(first) => Err(unsound(backup, &one_line(first))),
            None => Ok(store),
        }
    }

    /// Overwrites the file in place; none where that cannot be: it cannot be locked as a database,
    /// or there is none.
    fn overwrite(&self, new: &mut Store, fill: Fill<'_>) -> Result<Option<Placed>, StoreError> {
        if fs::metadata(&self.path).map_or(0, |found| found.len()) == 0 {
            return Ok(None);
        }
        let sound = match health(&self.state_dir, self.lock_timeout) {
            Ok(health) => health == Health::Sound,
            Err(StoreError::Newer { .. } | StoreError::Foreign { .. }) => false,
            Err(e) => return Err(e),
        };
        let template = Store::first_page(&self.scratch.0).map_err(|e| e.of(&self.path))?;
        for _ in 0..TRIES {
            // A reader must not be stopped by who has locked it: that takes a log.
            if self.raw().and_then(|conn| conn.pragma_update(None, "journal_mode", "WAL")).is_err()
            {
                return Ok(None);
            }
            let before = self.stamps();
            let aside = self.free_name(new)?;
            if sound {
                quiet(&self.state_dir, self.lock_timeout)?.backup(&aside)?;
            } else {
                self.copy_aside(&aside)?;
            }
            let taken = self.take(new, &aside, (!sound).then_some(&before), &template, fill);
            match taken {
                Ok(Taken::Done(built)) => {
                    return Ok(Some(Placed { aside: Some(aside), built, in_place: true }));
                }
                Ok(Taken::Changed) => {
                    remove(&aside);
                    std::thread::sleep(PAUSE);
                }
                Ok(Taken::Unlockable) => {
                    remove(&aside);
                    return Ok(None);
                }
                // The file has not changed: its copy is not needed.
                Err(e) => {
                    remove(&aside);
                    return Err(e);
                }
            }
        }
        Err(StoreError::Locked { path: self.path.clone(), waited_ms: self.waited() })
    }

    /// Locks the file, builds, and overwrites it.
    fn take(
        &self,
        new: &mut Store,
        aside: &Path,
        unchanged: Option<&Stamps>,
        template: &[u8],
        fill: Fill<'_>,
    ) -> Result<Taken, StoreError> {
        let fault = |e: rusqlite::Error| StoreError::from_sqlite(&self.path, self.waited(), &e);
        let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let source = Connection::open_with_flags(&new.path, flags).map_err(fault)?;
        let (Ok(mut live), Ok(reader)) = (self.raw(), self.raw()) else {
            return Ok(Taken::Unlockable);
        };
        // The one who writes the pages: what is committed survives a power cut.
        live.pragma_update(None, "synchronous", "FULL").map_err(fault)?;
        let backup = Backup::new(&source, &mut live).map_err(fault)?;
        // No page: this takes the write lock, and keeps it until the last step.
        match backup.step(0) {
            Ok(StepResult::More) => {}
            Ok(_) => {
                return Err(StoreError::Locked {
                    path: self.path.clone(),
                    waited_ms: self.waited(),
                });
            }
            Err(e) => {
                return match e.sqlite_error_code() {
                    Some(
                        ErrorCode::DatabaseCorrupt
                        | ErrorCode::NotADatabase
                        | ErrorCode::SystemIoFailure
                        | ErrorCode::ReadOnly,
                    ) => Ok(Taken::Unlockable),
                    _ => Err(fault(e)),
                };
            }
        }
        if unchanged.is_some_and(|before| *before != self.stamps()) {
            return Ok(Taken::Changed);
        }
        let mut salvage = Salvage::read(&reader);
        if !salvage.is_readable() {
            salvage = Salvage::read_without_header(&self.scratch.0, aside, template)
                .map_err(|e| e.of(&self.path))?;
        }
        let built = self.build(new, Some(&salvage), fill).map_err(|e| e.of(&self.path))?;
        self.add_hints(new)?;
        match backup.step(-1) {
            Ok(StepResult::Done) => Ok(Taken::Done(built)),
            Ok(_) => Err(StoreError::Locked { path: self.path.clone(), waited_ms: self.waited() }),
            Err(e) => Err(fault(e)),
        }
    }

    /// Moves aside what SQLite cannot open, and puts the new file in its place.
    fn exchange(&self, mut new: Store, fill: Fill<'_>) -> Result<Placed, StoreError> {
        let there = match fs::symlink_metadata(&self.path) {
            Ok(found) if found.is_file() => true,
            Ok(_) => return Err(StoreError::Link { path: self.path.clone() }),
            Err(e) if e.kind() == ErrorKind::NotFound => false,
            Err(e) => return Err(StoreError::file(&self.path, e)),
        };
        let fault = |e| StoreError::file(&self.path, e);
        let log = fs::metadata(with_suffix(&self.path, "-wal")).is_ok();
        let aside = match self.begun_before() {
            // One that was killed has moved the log, and not yet the file.
            Some(aside) => Some(aside),
            None if there || log => Some(self.free_name(&new)?),
            None => None,
        };
        let mut salvage = None;
        if let (Some(aside), true) = (&aside, there) {
            if !aside.exists() && fs::hard_link(&self.path, aside).is_err() {
                self.copy_aside(aside)?;
            }
            let template = Store::first_page(&self.scratch.0).map_err(|e| e.of(&self.path))?;
            // The log is moved last: until then it stands beside the file's first name.
            let both = self.scratch.0.join("both");
            let gather = || -> std::io::Result<()> {
                fs::copy(&self.path, &both)?;
                let moved = with_suffix(aside, "-wal");
                let log = if moved.exists() { moved } else { with_suffix(&self.path, "-wal") };
                if log.exists() {
                    fs::copy(log, with_suffix(&both, "-wal"))?;
                }
                Ok(())
            };
            gather().map_err(fault)?;
            let read = Salvage::read_without_header(&self.scratch.0, &both, &template);
            salvage = Some(read.map_err(|e| e.of(&self.path))?);
        }
        let built = self.build(&mut new, salvage.as_ref(), fill).map_err(|e| e.of(&self.path))?;
        self.add_hints(&new)?;
        // Closed, it is one file, whole by itself.
        new.fold_wal().map_err(|e| e.of(&self.path))?;
        let made = new.path.clone();
        drop(new);
        File::open(&made).and_then(|file| file.sync_all()).map_err(fault)?;
        if let Some(aside) = &aside {
            for suffix in ["-wal", "-shm"] {
                match fs::rename(with_suffix(&self.path, suffix), with_suffix(aside, suffix)) {
                    Err(e) if e.kind() != ErrorKind::NotFound => return Err(fault(e)),
                    _ => {}
                }
            }
        }
        if there {
            fs::rename(&made, &self.path).map_err(fault)?;
        } else {
            // Another process may have created an inventory in the meantime: do not overwrite it.
            fs::hard_link(&made, &self.path).map_err(fault)?;
        }
        File::open(&self.state_dir).and_then(|folder| folder.sync_all()).map_err(fault)?;
        Ok(Placed { aside: aside.filter(|aside| aside.exists()), built, in_place: false })
    }

    /// Second name of the existing file, which an earlier run gave it.
    fn begun_before(&self) -> Option<PathBuf> {
        let this = files::identity(&self.path)?;
        let names = fs::read_dir(&self.state_dir).ok()?.flatten();
        let ours = names.filter(|entry| {
            let name = entry.file_name();
            let name = name.to_string_lossy();
            name.starts_with(&format!("{FILE_NAME}.before-"))
                && !name.ends_with("-wal")
                && !name.ends_with("-shm")
        });
        ours.map(|entry| entry.path()).find(|path| files::identity(path) == Some(this))
    }

    fn raw(&self) -> Sql<Connection> {
        let conn = salvage::open(&self.path)?;
        conn.busy_timeout(self.lock_timeout)?;
        Ok(conn)
    }

    fn waited(&self) -> u64 {
        u64::try_from(self.lock_timeout.as_millis()).unwrap_or(u64::MAX)
    }

    /// An unused name: `inventory.sqlite.before-restore-20260131T235959Z`.
    fn free_name(&self, new: &Store) -> Result<PathBuf, StoreError> {
        let now: String = new
            .conn()?
            .query_row("SELECT strftime('%Y%m%dT%H%M%SZ', 'now')", [], |row| row.get(0))
            .map_err(|e| new.fault(&e))?;
        let name = format!(".before-{}-{now}", self.request.what);
        let first = with_suffix(&self.path, &name);
        let others = (2..1000).map(|n| with_suffix(&self.path, &format!("{name}-{n}")));
        let mut free = std::iter::once(first.clone()).chain(others).filter(|path| {
            ["", "-wal", "-shm"]
                .iter()
                .all(|suffix| files::identity(&with_suffix(path, suffix)).is_none())
        });
        free.next().ok_or_else(|| StoreError::file(&first, ErrorKind::AlreadyExists.into()))
    }

    /// Byte for byte; what could not be copied whole does not stay.
    fn copy_aside(&self, aside: &Path) -> Result<(), StoreError> {
        salvage::copy_all(&self.path, aside)
            .inspect_err(|_| remove(aside))
            .map_err(|e| e.of(&self.path))
    }

    /// Stamps that show whether another process wrote to the file or its log. The files are not
    /// opened, because that would drop SQLite's locks.
    fn stamps(&self) -> Stamps {
        ["", "-wal"].map(|suffix| {
            let found = fs::metadata(with_suffix(&self.path, suffix)).ok();
            found.filter(|f| f.len() > 0).and_then(|f| Some((f.modified().ok()?, f.len())))
        })
    }

    /// Before the rows can be seen: a hint too many costs a look, one too few hides a claim.
    fn add_hints(&self, new: &Store) -> Result<(), StoreError> {
        let hints = Hints::new(&self.state_dir, true);
        for row in hints::Row::all(&*new.conn()?).map_err(|e| new.fault(&e))? {
            hints.add(row.as_known())?;
        }
        Ok(())
    }

    /// Makes the new inventory whole.
    fn build(
        &self,
        new: &mut Store,
        salvage: Option<&Salvage>,
        fill: Fill<'_>,
    ) -> Result<Built, StoreError> {
        new.restart_lock_timeout();
        let built = if self.request.backup.is_none() {
            take_over(new, salvage, self.request.ids)?
        } else {
            let place = self.scratch.0.join("present");
            let mut present = Store::create(&place, self.lock_timeout)?;
            let read = take_over(&mut present, salvage, self.request.ids)?;
            let claims = read.kept.iter().find(|kept| kept.table == "claims");
            let all = claims.is_some_and(|kept| kept.refused == 0 && !kept.torn);
            continue_with(new, &present, all, self.request.guests_known)?;
            Built::default()
        };
        fill(new)?;
        let (what, context) = (self.request.what, self.context);
        let event = if what == "restore" { "restored" } else { "rebuilt" };
        let detail = match self.request.backup {
            Some(file) => format!("from {}", file.display()),
            None => summary(&built),
        };
        new.write(|tx, _| {
            settle(tx)?;
            Ok(record(tx, context, &Event::new(event).with(detail))?)
        })?;
        match new.faults()?.first() {
            Some(first) => Err(StoreError::Other {
                path: self.path.clone(),
                what: format!("the rebuilt inventory is not sound: {first}"),
            }),
            None => Ok(built),
        }
    }
}

/// Values that show whether a file was written to.
type Stamps = [Option<(SystemTime, u64)>; 2];

enum Taken {
    Done(Built),
    /// Another process wrote to the file before it was locked.
    Changed,
    Unlockable,
}

fn unsound(path: &Path, what: &str) -> StoreError {
    StoreError::Unsound { path: path.into(), what: what.into() }
}

fn remove(aside: &Path) {
    for suffix in ["", "-wal"] {
        // A copy too many is no fault.
        drop(fs::remove_file(with_suffix(aside, suffix)));
    }
}

fn summary(built: &Built) -> String {
    let rows = built.kept.iter().filter(|kept| kept.rows > 0 && kept.table != "compute_nodes");
    let rows: Vec<String> = rows.map(|kept| format!("{} {}", kept.rows, kept.table)).collect();
    if rows.is_empty() { "from nothing".into() } else { format!("kept {}", rows.join(", ")) }
}

/// The tables in an order in which no row comes before the one that it points to; those of a later
/// schema come last.
const ORDER: [&str; 9] = [
    "compute_nodes",
    "usb_devices",
    "flavors",
    "grants",
    "assignments",
    "owners",
    "rule_ports",
    "instance_system_metadata",
    "events",
];
/// Tables that are derived from others, or that the agent fills again.
const DERIVED: [&str; 3] = ["device_labels", "problems", "sqlite_sequence"];

/// Fills an empty inventory with what was salvaged and makes sense.
fn take_over(
    new: &mut Store,
    salvage: Option<&Salvage>,
    ids: &[DeviceId],
) -> Result<Built, StoreError> {
    let nothing = Salvage::default();
    let (was_there, salvage) = (salvage.is_some(), salvage.unwrap_or(&nothing));
    new.write(|tx, _| {
        let mut built = Built::default();
        let mut names: Vec<&str> = ORDER.to_vec();
        let own = tables(tx)?;
        names.extend(
            own.iter().map(String::as_str).filter(|n| !ORDER.contains(n) && !DERIVED.contains(n)),
        );
        for name in names {
            if let Some(table) = salvage.table(name) {
                let mut kept = copy(tx, name, table)?;
                if name == "usb_devices" {
                    let doubles = drop_doubles(tx)?;
                    kept.rows -= doubles;
                    kept.refused += doubles;
                }
                built.kept.push(kept);
            }
            if name == "compute_nodes" {
                remember_node(tx, salvage, ids)?;
            }
        }
        if salvage.table("claims").is_some_and(|claims| claims.column("seen_in_guest").is_none()) {
            tx.execute(SEEN_BY_THE_AUDIT, [])?;
        }
        if salvage.table("usb_devices").is_some_and(|devices| devices.column("was_held").is_none())
        {
            tx.execute(HELD_BY_THE_AUDIT, [])?;
        }
        // The boot of the claims is checked again.
        tx.execute("UPDATE compute_nodes SET boot_id = NULL, revision = revision + 1", [])?;
        built.lost_devices = continue_ids(tx, salvage, was_there, ids)?;
        // What a device's row says follows from the grants that are left.
        crate::grants::apply(tx)?;
        Ok(built)
    })
}

fn tables(tx: &Transaction<'_>) -> Sql<Vec<String>> {
    tx.prepare(
        "SELECT name FROM sqlite_schema WHERE type = 'table' AND name NOT LIKE 'sqlite_%' ORDER BY \
            rowid",
    )?
    .query_map([], |row| row.get(0))?
    .collect()
}

/// Copies the columns that both have; a row that is refused or that this program never writes is
/// left out.
fn copy(tx: &Transaction<'_>, name: &str, table: &Table) -> Sql<Kept> {
    let known = columns(tx, name)?;
    let shared: Vec<usize> =
        (0..table.columns.len()).filter(|at| known.contains(&table.columns[*at])).collect();
    let mut kept = Kept { table: name.into(), rows: 0, refused: 0, torn: table.torn };
    if shared.is_empty() {
        return Ok(kept);
    }
    let list: Vec<&str> = shared.iter().map(|at| table.columns[*at].as_str()).collect();
    let marks = vec!["?"; list.len()].join(", ");
    let sql = format!("INSERT INTO {name} ({}) VALUES ({marks}) RETURNING *", list.join(", "));
    let id = table.column("id");
    // Hosts come first.
    let node = renumber::node(tx)?;
    for row in &table.rows {
        let values = shared.iter().filter_map(|at| row.get(*at));
        // A number that is no id of ours would be the last that there can be.
        let id = id.and_then(|at| row.get(at));
        let sane = !matches!(id, Some(Value::Integer(id)) if !(1..1 << 53).contains(id));
        tx.execute_batch("SAVEPOINT one")?;
        let taken = sane
            && tx
                .prepare_cached(&sql)?
                .query_row(params_from_iter(values), |row| makes_sense(name, node, row))
                .is_ok();
        tx.execute_batch(if taken { "RELEASE one" } else { "ROLLBACK TO one; RELEASE one" })?;
        if taken {
            kept.rows += 1;
        } else {
            kept.refused += 1;
        }
    }
    Ok(kept)
}

/// Makes the row of this id what another file says, in the columns that both have.
fn overwrite(tx: &Transaction<'_>, name: &str, table: &Table, row: &[Value], id: i64) -> Sql<()> {
    let known = columns(tx, name)?;
    let shared = || (0..table.columns.len()).filter(|at| known.contains(&table.columns[*at]));
    let list: Vec<String> = shared().map(|at| format!("{} = ?", table.columns[at])).collect();
    let sql = format!("UPDATE {name} SET {} WHERE id = {id}", list.join(", "));
    tx.prepare_cached(&sql)?
        .execute(params_from_iter(shared().filter_map(|at| row.get(at))))
        .map(drop)
}

fn columns(tx: &Transaction<'_>, name: &str) -> Sql<Vec<String>> {
    let statement = tx.prepare(&format!("SELECT * FROM {name}"))?;
    Ok(statement.column_names().map(ToOwned::to_owned).collect())
}

/// Whether this program may have written the row.
fn makes_sense(name: &str, node: i64, row: &Row<'_>) -> Sql<()> {
    let refuse = |column, what: &str| Err(bad_row(row, column, what));
    match name {
        "compute_nodes" => {
            let (id, revision): (i64, i64) = (row.get("id")?, row.get("revision")?);
            let host: String = row.get("host")?;
            if !(1..=(1 << 53) / IDS).contains(&id)
                || !(0..1 << 53).contains(&revision)
                || host.is_empty()
            {
                return refuse("id", "is not this host");
            }
        }
        "usb_devices" => {
            let record = Record::read(row)?;
            let entry = &record.entry;
            let id = i64::try_from(entry.id.get()).unwrap_or(i64::MAX);
            // Said twice in a row: what contradicts itself is damaged.
            let twice = row.get::<_, Option<u8>>("bus_id")? == Some(entry.address.bus())
                && row.get::<_, Option<u8>>("device_id")? == Some(entry.address.device())
                && row.get::<_, Option<u8>>("port_id")? == Some(entry.port_path.port_id())
                && entry.port_path.bus() == entry.address.bus()
                && (record.deleted == 0 || record.deleted == entry.id.get())
                && Serial::KINDS.contains(&entry.serial_kind.as_str())
                && entry
                    .path
                    .as_ref()
                    .is_none_or(|path| path.ports().len() == entry.port_path.ports().len())
                && (entry.serial_kind == "missing") == entry.serial.is_none();
            if !twice || !is_own(node, id) {
                return refuse("id", "contradicts itself");
            }
        }
        "claims" => {
            let claim = ClaimRow::read(row)?;
            let known = ["claimed", "allocated"].contains(&claim.state.as_str())
                && ["running", "instance"].contains(&claim.hold.as_str())
                && claim.boot_id.len() <= 36;
            if !known {
                return refuse("state", "is none");
            }
        }
        "assignments" => drop(Assignment::read(row)?),
        "owners" => drop(Owner::read(row)?),
        "rule_ports" => {
            drop(parse::<PortPath>(row, "port")?);
            drop(parse::<DevicePath>(row, "path")?);
        }
        "flavors" => drop(StoredFlavor::read(row)?),
        "grants" => drop(StoredGrant::read(row)?),
        "events" => drop(EventRow::read(row)?),
        "instance_system_metadata" => drop(parse::<InstanceId>(row, "instance_uuid")?),
        _ => {}
    }
    Ok(())
}

/// Where nothing tells the host's number but the ids of its devices, most of them do.
fn remember_node(tx: &Transaction<'_>, salvage: &Salvage, guests: &[DeviceId]) -> Sql<()> {
    let mut votes: BTreeMap<i64, usize> = BTreeMap::new();
    let devices = salvage.table("usb_devices").into_iter().flat_map(|table| table.numbers("id"));
    for id in devices.chain(guests.iter().map(|id| sql(*id))) {
        *votes.entry((id - 1).div_euclid(IDS) + 1).or_default() += 1;
    }
    if let Some((node, _)) =
        votes.into_iter().max_by_key(|(_, votes)| *votes).filter(|(node, _)| *node > 1)
    {
        // The next scan says what it is called.
        let sql = "INSERT INTO compute_nodes (id, host) SELECT ?1, '-' WHERE NOT EXISTS (SELECT 1 \
            FROM compute_nodes)";
        tx.execute(sql, [node])?;
    }
    Ok(())
}

/// Whether a device's id can be one of the host of that number.
fn is_own(node: i64, id: i64) -> bool {
    (1..=IDS).contains(&(id - (node - 1) * IDS))
}

/// Removes devices with two ids: at least one of them belonged to another device, and it is unknown
/// which. Returns the number of removed devices.
fn drop_doubles(tx: &Transaction<'_>) -> Sql<usize> {
    let all: Vec<Record> = tx
        .prepare("SELECT * FROM usb_devices")?
        .query_map([], Record::read)?
        .collect::<Sql<_>>()?;
    let mut alike: HashMap<(UsbId, Option<&str>), Vec<&Record>> = HashMap::new();
    for record in &all {
        alike.entry((record.usb(), record.entry.serial.as_deref())).or_default().push(record);
    }
    let mut dropped = 0;
    for record in &all {
        let others = &alike[&(record.usb(), record.entry.serial.as_deref())];
        // One that was gone is no double of one that is alive: it goes, and the other stays.
        let rivals = |other: &&&Record| other.deleted == 0 || record.deleted != 0;
        let doubled = others
            .iter()
            .filter(rivals)
            .any(|other| other.entry.id != record.entry.id && other.key().is(&record.key()));
        if doubled {
            dropped +=
                tx.execute("DELETE FROM usb_devices WHERE id = ?1", [sql(record.entry.id)])?;
            continue;
        }
        relabel(tx, record)?;
    }
    Ok(dropped)
}

fn relabel(tx: &Transaction<'_>, record: &Record) -> Sql<()> {
    let classes = std::iter::once(&record.entry.class).chain(&record.entry.interface_classes);
    label(tx, record.entry.id, classes, &record.entry.tags)
}

fn sql(id: DeviceId) -> i64 {
    i64::try_from(id.get()).unwrap_or(i64::MAX)
}

/// New devices and rows get ids above all that were ever seen. Returns how many devices had an id
/// and are lost.
fn continue_ids(
    tx: &Transaction<'_>,
    salvage: &Salvage,
    was_there: bool,
    guests: &[DeviceId],
) -> Sql<u64> {
    let mut last: BTreeMap<String, i64> = BTreeMap::new();
    let node = renumber::node(tx)?;
    if let Some(table) = salvage.table("sqlite_sequence")
        && let (Some(name), Some(seq)) = (table.column("name"), table.column("seq"))
    {
        for row in &table.rows {
            if let (Some(Value::Text(name)), Some(Value::Integer(seq))) =
                (row.get(name), row.get(seq))
                && (1..1 << 53).contains(seq)
            {
                last.insert(name.clone(), *seq);
            }
        }
    }
    let devices = "usb_devices";
    let given = last.get(devices).copied().filter(|id| is_own(node, *id));
    let named = |table: &str, column: &str| -> Vec<i64> {
        salvage.table(table).map(|table| table.numbers(column).collect()).unwrap_or_default()
    };
    let mut seen = named(devices, "id");
    for table in ["events", "device_labels", "claims"] {
        seen.extend(named(table, "device_id"));
    }
    seen.extend(guests.iter().map(|id| sql(*id)));
    let asked = |request: &virt_usb_model::DeviceRequest| request.selector.id.map(sql);
    let flavors: Vec<StoredFlavor> = tx
        .prepare("SELECT * FROM flavors")?
        .query_map([], StoredFlavor::read)?
        .collect::<Sql<_>>()?;
    seen.extend(flavors.iter().flat_map(|f| &f.flavor.usb_devices).filter_map(asked));
    let grants: Vec<StoredGrant> = tx
        .prepare("SELECT * FROM grants")?
        .query_map([], StoredGrant::read)?
        .collect::<Sql<_>>()?;
    seen.extend(grants.iter().flat_map(|g| &g.grant.usb_devices).filter_map(|s| s.id).map(sql));
    let assigned: Vec<Assignment> = tx
        .prepare("SELECT * FROM assignments")?
        .query_map([], Assignment::read)?
        .collect::<Sql<_>>()?;
    seen.extend(assigned.iter().map(|a| &a.request).filter_map(asked));
    let highest = seen.into_iter().filter(|id| is_own(node, *id)).max().unwrap_or((node - 1) * IDS);
    let top = match given {
        Some(given) => given.max(highest),
        None if !was_there && guests.is_empty() => highest,
        None => (highest / MARGIN + 1) * MARGIN,
    };
    last.insert(devices.into(), top);
    for (name, seq) in &last {
        raise(tx, name, *seq)?;
    }
    // Those that were forgotten are not missed.
    let kept: i64 = tx.query_row(
        "SELECT (SELECT count(*) FROM usb_devices) + (SELECT count(*) FROM events WHERE event = \
            'forgotten')",
        [],
        |row| row.get(0),
    )?;
    Ok(given.map_or(0, |given| u64::try_from(given - (node - 1) * IDS - kept).unwrap_or(0)))
}

/// Keeps devices set aside that were set aside since the backup: a backup of last week must not
/// make a device available that was quarantined yesterday.
fn set_aside_still(tx: &Transaction<'_>, id: DeviceId, present: &Record) -> Sql<()> {
    if !present.is_set_aside() {
        return Ok(());
    }
    tx.execute(
        "UPDATE usb_devices SET quarantined = coalesce(?2, quarantined), used_as = coalesce(?3, \
            used_as), disabled = coalesce(?4, disabled), flapping_until = coalesce(?5, \
            flapping_until) WHERE id = ?1",
        params![
            sql(id),
            present.quarantined,
            present.used_as.as_ref().map(ToString::to_string),
            present.disabled,
            present.flapping_until,
        ],
    )?;
    refresh(tx, id)
}

/// No row of the table gets an id up to `seq`.
fn raise(tx: &Transaction<'_>, table: &str, seq: i64) -> Sql<()> {
    let known = tx.execute(
        "UPDATE sqlite_sequence SET seq = max(seq, ?2) WHERE name = ?1",
        params![table, seq],
    )?;
    if known == 0 && tables(tx)?.iter().any(|name| name == table) {
        tx.execute("INSERT INTO sqlite_sequence (name, seq) VALUES (?1, ?2)", params![table, seq])?;
    }
    Ok(())
}

/// A backup goes on where the inventory was: devices that were seen since keep their ids, the audit
/// its events, and who holds a device now is not a matter of the past. `all`: every claim of the
/// present could be read.
fn continue_with(
    new: &mut Store,
    present: &Store,
    all: bool,
    guests_known: bool,
) -> Result<(), StoreError> {
    let since = Salvage::read(&*present.conn()?);
    let records = present.all_devices()?;
    let claims = present.claims()?;
    new.write(|tx, _| {
        let restored: Vec<Record> =
            tx.prepare("SELECT * FROM usb_devices ORDER BY \
                id")?.query_map([], Record::read)?.collect::<Sql<_>>()?;
        let mut alike: HashMap<(UsbId, Option<&str>), Vec<&Record>> = HashMap::new();
        for record in &restored {
            alike.entry((record.usb(), record.entry.serial.as_deref())).or_default().push(record);
        }
        let taken: BTreeSet<i64> = restored.iter().map(|record| sql(record.entry.id)).collect();
        // From an id of the present to the backup's.
        let mut ids: BTreeMap<i64, i64> = BTreeMap::new();
        let mut seen_since = Table::default();
        let born: BTreeMap<i64, &Option<String>> =
            restored.iter().map(|record| (sql(record.entry.id), &record.created_at)).collect();
        let row_of = |id: i64| {
            let table = since.table("usb_devices")?;
            let at = table.column("id")?;
            let row = table.rows.iter().find(|row| row.get(at) == Some(&Value::Integer(id)))?;
            Some((table, row))
        };
        for record in &records {
            let id = sql(record.entry.id);
            // An id is given once: this is the row of that device, whatever it shows and wherever
            // it is by now.
            if born.get(&id).is_some_and(|at| **at == record.created_at)
                && let Some((table, row)) = row_of(id)
            {
                overwrite(tx, "usb_devices", table, row, id)?;
                relabel(tx, record)?;
                ids.insert(id, id);
                continue;
            }
            let same = alike
                .get(&(record.usb(), record.entry.serial.as_deref()))
                .and_then(|those| those.iter().find(|r| r.key().is(&record.key())));
            match same {
                Some(same) => {
                    ids.insert(id, sql(same.entry.id));
                    set_aside_still(tx, same.entry.id, record)?;
                }
                None if taken.contains(&id) => {}
                None => {
                    if let Some((table, row)) = row_of(id) {
                        seen_since.columns.clone_from(&table.columns);
                        seen_since.rows.push(row.clone());
                        ids.insert(id, id);
                    }
                }
            }
        }
        copy(tx, "usb_devices", &seen_since)?;
        // Which socket a rule's port meant, and that there were rules, is of the configuration and
        // not of the past.
        if let Some(ports) = since.table("rule_ports").filter(|table| !table.rows.is_empty()) {
            tx.execute("DELETE FROM rule_ports", [])?;
            copy(tx, "rule_ports", ports)?;
        }
        let is_new = |r: &&Record| {
            let id = sql(r.entry.id);
            !taken.contains(&id) && ids.contains_key(&id)
        };
        for record in records.iter().filter(is_new) {
            relabel(tx, record)?;
        }
        if let Some(table) = since.table("sqlite_sequence") {
            for row in &table.rows {
                if let [Value::Text(name), Value::Integer(seq)] = row.as_slice() {
                    raise(tx, name, *seq)?;
                }
            }
        }
        if all {
            tx.execute("DELETE FROM claims", [])?;
        } else if guests_known {
            tx.execute("DELETE FROM claims WHERE hold = 'running'", [])?;
        }
        let held: Vec<(i64, i64)> =
            claims.iter().filter_map(|c| Some((c.id, *ids.get(&sql(c.device_id))?))).collect();
        if let Some(table) = since.table("claims") {
            let (own, about) = (table.column("id"), table.column("device_id"));
            let mut moved = Table { columns: table.columns.clone(), ..Table::default() };
            for row in &table.rows {
                let id = own.and_then(|at| row.get(at));
                let device = held.iter().find(|(claim, _)| id == Some(&Value::Integer(*claim)));
                if let (Some((_, device)), Some(own), Some(about)) = (device, own, about) {
                    tx.execute("DELETE FROM claims WHERE device_id = ?1", [device])?;
                    let mut row = row.clone();
                    row[about] = Value::Integer(*device);
                    // A number of its own, which no claim of the backup has.
                    row[own] = Value::Null;
                    moved.rows.push(row);
                }
            }
            copy(tx, "claims", &moved)?;
        }
        if let Some(table) = since.table("events") {
            let newest: i64 = tx.query_row("SELECT coalesce(max(id), 0) FROM \
                events", [], |row| row.get(0))?;
            let at = table.column("id");
            let later = |row: &&Vec<Value>| {
                matches!(at.and_then(|at| row.get(at)), Some(Value::Integer(id)) if *id > newest)
            };
            let rows = table.rows.iter().filter(later).cloned().collect();
            copy(tx, "events", &Table { columns: table.columns.clone(), rows, torn: false })?;
        }
        let revision = since.table("compute_nodes").and_then(|table| table.numbers("revision").max());
        tx.execute(
            "UPDATE compute_nodes SET boot_id = NULL, revision = max(revision, ?1) + 1",
            [revision.unwrap_or_default()],
        )?;
        Ok(())
    })
}

/// Brings what is derived in line: the state of each device, and what Nova's table says of each
/// instance.
fn settle(tx: &Transaction<'_>) -> Sql<()> {
    let devices: Vec<i64> = tx
        .prepare("SELECT id FROM usb_devices")?
        .query_map([], |row| row.get(0))?
        .collect::<Sql<_>>()?;
    for id in devices.into_iter().filter_map(|id| DeviceId::new(u64::try_from(id).ok()?)) {
        refresh(tx, id)?;
    }
    let instances: Vec<InstanceId> = tx
        .prepare(
            "SELECT DISTINCT instance_uuid FROM (SELECT instance_uuid FROM claims UNION \
            SELECT instance_uuid FROM instance_system_metadata WHERE deleted = 0)",
        )?
        .query_map([], |row| parse(row, "instance_uuid"))?
        .collect::<Sql<_>>()?;
    instances.into_iter().try_for_each(|instance| nova_metadata::refresh(tx, instance))
}
