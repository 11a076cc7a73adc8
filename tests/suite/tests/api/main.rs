//! The API through real sockets, of a real agent; its devices and guests are simulated.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test's helpers fail the test"
)]

mod authorization;
mod calls;
mod clients;
mod common;
mod transport;
