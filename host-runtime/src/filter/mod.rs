//! The scheduler's filter, as the command line uses it.

pub mod bench;
pub mod fleet;
