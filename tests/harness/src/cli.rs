//! The command line.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};
use virt_usb_harness::{Cycle, Expect, Expected, Initiator};

const LONG_ABOUT: &str = "\
Calls a libvirt hook exactly as libvirtd does, and simulates the life cycle of a guest.

The hook gets the domain's name, the operation and two more words as arguments, the domain XML on \
its standard input, an environment of a few variables, and / as its working directory. The \
harness reads both outputs until they are closed. It then does what libvirt would do with the \
answer, and reports the calls with their times, the XML as a diff, and the claims before and \
after.

The harness does not need libvirt or a running guest, and changes neither.";

const AFTER_HELP: &str = "\
Examples:
  Try a flavor on a domain, with devices from a file, nothing installed:
    hook-harness try erp.xml --sim key.toml --flavor \
    '{\"usb_devices\":[{\"vendor_id\":\"0529\",\"product_id\":\"0001\"}]}'
  Start and stop a domain with the hook beside this program and a configuration of your own:
    hook-harness --config my.toml start erp.xml
    hook-harness --config my.toml stop erp.xml
  Check that a second instance is refused:
    hook-harness --config my.toml --expect veto --expect-stderr 0529:0001 start crm.xml
  Call all hooks of this host:
    hook-harness --hooks-dir /etc/libvirt/hooks start erp.xml
  Run a scenario with JSON output:
    hook-harness --json scenario two-guests.toml

Exit status: 0 everything went as expected, 1 a result was unexpected, 2 the command line, a \
domain or a scenario is invalid,
3 a program could not be run.";

/// Calls a libvirt hook exactly as libvirtd does
#[derive(Debug, Parser)]
#[command(name = "hook-harness", version, long_about = LONG_ABOUT, after_help = AFTER_HELP)]
pub(crate) struct Cli {
    #[command(flatten)]
    pub(crate) common: Common,
    #[command(subcommand)]
    pub(crate) verb: Verb,
}

#[derive(Debug, Args)]
pub(crate) struct Common {
    /// The hook to call [default: virt-usb-hook beside this program]
    ///
    /// With --hooks-dir, the harness calls this hook as if it were installed in DIR/qemu.d under
    /// its own file name.
    #[arg(long, global = true, value_name = "PATH")]
    pub(crate) hook: Option<PathBuf>,
    /// Hooks laid out as in /etc/libvirt/hooks: DIR/qemu, then each executable in DIR/qemu.d
    #[arg(long, global = true, value_name = "DIR")]
    pub(crate) hooks_dir: Option<PathBuf>,
    /// The configuration for virt-usb, and for the hook of --hook
    ///
    /// Passes --config FILE to the hook before libvirt's four arguments. Hooks of --hooks-dir do
    /// not get this option and read /etc/virt-usb/config.toml, as always.
    #[arg(long, global = true, value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,
    /// The virt-usb program, used to list claims [default: beside this program]
    #[arg(long, global = true, value_name = "PATH")]
    pub(crate) virt_usb: Option<PathBuf>,
    /// Directory for the sysfs tree that a scenario's discover --sim writes; sysfs_root in the
    /// configuration must name it
    #[arg(long, global = true, value_name = "DIR", requires = "config")]
    pub(crate) sysfs_out: Option<PathBuf>,
    /// Simulated caller: libvirt discards the output of prepare, a filter caller starts it
    #[arg(long, global = true, value_enum, default_value_t = CallerArg::Libvirt)]
    pub(crate) caller: CallerArg,
    /// Timeout of a call in seconds (libvirt itself has no timeout)
    #[arg(
        long,
        global = true,
        value_name = "SECONDS",
        default_value = "30",
        value_parser = seconds
    )]
    pub(crate) timeout: Duration,
    /// Pass this environment variable to the hook, beyond those that libvirt passes (may be
    /// repeated)
    ///
    /// Needed for test beds that use the environment, such as umockdev: --keep-env LD_PRELOAD
    /// --keep-env UMOCKDEV_DIR.
    #[arg(long, global = true, value_name = "NAME")]
    pub(crate) keep_env: Vec<String>,
    /// Expected result; a scenario sets its own
    #[arg(long, global = true, value_enum, default_value_t = ExpectArg::Ok)]
    pub(crate) expect: ExpectArg,
    /// Text that the hook's standard error must contain
    #[arg(long, global = true, value_name = "TEXT")]
    pub(crate) expect_stderr: Option<String>,
    /// Print one JSON document instead of a report
    #[arg(long, global = true)]
    pub(crate) json: bool,
    /// When to use colours; auto respects NO_COLOR
    #[arg(long, global = true, value_enum, default_value_t = Color::Auto)]
    pub(crate) color: Color,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Verb {
    /// Start a guest: prepare, start, started; if one fails, stopped and release failed
    Start(Domains),
    /// Shut a guest down: stopped, release shutdown
    Stop(Domains),
    /// Destroy a guest: stopped, release destroyed
    Destroy(Domains),
    /// Crash QEMU: stopped, release crashed
    Crash(Domains),
    /// Save a guest to a file: stopped, release saved
    Save(Domains),
    /// Migrate a guest to another host: stopped, release migrated
    MigrateAway(Domains),
    /// Restore a saved guest: the restore filter, then a start with the XML that it printed
    Restore(Domains),
    /// Migrate a guest to this host: the migrate filter, then a start with the XML that it printed
    Migrate(Domains),
    /// Restart libvirtd: reconnect for each domain; a failure kills the running guest
    RestartDaemon(Domains),
    /// Make a single call of any operation
    Call(CallArgs),
    /// Run the steps of a TOML file, over several domains
    #[command(after_help = SCENARIO_HELP)]
    Scenario {
        /// File that describes the scenario
        #[arg(value_name = "FILE.toml")]
        file: PathBuf,
    },
    /// Try a flavor on a domain: start and stop with a temporary inventory
    #[command(after_help = TRY_HELP)]
    Try(TryArgs),
}

