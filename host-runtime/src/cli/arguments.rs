//! The command line's arguments and help texts.

use std::path::PathBuf;

use clap::{Arg, Args, Command, Parser, Subcommand};
use clap_complete::Shell;
use virt_usb_fleet::filter_file::FilterFile;
use virt_usb_fleet::scheduler::Scheduler;
use virt_usb_model::flavor::Tag;
use virt_usb_model::request_key::selector_names;
use virt_usb_model::{DeviceId, DeviceRequest, Flavor, ProductId, ProjectId, VendorId};

use crate::api::identity::Role;

/// Manage USB devices for libvirt guests: discover them, control access, show who holds them.
///
/// A flavor requests devices. The libvirt hook claims them when a guest starts and releases them
/// when it ends. This command shows and manages the inventory of this host.
///
/// First steps:
///   virt-usb discover                     find the devices and record them
///   virt-usb devices                      list them
///   virt-usb flavor set erp '{"usb_devices":[{"vendor_id":"0529","product_id":"0001"}]}'
///   virt-usb events                       show the audit trail
#[derive(Debug, Parser)]
#[command(
    name = "virt-usb",
    version,
    verbatim_doc_comment,
    subcommand_required = true,
    arg_required_else_help = true
)]
pub struct Arguments {
    /// Configuration file [default: /etc/virt-usb/config.toml, if it exists]
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

/// Options for using another host's API instead of this host's inventory.
#[derive(Debug, Args)]
pub(super) struct Api {
    /// Use the API at this address instead of this host's inventory; works with hosts, devices,
    /// claims, events, flavor, grant, attach, detach, enable, disable, forget, quarantine,
    /// tag, untag, owner
    #[arg(long, global = true, value_name = "URL", env = "VIRT_USB_URL", hide_env_values = true)]
    pub(super) url: Option<String>,
    /// With --url: file that holds the API token
    #[arg(
        long,
        global = true,
        value_name = "FILE",
        env = "VIRT_USB_TOKEN_FILE",
        hide_env_values = true
    )]
    pub(super) token_file: Option<PathBuf>,
    /// With --url: trust the certificate authorities in this PEM file instead of the system's
    #[arg(
        long,
        global = true,
        value_name = "FILE",
        env = "VIRT_USB_CACERT",
        hide_env_values = true
    )]
    pub(super) cacert: Option<PathBuf>,
}

/// The options of [`Api`] for a command that works only on the host itself: not in its help, and
/// accepted so that the error can say so.
fn hidden_api_options() -> Vec<Arg> {
    let command = Api::augment_args(Command::new("hidden"));
    command.get_arguments().map(|option| option.clone().hide(true)).collect()
}

