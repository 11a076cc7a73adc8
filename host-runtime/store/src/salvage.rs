//! Salvage of the readable rows of a damaged inventory. This module writes nothing.
//!
//! A table is read by its ids alone, never by an index. Where a page cannot be read it is passed
//! over: by seeking past it, by asking for each id of the gap, and from the other end. What is read
//! is only *read*: whether it makes sense is judged by who takes it over
//! ([`recover`](crate::recover)).

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::{Seek, SeekFrom, Write};
use std::path::Path;

use rusqlite::config::DbConfig;
use rusqlite::types::{Value, ValueRef};
use rusqlite::{Connection, OpenFlags, Row};

use crate::error::Sql;
use crate::{FILE_NAME, StoreError, files};

/// Number of ids in a gap that are read one by one.
const GAP: i64 = 512;
/// A table of more rows than this is none of ours.
const MOST: usize = 10_000_000;

/// One table, as far as it can be read.
#[derive(Debug, Default)]
pub(crate) struct Table {
    pub(crate) columns: Vec<String>,
    pub(crate) rows: Vec<Vec<Value>>,
    /// Part of it could not be read.
    pub(crate) torn: bool,
}

impl Table {
    pub(crate) fn column(&self, name: &str) -> Option<usize> {
        self.columns.iter().position(|column| column == name)
    }

    /// The whole numbers of a column.
    pub(crate) fn numbers(&self, column: &str) -> impl Iterator<Item = i64> {
        let at = self.column(column);
        self.rows.iter().filter_map(move |row| match row.get(at?) {
            Some(Value::Integer(number)) => Some(*number),
            _ => None,
        })
    }
}

/// All tables that were found, by name.
#[derive(Debug, Default)]
pub(crate) struct Salvage(pub(crate) BTreeMap<String, Table>);

impl Salvage {
    pub(crate) fn table(&self, name: &str) -> Option<&Table> {
        self.0.get(name)
    }

    /// Whether devices can be found at all.
    pub(crate) fn is_readable(&self) -> bool {
        self.0.get("usb_devices").is_some_and(|table| !(table.torn && table.rows.is_empty()))
    }

    /// Reads what can be read.
    pub(crate) fn read(conn: &Connection) -> Self {
        let found = names(conn).into_iter().map(|(name, by_id)| {
            let table = if by_id { by_rowid(conn, &name) } else { by_key(conn, &name) };
            (name, table)
        });
        Self(found.collect())
    }

    /// Reads a file whose first page is damaged: a copy of it is given the header, and where that
    /// is not enough the whole first page, of an inventory that was just made, whose tables begin
    /// where those of every inventory do.
    pub(crate) fn read_without_header(
        scratch: &Path,
        file: &Path,
        template: &[u8],
    ) -> Result<Self, StoreError> {
        let place = scratch.join("damaged");
        fs::create_dir(&place).map_err(|e| StoreError::file(&place, e))?;
        let copy = place.join(FILE_NAME);
        let mut best = Self::default();
        for patched in [100, template.len()] {
            for suffix in ["", "-wal", "-shm"] {
                drop(fs::remove_file(files::with_suffix(&copy, suffix)));
            }
            copy_all(file, &copy)?;
            patch(&copy, template.get(..patched).unwrap_or(template))
                .map_err(|e| StoreError::file(&copy, e))?;
            // What cannot be opened even so has nothing that could be read.
            if let Ok(conn) = open(&copy) {
                best = Self::read(&conn);
            }
            if best.is_readable() {
                break;
            }
        }
        Ok(best)
    }
}

/// The database's file and its log, byte for byte. Not to be used on a file that this process has
/// open as a database.
pub(crate) fn copy_all(from: &Path, to: &Path) -> Result<(), StoreError> {
    for suffix in ["", "-wal"] {
        let (from, to) = (files::with_suffix(from, suffix), files::with_suffix(to, suffix));
        let fault = |e| StoreError::file(&to, e);
        let mut source = match File::open(&from) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => continue,
            other => other.map_err(|e| StoreError::file(&from, e))?,
        };
        crate::maintain::create_private(&to).map_err(fault)?;
        let mut target = File::options().write(true).open(&to).map_err(fault)?;
        std::io::copy(&mut source, &mut target).and_then(|_| target.sync_all()).map_err(fault)?;
    }
    Ok(())
}