const SCENARIO_HELP: &str = "\
Without --config, a scenario that discovers devices gets a temporary configuration and inventory, \
which are removed
at the end.

  title = \"one key, two guests\"
  [domains]                      # paths are relative to this file
  erp = \"erp.xml\"
  crm = \"crm.xml\"
  [[steps]]
  do = \"discover\"                # or plug, unplug: the devices of a simulation file
  sim = \"key.toml\"
  [[steps]]
  do = \"start\"                   # stop, destroy, crash, save, restore, migrate, migrate-away, \
  restart-daemon
  domain = \"erp\"
  [[steps]]
  do = \"start\"
  domain = \"crm\"
  expect = \"veto\"
  expect_stderr = \"erp\"
  [[steps]]
  do = \"virt-usb\"                # any verb of virt-usb; also: do = \"call\", op, subop, extra
  args = [\"events\"]";

const TRY_HELP: &str = "\
Changes nothing on the host: the inventory is in a temporary directory, and the domain file is \
only read.
--config is used for --flavor-name only; set the configuration to try with --settings.

  hook-harness try erp.xml
      the domain's own flavor, with the devices of this machine
  hook-harness try erp.xml --flavor \
  '{\"usb_devices\":[{\"vendor_id\":\"0529\",\"product_id\":\"0001\"}]}'
      another flavor
  hook-harness try erp.xml --sim key.toml
      with the devices of a simulation file";

#[derive(Debug, Args)]
pub(crate) struct Domains {
    /// Domain XML as printed by virsh dumpxml; - reads from stdin
    #[arg(required = true, value_name = "DOMAIN.xml")]
    pub(crate) files: Vec<PathBuf>,
}

#[derive(Debug, Args)]
pub(crate) struct CallArgs {
    /// Operation: prepare, start, started, stopped, release, reconnect, migrate, restore, attach,
    /// or any other word
    pub(crate) op: String,
    /// Input of the hook; - reads from stdin
    #[arg(value_name = "DOMAIN.xml")]
    pub(crate) file: PathBuf,
    /// Third argument [default: end for stopped and release, otherwise begin]
    #[arg(long)]
    pub(crate) subop: Option<String>,
    /// Fourth argument of the call
    #[arg(long, default_value = "-")]
    pub(crate) extra: String,
    /// Name of the domain; the file can then have any content, even invalid XML
    #[arg(long)]
    pub(crate) name: Option<String>,
}

#[derive(Debug, Args)]
pub(crate) struct TryArgs {
    /// Domain XML as printed by virsh dumpxml; - reads from stdin
    #[arg(value_name = "DOMAIN.xml")]
    pub(crate) file: PathBuf,
    /// Flavor to try, as JSON [default: the domain's own flavor]
    #[arg(long, value_name = "JSON")]
    pub(crate) flavor: Option<String>,
    /// Flavor stored on this host, looked up through --config or /etc/virt-usb/config.toml
    #[arg(long, value_name = "NAME", conflicts_with = "flavor")]
    pub(crate) flavor_name: Option<String>,
    /// Use the devices of this simulation file instead of this machine's
    #[arg(long, value_name = "FILE")]
    pub(crate) sim: Option<PathBuf>,
    /// Additional configuration settings as TOML, such as 'usb_white_list_switch = "on"'
    #[arg(long, value_name = "TOML", default_value = "", hide_default_value = true)]
    pub(crate) settings: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum CallerArg {
    /// Call hooks like libvirtd
    Libvirt,
    /// Call hooks like KubeVirt's sidecar
    Filter,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum ExpectArg {
    /// Expect the hook to accept
    Ok,
    /// Expect the hook to refuse
    Veto,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Color {
    /// Use colours on a terminal
    Auto,
    /// Always use colours
    Always,
    /// Never use colours
    Never,
}

impl Common {
    pub(crate) fn caller(&self) -> Initiator {
        match self.caller {
            CallerArg::Libvirt => Initiator::Libvirt,
            CallerArg::Filter => Initiator::Filter,
        }
    }

    pub(crate) fn expected(&self) -> Expected {
        let outcome = match self.expect {
            ExpectArg::Ok => Expect::Ok,
            ExpectArg::Veto => Expect::Veto,
        };
        Expected { outcome, stderr: self.expect_stderr.clone(), stdout: None }
    }
}

impl Verb {
    /// The life cycle that a verb plays, and the domains.
    pub(crate) fn cycle(&self) -> Option<(Cycle, &[PathBuf])> {
        let (cycle, domains) = match self {
            Self::Start(domains) => (Cycle::Start, domains),
            Self::Stop(domains) => (Cycle::Stop, domains),
            Self::Destroy(domains) => (Cycle::Destroy, domains),
            Self::Crash(domains) => (Cycle::Crash, domains),
            Self::Save(domains) => (Cycle::Save, domains),
            Self::MigrateAway(domains) => (Cycle::MigrateAway, domains),
            Self::Restore(domains) => (Cycle::Restore, domains),
            Self::Migrate(domains) => (Cycle::Migrate, domains),
            Self::RestartDaemon(domains) => (Cycle::RestartDaemon, domains),
            Self::Call(_) | Self::Scenario { .. } | Self::Try(_) => return None,
        };
        Some((cycle, &domains.files))
    }
}

fn seconds(text: &str) -> Result<Duration, String> {
    let number: f64 = text.parse().map_err(|_| format!("{text:?} is no number of seconds"))?;
    Duration::try_from_secs_f64(number)
        .ok()
        .filter(|duration| !duration.is_zero())
        .ok_or_else(|| format!("wanted more than 0 seconds, found {text}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_sound() {
        use clap::CommandFactory;
        Cli::command().debug_assert();
        let cli =
            Cli::try_parse_from(["hook-harness", "start", "a.xml", "b.xml", "--timeout", "0.5"])
                .unwrap();
        assert_eq!(cli.common.timeout, Duration::from_millis(500));
        assert_eq!(
            cli.verb.cycle().map(|(cycle, files)| (cycle, files.len())),
            Some((Cycle::Start, 2))
        );
        assert!(Cli::try_parse_from(["hook-harness", "start", "a.xml", "--timeout", "0"]).is_err());
        assert!(Cli::try_parse_from(["hook-harness", "start"]).is_err());
    }
}
