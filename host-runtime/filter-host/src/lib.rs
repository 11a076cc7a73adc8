//! Loads a scheduler filter, bounds it, feeds it and asks it.
//!
//! A filter is a WebAssembly component of the world `virt-usb:scheduler/filter@0.1.0` (see `wit/`).
//! It says which hosts of a fleet can serve what a flavor asks for, which is best, and why the
//! others cannot. It imports nothing and is bounded in memory and time, so a scheduler need not
//! trust it: it can be wrong, but it can do nothing.
//!
//! ```no_run
#![doc = include_str!("../examples/scheduler.rs")]
//! ```
//!
//! # What can happen
//! | | means | do |
//! |---|---|---|
//! | `Ok(`[`Verdict::Rejected`]`)`, a [`Selection`] without placements | an answer: the fleet has no such device now | tell the user why |
//! | [`Error::Refused`] | the question cannot be | mend the flavor; asking again will not help |
//! | [`Error::Broken`] | the filter failed: too slow, too large, trapped, nonsense | tell the operator; it is never "no host" |
//! | [`LoadError`] | the file is no filter, or not the one that is wanted | tell the operator |
//!
//! After a fault the next call begins with a fresh instance, which is fed the fleet again.
//!
//! # Threads
//! [`Filter`] and [`Fleet`] are shared; each thread has a [`Session`] of its own, made when it first needs one. A scheduler that forks
//! loads the filter after the fork: the thread that counts epochs does not survive one, and without it no call is stopped. A session follows the fleet: before it asks it feeds what has changed since its last question.
//!
//! # Precompiled filters
//! Compiling takes some 50 ms. [`Filter::precompile`] gives machine code that [`Filter::load`] takes in its place in less than one. Machine code is
//! trusted: it must be pinned by [`Options::sha256`], or belong to root or to the running user and be writable by no other user.

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
