//! The states of a device.
//!
//! ```text
//!                    claim              confirm
//!   ┌──────────► available ──► claimed ──────────► allocated
//!   │ offer        │  ▲          │ ▲  ◄────────────  │ │
//!   │              │  └──────────┘ │      demote      │ │ unplug
//!   │              │    release ◄──┼──────────────────┘ ▼
//!   │   withdraw   ▼               └──────────────── removed
//! unavailable ◄────┘                   replug       (the claim outlives the device)
//! ```
//! A state is never chosen: it is *derived* from three facts ([`Status::derive`]): who holds the
//! device, whether it is plugged in, and why it is not offered, if so. What a rule or the host's
//! own use would change about a held device waits until it is free.

use alloc::string::String;
use core::fmt;
use core::str::FromStr;

use serde::{Serialize, Serializer};

use crate::ParseError;

/// Lists the values that a field may have: `a, b or c`.
fn either(names: &[&str]) -> String {
    match names {
        [] => String::new(),
        [one] => String::from(*one),
        [first @ .., last] => alloc::format!("{} or {last}", first.join(", ")),
    }
}

/// Why a device is not offered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum UnavailableReason {
    /// No whitelist rule matches it.
    Whitelist,
    /// The host uses it, and no rule names it.
    HostUse,
    /// An operator disabled it.
    Disabled,
    /// The device was used once and waits for an operator.
    Quarantined,
    /// The device connects and disconnects too often.
    Flapping,
    /// The device's host is unreachable. Never in a host's own inventory: other hosts report it.
    Unreachable,
}

impl UnavailableReason {
    /// All of them.
    pub const ALL: [Self; 6] = [
        Self::Whitelist,
        Self::HostUse,
        Self::Disabled,
        Self::Quarantined,
        Self::Flapping,
        Self::Unreachable,
    ];

    /// The spelling of the inventory's `status_reason`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Whitelist => "whitelist",
            Self::HostUse => "host-use",
            Self::Disabled => "disabled",
            Self::Quarantined => "quarantined",
            Self::Flapping => "flapping",
            Self::Unreachable => "unreachable",
        }
    }
}

impl fmt::Display for UnavailableReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}
impl FromStr for UnavailableReason {
    type Err = ParseError;
    fn from_str(text: &str) -> Result<Self, ParseError> {
        Self::ALL.into_iter().find(|r| r.name() == text).ok_or_else(|| {
            ParseError::new(alloc::format!("{text:?}"), either(&Self::ALL.map(Self::name)))
        })
    }
}
impl Serialize for UnavailableReason {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.name())
    }
}

/// State of a claim.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ClaimState {
    /// Claimed for the instance, not (or no longer) in the guest.
    Claimed,
    /// In the guest: the live domain XML shows it.
    Allocated,
}

/// The state of a device in the inventory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Status {
    /// Plugged in, offered, free.
    Available,
    /// An instance holds it; it is not in the guest.
    Claimed,
    /// The device is in the guest.
    Allocated,
    /// Unplugged while an instance holds it.
    Removed,
    /// Plugged in, but not offered.
    Unavailable(UnavailableReason),
}

