//! What can be typed.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};
use clap_complete::Shell;

/// USB devices for libvirt guests: find them, say who may have them, see who has them.
///
/// A flavor asks for devices; libvirt's hook claims them when a guest starts and gives them
/// back when it ends. This command shows and manages the inventory of this host.
///
/// First steps:
///   virt-usb discover                     find the devices and record them
///   virt-usb devices                      see them
///   virt-usb flavor set erp '{"usb_devices":[{"vendor_id":"0529","product_id":"0001"}]}'
///   virt-usb events                       see who got what, when and why
#[derive(Debug, Parser)]
#[command(
    name = "virt-usb",
    version,
    verbatim_doc_comment,
    subcommand_required = true,
    arg_required_else_help = true
)]
pub struct Arguments {
    /// The configuration; without this option /etc/virt-usb/config.toml, if it is there
    #[arg(long, global = true, value_name = "FILE")]
    pub(super) config: Option<PathBuf>,
    /// Print JSON instead of tables
    #[arg(long, global = true)]
    pub(super) json: bool,
    #[command(subcommand)]
    pub(super) verb: Verb,
}

#[derive(Debug, Subcommand)]
pub(super) enum Verb {
    /// Find this host's USB devices and record them in the inventory
    Discover(Discover),
    /// Show the devices of the inventory
    Devices {
        /// Also those that were unplugged
        #[arg(long)]
        all: bool,
    },
    /// Show which instance holds which device, or free what one holds
    Claims {
        #[command(subcommand)]
        verb: Option<ClaimsVerb>,
    },
    /// Show the audit trail: who got what, when and why
    Events(Events),
    /// Manage stored flavors, which domains name
    Flavor {
        #[command(subcommand)]
        verb: FlavorVerb,
    },
    /// Explain the whitelist
    Whitelist {
        #[command(subcommand)]
        verb: WhitelistVerb,
    },
    /// Show the hosts of the inventory
    Hosts,
    /// Look after the inventory's file
    Store {
        #[command(subcommand)]
        verb: StoreVerb,
    },
    /// Print a completion script: virt-usb completions bash > /etc/bash_completion.d/virt-usb
    Completions {
        /// For which shell
        shell: Shell,
    },
}

#[derive(Debug, Args)]
pub(super) struct Discover {
    /// Take the devices from this TOML file instead of libusb
    #[arg(long, value_name = "FILE")]
    pub(super) sim: Option<PathBuf>,
    /// With --sim: write the simulated devices' sysfs tree here, for a configuration whose sysfs_root it is
    #[arg(long, value_name = "DIR", requires = "sim")]
    pub(super) sysfs_out: Option<PathBuf>,
    /// Show what is found without recording it
    #[arg(long)]
    pub(super) dry_run: bool,
}

#[derive(Debug, Subcommand)]
pub(super) enum ClaimsVerb {
    /// Show all claims
    List,
    /// Free everything that an instance holds, its assignments too (recorded in the audit trail)
    Release {
        /// The instance's UUID, or its domain's name
        instance: String,
        /// Yes, even though the guest may still run with the devices
        #[arg(long)]
        force: bool,
    },
}

#[derive(Debug, Args)]
pub(super) struct Events {
    /// Only of this instance (UUID)
    #[arg(long)]
    pub(super) instance: Option<String>,
    /// Only of this device (id)
    #[arg(long)]
    pub(super) device: Option<String>,
    /// The newest so many; 0 for all
    #[arg(long, default_value_t = 50)]
    pub(super) limit: u32,
}

#[derive(Debug, Subcommand)]
pub(super) enum FlavorVerb {
    /// Show all flavors
    List,
    /// Show one flavor
    Show {
        /// Its name
        name: String,
    },
    /// Store a flavor
    ///
    /// DEFINITION is {"usb_devices":[...],"usb_redirection_devices":[...]}. An entry of usb_devices names one or more of id, vendor_id,
    /// product_id, serial, port, class, tags, and count (1 when absent); an entry of usb_redirection_devices is {"bus":"usb","type":"spicevmc"}.
    Set {
        /// Its name, as Nova or the domain's metadata spells it
        name: String,
        /// What it asks for, as JSON; - reads it from stdin
        definition: String,
    },
    /// Forget a flavor; guests that run keep what they have
    Remove {
        /// Its name
        name: String,
    },
}

#[derive(Debug, Subcommand)]
pub(super) enum WhitelistVerb {
    /// Say for each device that is plugged in whether it is offered, to whom, and by which rule
    Check {
        /// Take the devices from this TOML file instead of libusb
        #[arg(long, value_name = "FILE")]
        sim: Option<PathBuf>,
    },
}

#[derive(Debug, Subcommand)]
pub(super) enum StoreVerb {
    /// Look for damage and contradictions
    Check,
    /// Write a copy of the inventory; hooks may run meanwhile
    Backup {
        /// The copy, which must not exist yet
        file: PathBuf,
    },
}
