//! What can be typed.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};
use clap_complete::Shell;
use virt_usb_fleet::filter_file::FilterFile;
use virt_usb_fleet::scheduler::Scheduler;
use virt_usb_model::flavor::Tag;
use virt_usb_model::{DeviceId, DeviceRequest, Flavor, ProductId, ProjectId, VendorId};

use crate::api::identity::Role;

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
    #[command(flatten)]
    pub(super) api: Api,
    #[command(subcommand)]
    pub(super) verb: Verb,
}

/// Another host's API in the place of this host's inventory.
#[derive(Debug, Args)]
pub(super) struct Api {
    /// Ask and tell the API at this address instead of this host's inventory: hosts, devices,
    /// claims, events, flavor, grant, attach, detach, enable, disable, quarantine, tag, untag,
    /// owner
    #[arg(long, global = true, value_name = "URL", env = "VIRT_USB_URL", hide_env_values = true)]
    pub(super) url: Option<String>,
    /// With --url: the file that holds the token
    #[arg(
        long,
        global = true,
        value_name = "FILE",
        env = "VIRT_USB_TOKEN_FILE",
        hide_env_values = true
    )]
    pub(super) token_file: Option<PathBuf>,
    /// With --url: trust certificates of these authorities (PEM) instead of this machine's
    #[arg(
        long,
        global = true,
        value_name = "FILE",
        env = "VIRT_USB_CACERT",
        hide_env_values = true
    )]
    pub(super) cacert: Option<PathBuf>,
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
    /// Watch devices, claims and events as they change
    ///
    /// On a terminal a screen that keeps itself up to date: arrows, PgUp, PgDn, Home and End
    /// scroll, q ends it. Elsewhere, or with --lines, an event a line as it happens; with --json
    /// each is a JSON object.
    Watch(Watch),
    /// Manage stored flavors, which domains name
    Flavor {
        #[command(subcommand)]
        verb: FlavorVerb,
    },
    /// Manage grants: which projects may have which devices
    ///
    /// In a fleet they are the fleet's, and count on all of its hosts.
    Grant {
        #[command(subcommand)]
        verb: GrantVerb,
    },
    /// Answer schedulers which hosts can serve, from what the fleet publishes
    ///
    /// Follows the fleet of the configuration, and answers over HTTP and on a unix socket until
    /// SIGTERM: POST /select, POST /explain, GET and DELETE /assumptions, GET /health, GET
    /// /metrics.
    Scheduler(Scheduler),
    /// Share the inventory with other hosts, through etcd
    Fleet {
        #[command(subcommand)]
        verb: FleetVerb,
    },
    /// Say which hosts can serve a flavor, as a scheduler would be told
    Filter(Filter),
    /// Start a guest that does not run, with its USB devices in it from the beginning
    ///
    /// The definition of the domain stays as it is. A guest that was saved is restored, and gets
    /// its devices back.
    Start {
        /// The domain's name or UUID
        domain: String,
    },
    /// Give a guest a device, at once where it runs and at each start from now on
    Attach(Device),
    /// Take a device out of a guest that runs, and out of what it is given at its starts
    Detach(Device),
    /// Offer a device again that was disabled
    Enable {
        /// The device's id
        #[arg(value_name = "DEVICE")]
        device: DeviceId,
    },
    /// Do not offer a device any more; who holds it keeps it until it is given back
    Disable {
        /// The device's id
        #[arg(value_name = "DEVICE")]
        device: DeviceId,
        /// Why, for whoever asks later
        #[arg(long, value_name = "TEXT")]
        reason: Option<String>,
    },
    /// Forget a device that is not plugged in: if it comes back it is another one, with another id
    Forget {
        /// The device's id
        #[arg(value_name = "DEVICE")]
        device: DeviceId,
    },
    /// Show the devices that are set aside after a use, or because they come and go too often
    Quarantine {
        #[command(subcommand)]
        verb: Option<QuarantineVerb>,
    },
    /// Give a device tags, by which flavors may ask for it, beside those of the whitelist's rules
    Tag(Tags),
    /// Take tags away that were given with 'virt-usb tag'
    Untag(Tags),
    /// Say whose a guest is, where its domain does not say so: that project's members may then give
    /// it devices
    Owner {
        #[command(subcommand)]
        verb: Option<OwnerVerb>,
    },
    /// Say who may use the API
    Token {
        #[command(subcommand)]
        verb: TokenVerb,
    },
    /// Explain the whitelist
    Whitelist {
        #[command(subcommand)]
        verb: WhitelistVerb,
    },
    /// Show the hosts of the inventory
    Hosts {
        /// Print their host documents, a line each: what `virt-usb filter --hosts` and every filter
        /// is fed with
        #[arg(long)]
        documents: bool,
    },
    /// Check this host, and say how to fix what is wrong
    ///
    /// Changes nothing. Exit status for monitoring: 0 no problems, 1 something does not work for
    /// somebody, 2 guests do not get their devices.
    Doctor {
        /// Show checks without problems too
        #[arg(long)]
        all: bool,
        /// Where libvirt's hooks are
        #[arg(long, value_name = "DIR", default_value = "/etc/libvirt/hooks")]
        hooks: PathBuf,
        /// Where libvirt's daemons leave their process ids
        #[arg(long, value_name = "DIR", default_value = "/run")]
        run: PathBuf,
    },
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
    /// Write the manual's pages and the completion scripts, for whoever makes a package
    #[command(hide = true)]
    Manual {
        /// The folder to write into
        dir: PathBuf,
        /// The pages' date
        #[arg(long, value_name = "YYYY-MM-DD")]
        date: String,
    },
}

