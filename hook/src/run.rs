//! The story of a call: read, judge, act, answer, record.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use virt_usb_domxml::{Document, Domain, Text, XmlError};
use virt_usb_store::Store;
use virt_usb_store::hints::{Hint, Known, look, may_know};

use crate::answer::Answer;
use crate::call::{self, Asked, Call, Happened, Incoming, OnFault, Operation};
use crate::config::{Config, ConfigError, Log};
use crate::input::{self, Input};
use crate::{device_use, incoming, journal, lifecycle, machine, prepare, rules};

/// Where no folder can be.
const NO_FOLDER: &str = "/dev/null";

/// What a record says of a call that was none of our business.
pub const NOTHING: &str = "nothing to do";

/// A call that could not be handled.
#[derive(Debug)]
pub struct HookError {
    /// Whether the domain asks for a device of ours or holds one: then some operations are refused.
    pub concerned: bool,
    /// What went wrong, and what to do.
    pub what: String,
}

impl HookError {
    pub(crate) fn of(concerned: bool, what: impl std::fmt::Display) -> Self {
        Self { concerned, what: what.to_string() }
    }
}

/// The program.
pub fn main() -> ExitCode {
    crate::panics::abort();
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
                crate::panics::succeed();
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
                machine::tell_agent(state_dir, &call.op, began.elapsed(), handled.answer.exit());
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
    let answer = job.act().unwrap_or_else(|fault| answer_fault(call, &fault));
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

/// One call with all that it is about.
pub(crate) struct Job<'a> {
    pub(crate) call: &'a Call,
    pub(crate) domain: &'a Domain,
    pub(crate) document: &'a Document<'a>,
    config: Result<Config, ConfigError>,
}

impl Job<'_> {
    fn act(&self) -> Result<Answer, HookError> {
        match &self.call.operation {
            Operation::Gate => prepare::prepare(self),
            Operation::Filter(how) => incoming::incoming(self, *how),
            Operation::Notice(Happened::Started) => lifecycle::started(self),
            Operation::Notice(Happened::Stopped) => lifecycle::stopped(self),
            Operation::Notice(Happened::Released { reason }) => lifecycle::released(self, reason),
            Operation::Adopt => lifecycle::reconnect(self),
            Operation::Ignored => Ok(Answer::unchanged(NOTHING)),
        }
    }

    /// The configuration, for whoever cannot do without.
    pub(crate) fn config(&self, concerned: bool) -> Result<&Config, HookError> {
        self.config.as_ref().map_err(|e| HookError::of(concerned, e))
    }

    /// Refuses a configuration that has lost the whitelist.
    pub(crate) fn admit(
        &self,
        store: &Store,
        config: &Config,
        concerned: bool,
    ) -> Result<(), HookError> {
        rules::admit(store, config, self.call.config.as_deref())
            .map_err(|e| HookError::of(concerned, e))
    }

    /// Where hints are looked for. With a wrong configuration that does not say where: a place
    /// where nothing can be looked up, so that no hint is sure.
    pub(crate) fn state_dir(&self) -> PathBuf {
        match &self.config {
            Ok(config) => config.state_dir.clone(),
            Err(e) => e.readable().state_dir.unwrap_or_else(|| NO_FOLDER.into()),
        }
    }

    /// Whether the database is worth asking about this instance.
    pub(crate) fn may_be_known(&self, state_dir: &Path) -> bool {
        let known = |id| {
            may_know(state_dir, Known::Instance(id)) || may_know(state_dir, Known::Assigned(id))
        };
        self.domain.uuid.is_some_and(known)
    }

    /// Whether this instance surely holds a device: only then may an alias of our form be ours.
    pub(crate) fn is_holder(&self, state_dir: &Path) -> bool {
        self.domain.uuid.is_some_and(|id| look(state_dir, Known::Instance(id)) == Hint::Yes)
    }

    /// Whether something is surely assigned to this instance.
    pub(crate) fn is_assigned(&self, state_dir: &Path) -> bool {
        self.domain.uuid.is_some_and(|id| look(state_dir, Known::Assigned(id)) == Hint::Yes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn where_no_folder_can_be_no_hint_is_sure() {
        assert_eq!(look(Path::new(NO_FOLDER), Known::Flavor("erp")), Hint::Unsure);
    }
}