#[derive(Debug, Subcommand)]
pub(super) enum Verb {
    /// Find this host's USB devices and record them in the inventory
    #[command(args = hidden_api_options())]
    Discover(Discover),
    /// List the devices in the inventory
    Devices {
        /// Include unplugged devices
        #[arg(long)]
        all: bool,
    },
    /// Show which instance holds which device, or release the devices of an instance
    Claims {
        #[command(subcommand)]
        verb: Option<ClaimsVerb>,
    },
    /// Show the audit trail: which instance got which device, when and why
    Events(Events),
    /// Watch devices, claims and events as they change
    ///
    /// On a terminal, shows a screen that refreshes itself. Arrows, PgUp, PgDn, Home and End
    /// scroll; q quits. If the output is not a terminal, or with --lines, prints one line per
    /// event. With --json, prints one JSON object per event.
    #[command(args = hidden_api_options())]
    Watch(Watch),
    /// Manage stored flavors, which domains refer to by name
    Flavor {
        #[command(subcommand)]
        verb: FlavorVerb,
    },
    /// Manage grants, which make devices available to certain projects only
    ///
    /// In a fleet, grants are shared and apply on all of its hosts.
    Grant {
        #[command(subcommand)]
        verb: GrantVerb,
    },
    /// Serve scheduling queries: which hosts of the fleet can satisfy a flavor
    ///
    /// Follows the fleet named in the configuration. Serves requests over HTTP and on a unix
    /// socket until SIGTERM: POST /select, POST /explain, GET and DELETE /assumptions, GET
    /// /health, GET /metrics.
    #[command(args = hidden_api_options())]
    Scheduler(Scheduler),
    /// Join or leave the fleet; show its status
    #[command(args = hidden_api_options())]
    Fleet {
        #[command(subcommand)]
        verb: FleetVerb,
    },
    /// Show which hosts can satisfy a flavor, as a scheduler would see it
    #[command(args = hidden_api_options())]
    Filter(Filter),
    /// Start a guest with its USB devices attached from the beginning
    ///
    /// Does not change the definition of the domain. A saved guest is restored and gets its
    /// devices back.
    #[command(args = hidden_api_options())]
    Start {
        /// Name or UUID of the domain
        domain: String,
    },
    /// Attach a device to an instance, now if it is running and at each start
    Attach(Device),
    /// Detach a device from an instance, now if it is running and for future starts
    Detach(Device),
    /// Make a disabled device available again
    Enable {
        /// Device: an id, VENDOR:PRODUCT, or JSON as in a flavor
        #[arg(value_name = "DEVICE", value_parser = selector)]
        device: DeviceRequest,
    },
    /// Make a device unavailable; an instance that holds it keeps it until release
    Disable {
        /// Device: an id, VENDOR:PRODUCT, or JSON as in a flavor
        #[arg(value_name = "DEVICE", value_parser = selector)]
        device: DeviceRequest,
        /// Reason, shown with the device
        #[arg(long, value_name = "TEXT")]
        reason: Option<String>,
    },
    /// Remove an unplugged device from the inventory; if it returns, it gets a new id
    Forget {
        /// Device: an id, VENDOR:PRODUCT, or JSON as in a flavor
        #[arg(value_name = "DEVICE", value_parser = selector)]
        device: DeviceRequest,
    },
    /// Show or clear quarantined devices (one-time use, or connected and disconnected too often)
    Quarantine {
        #[command(subcommand)]
        verb: Option<QuarantineVerb>,
    },
    /// Add tags to a device, which flavors can select it by
    Tag(Tags),
    /// Remove tags that were added with 'virt-usb tag'
    Untag(Tags),
    /// Set the owner project of an instance that has no nova:owner
    ///
    /// Members of the owner project may attach devices to the instance.
    Owner {
        #[command(subcommand)]
        verb: Option<OwnerVerb>,
    },
    /// Manage API tokens
    #[command(args = hidden_api_options())]
    Token {
        #[command(subcommand)]
        verb: TokenVerb,
    },
    /// Show how the whitelist applies to the devices of this host
    #[command(args = hidden_api_options())]
    Whitelist {
        #[command(subcommand)]
        verb: WhitelistVerb,
    },
    /// List the hosts in the inventory
    Hosts {
        /// Print host documents, one per line: the input of `virt-usb filter --hosts`
        #[arg(long)]
        documents: bool,
    },
    /// Check this host and show how to fix problems
    ///
    /// Changes nothing. Exit status for monitoring: 0 no problems, 1 a warning, 2 something is
    /// broken.
    #[command(args = hidden_api_options())]
    Doctor {
        /// Include checks that pass
        #[arg(long)]
        all: bool,
        /// Directory of libvirt's hooks
        #[arg(long, value_name = "DIR", default_value = "/etc/libvirt/hooks")]
        hooks: PathBuf,
        /// Directory of the PID files of libvirt's daemons
        #[arg(long, value_name = "DIR", default_value = "/run")]
        run: PathBuf,
    },
    /// Check, back up, restore or rebuild the inventory
    #[command(args = hidden_api_options())]
    Store {
        #[command(subcommand)]
        verb: StoreVerb,
    },
    /// Print a completion script: virt-usb completions bash > /etc/bash_completion.d/virt-usb
    #[command(args = hidden_api_options())]
    Completions {
        /// Shell to generate completions for
        shell: Shell,
    },
    /// Write man pages and completion scripts, for packaging
    #[command(hide = true)]
    Manual {
        /// Directory to write to
        dir: PathBuf,
        /// Date of the man pages
        #[arg(long, value_name = "YYYY-MM-DD")]
        date: String,
    },
}

