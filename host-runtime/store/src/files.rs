//! The files beside SQL: made with the right mode, by the owner of their folder
//! ([`user`](crate::user)).
//!
//! The database's own files are never opened and closed here while a connection may exist: closing
//! any file descriptor of a file drops all of the process's POSIX locks on it, SQLite's too
//! (<https://www.sqlite.org/howtocorrupt.html>, 2.2).

use std::fs::{self, File, Permissions};
use std::io::{self, ErrorKind, Read};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt, fchown};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use rustix::fs::OFlags;

use crate::StoreError;
use crate::open::is_inventory;
use crate::user::User;

const DIR_MODE: u32 = 0o750;
const FILE_MODE: u32 = 0o640;

/// Device and inode.
pub(crate) type Identity = (u64, u64);

/// Identity of the file at this path, determined without opening it; `None` if there is no file.
pub(crate) fn identity(path: &Path) -> Option<Identity> {
    fs::symlink_metadata(path).ok().map(|found| of(&found))
}

pub(crate) fn of(file: &fs::Metadata) -> Identity {
    (file.dev(), file.ino())
}

/// Whether the files that SQLite opens by name are files, or not there. It follows no link, but
/// waits for who writes to a pipe.
pub(crate) fn are_plain(database: &Path) -> Result<(), StoreError> {
    for path in ["", "-wal", "-shm", "-journal"].map(|suffix| with_suffix(database, suffix)) {
        if fs::symlink_metadata(&path).is_ok_and(|found| !found.is_file()) {
            return Err(StoreError::Link { path });
        }
    }
    Ok(())
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

/// Makes an empty file where there is none.
pub(crate) fn make_file(path: &Path) -> Result<bool, StoreError> {
    /// So that no thread opens the file as a database before this one has closed it.
    static MAKING: Mutex<()> = Mutex::new(());
    let _one = MAKING.lock().unwrap_or_else(PoisonError::into_inner);
    let fault = |e| StoreError::file(path, e);
    let file = match File::options().write(true).create_new(true).mode(FILE_MODE).open(path) {
        Err(e) if e.kind() == ErrorKind::AlreadyExists => return Ok(false),
        other => other.map_err(fault)?,
    };
    let made = file.metadata().map_err(fault)?;
    if made.mode() & 0o7777 != FILE_MODE {
        file.set_permissions(Permissions::from_mode(FILE_MODE)).map_err(fault)?;
    }
    Ok(true)
}

/// Gives an inventory that root put into another user's folder to that user: a backup, copied back
/// by hand.
///
/// Only a file that says itself that it is an inventory, and that has no second name. The file is
/// examined and given away by its descriptor: whatever its name leads to meanwhile, it is this
/// file.
pub(crate) fn hand_over(inventory: &Path, user: User) -> io::Result<()> {
    let Some((uid, gid)) = user.ids() else { return Ok(()) };
    // Most often it is the user's already. Then nothing is opened: see above.
    if fs::symlink_metadata(inventory).map_or(true, |found| found.uid() != 0) {
        return Ok(());
    }
    let careful = OFlags::NOFOLLOW.union(OFlags::NONBLOCK).bits();
    let flags = i32::try_from(careful).unwrap_or_default();
    let Ok(mut file) = File::options().read(true).custom_flags(flags).open(inventory) else {
        // Missing, or a link: who opens it says so.
        return Ok(());
    };
    let found = file.metadata()?;
    if found.uid() != 0 || !found.is_file() || found.nlink() != 1 {
        return Ok(());
    }
    let mut head = [0; 72];
    let is_ours = file.read_exact(&mut head).is_ok() && is_inventory(&head);
    if is_ours {
        fchown(&file, Some(uid.as_raw()), Some(gid.as_raw()))?;
    }
    Ok(())
}

/// Whether the file system that `folder` lies on is mounted read-only. Removing a name that is not
/// there says so, and does nothing.
pub(crate) fn is_read_only(folder: &Path) -> bool {
    let nothing = folder.join(format!(".virt-usb-{}", std::process::id()));
    fs::remove_file(nothing).is_err_and(|e| e.kind() == ErrorKind::ReadOnlyFilesystem)
}

/// Whether this thread has the rights of a user who neither owns the file nor is root.
pub(crate) fn is_strange_to(file: &fs::Metadata) -> bool {
    let me = rustix::process::geteuid();
    !me.is_root() && me.as_raw() != file.uid()
}
