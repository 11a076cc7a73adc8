//! hook-harness: calls a libvirt hook exactly as libvirtd does.

mod cli;
mod ui;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, anyhow};
use clap::Parser;
use serde_json::Value;
use virt_usb_harness::{
    CallOutcome, Cycle, Domain, DomainError, Frame, Hooks, Player, Product, Report, Request,
    Scenario, ScenarioError, Scratch, ScratchError, Script, Settings, Stage, StageError,
    default_subop, differences,
};

use crate::cli::{CallArgs, Cli, Common, TryArgs, Verb};
use crate::ui::Ui;

fn main() -> ExitCode {
    // A daemon of systemd has this mask; the hook inherits it.
    rustix::process::umask(rustix::fs::Mode::WGRP | rustix::fs::Mode::WOTH);
    let cli = Cli::parse();
    match run(&cli) {
        Ok(CallOutcome::AsExpected) => ExitCode::SUCCESS,
        Ok(CallOutcome::NotAsExpected) => ExitCode::from(1),
        Err(error) => {
            eprintln!("hook-harness: {error:#}");
            ExitCode::from(if is_input(&error) { 2 } else { 3 })
        }
    }
}

/// Whether what was given is wrong, as opposed to what could not be run.
fn is_input(error: &anyhow::Error) -> bool {
    error.is::<DomainError>()
        || error.is::<ScenarioError>()
        || error.is::<Input>()
        || matches!(error.downcast_ref(), Some(ScratchError::Settings(_)))
}

/// Arguments that contradict each other, with the message for the user.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Input(String);

fn run(cli: &Cli) -> anyhow::Result<CallOutcome> {
    let common = &cli.common;
    match &cli.verb {
        Verb::Scenario { file } => scenario(common, file),
        Verb::Try(args) => try_flavor(common, args),
        Verb::Call(args) => single(common, args),
        verb => match verb.cycle() {
            Some((cycle, files)) => cycles(common, cycle, files),
            None => Err(anyhow!("a verb that plays nothing")),
        },
    }
}

fn cycles(common: &Common, cycle: Cycle, files: &[PathBuf]) -> anyhow::Result<CallOutcome> {
    let domains = files.iter().map(|file| Domain::load(file)).collect::<Result<Vec<_>, _>>()?;
    let theatre = Theatre::new(common, common.config.as_deref(), common.sysfs_out.clone())?;
    theatre.play(|stage| {
        domains.iter().try_for_each(|domain| {
            stage.cycle(cycle, domain, Frame { say: None, expected: common.expected() }).map(drop)
        })
    })
}

fn single(common: &Common, args: &CallArgs) -> anyhow::Result<CallOutcome> {
    let (name, xml, domain) = match &args.name {
        Some(name) => (name.clone(), Domain::bytes(&args.file)?, None),
        None => {
            let domain = Domain::load(&args.file)?;
            (domain.name.clone(), domain.xml.clone(), Some(domain))
        }
    };
    let subop = args.subop.clone().unwrap_or_else(|| default_subop(&args.op).to_owned());
    let request = Request { name, op: args.op.clone(), subop, extra: args.extra.clone() };
    let theatre = Theatre::new(common, common.config.as_deref(), common.sysfs_out.clone())?;
    let frame = Frame { say: None, expected: common.expected() };
    theatre.play(|stage| stage.single(&request, &xml, domain.as_ref(), frame))
}

fn scenario(common: &Common, file: &Path) -> anyhow::Result<CallOutcome> {
    let scenario = Scenario::load(file)?;
    if common.config.is_some() && !scenario.config.is_empty() {
        let what =
            "the scenario brings its own configuration: leave out --config, or its key config";
        return Err(Input(what.to_owned()).into());
    }
    let wanted =
        common.config.is_none() && (scenario.needs_product() || !scenario.config.is_empty());
    if wanted {
        own_hook_only(common)?;
    }
    let scratch =
        wanted.then(|| Scratch::new(&scenario.config, scenario.is_simulated())).transpose()?;
    let config = scratch.as_ref().map(Scratch::config).or_else(|| common.config.clone());
    let sysfs = scratch.as_ref().and_then(Scratch::sysfs).or_else(|| common.sysfs_out.clone());
    let mut theatre = Theatre::new(common, config.as_deref(), sysfs)?;
    if scenario.needs_product() {
        theatre.needs_product()?;
    }
    if let Some(title) = &scenario.title {
        theatre.ui.say(&format!("{title}\n"));
    }
    theatre.play(|stage| scenario.play(stage))
}

/// Refuses installed hooks, which would claim from the real inventory instead of the temporary one.
fn own_hook_only(common: &Common) -> Result<(), Input> {
    let what = "the hooks of --hooks-dir work on the installed inventory, this on one of its own: \
        give --hook instead";
    common.hooks_dir.is_none().then_some(()).ok_or_else(|| Input(what.to_owned()))
}