#[derive(Debug, Args)]
pub(super) struct Discover {
    /// Read simulated devices from this TOML file instead of libusb
    #[arg(long, value_name = "FILE")]
    pub(super) sim: Option<PathBuf>,
    /// With --sim: write a sysfs tree of the simulated devices here; set sysfs_root in the
    /// configuration to this directory
    #[arg(long, value_name = "DIR", requires = "sim")]
    pub(super) sysfs_out: Option<PathBuf>,
    /// Show the devices without recording them
    #[arg(long)]
    pub(super) dry_run: bool,
}

#[derive(Debug, Subcommand)]
pub(super) enum ClaimsVerb {
    /// Show all claims
    List,
    /// Release all claims and assignments of an instance (recorded in the audit trail)
    #[command(args = hidden_api_options())]
    Release {
        /// UUID of the instance or name of its domain
        instance: String,
        /// Confirm the release even if the guest may still be using the devices
        #[arg(long)]
        force: bool,
    },
}

#[derive(Debug, Subcommand)]
pub(super) enum QuarantineVerb {
    /// List quarantined devices
    List,
    /// Make an inspected device available again
    Clear {
        /// Device: an id, VENDOR:PRODUCT, or JSON as in a flavor
        #[arg(value_name = "DEVICE", value_parser = selector)]
        device: DeviceRequest,
    },
}

#[derive(Debug, Subcommand)]
pub(super) enum OwnerVerb {
    /// List the owners that were set here
    List,
    /// Set the owner project
    Set {
        /// Name or UUID of the domain
        domain: String,
        /// Id of the owner project
        #[arg(value_name = "PROJECT")]
        project: ProjectId,
    },
    /// Remove the owner that was set here
    Clear {
        /// Name or UUID of the domain
        domain: String,
    },
}

#[derive(Debug, Subcommand)]
pub(super) enum FleetVerb {
    /// Add this host to the fleet
    ///
    /// Gives the host a number in the fleet, and its devices new ids that begin with that number.
    /// Fails while an instance holds a device of this host.
    Join(Credentials),
    /// Remove a host from the fleet; its devices keep their ids
    Leave {
        /// Remove this host, which no longer exists, instead of the local one
        #[arg(long, value_name = "NAME")]
        host: Option<String>,
        #[command(flatten)]
        credentials: Credentials,
    },
    /// Show the status of etcd, of this host and of the other hosts
    ///
    /// Exit status: 0 if every endpoint responds, otherwise 1.
    Status,
    /// Simulate a fleet on this machine against the configured etcd, and check its invariants
    ///
    /// Simulates devices that are plugged in and out, guests that start where the filter places
    /// them, and hosts that fail and return. All keys are below a prefix of their own, which is
    /// removed at the end. Exit status: 0 if all invariants held, otherwise 1.
    Simulate(Simulate),
}

#[derive(Debug, Args)]
pub(super) struct Simulate {
    /// Number of hosts
    #[arg(
        long,
        default_value_t = 50,
        value_name = "N",
        value_parser = clap::value_parser!(u32).range(1..=10_000)
    )]
    pub(super) hosts: u32,
    /// Number of devices per host; three in four are plugged in at the start
    #[arg(
        long,
        default_value_t = 20,
        value_name = "M",
        value_parser = clap::value_parser!(u32).range(1..=4000)
    )]
    pub(super) devices: u32,
    /// Number of changes per second, over all hosts
    #[arg(
        long,
        default_value_t = 50,
        value_name = "R",
        value_parser = clap::value_parser!(u32).range(1..=10_000)
    )]
    pub(super) churn: u32,
    /// Duration in seconds
    #[arg(
        long,
        default_value_t = 10,
        value_name = "SECONDS",
        value_parser = clap::value_parser!(u64).range(1..=86400)
    )]
    pub(super) time: u64,
    /// Seed of the random events; the timing still depends on the machine
    #[arg(long, default_value_t = 1)]
    pub(super) seed: u64,
    #[command(flatten)]
    pub(super) component: FilterFile,
}

