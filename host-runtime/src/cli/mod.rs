//! The command line of an operator.

mod arguments;
mod claims;
mod devices;
mod filter;
mod fleet;
mod guests;
mod maintenance;
mod named_resources;
mod output;
mod owners;
mod quarantine;
mod recover;
mod remote;
mod response;
mod scheduler;
mod tokens;
mod watch;

use std::cell::OnceCell;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context as _, bail};
use clap::CommandFactory;
use virt_usb_config::Config;
use virt_usb_config::host_env;
use virt_usb_hook::message;
use virt_usb_model::{DeviceId, DeviceRequest, Flavor, Grant, Selector};
use virt_usb_store::{Context, Durability, Store};

pub use arguments::Arguments;
use arguments::{
    Api, ClaimsVerb, FlavorVerb, FleetVerb, GrantVerb, OwnerVerb, QuarantineVerb, StoreVerb,
    TokenVerb, Verb, WhitelistVerb,
};
use output::Output;
use remote::Remote;

use crate::agent::health;
use crate::api;

/// Runs `virt-usb`. Exit status: 0 success, 1 failure (one line on stderr says why), 2 invalid
/// arguments, 3 no host can satisfy the flavor of `filter`. For `doctor`: 1 a warning, 2 something
/// is broken.
pub fn main() -> ExitCode {
    virt_usb_config::panics::abort();
    let arguments: Arguments = match virt_usb_fleet::log::arguments() {
        Ok(arguments) => arguments,
        Err(code) => return code,
    };
    match run(arguments) {
        Ok(code) => code,
        // The reader of the output closed it: there is no one to report to.
        Err(e) if is_broken_pipe(&e) => ExitCode::SUCCESS,
        Err(e) => {
            output::complain(&format!("virt-usb: {}", chain(&e)));
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: Arguments) -> anyhow::Result<ExitCode> {
    let session = Session {
        config_file: arguments.config,
        out: Output::new(arguments.json),
        api: arguments.api,
        remote: OnceCell::new(),
    };
    if session.api.url.is_some() && is_local(&arguments.verb) {
        bail!("this command works only on the host itself: omit --url (VIRT_USB_URL)");
    }
    let (changes, began) =
        (is_change(&arguments.verb) && session.api.url.is_none(), Instant::now());
    let done = dispatch(&session, arguments.verb);
    // The agent then does not wait for its next scan. A command that failed may have changed
    // something, too.
    if changes && let Ok(config) = session.config() {
        host_env::tell_agent(
            &config.state_dir,
            host_env::COMMAND,
            began.elapsed(),
            u8::from(done.is_err()),
        );
    }
    done
}

/// Whether the command may change what the agent works with.
const fn is_change(verb: &Verb) -> bool {
    matches!(
        verb,
        Verb::Discover(_)
            | Verb::Claims { verb: Some(ClaimsVerb::Release { .. }) }
            | Verb::Attach(_)
            | Verb::Detach(_)
            | Verb::Enable { .. }
            | Verb::Disable { .. }
            | Verb::Forget { .. }
            | Verb::Quarantine { verb: Some(QuarantineVerb::Clear { .. }) }
            | Verb::Tag(_)
            | Verb::Untag(_)
            | Verb::Owner { verb: Some(OwnerVerb::Set { .. } | OwnerVerb::Clear { .. }) }
            | Verb::Flavor { verb: FlavorVerb::Set { .. } | FlavorVerb::Remove { .. } }
            | Verb::Grant { verb: GrantVerb::Set { .. } | GrantVerb::Remove { .. } }
            | Verb::Store { verb: StoreVerb::Restore { .. } | StoreVerb::Rebuild { .. } }
    )
}

fn dispatch(session: &Session, verb: Verb) -> anyhow::Result<ExitCode> {
    match verb {
        Verb::Discover(options) => devices::discover(session, &options),
        Verb::Devices { all } => devices::list(session, all),
        Verb::Hosts { documents: false } => devices::hosts(session),
        Verb::Hosts { documents: true } => devices::documents(session),
        Verb::Whitelist { verb: WhitelistVerb::Check { sim } } => {
            devices::check_whitelist(session, sim.as_deref())
        }
        Verb::Claims { verb: None | Some(ClaimsVerb::List) } => claims::list(session),
        Verb::Claims { verb: Some(ClaimsVerb::Release { instance, force }) } => {
            claims::release(session, &instance, force)
        }
        Verb::Filter(options) => filter::run(session, &options),
        Verb::Scheduler(options) => scheduler::run(session, &options),
        Verb::Start { domain } => guests::start(session, &domain),
        Verb::Attach(device) => guests::attach(session, &device),
        Verb::Detach(device) => guests::detach(session, &device),
        Verb::Enable { device } => quarantine::enable(session, session.device(&device)?),
        Verb::Disable { device, reason } => {
            quarantine::disable(session, session.device(&device)?, reason.as_deref())
        }
        Verb::Forget { device } => quarantine::forget(session, session.device(&device)?),
        Verb::Quarantine { verb: None | Some(QuarantineVerb::List) } => quarantine::list(session),
        Verb::Quarantine { verb: Some(QuarantineVerb::Clear { device }) } => {
            quarantine::clear(session, session.device(&device)?)
        }
        Verb::Tag(tags) => {
            quarantine::tag(session, session.device(&tags.device)?, &tags.tags, true)
        }
        Verb::Untag(tags) => {
            quarantine::tag(session, session.device(&tags.device)?, &tags.tags, false)
        }
        Verb::Owner { verb } => match verb {
            None | Some(OwnerVerb::List) => owners::list(session),
            Some(OwnerVerb::Set { domain, project }) => owners::set(session, &domain, &project),
            Some(OwnerVerb::Clear { domain }) => owners::clear(session, &domain),
        },
        Verb::Token { verb } => match verb {
            TokenVerb::Add(options) => tokens::add(session, &options),
            TokenVerb::List => tokens::list(session),
            TokenVerb::Remove { name } => tokens::remove(session, &name),
        },
        Verb::Events(options) => claims::events(session, &options),
        Verb::Watch(options) => watch::run(session, &options),
        Verb::Flavor { verb } => match verb {
            FlavorVerb::List => named_resources::list::<Flavor>(session),
            FlavorVerb::Show { name } => named_resources::show::<Flavor>(session, &name),
            FlavorVerb::Set { name, definition } => {
                named_resources::set::<Flavor>(session, &name, &definition)
            }
            FlavorVerb::Remove { name } => named_resources::remove::<Flavor>(session, &name),
        },
        Verb::Grant { verb } => match verb {
            GrantVerb::List => named_resources::list::<Grant>(session),
            GrantVerb::Show { name } => named_resources::show::<Grant>(session, &name),
            GrantVerb::Set { name, definition } => {
                named_resources::set::<Grant>(session, &name, &definition)
            }
            GrantVerb::Remove { name } => named_resources::remove::<Grant>(session, &name),
        },
        Verb::Fleet { verb } => match verb {
            FleetVerb::Join(credentials) => fleet::join(session, &credentials),
            FleetVerb::Leave { host, credentials } => {
                fleet::leave(session, host.as_deref(), &credentials)
            }
            FleetVerb::Status => fleet::status(session),
            FleetVerb::Simulate(options) => fleet::simulate(session, &options),
        },
        Verb::Doctor { all, hooks, run } => maintenance::doctor(session, all, hooks, run),
        Verb::Store { verb } => match verb {
            StoreVerb::Check => maintenance::check(session),
            StoreVerb::Backup { file } => maintenance::backup(session, &file),
            StoreVerb::Restore { file, options } => recover::restore(session, &file, &options),
            StoreVerb::Rebuild { force, options } => recover::rebuild(session, force, &options),
        },
        Verb::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Arguments::command(), "virt-usb", &mut script);
            session.out.raw(&script)?;
            Ok(ExitCode::SUCCESS)
        }
        Verb::Manual { dir, date } => {
            crate::manual::write(&Arguments::command(), &dir, &date)
                .with_context(|| format!("cannot write the manual to {}", dir.display()))?;
            Ok(ExitCode::SUCCESS)
        }
    }
}

