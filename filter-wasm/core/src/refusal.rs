//! Why an input was not taken.

use alloc::string::String;
use core::fmt;

/// Why an input was not taken. The inventory is as it was.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Refusal {
    /// A question, request or weight that cannot be.
    Question(String),
    /// A host that cannot be.
    Host(String),
    /// The inventory has no host of this name.
    UnknownHost(String),
    /// The host has no device of this id.
    UnknownDevice(u64),
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Question(why) | Self::Host(why) => f.write_str(why),
            Self::UnknownHost(name) => write!(f, "the inventory has no host {name:?}"),
            Self::UnknownDevice(id) => write!(f, "the host has no device {id}"),
        }
    }
}

impl core::error::Error for Refusal {}
