//! What tells one state of a file from another.

use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// Its device, number and size, and when it was last changed: content, owner or mode.
pub type Stamp = (u64, u64, u64, (i64, i64));

/// Returns the stamp of a file; none: there is no such file.
pub fn stamp(file: &Path) -> Option<Stamp> {
    let found = std::fs::metadata(file).ok()?;
    Some((found.dev(), found.ino(), found.len(), (found.ctime(), found.ctime_nsec())))
}
