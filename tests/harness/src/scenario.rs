//! Scenarios: steps over several named domains, written in TOML.
//!
//! ```toml
//! title = "one key, two guests"
//! config = 'hold = "running"'          # settings of the scratch configuration
//!
//! [domains]                            # paths are relative to this file
//! erp = "erp.xml"
//! crm = "crm.xml"
//!
//! [[steps]]
//! do = "discover"
//! sim = "key.toml"
//!
//! [[steps]]
//! do = "start"
//! domain = "erp"
//!
//! [[steps]]
//! say = "the second taker is told who holds it"
//! do = "start"
//! domain = "crm"
//! expect = "veto"
//! expect_stderr = "erp"
//! ```
//!
//! | `do` | further keys | what happens |
//! |---|---|---|
//! | `start`, `stop`, `destroy`, `crash`, `save`, `restore` | `domain` | a life cycle |
//! | `migrate`, `migrate-away` | `domain` | a life cycle |
//! | `restart-daemon` | `domain`, or all that run | `reconnect` for each |
//! | `call` | `domain`, `op`, and `subop`, `extra` | one single call |
//! | `discover`, `plug`, `unplug` | `sim` (only `discover` can do without) | `virt-usb discover` |
//! | `virt-usb` | `args` | any verb of `virt-usb` |
//!
//! Every step may have `say`, `expect` (`"ok"` or `"veto"`), `expect_stderr` and `expect_stdout`.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use crate::chain::Request;
use crate::domain::{Domain, DomainError};
use crate::lifecycle::Cycle;
use crate::record::{Expect, Expected, Frame};
use crate::stage::{Stage, StageError};

/// A scenario cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ScenarioError {
    /// The file cannot be read.
    #[error("cannot read the scenario {path}")]
    Read {
        /// Path of the file.
        path: PathBuf,
        /// Cause of the failure.
        source: io::Error,
    },
    /// The file is not TOML, or has unknown keys.
    #[error("the scenario {path} is wrong")]
    Syntax {
        /// Path of the file.
        path: PathBuf,
        /// Where and why.
        source: toml::de::Error,
    },
    /// A step does not say what it must.
    #[error("the scenario {path} is wrong: step {step}: {what}")]
    Step {
        /// Path of the file.
        path: PathBuf,
        /// Number of the step, from 1.
        step: usize,
        /// Missing, unknown or superfluous part.
        what: String,
    },
    /// One of its domains cannot be used.
    #[error(transparent)]
    Domain(#[from] DomainError),
}

/// A scenario, read and checked.
#[derive(Debug, Clone)]
pub struct Scenario {
    /// Title of the scenario.
    pub title: Option<String>,
    /// TOML for the scratch configuration.
    pub config: String,
    /// Domains, by the names that the steps use.
    pub domains: BTreeMap<String, Domain>,
    /// Steps of the scenario.
    pub steps: Vec<Step>,
}

/// A step of a scenario.
#[derive(Debug, Clone)]
pub struct Step {
    /// Action of the step.
    pub action: Action,
    /// Texts and expectations of the step.
    pub frame: Frame,
}

