//! Checks that the agent's metrics can be read at their address.

use std::net::TcpStream;
use std::os::unix::net::UnixStream;

use virt_usb_config::Metrics;

use super::{CONNECT_TIMEOUT, Host, Report, address};

pub(super) fn check(host: &Host, report: &Report) {
    let (place, connected) = match &host.config.metrics {
        Metrics::Off => return,
        Metrics::Tcp(address) => {
            (address.to_string(), TcpStream::connect_timeout(address, CONNECT_TIMEOUT).map(drop))
        }
        Metrics::Unix(path) => (path.display().to_string(), UnixStream::connect(path).map(drop)),
    };
    address::check(host, report, "metrics", place, connected, |health| health.metrics_served);
}
