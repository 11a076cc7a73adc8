//! The file of tokens in `state_dir`, which authenticates callers of the API without another
//! service.
//!
//! ```toml
//! [[token]]
//! name = "erp-team"
//! sha256 = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"
//! project = "3f0c7a5e9d2b4c1f8a6e5d4c3b2a1908"
//! role = "member"
//! created_at = "2026-11-25T20:40:33Z"
//! expires_at = "2027-02-23T20:40:33Z"
//! ```
//! The file contains hashes. A token is 256 random bits and is shown once, when it is created; to
//! guess it from its SHA-256 is to guess 256 bits. The file has mode 0600 and belongs to the
//! agent's user. It is replaced by a rename, and the agent reads it again after a change. If it
//! cannot be read or is invalid, every token is rejected.

use std::collections::HashMap;
use std::fs::{File, Metadata, OpenOptions, Permissions};
use std::io::{self, Read, Write as _};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use virt_usb_filter_host::{hex, sha256};
use virt_usb_model::ProjectId;
use virt_usb_store::user::{AsUser, User};

use super::identity::{Answer, AuthError, Caller, Freshness, Identity, Role};
use virt_usb_fleet::stamp::{Stamp, stamp};

/// Name of the file in `state_dir`.
pub const FILE: &str = "tokens.toml";
/// Prefix of every token, by which a token that was leaked into a log or a repository can be found.
pub(super) const PREFIX: &str = "vusb_";
/// Maximum size of the file, in bytes: ten thousand tokens.
const MAX_FILE_BYTES: u64 = 4 << 20;

/// Entry of a token. The token itself is not stored.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Entry {
    /// Name of the token, for the audit trail and the log.
    pub name: String,
    /// SHA-256 of the token, in hexadecimal digits.
    pub sha256: String,
    /// Project that the token acts for.
    pub project: String,
    /// Role of the token: `reader`, `member` or `admin`.
    pub role: String,
    /// Time of creation (UTC, RFC 3339).
    pub created_at: String,
    /// Expiry (UTC, RFC 3339); `None` if the token is valid until it is removed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expires_at: Option<String>,
}

#[derive(Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Content {
    #[serde(default)]
    token: Vec<Entry>,
}

/// Error of the file of tokens.
#[derive(Debug, thiserror::Error)]
pub enum TokensError {
    /// The file cannot be read or written.
    #[error("cannot use the tokens' file {path}: {why}")]
    Io {
        /// Path of the file.
        path: PathBuf,
        /// Cause of the failure.
        why: io::Error,
    },
    /// The content of the file is invalid.
    #[error(
        "the tokens' file {path} is wrong: {what}; every token in it is rejected until the \
        file is fixed"
    )]
    Wrong {
        /// Path of the file.
        path: PathBuf,
        /// Where and why.
        what: String,
    },
    /// The entry cannot be created.
    #[error("{0}")]
    Refused(String),
}

/// A new token, which is shown only once.
#[derive(Debug)]
pub struct Made {
    /// The token itself.
    pub token: String,
    /// Entry of the token in the file.
    pub entry: Entry,
}

/// Properties of a new token.
#[derive(Debug, Clone)]
pub struct Wanted<'a> {
    /// Name of the token, which must be unique.
    pub name: &'a str,
    /// Project that the token acts for.
    pub project: &'a ProjectId,
    /// Role of the token.
    pub role: Role,
    /// Lifetime; `None` if the token is valid until it is removed.
    pub lifetime: Option<std::time::Duration>,
}

/// The file of one `state_dir`.
#[derive(Debug, Clone)]
pub struct TokenFile {
    path: PathBuf,
}

impl TokenFile {
    /// The file of tokens in this folder; it need not exist.
    pub fn new(state_dir: &Path) -> Self {
        Self { path: state_dir.join(FILE) }
    }

    /// Path of the file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns all entries; none if the file does not exist.
    ///
    /// # Errors
    /// If the file cannot be read, or is invalid.
    pub fn entries(&self) -> Result<Vec<Entry>, TokensError> {
        let _owner = self.enter()?;
        let text = match self.read() {
            Ok(text) => text,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(why) => return Err(self.fault(why)),
        };
        let content: Content = toml::from_str(&text).map_err(|e| {
            let line = e
                .span()
                .map_or(0, |span| 1 + text[..span.start.min(text.len())].matches('\n').count());
            self.wrong(format!("line {line}: {}", e.message()))
        })?;
        for entry in &content.token {
            parse(entry)
                .map_err(|what| self.wrong(format!("the token of {:?}: {what}", entry.name)))?;
        }
        Ok(content.token)
    }

