//! A host's part in a fleet: publishes its inventory and its guests, and answers requests of other
//! hosts.
//!
//! | module | what it does |
//! |---|---|
//! | `publisher`, `guests`, `write_signal` | publish the host's document and guests |
//! | `peers` | follows the other hosts, for the API |
//! | `requests` | sends requests to the agent of another host, and answers theirs |
//! | `simulate` | simulates many hosts on one machine, and checks invariants |
//!
//! A failure of etcd changes nothing on the host.

mod guests;
pub(crate) mod peers;
pub mod publisher;
pub(crate) mod requests;
pub(crate) mod simulate;
mod write_signal;