/// Whether the command works only on the host itself.
const fn is_local(verb: &Verb) -> bool {
    match verb {
        Verb::Devices { .. }
        | Verb::Hosts { .. }
        | Verb::Claims { verb: None | Some(ClaimsVerb::List) }
        | Verb::Events(_)
        | Verb::Flavor { .. }
        | Verb::Grant { .. }
        | Verb::Attach(_)
        | Verb::Detach(_)
        | Verb::Enable { .. }
        | Verb::Disable { .. }
        | Verb::Forget { .. }
        | Verb::Quarantine { .. }
        | Verb::Tag(_)
        | Verb::Untag(_)
        | Verb::Owner { .. }
        // These two commands query no service.
        | Verb::Completions { .. }
        | Verb::Manual { .. } => false,
        Verb::Claims { .. }
        | Verb::Discover(_)
        | Verb::Doctor { .. }
        | Verb::Filter(_)
        | Verb::Fleet { .. }
        | Verb::Scheduler(_)
        | Verb::Start { .. }
        | Verb::Store { .. }
        | Verb::Token { .. }
        | Verb::Watch(_)
        | Verb::Whitelist { .. } => true,
    }
}

/// State that all commands share.
struct Session {
    config_file: Option<PathBuf>,
    out: Output,
    api: Api,
    remote: OnceCell<Remote>,
}

