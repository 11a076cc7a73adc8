//! The addresses at which the agent serves something.

use std::fmt::Display;
use std::io;

use virt_usb_config::host_env::{self, Agent};

use super::{CONNECT_TIMEOUT, Host, Report};
use crate::agent::health::{self, Health};

/// Checks that the agent serves the address in the configuration's `key`. `connected` is the result
/// of a connection to it, `served` the agent's own report.
pub(super) fn check(
    host: &Host,
    report: &Report,
    key: &str,
    address: impl Display,
    connected: io::Result<()>,
    served: impl FnOnce(&Health) -> Option<bool>,
) {
    let is_alive = host_env::agent(&host.config.state_dir) == Agent::Alive;
    match connected {
        Err(e) if is_alive => report.warn(
            format!("nothing listens at {address}: {e}"),
            "'journalctl -u virt-usbd' shows why; guests still get their devices",
        ),
        // The check of the agent reports that it does not run.
        Err(_) => {}
        Ok(()) if !is_alive => report.warn(
            format!("another program listens at {address}"),
            format!("set {key} to another address before you start the agent"),
        ),
        Ok(()) => match health::ask(&host.config.state_dir, CONNECT_TIMEOUT) {
            Ok(health) if served(&health) == Some(false) => report.warn(
                format!("another program listens at {address}, not the agent"),
                format!(
                    "set {key} to another address, and restart the agent (guests keep their \
                    devices)"
                ),
            ),
            Ok(_) => report.ok(format!("the agent listens at {address}")),
            // The check of the agent reports that it does not answer.
            Err(_) => {}
        },
    }
}