    /// Creates a token, and the file if it does not exist.
    ///
    /// # Errors
    /// If a token has the same name, or the file cannot be written. Then nothing was changed.
    pub fn add(&self, wanted: &Wanted<'_>) -> Result<Made, TokensError> {
        let plain = |c: char| !c.is_control() && !c.is_whitespace();
        if wanted.name.is_empty() || wanted.name.len() > 64 || !wanted.name.chars().all(plain) {
            let why = format!(
                "{:?} is not a valid name for a token: wanted 1 to 64 bytes without white space",
                wanted.name
            );
            return Err(TokensError::Refused(why));
        }
        let token = random_token().map_err(|why| self.fault(why))?;
        let now = Timestamp::now();
        let until = wanted.lifetime.map(|lifetime| now.checked_add(lifetime)).transpose();
        let until =
            until.map_err(|_| TokensError::Refused("a token cannot last that long".into()))?;
        let text = |at: Timestamp| format!("{at:.0}");
        let entry = Entry {
            name: wanted.name.to_owned(),
            sha256: hash(&token),
            project: wanted.project.to_string(),
            role: wanted.role.to_string(),
            created_at: text(now),
            expires_at: until.map(text),
        };
        self.change(|entries| {
            if entries.iter().any(|e| e.name == entry.name) {
                return Err(TokensError::Refused(format!(
                    "a token with the name {:?} exists: remove it first with 'virt-usb token \
                     remove', or use another name",
                    entry.name
                )));
            }
            entries.push(entry.clone());
            Ok(())
        })?;
        Ok(Made { token, entry })
    }

    /// Removes a token with immediate effect, and returns whether one had this name.
    ///
    /// # Errors
    /// If the file cannot be written. Then the token stays valid.
    pub fn remove(&self, name: &str) -> Result<bool, TokensError> {
        let mut found = false;
        self.change(|entries| {
            let before = entries.len();
            entries.retain(|e| e.name != name);
            found = entries.len() < before;
            Ok(())
        })?;
        Ok(found)
    }

    /// Creates an empty file if there is none, and returns whether it did.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn ensure(&self) -> Result<bool, TokensError> {
        if self.path.symlink_metadata().is_ok() {
            return Ok(false);
        }
        self.change(|_| Ok(())).map(|()| true)
    }

    fn change(
        &self,
        change: impl FnOnce(&mut Vec<Entry>) -> Result<(), TokensError>,
    ) -> Result<(), TokensError> {
        let _owner = self.enter()?;
        let lock = self.path.with_extension("lock");
        let careful = libc::O_NOFOLLOW | libc::O_NONBLOCK;
        let mut options = OpenOptions::new();
        options.write(true).create(true).truncate(false).mode(0o600).custom_flags(careful);
        let locked = options.open(&lock).and_then(|file| file.lock().map(|()| file));
        let _locked = locked.map_err(|why| self.fault(why))?;
        let mut entries = self.entries()?;
        change(&mut entries)?;
        self.write(entries).map_err(|why| self.fault(why))
    }

    fn write(&self, token: Vec<Entry>) -> io::Result<()> {
        let text = toml::to_string(&Content { token }).map_err(io::Error::other)?;
        let beside = self.path.with_extension("new");
        match std::fs::remove_file(&beside) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
            _ => {}
        }
        // Create a new file or fail: an existing file, or a link, is not written to.
        let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&beside)?;
        file.set_permissions(Permissions::from_mode(0o600))?;
        writeln!(
            file,
            "# Who may use the API: 'virt-usb token' writes this file. Tokens themselves are not \
                in it.\n{text}"
        )?;
        file.sync_all()?;
        std::fs::rename(&beside, &self.path)
    }

    fn read(&self) -> io::Result<String> {
        let file = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
            .open(&self.path)?;
        let found = file.metadata()?;
        if !found.is_file() {
            return Err(io::Error::other("it is not a regular file"));
        }
        if found.permissions().mode() & 0o077 != 0 {
            return Err(io::Error::other(
                "other users may read it: run 'chmod 600' on it, and create its tokens again",
            ));
        }
        self.is_ours(&found)?;
        let mut text = String::new();
        read_bounded(file, &mut text)?;
        Ok(text)
    }

    /// Checks owner and mode: a user who may write to the folder can replace the file.
    fn is_ours(&self, file: &Metadata) -> io::Result<()> {
        let folder = self.path.parent().unwrap_or(Path::new("/")).metadata()?;
        if folder.mode() & 0o002 != 0 {
            return Err(io::Error::other(
                "every user may write to its folder: run 'chmod o-w' on the folder, and create \
                 the tokens again",
            ));
        }
        let owner = file.uid();
        if owner != 0 && owner != folder.uid() && owner != rustix::process::geteuid().as_raw() {
            return Err(io::Error::other(format!(
                "it belongs to the user {owner}, who is neither root nor the folder's owner: \
                 remove it, and create the tokens again"
            )));
        }
        Ok(())
    }

    /// Uses the file as the owner of its folder, because that user may create links there.
    fn enter(&self) -> Result<AsUser, TokensError> {
        User::of_folder_of(&self.path).and_then(User::enter).map_err(|why| self.fault(why))
    }

    fn fault(&self, why: io::Error) -> TokensError {
        let why = match why.kind() {
            io::ErrorKind::PermissionDenied => io::Error::new(
                why.kind(),
                format!("{why}; run it as root or as the owner of its folder"),
            ),
            io::ErrorKind::NotFound => io::Error::new(
                why.kind(),
                "its folder does not exist; the agent ('systemctl start virt-usbd') or 'virt-usb \
                 discover' creates it",
            ),
            _ => why,
        };
        TokensError::Io { path: self.path.clone(), why }
    }

    fn wrong(&self, what: String) -> TokensError {
        TokensError::Wrong { path: self.path.clone(), what }
    }
}

