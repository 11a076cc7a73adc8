//! Looking after the file: check, backup, hosts.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, ErrorKind};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use rusqlite::backup::{Backup, StepResult};
use rusqlite::{Connection, ffi};
use serde::Serialize;
use virt_usb_model::{HostDocument, Status, state::ClaimState};

use crate::device::{ClaimRow, Record};
use crate::error::Sql;
use crate::files::with_suffix;
use crate::hints::HintRow;
use crate::user::User;
use crate::{FILE_NAME, Store, StoreError};

/// A host of the inventory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct HostRow {
    /// Number of the host, from 1.
    pub id: u64,
    /// Name of the host.
    pub host: String,
    /// Grows with every change.
    pub revision: u64,
    /// The last complete discovery.
    pub scanned_at: Option<String>,
    /// Devices plugged in or held.
    pub devices: u64,
    /// Of these, free to be claimed.
    pub available: u64,
}

impl Store {
    /// The hosts of the inventory.
    ///
    /// # Errors
    /// When the database cannot be read.
    pub fn hosts(&self) -> Result<Vec<HostRow>, StoreError> {
        self.all(
            "SELECT n.id, n.host, n.revision, n.scanned_at, count(d.id) AS devices, \
                count(iif(d.status = 'available', 1, NULL)) AS available
             FROM compute_nodes n LEFT JOIN usb_devices d ON d.compute_node_id = n.id AND \
             d.deleted = 0 WHERE n.deleted = 0 GROUP BY n.id",
            [],
            |row| {
                Ok(HostRow {
                    id: row.get("id")?,
                    host: row.get("host")?,
                    revision: row.get("revision")?,
                    scanned_at: row.get("scanned_at")?,
                    devices: row.get("devices")?,
                    available: row.get("available")?,
                })
            },
        )
    }

    /// Document that this host publishes; `None` before its first discovery.
    ///
    /// # Errors
    /// When the database cannot be read.
    pub fn host_document(&self) -> Result<Option<HostDocument>, StoreError> {
        // One moment: the devices are those of that revision.
        let conn = self.conn()?;
        let _moment = conn.unchecked_transaction().map_err(|e| self.fault(&e))?;
        let Some(host) = self.hosts()?.into_iter().next() else { return Ok(None) };
        let devices = self.devices()?.into_iter().map(|r| r.entry).collect();
        Ok(Some(HostDocument::new(host.host, host.id, host.revision, devices)))
    }

    /// Looks for damage and for rows that contradict each other; empty: all is well.
    ///
    /// # Errors
    /// When the database cannot be read at all.
    pub fn check(&self) -> Result<Vec<String>, StoreError> {
        let mut findings = self.faults()?;
        for row in HintRow::all(&*self.conn()?).map_err(|e| self.fault(&e))? {
            if !self.hints.may_know(row.subject()) {
                let whose = match &row {
                    HintRow::Flavor(name) => format!("flavor {name}"),
                    HintRow::Instance(id) => format!("instance {id}"),
                    HintRow::Assigned(id) => format!("the assignments of instance {id}"),
                };
                findings.push(format!(
                    "the hint for {whose} is missing: 'virt-usb discover' writes it again"
                ));
            }
        }
        Ok(findings)
    }

    /// Damage and contradictions inside the file; empty: all is well.
    pub(crate) fn faults(&self) -> Result<Vec<String>, StoreError> {
        // One moment: claims come and go while this looks.
        let conn = self.conn()?;
        let _moment = conn.unchecked_transaction().map_err(|e| self.fault(&e))?;
        let mut findings = self.integrity()?;
        findings.extend(self.all("PRAGMA foreign_key_check", [], |row| {
            Ok(format!(
                "table {} points to a row of {} that is not there",
                row.get::<_, String>(0)?,
                row.get::<_, String>(2)?
            ))
        })?);
        findings.extend(self.contradictions()?);
        Ok(findings)
    }

    /// Result of SQLite's integrity check; empty if there are no problems.
    pub(crate) fn integrity(&self) -> Result<Vec<String>, StoreError> {
        let mut findings = self.all("PRAGMA integrity_check", [], |row| row.get::<_, String>(0))?;
        findings.retain(|line| line != "ok");
        Ok(findings)
    }

    /// Rows that do not parse, and devices whose state does not follow from the facts.
    fn contradictions(&self) -> Result<Vec<String>, StoreError> {
        let mut findings = Vec::new();
        let mut sound = |what: &str, id: i64, e: &rusqlite::Error| {
            findings.push(format!("{what} {id}: virt-usb never writes such a row: {e}"));
        };
        let each = |sql| self.all(sql, [], |row| Ok((row.get("id")?, Record::read(row))));
        let devices: Vec<(i64, Sql<Record>)> = each("SELECT * FROM usb_devices ORDER BY id")?;
        let claims: Vec<(i64, Sql<ClaimRow>)> =
            self.all("SELECT * FROM claims", [], |row| Ok((row.get("id")?, ClaimRow::read(row))))?;
        let mut held = BTreeMap::new();
        for (id, claim) in claims {
            match claim {
                Ok(claim) => drop(held.insert(claim.device_id, claim)),
                Err(e) => sound("claim", id, &e),
            }
        }
        let mut records = Vec::new();
        for (id, record) in devices {
            match record {
                Ok(record) => records.push(record),
                Err(e) => sound("device", id, &e),
            }
        }
        for record in records {
            let entry = &record.entry;
            let claim = held.get(&entry.id);
            let hold = claim.map(|c| {
                if c.is_allocated() { ClaimState::Allocated } else { ClaimState::Claimed }
            });
            let derived = Status::derive(hold, record.present, record.withheld);
            let stored = (record.deleted == 0).then(|| entry.state().ok()).flatten();
            if derived != stored || entry.instance_uuid != claim.map(|c| c.instance_uuid) {
                let (stored, derived) = (name(stored), name(derived));
                findings.push(format!(
                    "device {}: its row says {stored}, its claim and presence say {derived}",
                    entry.id
                ));
            }
        }
        Ok(findings)
    }

