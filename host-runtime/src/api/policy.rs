//! Who may do what: one table, and nothing else decides it. Pure. What no line allows is denied.
//!
//! | | reader | member | admin |
//! |---|---|---|---|
//! | look at hosts, flavors | yes | yes | yes |
//! | look at devices | those for its project | those for its project | all |
//! | look at servers and their events | its project's | its project's | all |
//! | attach, detach | | its project's servers | all |
//! | change devices, flavors, owners; look at grants and change them | | | yes |
//!
//! The role is looked at first: who may not do it at all is told so, whatever there is. Then the
//! object: what is not one's own is not there.

use virt_usb_model::{ProjectId, UnavailableReason};
use virt_usb_store::{ClaimRow, Record};

use super::identity::{Caller, Role};

/// What is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Call {
    /// Hosts, flavors: nobody's own.
    Freshness,
    /// A device, a server, its events.
    LookAt,
    /// Gives a server a device.
    Attach,
    /// Takes one back.
    Detach,
    /// Devices: enable, disable, tags, clearing of quarantine.
    ChangeDevice,
    /// Flavors.
    ChangeFlavor,
    /// Whose a server is.
    ChangeOwner,
    /// Grants: to look at them too, for they name projects.
    Grants,
}

impl Call {
    /// All calls.
    pub const ALL: [Self; 8] = [
        Self::Freshness,
        Self::LookAt,
        Self::Attach,
        Self::Detach,
        Self::ChangeDevice,
        Self::ChangeFlavor,
        Self::ChangeOwner,
        Self::Grants,
    ];

    /// The least role that may.
    const fn least(self) -> Role {
        match self {
            Self::Freshness | Self::LookAt => Role::Reader,
            Self::Attach | Self::Detach => Role::Member,
            Self::ChangeDevice | Self::ChangeFlavor | Self::ChangeOwner | Self::Grants => {
                Role::Admin
            }
        }
    }
}

/// May it?
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Authorization {
    /// Yes.
    Allowed,
    /// No, and it may know that.
    Forbidden,
    /// It is told that there is no such thing.
    Hidden,
}

/// Whether the role allows the call at all.
pub fn may(caller: &Caller, call: Call) -> Authorization {
    if caller.role >= call.least() { Authorization::Allowed } else { Authorization::Forbidden }
}

/// Whether the caller may do this with a server of that project.
pub fn may_with_server(caller: &Caller, call: Call, owner: Option<&ProjectId>) -> Authorization {
    match may(caller, call) {
        Authorization::Allowed if caller.is_admin() || caller.owns(owner) => Authorization::Allowed,
        Authorization::Allowed => Authorization::Hidden,
        denied => denied,
    }
}

/// Whether the caller may do this with that device.
pub fn may_with_device(
    caller: &Caller,
    call: Call,
    device: &Record,
    claim: Option<&ClaimRow>,
) -> Authorization {
    match may(caller, call) {
        Authorization::Allowed if caller.is_admin() || is_for(caller, device, claim) => {
            Authorization::Allowed
        }
        Authorization::Allowed => Authorization::Hidden,
        denied => denied,
    }
}

/// Whether the caller may know who has the device.
pub fn may_know_holder(caller: &Caller, claim: &ClaimRow) -> bool {
    let owner: Option<ProjectId> =
        claim.project_id.as_deref().and_then(|project| project.parse().ok());
    caller.is_admin() || caller.owns(owner.as_ref())
}

/// What the caller's project holds is its own to see; else what the whitelist or a grant gives to
/// it, or what is for everybody.
fn is_for(caller: &Caller, device: &Record, claim: Option<&ClaimRow>) -> bool {
    if claim.is_some_and(|claim| may_know_holder(caller, claim)) {
        return true;
    }
    let offered = !matches!(
        device.rule_withheld,
        Some(UnavailableReason::Whitelist | UnavailableReason::HostUse)
    );
    let projects = &device.entry.projects;
    offered
        && device.deleted == 0
        && (projects.is_empty() || projects.iter().any(|p| caller.owns(Some(p))))
}
