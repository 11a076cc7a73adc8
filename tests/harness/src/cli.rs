//! The command line.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};
use virt_usb_harness::{Cycle, Expect, Expected, Initiator};

const LONG_ABOUT: &str = "\
Calls a libvirt hook exactly as libvirtd does, and plays the life of a guest with it.

The hook gets the domain's name, the operation and two more words as arguments, the domain XML on \
its standard input, \
an environment of a few variables, and / as its working directory. Both of its outputs are read \
until they are closed. \
What libvirt does with the answer is done, and told: the calls with their times, the XML as a \
diff, who held which \
device before and after.

Neither libvirt nor a running guest is needed, and none is touched.";

const AFTER_HELP: &str = "\
Examples:
  Try a flavor on a domain, with devices from a file, nothing installed:
    hook-harness try erp.xml --sim key.toml --flavor \
    '{\"usb_devices\":[{\"vendor_id\":\"0529\",\"product_id\":\"0001\"}]}'
  Start and stop a domain with the hook beside this program and a configuration of your own:
    hook-harness --config my.toml start erp.xml
    hook-harness --config my.toml stop erp.xml
  See that a second taker is refused:
    hook-harness --config my.toml --expect veto --expect-stderr 0529:0001 start crm.xml
  Call all hooks of this host, as libvirtd does:
    hook-harness --hooks-dir /etc/libvirt/hooks start erp.xml
  Play a scenario, for a machine to read:
    hook-harness --json scenario two-guests.toml

Exit status: 0 all went as expected, 1 something did not, 2 the command line, a domain or a \
scenario is wrong,
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
    /// With --hooks-dir it is called as if it were installed in DIR/qemu.d under its own file name.
    #[arg(long, global = true, value_name = "PATH")]
    pub(crate) hook: Option<PathBuf>,
    /// Hooks laid out as in /etc/libvirt/hooks: DIR/qemu, then each executable in DIR/qemu.d
    #[arg(long, global = true, value_name = "DIR")]
    pub(crate) hooks_dir: Option<PathBuf>,
    /// The configuration for virt-usb, and for the hook of --hook
    ///
    /// The one departure from libvirt's arguments: the hook is given --config FILE before the four.
    /// Those of --hooks-dir are not: they read /etc/virt-usb/config.toml, as always.
    #[arg(long, global = true, value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,
    /// virt-usb, asked for the claims [default: beside this program]
    #[arg(long, global = true, value_name = "PATH")]
    pub(crate) virt_usb: Option<PathBuf>,
    /// Where a scenario's discover --sim writes the sysfs tree that the configuration's sysfs_root
    /// names
    #[arg(long, global = true, value_name = "DIR", requires = "config")]
    pub(crate) sysfs_out: Option<PathBuf>,
    /// Who calls: libvirt throws away what prepare prints, a filter caller starts it
    #[arg(long, global = true, value_enum, default_value_t = CallerArg::Libvirt)]
    pub(crate) caller: CallerArg,
    /// End a call after so many seconds; libvirt would wait for ever
    #[arg(long, global = true, value_name = "SECONDS", default_value = "30", value_parser = seconds)]
    pub(crate) timeout: Duration,
    /// Pass this environment variable to the hook, beyond those that libvirt passes (may be
    /// repeated)
    ///
    /// For test beds that work through the environment, such as umockdev: --keep-env LD_PRELOAD
    /// --keep-env UMOCKDEV_DIR.
    #[arg(long, global = true, value_name = "NAME")]
    pub(crate) keep_env: Vec<String>,
    /// What should come of it; a scenario says so itself
    #[arg(long, global = true, value_enum, default_value_t = ExpectArg::Ok)]
    pub(crate) expect: ExpectArg,
    /// What the hook's standard error must contain
    #[arg(long, global = true, value_name = "TEXT")]
    pub(crate) expect_stderr: Option<String>,
    /// One JSON document instead of a story
    #[arg(long, global = true)]
    pub(crate) json: bool,
    /// Colours; NO_COLOR is respected with auto
    #[arg(long, global = true, value_enum, default_value_t = Color::Auto)]
    pub(crate) color: Color,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Verb {
    /// prepare, start, started; when one fails: stopped, release failed
    Start(Domains),
    /// The guest shuts down: stopped, release shutdown
    Stop(Domains),
    /// stopped, release destroyed
    Destroy(Domains),
    /// QEMU dies: stopped, release crashed
    Crash(Domains),
    /// The guest is saved to a file: stopped, release saved
    Save(Domains),
    /// The guest has left for another host: stopped, release migrated
    MigrateAway(Domains),
    /// A saved guest comes back: the restore filter, then a start with what it printed
    Restore(Domains),
    /// A guest arrives from another host: the migrate filter, then a start with what it printed
    Migrate(Domains),
    /// reconnect for each domain; a failure kills the running guest
    RestartDaemon(Domains),
    /// One single call of any operation
    Call(CallArgs),
    /// The steps of a TOML file, over several domains
    #[command(after_help = SCENARIO_HELP)]
    Scenario {
        /// The scenario
        #[arg(value_name = "FILE.toml")]
        file: PathBuf,
    },
    /// Try a flavor on a domain: start and stop with an inventory that is thrown away
    #[command(after_help = TRY_HELP)]
    Try(TryArgs),
}