#[derive(Debug, Args)]
pub(super) struct Discover {
    /// Take the devices from this TOML file instead of libusb
    #[arg(long, value_name = "FILE")]
    pub(super) sim: Option<PathBuf>,
    /// With --sim: write the simulated devices' sysfs tree here, for a configuration whose
    /// sysfs_root it is
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

#[derive(Debug, Subcommand)]
pub(super) enum QuarantineVerb {
    /// Show them
    List,
    /// You have looked at the device: offer it again
    Clear {
        /// The device's id
        #[arg(value_name = "DEVICE")]
        device: DeviceId,
    },
}

#[derive(Debug, Subcommand)]
pub(super) enum OwnerVerb {
    /// Show what was said
    List,
    /// Say whose it is
    Set {
        /// The domain's name or UUID
        domain: String,
        /// The project
        #[arg(value_name = "PROJECT")]
        project: ProjectId,
    },
    /// Take back what was said
    Clear {
        /// The domain's name or UUID
        domain: String,
    },
}

#[derive(Debug, Subcommand)]
pub(super) enum FleetVerb {
    /// Give this host its number in the fleet, and its devices the ids that come with it; not while
    /// any is held
    Join(Credentials),
    /// Take a host out of the fleet; its devices keep their ids
    Leave {
        /// Another host than this one: one that is gone for good
        #[arg(long, value_name = "NAME")]
        host: Option<String>,
        #[command(flatten)]
        credentials: Credentials,
    },
    /// Show how it is with etcd, this host and the others
    ///
    /// Exit status: 0 when every endpoint answers, else 1.
    Status,
    /// Run a made fleet on this machine against the configuration's etcd, and check what must hold
    ///
    /// Devices come and go, guests start where the filter says and stop, hosts die and come back.
    /// All of it stands in a folder of its own below the prefix, which is removed at the end. Exit
    /// status: 0 when all held that must, else 1.
    Simulate(Simulate),
}

#[derive(Debug, Args)]
pub(super) struct Simulate {
    /// So many hosts
    #[arg(long, default_value_t = 50, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub(super) hosts: u32,
    /// So many devices a host, of which three in four are plugged in at first
    #[arg(long, default_value_t = 20, value_name = "M", value_parser = clap::value_parser!(u32).range(1..=4000))]
    pub(super) devices: u32,
    /// So many changes a second, of all hosts together
    #[arg(long, default_value_t = 50, value_name = "R", value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub(super) churn: u32,
    /// For so many seconds
    #[arg(long, default_value_t = 10, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..=86400))]
    pub(super) time: u64,
    /// The same seed makes the same things happen, as far as the machine's own timing lets them
    #[arg(long, default_value_t = 1)]
    pub(super) seed: u64,
    #[command(flatten)]
    pub(super) component: FilterFile,
}

/// As whom etcd is asked.
#[derive(Debug, Args)]
pub(super) struct Credentials {
    /// Ask etcd as this user, who may write all of the fleet's keys, instead of the configuration's
    #[arg(long, value_name = "NAME", requires = "password_file")]
    pub(super) user: Option<String>,
    /// With --user: the file whose first line is the password
    #[arg(long, value_name = "FILE", requires = "user")]
    pub(super) password_file: Option<PathBuf>,
}

#[derive(Debug, Subcommand)]
pub(super) enum TokenVerb {
    /// Make a token and show it, this once
    Add(NewToken),
    /// Show whose tokens there are
    List,
    /// End a token, at once
    Remove {
        /// Its name
        name: String,
    },
}

#[derive(Debug, Args)]
pub(super) struct NewToken {
    /// Whose it is, for the audit and the log
    pub(super) name: String,
    /// The project that it acts for
    #[arg(long, value_name = "ID")]
    pub(super) project: ProjectId,
    /// What it may: look (reader), attach and detach as well (member), all of every project (admin)
    #[arg(long, default_value = "member", value_parser = role)]
    pub(super) role: Role,
    /// It counts for so many days; else until it is removed
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=3650))]
    pub(super) days: Option<u32>,
}

