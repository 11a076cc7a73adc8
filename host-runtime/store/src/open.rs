//! Opening the database: by the hook, which finds it or fails, and by agent and command line, which
//! make it.

use std::cell::Cell;
use std::fs;
use std::io::ErrorKind;
use std::ops::Deref;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use rusqlite::config::DbConfig;
use rusqlite::{Connection, ErrorCode, OpenFlags, Transaction, TransactionBehavior};

use crate::error::Sql;
use crate::hints::Hints;
use crate::user::{AsUser, Left, User};
use crate::{FILE_NAME, Store, StoreError, files};

/// `PRAGMA application_id` of an inventory: "vUSB".
const APPLICATION_ID: i64 = 0x7655_5342;

/// One file a step; the index + 1 is the schema version that it leads to. Never changed once
/// released.
const MIGRATIONS: &[&str] = &[
    include_str!("../migrations/0001_initial.sql"),
    include_str!("../migrations/0002_agent.sql"),
    include_str!("../migrations/0003_arrived.sql"),
    include_str!("../migrations/0004_aside.sql"),
    include_str!("../migrations/0005_owners.sql"),
    include_str!("../migrations/0006_grants.sql"),
    include_str!("../migrations/0007_path.sql"),
    include_str!("../migrations/0008_columns.sql"),
    include_str!("../migrations/0009_incoming.sql"),
    include_str!("../migrations/0010_certainty.sql"),
    include_str!("../migrations/0011_origin.sql"),
];

/// The schema version that this program reads and writes.
pub const SCHEMA: i64 = MIGRATIONS.len() as i64;

/// Size of the write-ahead log above which a writer moves it into the database, in bytes. The first
/// program to open a closed database reads the whole log: half a MiB takes much less than a
/// millisecond.
const WAL_LIMIT: u64 = 1 << 19;

/// Events that the commits of a store must survive.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Durability {
    /// Any crash of a program. A power cut may take back the last commits, unless one wrote
    /// something that outlives the boot: see [`Tx::mark_lasting`]. A claim with `hold = "running"`
    /// costs no fsync.
    Boot,
    /// A power cut, whatever was written. Right for flavors, devices' ids and what an operator
    /// does.
    Power,
}

/// A write transaction. Derefs to the transaction of SQLite.
pub(crate) struct Tx<'a> {
    inner: Transaction<'a>,
    lasting: Cell<bool>,
}

impl Tx<'_> {
    /// The transaction writes something that must survive a power cut: an assignment, a claim with
    /// `hold = "instance"`, a quarantine. [`Store::write`] then syncs the log before it returns.
    pub(crate) fn mark_lasting(&self) {
        self.lasting.set(true);
    }
}

impl<'a> Deref for Tx<'a> {
    type Target = Transaction<'a>;
    fn deref(&self) -> &Transaction<'a> {
        &self.inner
    }
}

/// Until when is waited for locks, all waits together. The connection's busy handler holds the
/// other end.
#[derive(Debug, Clone)]
pub(crate) struct Deadline(Arc<Mutex<Instant>>);

impl Deadline {
    fn after(lock_timeout: Duration) -> Self {
        Self(Arc::new(Mutex::new(Instant::now() + lock_timeout)))
    }

    fn end(&self) -> Instant {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set(&self, end: Instant) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = end;
    }

    /// Sleeps a little longer each time; false once the deadline has passed. The clock's last
    /// digits spread those who arrived together.
    fn wait(&self, attempt: i32) -> bool {
        let left = self.end().saturating_duration_since(Instant::now());
        if left.is_zero() {
            return false;
        }
        let attempt = u64::try_from(attempt).unwrap_or_default();
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let spread = u64::from(now.subsec_nanos()) % 1000;
        std::thread::sleep(Duration::from_micros(200 + 500 * attempt.min(12) + spread).min(left));
        true
    }
}

