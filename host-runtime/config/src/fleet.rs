//! The table `[fleet]`: the etcd through which hosts share their inventories.

use std::path::PathBuf;
use std::time::Duration;

use serde::Deserialize;

use crate::values::{Tls, absolute_path};

/// The etcd through which several hosts share their inventories.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fleet {
    /// URLs of the endpoints, with scheme, host and port. An endpoint is used if those before it do
    /// not respond.
    pub endpoints: Vec<String>,
    /// Prefix of all keys; begins and ends with a slash.
    pub prefix: String,
    /// PEM file of the authorities to trust; `None` for those of this machine.
    pub ca: Option<PathBuf>,
    /// Client certificate and key of this host for etcd.
    pub identity: Option<Tls>,
    /// User of this host in etcd.
    pub user: Option<User>,
    /// Time after which the document of an unreachable host is removed.
    pub lease: Duration,
    /// Interval at which an unchanged document is published again.
    pub heartbeat: Duration,
    /// File with the id of this machine.
    pub machine_id: PathBuf,
}

/// A user with the file of its password.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct User {
    /// Name of the user.
    pub name: String,
    /// File whose first line is the password.
    pub password_file: PathBuf,
}

#[derive(Deserialize)]
pub(super) struct Raw {
    #[serde(default)]
    endpoints: Vec<String>,
    prefix: Option<String>,
    ca: Option<PathBuf>,
    certificate: Option<PathBuf>,
    key: Option<PathBuf>,
    user: Option<String>,
    password_file: Option<PathBuf>,
    lease: Option<u64>,
    heartbeat: Option<u64>,
    machine_id: Option<PathBuf>,
}

pub(super) const KEYS: &[&str] = &[
    "endpoints",
    "prefix",
    "ca",
    "certificate",
    "key",
    "user",
    "password_file",
    "lease",
    "heartbeat",
    "machine_id",
];

impl Raw {
    pub(super) fn check(self) -> Result<Fleet, String> {
        if self.endpoints.is_empty() {
            return Err(
                "endpoints: found none, wanted a list such as [\"https://etcd1.example:2379\"]"
                    .into(),
            );
        }
        for endpoint in &self.endpoints {
            let rest =
                endpoint.strip_prefix("https://").or_else(|| endpoint.strip_prefix("http://"));
            let right = rest.is_some_and(|rest| {
                !rest.is_empty()
                    && !rest.contains(|c: char| {
                        c == '/' || c == '@' || c.is_whitespace() || c.is_control()
                    })
            });
            if !right {
                return Err(format!(
                    "endpoints: found {endpoint:?}, wanted an address such \
                        as \"https://etcd1.example:2379\""
                ));
            }
        }
        let https = self.endpoints.iter().filter(|e| e.starts_with("https://")).count();
        if https != 0 && https != self.endpoints.len() {
            return Err(
                "endpoints: some are https and some http: all must be one or the other".into()
            );
        }
        let prefix = self.prefix.unwrap_or_else(|| "/virt-usb/".into());
        let plain = |c: char| c.is_ascii_alphanumeric() || "/._-".contains(c);
        if prefix.len() < 3
            || !prefix.starts_with('/')
            || !prefix.ends_with('/')
            || !prefix.chars().all(plain)
        {
            return Err(format!(
                "prefix: found {prefix:?}, wanted letters, digits, '.', '_', '-' and '/' between \
                    two slashes, such as \"/virt-usb/\""
            ));
        }
        let file = |name: &str, path: Option<PathBuf>| {
            path.map(|path| absolute_path(name, path)).transpose()
        };
        let (ca, certificate, key) =
            (file("ca", self.ca)?, file("certificate", self.certificate)?, file("key", self.key)?);
        if https == 0 && (ca.is_some() || certificate.is_some() || key.is_some()) {
            return Err("ca, certificate and key are for endpoints that begin with https://".into());
        }
        let identity = match (certificate, key) {
            (None, None) => None,
            (Some(certificate), Some(key)) => Some(Tls { certificate, key }),
            (Some(_), None) => {
                return Err("certificate: its key is missing: set fleet.key as well".into());
            }
            (None, Some(_)) => {
                return Err("key: its certificate is missing: set fleet.certificate as well".into());
            }
        };
        let user = match (self.user, file("password_file", self.password_file)?) {
            (None, None) => None,
            (Some(name), Some(password_file)) if !name.is_empty() => {
                Some(User { name, password_file })
            }
            (Some(_), Some(_)) => return Err("user: found an empty name".into()),
            (Some(_), None) => {
                return Err("user: its password is missing: set fleet.password_file as well".into());
            }
            (None, Some(_)) => {
                return Err("password_file: its user is missing: set fleet.user as well".into());
            }
        };
        let seconds = |key: &str, value: Option<u64>, default: u64, least: u64| match value
            .unwrap_or(default)
        {
            value if (least..=86400).contains(&value) => Ok(Duration::from_secs(value)),
            other => Err(format!("{key}: found {other}, wanted {least} to 86400 seconds")),
        };
        Ok(Fleet {
            endpoints: self.endpoints,
            prefix,
            ca,
            identity,
            user,
            lease: seconds("lease", self.lease, 30, 5)?,
            heartbeat: seconds("heartbeat", self.heartbeat, 300, 1)?,
            machine_id: file("machine_id", self.machine_id)?
                .unwrap_or_else(|| "/etc/machine-id".into()),
        })
    }
}
