//! Hints: whether the database *may* know an instance or a flavor, told by one `stat` and without
//! opening it.
//!
//! A domain that asks for nothing must cost next to nothing and must not be hurt by a broken
//! database. So for each instance with a claim or an assignment and for each stored flavor there is
//! an empty file in `state_dir/hints`. A hint is written before the row is committed and removed
//! only after the row is gone, both under the database's write lock: the hints are never fewer than
//! the rows. One hint too many costs one look into the database.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use rusqlite::Connection;
use virt_usb_model::InstanceId;

use crate::device::parse;
use crate::error::Sql;
use crate::{Store, StoreError, files};

/// Subject of a hint.
#[derive(Debug, Clone, Copy)]
pub enum HintSubject<'a> {
    /// An instance that has claims.
    Instance(InstanceId),
    /// An instance that has assignments: it asks for devices, whatever its flavor says.
    Assigned(InstanceId),
    /// A stored flavor, by name.
    Flavor(&'a str),
}

impl HintSubject<'_> {
    fn path(self, state_dir: &Path) -> PathBuf {
        dir(state_dir).join(self.name())
    }

    pub(crate) fn name(self) -> String {
        match self {
            HintSubject::Instance(id) => format!("instance-{id}"),
            HintSubject::Assigned(id) => format!("assigned-{id}"),
            // Names may hold any character; two names with one hash share a hint.
            HintSubject::Flavor(name) => format!("flavor-{:016x}", fnv1a(name.as_bytes())),
        }
    }
}

/// Answer of the hints.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hint {
    /// The database surely knows nothing of it.
    No,
    /// The database knows the subject, or did a moment ago.
    Yes,
    /// The hints cannot be read or were lost. The caller may query the database, but a failure of
    /// that query must not harm a guest.
    Unsure,
}

/// Looks for a hint.
pub fn look(state_dir: &Path, what: HintSubject<'_>) -> Hint {
    match fs::symlink_metadata(what.path(state_dir)) {
        Ok(_) => Hint::Yes,
        // No hints folder: either there is no database at all, or hints were lost and must not be
        // trusted.
        Err(e) if e.kind() == ErrorKind::NotFound => {
            let lost = !dir(state_dir).is_dir() && state_dir.join(crate::FILE_NAME).exists();
            if lost { Hint::Unsure } else { Hint::No }
        }
        Err(_) => Hint::Unsure,
    }
}

/// Whether the database is worth asking.
pub fn may_know(state_dir: &Path, what: HintSubject<'_>) -> bool {
    look(state_dir, what) != Hint::No
}

fn dir(state_dir: &Path) -> PathBuf {
    state_dir.join("hints")
}

/// The folder of hints, for who writes rows. Used under the database's write lock only.
#[derive(Debug)]
pub(crate) struct Hints {
    state_dir: PathBuf,
    /// Whether a hint must survive a power cut, because the row does.
    durable: bool,
}

impl Hints {
    pub(crate) fn new(state_dir: &Path, durable: bool) -> Self {
        Self { state_dir: state_dir.into(), durable }
    }

    /// To be called before the row is committed.
    pub(crate) fn add(&self, what: HintSubject<'_>) -> Result<(), StoreError> {
        // Without the folder nothing is surely unknown; one hint alone would make the others' rows
        // so.
        if self.folder()? && files::make_file(&what.path(&self.state_dir))? && self.durable {
            self.sync(&dir(&self.state_dir))?;
        }
        Ok(())
    }

    /// To be called before a row is committed that must survive a power cut: its hint must survive
    /// it too, even one that another row has made before.
    pub(crate) fn add_lasting(&self, what: HintSubject<'_>) -> Result<(), StoreError> {
        self.add(what)?;
        if self.durable || !self.folder()? {
            return Ok(());
        }
        let folder = dir(&self.state_dir);
        File::open(&folder).and_then(|f| f.sync_all()).map_err(|e| StoreError::file(&folder, e))
    }

    /// To be called after the row's removal was committed.
    pub(crate) fn remove(&self, what: HintSubject<'_>) -> Result<(), StoreError> {
        if self.folder()? { remove(&what.path(&self.state_dir)) } else { Ok(()) }
    }

    pub(crate) fn may_know(&self, what: HintSubject<'_>) -> bool {
        may_know(&self.state_dir, what)
    }

    /// Makes the hints exactly those of `known`. A folder that is missing appears at once with all
    /// that is in it.
    pub(crate) fn mend(&self, known: &[HintRow]) -> Result<(), StoreError> {
        let (folder, new) = (dir(&self.state_dir), self.state_dir.join("hints.new"));
        let there = self.folder()?;
        let target = if there { &folder } else { &new };
        let fault = |e| StoreError::file(target, e);
        if !there {
            match fs::remove_dir_all(&new) {
                Err(e) if e.kind() != ErrorKind::NotFound => return Err(fault(e)),
                _ => files::make_dir(&new)?,
            }
        }
        let wanted: BTreeSet<String> = known.iter().map(|row| row.subject().name()).collect();
        let mut changed = !there;
        for name in &wanted {
            changed |= files::make_file(&target.join(name))?;
        }
        for entry in fs::read_dir(target).map_err(fault)? {
            let entry = entry.map_err(fault)?;
            let file = entry.file_type().is_ok_and(|kind| !kind.is_dir());
            if file && entry.file_name().to_str().is_none_or(|name| !wanted.contains(name)) {
                remove(&entry.path())?;
            }
        }
        if changed {
            self.sync(target)?;
        }
        if !there {
            fs::rename(&new, &folder).map_err(fault)?;
            self.sync(&self.state_dir)?;
        }
        Ok(())
    }