/// The connection to the database, which is reached as the owner of its folder alone: SQLite opens
/// files beside the database, and removes them, whenever it likes.
#[derive(Debug)]
pub(crate) struct Database {
    connection: Connection,
    /// Dropped after the connection, which is closed as the owner, too.
    closing: Option<Left>,
    user: User,
    /// Former rights of root, if the thread stays the owner as long as the database is open.
    remaining: Option<Left>,
}

/// The connection, while this thread is the owner of the database's folder.
pub(crate) struct Held<'a> {
    connection: &'a Connection,
    _owner: AsUser,
}

impl std::ops::Deref for Held<'_> {
    type Target = Connection;

    fn deref(&self) -> &Connection {
        self.connection
    }
}

impl Database {
    /// Ends what [`Store::open_for_call`] began.
    pub(crate) fn be_root_again(&mut self) {
        drop(self.remaining.take());
    }
}

impl Drop for Database {
    fn drop(&mut self) {
        // Who could become the owner to open it can do so to close it.
        self.closing = self.user.enter().ok().and_then(AsUser::into_left);
    }
}

/// Content of a file, as far as it can be determined without knowledge of its tables.
#[derive(Clone, Copy)]
enum FileContent {
    Nothing,
    Schema(i64),
    Foreign,
}

fn look(conn: &Connection) -> Sql<FileContent> {
    // One moment: tables and marks come in one commit, perhaps just now.
    let _moment = if conn.is_autocommit() { Some(conn.unchecked_transaction()?) } else { None };
    let read = |name| conn.pragma_query_value(None, name, |row| row.get::<_, i64>(0));
    Ok(match (read("application_id")?, read("user_version")?) {
        (APPLICATION_ID, version) => FileContent::Schema(version),
        (0, 0) => {
            let tables: i64 =
                conn.query_row("SELECT count(*) FROM sqlite_schema", [], |row| row.get(0))?;
            if tables == 0 { FileContent::Nothing } else { FileContent::Foreign }
        }
        _ => FileContent::Foreign,
    })
}

/// Whether a file that begins like this is an inventory (<https://www.sqlite.org/fileformat.html>,
/// 1.3).
pub(crate) fn is_inventory(head: &[u8; 72]) -> bool {
    let mark = i64::from(u32::from_be_bytes([head[68], head[69], head[70], head[71]]));
    head.starts_with(b"SQLite format 3\0") && mark == APPLICATION_ID
}

impl Store {
    /// Opens the inventory in `state_dir`, which must exist and be current: it is neither created
    /// nor migrated, and closing it does not checkpoint. `lock_timeout` is the deadline for all
    /// locks together, from now on.
    ///
    /// # Errors
    /// Each thing that can be wrong with the file has a variant of its own.
    pub fn open(
        state_dir: &Path,
        lock_timeout: Duration,
        durability: Durability,
    ) -> Result<Self, StoreError> {
        Self::open_as_owner(state_dir, lock_timeout, durability).map(|(store, _)| store)
    }

    /// Opens the store for one call in one thread, as the hook does. The thread stays the owner of
    /// the folder until the store is dropped; otherwise root would become that user again at each
    /// use.
    ///
    /// # Errors
    /// As [`Store::open`].
    pub fn open_for_call(
        state_dir: &Path,
        lock_timeout: Duration,
        durability: Durability,
    ) -> Result<Self, StoreError> {
        let (mut store, owner) = Self::open_as_owner(state_dir, lock_timeout, durability)?;
        store.database.remaining = owner.into_left();
        Ok(store)
    }

    fn open_as_owner(
        state_dir: &Path,
        lock_timeout: Duration,
        durability: Durability,
    ) -> Result<(Self, AsUser), StoreError> {
        let user = user_of(state_dir)?;
        let owner = enter(user, state_dir)?;
        let store = Self::connect_as(user, state_dir, lock_timeout, durability)?;
        store.keep_log()?;
        let fault = |e: rusqlite::Error| store.fault(&e);
        configure(&*store.conn()?, durability).map_err(fault)?;
        let version = store.version()?;
        store.stay()?;
        match version {
            None => Err(StoreError::Missing { path: store.path }),
            Some(found) if found < SCHEMA => {
                Err(StoreError::Older { path: store.path, found, known: SCHEMA })
            }
            Some(_) => Ok((store, owner)),
        }
    }

