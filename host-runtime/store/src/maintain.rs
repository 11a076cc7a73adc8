//! Looking after the file: check, backup, hosts.

use std::fs;
use std::path::Path;
use std::time::Duration;

use rusqlite::Connection;
use rusqlite::backup::Backup;
use serde::Serialize;
use virt_usb_model::{HostDocument, Status, state::Hold};

use crate::open::with_suffix;
use crate::{Store, StoreError, hints};

/// A host of the inventory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct HostRow {
    /// Its number, from 1.
    pub id: u64,
    /// Its name.
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
            "SELECT n.id, n.host, n.revision, n.scanned_at, count(d.id) AS devices, count(iif(d.status = 'available', 1, NULL)) AS available
             FROM compute_nodes n LEFT JOIN usb_devices d ON d.compute_node_id = n.id AND d.deleted = 0 WHERE n.deleted = 0 GROUP BY n.id",
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

    /// What this host tells the world; `None` before its first discovery.
    ///
    /// # Errors
    /// When the database cannot be read.
    pub fn host_document(&self) -> Result<Option<HostDocument>, StoreError> {
        let Some(host) = self.hosts()?.into_iter().next() else { return Ok(None) };
        let devices = self.devices()?.into_iter().map(|r| r.entry).collect();
        Ok(Some(HostDocument::new(host.host, host.id, host.revision, devices)))
    }

    /// Looks for damage and for rows that contradict each other; empty: all is well.
    ///
    /// # Errors
    /// When the database cannot be read at all.
    pub fn check(&self) -> Result<Vec<String>, StoreError> {
        let mut findings = self.all("PRAGMA integrity_check", [], |row| row.get::<_, String>(0))?;
        findings.retain(|line| line != "ok");
        findings.extend(self.all("PRAGMA foreign_key_check", [], |row| {
            Ok(format!(
                "table {} points to a row of {} that is not there",
                row.get::<_, String>(0)?,
                row.get::<_, String>(2)?
            ))
        })?);
        let claims = self.claims()?;
        for record in self.records("1")? {
            let entry = &record.entry;
            let claim = claims.iter().find(|c| c.device_id == entry.id);
            let hold = claim.map(|c| if c.state == "allocated" { Hold::Allocated } else { Hold::Claimed });
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
        for known in self.known()? {
            if !hints::may_know(&self.state_dir, known.as_known()) {
                findings.push(format!(
                    "the hint for {} is missing: 'virt-usb discover' writes it again",
                    known.describe()
                ));
            }
        }
        Ok(findings)
    }

    /// Writes the hints that are missing for rows that are there: after a restore from a backup, say.
    ///
    /// # Errors
    /// When the database cannot be locked or a hint cannot be written.
    pub fn mend_hints(&mut self) -> Result<(), StoreError> {
        let known = self.known()?;
        self.write(|_, state_dir| {
            known.iter().try_for_each(|k| hints::add(state_dir, k.as_known())).map_err(Into::into)
        })
    }

    fn known(&self) -> Result<Vec<Owned>, StoreError> {
        let mut known = self.all("SELECT name FROM flavors", [], |row| Ok(Owned::Flavor(row.get(0)?)))?;
        let sql = "SELECT instance_uuid FROM claims UNION SELECT instance_uuid FROM assignments";
        known.extend(
            self.all(sql, [], |row| Ok(Owned::Instance(crate::device::parse(row, "instance_uuid")?)))?,
        );
        Ok(known)
    }

    /// Writes a copy of the inventory to `target`, which must not be there; hooks may run meanwhile.
    ///
    /// # Errors
    /// When the target exists or cannot be written; no half copy stays.
    pub fn backup(&self, target: &Path) -> Result<(), StoreError> {
        let file = |source| StoreError::File { path: target.into(), source };
        let partial = with_suffix(target, ".partial");
        let inner = || -> Result<(), StoreError> {
            let fault = |e: rusqlite::Error| StoreError::from_sqlite(&partial, 0, &e);
            let mut copy = Connection::open(&partial).map_err(fault)?;
            Backup::new(&self.conn, &mut copy)
                .and_then(|b| b.run_to_completion(256, Duration::from_millis(1), None))
                .map_err(fault)?;
            // A single file, whole by itself.
            copy.pragma_update(None, "journal_mode", "DELETE").map_err(fault)?;
            copy.close().map_err(|(_, e)| fault(e))?;
            let written = fs::File::open(&partial).and_then(|f| f.sync_all());
            written.and_then(|()| fs::hard_link(&partial, target)).map_err(file)
        };
        if fs::symlink_metadata(target).is_ok() {
            return Err(file(std::io::Error::new(
                std::io::ErrorKind::AlreadyExists,
                "a file of that name is there already",
            )));
        }
        drop(fs::remove_file(&partial));
        create_private(&partial).map_err(file)?;
        let done = inner();
        drop(fs::remove_file(&partial));
        done
    }

    /// Moves the write-ahead log into the database as far as nobody reads it, and shrinks it.
    ///
    /// # Errors
    /// When the database cannot be written.
    pub fn fold_wal(&self) -> Result<(), StoreError> {
        self.checkpoint("TRUNCATE")
    }
}

/// Serials are in it: for its owner alone.
fn create_private(path: &Path) -> std::io::Result<()> {
    use std::os::unix::fs::OpenOptionsExt;
    fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path).map(drop)
}

enum Owned {
    Flavor(String),
    Instance(virt_usb_model::InstanceId),
}

impl Owned {
    fn as_known(&self) -> hints::Known<'_> {
        match self {
            Self::Flavor(name) => hints::Known::Flavor(name),
            Self::Instance(id) => hints::Known::Instance(*id),
        }
    }
    fn describe(&self) -> String {
        match self {
            Self::Flavor(name) => format!("flavor {name}"),
            Self::Instance(id) => format!("instance {id}"),
        }
    }
}

fn name(status: Option<Status>) -> String {
    status.map_or_else(|| "deleted".into(), |s| s.to_string())
}
