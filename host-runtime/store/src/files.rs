//! The files beside SQL: made with the right mode, and handed to the agent's user when root made them.
//!
//! The database's own files are never opened and closed here while a connection may exist: closing any file
//! descriptor of a file drops all of the process's POSIX locks on it, SQLite's too
//! (<https://www.sqlite.org/howtocorrupt.html>, 2.2).

use std::fs::{self, File, Permissions};
use std::io::ErrorKind;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt, fchown, lchown};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use crate::StoreError;

const DIR_MODE: u32 = 0o750;
const FILE_MODE: u32 = 0o640;

/// Device and inode.
pub(crate) type Identity = (u64, u64);

/// Which file stands at this path, looked at and not opened; none where there is none.
pub(crate) fn identity(path: &Path) -> Option<Identity> {
    fs::symlink_metadata(path).ok().map(|found| (found.dev(), found.ino()))
}

pub(crate) fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

/// Makes a folder where there is none, and the ones above it.
pub(crate) fn make_dir(path: &Path) -> Result<(), StoreError> {
    let fault = |e| StoreError::file(path, e);
    if path.is_dir() {
        return Ok(());
    }
    if let Some(above) = path.parent() {
        fs::create_dir_all(above).map_err(fault)?;
    }
    match fs::DirBuilder::new().mode(DIR_MODE).create(path) {
        Err(e) if e.kind() == ErrorKind::AlreadyExists && path.is_dir() => return Ok(()),
        other => other.map_err(fault)?,
    }
    fs::set_permissions(path, Permissions::from_mode(DIR_MODE)).map_err(fault)
}

/// Makes an empty file where there is none, for the owner of its folder.
pub(crate) fn make_file(path: &Path) -> Result<bool, StoreError> {
    /// So that no thread opens the file as a database before this one has closed it.
    static MAKING: Mutex<()> = Mutex::new(());
    let _one = MAKING.lock().unwrap_or_else(PoisonError::into_inner);
    let fault = |e| StoreError::file(path, e);
    let file = match File::options().write(true).create_new(true).mode(FILE_MODE).open(path) {
        Err(e) if e.kind() == ErrorKind::AlreadyExists => return Ok(false),
        other => other.map_err(fault)?,
    };
    let (made, owner) = (file.metadata().map_err(fault)?, owner_for(path)?);
    if made.mode() & 0o7777 != FILE_MODE {
        file.set_permissions(Permissions::from_mode(FILE_MODE)).map_err(fault)?;
    }
    if made.uid() == 0 && owner != (made.uid(), made.gid()) {
        fchown(&file, Some(owner.0), Some(owner.1)).map_err(fault)?;
    }
    Ok(true)
}

/// Gives a file or folder of root's to the owner of the folder that it lies in. Anybody else's is its owner's already.
/// A file with a second name is left alone: that name may be root's own.
///
/// # Errors
/// When the folder cannot be read or the file cannot be given away.
pub fn hand_over(path: &Path) -> Result<(), StoreError> {
    let Ok(meta) = fs::symlink_metadata(path) else { return Ok(()) };
    let owner = owner_for(path)?;
    let single = meta.is_dir() || (meta.is_file() && meta.nlink() == 1);
    if meta.uid() != 0 || (meta.uid(), meta.gid()) == owner || !single {
        return Ok(());
    }
    lchown(path, Some(owner.0), Some(owner.1)).map_err(|e| StoreError::file(path, e))
}

/// User and group of the folder that `path` lies in.
fn owner_for(path: &Path) -> Result<(u32, u32), StoreError> {
    let folder = path.parent().unwrap_or(Path::new("/"));
    fs::metadata(folder).map(|m| (m.uid(), m.gid())).map_err(|e| StoreError::file(folder, e))
}

/// Whether the file system that `folder` lies on is mounted read-only. Removing a name that is not there says so,
/// and does nothing.
pub(crate) fn is_read_only(folder: &Path) -> bool {
    let nothing = folder.join(format!(".virt-usb-{}", std::process::id()));
    fs::remove_file(nothing).is_err_and(|e| e.kind() == ErrorKind::ReadOnlyFilesystem)
}

/// Whether this process runs as a user who neither owns the file nor is root.
pub(crate) fn is_strange_to(file: &fs::Metadata) -> bool {
    fs::metadata("/proc/self").is_ok_and(|me| me.uid() != 0 && me.uid() != file.uid())
}