    /// Opens the inventory for the agent and the command line: makes folder and file where they are
    /// missing, and migrates an older schema. Root makes all of it as the folder's owner.
    ///
    /// # Errors
    /// As [`Store::open`], except `Missing` and `Older`.
    pub fn create(state_dir: &Path, lock_timeout: Duration) -> Result<Self, StoreError> {
        let user = user_of(state_dir)?;
        files::hand_over(&state_dir.join(FILE_NAME), user)
            .map_err(|e| StoreError::file(state_dir, e))?;
        let _owner = enter(user, state_dir)?;
        files::make_dir(state_dir)?;
        files::make_file(&canonical(state_dir)?.join(FILE_NAME))?;
        let mut store = Self::connect_as(user, state_dir, lock_timeout, Durability::Power)?;
        // Check before any write: a foreign file must not change.
        store.version()?;
        store.stay()?;
        store.use_wal()?;
        configure(&*store.conn()?, Durability::Power).map_err(|e| store.fault(&e))?;
        store.migrate()?;
        store.make_hints()?;
        Ok(store)
    }

    pub(crate) fn connect(
        state_dir: &Path,
        lock_timeout: Duration,
        durability: Durability,
    ) -> Result<Self, StoreError> {
        let user = user_of(state_dir)?;
        let _owner = enter(user, state_dir)?;
        Self::connect_as(user, state_dir, lock_timeout, durability)
    }

    /// The same, in a thread that has the user's rights already.
    fn connect_as(
        user: User,
        state_dir: &Path,
        lock_timeout: Duration,
        durability: Durability,
    ) -> Result<Self, StoreError> {
        let state_dir = canonical(state_dir)?;
        let path = state_dir.join(FILE_NAME);
        files::are_plain(&path)?;
        let file = files::identity(&path);
        let flags = OpenFlags::SQLITE_OPEN_READ_WRITE
            | OpenFlags::SQLITE_OPEN_NOFOLLOW
            | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let connection = Connection::open_with_flags(&path, flags)
            .map_err(|e| StoreError::from_sqlite(&path, 0, &e))?;
        let mut database = Database { connection, closing: None, user, remaining: None };
        let deadline = Deadline::after(lock_timeout);
        let waits = deadline.clone();
        let hints = Hints::new(&state_dir, durability == Durability::Power);
        let waiting = database.connection.busy_handler(Some(move |attempt| waits.wait(attempt)));
        waiting.map_err(|e| StoreError::from_sqlite(&path, 0, &e))?;
        let origin = None;
        Ok(Self { database, path, file, hints, durability, lock_timeout, deadline, origin })
    }

    /// Makes this thread the owner of the inventory's folder, if it is root.
    fn become_owner(&self) -> Result<AsUser, StoreError> {
        enter(self.database.user, &self.path)
    }

