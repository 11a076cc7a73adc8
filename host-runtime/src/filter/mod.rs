//! Tools of the command line for the scheduler's filter.

pub mod bench;
pub mod fleet;
