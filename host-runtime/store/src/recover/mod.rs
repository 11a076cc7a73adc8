//! Restore and rebuild: replaces the content of the inventory with a backup, or with what can still
//! be read of a damaged file.
//!
//! ```text
//! the file can be locked:           copy aside ─► lock ─► salvage ─► build beside
//!                                                   ─► overwrite all pages in one transaction
//! it cannot be locked, or is        salvage a copy ─► build beside
//! missing:                                          ─► move aside ─► rename into place
//! ```
//! If SQLite can lock the file, the file *stays*: the backup API overwrites its pages in one
//! transaction. Hooks and agent that have it open wait for the lock and then see the new content,
//! which includes what they wrote until then. A file that is in use must not be renamed: SQLite
//! finds the log by name, and a process that still has the old file open would write into the log
//! of the new one (<https://www.sqlite.org/howtocorrupt.html>, 2.4). If SQLite cannot read the first
//! page, no process can write the file either. Then the files are moved aside, and the new one is
//! renamed into place. A connection that was opened before returns [`StoreError::Replaced`] at its
//! next write.
//!
//! If the process is killed at any point, the old content or the new one is in place, and the call
//! can be repeated. The previous content is never deleted.

mod merge;
mod placement;
mod source;
mod take_over;

use std::fs::{self, File, TryLockError};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rusqlite::Transaction;
use serde::Serialize;
use virt_usb_model::{DeviceId, InstanceId};

use self::placement::Placed;
use self::source::BackupFile;
use crate::device::{parse, refresh};
use crate::error::Sql;
use crate::events::{Event, record};
use crate::files;
use crate::hints::{self, Hints};
use crate::open::{canonical, enter, user_of};
use crate::salvage::Salvage;
use crate::{Context, Durability, FILE_NAME, SCHEMA, Store, StoreError, nova_metadata};

/// Where the new inventory is built, beside the old one.
const BESIDE: &str = "inventory.sqlite.new";

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
    let backup = request.backup.map(BackupFile::open).transpose()?;
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
    Recovery { state_dir, path, scratch, lock_timeout, request, backup, context }.run(fill)
}

/// Checks that a backup can be read, before anything else is asked.
///
/// # Errors
/// If there is no such file, or this user may not read it.
pub fn check_backup(file: &Path) -> Result<(), StoreError> {
    BackupFile::open(file).map(drop)
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

struct Recovery<'a> {
    state_dir: PathBuf,
    path: PathBuf,
    scratch: Scratch,
    lock_timeout: Duration,
    request: &'a RebuildRequest<'a>,
    backup: Option<BackupFile>,
    context: &'a Context,
}

#[derive(Default)]
struct Built {
    kept: Vec<Kept>,
    lost_devices: u64,
}

type Fill<'a> = &'a mut dyn FnMut(&mut Store) -> Result<(), StoreError>;

impl Recovery<'_> {
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

    /// Before the rows can be seen: a hint too many costs a look, one too few hides a claim.
    fn add_hints(&self, new: &Store) -> Result<(), StoreError> {
        let hints = Hints::new(&self.state_dir, true);
        for row in hints::HintRow::all(&*new.conn()?).map_err(|e| new.fault(&e))? {
            hints.add(row.subject())?;
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
            take_over::take_over(new, salvage, self.request.ids)?
        } else {
            let place = self.scratch.0.join("present");
            let mut present = Store::create(&place, self.lock_timeout)?;
            let read = take_over::take_over(&mut present, salvage, self.request.ids)?;
            let claims = read.kept.iter().find(|kept| kept.table == "claims");
            let all = claims.is_some_and(|kept| kept.refused == 0 && !kept.torn);
            merge::continue_with(new, &present, all, self.request.guests_known)?;
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

fn unsound(path: &Path, what: &str) -> StoreError {
    StoreError::Unsound { path: path.into(), what: what.into() }
}

fn summary(built: &Built) -> String {
    let rows = built.kept.iter().filter(|kept| kept.rows > 0 && kept.table != "compute_nodes");
    let rows: Vec<String> = rows.map(|kept| format!("{} {}", kept.rows, kept.table)).collect();
    if rows.is_empty() { "from nothing".into() } else { format!("kept {}", rows.join(", ")) }
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