/// Action of a step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// A life cycle of one domain.
    Cycle(Cycle, String),
    /// The daemon restarts; every guest that runs is reconnected.
    RestartAll,
    /// One single call.
    Call {
        /// Name of the domain.
        domain: String,
        /// Operation of the call.
        op: String,
        /// `begin` or `end`.
        subop: String,
        /// Reason of the release.
        extra: String,
    },
    /// `virt-usb discover`.
    Discover {
        /// `discover`, `plug` or `unplug`.
        word: String,
        /// The simulation file.
        sim: Option<PathBuf>,
    },
    /// Any verb of `virt-usb`.
    Operator(Vec<String>),
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawScenario {
    title: Option<String>,
    #[serde(default)]
    config: String,
    #[serde(default)]
    domains: BTreeMap<String, PathBuf>,
    #[serde(default)]
    steps: Vec<RawStep>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawStep {
    #[serde(rename = "do")]
    action: String,
    say: Option<String>,
    domain: Option<String>,
    op: Option<String>,
    subop: Option<String>,
    extra: Option<String>,
    sim: Option<PathBuf>,
    args: Option<Vec<String>>,
    #[serde(default)]
    expect: Expect,
    expect_stderr: Option<String>,
    expect_stdout: Option<String>,
}

const WORDS: &str = "start, stop, destroy, crash, save, restore, migrate, migrate-away, \
    restart-daemon, call, discover, plug, unplug, virt-usb";

impl Scenario {
    /// Reads a file and the domains that it names.
    ///
    /// # Errors
    /// When it, or one of its domains, cannot be read or says something wrong.
    pub fn load(path: &Path) -> Result<Self, ScenarioError> {
        let text = fs::read_to_string(path)
            .map_err(|source| ScenarioError::Read { path: path.into(), source })?;
        let raw: RawScenario = toml::from_str(&text)
            .map_err(|source| ScenarioError::Syntax { path: path.into(), source })?;
        let folder = path.parent().unwrap_or(Path::new("."));
        let domains = raw
            .domains
            .into_iter()
            .map(|(name, file)| Ok((name, Domain::load(&folder.join(file))?)));
        let domains = domains.collect::<Result<BTreeMap<_, _>, DomainError>>()?;
        let mut steps = Vec::new();
        for (index, raw) in raw.steps.into_iter().enumerate() {
            let wrong = |what| ScenarioError::Step { path: path.into(), step: index + 1, what };
            steps.push(raw.check(&domains, folder).map_err(wrong)?);
        }
        Ok(Self { title: raw.title, config: raw.config, domains, steps })
    }

    /// Whether it needs `virt-usb`.
    pub fn needs_product(&self) -> bool {
        self.steps
            .iter()
            .any(|step| matches!(step.action, Action::Discover { .. } | Action::Operator(_)))
    }

    /// Whether it brings devices of its own.
    pub fn is_simulated(&self) -> bool {
        self.steps.iter().any(|step| matches!(step.action, Action::Discover { sim: Some(_), .. }))
    }

    /// Plays it to its end; what failed is in the stage's plays.
    ///
    /// # Errors
    /// When a program cannot be run.
    pub fn play(&self, stage: &mut Stage<'_>) -> Result<(), StageError> {
        let mut guests =
            Guests { domains: &self.domains, running: BTreeMap::new(), saved: BTreeMap::new() };
        self.steps.iter().try_for_each(|step| guests.step(step, stage))
    }
}

impl RawStep {
    fn check(self, domains: &BTreeMap<String, Domain>, folder: &Path) -> Result<Step, String> {
        let (action, used) = self.action(domains, folder)?;
        let given = [
            ("domain", self.domain.is_some()),
            ("op", self.op.is_some()),
            ("subop", self.subop.is_some()),
            ("extra", self.extra.is_some()),
            ("sim", self.sim.is_some()),
            ("args", self.args.is_some()),
        ];
        if let Some((key, _)) = given.iter().find(|(key, given)| *given && !used.contains(key)) {
            return Err(format!("{key} has no meaning for do = {:?}", self.action));
        }
        let expected = Expected {
            outcome: self.expect,
            stderr: self.expect_stderr,
            stdout: self.expect_stdout,
        };
        Ok(Step { action, frame: Frame { say: self.say, expected } })
    }

    /// The action, and the keys that it looks at.
    fn action(
        &self,
        domains: &BTreeMap<String, Domain>,
        folder: &Path,
    ) -> Result<(Action, &'static [&'static str]), String> {
        let domain = || {
            let name = self
                .domain
                .as_ref()
                .ok_or_else(|| format!("do = {:?} needs domain", self.action))?;
            let known = || domains.keys().map(String::as_str).collect::<Vec<_>>().join(", ");
            if domains.contains_key(name) {
                Ok(name.clone())
            } else {
                Err(format!("no domain {name:?} in [domains]; there are: {}", known()))
            }
        };
        let sim = self.sim.as_ref().map(|file| folder.join(file));
        Ok(match self.action.as_str() {
            "restart-daemon" if self.domain.is_none() => (Action::RestartAll, &[]),
            "call" => {
                let op = self.op.clone().ok_or("do = \"call\" needs op")?;
                let subop = self.subop.clone().unwrap_or_else(|| default_subop(&op).to_owned());
                let extra = self.extra.clone().unwrap_or_default();
                (
                    Action::Call { domain: domain()?, op, subop, extra },
                    &["domain", "op", "subop", "extra"],
                )
            }
            "discover" => (Action::Discover { word: self.action.clone(), sim }, &["sim"]),
            "plug" | "unplug" if sim.is_none() => {
                return Err(format!(
                    "do = {:?} needs sim: the file with what is plugged in then",
                    self.action
                ));
            }
            "plug" | "unplug" => (Action::Discover { word: self.action.clone(), sim }, &["sim"]),
            "virt-usb" => (
                Action::Operator(self.args.clone().ok_or("do = \"virt-usb\" needs args")?),
                &["args"],
            ),
            word => {
                let cycle = cycle(word)
                    .ok_or_else(|| format!("do = {word:?} is not known; there are: {WORDS}"))?;
                (Action::Cycle(cycle, domain()?), &["domain"])
            }
        })
    }
}

