//! Results as data: these types are the `--json` document.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::call::{Exit, Hang};
use crate::chain::{Link, replacement};
use crate::domain::Domain;

/// Everything one run of the harness did.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// The format of this document; 1.
    pub version: u32,
    /// The executables that were called, in their order.
    pub hooks: Vec<PathBuf>,
    /// Where a call from here differs from one by libvirtd.
    pub differences: Vec<String>,
    /// Steps that were played, in order.
    pub plays: Vec<Play>,
    /// Whether it all went as expected.
    pub verdict: CallOutcome,
}

impl Report {
    /// Puts the parts together and judges them.
    pub fn new(hooks: Vec<PathBuf>, differences: Vec<String>, plays: Vec<Play>) -> Self {
        let good = plays.iter().all(|play| play.problem.is_none());
        let verdict = if good { CallOutcome::AsExpected } else { CallOutcome::NotAsExpected };
        Self { version: 1, hooks, differences, plays, verdict }
    }
}

/// The judgement on a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum CallOutcome {
    /// Exit status 0.
    AsExpected,
    /// Exit status 1.
    NotAsExpected,
}

/// One life cycle of one domain, or one step that calls no hook.
#[derive(Debug, Clone, Serialize)]
pub struct Play {
    /// Number of the step, from 1.
    pub step: usize,
    /// `start`, `migrate`, `discover`, …
    pub action: String,
    /// The scenario's own words on it.
    pub say: Option<String>,
    /// The domain's name.
    pub domain: Option<String>,
    /// The domain's UUID.
    pub uuid: Option<String>,
    /// Expected result of the step.
    pub expected: Expected,
    /// The calls of hooks, in order.
    pub calls: Vec<CallRecord>,
    /// The run of `virt-usb` that this step is made of.
    pub product: Option<ProductRun>,
    /// How it ended.
    pub outcome: Outcome,
    /// Remarks for the reader.
    pub remarks: Vec<String>,
    /// Output of `virt-usb claims --json` before the step; `null` if claims were not queried.
    pub claims_before: Option<Value>,
    /// The same after it.
    pub claims_after: Option<Value>,
    /// Why it is not as expected; `null` when it is.
    pub problem: Option<String>,
}

impl Play {
    /// A step without results yet.
    pub(crate) fn new(step: usize, action: &str, domain: Option<&Domain>, frame: Frame) -> Self {
        Self {
            step,
            action: action.to_owned(),
            say: frame.say,
            domain: domain.map(|domain| domain.name.clone()),
            uuid: domain.and_then(|domain| domain.uuid.clone()),
            expected: frame.expected,
            calls: Vec::new(),
            product: None,
            outcome: Outcome::Done,
            remarks: Vec::new(),
            claims_before: None,
            claims_after: None,
            problem: None,
        }
    }
}

/// Texts and expectations of a step.
#[derive(Debug, Clone, Default)]
pub struct Frame {
    /// The scenario's own words on it.
    pub say: Option<String>,
    /// Expected result of the step.
    pub expected: Expected,
}

/// One call of one executable.
#[derive(Debug, Clone, Serialize)]
pub struct CallRecord {
    /// Path of the executable.
    pub hook: PathBuf,
    /// Arguments of the call.
    pub args: Vec<String>,
    /// Operation of the call.
    pub op: String,
    /// The exit status; `null` when a signal ended it.
    pub exit: Option<i32>,
    /// The signal that ended it.
    pub signal: Option<i32>,
    /// Why the harness had to end it.
    pub hang: Option<String>,
    /// From spawn to the end of both pipes and of the process, in microseconds.
    pub duration_us: u128,
    /// Standard output of the hook.
    pub stdout: String,
    /// Standard error of the hook.
    pub stderr: String,
    /// Use of the hook's output.
    pub output: OutputFate,
    /// The error that libvirt shows its user.
    pub message: Option<String>,
    /// The XML that was fed in; for the diff.
    #[serde(skip)]
    pub stdin: String,
}

impl CallRecord {
    /// Records a call; `used` says whether its caller reads what was printed.
    pub(crate) fn new(link: &Link, op: &str, used: bool) -> Self {
        let answer = &link.answer;
        let (exit, signal) = match answer.exit {
            Exit::Code(code) => (Some(code), None),
            Exit::Signal(signal) => (None, Some(signal)),
        };
        let output = match (replacement(&answer.stdout), used) {
            (None, true) => OutputFate::Unchanged,
            (None, false) => OutputFate::None,
            (Some(_), true) if link.message.is_none() => OutputFate::Used,
            (Some(_), _) => OutputFate::Discarded,
        };
        Self {
            hook: link.path.clone(),
            args: link.arguments.iter().map(|word| word.to_string_lossy().into_owned()).collect(),
            op: op.to_owned(),
            exit,
            signal,
            hang: answer.hang.as_ref().map(Hang::to_string),
            duration_us: answer.duration.as_micros(),
            stdout: String::from_utf8_lossy(&answer.stdout).into_owned(),
            stderr: answer.stderr.clone(),
            output,
            message: link.message.clone(),
            stdin: String::from_utf8_lossy(&link.input).into_owned(),
        }
    }
}

/// The caller's use of a hook's output.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum OutputFate {
    /// Nothing was printed, and nothing was wanted.
    None,
    /// libvirt throws it away.
    Discarded,
    /// Nothing was printed by a filter: the XML stays.
    Unchanged,
    /// The output is the XML from here on.
    Used,
    /// libvirt would not accept it.
    Refused,
}

/// How a life cycle ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "result", rename_all = "kebab-case")]
pub enum Outcome {
    /// The step succeeded.
    Done,
    /// The step was refused.
    Refused {
        /// The operation at which.
        op: String,
        /// The error that libvirt shows.
        message: String,
    },
}

/// Expected outcome of a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Expect {
    /// The step succeeds.
    #[default]
    Ok,
    /// The step is refused.
    Veto,
}

/// Expected outcome and output of a step.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub struct Expected {
    /// Through or refused.
    pub outcome: Expect,
    /// Text that the standard error of one of the calls must contain.
    pub stderr: Option<String>,
    /// Text that the standard output of one of the calls must contain.
    pub stdout: Option<String>,
}

/// A run of `virt-usb`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ProductRun {
    /// Arguments of the command.
    pub args: Vec<String>,
    /// The exit status; `null` when a signal ended it.
    pub exit: Option<i32>,
    /// Duration in microseconds.
    pub duration_us: u128,
    /// Standard output of the command.
    pub stdout: String,
    /// Standard error of the command.
    pub stderr: String,
}