fn role(text: &str) -> Result<Role, String> {
    text.parse()
}

#[derive(Debug, Args)]
pub(super) struct Tags {
    /// The device's id
    #[arg(value_name = "DEVICE")]
    pub(super) device: DeviceId,
    /// 1 to 64 letters, digits and -_.:/
    #[arg(required = true, value_name = "TAG")]
    pub(super) tags: Vec<Tag>,
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

#[derive(Debug, Args)]
pub(super) struct Watch {
    /// An event a line, on a terminal too
    #[arg(long)]
    pub(super) lines: bool,
    /// Where events are lines: begin with the newest so many of those that were before
    #[arg(long, default_value_t = 10, value_name = "N")]
    pub(super) last: u32,
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
    /// DEFINITION is {"usb_devices":[...],"usb_redirection_devices":[...]}. An entry of usb_devices
    /// names one or more of id, vendor_id, product_id, serial, port, class, tags, and count (1 when
    /// absent); an entry of usb_redirection_devices is {"bus":"usb","type":"spicevmc"}.
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
pub(super) enum GrantVerb {
    /// Show all grants
    List,
    /// Show one grant
    Show {
        /// Its name
        name: String,
    },
    /// Store a grant; who holds a device keeps it
    ///
    /// DEFINITION is {"usb_devices":[...],"projects":[...]}. An entry of usb_devices names one or
    /// more of id, vendor_id, product_id, serial, port, class, tags. A device that one of them
    /// matches is for these projects, for those of other grants that match it and for those of its
    /// whitelist rule, and for nobody else. What no grant and no rule gives to certain projects is
    /// for every one.
    Set {
        /// Its name
        name: String,
        /// What is given to whom, as JSON; - reads it from stdin
        definition: String,
    },
    /// Forget a grant; who holds a device keeps it
    Remove {
        /// Its name
        name: String,
    },
}

/// Exit status: 0 a host can serve the flavor, 3 none can, 1 it could not be found out.
#[derive(Debug, Args)]
#[command(
    args_conflicts_with_subcommands = true,
    subcommand_negates_reqs = true,
    verbatim_doc_comment
)]
pub(super) struct Filter {
    #[command(subcommand)]
    pub(super) verb: Option<FilterVerb>,
    /// What is asked for: a stored flavor's name, or JSON such as
    /// {"usb_devices":[{"vendor_id":"0529"}]}
    #[arg(long, required = true, value_name = "NAME|JSON")]
    pub(super) flavor: Option<String>,
    /// Ask about the hosts whose documents are in this file, - for stdin; without it about this
    /// host, from its inventory
    #[arg(long, value_name = "FILE")]
    pub(super) hosts: Option<PathBuf>,
    /// The project that asks; without it only devices that are for every project count
    #[arg(long, value_name = "ID")]
    pub(super) project: Option<ProjectId>,
    /// Show the best so many
    #[arg(long, default_value_t = 20, value_name = "N")]
    pub(super) limit: u32,
    /// Say of every other host why not
    #[arg(long)]
    pub(super) explain: bool,
    #[command(flatten)]
    pub(super) component: FilterFile,
}

