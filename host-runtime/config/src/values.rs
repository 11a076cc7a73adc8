//! Types of the values of keys, and what all paths must be.

use std::net::SocketAddr;
use std::path::PathBuf;

use serde::Deserialize;

/// How long an instance keeps what its flavor gave it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum HoldPolicy {
    /// From prepare to release.
    #[default]
    Running,
    /// Until the instance is gone: a stop or a reboot keeps it.
    Instance,
}

/// Policy for a guest with a passed-through USB device that migrates to this host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MigrationPolicy {
    /// Refuse the guest.
    #[default]
    Refuse,
    /// An equivalent device of this host is claimed for it.
    Reclaim,
}

/// Policy for the claim of a device that is unplugged while its guest is running.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ReplugPolicy {
    /// Keep the claim; the guest gets the device back when it is replugged.
    #[default]
    Reattach,
    /// End the claim; the device is available when it is replugged.
    Release,
}

/// Policy for a guest that has just started and cannot get its devices.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum AttachFailurePolicy {
    /// Keep the guest running without the device; the agent retries.
    #[default]
    Keep,
    /// Stop the guest.
    Stop,
}

/// Whether a guest may start that only the agent can give its device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum RequireAgent {
    /// Where an agent is installed it must run; where none is, the caller is believed to use the
    /// printed XML.
    #[default]
    Auto,
    /// An agent must be installed and running.
    Always,
    /// Nothing is asked of it.
    Never,
}

/// Where the agent's metrics are served.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Metrics {
    /// Metrics are not served.
    #[default]
    Off,
    /// On a loopback port.
    Tcp(SocketAddr),
    /// On a unix socket.
    Unix(PathBuf),
}

/// Where the agent's API is served.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Api {
    /// The API is not served.
    Off,
    /// On this address, and on a unix socket in `state_dir`.
    On(SocketAddr),
}

/// Certificate and key for TLS on the API's port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tls {
    /// PEM: the certificate, then those that lead to its authority.
    pub certificate: PathBuf,
    /// PEM: its private key.
    pub key: PathBuf,
}

impl Default for Api {
    fn default() -> Self {
        Self::On(SocketAddr::from(([127, 0, 0, 1], 8790)))
    }
}

/// Where the record of each hook call goes.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Log {
    /// The systemd journal.
    #[default]
    Journal,
    /// A file, one JSON object a line.
    File(PathBuf),
    /// Records are not written.
    Off,
}

/// The path, if it is an absolute one.
pub(crate) fn absolute_path(key: &str, path: PathBuf) -> Result<PathBuf, String> {
    if path.is_absolute() {
        Ok(path)
    } else {
        Err(format!("{key}: {} is not an absolute path", path.display()))
    }
}