/// Credentials for etcd.
#[derive(Debug, Args)]
pub(super) struct Credentials {
    /// Log in to etcd as this user, who may write all keys of the fleet, instead of the configured
    /// user
    #[arg(long, value_name = "NAME", requires = "password_file")]
    pub(super) user: Option<String>,
    /// With --user: file whose first line is the password
    #[arg(long, value_name = "FILE", requires = "user")]
    pub(super) password_file: Option<PathBuf>,
}

#[derive(Debug, Subcommand)]
pub(super) enum TokenVerb {
    /// Create a token and print it; it cannot be shown again
    ///
    /// Only the token goes to stdout, so 'token add NAME --project ID > FILE' writes a file for
    /// --token-file.
    Add(NewToken),
    /// List the tokens and their projects
    List,
    /// Revoke a token immediately
    Remove {
        /// Name of the token
        name: String,
    },
}

#[derive(Debug, Args)]
pub(super) struct NewToken {
    /// Name of the token, shown in the audit trail and the log
    pub(super) name: String,
    /// Project that the token belongs to
    #[arg(long, value_name = "ID")]
    pub(super) project: ProjectId,
    /// Role of the token: reader (read only), member (also attach and detach), admin (everything,
    /// in all projects)
    #[arg(long, default_value = "member", value_parser = role)]
    pub(super) role: Role,
    /// Expire after N days [default: never]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=3650))]
    pub(super) days: Option<u32>,
}

fn role(text: &str) -> Result<Role, String> {
    text.parse()
}

#[derive(Debug, Args)]
pub(super) struct Tags {
    /// Device: an id, VENDOR:PRODUCT, or JSON as in a flavor
    #[arg(value_name = "DEVICE", value_parser = selector)]
    pub(super) device: DeviceRequest,
    /// Tag of 1 to 64 letters, digits and -_.:/
    #[arg(required = true, value_name = "TAG")]
    pub(super) tags: Vec<Tag>,
}

#[derive(Debug, Args)]
pub(super) struct Events {
    /// Show only events of this instance: the name or UUID of its domain
    #[arg(long)]
    pub(super) instance: Option<String>,
    /// Show only events of this device: an id, VENDOR:PRODUCT, or JSON as in a flavor
    #[arg(long, value_name = "DEVICE", value_parser = selector)]
    pub(super) device: Option<DeviceRequest>,
    /// Show the newest N events; 0 shows all
    #[arg(long, default_value_t = 50)]
    pub(super) limit: u32,
}

#[derive(Debug, Args)]
pub(super) struct Watch {
    /// Print one line per event, even on a terminal
    #[arg(long)]
    pub(super) lines: bool,
    /// With one line per event: begin with the newest N past events
    #[arg(long, default_value_t = 10, value_name = "N")]
    pub(super) last: u32,
}

fn flavor_set_help() -> String {
    format!(
        "Store a flavor\n\nDEFINITION is \
         {{\"usb_devices\":[...],\"usb_redirection_devices\":[...]}}. An entry of usb_devices has \
         one or more of {}, and count (default 1). An entry of usb_redirection_devices is \
         {{\"bus\":\"usb\",\"type\":\"spicevmc\"}}.",
        selector_names().join(", ")
    )
}

fn grant_set_help() -> String {
    format!(
        "Store a grant; instances keep the devices that they hold\n\nDEFINITION is \
         {{\"usb_devices\":[...],\"projects\":[...]}}. An entry of usb_devices has one or more of \
         {}. A device that matches an entry is available only to these projects, to the projects \
         of other grants that match it, and to the projects of its whitelist rule. Devices \
         without a grant or a rule with projects are available to all projects.",
        selector_names().join(", ")
    )
}

