//! The library behind the command line `virt-usb` and the agent `virt-usbd`.

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
