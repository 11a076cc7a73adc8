//! The store through its public doors: against a model, against damage, against others at the same
//! time.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test may panic")]

mod common;
mod concurrency;
mod damage;
mod dismiss;
mod files;
mod grants;
mod life;
mod model;
mod owners;
mod property;
mod quarantine;
mod recover;
mod schema;
