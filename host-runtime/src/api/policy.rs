//! Rules of authorization, as pure functions. No other code decides who may do what.
//!
//! | | reader | member | admin |
//! |---|---|---|---|
//! | read hosts and flavors | yes | yes | yes |
//! | read devices | those for its project | those for its project | all |
//! | read servers and events | those of its project | those of its project | all |
//! | attach, detach | no | servers of its project | all |
//! | change devices, flavors, owners; read and change grants | no | no | yes |
//!
//! The role is checked first, in `authorize`: a caller without the role gets 403, even if the
//! object does not exist. Then the object is checked: an object that the caller may not see gets
//! the same response as one that does not exist.

use virt_usb_model::{ProjectId, UnavailableReason};
use virt_usb_store::{ClaimRow, Record};

use super::identity::{Caller, Role};

/// A call that needs authorization.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Call {
    /// Read hosts and flavors, which belong to no project.
    Look,
    /// Read devices, servers, claims and events.
    LookAt,
    /// Attach devices to a server.
    Attach,
    /// Detach devices from a server.
    Detach,
    /// Change a device: enable, disable, tag, clear quarantine, forget. List deleted devices.
    ChangeDevice,
    /// Change the stored flavors.
    ChangeFlavor,
    /// Change the owner of a server.
    ChangeOwner,
    /// Read and change grants, which name projects.
    Grants,
}

impl Call {
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
    /// The caller does not have the role, and may know that.
    Forbidden,
    /// The caller may not see the object: the response says that it does not exist.
    Hidden,
}

/// Whether the caller's role allows the call.
pub fn may(caller: &Caller, call: Call) -> Authorization {
    if caller.role >= call.least() { Authorization::Allowed } else { Authorization::Forbidden }
}

/// Whether the caller may make the call for a server of this owner project.
pub fn may_with_server(caller: &Caller, call: Call, owner: Option<&ProjectId>) -> Authorization {
    match may(caller, call) {
        Authorization::Allowed if caller.is_admin() || caller.owns(owner) => Authorization::Allowed,
        Authorization::Allowed => Authorization::Hidden,
        denied => denied,
    }
}

/// Whether the caller may make the call for this device.
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

/// Whether the caller may know which instance holds the device.
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