    /// The connection: this thread is the owner of the inventory's folder as long as it is used.
    pub(crate) fn conn(&self) -> Result<Held<'_>, StoreError> {
        Ok(Held { connection: &self.database.connection, _owner: self.become_owner()? })
    }

    /// Closing folds nothing of the log into the database.
    pub(crate) fn keep_log(&self) -> Result<(), StoreError> {
        let set = self.conn()?.set_db_config(DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, true);
        set.map(drop).map_err(|e| self.fault(&e))
    }

    /// Two who make the file at once get in each other's way here, and SQLite does not ask the busy
    /// handler then.
    fn use_wal(&self) -> Result<(), StoreError> {
        let conn = self.conn()?;
        let mut attempt = 0;
        loop {
            match conn.pragma_update(None, "journal_mode", "WAL") {
                Err(e)
                    if e.sqlite_error_code() == Some(ErrorCode::DatabaseBusy)
                        && self.deadline.wait(attempt) =>
                {
                    attempt += 1;
                }
                other => return other.map_err(|e| self.fault(&e)),
            }
        }
    }

    /// Checks that the opened file is still the inventory. The log is found by name: a writer to a
    /// replaced file would write into the log of the new file
    /// (<https://www.sqlite.org/howtocorrupt.html>, 2.3, 2.5).
    pub(crate) fn stay(&self) -> Result<(), StoreError> {
        match files::identity(&self.path) == self.file {
            true => Ok(()),
            false => Err(StoreError::Replaced { path: self.path.clone() }),
        }
    }

    /// The schema version, `None` for an empty file; refuses what is not ours or newer than this
    /// program.
    pub(crate) fn version(&self) -> Result<Option<i64>, StoreError> {
        self.known(look(&*self.conn()?).map_err(|e| self.fault(&e))?)
    }

    fn known(&self, found: FileContent) -> Result<Option<i64>, StoreError> {
        let path = || self.path.clone();
        match found {
            FileContent::Nothing => Ok(None),
            FileContent::Foreign => Err(StoreError::Foreign { path: path() }),
            FileContent::Schema(found) if found > SCHEMA => {
                Err(StoreError::Newer { path: path(), found, known: SCHEMA })
            }
            FileContent::Schema(found) => Ok(Some(found)),
        }
    }

    /// The first page of an inventory that was just made: where its tables begin.
    pub(crate) fn first_page(scratch: &Path) -> Result<Vec<u8>, StoreError> {
        let path = scratch.join("template.sqlite");
        // What another try has left.
        drop(fs::remove_file(&path));
        let make = || {
            let conn = Connection::open(&path)?;
            MIGRATIONS.iter().try_for_each(|step| conn.execute_batch(step))?;
            conn.pragma_update(None, "application_id", APPLICATION_ID)?;
            conn.pragma_update(None, "user_version", SCHEMA)?;
            conn.pragma_query_value(None, "page_size", |row| row.get::<_, usize>(0))
        };
        let size = make().map_err(|e| StoreError::from_sqlite(&path, 0, &e))?;
        let mut page = fs::read(&path).map_err(|e| StoreError::file(&path, e))?;
        page.truncate(size);
        Ok(page)
    }

    fn migrate(&mut self) -> Result<(), StoreError> {
        if self.version()? == Some(SCHEMA) {
            return Ok(());
        }
        let conn = self.conn()?;
        let tx = Transaction::new_unchecked(&conn, TransactionBehavior::Immediate)
            .map_err(|e| self.fault(&e))?;
        // Another program may have migrated meanwhile: look again under the lock.
        let found = self.known(look(&tx).map_err(|e| self.fault(&e))?)?.unwrap_or_default();
        let done = usize::try_from(found).unwrap_or_default();
        let run = || {
            MIGRATIONS.iter().skip(done).try_for_each(|step| tx.execute_batch(step))?;
            tx.pragma_update(None, "application_id", APPLICATION_ID)?;
            tx.pragma_update(None, "user_version", SCHEMA)
        };
        run().and_then(|()| tx.commit()).map_err(|e| self.fault(&e))?;
        // A package that is older looks at the version in the file's head before it is installed,
        // and cannot read the log. Who reads meanwhile is not waited for: the log is folded later
        // then.
        drop(self.checkpoint("PASSIVE"));
        Ok(())
    }

    /// Restarts the timeout for locks, for programs that live longer than one call.
    pub fn restart_lock_timeout(&self) {
        self.deadline.set(Instant::now() + self.lock_timeout);
    }

    /// Runs `work` under the write lock and commits it, all or nothing.
    pub(crate) fn write<T>(
        &mut self,
        work: impl FnOnce(&Tx<'_>, &Hints) -> Result<T, TxError>,
    ) -> Result<T, StoreError> {
        let conn = self.conn()?;
        let done = (|| {
            let inner = Transaction::new_unchecked(&conn, TransactionBehavior::Immediate)?;
            let tx = Tx { inner, lasting: Cell::new(false) };
            // A program that replaces the file holds this lock, or leaves a file that cannot be
            // locked.
            self.stay()?;
            let value = work(&tx, &self.hints)?;
            let lasting = tx.lasting.get();
            tx.inner.commit()?;
            if lasting && self.durability == Durability::Boot {
                self.sync_wal()?;
            }
            Ok(value)
        })();
        let value = done.map_err(|fault| match fault {
            TxError::Sql(e) => self.fault(&e),
            TxError::Store(e) => e,
        })?;
        self.bound_wal();
        Ok(value)
    }

    /// Makes committed data survive a power cut. SQLite changes `synchronous` only between
    /// transactions, and the content of a transaction is not known before it begins. SQLite does
    /// not lock the log, so opening and closing it here drops no lock. If the log was checkpointed
    /// in the meantime, the checkpoint has synced it.
    fn sync_wal(&self) -> Result<(), StoreError> {
        let log = files::with_suffix(&self.path, "-wal");
        match fs::File::open(&log).and_then(|file| file.sync_data()) {
            Err(e) if e.kind() != ErrorKind::NotFound => Err(StoreError::file(&log, e)),
            _ => Ok(()),
        }
    }

    /// Bounds the write-ahead log: past [`WAL_LIMIT`] what can be moved into the database without
    /// waiting is moved. What was written is committed already, so a failure here is none of it:
    /// the next write tries again.
    fn bound_wal(&self) {
        let size = fs::metadata(files::with_suffix(&self.path, "-wal")).map_or(0, |m| m.len());
        if size > WAL_LIMIT {
            // TRUNCATE restarts the log: the next process cannot know what PASSIVE has moved, and
            // would move it again. The checkpoint does not wait for readers.
            let end = self.deadline.end();
            self.deadline.set(Instant::now());
            drop(self.checkpoint("TRUNCATE"));
            self.deadline.set(end);
        }
    }

    pub(crate) fn checkpoint(&self, mode: &str) -> Result<(), StoreError> {
        self.conn()?
            .query_row(&format!("PRAGMA wal_checkpoint({mode})"), [], |_| Ok(()))
            .map_err(|e| self.fault(&e))
    }

    pub(crate) fn fault(&self, e: &rusqlite::Error) -> StoreError {
        let waited_ms = u64::try_from(self.lock_timeout.as_millis()).unwrap_or(u64::MAX);
        StoreError::from_sqlite(&self.path, waited_ms, e)
    }
}

