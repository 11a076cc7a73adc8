//! hook-harness, as a library and as the program that an operator runs.
//!
//! These tests are here and not beside the program: cargo would put a build for tests in place of
//! the program in `target/release`.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test may fail")]

mod call;
mod chain;
mod common;
mod lifecycle;
mod program;