/// Opens a file that may be damaged, to read it: what contradicts the schema is no reason to stop,
/// and closing it folds no log.
pub(crate) fn open(path: &Path) -> Sql<Connection> {
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE
        | OpenFlags::SQLITE_OPEN_NOFOLLOW
        | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let conn = Connection::open_with_flags(path, flags)?;
    conn.set_db_config(DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, true)?;
    conn.set_db_config(DbConfig::SQLITE_DBCONFIG_WRITABLE_SCHEMA, true)?;
    conn.set_db_config(DbConfig::SQLITE_DBCONFIG_TRUSTED_SCHEMA, false)?;
    conn.pragma_update(None, "cell_size_check", true)?;
    conn.pragma_update(None, "wal_autocheckpoint", 0)?;
    Ok(conn)
}

/// Writes the beginning of another database over that of this one
/// (<https://www.sqlite.org/fileformat.html>, 1.3).
fn patch(path: &Path, beginning: &[u8]) -> std::io::Result<()> {
    let log = fs::metadata(files::with_suffix(path, "-wal")).is_ok_and(|log| log.len() > 0);
    let page = usize::from(u16::from_be_bytes([beginning[16], beginning[17]]));
    let mut beginning = beginning.to_vec();
    let pages = fs::metadata(path)?.len().div_ceil(page.max(512) as u64).max(1);
    let mut put = |at: usize, bytes: &[u8]| {
        if let Some(place) = beginning.get_mut(at..at + bytes.len()) {
            place.copy_from_slice(bytes);
        }
    };
    // 2: with a log. Size in pages; free pages are not checked.
    put(18, if log { &[2, 2] } else { &[1, 1] });
    put(28, &u32::try_from(pages).unwrap_or(u32::MAX).to_be_bytes());
    put(32, &[0; 8]);
    let mut file = File::options().write(true).open(path)?;
    file.seek(SeekFrom::Start(0))?;
    file.write_all(&beginning)?;
    if file.metadata()?.len() < page as u64 {
        file.set_len(page as u64)?;
    }
    Ok(())
}

/// The tables, and whether their rows have ids.
fn names(conn: &Connection) -> Vec<(String, bool)> {
    let mut found = Vec::new();
    let sql = "SELECT rowid, name, sql FROM sqlite_schema WHERE type = 'table'";
    let read = |row: &Row<'_>| -> Sql<()> {
        let (name, sql): (String, Option<String>) = (row.get(1)?, row.get(2)?);
        let plain = name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_');
        if plain && (name == "sqlite_sequence" || !name.starts_with("sqlite_")) {
            found
                .push((name, !sql.is_some_and(|sql| sql.to_uppercase().contains("WITHOUT ROWID"))));
        }
        Ok(())
    };
    // A schema that can be read in part names some tables.
    drop(each(conn, sql, None, read));
    found
}

