//! The fleet: many hosts, each the authority over its own devices, told of in one etcd.
//!
//! ```text
//!   host A: store ─► publish ─┐              ┌─► reader ─► scheduler
//!   host B: store ─► publish ─┼─► etcd ──────┤
//!   host C: store ─► publish ─┘   (leases)   └─► reader ─► …
//! ```
//! | module | what it does |
//! |---|---|
//! | `keys` | what stands where |
//! | `etcd` | a connection, the next endpoint, errors in words |
//! | `join` | a machine's number; leaving; how things are |
//! | `shared` | the fleet's flavors and grants: changed in etcd, mirrored into the inventory |
//! | `publish`, `guests`, `news` | a host's document and its guests: when they change, as long as the host lives |
//! | `peers` | the other hosts, for the API |
//! | `requests` | what one host's API asks another's agent, and what that answers |
//! | `reader` | list, then watch, without a gap |
//! | `simulate` | many hosts on one machine, and what must hold |
//!
//! What happens to etcd changes nothing on a host.

mod etcd;
mod guests;
pub(crate) mod join;
pub(crate) mod keys;
mod news;
pub(crate) mod peers;
pub mod publish;
pub(crate) mod reader;
pub(crate) mod requests;
pub(crate) mod shared;
pub(crate) mod simulate;

pub use etcd::Error;

/// Waits for etcd, where nothing else is to be done meanwhile.
pub(crate) fn wait<T, E: From<Error>>(work: impl Future<Output = Result<T, E>>) -> Result<T, E> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|e| Error::Other(format!("nothing can be asked of it: {e}")))?;
    runtime.block_on(work)
}
