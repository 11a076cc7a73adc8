//! Kinds of events of the audit trail.

use alloc::format;
use core::fmt;
use core::str::FromStr;

use crate::ParseError;

/// Kind of an event. The inventory stores its [name](EventKind::name).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum EventKind {
    /// An operator or a flavor assigned a request to an instance.
    Assigned,
    /// An assignment ended.
    Unassigned,
    /// An instance claimed a device.
    Claimed,
    /// The device is in the guest.
    Allocated,
    /// The device left the guest; the claim continues.
    Detached,
    /// A claim ended.
    Released,
    /// A request could not be satisfied.
    Refused,
    /// A claim of an earlier boot, or one that was never confirmed, ended.
    Voided,
    /// An operator ended all claims of an instance.
    Forced,
    /// A device that was already in a guest got a claim.
    Adopted,
    /// Something keeps a device out of a guest.
    Problem,
    /// A problem ended.
    Solved,
    /// A new device was plugged in.
    Added,
    /// A device was seen with another address or other properties.
    Changed,
    /// A device was unplugged.
    Removed,
    /// A known device was plugged in again.
    Returned,
    /// The descriptors of a device changed since it was claimed.
    Altered,
    /// Another device of the same kind has the same serial.
    SerialShared,
    /// A device connects and disconnects too often.
    Flapping,
    /// A flapping device is available again.
    Steady,
    /// A device waits for an operator.
    Quarantined,
    /// An operator ended a quarantine.
    Cleared,
    /// An operator disabled a device.
    Disabled,
    /// An operator enabled a device.
    Enabled,
    /// An operator changed the tags of a device.
    Tagged,
    /// The row of an unplugged device was deleted.
    Forgotten,
    /// A flavor was stored.
    FlavorSet,
    /// A flavor was removed.
    FlavorRemoved,
    /// A grant was stored.
    GrantSet,
    /// A grant was removed.
    GrantRemoved,
    /// The owner of an instance was set.
    OwnerSet,
    /// The owner of an instance was removed.
    OwnerCleared,
    /// The host joined a fleet, and its devices got new ids.
    Renumbered,
    /// The inventory was restored from a backup.
    Restored,
    /// The inventory was rebuilt.
    Rebuilt,
}

impl EventKind {
    /// All kinds of events.
    pub const ALL: [Self; 35] = [
        Self::Assigned,
        Self::Unassigned,
        Self::Claimed,
        Self::Allocated,
        Self::Detached,
        Self::Released,
        Self::Refused,
        Self::Voided,
        Self::Forced,
        Self::Adopted,
        Self::Problem,
        Self::Solved,
        Self::Added,
        Self::Changed,
        Self::Removed,
        Self::Returned,
        Self::Altered,
        Self::SerialShared,
        Self::Flapping,
        Self::Steady,
        Self::Quarantined,
        Self::Cleared,
        Self::Disabled,
        Self::Enabled,
        Self::Tagged,
        Self::Forgotten,
        Self::FlavorSet,
        Self::FlavorRemoved,
        Self::GrantSet,
        Self::GrantRemoved,
        Self::OwnerSet,
        Self::OwnerCleared,
        Self::Renumbered,
        Self::Restored,
        Self::Rebuilt,
    ];

    /// The spelling in the inventory and in the API.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Assigned => "assigned",
            Self::Unassigned => "unassigned",
            Self::Claimed => "claimed",
            Self::Allocated => "allocated",
            Self::Detached => "detached",
            Self::Released => "released",
            Self::Refused => "refused",
            Self::Voided => "voided",
            Self::Forced => "forced",
            Self::Adopted => "adopted",
            Self::Problem => "problem",
            Self::Solved => "solved",
            Self::Added => "added",
            Self::Changed => "changed",
            Self::Removed => "removed",
            Self::Returned => "returned",
            Self::Altered => "altered",
            Self::SerialShared => "serial-shared",
            Self::Flapping => "flapping",
            Self::Steady => "steady",
            Self::Quarantined => "quarantined",
            Self::Cleared => "cleared",
            Self::Disabled => "disabled",
            Self::Enabled => "enabled",
            Self::Tagged => "tagged",
            Self::Forgotten => "forgotten",
            Self::FlavorSet => "flavor-set",
            Self::FlavorRemoved => "flavor-removed",
            Self::GrantSet => "grant-set",
            Self::GrantRemoved => "grant-removed",
            Self::OwnerSet => "owner-set",
            Self::OwnerCleared => "owner-cleared",
            Self::Renumbered => "renumbered",
            Self::Restored => "restored",
            Self::Rebuilt => "rebuilt",
        }
    }

    /// Whether an operator should look at the event.
    pub const fn needs_attention(self) -> bool {
        match self {
            Self::Refused
            | Self::Problem
            | Self::Altered
            | Self::SerialShared
            | Self::Quarantined
            | Self::Flapping => true,
            Self::Assigned
            | Self::Unassigned
            | Self::Claimed
            | Self::Allocated
            | Self::Detached
            | Self::Released
            | Self::Voided
            | Self::Forced
            | Self::Adopted
            | Self::Solved
            | Self::Added
            | Self::Changed
            | Self::Removed
            | Self::Returned
            | Self::Steady
            | Self::Cleared
            | Self::Disabled
            | Self::Enabled
            | Self::Tagged
            | Self::Forgotten
            | Self::FlavorSet
            | Self::FlavorRemoved
            | Self::GrantSet
            | Self::GrantRemoved
            | Self::OwnerSet
            | Self::OwnerCleared
            | Self::Renumbered
            | Self::Restored
            | Self::Rebuilt => false,
        }
    }
}

impl fmt::Display for EventKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for EventKind {
    type Err = ParseError;
    fn from_str(text: &str) -> Result<Self, ParseError> {
        Self::ALL
            .into_iter()
            .find(|kind| kind.name() == text)
            .ok_or_else(|| ParseError::new(format!("{text:?}"), "a kind of event"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_name_is_read_as_its_kind() {
        for kind in EventKind::ALL {
            assert_eq!(kind.name().parse(), Ok(kind));
        }
        assert!("eaten".parse::<EventKind>().is_err());
    }
}
