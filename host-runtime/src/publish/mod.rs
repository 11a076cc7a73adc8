//! What a host does in a fleet: publishes its inventory and its guests, answers other hosts' requests.
//!
//! | module | what it does |
//! |---|---|
//! | `publisher`, `guests`, `news` | publish the host's document and its guests when they change |
//! | `peers` | the other hosts, for the API |
//! | `requests` | what one host's API asks another's agent, and what that answers |
//! | `simulate` | many hosts on one machine, and what must hold |
//!
//! Whatever happens to etcd, nothing changes on the host.

mod guests;
mod news;
pub(crate) mod peers;
pub mod publisher;
pub(crate) mod requests;
pub(crate) mod simulate;
