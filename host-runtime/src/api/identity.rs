//! Authentication of callers. An implementation of [`Identity`] validates a token: the
//! [file of tokens](super::tokens) or [Keystone](super::keystone).

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::str::FromStr;

use virt_usb_model::ProjectId;

use super::keystone::Keystone;
use super::tokens::{PREFIX, Tokens};

/// Role of a caller; each role includes the permissions of those before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Role {
    /// Reads the devices, servers and events of its project.
    Reader,
    /// Also attaches devices to its project's servers, and detaches them.
    Member,
    /// Makes every call, for every project.
    Admin,
}

impl Role {
    /// All roles, in order.
    pub const ALL: [Self; 3] = [Self::Reader, Self::Member, Self::Admin];

    /// Name of the role in tokens, in the configuration and in responses.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Reader => "reader",
            Self::Member => "member",
            Self::Admin => "admin",
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Role {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let found = Self::ALL.into_iter().find(|role| role.name() == text);
        found.ok_or_else(|| format!("found {text:?}, wanted reader, member or admin"))
    }
}

/// An authenticated caller.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Caller {
    /// Name of the token or the user, for the audit trail and the log.
    pub name: String,
    /// Project that the caller acts for; `None` for root and the agent's group on the host itself.
    pub project: Option<ProjectId>,
    /// Role of the caller.
    pub role: Role,
}

impl Caller {
    /// Whether the caller may see and change everything.
    pub fn is_admin(&self) -> bool {
        self.role == Role::Admin
    }

    /// Whether the caller acts for the owner project of an object.
    pub fn owns(&self, project: Option<&ProjectId>) -> bool {
        matches!((&self.project, project), (Some(own), Some(owner)) if own.is(owner))
    }
}

/// Reason why a token identifies no caller.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AuthError {
    /// The token does not exist or has expired; the response does not reveal which.
    InvalidToken,
    /// The token is valid, but not usable here; the text tells its owner why.
    Unusable(String),
    /// The token cannot be validated, with the reason for the log.
    Unavailable(String),
}

/// How fresh the validation of a token must be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Freshness {
    /// Use only cached results.
    CachedOnly,
    /// Accept a recent result.
    Cached,
    /// Validate now, because the request changes something.
    Live,
}

/// Future result of a validation.
pub type Answer<'a> = Pin<Box<dyn Future<Output = Result<Caller, AuthError>> + Send + 'a>>;

/// A validator of tokens.
pub trait Identity: Send + Sync {
    /// Validates a token and returns its caller.
    fn caller<'a>(&'a self, token: &'a str, freshness: Freshness) -> Answer<'a>;
}

/// The tokens of the file, recognised by their prefix, and Keystone for all others, if it is
/// configured. Administrators of the host can use the file's tokens while Keystone is unreachable.
pub struct Identities {
    file: Tokens,
    keystone: Option<Keystone>,
}

impl Identities {
    /// Combines both validators.
    pub const fn new(file: Tokens, keystone: Option<Keystone>) -> Self {
        Self { file, keystone }
    }
}

impl Identity for Identities {
    fn caller<'a>(&'a self, token: &'a str, freshness: Freshness) -> Answer<'a> {
        match &self.keystone {
            Some(keystone) if !token.starts_with(PREFIX) => keystone.caller(token, freshness),
            _ => self.file.caller(token, freshness),
        }
    }
}
