//! The library behind the operator's command line, and what the agent is made of.

pub mod agent;
pub mod api;
pub mod cli;
mod client;
pub mod daemon;
pub mod discovery;
pub mod doctor;
pub mod filter;
pub mod hypervisor;
pub mod inventory;
pub mod manual;
pub mod metrics;
pub mod publish;
pub mod recover;
mod timeouts;
