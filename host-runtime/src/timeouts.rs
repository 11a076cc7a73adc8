//! Timeouts that several modules share.

use std::time::Duration;

/// Timeout for the inventory's lock in the agent and its API, in seconds.
pub(crate) const STORE_LOCK_TIMEOUT: Duration = Duration::from_secs(10);
/// Timeout for the inventory's lock in a command, in seconds.
pub(crate) const COMMAND_LOCK_TIMEOUT: Duration = Duration::from_secs(5);