#[derive(Debug, Args)]
pub(super) struct Device {
    /// The instance: its domain's name or UUID
    pub(super) instance: String,
    /// The device: its id, VENDOR:PRODUCT, or JSON as in a flavor, such as {"serial":"HL-0001"}
    #[arg(value_name = "DEVICE|SELECTOR", value_parser = selector)]
    pub(super) device: DeviceRequest,
}

/// A device's id, `VENDOR:PRODUCT`, or a request as it stands in a flavor.
fn selector(text: &str) -> Result<DeviceRequest, String> {
    let kind = || {
        let (vendor, product) = text.split_once(':')?;
        Some((vendor.parse::<VendorId>().ok()?, product.parse::<ProductId>().ok()?))
    };
    let json = match (text.parse::<DeviceId>(), kind()) {
        (Ok(id), _) => format!(r#"[{{"id":{id}}}]"#),
        (_, Some((vendor, product))) => {
            format!(r#"[{{"vendor_id":"{vendor}","product_id":"{product}"}}]"#)
        }
        _ if text.trim_start().starts_with('{') => format!("[{text}]"),
        _ => {
            return Err("wanted a device's id, VENDOR:PRODUCT such as 0529:0001, or JSON such as \
            {\"serial\":\"HL-0001\"}"
                .into());
        }
    };
    let flavor = Flavor::parse_lists(Some(&json), None).map_err(|e| e.to_string())?;
    match <[DeviceRequest; 1]>::try_from(flavor.usb_devices) {
        Ok([request]) => Ok(request),
        Err(_) => Err("wanted one request".into()),
    }
}

#[derive(Debug, Subcommand)]
pub(super) enum FilterVerb {
    /// Make a fleet, feed it to the filter and measure the answers
    Bench {
        /// Hosts
        #[arg(long, default_value_t = 50_000, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
        hosts: u32,
        /// Devices on each host
        #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u32).range(0..=1_000))]
        devices: u32,
        #[command(flatten)]
        component: FilterFile,
    },
    /// Write the filter as machine code, which this version of virt-usb loads a hundred times
    /// faster
    Precompile {
        /// The file to write
        file: PathBuf,
        #[command(flatten)]
        component: FilterFile,
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
    /// Take a backup's content; the inventory that is there is kept beside it
    ///
    /// Hooks and agent may run meanwhile. Devices that were seen since the backup keep their ids,
    /// and who holds a device is what it is now.
    Restore {
        /// The backup
        file: PathBuf,
        #[command(flatten)]
        options: Recover,
    },
    /// Make the inventory anew: of what can still be read of it, of what is plugged in, and of what
    /// the guests that run have
    ///
    /// The damaged one is kept beside it. A device whose row is lost gets an id that no device had
    /// before.
    Rebuild {
        /// Even though it is sound, or another version's or program's
        #[arg(long)]
        force: bool,
        #[command(flatten)]
        options: Recover,
    },
}

#[derive(Debug, Args)]
pub(super) struct Recover {
    /// Without asking libvirt: a device that is in a guest may be shown free until the agent adopts
    /// it
    #[arg(long)]
    pub(super) without_guests: bool,
    /// Take the devices from this TOML file instead of libusb
    #[arg(long, value_name = "FILE")]
    pub(super) sim: Option<PathBuf>,
}

#[cfg(test)]
mod tests {
    use super::selector;

    #[test]
    fn a_device_is_named_in_three_ways() {
        let json = |text: &str| selector(text).map(|r| r.to_string());
        assert_eq!(json("5").unwrap(), r#"{"id":5}"#);
        assert_eq!(json("0529:0001").unwrap(), r#"{"vendor_id":"0529","product_id":"0001"}"#);
        assert_eq!(json(r#" {"serial":"A","count":2}"#).unwrap(), r#"{"serial":"A","count":2}"#);
        for wrong in ["", "0", "key", "{", r#"{"serial":"A"},{"serial":"B"}"#, "{}"] {
            assert!(json(wrong).is_err(), "{wrong}");
        }
    }
}
