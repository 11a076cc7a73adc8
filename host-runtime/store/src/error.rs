//! Errors of the inventory's file, each with advice for the operator.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use rusqlite::{ErrorCode, ffi};

use crate::files;
use crate::user::User;

/// Why the inventory could not be read or written. Each says what an operator can do about it.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// There is no database, or not even its folder.
    #[error(
        "there is no inventory at {path}: make it with 'virt-usb discover', or start the agent \
         ('systemctl start virt-usbd')"
    )]
    Missing {
        /// The database's file.
        path: PathBuf,
    },
    /// The database or its folder may not be used by this user.
    #[error(
        "no permission for {path} (or its folder): it belongs to the agent's user; run as root or \
            as that user"
    )]
    Permission {
        /// The database's file.
        path: PathBuf,
    },
    /// Root works as the owner of the folder, and that user may not use the file.
    #[error(
        "user {user} may not use {path}, and root uses that folder as its owner, user {user}: \
         'chown {user}: {path}', and let user {user} into each folder above it"
    )]
    NotTheirs {
        /// Path of the file.
        path: PathBuf,
        /// The user's number.
        user: u32,
    },
    /// A link stands where the database should be.
    #[error(
        "{path} is a symbolic link or not a regular file: the inventory is not opened through \
         links; remove it, or put the file itself there"
    )]
    Link {
        /// The database's file.
        path: PathBuf,
    },
    /// Another program held the lock for too long.
    #[error(
        "another program has held the inventory's lock for more than {waited_ms} ms: find it with \
         'fuser -v {path}', then try again"
    )]
    Locked {
        /// The database's file.
        path: PathBuf,
        /// How long was waited, in milliseconds.
        waited_ms: u64,
    },
    /// The file is damaged, or is no database at all.
    #[error(
        "the inventory {path} is damaged ({what}): 'virt-usb store rebuild' rebuilds it from its \
         readable rows, the plugged-in devices and the running guests; with a backup, use \
         'virt-usb store restore FILE'; both keep the damaged file"
    )]
    Corrupt {
        /// The database's file.
        path: PathBuf,
        /// Message of SQLite.
        what: String,
    },
    /// A newer virt-usb wrote it.
    #[error(
        "the inventory {path} has schema {found}, this program knows {known}: install the virt-usb \
            that wrote it, or newer"
    )]
    Newer {
        /// The database's file.
        path: PathBuf,
        /// Schema version of the file.
        found: i64,
        /// Schema version of this program.
        known: i64,
    },
    /// An older virt-usb wrote it, and this program may not change it.
    #[error(
        "the inventory {path} has schema {found}, this program needs {known}: run 'virt-usb \
            discover' once to bring it up to date"
    )]
    Older {
        /// The database's file.
        path: PathBuf,
        /// Schema version of the file.
        found: i64,
        /// Schema version of this program.
        known: i64,
    },
    /// A database of some other program.
    #[error("{path} is not an inventory of virt-usb: it is another program's database")]
    Foreign {
        /// The database's file.
        path: PathBuf,
    },
    /// No space left. Nothing was changed.
    #[error(
        "no space left for the inventory {path}: nothing was changed; free some space and try again"
    )]
    Full {
        /// The database's file.
        path: PathBuf,
    },
    /// The file system or the file is read-only. Nothing was changed.
    #[error(
        "the inventory {path} is read-only: nothing was changed; check the mount and the file's \
            mode"
    )]
    ReadOnly {
        /// The database's file.
        path: PathBuf,
    },
    /// Another file stands in its place since it was opened. Nothing was changed.
    #[error(
        "the inventory {path} was replaced while it was in use: nothing was written to the old \
            one; try again"
    )]
    Replaced {
        /// The database's file.
        path: PathBuf,
    },
    /// A scan of this host would remove the devices of a simulation. Nothing was changed.
    #[error(
        "the inventory {path} has the devices of a simulation, which a scan of this host would \
         remove: add --sim FILE; to use the devices of this host, set another state_dir in a \
         configuration file, and pass that file with --config"
    )]
    Simulated {
        /// The database's file.
        path: PathBuf,
    },
    /// A simulation would remove the devices of this host. Nothing was changed.
    #[error(
        "a simulation needs its own state_dir: {path} has the devices of this host. Set another \
         state_dir in a configuration file, and pass that file with --config"
    )]
    NotSimulated {
        /// The database's file.
        path: PathBuf,
    },
    /// Another process is restoring or rebuilding the inventory.
    #[error(
        "another 'virt-usb store restore' or 'rebuild' is working on {path}: wait until it is \
         done, then run 'virt-usb store check'"
    )]
    Recovering {
        /// The database's file.
        path: PathBuf,
    },
    /// A file that was to be restored is no inventory that can be relied on. Nothing was changed.
    #[error("{path} is not a sound inventory ({what}): nothing was changed; use another backup")]
    Unsound {
        /// Path of the file.
        path: PathBuf,
        /// Problem that was found.
        what: String,
    },
    /// A row holds what this program never writes.
    #[error(
        "the inventory {path} holds a row that virt-usb never writes ({what}): run 'virt-usb store \
            check'"
    )]
    Row {
        /// The database's file.
        path: PathBuf,
        /// The row and its column.
        what: String,
    },
    /// A file beside the database could not be written.
    #[error("cannot write {path}: {why}")]
    File {
        /// Path of the file.
        path: PathBuf,
        /// Cause of the failure.
        why: std::io::Error,
    },
    /// Anything else that SQLite reports.
    #[error("the inventory {path} cannot be used: {what}")]
    Other {
        /// The database's file.
        path: PathBuf,
        /// Message of SQLite.
        what: String,
    },
}

