//! The options of `virt-usb-scheduler`.

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::{Args, Parser};

use crate::filter_file::FilterFile;

/// Serve scheduling queries: which hosts of the fleet can satisfy a flavor
///
/// Follows the fleet named in the configuration. Serves requests over HTTP and on a unix socket
/// until SIGTERM: POST /select, POST /explain, GET and DELETE /assumptions, GET /health, GET
/// /metrics.
#[derive(Debug, Parser)]
#[command(version, name = "virt-usb-scheduler")]
pub struct Arguments {
    /// Configuration file [default: /etc/virt-usb/config.toml, if it exists]
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Options that `virt-usb scheduler` has too.
    #[command(flatten)]
    pub options: Scheduler,
}

/// Options of the service.
#[derive(Debug, Args)]
pub struct Scheduler {
    /// Serve HTTP at this loopback address
    #[arg(
        long,
        value_name = "ADDRESS",
        value_parser = loopback,
        required_unless_present = "socket"
    )]
    pub listen: Option<SocketAddr>,
    /// Serve on this unix socket; access needs the socket's group and its directory
    #[arg(long, value_name = "PATH")]
    pub socket: Option<PathBuf>,
    /// Refuse requests if the fleet view is older than this number of seconds
    #[arg(
        long,
        value_name = "SECONDS",
        default_value_t = 300,
        value_parser = clap::value_parser!(u64).range(1..=86400)
    )]
    pub max_age: u64,
    #[command(flatten)]
    /// Options that name the filter.
    pub component: FilterFile,
}

fn loopback(text: &str) -> Result<SocketAddr, String> {
    match text.parse::<SocketAddr>() {
        Ok(address) if address.ip().is_loopback() => Ok(address),
        _ => Err("wanted a loopback address such as 127.0.0.1:8791, because requests are not \
                authenticated"
            .into()),
    }
}
