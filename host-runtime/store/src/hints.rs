//! Hints: whether the database *may* know an instance or a flavor, told by one `stat` and without opening it.
//!
//! A domain that asks for nothing must cost next to nothing and must not be hurt by a broken database. So for each instance
//! with a claim or an assignment and for each stored flavor there is an empty file in `state_dir/hints`. A hint is
//! written before the row is committed and removed only after the row is gone, both under the database's write lock:
//! the hints are never fewer than the rows. One hint too many costs one look into the database.

use std::fs::{self, File};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use virt_usb_model::InstanceId;

use crate::StoreError;

/// What a hint is about.
#[derive(Debug, Clone, Copy)]
pub enum Known<'a> {
    /// An instance that has claims or assignments.
    Instance(InstanceId),
    /// A stored flavor, by name.
    Flavor(&'a str),
}

impl Known<'_> {
    fn path(self, state_dir: &Path) -> PathBuf {
        let name = match self {
            Known::Instance(id) => format!("instance-{id}"),
            // Names may hold any character; two names with one hash share a hint, which is harmless.
            Known::Flavor(name) => format!("flavor-{:016x}", fnv1a(name.as_bytes())),
        };
        dir(state_dir).join(name)
    }
}

/// False only when the database surely knows nothing of it. When in doubt: true.
pub fn may_know(state_dir: &Path, what: Known<'_>) -> bool {
    match fs::symlink_metadata(what.path(state_dir)) {
        Ok(_) => true,
        // No hints folder: either there is no database at all, or hints were lost and must not be trusted.
        Err(e) if e.kind() == ErrorKind::NotFound => {
            !dir(state_dir).is_dir() && state_dir.join(crate::FILE_NAME).exists()
        }
        Err(_) => true,
    }
}

pub(crate) fn dir(state_dir: &Path) -> PathBuf {
    state_dir.join("hints")
}

pub(crate) fn add(state_dir: &Path, what: Known<'_>) -> Result<(), StoreError> {
    let path = what.path(state_dir);
    match File::options().write(true).create_new(true).open(&path) {
        Ok(_) => crate::open::hand_over(&path),
        Err(e) if e.kind() == ErrorKind::AlreadyExists => Ok(()),
        Err(source) => Err(StoreError::File { path, source }),
    }
}

pub(crate) fn remove(state_dir: &Path, what: Known<'_>) -> Result<(), StoreError> {
    let path = what.path(state_dir);
    match fs::remove_file(&path) {
        Err(source) if source.kind() != ErrorKind::NotFound => Err(StoreError::File { path, source }),
        _ => Ok(()),
    }
}

/// FNV-1a, 64 bits (draft-eastlake-fnv): stable over versions, which std's hasher does not promise.
fn fnv1a(bytes: &[u8]) -> u64 {
    bytes
        .iter()
        .fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hint_is_there_until_it_is_removed() {
        let state = tempfile::tempdir().unwrap();
        let flavor = Known::Flavor("erp/key one");
        assert!(!may_know(state.path(), flavor), "no database, nothing known");
        fs::write(state.path().join(crate::FILE_NAME), "").unwrap();
        assert!(may_know(state.path(), flavor), "a database without hints: look into it");
        fs::create_dir(dir(state.path())).unwrap();
        assert!(!may_know(state.path(), flavor));
        add(state.path(), flavor).unwrap();
        add(state.path(), flavor).unwrap();
        assert!(may_know(state.path(), flavor));
        remove(state.path(), flavor).unwrap();
        remove(state.path(), flavor).unwrap();
        assert!(!may_know(state.path(), flavor));
    }
}