fn cycle(word: &str) -> Option<Cycle> {
    let all = [
        Cycle::Start,
        Cycle::Stop,
        Cycle::Destroy,
        Cycle::Crash,
        Cycle::Save,
        Cycle::MigrateAway,
        Cycle::Restore,
        Cycle::Migrate,
        Cycle::RestartDaemon,
    ];
    all.into_iter().find(|cycle| cycle.name() == word)
}

/// libvirt's second word for an operation (the callers of `virHookCall` in src/qemu/).
pub fn default_subop(op: &str) -> &'static str {
    if matches!(op, "stopped" | "release") { "end" } else { "begin" }
}

/// Running guests and their definitions.
struct Guests<'a> {
    domains: &'a BTreeMap<String, Domain>,
    running: BTreeMap<String, Domain>,
    saved: BTreeMap<String, Domain>,
}

impl Guests<'_> {
    fn step(&mut self, step: &Step, stage: &mut Stage<'_>) -> Result<(), StageError> {
        let frame = step.frame.clone();
        match &step.action {
            Action::Cycle(cycle, name) => self.cycle(*cycle, name, frame, stage),
            Action::RestartAll => {
                let names: Vec<_> = self.running.keys().cloned().collect();
                names.iter().try_for_each(|name| {
                    self.cycle(Cycle::RestartDaemon, name, frame.clone(), stage)
                })
            }
            Action::Call { domain, op, subop, extra } => {
                let domain = self.definition(domain, stage)?;
                let request = Request {
                    name: domain.name.clone(),
                    op: op.clone(),
                    subop: subop.clone(),
                    extra: extra.clone(),
                };
                stage.single(&request, &domain.xml, Some(&domain), frame)
            }
            Action::Discover { word, sim } => stage.discover(word, sim.as_deref(), frame).map(drop),
            Action::Operator(args) => stage.operator(args, frame),
        }
    }

    fn cycle(
        &mut self,
        cycle: Cycle,
        name: &str,
        frame: Frame,
        stage: &mut Stage<'_>,
    ) -> Result<(), StageError> {
        if cycle.needs_running() != self.running.contains_key(name) {
            let state = if cycle.needs_running() { "does not run" } else { "runs already" };
            stage.impossible(cycle.name(), frame, &format!("the guest {name} {state}"));
            return Ok(());
        }
        let image = self.saved.get(name).filter(|_| cycle == Cycle::Restore).cloned();
        let domain = image.map_or_else(|| self.definition(name, stage), Ok)?;
        let live = stage.cycle(cycle, &domain, frame)?;
        match cycle {
            Cycle::Save => drop(self.saved.insert(name.to_owned(), domain)),
            Cycle::Restore if live.is_some() => drop(self.saved.remove(name)),
            _ => {}
        }
        match live {
            Some(live) => self.running.insert(name.to_owned(), live),
            None => self.running.remove(name),
        };
        Ok(())
    }

    /// The live definition of a guest that runs, the one of its file otherwise.
    fn definition(&self, name: &str, stage: &Stage<'_>) -> Result<Domain, StageError> {
        let found = self.running.get(name).or_else(|| self.domains.get(name)).cloned();
        let what = || format!("no domain {name:?}");
        found.ok_or_else(|| StageError::Missing { step: stage.next_step(), what: what() })
    }
}
