//! Runs a scheduler filter: loads it, limits its resources, feeds it with host documents, and calls
//! it.
//!
//! A filter is a WebAssembly component of the world `virt-usb:scheduler/filter@0.1.0` (see `wit/`).
//! It determines which hosts of a fleet can serve a flavor, which of them is best, and why the
//! others cannot. It imports nothing, and its memory and time are limited, so a scheduler need not
//! trust it: its answer may be wrong, but it cannot do anything else.
//!
//! ```no_run
#![doc = include_str!("../examples/scheduler.rs")]
//! ```
//!
//! # Results and errors
//! - `Ok(`[`Verdict::Rejected`]`)`, or a [`Selection`] without placements, is an answer: no host
//!   has such a device now. Show the user the reason.
//! - [`Error::Refused`]: the question is invalid. Fix the flavor; a retry does not help.
//! - [`Error::Broken`]: the filter was too slow, needed too much memory, trapped, or returned an
//!   invalid answer. Report it to the operator. It never means "no host".
//! - [`LoadError`]: the file is not a filter, or not the pinned one. Report it to the operator.
//!
//! After [`Error::Broken`], the next call uses a new instance, which is fed the whole fleet.
//!
//! # Threads
//! [`Filter`] and [`Fleet`] are shared; each thread creates its own [`Session`]. Before each call,
//! a session feeds its instance the changes of the fleet since the previous call. A scheduler that
//! forks must load the filter after the fork: the thread that counts epochs does not survive a
//! fork, and without it no call is stopped.
//!
//! # Precompiled filters
//! Compiling takes about 50 ms. [`Filter::precompile`] returns machine code that [`Filter::load`]
//! loads in less than 1 ms. Machine code is trusted: either [`Options::sha256`] pins it, or it
//! belongs to root or the running user, and no other user may write to it.

mod bindings;
mod error;
mod filter;
mod fleet;
mod instance;
mod session;

pub use error::{DocumentError, Error, Fault, LoadError};
pub use filter::{Filter, Limits, Options, hex, sha256};
pub use fleet::Fleet;
pub use session::{Prepared, Session};
pub use virt_usb_model::scheduling::{
    Moment, Placement, Question, Rejection, RejectionReason, Selection, Statistics, Verdict,
    Weights,
};