#[derive(Debug, Subcommand)]
pub(super) enum FlavorVerb {
    /// List all flavors
    List,
    /// Show one flavor
    Show {
        /// Name of the flavor
        name: String,
    },
    /// Store a flavor
    #[command(long_about = flavor_set_help())]
    Set {
        /// Name of the flavor, as in Nova or in the domain's metadata
        name: String,
        /// Requested devices as JSON; - reads from stdin
        definition: String,
    },
    /// Remove a flavor; running guests keep their devices
    Remove {
        /// Name of the flavor
        name: String,
    },
}

#[derive(Debug, Subcommand)]
pub(super) enum GrantVerb {
    /// List all grants
    List,
    /// Show one grant
    Show {
        /// Name of the grant
        name: String,
    },
    /// Store a grant; instances keep the devices that they hold
    #[command(long_about = grant_set_help())]
    Set {
        /// Name of the grant
        name: String,
        /// Devices and projects as JSON; - reads from stdin
        definition: String,
    },
    /// Remove a grant; instances keep the devices that they hold
    Remove {
        /// Name of the grant
        name: String,
    },
}

/// Exit status: 0 a host can satisfy the flavor, 3 no host can, 1 the query failed.
#[derive(Debug, Args)]
#[command(
    args_conflicts_with_subcommands = true,
    subcommand_negates_reqs = true,
    verbatim_doc_comment
)]
pub(super) struct Filter {
    #[command(subcommand)]
    pub(super) verb: Option<FilterVerb>,
    /// Flavor: the name of a stored flavor, or JSON such as
    /// {"usb_devices":[{"vendor_id":"0529"}]}
    #[arg(long, required = true, value_name = "NAME|JSON")]
    pub(super) flavor: Option<String>,
    /// File with host documents, - for stdin [default: this host, from its inventory]
    #[arg(long, value_name = "FILE")]
    pub(super) hosts: Option<PathBuf>,
    /// Project that requests the devices [default: only devices available to all projects]
    #[arg(long, value_name = "ID")]
    pub(super) project: Option<ProjectId>,
    /// Maximum number of hosts to show, best first
    #[arg(long, default_value_t = 20, value_name = "N")]
    pub(super) limit: u32,
    /// Show for each other host why it was rejected
    #[arg(long)]
    pub(super) explain: bool,
    #[command(flatten)]
    pub(super) component: FilterFile,
}

#[derive(Debug, Args)]
pub(super) struct Device {
    /// Instance: the name or UUID of its domain
    pub(super) instance: String,
    /// Device: an id, VENDOR:PRODUCT, or JSON as in a flavor, such as {"serial":"HL-0001"}
    #[arg(value_name = "DEVICE|SELECTOR", value_parser = selector)]
    pub(super) device: DeviceRequest,
}

/// Parses a device's id, `VENDOR:PRODUCT`, or a request as written in a flavor.
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
    /// Generate a fleet, feed it to the filter and measure the response times
    Bench {
        /// Number of hosts
        #[arg(
            long,
            default_value_t = 50_000,
            value_parser = clap::value_parser!(u32).range(1..=1_000_000)
        )]
        hosts: u32,
        /// Number of devices on each host
        #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u32).range(0..=1_000))]
        devices: u32,
        #[command(flatten)]
        component: FilterFile,
    },
    /// Compile the filter to machine code, which this version of virt-usb loads a hundred times
    /// faster
    Precompile {
        /// File to write
        file: PathBuf,
        #[command(flatten)]
        component: FilterFile,
    },
}

#[derive(Debug, Subcommand)]
pub(super) enum WhitelistVerb {
    /// Show for each device whether it is offered, to which projects, and by which rule
    Check {
        /// Read simulated devices from this TOML file instead of libusb
        #[arg(long, value_name = "FILE")]
        sim: Option<PathBuf>,
    },
}

