//! Taking devices for an instance: all that it asks for, or none.
//!
//! ```text
//! write lock ─► sweep ─► candidates ─► matching ─► verify each device ─► fits? ─► write ─► commit
//!                            ▲                          │ another device
//!                            └──────────────────────────┘
//! ```
//! Everything happens under the write lock: of two hooks that run at once, the second sees what the
//! first has done.

use virt_usb_model::{DeviceId, DeviceRequest, InstanceId, ProjectId};

use crate::allocate::Choice;
use crate::claim_write::ClaimWrite;
use crate::device::{ClaimRow, Location, Record};
use crate::events::{Event, record};
use crate::hints::Hints;
use crate::open::{Tx, TxError};
use crate::{Context, Store, StoreError, release};

/// The instance and owner for which devices are claimed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Claimant {
    /// UUID of the instance.
    pub instance: InstanceId,
    /// The domain's name, for messages.
    pub domain: String,
    /// The project that owns it; `None`: unknown.
    pub project: Option<ProjectId>,
}

/// One request of the instance.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClaimRequest {
    /// The devices that the instance requests.
    pub request: DeviceRequest,
    /// Whether the claim outlives the run of the guest.
    pub lasting: bool,
    /// Position among the instance's requests, if it differs from the position here.
    pub number: Option<u32>,
}

impl ClaimRequest {
    /// The request at its own position.
    pub const fn new(request: DeviceRequest, lasting: bool) -> Self {
        Self { request, lasting, number: None }
    }
}

/// Whether a claim stands, or waits for the step that follows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ClaimMode {
    /// Made at prepare: what the instance holds and did not ask for again is given back.
    Replace,
    /// Made while the guest runs, beside all that it holds: that stays, and serves none of these
    /// requests.
    Add,
    /// Claim of an incoming restore or migration: void unless confirmed within
    /// [`crate::Context::pending_grace`]. A firm claim of the instance does not change, it only
    /// records that it was named: the guest may be running, or may fail to arrive.
    Provisional,
}

/// Result of the check at a candidate's port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verified {
    /// The device, at this port and address.
    Here(Location),
    /// Not the device: why, in words.
    Not(String),
}

/// Checks that the caller makes while devices are chosen. They run under the write lock and must be
/// quick.
pub trait ClaimVerifier {
    /// Looks at the candidate's port.
    fn verify(&mut self, candidate: &Record) -> Verified;
    /// Whether the guest can take these devices; `Err` says why not.
    ///
    /// # Errors
    /// The reason, in words, to be shown to the user.
    fn fits(&mut self, chosen: &[Granted]) -> Result<(), String>;
}

/// A device that the instance has now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Granted {
    /// The device, at the port and address where it was verified.
    pub device: Record,
    /// Index of the request that the device serves, from 0.
    pub request: usize,
    /// Whether it was the instance's already.
    pub already: bool,
    /// Where the inventory had it until now.
    pub(crate) stored: Location,
}

/// How a claim ended.
#[derive(Debug, Clone, PartialEq)]
pub enum Claimed {
    /// The instance has all that it asked for.
    Granted(Vec<Granted>),
    /// Not enough devices; nothing was taken.
    Short(Vec<Shortage>),
    /// The guest cannot take them; nothing was taken.
    Unfit(String),
}

/// A request that cannot be served, and what there is for it.
#[derive(Debug, Clone, PartialEq)]
pub struct Shortage {
    /// The request's position, counted from 0.
    pub number: usize,
    /// The unsatisfied request.
    pub request: DeviceRequest,
    /// How many of `count` could be had.
    pub got: u32,
    /// The other matching devices of this host, each with its obstacle. At most [`SHOWN`].
    pub matching: Vec<Obstacle>,
    /// How many match in all, those that could be had too.
    pub total: usize,
}

/// How many devices a shortage lists.
pub const SHOWN: usize = 8;

/// Reason why a matching device cannot serve a request.
#[derive(Debug, Clone, PartialEq)]
pub struct Obstacle {
    /// The matching device.
    pub device: Record,
    /// Why it cannot be had.
    pub why: Why,
}

/// Why a matching device cannot be had.
#[derive(Debug, Clone, PartialEq)]
pub enum Why {
    /// Another instance has it.
    HeldBy(Box<ClaimRow>),
    /// The device serves another request of the same instance.
    OtherRequest,
    /// The device is unavailable.
    Unavailable,
    /// The device is available to other projects only.
    Project,
    /// The device is not at its port, with the reason from [`Verified::Not`].
    NotThere(String),
}

impl Store {
    /// Takes all devices that `requests` asks for, or none. A second call returns the same claim.
    /// Other devices of the instance (an older flavor's) are released, except those that were
    /// adopted from the domain's own XML. `prefer` lists the devices that the domain's XML holds:
    /// they are chosen before others, and a firm claim keeps them in any case.
    ///
    /// # Errors
    /// When the database cannot be written; then nothing was taken.
    pub fn claim(
        &mut self,
        claimant: &Claimant,
        requests: &[ClaimRequest],
        prefer: &[DeviceId],
        mode: ClaimMode,
        verifier: &mut dyn ClaimVerifier,
        context: &Context,
    ) -> Result<Claimed, StoreError> {
        self.write(|tx, hints| take(tx, hints, claimant, requests, prefer, mode, verifier, context))
    }
}

/// [`Store::claim`], within a transaction.
#[expect(clippy::too_many_arguments, reason = "the claim's own, and where it is written")]
pub(crate) fn take(
    tx: &Tx<'_>,
    hints: &Hints,
    claimant: &Claimant,
    requests: &[ClaimRequest],
    prefer: &[DeviceId],
    mode: ClaimMode,
    verifier: &mut dyn ClaimVerifier,
    context: &Context,
) -> Result<Claimed, TxError> {
    release::sweep(tx, context)?;
    let choice = Choice::new(tx, claimant, prefer, mode, verifier)?;
    take_of(choice, hints, requests, context)
}

/// [`take`], of what is left to choose from.
pub(crate) fn take_of(
    mut choice: Choice<'_>,
    hints: &Hints,
    requests: &[ClaimRequest],
    context: &Context,
) -> Result<Claimed, TxError> {
    let Choice { tx, claimant, prefer, mode, .. } = choice;
    let outcome = match choice.choose(requests)? {
        Err(short) => Claimed::Short(short),
        Ok(chosen) => match choice.fits(&chosen) {
            Err(why) => Claimed::Unfit(why),
            Ok(()) => Claimed::Granted(chosen),
        },
    };
    let refused = match &outcome {
        Claimed::Granted(chosen) => {
            let mine = choice.mine();
            ClaimWrite { tx, hints, claimant, mine, prefer, mode, context }
                .write(requests, chosen)?;
            return Ok(outcome);
        }
        Claimed::Short(short) => short
            .iter()
            .map(|s| {
                format!(
                    "usb_devices[{}] {}: {} of {} available",
                    s.number, s.request, s.got, s.request.count
                )
            })
            .collect::<Vec<_>>()
            .join("; "),
        Claimed::Unfit(why) => why.clone(),
    };
    record(tx, context, &Event::of("refused", claimant).with(refused))?;
    Ok(outcome)
}
