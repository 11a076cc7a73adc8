use alloc::string::{String, ToString};
use core::fmt;

use crate::clean_start;

/// An error in text that a person or a program wrote, with its place.
///
/// Displays as `AT: found FOUND, wanted WANTED`, where `AT` is a path such as
/// `usb_devices[1].vendor_id`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ParseError {
    at: String,
    found: String,
    wanted: String,
}

/// Longer input is cut in messages, so that a hostile value cannot fill a log.
const SHOWN: usize = 80;

impl ParseError {
    /// An error about `found`, which should have been `wanted`. Where it stands is added by
    /// [`ParseError::at`].
    pub fn new(found: impl fmt::Display, wanted: impl Into<String>) -> Self {
        Self {
            at: String::new(),
            found: clean_start(&found.to_string(), SHOWN),
            wanted: wanted.into(),
        }
    }

    /// The same error, one step further out: `step` is a key (`vendor_id`) or an index (`[2]`).
    #[must_use]
    pub fn at(mut self, step: &str) -> Self {
        let dot = if self.at.is_empty() || self.at.starts_with('[') { "" } else { "." };
        self.at = alloc::format!("{step}{dot}{}", self.at);
        self
    }

    /// The path to the place in the input, empty when the whole input is meant.
    pub fn place(&self) -> &str {
        &self.at
    }
}

impl fmt::Display for ParseError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !self.at.is_empty() {
            write!(f, "{}: ", self.at)?;
        }
        write!(f, "found {}, wanted {}", self.found, self.wanted)
    }
}

impl core::error::Error for ParseError {}
