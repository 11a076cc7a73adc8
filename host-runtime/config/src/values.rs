//! Types of the values of keys, and what all paths must be.

use std::net::SocketAddr;
use std::path::PathBuf;

use serde::Deserialize;

/// Policy for how long an instance holds the devices of its flavor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum HoldPolicy {
    /// While the guest is running: from `prepare` to `release`.
    #[default]
    Running,
    /// Until the instance is deleted, including while the guest is off.
    Instance,
}

/// Policy for a guest with a passed-through USB device that migrates to this host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MigrationPolicy {
    /// Refuse the guest.
    #[default]
    Refuse,
    /// Claim an equivalent device of this host for the guest.
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

/// Policy for the start of a guest whose device only the agent can attach.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum RequireAgent {
    /// If an agent is installed, it must be running. Without an agent, the caller is assumed to use
    /// the printed XML.
    #[default]
    Auto,
    /// An agent must be installed and running.
    Always,
    /// The guest starts without an agent, too.
    Never,
}

/// Address of the agent's metrics.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Metrics {
    /// Metrics are not served.
    #[default]
    Off,
    /// Metrics are served on a loopback port.
    Tcp(SocketAddr),
    /// Metrics are served on a unix socket.
    Unix(PathBuf),
}

/// Address of the agent's API.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Api {
    /// The API is not served.
    Off,
    /// The API is served on this address, and on a unix socket in `state_dir`.
    On(SocketAddr),
}

/// Certificate and key for TLS on the API's port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tls {
    /// PEM file of the certificate, followed by intermediate certificates.
    pub certificate: PathBuf,
    /// PEM file of the private key.
    pub key: PathBuf,
}

impl Default for Api {
    fn default() -> Self {
        Self::On(SocketAddr::from(([127, 0, 0, 1], 8790)))
    }
}

/// Destination of the record of each hook call.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Log {
    /// The systemd journal.
    #[default]
    Journal,
    /// A file with one JSON object per line.
    File(PathBuf),
    /// Records are not written.
    Off,
}

/// Returns the path if it is absolute.
pub(crate) fn absolute_path(key: &str, path: PathBuf) -> Result<PathBuf, String> {
    if path.is_absolute() {
        Ok(path)
    } else {
        Err(format!("{key}: {} is not an absolute path", path.display()))
    }
}