    /// Whether the folder is there; something else in its place is an error.
    fn folder(&self) -> Result<bool, StoreError> {
        let path = dir(&self.state_dir);
        match fs::symlink_metadata(&path) {
            Ok(meta) if meta.is_dir() => Ok(true),
            Ok(_) => Err(StoreError::file(&path, ErrorKind::NotADirectory.into())),
            Err(e) if e.kind() == ErrorKind::NotFound => Ok(false),
            Err(e) => Err(StoreError::file(&path, e)),
        }
    }

    fn sync(&self, folder: &Path) -> Result<(), StoreError> {
        let done =
            if self.durable { File::open(folder).and_then(|f| f.sync_all()) } else { Ok(()) };
        done.map_err(|e| StoreError::file(folder, e))
    }
}

fn remove(path: &Path) -> Result<(), StoreError> {
    match fs::remove_file(path) {
        Err(e) if e.kind() != ErrorKind::NotFound => Err(StoreError::file(path, e)),
        _ => Ok(()),
    }
}

/// A row that has a hint.
pub(crate) enum HintRow {
    Instance(InstanceId),
    Assigned(InstanceId),
    Flavor(String),
}

impl HintRow {
    pub(crate) fn subject(&self) -> HintSubject<'_> {
        match self {
            Self::Instance(id) => HintSubject::Instance(*id),
            Self::Assigned(id) => HintSubject::Assigned(*id),
            Self::Flavor(name) => HintSubject::Flavor(name),
        }
    }

    /// All rows that need one.
    pub(crate) fn all(conn: &Connection) -> Sql<Vec<Self>> {
        let mut rows: Vec<Self> = conn
            .prepare("SELECT name FROM flavors")?
            .query_map([], |row| Ok(Self::Flavor(row.get(0)?)))?
            .collect::<Sql<_>>()?;
        let mut instances = |sql: &str, hint: fn(InstanceId) -> Self| -> Sql<()> {
            let found = conn
                .prepare(sql)?
                .query_map([], |row| Ok(hint(parse(row, "instance_uuid")?)))?
                .collect::<Sql<Vec<_>>>()?;
            rows.extend(found);
            Ok(())
        };
        instances("SELECT DISTINCT instance_uuid FROM claims", Self::Instance)?;
        instances("SELECT DISTINCT instance_uuid FROM assignments", Self::Assigned)?;
        Ok(rows)
    }
}

impl Store {
    /// Makes the hints those of the rows, no fewer and no more: after a restore from a backup, say.
    ///
    /// # Errors
    /// When the database cannot be locked or a hint cannot be written.
    pub fn mend_hints(&mut self) -> Result<(), StoreError> {
        // The rows are those that are committed: this write changes none.
        self.write(|tx, hints| Ok(hints.mend(&HintRow::all(tx)?)?))
    }

    /// Makes the hints if there are none at all.
    pub(crate) fn make_hints(&mut self) -> Result<(), StoreError> {
        if self.hints.folder()? { Ok(()) } else { self.mend_hints() }
    }
}

/// FNV-1a, 64 bits (draft-eastlake-fnv): stable over versions, which std's hasher does not promise.
fn fnv1a(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hint_is_there_until_it_is_removed() {
        let state = tempfile::tempdir().unwrap();
        let flavor = HintSubject::Flavor("erp/key one");
        assert!(!may_know(state.path(), flavor), "no database, nothing known");
        fs::write(state.path().join(crate::FILE_NAME), "").unwrap();
        assert!(may_know(state.path(), flavor), "a database without hints: look into it");
        fs::create_dir(dir(state.path())).unwrap();
        assert!(!may_know(state.path(), flavor));
        let hints = Hints::new(state.path(), true);
        for _ in 0..2 {
            hints.add(flavor).unwrap();
            assert!(may_know(state.path(), flavor));
        }
        for _ in 0..2 {
            hints.remove(flavor).unwrap();
            assert!(!may_know(state.path(), flavor));
        }
    }

    #[test]
    fn one_hint_without_the_folder_does_not_hide_the_other_rows() {
        let state = tempfile::tempdir().unwrap();
        fs::write(state.path().join(crate::FILE_NAME), "").unwrap();
        let hints = Hints::new(state.path(), true);
        hints.add(HintSubject::Flavor("a")).unwrap();
        hints.remove(HintSubject::Flavor("b")).unwrap();
        assert!(may_know(state.path(), HintSubject::Flavor("c")));
        hints.mend(&[HintRow::Flavor("a".into())]).unwrap();
        assert!(
            may_know(state.path(), HintSubject::Flavor("a"))
                && !may_know(state.path(), HintSubject::Flavor("c"))
        );
        hints.mend(&[HintRow::Flavor("c".into())]).unwrap();
        assert!(
            !may_know(state.path(), HintSubject::Flavor("a"))
                && may_know(state.path(), HintSubject::Flavor("c"))
        );
    }

    #[test]
    fn nothing_is_written_through_a_link_in_the_folder_s_place() {
        let (state, elsewhere) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        std::os::unix::fs::symlink(elsewhere.path(), dir(state.path())).unwrap();
        let hints = Hints::new(state.path(), false);
        let fault = hints.add(HintSubject::Flavor("a")).unwrap_err().to_string();
        assert!(fault.contains("hints: not a directory"), "{fault}");
        assert!(hints.remove(HintSubject::Flavor("a")).is_err() && hints.mend(&[]).is_err());
        assert_eq!(fs::read_dir(elsewhere.path()).unwrap().count(), 0);
    }
}