/// Runs a query and shows its rows until one cannot be reached. A row that `read` refuses is passed
/// over.
fn each(
    conn: &Connection,
    sql: &str,
    from: Option<i64>,
    mut read: impl FnMut(&Row<'_>) -> Sql<()>,
) -> Sql<()> {
    let mut statement = conn.prepare_cached(sql)?;
    let mut rows = match from {
        Some(from) => statement.query([from])?,
        None => statement.query([])?,
    };
    let mut count = 0;
    while let Some(row) = rows.next()? {
        drop(read(row));
        count += 1;
        if count > MOST {
            break;
        }
    }
    Ok(())
}

/// The columns from the `skip`th on; none where a text is none.
fn values(row: &Row<'_>, skip: usize) -> Option<Vec<Value>> {
    (skip..row.as_ref().column_count())
        .map(|at| match row.get_ref(at).ok()? {
            ValueRef::Text(text) => {
                std::str::from_utf8(text).ok().map(|text| Value::Text(text.to_owned()))
            }
            other => Value::try_from(other).ok(),
        })
        .collect()
}

fn columns(conn: &Connection, name: &str) -> Vec<String> {
    let statement = conn.prepare(&format!("SELECT * FROM {name}"));
    statement.map(|s| s.column_names().map(ToOwned::to_owned).collect()).unwrap_or_default()
}

/// Rows by their id. An id that was found with different rows is dropped.
#[derive(Default)]
struct ById {
    rows: BTreeMap<i64, Vec<Value>>,
    doubtful: BTreeSet<i64>,
    /// Some row could not be read.
    torn: bool,
}

impl ById {
    fn take(&mut self, row: &Row<'_>) -> Sql<()> {
        let id: i64 = row.get(0)?;
        match values(row, 1) {
            None => self.torn = true,
            Some(values) => {
                if let Some(known) = self.rows.get(&id)
                    && *known != values
                {
                    self.doubtful.insert(id);
                }
                self.rows.insert(id, values);
            }
        }
        Ok(())
    }
}

fn by_rowid(conn: &Connection, name: &str) -> Table {
    let mut found = ById::default();
    let forward =
        format!("SELECT rowid, * FROM {name} NOT INDEXED WHERE rowid > ?1 ORDER BY rowid");
    let mut last = i64::MIN;
    loop {
        let read = each(conn, &forward, Some(last), |row| {
            last = last.max(row.get(0)?);
            found.take(row)
        });
        if read.is_ok() {
            break;
        }
        found.torn = true;
        let Some(next) = jump(conn, name, last.max(0)) else { break };
        let one = format!("SELECT rowid, * FROM {name} NOT INDEXED WHERE rowid = ?1");
        let from = last.max(0).saturating_add(1);
        // The one that was reached too: each turn of this loop leaves something behind.
        for id in (from..next.min(from.saturating_add(GAP))).chain([next]) {
            drop(each(conn, &one, Some(id), |row| found.take(row)));
        }
        last = next;
    }
    if found.torn {
        let backward =
            format!("SELECT rowid, * FROM {name} NOT INDEXED WHERE rowid > ?1 ORDER BY rowid DESC");
        drop(each(conn, &backward, Some(i64::MIN), |row| found.take(row)));
    }
    found.torn |= !found.doubtful.is_empty();
    found.rows.retain(|id, _| !found.doubtful.contains(id));
    Table {
        columns: columns(conn, name),
        rows: found.rows.into_values().collect(),
        torn: found.torn,
    }
}

/// The first row that can be reached beyond a page that cannot be read.
fn jump(conn: &Connection, name: &str, last: i64) -> Option<i64> {
    let sql =
        format!("SELECT rowid FROM {name} NOT INDEXED WHERE rowid >= ?1 ORDER BY rowid LIMIT 1");
    let mut step = 1;
    while step < 1 << 40 {
        let mut next = None;
        let read = each(conn, &sql, Some(last.saturating_add(step)), |row| {
            next = Some(row.get(0)?);
            Ok(())
        });
        if read.is_ok() {
            return next.filter(|next| *next > last);
        }
        step *= 2;
    }
    None
}

/// A table whose rows have a key of their own: from both ends.
fn by_key(conn: &Connection, name: &str) -> Table {
    let mut table = Table { columns: columns(conn, name), ..Table::default() };
    let mut seen = BTreeSet::new();
    let Some(key) = table.columns.first().cloned() else { return Table { torn: true, ..table } };
    for order in ["ASC", "DESC"] {
        let sql = format!("SELECT * FROM {name} NOT INDEXED ORDER BY {key} {order}");
        let mut torn = false;
        let read = each(conn, &sql, None, |row| {
            match values(row, 0) {
                None => torn = true,
                Some(values) => {
                    if seen.insert(format!("{values:?}")) {
                        table.rows.push(values);
                    }
                }
            }
            Ok(())
        });
        table.torn |= torn || read.is_err();
        if read.is_ok() {
            break;
        }
    }
    table
}