fn configure(conn: &Connection, durability: Durability) -> Sql<()> {
    conn.set_db_config(DbConfig::SQLITE_DBCONFIG_DEFENSIVE, true)?;
    conn.set_db_config(DbConfig::SQLITE_DBCONFIG_TRUSTED_SCHEMA, false)?;
    conn.pragma_update(None, "cell_size_check", true)?;
    // No statement of ours breaks a reference, 'store check' looks for one: the hook saves itself
    // the checks.
    conn.set_db_config(DbConfig::SQLITE_DBCONFIG_ENABLE_FKEY, durability == Durability::Power)?;
    conn.pragma_update(None, "wal_autocheckpoint", 0)?;
    conn.pragma_update(None, "temp_store", "MEMORY")?;
    conn.pragma_update(
        None,
        "synchronous",
        if durability == Durability::Power { "FULL" } else { "NORMAL" },
    )
}

/// The user with whose rights `state_dir` is used.
pub(crate) fn user_of(state_dir: &Path) -> Result<User, StoreError> {
    User::of(state_dir).map_err(|e| StoreError::file(&state_dir.join(FILE_NAME), e))
}

pub(crate) fn enter(user: User, path: &Path) -> Result<AsUser, StoreError> {
    user.enter().map_err(|why| StoreError::File { path: path.into(), why })
}

/// Links on the way to the folder are root's affair; below it none is followed.
pub(crate) fn canonical(state_dir: &Path) -> Result<PathBuf, StoreError> {
    state_dir.canonicalize().map_err(|e| {
        let path = state_dir.join(FILE_NAME);
        match e.kind() {
            ErrorKind::PermissionDenied => StoreError::permission(path),
            _ => StoreError::Missing { path },
        }
    })
}