    /// Writes a copy of the inventory to `target`, which must not be there; hooks may run
    /// meanwhile.
    ///
    /// Reads the inventory as its owner, and writes the copy as the owner of the target's folder:
    /// see [`user`](crate::user).
    ///
    /// # Errors
    /// When the target exists or cannot be written; no half copy stays.
    pub fn backup(&self, target: &Path) -> Result<(), StoreError> {
        let file = |why| StoreError::File { path: target.into(), why };
        let writer = User::of_folder_of(target).map_err(file)?;
        let as_writer = || writer.enter().map_err(file);
        let writing = as_writer()?;
        if fs::symlink_metadata(target).is_ok() {
            return Err(file(io::Error::new(
                ErrorKind::AlreadyExists,
                "a file with that name exists",
            )));
        }
        let place = Private::beside(target, writer).map_err(file)?;
        let copied = place.path.join(FILE_NAME);
        create_private(&copied).map_err(file)?;
        let fault = |e: rusqlite::Error| StoreError::from_sqlite(target, 0, &e);
        let mut copy = Connection::open(&copied).map_err(fault)?;
        // A copy that fails is thrown away. Without a journal SQLite opens no other file while it
        // copies.
        copy.pragma_update(None, "journal_mode", "OFF").map_err(fault)?;
        drop(writing);
        // All pages in one step: a reader stops no writer, but page by page writers would stop the
        // reader.
        let source = self.conn()?;
        let step = Backup::new(&source, &mut copy).and_then(|b| b.step(-1));
        drop(source);
        let _writing = as_writer()?;
        if step.map_err(fault)? != StepResult::Done {
            return Err(self.fault(&busy()));
        }
        // A single file, whole by itself.
        copy.pragma_update(None, "journal_mode", "DELETE").map_err(fault)?;
        copy.close().map_err(|(_, e)| fault(e))?;
        let written = fs::File::open(&copied).and_then(|f| f.sync_all());
        written.and_then(|()| put(&copied, target)).map_err(file)
    }

    /// Moves the write-ahead log into the database, as far as no reader needs it, and truncates it.
    ///
    /// # Errors
    /// When the database cannot be written.
    pub fn fold_wal(&self) -> Result<(), StoreError> {
        self.checkpoint("TRUNCATE")
    }
}

/// A folder that only its owner may enter. SQLite works by names, and other users may create names
/// where the copy goes (`/tmp`).
struct Private {
    path: PathBuf,
    writer: User,
}

impl Private {
    fn beside(target: &Path, writer: User) -> io::Result<Self> {
        let name = |n| with_suffix(target, &format!(".partial-{}-{n}", std::process::id()));
        let make = |path: &Path| fs::DirBuilder::new().mode(0o700).create(path);
        // An existing file belongs to another user, and stays.
        for path in (0..100).map(name) {
            match make(&path) {
                Err(e) if e.kind() == ErrorKind::AlreadyExists => {}
                made => return made.map(|()| Self { path, writer }),
            }
        }
        Err(ErrorKind::AlreadyExists.into())
    }
}

impl Drop for Private {
    fn drop(&mut self) {
        if let Ok(_writing) = self.writer.enter() {
            drop(fs::remove_dir_all(&self.path));
        }
    }
}

/// Gives the finished copy its name, unless a file with that name was created in the meantime. A
/// link does that in one step; file systems without links (such as on a USB stick) need two.
fn put(partial: &Path, target: &Path) -> std::io::Result<()> {
    match fs::hard_link(partial, target) {
        Err(e) if matches!(e.kind(), ErrorKind::PermissionDenied | ErrorKind::Unsupported) => {
            if fs::symlink_metadata(target).is_ok() {
                return Err(ErrorKind::AlreadyExists.into());
            }
            fs::rename(partial, target)
        }
        other => other,
    }
}

/// Serials are in it: for its owner alone.
pub(crate) fn create_private(path: &Path) -> std::io::Result<()> {
    use std::os::unix::fs::OpenOptionsExt;
    fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path).map(drop)
}

/// Error of SQLite when another program holds the lock for too long.
fn busy() -> rusqlite::Error {
    rusqlite::Error::SqliteFailure(ffi::Error::new(ffi::SQLITE_BUSY), None)
}

fn name(status: Option<Status>) -> String {
    status.map_or_else(|| "deleted".into(), |s| s.to_string())
}