fn try_flavor(common: &Common, args: &TryArgs) -> anyhow::Result<CallOutcome> {
    own_hook_only(common)?;
    let mut domain = Domain::load(&args.file)?;
    let stored = args.flavor_name.as_deref().map(|name| stored_flavor(common, name)).transpose()?;
    if let Some(json) = &args.flavor {
        object(json).map_err(|what| Input(format!("--flavor: {what}")))?;
    }
    if let Some(json) = args.flavor.as_ref().or(stored.as_ref()) {
        domain = domain.with_flavor(json).map_err(Input)?;
    }
    let scratch = Scratch::new(&args.settings, args.sim.is_some())?;
    let theatre = Theatre::new(common, Some(&scratch.config()), scratch.sysfs())?;
    theatre.needs_product()?;
    let frame = |say: &str| Frame { say: Some(say.to_owned()), ..Frame::default() };
    let start = match &args.flavor {
        Some(_) => "what a start with --flavor, in the domain's <metadata>, comes to",
        None => "what a start with this flavor comes to",
    };
    let verdict = theatre.play(|stage| {
        if !stage.discover("discover", args.sim.as_deref(), frame("which devices there are"))? {
            return Ok(());
        }
        let start = Frame { expected: common.expected(), ..frame(start) };
        if let Some(live) = stage.cycle(Cycle::Start, &domain, start)? {
            stage.cycle(Cycle::Stop, &live, frame("and what is left after it"))?;
        }
        Ok(())
    })?;
    Ok(verdict)
}

/// Checks that a flavor is a JSON object. The hook checks its keys.
fn object(json: &str) -> Result<(), String> {
    let example = r#"a JSON object such as {"usb_devices":[{"vendor_id":"0529"}]}"#;
    match serde_json::from_str(json) {
        Ok(Value::Object(_)) => Ok(()),
        Ok(_) => Err(format!("found {json}, wanted {example}")),
        Err(_) => Err(format!("found {json:?}, which is no JSON, wanted {example}")),
    }
}

/// The JSON of a flavor that is stored on this host.
fn stored_flavor(common: &Common, name: &str) -> anyhow::Result<String> {
    let config = common.config.clone().unwrap_or_else(|| "/etc/virt-usb/config.toml".into());
    let product =
        Product { program: beside(common.virt_usb.as_ref(), "virt-usb")?, config, sysfs_out: None };
    let shown = product.json(&["flavor", "show", name, "--json"])?;
    let requests = requests(&shown)
        .with_context(|| format!("the flavor {name} names no USB devices: {shown}"))?;
    Ok(requests.to_string())
}

/// The object that holds a flavor's two keys, wherever the document has it.
fn requests(document: &Value) -> Option<Value> {
    let keys = ["usb_devices", "usb_redirection_devices"];
    let object = document.as_object()?;
    let found = keys.iter().filter_map(|key| Some(((*key).to_owned(), object.get(*key)?.clone())));
    let found: serde_json::Map<_, _> = found.collect();
    if found.is_empty() { object.values().find_map(requests) } else { Some(Value::Object(found)) }
}

/// Everything that is needed to play.
struct Theatre {
    hooks: Hooks,
    settings: Settings,
    caller: virt_usb_harness::Initiator,
    product: Option<Product>,
    ui: Ui,
}

impl Theatre {
    fn new(
        common: &Common,
        config: Option<&Path>,
        sysfs_out: Option<PathBuf>,
    ) -> anyhow::Result<Self> {
        let config = config.map(std::path::absolute).transpose()?;
        let before = config
            .iter()
            .flat_map(|file| ["--config".into(), file.clone().into_os_string()])
            .collect();
        let hook = match (&common.hook, &common.hooks_dir) {
            (None, Some(_)) => None,
            (given, _) => Some(Script { path: beside(given.as_ref(), "virt-usb-hook")?, before }),
        };
        let dir = common.hooks_dir.as_ref().map(std::path::absolute).transpose()?;
        let settings = Settings { timeout: common.timeout, keep_env: common.keep_env.clone() };
        let hooks = Hooks::find(hook, dir.as_deref())?;
        let program = beside(common.virt_usb.as_ref(), "virt-usb").ok();
        let product =
            program.zip(config).map(|(program, config)| Product { program, config, sysfs_out });
        let ui = Ui::new(common.json, common.color);
        Ok(Self { hooks, settings, caller: common.caller(), product, ui })
    }

    fn needs_product(&self) -> anyhow::Result<()> {
        let missing = "virt-usb is needed to discover devices: give --virt-usb PATH";
        self.product.as_ref().map(drop).ok_or_else(|| anyhow!(missing))
    }

    fn play(
        mut self,
        act: impl FnOnce(&mut Stage<'_>) -> Result<(), StageError>,
    ) -> anyhow::Result<CallOutcome> {
        let player = Player { hooks: &self.hooks, settings: &self.settings, caller: self.caller };
        let asked = self.product.is_some();
        let mut watch = |event: virt_usb_harness::Event<'_>| self.ui.event(&event);
        let mut stage = Stage::new(player, self.product, &mut watch);
        act(&mut stage)?;
        let plays = stage.into_plays();
        if !asked {
            self.ui.say(
                "(give --config FILE, and --virt-usb PATH if it is elsewhere, to see the \
                    claims, too)",
            );
        }
        let hooks = self.hooks.scripts().iter().map(|script| script.path.clone()).collect();
        let report = Report::new(hooks, differences(), plays);
        self.ui.close(&report)?;
        Ok(report.verdict)
    }
}

/// The given path, or the program with that name in this program's own folder.
fn beside(given: Option<&PathBuf>, name: &str) -> anyhow::Result<PathBuf> {
    if let Some(path) = given {
        return Ok(std::path::absolute(path)?);
    }
    let own = std::env::current_exe().context("cannot find this program's own folder")?;
    let found = own.with_file_name(name);
    if found.is_file() {
        Ok(found)
    } else {
        Err(anyhow!("there is no {}: say where {name} is", found.display()))
    }
}
