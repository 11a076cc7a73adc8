//! A fleet over a real etcd: real agents that publish, a real scheduler that follows.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test's helpers fail the test")]

mod access;
mod common;
mod faults;
mod joining;
mod publishing;
mod remote;
mod replication;
mod scheduling;
