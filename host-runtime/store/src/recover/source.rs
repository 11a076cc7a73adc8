//! A backup that is restored: opened once, and copied from the open file.

use std::fs::File;
use std::io::{self, ErrorKind};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use rustix::fs::OFlags;

use crate::StoreError;
use crate::files::with_suffix;
use crate::user::User;

/// A backup, opened with the rights of the user who may put another file in its place: root's tool
/// copies into a folder of the agent's user, who must learn nothing by it.
pub(super) struct BackupFile {
    pub(super) path: PathBuf,
    pub(super) file: File,
    /// Log of an inventory that was copied while it was in use.
    log: Option<File>,
}

impl BackupFile {
    pub(super) fn open(path: &Path) -> Result<Self, StoreError> {
        let fault = |e| StoreError::file(path, e);
        let _user = User::of(path).and_then(User::enter).map_err(fault)?;
        let open = |path: &Path| {
            // A pipe without a writer would be waited for.
            let flags = i32::try_from(OFlags::NONBLOCK.bits()).unwrap_or_default();
            let file = File::options().read(true).custom_flags(flags).open(path)?;
            match file.metadata()?.is_file() {
                true => Ok(file),
                false => Err(io::Error::other("it is not a regular file")),
            }
        };
        let file = open(path).map_err(fault)?;
        let log = match open(&with_suffix(path, "-wal")) {
            Err(e) if e.kind() == ErrorKind::NotFound => None,
            log => Some(log.map_err(fault)?),
        };
        Ok(Self { path: path.into(), file, log })
    }

    pub(super) fn copy_to(&self, copy: &Path) -> io::Result<()> {
        io::copy(&mut &self.file, &mut File::create(copy)?)?;
        if let Some(log) = &self.log {
            io::copy(&mut &*log, &mut File::create(with_suffix(copy, "-wal"))?)?;
        }
        Ok(())
    }
}
