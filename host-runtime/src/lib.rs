//! The library behind the operator's command line, and what the agent is made of.

pub mod agent;
pub mod api;
pub mod cli;
mod client;
pub mod daemon;
pub mod discovery;
pub mod doctor;
pub mod filter;
pub mod fleet;
pub mod hypervisor;
pub mod inventory;
mod listen;
pub mod log;
pub mod manual;
pub mod metrics;
pub mod recover;
mod scheduler;
mod stamp;
mod timeouts;
