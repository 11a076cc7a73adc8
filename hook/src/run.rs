//! The story of a call: read, judge, act, answer, record.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use virt_usb_config::{Config, ConfigError, Log, host_env};
use virt_usb_domxml::{Text, XmlError};

use crate::answer::Answer;
use crate::call::{self, Asked, Call, Happened, Incoming, OnFault, Operation};
use crate::input::{self, Input};
use crate::job::{HookError, Job, NOTHING};
use crate::{device_use, incoming, journal, lifecycle, prepare};

/// The program.
pub fn main() -> ExitCode {
    virt_usb_config::panics::abort();
    let began = Instant::now();
    let (mut stdout, mut stderr) = (std::io::stdout(), std::io::stderr());
    let show = |text: &str| {
        Answer { xml: Some(text.into()), ..Answer::default() }
            .deliver(std::io::stdout(), std::io::stderr())
    };
    match call::parse(std::env::args_os().skip(1)) {
        Asked::Help => finished(show(call::USAGE).is_ok()),
        Asked::Version => {
            finished(show(concat!("virt-usb-hook ", env!("CARGO_PKG_VERSION"), "\n")).is_ok())
        }
        Asked::Wrong(why) => {
            drop(Answer::refused(format!("{why} (try --help)")).deliver(&mut stdout, &mut stderr));
            ExitCode::from(2)
        }
        Asked::Handle(call) => {
            if !call.operation.may_fail() {
                virt_usb_config::panics::succeed();
            }
            let handled = handle(&call, input::read(std::io::stdin().lock()));
            let delivered = handled.answer.deliver(&mut stdout, &mut stderr);
            // Half of an XML must not be taken for all of it. A restore that fails here would cost
            // the saved state: it goes on as if nothing had been printed, and the prepare that
            // follows refuses what cannot be.
            let lost = delivered.is_err() && handled.answer.xml.is_some();
            let handled = match &delivered {
                Err(e) if lost => {
                    let handled = handled.unheard(e);
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

fn finished(well: bool) -> ExitCode {
    if well { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// A call's answer, and what its record needs.
#[derive(Debug)]
pub struct Handled {
    /// For the caller.
    pub answer: Answer,
    /// Where the record goes.
    pub log: Log,
    /// The instance's UUID, where the XML said it.
    pub instance: Option<String>,
    /// Where an agent would listen, where the configuration could be read.
    pub state_dir: Option<PathBuf>,
}

impl Handled {
    /// The caller did not take what was printed.
    fn unheard(mut self, e: &std::io::Error) -> Self {
        self.answer = self.answer.warn(format!("cannot write the domain XML to stdout: {e}"));
        self
    }
}

/// Handles one call.
pub fn handle(call: &Call, input: Input) -> Handled {
    handle_with(Config::load(call.config.as_deref()), call, input)
}

/// Handles one call by a configuration that was read already.
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
        // A wrong configuration is never passed over in silence, even for a domain that it cannot
        // hurt.
        let answer = broken.iter().fold(answer, |answer, why| answer.warn_once(why));
        Handled { answer, log, instance, state_dir }
    };
    if call.operation == Operation::Ignored {
        return handled(Answer::unchanged(NOTHING), None);
    }
    // At a restore nothing is said yet: the prepare that follows gets the same XML, and refuses
    // whom it concerns (see incoming::hand_on).
    let failed = |fault: &HookError| match call.operation {
        Operation::Filter(Incoming::Restore) => {
            Answer::unchanged("left to prepare").warn(&fault.what)
        }
        _ => answer_fault(call, fault),
    };
    let filter = matches!(call.operation, Operation::Filter(_));
    let xml = match whole(input, filter) {
        Ok(xml) => xml,
        Err(fault) => return handled(failed(&fault), None),
    };
    let unreadable = |e: XmlError| {
        let concerned = input::mentions_us(&xml) || (filter && input::mentions_hostdevs(&xml));
        HookError::of(concerned, format!("cannot read the domain XML: {e}"))
    };
    let text = match Text::new(&xml).map_err(unreadable) {
        Ok(text) => text,
        Err(fault) => return handled(failed(&fault), None),
    };
    let document = match text.read().map_err(unreadable) {
        Ok(document) => document,
        Err(fault) => return handled(failed(&fault), None),
    };
    let domain = document.domain();
    let instance = domain.uuid.map(|u| u.to_string());
    let job = Job { call, domain, document: &document, config };
    let answer = act(&job).unwrap_or_else(|fault| answer_fault(call, &fault));
    let answer = match call.operation {
        Operation::Filter(Incoming::Restore) => incoming::hand_on(answer, &document),
        Operation::Gate => device_use::warn(answer, &job),
        _ => answer,
    };
    handled(answer, instance)
}

/// The XML, if all of it could be read. `filter`: what holds a hostdev must not pass unread.
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

/// Open or closed: the rule stands in [`Operation::on_fault`].
fn answer_fault(call: &Call, fault: &HookError) -> Answer {
    match call.operation.on_fault(fault.concerned) {
        OnFault::Closed => {
            Answer::refused(format!("{} cannot get its USB devices: {}", call.name, fault.what))
        }
        OnFault::Open => Answer::unchanged("went on in spite of a fault").warn(&fault.what),
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