const SCENARIO_HELP: &str = "\
A scenario that discovers devices and is given no --config gets a configuration and an inventory \
of its own, removed
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
Nothing of the host is changed: the inventory is made in a temporary folder, the domain on disk \
stays as it is.
--config is read for --flavor-name only; the settings to try are given with --settings.

  hook-harness try erp.xml
      the flavor that the domain names itself, with the devices of this machine
  hook-harness try erp.xml --flavor \
  '{\"usb_devices\":[{\"vendor_id\":\"0529\",\"product_id\":\"0001\"}]}'
      another flavor
  hook-harness try erp.xml --sim key.toml
      with the devices of a simulation file";

#[derive(Debug, Args)]
pub(crate) struct Domains {
    /// Domain XML as virsh dumpxml prints it; - is the standard input
    #[arg(required = true, value_name = "DOMAIN.xml")]
    pub(crate) files: Vec<PathBuf>,
}

#[derive(Debug, Args)]
pub(crate) struct CallArgs {
    /// prepare, start, started, stopped, release, reconnect, migrate, restore, attach, or what the
    /// future brings
    pub(crate) op: String,
    /// What is fed to the hook; - is the standard input
    #[arg(value_name = "DOMAIN.xml")]
    pub(crate) file: PathBuf,
    /// The third argument [default: end for stopped and release, begin otherwise]
    #[arg(long)]
    pub(crate) subop: Option<String>,
    /// The fourth argument
    #[arg(long, default_value = "-")]
    pub(crate) extra: String,
    /// The domain's name; the file may then hold anything, even no XML
    #[arg(long)]
    pub(crate) name: Option<String>,
}

#[derive(Debug, Args)]
pub(crate) struct TryArgs {
    /// Domain XML as virsh dumpxml prints it; - is the standard input
    #[arg(value_name = "DOMAIN.xml")]
    pub(crate) file: PathBuf,
    /// The flavor to try, as JSON [default: what the domain itself asks for]
    #[arg(long, value_name = "JSON")]
    pub(crate) flavor: Option<String>,
    /// A flavor stored on this host, looked up through --config or /etc/virt-usb/config.toml
    #[arg(long, value_name = "NAME", conflicts_with = "flavor")]
    pub(crate) flavor_name: Option<String>,
    /// Devices from a simulation file instead of this machine's
    #[arg(long, value_name = "FILE")]
    pub(crate) sim: Option<PathBuf>,
    /// Further settings of the configuration that is used, as TOML: 'usb_white_list_switch = "on"'
    #[arg(long, value_name = "TOML", default_value = "", hide_default_value = true)]
    pub(crate) settings: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum CallerArg {
    /// libvirtd
    Libvirt,
    /// KubeVirt's sidecar
    Filter,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum ExpectArg {
    /// It goes through
    Ok,
    /// It is refused
    Veto,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Color {
    /// On a terminal
    Auto,
    /// Always
    Always,
    /// Never
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
