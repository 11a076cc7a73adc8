//! Plays steps one after the other: looks at the claims before and after each, and judges it.

use std::path::Path;

use serde_json::Value;

use crate::chain::{HookError, Request};
use crate::domain::Domain;
use crate::lifecycle::{Cycle, Event, Played, Player};
use crate::product::{Product, ProductError};
use crate::record::{CallRecord, Expect, Expected, Frame, Outcome, Play, ProductRun};

/// The harness could not go on.
#[derive(Debug, thiserror::Error)]
pub enum StageError {
    /// A hook could not be called.
    #[error(transparent)]
    Hook(#[from] HookError),
    /// `virt-usb` could not be run.
    #[error(transparent)]
    Product(#[from] ProductError),
    /// A step needs what the harness was not given.
    #[error("step {step}: {what}")]
    Missing {
        /// Number of the step, from 1.
        step: usize,
        /// Missing part of the step.
        what: String,
    },
}

/// Plays steps and keeps what came of them.
pub struct Stage<'a> {
    player: Player<'a>,
    product: Option<Product>,
    watch: &'a mut dyn FnMut(Event<'_>),
    plays: Vec<Play>,
}

impl<'a> Stage<'a> {
    /// Creates a stage. Without `product`, claims are not queried and devices cannot be discovered.
    pub fn new(
        player: Player<'a>,
        product: Option<Product>,
        watch: &'a mut dyn FnMut(Event<'_>),
    ) -> Self {
        Self { player, product, watch, plays: Vec::new() }
    }

    /// Everything that was played.
    pub fn into_plays(self) -> Vec<Play> {
        self.plays
    }

    /// The number of the step to come.
    pub fn next_step(&self) -> usize {
        self.plays.len() + 1
    }

    /// Plays a life cycle; the guest's live definition after it, `None` when it does not run.
    ///
    /// # Errors
    /// When a hook or `virt-usb` cannot be run.
    pub fn cycle(
        &mut self,
        cycle: Cycle,
        domain: &Domain,
        frame: Frame,
    ) -> Result<Option<Domain>, StageError> {
        self.hooked(cycle.name(), Some(domain), frame, |player, watch| {
            player.play(cycle, domain, watch)
        })
    }

    /// Makes one single call, with whatever text on its standard input.
    ///
    /// # Errors
    /// When a hook or `virt-usb` cannot be run.
    pub fn single(
        &mut self,
        request: &Request,
        xml: &[u8],
        domain: Option<&Domain>,
        frame: Frame,
    ) -> Result<(), StageError> {
        let action = format!("call {}", request.op);
        self.hooked(&action, domain, frame, |player, watch| player.single(request, xml, watch))?;
        Ok(())
    }

    /// Runs `virt-usb discover`. `action` is the word of the scenario for it. Returns whether the
    /// step went as expected.
    ///
    /// # Errors
    /// When it cannot be run, or no configuration is known.
    pub fn discover(
        &mut self,
        action: &str,
        sim: Option<&Path>,
        frame: Frame,
    ) -> Result<bool, StageError> {
        self.operate(action, frame, |product| product.discover(sim))
    }

    /// Runs any verb of `virt-usb`.
    ///
    /// # Errors
    /// When it cannot be run, or no configuration is known.
    pub fn operator(&mut self, args: &[String], frame: Frame) -> Result<(), StageError> {
        self.operate(&format!("virt-usb {}", args.join(" ")), frame, |product| product.run(args))
            .map(drop)
    }

    /// A step that cannot be, such as stopping a guest that does not run: often because an earlier
    /// one went wrong.
    pub(crate) fn impossible(&mut self, action: &str, frame: Frame, what: &str) {
        (self.watch)(Event::Begin { action, say: frame.say.as_deref(), domain: None });
        let mut play = Play::new(self.next_step(), action, None, frame);
        play.outcome = Outcome::Refused { op: action.to_owned(), message: what.to_owned() };
        play.problem = Some(format!("{action} cannot be: {what}"));
        self.ended(play);
    }

    fn hooked(
        &mut self,
        action: &str,
        domain: Option<&Domain>,
        frame: Frame,
        play: impl FnOnce(&Player<'_>, &mut dyn FnMut(Event<'_>)) -> Result<Played, HookError>,
    ) -> Result<Option<Domain>, StageError> {
        (self.watch)(Event::Begin { action, say: frame.say.as_deref(), domain });
        let (claims_before, mut remarks) = self.claims();
        let played = play(&self.player, self.watch)?;
        let (claims_after, more) = self.claims();
        remarks.extend(played.remarks);
        remarks.extend(more.into_iter().filter(|_| claims_before.is_some()));
        let problem = problem(&frame.expected, &played.outcome, &played.calls, None);
        let play = Play::new(self.next_step(), action, domain, frame);
        let (calls, outcome) = (played.calls, played.outcome);
        self.ended(Play { calls, outcome, remarks, claims_before, claims_after, problem, ..play });
        Ok(played.live)
    }

    fn operate(
        &mut self,
        action: &str,
        frame: Frame,
        run: impl FnOnce(&Product) -> Result<ProductRun, ProductError>,
    ) -> Result<bool, StageError> {
        let Some(product) = &self.product else {
            let what = format!(
                "{action} needs virt-usb and a configuration: give --config FILE or --scratch"
            );
            return Err(StageError::Missing { step: self.next_step(), what });
        };
        (self.watch)(Event::Begin { action, say: frame.say.as_deref(), domain: None });
        let ran = run(product)?;
        let outcome = match ran.exit {
            Some(0) => Outcome::Done,
            _ => Outcome::Refused { op: action.to_owned(), message: ran.stderr.trim().to_owned() },
        };
        let problem = problem(&frame.expected, &outcome, &[], Some(&ran));
        let as_expected = problem.is_none();
        let play = Play::new(self.next_step(), action, None, frame);
        self.ended(Play { product: Some(ran), outcome, problem, ..play });
        Ok(as_expected)
    }

    fn ended(&mut self, play: Play) {
        (self.watch)(Event::End(&play));
        self.plays.push(play);
    }

    /// Claims that cannot be read are no reason to stop: the hook is on trial, not the inventory.
    fn claims(&self) -> (Option<Value>, Vec<String>) {
        match self.product.as_ref().map(Product::claims) {
            None => (None, Vec::new()),
            Some(Ok(claims)) => (Some(claims), Vec::new()),
            Some(Err(error)) => {
                let why = anyhow::Error::from(error);
                (None, vec![format!("the claims are not known: {why:#}")])
            }
        }
    }
}

