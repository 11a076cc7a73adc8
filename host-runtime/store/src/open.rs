//! Opening the database: by the hook, which finds it or fails, and by agent and command line, which make it.

use std::cell::Cell;
use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rusqlite::config::DbConfig;
use rusqlite::{Connection, OpenFlags, TransactionBehavior};

use crate::error::Sql;
use crate::{FILE_NAME, Store, StoreError, hints};

/// `PRAGMA application_id` of an inventory: "vUSB".
const APPLICATION_ID: i64 = 0x7655_5342;

/// One file a step; the index + 1 is the schema version that it leads to. Never changed once released.
const MIGRATIONS: &[&str] = &[include_str!("../migrations/0001_initial.sql")];

/// The schema version that this program reads and writes.
pub const SCHEMA: i64 = MIGRATIONS.len() as i64;

/// Past this size of the write-ahead log the hook checkpoints by itself, in bytes. Whoever opens the database after
/// everybody had closed it reads the whole log once: 1 MiB keeps that below a millisecond.
const WAL_LIMIT: u64 = 1 << 20;

/// What a commit must survive.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Durability {
    /// Any crash of a program; a power cut may take the last commits back. Right for what ends with the boot
    /// anyway: a claim with `hold = "running"`. Costs no fsync.
    Boot,
    /// A power cut too. Right for flavors, assignments, devices' ids, and claims with `hold = "instance"`.
    Power,
}

thread_local! {
    /// Until when this thread waits for locks, all waits together.
    static DEADLINE: Cell<Option<Instant>> = const { Cell::new(None) };
}

impl Store {
    /// Opens the inventory in `state_dir` as the hook does: it must be there and current, is never made or
    /// migrated, and closing it does not checkpoint. `patience` is the deadline for all locks together, from now on.
    ///
    /// # Errors
    /// Each thing that can be wrong with the file has a variant of its own.
    pub fn open(state_dir: &Path, patience: Duration, durability: Durability) -> Result<Self, StoreError> {
        let store = Self::connect(state_dir, patience, OpenFlags::SQLITE_OPEN_READ_WRITE)?;
        store
            .configure(durability)
            .and_then(|()| store.conn.set_db_config(DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, true))
            .map_err(|e| store.fault(&e))?;
        match store.version()? {
            SCHEMA => Ok(store),
            found if found > SCHEMA => Err(StoreError::Newer { path: store.path, found, known: SCHEMA }),
            found => Err(StoreError::Older { path: store.path, found, known: SCHEMA }),
        }
    }

    /// Opens the inventory for the agent and the command line: makes folder and file where they are missing,
    /// and migrates an older schema. What root makes is handed to the folder's owner.
    ///
    /// # Errors
    /// As [`Store::open`], but for `Missing` and `Older`.
    pub fn create(state_dir: &Path, patience: Duration) -> Result<Self, StoreError> {
        make_dir(state_dir, 0o750)?;
        make_dir(&hints::dir(state_dir), 0o750)?;
        hand_over(&hints::dir(state_dir))?;
        let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_CREATE;
        let mut store = Self::connect(state_dir, patience, flags)?;
        store.conn.pragma_update(None, "journal_mode", "WAL").map_err(|e| store.fault(&e))?;
        store.configure(Durability::Power).map_err(|e| store.fault(&e))?;
        set_mode(&store.path, 0o640)?;
        hand_over(&store.path)?;
        store.migrate()?;
        for suffix in ["-wal", "-shm"] {
            hand_over(&with_suffix(&store.path, suffix))?;
        }
        Ok(store)
    }

    fn connect(state_dir: &Path, patience: Duration, how: OpenFlags) -> Result<Self, StoreError> {
        // Links on the way to the folder are root's affair; below it none is followed.
        let state_dir = state_dir.canonicalize().map_err(|e| {
            let path = state_dir.join(FILE_NAME);
            if e.kind() == ErrorKind::PermissionDenied {
                StoreError::Permission { path }
            } else {
                StoreError::Missing { path }
            }
        })?;
        let path = state_dir.join(FILE_NAME);
        let flags = how | OpenFlags::SQLITE_OPEN_NOFOLLOW | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let conn =
            Connection::open_with_flags(&path, flags).map_err(|e| StoreError::from_sqlite(&path, 0, &e))?;
        DEADLINE.set(Some(Instant::now() + patience));
        let mut store = Self { conn, path, state_dir, patience };
        store.conn.busy_handler(Some(wait)).map_err(|e| store.fault(&e))?;
        Ok(store)
    }