impl Status {
    /// All that [`Status::name`] says.
    pub const NAMES: [&'static str; 5] =
        ["available", "claimed", "allocated", "removed", "unavailable"];

    /// The state that follows from the facts; `None` for a device that is neither plugged in nor
    /// held, which the inventory keeps as a deleted row, so that its id comes back with it.
    pub const fn derive(
        claim: Option<ClaimState>,
        present: bool,
        withheld: Option<UnavailableReason>,
    ) -> Option<Self> {
        match (claim, present, withheld) {
            (Some(_), false, _) => Some(Self::Removed),
            (Some(ClaimState::Claimed), true, _) => Some(Self::Claimed),
            (Some(ClaimState::Allocated), true, _) => Some(Self::Allocated),
            (None, true, None) => Some(Self::Available),
            (None, true, Some(reason)) => Some(Self::Unavailable(reason)),
            (None, false, _) => None,
        }
    }

    /// The spelling of the inventory's `status`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Available => "available",
            Self::Claimed => "claimed",
            Self::Allocated => "allocated",
            Self::Removed => "removed",
            Self::Unavailable(_) => "unavailable",
        }
    }

    /// Why it is unavailable.
    pub const fn reason(self) -> Option<UnavailableReason> {
        match self {
            Self::Unavailable(reason) => Some(reason),
            _ => None,
        }
    }

    /// Whether an instance holds a device in this state.
    pub const fn is_held(self) -> bool {
        matches!(self, Self::Claimed | Self::Allocated | Self::Removed)
    }

    /// Whether one event may lead from this state to `next`. A device that is not offered is never
    /// taken, and one that is held never becomes unavailable before it was given back.
    pub const fn may_become(self, next: Self) -> bool {
        match (self, next) {
            (Self::Unavailable(_), Self::Unavailable(_) | Self::Available) => true,
            (Self::Unavailable(_), _) => false,
            (_, Self::Available | Self::Unavailable(_)) => true,
            (Self::Available, Self::Removed) => false,
            (Self::Available, Self::Claimed | Self::Allocated) => true,
            (Self::Claimed | Self::Allocated | Self::Removed, _) => true,
        }
    }

    /// From the inventory's two columns.
    pub fn from_columns(status: &str, reason: Option<&str>) -> Result<Self, ParseError> {
        Ok(match status {
            "available" => Self::Available,
            "claimed" => Self::Claimed,
            "allocated" => Self::Allocated,
            "removed" => Self::Removed,
            "unavailable" => Self::Unavailable(
                reason
                    .unwrap_or_default()
                    .parse()
                    .map_err(|e: ParseError| e.at("status_reason"))?,
            ),
            other => {
                return Err(
                    ParseError::new(alloc::format!("{other:?}"), either(&Self::NAMES)).at("status")
                );
            }
        })
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())?;
        match self.reason() {
            Some(reason) => write!(f, " ({reason})"),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use alloc::string::ToString as _;

    use super::*;

    #[test]
    fn a_held_device_is_never_shown_as_free() {
        for hold in [ClaimState::Claimed, ClaimState::Allocated] {
            for present in [false, true] {
                for withheld in [None, Some(UnavailableReason::Whitelist)] {
                    let status = Status::derive(Some(hold), present, withheld).unwrap();
                    assert!(status.is_held(), "{status}");
                    assert_eq!(status == Status::Removed, !present);
                }
            }
        }
    }

    #[test]
    fn columns_read_what_they_write() {
        for hold in [None, Some(ClaimState::Claimed), Some(ClaimState::Allocated)] {
            for present in [false, true] {
                for withheld in core::iter::once(None).chain(UnavailableReason::ALL.map(Some)) {
                    let Some(status) = Status::derive(hold, present, withheld) else { continue };
                    let back = Status::from_columns(
                        status.name(),
                        status.reason().map(UnavailableReason::name),
                    )
                    .unwrap();
                    assert_eq!(back, status);
                    assert!(Status::NAMES.contains(&status.name()));
                }
            }
        }
        assert!(Status::from_columns("unavailable", None).is_err());
        assert!(Status::from_columns("free", None).is_err());
    }

    #[test]
    fn an_error_lists_all_values() {
        let error = Status::from_columns("free", None).unwrap_err().to_string();
        assert!(error.contains("available, claimed, allocated, removed or unavailable"), "{error}");
        let error = "lent".parse::<UnavailableReason>().unwrap_err().to_string();
        for reason in UnavailableReason::ALL {
            assert!(error.contains(reason.name()), "{reason}: {error}");
        }
        assert!(error.contains("flapping or unreachable"), "{error}");
    }

    #[test]
    fn what_is_not_offered_is_not_taken() {
        let off = Status::Unavailable(UnavailableReason::HostUse);
        assert!(!off.may_become(Status::Claimed) && !off.may_become(Status::Allocated));
        assert!(off.may_become(Status::Available));
        assert!(!Status::Available.may_become(Status::Removed));
        assert!(Status::Removed.may_become(Status::Allocated), "replug");
    }
}
