//! Calls a libvirt hook exactly as libvirtd does, and plays the life of a guest with it.
//!
//! ```text
//! scenario ─┐                       ┌─ chain: qemu, then qemu.d/*      (virHookCall)
//! command ──┴─► stage ─► lifecycle ─┤
//!                 │                 └─► call: four arguments, a pipe   (virCommandRun)
//!                 └─► product: `virt-usb discover`, `virt-usb claims`
//! ```
//!
//! [`call`](call()) is one call of one executable; [`Hooks`] is what lies in `/etc/libvirt/hooks`;
//! [`Player`] knows which calls a start, a stop or a migration is made of and what libvirt does
//! when one of them fails; [`Stage`] remembers what each domain is doing and looks at the claims
//! before and after.
//!
//! The products are talked to as programs only, so that the harness judges what an operator
//! installs. Where libvirt's own behaviour decides, the comment names its file and function (read
//! in 9.0.0 and later).

mod call;
mod chain;
mod domain;
mod lifecycle;
mod product;
mod record;
mod scenario;
mod scratch;
mod stage;
mod surroundings;

pub mod diff;
pub mod story;

pub use call::{Answer, Call, Exit, Hang, Settings, call};
pub use chain::{Chained, HookError, Hooks, Link, Request, Script};
pub use domain::{Domain, DomainError, FLAVOR_NAMESPACE};
pub use lifecycle::{Cycle, Event, Initiator, Played, Player};
pub use product::{Product, ProductError};
pub use record::{
    CallOutcome, CallRecord, Expect, Expected, Frame, Outcome, OutputFate, Play, ProductRun, Report,
};
pub use scenario::{Action, Scenario, ScenarioError, Step, default_subop};
pub use scratch::{Scratch, ScratchError};
pub use stage::{Stage, StageError};
pub use surroundings::{differences, environment};
