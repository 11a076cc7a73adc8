//! Stamps that show whether a file has changed.

use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// Device, inode and size of a file, and the time of its last change (`ctime`).
pub type Stamp = (u64, u64, u64, (i64, i64));

/// Returns the stamp of a file. `None` if the file does not exist.
pub fn stamp(file: &Path) -> Option<Stamp> {
    let found = std::fs::metadata(file).ok()?;
    Some((found.dev(), found.ino(), found.len(), (found.ctime(), found.ctime_nsec())))
}
