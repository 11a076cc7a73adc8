//! Whether the agent's metrics can be read at their address.

use std::net::TcpStream;
use std::os::unix::net::UnixStream;

use virt_usb_hook::config::Metrics;
use virt_usb_hook::machine::{self, Agent};

use super::{CONNECT_TIMEOUT, Host, Report};
use crate::agent::health;

pub(super) fn check(host: &Host, report: &Report) {
    let (place, connected) = match &host.config.metrics {
        Metrics::Off => return,
        Metrics::Tcp(address) => {
            (address.to_string(), TcpStream::connect_timeout(address, CONNECT_TIMEOUT).map(drop))
        }
        Metrics::Unix(path) => (path.display().to_string(), UnixStream::connect(path).map(drop)),
    };
    let is_alive = machine::agent(&host.config.state_dir) == Agent::Alive;
    match connected {
        Err(e) if is_alive => report.warn(
            format!("nobody serves them at {place}: {e}"),
            "'journalctl -u virt-usbd' shows why; guests get their devices all the same",
        ),
        Ok(()) if is_alive => match health::ask(&host.config.state_dir, CONNECT_TIMEOUT) {
            Ok(health) if health.metrics_served == Some(false) => report.warn(
                format!("another program listens at {place}: the agent serves no metrics"),
                "set metrics to another address, and restart the agent (guests keep their devices)",
            ),
            Ok(_) => report.ok(format!("they are served at {place}")),
            // The check of the agent reports that it does not answer.
            Err(_) => {}
        },
        Ok(()) => report.warn(
            format!("another program listens at {place}"),
            "set metrics to another address before you start the agent",
        ),
        // The check of the agent reports that it does not run.
        Err(_) => {}
    }
}
