//! What tells one state of a file from another.

use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::SystemTime;

pub(crate) type Stamp = (SystemTime, u64, u64);

pub(crate) fn stamp(file: &Path) -> Option<Stamp> {
    let found = std::fs::metadata(file).ok()?;
    Some((found.modified().ok()?, found.len(), found.ino()))
}
