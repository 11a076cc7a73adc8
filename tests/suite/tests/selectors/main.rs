//! One meaning of selectors: the model's table of keys, its parsers and its matching; the store's
//! SQL; the filter's index; the schema of the API; the validator for Nova; and the texts that list
//! the keys.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

mod listed;
mod matching;
mod reading;
