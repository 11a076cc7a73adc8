//! Command-line arguments of `virt-usbd`.

use std::path::PathBuf;

use clap::Parser;

/// The virt-usb agent: watches this host's USB devices and guests, and attaches claimed devices.
///
/// The agent runs in the foreground. As a systemd service it logs to the journal, otherwise to
/// stderr. SIGHUP reloads the configuration. SIGTERM stops the agent; guests keep their devices.
#[derive(Debug, Parser)]
#[command(version, name = "virt-usbd")]
pub struct Arguments {
    /// Configuration file [default: /etc/virt-usb/config.toml, if it exists]
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Simulate the devices and domains in this file; the agent changes nothing on this machine
    /// except the state_dir of --config
    #[arg(long, value_name = "FILE")]
    pub sim: Option<PathBuf>,
    /// Log more details
    #[arg(long, short)]
    pub verbose: bool,
}