impl Session {
    fn config(&self) -> anyhow::Result<Config> {
        Ok(Config::load(self.config_file.as_deref())?)
    }

    /// Returns the one device that `wanted` means: by its id, or by what it shows.
    ///
    /// # Errors
    /// If no device matches, or several do.
    fn device(&self, wanted: &DeviceRequest) -> anyhow::Result<DeviceId> {
        let by_id = Selector { id: wanted.selector.id, ..Selector::default() };
        if let (Some(id), true) = (wanted.selector.id, wanted.selector == by_id) {
            return Ok(id);
        }
        let mut all = match self.remote()? {
            Some(api) => api.devices(true)?,
            None => self.store()?.all_devices()?,
        };
        all.retain(|record| record.is_selected_by(&wanted.selector));
        // A device that is there is meant before one that was unplugged.
        if all.iter().any(|record| record.deleted == 0) {
            all.retain(|record| record.deleted == 0);
        }
        match all.as_slice() {
            [one] => Ok(one.entry.id),
            [] => bail!("no device matches {wanted}: 'virt-usb devices --all' lists all devices"),
            several => {
                let list: Vec<String> = several.iter().map(message::device).collect();
                let (count, list) = (several.len(), list.join(", "));
                bail!("{count} devices match {wanted}: name one by its id: {list}")
            }
        }
    }

    /// Returns the API of `--url`, which takes the place of the inventory; `None` without `--url`.
    /// Reads the files of its options once.
    fn remote(&self) -> anyhow::Result<Option<&Remote>> {
        let Some(url) = &self.api.url else { return Ok(None) };
        if self.remote.get().is_none() {
            drop(self.remote.set(Remote::open(url, &self.api)?));
        }
        Ok(self.remote.get())
    }

    /// Returns the API through which guests are changed: the one of `--url`, or that of an agent
    /// that simulates its guests, which libvirt does not know. `None`: libvirt has the guests.
    ///
    /// # Errors
    /// If the agent simulates its guests and serves no API.
    fn guests_api(&self) -> anyhow::Result<Option<&Remote>> {
        if self.api.url.is_some() {
            return self.remote();
        }
        let config = self.config()?;
        if !health::simulates_guests(&config.state_dir) {
            return Ok(None);
        }
        if config.api == virt_usb_config::Api::Off {
            bail!(
                "the agent simulates its guests, which are changed through its API only: remove \
                 'api = \"off\"' from the configuration and restart the agent"
            );
        }
        Ok(Some(self.remote.get_or_init(|| Remote::local(api::socket(&config)))))
    }

    /// Opens the inventory, which must exist.
    fn store(&self) -> anyhow::Result<Store> {
        Ok(Store::open(
            &self.config()?.state_dir,
            crate::timeouts::COMMAND_LOCK_TIMEOUT,
            Durability::Power,
        )?)
    }

    /// Opens the inventory, and creates or migrates it if necessary.
    fn make_store(&self, config: &Config) -> anyhow::Result<Store> {
        Ok(Store::create(&config.state_dir, crate::timeouts::COMMAND_LOCK_TIMEOUT)?)
    }

    fn context(&self, config: &Config, doing: &str) -> anyhow::Result<Context> {
        Ok(host_env::context(config, format!("virt-usb {doing}"))?)
    }
}

/// Formats an error and its causes in one line.
fn chain(e: &anyhow::Error) -> String {
    e.chain().map(ToString::to_string).collect::<Vec<_>>().join(": ")
}

fn is_broken_pipe(e: &anyhow::Error) -> bool {
    e.chain()
        .filter_map(|c| c.downcast_ref::<std::io::Error>())
        .any(|e| e.kind() == std::io::ErrorKind::BrokenPipe)
}