fn read_bounded(file: File, text: &mut String) -> io::Result<()> {
    file.take(MAX_FILE_BYTES + 1).read_to_string(text)?;
    if text.len() as u64 > MAX_FILE_BYTES {
        return Err(io::Error::new(
            io::ErrorKind::FileTooLarge,
            format!("it is larger than {MAX_FILE_BYTES} bytes"),
        ));
    }
    Ok(())
}

fn random_token() -> io::Result<String> {
    let mut bytes = [0; 32];
    getrandom::fill(&mut bytes)?;
    Ok(format!("{PREFIX}{}", hex(&bytes)))
}

fn hash(token: &str) -> String {
    hex(&sha256(token.as_bytes()))
}

/// The caller of an entry, and its expiry.
fn parse(entry: &Entry) -> Result<(Caller, Option<Timestamp>), String> {
    let wrong = |key: &'static str| move |e: &dyn std::fmt::Display| format!("{key}: {e}");
    let is_hash = entry.sha256.len() == 64
        && entry.sha256.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
    if !is_hash {
        return Err("sha256: wanted 64 lowercase hexadecimal digits".into());
    }
    let role = entry.role.parse().map_err(|e: String| wrong("role")(&e))?;
    let project: ProjectId = entry.project.parse().map_err(|e| wrong("project")(&e))?;
    let until = entry.expires_at.as_ref().map(|at| at.parse::<Timestamp>()).transpose();
    let until = until.map_err(|e| wrong("expires_at")(&e))?;
    Ok((Caller { name: entry.name.clone(), project: Some(project), role }, until))
}

/// Validates tokens by the file, which is read again after a change.
pub struct Tokens {
    file: TokenFile,
    known: Mutex<Known>,
}

#[derive(Default, Clone)]
struct Known {
    stamp: Option<Stamp>,
    read: bool,
    callers: Arc<HashMap<String, (Caller, Option<Timestamp>)>>,
    trouble: Option<String>,
}

impl Tokens {
    /// Validates tokens by this file.
    pub fn new(file: TokenFile) -> Self {
        Self { file, known: Mutex::default() }
    }

    fn now(&self) -> Known {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let stamp = stamp(&self.file.path);
        // A file that could not be read is tried again: its stamp may be unchanged.
        if !known.read || known.stamp != stamp {
            let entries = self.file.entries();
            let read = !matches!(entries, Err(TokensError::Io { .. }));
            let (callers, trouble) = match entries {
                Ok(entries) => {
                    let callers = entries
                        .iter()
                        .filter_map(|e| Some((e.sha256.clone(), parse(e).ok()?)))
                        .collect();
                    (callers, None)
                }
                Err(e) => (HashMap::new(), Some(e.to_string())),
            };
            if let Some(trouble) =
                trouble.as_ref().filter(|why| known.trouble.as_ref() != Some(*why))
            {
                tracing::error!("{trouble}");
            }
            *known = Known { stamp, read, callers: Arc::new(callers), trouble };
        }
        known.clone()
    }

    fn find(&self, token: &str) -> Result<Caller, AuthError> {
        let known = self.now();
        if let Some(trouble) = known.trouble {
            return Err(AuthError::Unavailable(trouble));
        }
        // The duration of a lookup by hash reveals nothing about any token.
        match known.callers.get(&hash(token)) {
            Some((caller, until)) if until.is_none_or(|until| Timestamp::now() < until) => {
                Ok(caller.clone())
            }
            _ => Err(AuthError::InvalidToken),
        }
    }
}

