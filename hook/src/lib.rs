//! What libvirt calls at every step of a domain's life.
pub mod config;
pub mod sysfs;
