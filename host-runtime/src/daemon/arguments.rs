//! What `virt-usbd` can be started with.

use std::path::PathBuf;

use clap::Parser;

/// The agent of virt-usb: watches this host's USB devices and guests, and gives each guest what is
/// claimed for it.
///
/// It runs in the foreground and logs to the journal where it is a service of systemd, else to
/// stderr. SIGHUP reads the configuration again; SIGTERM ends it, and guests keep what they have.
#[derive(Debug, Parser)]
#[command(version, name = "virt-usbd")]
pub struct Arguments {
    /// The configuration [default: /etc/virt-usb/config.toml, where it is there]
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Simulate the devices and domains of this file: of this machine nothing is touched but the
    /// state_dir of --config
    #[arg(long, value_name = "FILE")]
    pub sim: Option<PathBuf>,
    /// Say more
    #[arg(long, short)]
    pub verbose: bool,
}