    fn configure(&self, durability: Durability) -> Sql<()> {
        let conn = &self.conn;
        conn.set_db_config(DbConfig::SQLITE_DBCONFIG_DEFENSIVE, true)?;
        conn.set_db_config(DbConfig::SQLITE_DBCONFIG_TRUSTED_SCHEMA, false)?;
        conn.pragma_update(None, "cell_size_check", true)?;
        conn.pragma_update(None, "foreign_keys", true)?;
        conn.pragma_update(None, "wal_autocheckpoint", 0)?;
        conn.pragma_update(None, "temp_store", "MEMORY")?;
        conn.pragma_update(
            None,
            "synchronous",
            if durability == Durability::Power { "FULL" } else { "NORMAL" },
        )
    }

    /// The schema version; refuses a database that is not ours.
    fn version(&self) -> Result<i64, StoreError> {
        let read = |name| {
            self.conn.pragma_query_value(None, name, |row| row.get::<_, i64>(0)).map_err(|e| self.fault(&e))
        };
        let (application, version) = (read("application_id")?, read("user_version")?);
        if application != APPLICATION_ID && (application, version) != (0, 0) {
            return Err(StoreError::Foreign { path: self.path.clone() });
        }
        Ok(version)
    }

    fn migrate(&mut self) -> Result<(), StoreError> {
        if self.version()? == SCHEMA {
            return Ok(());
        }
        let path = self.path.clone();
        let waited = self.waited_ms();
        let fault = |e: &rusqlite::Error| StoreError::from_sqlite(&path, waited, e);
        // Another program may have migrated meanwhile: look again under the lock.
        let tx =
            self.conn.transaction_with_behavior(TransactionBehavior::Immediate).map_err(|e| fault(&e))?;
        let found: i64 =
            tx.pragma_query_value(None, "user_version", |row| row.get(0)).map_err(|e| fault(&e))?;
        if found > SCHEMA {
            return Err(StoreError::Newer { path, found, known: SCHEMA });
        }
        let tables: i64 = tx
            .query_row("SELECT count(*) FROM sqlite_schema", [], |row| row.get(0))
            .map_err(|e| fault(&e))?;
        if found == 0 && tables > 0 {
            return Err(StoreError::Foreign { path });
        }
        for step in MIGRATIONS.iter().skip(usize::try_from(found).unwrap_or_default()) {
            tx.execute_batch(step).map_err(|e| fault(&e))?;
        }
        tx.pragma_update(None, "application_id", APPLICATION_ID).map_err(|e| fault(&e))?;
        tx.pragma_update(None, "user_version", SCHEMA).map_err(|e| fault(&e))?;
        tx.commit().map_err(|e| fault(&e))
    }

    /// Starts the deadline for locks anew, for programs that live longer than one call.
    pub fn restart_patience(&self) {
        DEADLINE.set(Some(Instant::now() + self.patience));
    }

