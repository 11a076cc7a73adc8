//! Replaces the old content: overwrites the file if SQLite can lock it, or exchanges the files.

use std::fs::{self, File};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use rusqlite::backup::{Backup, StepResult};
use rusqlite::{Connection, ErrorCode, OpenFlags};

use super::{Built, Fill, Health, Recovery, health, quiet};
use crate::error::Sql;
use crate::files::{self, with_suffix};
use crate::salvage::{self, Salvage};
use crate::{FILE_NAME, Store, StoreError};

/// Maximum number of copies of a damaged file, if other processes write to it during the copy.
const TRIES: u32 = 40;
/// Pause between two copies.
const PAUSE: Duration = Duration::from_millis(20);

/// Result of the replacement of the file.
pub(super) struct Placed {
    pub(super) aside: Option<PathBuf>,
    pub(super) built: Built,
    pub(super) in_place: bool,
}

/// Values that show whether a file was written to.
type Stamps = [Option<(SystemTime, u64)>; 2];

enum Taken {
    Done(Built),
    /// Another process wrote to the file before it was locked.
    Changed,
    Unlockable,
}

impl Recovery<'_> {
    /// Overwrites the file in place; none where that cannot be: it cannot be locked as a database,
    /// or there is none.
    pub(super) fn overwrite(
        &self,
        new: &mut Store,
        fill: Fill<'_>,
    ) -> Result<Option<Placed>, StoreError> {
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
    pub(super) fn exchange(&self, mut new: Store, fill: Fill<'_>) -> Result<Placed, StoreError> {
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
}

fn remove(aside: &Path) {
    for suffix in ["", "-wal"] {
        // A copy too many is no fault.
        drop(fs::remove_file(with_suffix(aside, suffix)));
    }
}
