//! Three things that never collapse: a verdict is an answer, a refusal says that the question was
//! wrong, and a broken filter says nothing about any host.

use std::path::PathBuf;

use virt_usb_model::ParseError;

/// A question was not answered.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// What was asked or fed cannot be; the filter is well. Asking again will not help.
    #[error("the filter refuses the input: {0}")]
    Refused(String),
    /// The filter failed. That is no "no host": ask without it, or do not place the instance, as
    /// your policy has it. The next call begins with a fresh instance.
    #[error("the filter {path} is broken: {fault}", path = path.display())]
    Broken {
        /// The filter's file.
        path: PathBuf,
        /// How it failed.
        fault: Fault,
    },
}

/// How a filter failed.
#[derive(Debug, thiserror::Error)]
pub enum Fault {
    /// It computed for longer than [`crate::Limits::epoch`] allows, and was stopped.
    #[error("it took longer than {0:?} and was stopped")]
    Time(std::time::Duration),
    /// It wanted more memory than [`crate::Limits::memory`] allows, and was stopped.
    #[error("it wanted more than {0} bytes of memory and was stopped")]
    Memory(usize),
    /// It trapped: unreachable code, a division by zero, a stack without end.
    #[error("it trapped: {0}")]
    Trap(String),
    /// It answered, but not what can be an answer.
    #[error("its answer makes no sense: {0}")]
    Rubbish(String),
}

/// A filter could not be loaded.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The file cannot be read.
    #[error("cannot read the filter {path}", path = path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// It is not the file that was pinned.
    #[error("the filter {path} is not the one that is wanted: its SHA-256 is {found}, wanted \
        {wanted}", path = path.display())]
    Digest {
        /// The file.
        path: PathBuf,
        /// Its digest, in hexadecimal digits.
        found: String,
        /// The digest wanted.
        wanted: String,
    },
    /// It is no component, or cut short, or uses what is not allowed.
    #[error("{path} is no filter: {why}", path = path.display())]
    Invalid {
        /// The file.
        path: PathBuf,
        /// Why.
        why: String,
    },
    /// It imports something: a filter must not.
    #[error("the filter {path} imports {imports}: a filter imports nothing, so that it need not be \
        trusted", path = path.display())]
    Imports {
        /// The file.
        path: PathBuf,
        /// The names.
        imports: String,
    },
    /// It is a component, but of another world.
    #[error("{path} is a component, but not of the world virt-usb:scheduler/filter@0.1.0: \
        {why}", path = path.display())]
    World {
        /// The file.
        path: PathBuf,
        /// What is missing.
        why: String,
    },
    /// It is machine code that others than its owner can change.
    #[error("the precompiled filter {path} is machine code, and {why}: it must belong to root or \
        to this user, and nobody else may write to it", path = path.display())]
    Untrusted {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// It was precompiled by another version, or for another machine; or this program cannot
    /// compile.
    #[error("the filter {path} cannot be used here: {why}", path = path.display())]
    Foreign {
        /// The file.
        path: PathBuf,
        /// Why.
        why: String,
    },
    /// The engine cannot run on this machine.
    #[error("cannot set up WebAssembly: {0}")]
    Engine(String),
}

/// A host document that cannot be fed.
#[derive(Debug, thiserror::Error)]
#[error("the host document cannot be read: {0}")]
pub struct DocumentError(pub(crate) String);

impl From<ParseError> for DocumentError {
    fn from(e: ParseError) -> Self {
        Self(e.to_string())
    }
}
