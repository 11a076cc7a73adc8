//! The rules of the scheduler's filter: which hosts can serve a flavor, which is best, and why the
//! others cannot.
//!
//! ```text
//! host documents ─► document ─► Draft ─► Inventory (rows, postings) ◄─ set_status, remove, touch
//!                                                │
//! flavor, project, moment, weights ─► Question ─► Plan ─► select ─► Selection (the best hosts)
//!                                                    └──► explain ─► Verdict (accepted or not)
//! ```
//! `no_std`, no IO, no clock, no floats: the same code runs in a WebAssembly sandbox and natively,
//! and answers the same.
//!
//! | module | what it does |
//! |---|---|
//! | `refusal` | why an input was not taken; questions and answers are the model's |
//! | `host_builder`, `document` | one host as it comes in: typed, or as a host document |
//! | `inventory` | the fleet: rows of devices, and its index |
//! | `posting`, `hash_index`, `keys`, `interner` | the index's parts |
//! | `plan` | a question against the index |
//! | `feasibility` | whether one host serves all requests at once, and with how many to spare |
//! | `select`, `rank`, `explain` | the answers |
//! | [`text`] | the same engine for callers that speak in strings |
#![no_std]
extern crate alloc;

mod document;
mod explain;
mod feasibility;
mod hash_index;
mod host_builder;
mod interner;
mod inventory;
mod keys;
mod plan;
mod posting;
mod rank;
mod refusal;
mod select;
pub mod text;

pub use host_builder::{Draft, DraftDevice};
pub use inventory::{Inventory, Loaded, RefusedLine};
pub use plan::Prepared;
pub use refusal::Refusal;
pub use virt_usb_model::scheduling::{
    Moment, Placement, Question, Rejection, RejectionReason, Selection, Statistics, Verdict,
    Weights,
};