/// Failure of a write: SQL, or a file beside the database.
pub(crate) enum TxError {
    Sql(rusqlite::Error),
    Store(StoreError),
}
impl From<rusqlite::Error> for TxError {
    fn from(e: rusqlite::Error) -> Self {
        Self::Sql(e)
    }
}
impl From<StoreError> for TxError {
    fn from(e: StoreError) -> Self {
        Self::Store(e)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn schema(conn: &Connection) -> Vec<String> {
        let mut statement = conn
            .prepare("SELECT sql FROM sqlite_schema WHERE sql IS NOT NULL ORDER BY type, name")
            .unwrap();
        let sql = statement
            .query_map([], |row| row.get(0))
            .unwrap()
            .collect::<Result<Vec<String>, _>>()
            .unwrap();
        sql.iter().map(|sql| plain(sql)).collect()
    }

    /// Without comments and layout: a column that was added later stands where SQLite puts it.
    fn plain(sql: &str) -> String {
        let lines = sql.lines().map(|line| line.split("--").next().unwrap());
        let words = lines.flat_map(str::split_whitespace).collect::<Vec<_>>().join(" ");
        words.replace(" ,", ",").replace(" )", ")")
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

    #[test]
    fn a_rebuild_of_an_older_inventory_fills_a_column_as_its_migration_does() {
        assert!(plain(MIGRATIONS[7]).contains(&plain(crate::release::SEEN_BY_THE_AUDIT)));
        assert!(plain(MIGRATIONS[9]).contains(&plain(crate::release::HELD_BY_THE_AUDIT)));
    }

    /// The file says by itself which schema it has: what a package's preinst reads with `od`, which
    /// has no SQLite.
    #[test]
    fn the_version_stands_in_the_files_head() {
        let dir = tempfile::tempdir().unwrap();
        let _open = Store::create(dir.path(), Duration::from_secs(5)).unwrap();
        let head = fs::read(dir.path().join(FILE_NAME)).unwrap();
        let number =
            |at: usize| i64::from(u32::from_be_bytes(head[at..at + 4].try_into().unwrap()));
        assert_eq!((number(60), number(68)), (SCHEMA, APPLICATION_ID));
        // And a package counts the migrations' files.
        let files = fs::read_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/migrations")).unwrap();
        assert_eq!(files.count(), MIGRATIONS.len());
    }

    #[test]
    fn a_full_disk_loses_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let mut store = Store::create(dir.path(), Duration::from_secs(5)).unwrap();
        let context = crate::Context {
            boot_id: "b".into(),
            uptime: 1.0,
            pending_grace: 120.0,
            actor: "test".into(),
        };
        let flavor = virt_usb_model::Flavor::default();
        assert!(store.set_flavor("before", &flavor, &context).unwrap());
        // SQLite reports a file that may not grow as it reports a disk without space.
        let pages: i64 =
            store.conn().unwrap().pragma_query_value(None, "page_count", |row| row.get(0)).unwrap();
        store
            .conn()
            .unwrap()
            .query_row(&format!("PRAGMA max_page_count = {pages}"), [], |_| Ok(()))
            .unwrap();
        let names = (0..).map(|n| format!("{n} {}", "x".repeat(200)));
        let (mut stored, mut full) = (0, None);
        for name in names {
            match store.set_flavor(&name, &flavor, &context) {
                Ok(_) => stored += 1,
                Err(e) => {
                    full = Some(e);
                    break;
                }
            }
        }
        let message = full.unwrap();
        assert!(matches!(message, StoreError::Full { .. }), "{message:?}");
        assert!(message.to_string().contains("nothing was changed; free some space"), "{message}");
        assert_eq!(store.flavors().unwrap().len(), stored + 1);
        assert_eq!(store.check().unwrap(), Vec::<String>::new());
        store.conn().unwrap().query_row("PRAGMA max_page_count = 1000000", [], |_| Ok(())).unwrap();
        assert!(
            store.set_flavor("after", &flavor, &context).unwrap(),
            "with space again it goes on"
        );
    }
}