impl Identity for Tokens {
    fn caller<'a>(&'a self, token: &'a str, _: Freshness) -> Answer<'a> {
        Box::pin(std::future::ready(self.find(token)))
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn wanted<'a>(name: &'a str, project: &'a ProjectId) -> Wanted<'a> {
        Wanted { name, project, role: Role::Member, lifetime: None }
    }

    #[test]
    fn a_token_is_known_until_it_is_removed_or_expires() {
        let dir = tempfile::tempdir().unwrap();
        let file = TokenFile::new(dir.path());
        let project: ProjectId = "p1".parse().unwrap();
        let tokens = Tokens::new(file.clone());
        assert_eq!(tokens.find("vusb_x"), Err(AuthError::InvalidToken));
        assert!(file.ensure().unwrap() && !file.ensure().unwrap());
        let made = file.add(&wanted("erp", &project)).unwrap();
        assert_eq!(std::fs::metadata(file.path()).unwrap().permissions().mode() & 0o777, 0o600);
        assert!(!std::fs::read_to_string(file.path()).unwrap().contains(&made.token));
        let caller = tokens.find(&made.token).unwrap();
        assert_eq!(
            (caller.name.as_str(), caller.role, caller.project),
            ("erp", Role::Member, Some(project.clone()))
        );
        assert_eq!(tokens.find(&made.token[..68]), Err(AuthError::InvalidToken));
        let why = file.add(&wanted("erp", &project)).unwrap_err().to_string();
        assert!(why.contains("a token with the name"), "{why}");
        let past = file
            .add(&Wanted { lifetime: Some(Duration::ZERO), ..wanted("past", &project) })
            .unwrap();
        assert_eq!(tokens.find(&past.token), Err(AuthError::InvalidToken));
        assert!(file.remove("erp").unwrap() && !file.remove("erp").unwrap());
        assert_eq!(tokens.find(&made.token), Err(AuthError::InvalidToken));
        for name in ["", "a b", "a\n"] {
            assert!(file.add(&wanted(name, &project)).is_err(), "{name:?}");
        }
    }

    #[test]
    fn no_link_in_the_folder_is_followed() {
        let dir = tempfile::tempdir().unwrap();
        let victim = dir.path().join("victim");
        std::fs::write(&victim, "theirs").unwrap();
        let file = TokenFile::new(dir.path());
        let project: ProjectId = "p1".parse().unwrap();
        std::os::unix::fs::symlink(&victim, dir.path().join("tokens.new")).unwrap();
        file.add(&wanted("erp", &project)).unwrap();
        assert_eq!(std::fs::read_to_string(&victim).unwrap(), "theirs");
        assert!(file.path().symlink_metadata().unwrap().is_file());
        std::fs::remove_file(dir.path().join("tokens.lock")).unwrap();
        std::os::unix::fs::symlink(dir.path().join("made"), dir.path().join("tokens.lock"))
            .unwrap();
        assert!(file.add(&wanted("crm", &project)).is_err());
        assert!(!dir.path().join("made").exists());
    }

    #[test]
    fn an_unreliable_file_rejects_every_token() {
        let dir = tempfile::tempdir().unwrap();
        let file = TokenFile::new(dir.path());
        let project: ProjectId = "p1".parse().unwrap();
        let made = file.add(&wanted("erp", &project)).unwrap();
        let tokens = Tokens::new(file.clone());
        let why = |token: &str| match tokens.find(token) {
            Err(AuthError::Unavailable(why)) => why,
            found => panic!("{found:?}"),
        };
        assert!(tokens.find(&made.token).is_ok());
        let right = std::fs::read_to_string(file.path()).unwrap();
        let wrong = [
            right.replace("member", "boss"),
            right.replace("sha256 = \"", "sha256 = \"Z"),
            right.replace("p1", "p 1"),
            format!("{right}colour = 1\n"),
            "[[token".to_owned(),
        ];
        for (at, text) in wrong.iter().enumerate() {
            std::fs::write(file.path(), format!("{text}{}", "\n".repeat(at))).unwrap();
            assert!(why(&made.token).contains("is wrong"), "{text}");
        }
        std::fs::write(file.path(), &right).unwrap();
        assert!(tokens.find(&made.token).is_ok());
        std::fs::set_permissions(file.path(), Permissions::from_mode(0o640)).unwrap();
        assert!(why(&made.token).contains("other users may read it"));
        std::fs::set_permissions(file.path(), Permissions::from_mode(0o600)).unwrap();
        assert!(tokens.find(&made.token).is_ok());
        // The check is repeated when the file's stamp changes, and then the folder is the problem.
        std::fs::set_permissions(dir.path(), Permissions::from_mode(0o777)).unwrap();
        std::fs::write(file.path(), format!("{right}\n\n\n\n")).unwrap();
        assert!(why(&made.token).contains("every user may write to its folder"));
        std::fs::set_permissions(dir.path(), Permissions::from_mode(0o700)).unwrap();
        assert!(tokens.find(&made.token).is_ok());
    }
}
