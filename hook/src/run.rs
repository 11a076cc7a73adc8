//! The steps of a call: read, decide, act, answer, record.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use virt_usb_config::{Config, ConfigError, Log, host_env};
use virt_usb_domxml::{Text, XmlError};

use crate::answer::Answer;
use crate::call::{self, Call, Happened, Incoming, Invocation, OnError, Operation};
use crate::input::{self, Input};
use crate::job::{HookError, Job, NOTHING};
use crate::{device_use, incoming, journal, lifecycle, prepare};

/// Main function of the program `virt-usb-hook`.
pub fn main() -> ExitCode {
    virt_usb_config::panics::abort();
    let began = Instant::now();
    let (mut stdout, mut stderr) = (std::io::stdout(), std::io::stderr());
    let show = |text: &str| {
        Answer { xml: Some(text.into()), ..Answer::default() }
            .deliver(std::io::stdout(), std::io::stderr())
    };
    match call::parse(std::env::args_os().skip(1)) {
        Invocation::Help => finished(show(call::USAGE).is_ok()),
        Invocation::Version => {
            finished(show(concat!("virt-usb-hook ", env!("CARGO_PKG_VERSION"), "\n")).is_ok())
        }
        Invocation::Invalid(why) => {
            drop(Answer::refused(format!("{why} (try --help)")).deliver(&mut stdout, &mut stderr));
            ExitCode::from(2)
        }
        Invocation::Handle(call) => {
            if !call.operation.may_fail() {
                virt_usb_config::panics::succeed();
            }
            let handled = handle(&call, input::read(std::io::stdin().lock()));
            let delivered = handled.answer.deliver(&mut stdout, &mut stderr);
            // The caller must not use incomplete XML, so the call fails. A restore exits 0, because
            // libvirt would remove the saved state; the `prepare` that follows decides again.
            let lost = delivered.is_err() && handled.answer.xml.is_some();
            let handled = match &delivered {
                Err(e) if lost => {
                    let handled = handled.undelivered(e);
                    let why = handled.answer.warnings.last().into_iter().cloned().collect();
                    let only = Answer { warnings: why, ..Answer::default() };
                    drop(only.deliver(std::io::sink(), &mut stderr));
                    handled
                }
                _ => handled,
            };
            journal::record(
                &handled.log,
                &call,
                handled.instance.as_deref(),
                &handled.answer,
                began.elapsed(),
            );
            if let Some(state_dir) = &handled.state_dir {
                host_env::tell_agent(state_dir, &call.op, began.elapsed(), handled.answer.exit());
            }
            let failed = lost || handled.answer.exit() != 0;
            finished(!(failed && call.operation.may_fail()))
        }
    }
}

fn finished(success: bool) -> ExitCode {
    if success { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Result of a call, with the data for its record.
#[derive(Debug)]
pub struct Handled {
    /// Answer to the caller.
    pub answer: Answer,
    /// Destination of the record.
    pub log: Log,
    /// UUID of the instance, if the XML could be read.
    pub instance: Option<String>,
    /// Directory of the agent's socket, if the configuration could be read.
    pub state_dir: Option<PathBuf>,
}

impl Handled {
    /// Adds a warning that the XML could not be written.
    fn undelivered(mut self, e: &std::io::Error) -> Self {
        self.answer = self.answer.warn(format!("cannot write the domain XML to stdout: {e}"));
        self
    }
}

/// Handles one call.
pub fn handle(call: &Call, input: Input) -> Handled {
    handle_with(Config::load(call.config.as_deref()), call, input)
}

/// Handles one call with a configuration that was loaded before.
pub fn handle_with(config: Result<Config, ConfigError>, call: &Call, input: Input) -> Handled {
    let (log, state_dir) = match &config {
        Ok(config) => (config.log.clone(), Some(config.state_dir.clone())),
        Err(e) => {
            let readable = e.readable();
            (readable.log.unwrap_or_default(), readable.state_dir)
        }
    };
    let broken = config.as_ref().err().map(ToString::to_string);
    let handled = |answer: Answer, instance| {
        // Always report an invalid configuration, even for a domain that it does not affect.
        let answer = broken.iter().fold(answer, |answer, why| answer.warn_once(why));
        Handled { answer, log, instance, state_dir }
    };
    if call.operation == Operation::Ignored {
        return handled(Answer::unchanged(NOTHING), None);
    }
    // A restore reports nothing: the `prepare` that follows gets the same XML, and refuses the
    // domain if necessary (see `incoming::hand_on`).
    let failed = |error: &HookError| match call.operation {
        Operation::Filter(Incoming::Restore) => {
            Answer::unchanged("left to prepare").warn(&error.what)
        }
        _ => answer_error(call, error),
    };
    let filter = matches!(call.operation, Operation::Filter(_));
    let xml = match whole(input, filter) {
        Ok(xml) => xml,
        Err(error) => return handled(failed(&error), None),
    };
    let unreadable = |e: XmlError| {
        let concerned = input::mentions_us(&xml) || (filter && input::mentions_hostdevs(&xml));
        HookError::of(concerned, format!("cannot read the domain XML: {e}"))
    };
    let text = match Text::new(&xml).map_err(unreadable) {
        Ok(text) => text,
        Err(error) => return handled(failed(&error), None),
    };
    let document = match text.read().map_err(unreadable) {
        Ok(document) => document,
        Err(error) => return handled(failed(&error), None),
    };
    let domain = document.domain();
    let instance = domain.uuid.map(|u| u.to_string());
    let job = Job { call, domain, document: &document, config };
    let answer = act(&job).unwrap_or_else(|error| answer_error(call, &error));
    let answer = match call.operation {
        Operation::Filter(Incoming::Restore) => incoming::hand_on(answer, &document),
        Operation::Gate => device_use::warn(answer, &job),
        _ => answer,
    };
    handled(answer, instance)
}

/// Returns the XML if all of it could be read. `filter`: the operation is a restore or migration,
/// so an unreadable domain with a hostdev must be refused.
fn whole(input: Input, filter: bool) -> Result<Vec<u8>, HookError> {
    match input {
        Input::Xml(xml) => Ok(xml),
        Input::TooLong(marks) => {
            let what = format!("the domain XML is longer than {} bytes", virt_usb_domxml::MAX_XML);
            Err(HookError::of(marks.us || (filter && marks.hostdevs), what))
        }
        Input::Broken(e) => {
            Err(HookError::of(false, format!("cannot read the domain XML from stdin: {e}")))
        }
    }
}

/// Builds the answer to an error, by the rule in [`Operation::on_error`].
fn answer_error(call: &Call, error: &HookError) -> Answer {
    match call.operation.on_error(error.concerned) {
        OnError::Closed => {
            Answer::refused(format!("{} cannot get its USB devices: {}", call.name, error.what))
        }
        OnError::Open => Answer::unchanged("continued despite an error").warn(&error.what),
    }
}

fn act(job: &Job<'_>) -> Result<Answer, HookError> {
    match &job.call.operation {
        Operation::Gate => prepare::prepare(job),
        Operation::Filter(how) => incoming::incoming(job, *how),
        Operation::Notice(Happened::Started) => lifecycle::started(job),
        Operation::Notice(Happened::Stopped) => lifecycle::stopped(job),
        Operation::Notice(Happened::Released { reason }) => lifecycle::released(job, reason),
        Operation::Adopt => lifecycle::reconnect(job),
        Operation::Ignored => Ok(Answer::unchanged(NOTHING)),
    }
}