    /// Runs `work` under the write lock and commits it, all or nothing.
    pub(crate) fn write<T>(
        &mut self,
        work: impl FnOnce(&rusqlite::Transaction<'_>, &Path) -> Result<T, Fault>,
    ) -> Result<T, StoreError> {
        let path = self.path.clone();
        let waited = self.waited_ms();
        let done = (|| {
            let tx = self.conn.transaction_with_behavior(TransactionBehavior::Immediate)?;
            let value = work(&tx, &self.state_dir)?;
            tx.commit()?;
            Ok(value)
        })();
        done.map_err(|fault| match fault {
            Fault::Sql(e) => StoreError::from_sqlite(&path, waited, &e),
            Fault::Store(e) => e,
        })
    }

    /// Bounds the write-ahead log: past [`WAL_LIMIT`] what can be moved into the database without waiting is moved.
    pub(crate) fn bound_wal(&self) -> Result<(), StoreError> {
        let size = fs::metadata(with_suffix(&self.path, "-wal")).map_or(0, |m| m.len());
        if size > WAL_LIMIT { self.checkpoint("PASSIVE") } else { Ok(()) }
    }

    pub(crate) fn checkpoint(&self, mode: &str) -> Result<(), StoreError> {
        self.conn
            .query_row(&format!("PRAGMA wal_checkpoint({mode})"), [], |_| Ok(()))
            .map_err(|e| self.fault(&e))
    }

    pub(crate) fn fault(&self, e: &rusqlite::Error) -> StoreError {
        StoreError::from_sqlite(&self.path, self.waited_ms(), e)
    }

    fn waited_ms(&self) -> u64 {
        u64::try_from(self.patience.as_millis()).unwrap_or(u64::MAX)
    }
}

/// What may go wrong inside a write: SQL, or a file beside the database.
pub(crate) enum Fault {
    Sql(rusqlite::Error),
    Store(StoreError),
}
impl From<rusqlite::Error> for Fault {
    fn from(e: rusqlite::Error) -> Self {
        Self::Sql(e)
    }
}
impl From<StoreError> for Fault {
    fn from(e: StoreError) -> Self {
        Self::Store(e)
    }
}

/// SQLite's busy handler: sleeps a little longer each time, until the deadline. The process's own number spreads
/// those who arrived together.
fn wait(attempt: i32) -> bool {
    let now = Instant::now();
    let Some(left) = DEADLINE.get().and_then(|end| end.checked_duration_since(now)) else { return false };
    let attempt = u64::try_from(attempt).unwrap_or_default();
    let spread =
        (u64::from(std::process::id()).wrapping_mul(0x9e37_79b9) >> 7).wrapping_add(attempt * 37) % 1000;
    let nap = Duration::from_micros(200 + 500 * attempt.min(12) + spread);
    std::thread::sleep(nap.min(left));
    !left.is_zero()
}

pub(crate) fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

fn make_dir(path: &Path, mode: u32) -> Result<(), StoreError> {
    let file = |source| StoreError::File { path: path.into(), source };
    if path.is_dir() {
        return Ok(());
    }
    fs::create_dir_all(path).map_err(file)?;
    set_mode(path, mode)
}

fn set_mode(path: &Path, mode: u32) -> Result<(), StoreError> {
    let file = |source| StoreError::File { path: path.into(), source };
    let meta = fs::metadata(path).map_err(file)?;
    if meta.mode() & 0o7777 == mode {
        return Ok(());
    }
    match fs::set_permissions(path, fs::Permissions::from_mode(mode)) {
        // Not the owner: whoever made it chose its mode.
        Err(e) if e.kind() == ErrorKind::PermissionDenied => Ok(()),
        other => other.map_err(file),
    }
}

/// Gives what root made to the owner of the folder that it lies in. Anybody else's files are their owner's already.
pub(crate) fn hand_over(path: &Path) -> Result<(), StoreError> {
    let file = |source| StoreError::File { path: path.into(), source };
    let owner = match path.parent().map(fs::metadata) {
        Some(Ok(meta)) => (meta.uid(), meta.gid()),
        _ => return Ok(()),
    };
    match fs::symlink_metadata(path) {
        Ok(meta) if (meta.uid(), meta.gid()) != owner && meta.uid() == 0 => {
            std::os::unix::fs::lchown(path, Some(owner.0), Some(owner.1)).map_err(file)
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn schema(conn: &Connection) -> Vec<String> {
        let mut statement =
            conn.prepare("SELECT sql FROM sqlite_schema WHERE sql IS NOT NULL ORDER BY type, name").unwrap();
        statement.query_map([], |row| row.get(0)).unwrap().collect::<Result<_, _>>().unwrap()
    }

    #[test]
    fn schema_sql_is_what_the_migrations_make() {
        let (replayed, whole) =
            (Connection::open_in_memory().unwrap(), Connection::open_in_memory().unwrap());
        for step in MIGRATIONS {
            replayed.execute_batch(step).unwrap();
        }
        whole.execute_batch(include_str!("../schema.sql")).unwrap();
        assert_eq!(schema(&replayed), schema(&whole));
        assert!(schema(&whole).len() > 10);
    }
}
