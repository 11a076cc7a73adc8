//! Errors. Three results are kept apart: a verdict is an answer, a refusal means that the question
//! was invalid, and a broken filter means nothing about any host.

use std::path::PathBuf;

use virt_usb_model::ParseError;

/// Reason why a question has no answer.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The filter refused its input. A retry does not help.
    #[error("the filter refuses the input: {0}")]
    Refused(String),
    /// The filter failed. This does not mean "no host": depending on your policy, place the
    /// instance without the filter, or do not place it. The next call uses a new instance of the
    /// filter.
    #[error("the filter {path} is broken: {fault}", path = path.display())]
    Broken {
        /// Path of the filter's file.
        path: PathBuf,
        /// Cause of the failure.
        fault: Fault,
    },
}

/// Cause of a filter's failure.
#[derive(Debug, thiserror::Error)]
pub enum Fault {
    /// The call took longer than [`crate::Limits::epoch`] allows, and was stopped.
    #[error("it took longer than {0:?} and was stopped")]
    Time(std::time::Duration),
    /// The filter needed more memory than [`crate::Limits::memory`] allows, and was stopped.
    #[error("it requested more than {0} bytes of memory and was stopped")]
    Memory(usize),
    /// The filter trapped: unreachable code, a division by zero, a stack overflow.
    #[error("it trapped: {0}")]
    Trap(String),
    /// The filter returned an invalid answer.
    #[error("its answer is invalid: {0}")]
    InvalidAnswer(String),
}

/// Reason why a filter cannot be loaded.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The file cannot be read.
    #[error("cannot read the filter {path}", path = path.display())]
    Read {
        /// Path of the file.
        path: PathBuf,
        /// Cause of the failure.
        source: std::io::Error,
    },
    /// The file does not have the pinned digest.
    #[error("the filter {path} is not the pinned one: its SHA-256 is {found}, wanted {wanted}",
        path = path.display())]
    Digest {
        /// Path of the file.
        path: PathBuf,
        /// Digest of the file, in hexadecimal digits.
        found: String,
        /// The pinned digest.
        wanted: String,
    },
    /// The file is not a component, is truncated, or uses a forbidden feature.
    #[error("{path} is not a filter: {why}", path = path.display())]
    Invalid {
        /// Path of the file.
        path: PathBuf,
        /// Cause of the failure.
        why: String,
    },
    /// The filter imports something, which is forbidden.
    #[error("the filter {path} imports {imports}: a filter must import nothing, so that it need \
        not be trusted", path = path.display())]
    Imports {
        /// Path of the file.
        path: PathBuf,
        /// Names of the imports.
        imports: String,
    },
    /// The file is a component of another world.
    #[error("{path} is a component, but not of the world virt-usb:scheduler/filter@0.1.0: \
        {why}", path = path.display())]
    World {
        /// Path of the file.
        path: PathBuf,
        /// The exports that are missing.
        why: String,
    },
    /// The file is machine code that users other than its owner can change.
    #[error("the precompiled filter {path} is machine code, and {why}: it must belong to root or \
        to this user, and no other user may write to it", path = path.display())]
    Untrusted {
        /// Path of the file.
        path: PathBuf,
        /// Problem with the file's owner or mode.
        why: String,
    },
    /// The file was precompiled by another version or for another machine, or this program cannot
    /// compile.
    #[error("the filter {path} cannot be used here: {why}", path = path.display())]
    Foreign {
        /// Path of the file.
        path: PathBuf,
        /// Cause of the failure.
        why: String,
    },
    /// The engine cannot run on this machine.
    #[error("cannot set up WebAssembly: {0}")]
    Engine(String),
}

/// Error of a host document.
#[derive(Debug, thiserror::Error)]
#[error("the host document cannot be read: {0}")]
pub struct DocumentError(pub(crate) String);

impl From<ParseError> for DocumentError {
    fn from(e: ParseError) -> Self {
        Self(e.to_string())
    }
}
