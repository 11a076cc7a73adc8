//! The table `[keystone]`: the OpenStack Identity service whose tokens the API accepts.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use serde::Deserialize;

use crate::values::absolute_path;

/// A Keystone whose tokens are accepted, and the user that validates them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Keystone {
    /// URL with the version and without a trailing slash: `https://keystone.example:5000/v3`.
    pub url: String,
    /// PEM file of the authorities to trust; `None` for those of this machine.
    pub ca: Option<PathBuf>,
    /// Name of the service user.
    pub user: String,
    /// Name of the service user's domain.
    pub user_domain: String,
    /// Name of the service user's project.
    pub project: String,
    /// Name of that project's domain.
    pub project_domain: String,
    /// File whose first line is the password.
    pub password_file: PathBuf,
    /// Time for which the validation of a token is cached, for read-only requests.
    pub cache: Duration,
    /// Map from Keystone's roles to `reader`, `member` or `admin`.
    pub roles: BTreeMap<String, String>,
}

/// Valid roles of the API.
const ROLES: [&str; 3] = ["reader", "member", "admin"];

#[derive(Deserialize)]
pub(super) struct Raw {
    url: Option<String>,
    ca: Option<PathBuf>,
    user: Option<String>,
    user_domain: Option<String>,
    project: Option<String>,
    project_domain: Option<String>,
    password_file: Option<PathBuf>,
    cache: Option<u64>,
    roles: Option<BTreeMap<String, String>>,
}

pub(super) const KEYS: &[&str] = &[
    "url",
    "ca",
    "user",
    "user_domain",
    "project",
    "project_domain",
    "password_file",
    "cache",
    "roles",
];

impl Raw {
    pub(super) fn check(self) -> Result<Keystone, String> {
        let url = self.url.unwrap_or_default();
        let bare = url.trim_end_matches('/');
        let rest = bare.strip_prefix("https://").or_else(|| bare.strip_prefix("http://"));
        let path = rest.and_then(|rest| rest.split_once('/'));
        let right = path.is_some_and(|(host, path)| {
            !host.is_empty()
                && (path == "v3" || path.ends_with("/v3"))
                && !bare
                    .contains(|c: char| "@?#".contains(c) || c.is_whitespace() || c.is_control())
        });
        if !right {
            // The part before an @ may contain a password.
            let found =
                if url.contains('@') { "one with an @".to_owned() } else { format!("{url:?}") };
            return Err(format!(
                "url: found {found}, wanted Keystone's address with its version, such \
                    as \"https://keystone.example:5000/v3\""
            ));
        }
        let ca = self.ca.map(|path| absolute_path("ca", path)).transpose()?;
        if ca.is_some() && bare.starts_with("http://") {
            return Err("ca is for a url that begins with https://".into());
        }
        let Some(password_file) = self.password_file else {
            return Err(
                "password_file: found none, wanted the file of the service user's password".into(),
            );
        };
        let text = |name: &str, value: Option<String>, default: &str| match value {
            Some(value) if value.is_empty() => Err(format!("{name}: found an empty name")),
            value => Ok(value.unwrap_or_else(|| default.into())),
        };
        let cache = match self.cache.unwrap_or(60) {
            seconds @ 0..=3600 => Duration::from_secs(seconds),
            other => return Err(format!("cache: found {other}, wanted 0 to 3600 seconds")),
        };
        let default = || ROLES.map(|role| (role.to_owned(), role.to_owned())).into_iter().collect();
        let roles = self.roles.unwrap_or_else(default);
        if let Some((role, meaning)) =
            roles.iter().find(|(_, meaning)| !ROLES.contains(&meaning.as_str()))
        {
            return Err(format!(
                "roles.{role}: found {meaning:?}, wanted \"reader\", \"member\" or \"admin\""
            ));
        }
        if roles.is_empty() {
            return Err("roles: found none, so every token would be rejected".into());
        }
        Ok(Keystone {
            url: bare.to_owned(),
            ca,
            user: text("user", self.user, "virt-usb")?,
            user_domain: text("user_domain", self.user_domain, "Default")?,
            project: text("project", self.project, "service")?,
            project_domain: text("project_domain", self.project_domain, "Default")?,
            password_file: absolute_path("password_file", password_file)?,
            cache,
            roles,
        })
    }
}