/// Why a step is not as it should be.
fn problem(
    expected: &Expected,
    outcome: &Outcome,
    calls: &[CallRecord],
    product: Option<&ProductRun>,
) -> Option<String> {
    if let Some((op, hang)) = calls.iter().find_map(|call| Some((&call.op, call.hang.as_ref()?))) {
        return Some(format!("{op}: {hang}"));
    }
    match (expected.outcome, outcome) {
        (Expect::Ok, Outcome::Refused { op, message }) => {
            return Some(format!("{op} was refused: {message}"));
        }
        (Expect::Veto, Outcome::Done) => {
            return Some("it went through where a refusal was expected".to_owned());
        }
        _ => {}
    }
    let ignored = calls
        .iter()
        .find(|call| matches!(call.op.as_str(), "stopped" | "release") && call.message.is_some());
    if let Some(call) = ignored {
        return Some(format!(
            "{} failed: {}",
            call.op,
            call.message.as_deref().unwrap_or_default()
        ));
    }
    let stderr =
        || calls.iter().map(|c| c.stderr.as_str()).chain(product.map(|p| p.stderr.as_str()));
    let stdout =
        || calls.iter().map(|c| c.stdout.as_str()).chain(product.map(|p| p.stdout.as_str()));
    unsaid("standard error", expected.stderr.as_deref(), &stderr().collect::<Vec<_>>()).or_else(
        || unsaid("standard output", expected.stdout.as_deref(), &stdout().collect::<Vec<_>>()),
    )
}

fn unsaid(stream: &str, wanted: Option<&str>, said: &[&str]) -> Option<String> {
    let wanted = wanted?;
    if said.iter().any(|text| text.contains(wanted)) {
        return None;
    }
    let all = said.concat();
    let said = if all.trim().is_empty() { "it is empty" } else { all.trim() };
    Some(format!("the {stream} does not say {wanted:?}: {said}"))
}
