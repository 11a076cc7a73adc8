//! Data that hosts and schedulers share through etcd, and the scheduler service.
//!
//! ```text
//!   host A: store ─► publish ─┐              ┌─► reader ─► scheduler
//!   host B: store ─► publish ─┼─► etcd ──────┤
//!   host C: store ─► publish ─┘   (leases)   └─► reader ─► …
//! ```
//! This crate links neither libvirt nor libusb.

pub mod etcd;
pub mod filter_file;
pub mod http_server;
pub mod join;
pub mod keys;
pub mod log;
pub mod reader;
pub mod replicated;
pub mod scheduler;
pub mod stamp;

pub use etcd::Error;

/// Runs one request to etcd on the current thread and waits for its result.
///
/// # Errors
/// If the request fails, or the runtime cannot be created.
pub fn wait<T, E: From<Error>>(work: impl Future<Output = Result<T, E>>) -> Result<T, E> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|e| Error::Other(format!("cannot start a client: {e}")))?;
    runtime.block_on(work)
}