/// Result of a statement inside the store; [`StoreError::from_sqlite`] adds the file and the
/// advice.
pub(crate) type Sql<T> = Result<T, rusqlite::Error>;

impl StoreError {
    pub(crate) fn from_sqlite(path: &Path, waited_ms: u64, e: &rusqlite::Error) -> Self {
        let path = path.to_path_buf();
        let what = e.to_string();
        if let rusqlite::Error::FromSqlConversionFailure(..)
        | rusqlite::Error::InvalidColumnType(..) = e
        {
            return Self::Row { path, what };
        }
        if let rusqlite::Error::SqliteFailure(failure, _) = e
            && failure.extended_code == ffi::SQLITE_IOERR_SHMSIZE
        {
            return Self::Full { path };
        }
        match e.sqlite_error_code() {
            Some(
                ErrorCode::DatabaseBusy
                | ErrorCode::DatabaseLocked
                | ErrorCode::FileLockingProtocolFailed,
            ) => Self::Locked { path, waited_ms },
            Some(ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase) => {
                Self::Corrupt { path, what }
            }
            Some(ErrorCode::DiskFull) => Self::Full { path },
            Some(ErrorCode::PermissionDenied) => Self::permission(path),
            Some(ErrorCode::ReadOnly) => {
                Self::look_why(path).unwrap_or_else(|path| Self::ReadOnly { path })
            }
            Some(ErrorCode::CannotOpen | ErrorCode::SystemIoFailure) => {
                Self::look_why(path).unwrap_or_else(|path| Self::Other { path, what })
            }
            _ => Self::Other { path, what },
        }
    }

    /// SQLite says only that it cannot open or write: what the file system tells; the path again if
    /// that is nothing.
    fn look_why(path: PathBuf) -> Result<Self, PathBuf> {
        let folder = path.parent().unwrap_or(Path::new("/"));
        match std::fs::symlink_metadata(&path) {
            Err(e) if e.kind() == ErrorKind::PermissionDenied => Ok(Self::permission(path)),
            Err(_) => Ok(Self::Missing { path }),
            Ok(meta) if !meta.is_file() => Ok(Self::Link { path }),
            Ok(_) if files::is_read_only(folder) => Ok(Self::ReadOnly { path }),
            Ok(meta) if files::is_strange_to(&meta) => Ok(Self::permission(path)),
            Ok(_) => Err(path),
        }
    }

    /// Chooses the message by the affected user: one who does not own the inventory, or the owner
    /// whose rights root uses.
    pub(crate) fn permission(path: PathBuf) -> Self {
        match User::in_place_of_root() {
            Some(user) => Self::NotTheirs { path, user },
            None => Self::Permission { path },
        }
    }

    /// Applies the error to another file: an error of a copy is reported for the original.
    pub(crate) fn of(mut self, file: &Path) -> Self {
        match &mut self {
            Self::Missing { path }
            | Self::Permission { path }
            | Self::NotTheirs { path, .. }
            | Self::Link { path }
            | Self::Locked { path, .. }
            | Self::Corrupt { path, .. }
            | Self::Newer { path, .. }
            | Self::Older { path, .. }
            | Self::Foreign { path }
            | Self::Full { path }
            | Self::ReadOnly { path }
            | Self::Replaced { path }
            | Self::Simulated { path }
            | Self::NotSimulated { path }
            | Self::Recovering { path }
            | Self::Unsound { path, .. }
            | Self::Row { path, .. }
            | Self::File { path, .. }
            | Self::Other { path, .. } => file.clone_into(path),
        }
        self
    }

    /// A file beside the database, or the database's own file before SQLite has it.
    pub(crate) fn file(path: &Path, why: std::io::Error) -> Self {
        let path = path.to_path_buf();
        match why.kind() {
            ErrorKind::PermissionDenied => Self::permission(path),
            ErrorKind::ReadOnlyFilesystem => Self::ReadOnly { path },
            ErrorKind::StorageFull | ErrorKind::QuotaExceeded => Self::Full { path },
            _ => Self::File { path, why },
        }
    }
}

/// A column that does not parse, as an error that a row-reading closure can return.
pub(crate) fn bad_row(
    row: &rusqlite::Row<'_>,
    column: &str,
    e: impl std::fmt::Display,
) -> rusqlite::Error {
    let index = row.as_ref().column_index(column).unwrap_or_default();
    let what = format!("column {column}: {e}");
    rusqlite::Error::FromSqlConversionFailure(index, rusqlite::types::Type::Text, what.into())
}