#[derive(Debug, Subcommand)]
pub(super) enum StoreVerb {
    /// Check the inventory for damage and inconsistencies
    Check,
    /// Write a copy of the inventory; safe while hooks run
    Backup {
        /// File to write, which must not exist
        file: PathBuf,
    },
    /// Restore the inventory from a backup; the current inventory is kept beside it
    ///
    /// Safe while the agent and hooks run. Devices that were found since the backup keep their
    /// ids, and current claims stay unchanged.
    Restore {
        /// Backup to restore
        file: PathBuf,
        #[command(flatten)]
        options: Recover,
    },
    /// Rebuild the inventory from its readable rows, the plugged-in devices and the running guests
    ///
    /// The damaged inventory is kept beside it. A device whose row is lost gets an id that no
    /// device had before.
    Rebuild {
        /// Rebuild even if the inventory is sound, or belongs to another version or program
        #[arg(long)]
        force: bool,
        #[command(flatten)]
        options: Recover,
    },
}

#[derive(Debug, Args)]
pub(super) struct Recover {
    /// Do not query libvirt; a device in use by a guest may be shown as available until the agent
    /// adopts it
    #[arg(long)]
    pub(super) without_guests: bool,
    /// Read simulated devices from this TOML file instead of libusb
    #[arg(long, value_name = "FILE")]
    pub(super) sim: Option<PathBuf>,
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::{Arguments, Command, selector, selector_names};

    /// Adds the names of the subcommands whose help does not show `--url`.
    fn add_local(command: &Command, path: &str, found: &mut Vec<String>) {
        for sub in command.get_subcommands().filter(|sub| sub.get_name() != "help") {
            let name = format!("{path}{}", sub.get_name());
            if sub.get_arguments().any(|a| a.get_id() == "url" && a.is_hide_set()) {
                found.push(name.clone());
            }
            add_local(sub, &format!("{name} "), found);
        }
    }

    #[test]
    fn help_names_all_keys_and_all_commands_of_an_api() {
        let mut command = Arguments::command();
        command.build();
        for noun in ["flavor", "grant"] {
            let set = command.find_subcommand(noun).unwrap().find_subcommand("set").unwrap();
            let help = set.get_long_about().unwrap().to_string();
            for key in selector_names() {
                assert!(help.contains(&format!(" {key}")), "{noun}: {key}: {help}");
            }
        }
        let url = command.get_arguments().find(|a| a.get_id() == "url").unwrap();
        let help = url.get_help().unwrap().to_string();
        let (_, named) = help.split_once("works with ").unwrap();
        let named: Vec<&str> = named.split(", ").collect();
        let mut local = Vec::new();
        add_local(&command, "", &mut local);
        let is_remote = |name: &&str| {
            *name != "help" && *name != "manual" && !local.iter().any(|known| known == name)
        };
        let remote = command.get_subcommands().map(Command::get_name).filter(is_remote);
        for name in remote {
            assert!(named.contains(&name), "{name}: {help}");
        }
    }

    #[test]
    fn help_shows_no_value_of_the_environment() {
        fn check(command: &Command) {
            for option in command.get_arguments().filter(|option| option.get_env().is_some()) {
                assert!(option.is_hide_env_values_set(), "{}: {option}", command.get_name());
            }
            command.get_subcommands().for_each(check);
        }
        check(&Arguments::command());
    }

    #[test]
    fn help_shows_the_options_of_an_api_where_they_are_accepted() {
        let mut command = Arguments::command();
        command.build();
        let mut local = Vec::new();
        add_local(&command, "", &mut local);
        local.sort_unstable();
        let expected = [
            "claims release",
            "completions",
            "discover",
            "doctor",
            "filter",
            "filter bench",
            "filter precompile",
            "fleet",
            "fleet join",
            "fleet leave",
            "fleet simulate",
            "fleet status",
            "scheduler",
            "start",
            "store",
            "store backup",
            "store check",
            "store rebuild",
            "store restore",
            "token",
            "token add",
            "token list",
            "token remove",
            "watch",
            "whitelist",
            "whitelist check",
        ];
        assert_eq!(local, expected);
    }

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
