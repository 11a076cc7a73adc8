//! Authorization in one table. No other code decides it. Pure. A call that no line allows is
//! denied.
//!
//! | | reader | member | admin |
//! |---|---|---|---|
//! | look at hosts, flavors | yes | yes | yes |
//! | look at devices | those for its project | those for its project | all |
//! | look at servers and their events | its project's | its project's | all |
//! | attach, detach | | its project's servers | all |
//! | change devices, flavors, owners; look at grants and change them | | | yes |
//!
//! The role is checked first: a caller without the role is refused regardless of the object. Then
//! the object is checked: an object of another project does not exist for the caller.

use virt_usb_model::{ProjectId, UnavailableReason};
use virt_usb_store::{ClaimRow, Record};

use super::identity::{Caller, Role};

/// A call that needs authorization.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Call {
    /// Read hosts and flavors, which belong to no project.
    Look,
    /// A device, a server, its events.
    LookAt,
    /// Gives a server a device.
    Attach,
    /// Takes one back.
    Detach,
    /// Devices: enable, disable, tags, clearing of quarantine.
    ChangeDevice,
    /// Change the stored flavors.
    ChangeFlavor,
    /// Change the owner of a server.
    ChangeOwner,
    /// Grants: to look at them too, for they name projects.
    Grants,
}

impl Call {
    /// All calls, in order.
    pub const ALL: [Self; 8] = [
        Self::Look,
        Self::LookAt,
        Self::Attach,
        Self::Detach,
        Self::ChangeDevice,
        Self::ChangeFlavor,
        Self::ChangeOwner,
        Self::Grants,
    ];

    /// Lowest role that may make the call.
    pub(super) const fn least(self) -> Role {
        match self {
            Self::Look | Self::LookAt => Role::Reader,
            Self::Attach | Self::Detach => Role::Member,
            Self::ChangeDevice | Self::ChangeFlavor | Self::ChangeOwner | Self::Grants => {
                Role::Admin
            }
        }
    }
}

/// Result of an authorization check.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Authorization {
    /// The call is allowed.
    Allowed,
    /// No, and it may know that.
    Forbidden,
    /// The response says that the object does not exist.
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

/// Whether the device is visible to the caller: its project holds the device, or the whitelist or a
/// grant gives the project access, or the device is available to all projects.
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
