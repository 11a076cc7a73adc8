//! Who asks. A token says it, to whoever implements [`Identity`]: the [file of
//! tokens](super::tokens) does, and [Keystone](super::keystone).

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::str::FromStr;

use virt_usb_model::ProjectId;

use super::keystone::Keystone;
use super::tokens::{PREFIX, Tokens};

/// What somebody may do; each role may what those before it may.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Role {
    /// Looks at what is its project's.
    Reader,
    /// Attaches to and detaches from its project's servers.
    Member,
    /// All of it, of every project.
    Admin,
}

impl Role {
    /// All roles.
    pub const ALL: [Self; 3] = [Self::Reader, Self::Member, Self::Admin];

    /// As it is written.
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

/// Somebody who asks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Caller {
    /// For the audit and the log: the token's name, never the token.
    pub name: String,
    /// The project that is acted for; none: root and the agent's group on the host itself, who act
    /// for none.
    pub project: Option<ProjectId>,
    /// What it may.
    pub role: Role,
}

impl Caller {
    /// Whether it may see and do all.
    pub fn is_admin(&self) -> bool {
        self.role == Role::Admin
    }

    /// Whether what this project owns is its own.
    pub fn owns(&self, project: Option<&ProjectId>) -> bool {
        matches!((&self.project, project), (Some(mine), Some(whose)) if mine.is(whose))
    }
}

/// Why nobody can be named.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AuthError {
    /// There is no such token, or it has expired. Which of both is nobody's business.
    InvalidToken,
    /// There is, and it is good for nothing here: why, for its owner.
    Unusable(String),
    /// It could not be looked up: why, for the log.
    Unavailable(String),
}

/// How far a token is to be looked up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Freshness {
    /// What is known by heart counts; nobody else is asked.
    CachedOnly,
    /// What was found of late counts.
    Cached,
    /// As it is now: something is about to be changed.
    Live,
}

/// The answer, some time.
pub type Answer<'a> = Pin<Box<dyn Future<Output = Result<Caller, AuthError>> + Send + 'a>>;

/// Who can tell whose a token is.
pub trait Identity: Send + Sync {
    /// Whose token it is.
    fn caller<'a>(&'a self, token: &'a str, freshness: Freshness) -> Answer<'a>;
}

/// The file's tokens, which tell themselves by how they begin, and all others Keystone's, where
/// there is one: should it be away, this host's administrators have tokens still.
pub struct Identities {
    file: Tokens,
    keystone: Option<Keystone>,
}

impl Identities {
    /// Both.
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
