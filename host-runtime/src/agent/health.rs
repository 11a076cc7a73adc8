//! The agent's status for `virt-usb doctor`. The thread that receives the notifications of hooks
//! responds on the same socket, even if other threads of the agent are blocked.

use std::io;
use std::os::fd::AsRawFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::path::Path;
use std::sync::atomic::Ordering;
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use rustix::net::{SendFlags, SocketAddrUnix, sendto};
use serde::{Deserialize, Serialize};
use virt_usb_config::Tls;
use virt_usb_config::host_env::{self, hook_socket};

use crate::hypervisor::{MEETING_TIMEOUT, Supervised};
use crate::metrics::Metrics;
use virt_usb_fleet::http_server::Certificate;

/// Message that requests the health.
pub(crate) const QUESTION: &str = "health";
/// Maximum number of unanswered calls in a response.
const MAX_CALLS: usize = 10;
/// Timeout for the API's certificate and key.
const READ_TIMEOUT: Duration = Duration::from_secs(2);
/// Maximum size of a response, in bytes.
const MAX_RESPONSE_BYTES: usize = 16 << 10;

/// Health of the agent. Ages are in seconds. Readers ignore keys that they do not know, and take
/// missing ones as empty.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Health {
    /// Version of the agent.
    pub version: String,
    /// Time since the agent's start.
    pub uptime: f64,
    /// Time since the agent last checked all guests. `None` if it has not yet.
    pub last_pass: Option<f64>,
    /// Time since the agent last scanned all devices without an error. `None` if it has not yet.
    pub last_scan: Option<f64>,
    /// Time since the agent connected to libvirt. `None` if it is not connected.
    pub connected: Option<f64>,
    /// Time since the agent lost its connection to libvirt. `None` if it never had one, or has one.
    pub lost: Option<f64>,
    /// Number of connections to libvirt since the agent's start.
    pub connections: u64,
    /// Calls to libvirt that have no answer for 5 s or longer, oldest first, at most 10.
    pub unanswered: Vec<Call>,
    /// Whether the agent makes no calls to libvirt, because it does not answer about too many
    /// guests.
    pub blocked: bool,
    /// Whether the agent simulates its devices and guests.
    pub simulated: bool,
    /// Whether the API's network address is served. `None` if not known.
    pub api_served: Option<bool>,
    /// Whether the metrics are served. `None` if not known.
    pub metrics_served: Option<bool>,
    /// Error of the API's certificate or key, as read by the agent's user. `None` if there is no
    /// error, or no TLS.
    pub certificate_error: Option<String>,
}

/// A call to libvirt without an answer.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Call {
    /// Name of the guest, or its UUID if the name is not known. `None` for a call about all guests.
    pub about: Option<String>,
    /// Name of the call.
    pub what: String,
    /// Time since the call was made.
    pub age: f64,
}

/// Returns the current health as JSON.
pub(crate) fn report(
    metrics: &Metrics,
    hypervisor: &Supervised,
    tls: Option<&Tls>,
    simulated: bool,
) -> String {
    let age = |since: Option<Instant>| since.map(|since| since.elapsed().as_secs_f64());
    let moments = metrics.moments();
    let call = |call: &crate::hypervisor::Unanswered| {
        let name = |id| {
            hypervisor.guest(id).map_or_else(|| id.to_string(), |known| known.domain.name.clone())
        };
        Call {
            about: call.instance.map(name),
            what: call.what.to_owned(),
            age: call.since.elapsed().as_secs_f64(),
        }
    };
    let health = Health {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        uptime: moments.started.elapsed().as_secs_f64(),
        last_pass: age(moments.passed),
        last_scan: age(moments.scanned),
        connected: age(moments.connected),
        lost: age(moments.lost),
        connections: metrics.connections(),
        unanswered: hypervisor
            .unanswered(MEETING_TIMEOUT)
            .iter()
            .take(MAX_CALLS)
            .map(call)
            .collect(),
        blocked: hypervisor.is_blocked(),
        simulated,
        api_served: Some(metrics.api_served.load(Ordering::Relaxed)),
        metrics_served: Some(metrics.is_served()),
        certificate_error: tls.and_then(certificate_error),
    };
    serde_json::to_string(&health).unwrap_or_default()
}

/// Returns the error of a certificate or its key. Does not wait for a file system that does not
/// respond.
fn certificate_error(tls: &Tls) -> Option<String> {
    let (to, from) = channel();
    let certificate = Certificate::new(tls.clone());
    let read = std::thread::Builder::new().name("certificate".into());
    read.spawn(move || drop(to.send(certificate.read().err()))).ok()?;
    from.recv_timeout(READ_TIMEOUT)
        .unwrap_or_else(|_| Some("the files cannot be read in time".into()))
}

/// Sends a response. If the client's queue is full, the response is dropped.
pub(crate) fn answer(socket: &UnixDatagram, to: &SocketAddr, text: &str) {
    let Some(name) = to.as_abstract_name() else { return };
    if let Ok(address) = SocketAddrUnix::new_abstract_name(name) {
        let _ = sendto(socket, text.as_bytes(), SendFlags::DONTWAIT, &address);
    }
}

/// Requests the health of the agent of this `state_dir`.
///
/// # Errors
/// If no agent listens on the socket, or no response arrives in time.
pub fn ask(state_dir: &Path, timeout: Duration) -> io::Result<Health> {
    let agent = hook_socket(state_dir)?;
    let mut name = [0; 16];
    getrandom::fill(&mut name).map_err(io::Error::other)?;
    let name = format!("virt-usb-{:032x}", u128::from_ne_bytes(name));
    let socket = UnixDatagram::bind_addr(&SocketAddr::from_abstract_name(name)?)?;
    socket.set_read_timeout(Some(timeout))?;
    socket.set_write_timeout(Some(timeout))?;
    // A connected socket receives from its peer only: the abstract name is visible to every user.
    socket.connect(format!("/proc/self/fd/{}", agent.as_raw_fd()))?;
    socket.send(QUESTION.as_bytes())?;
    let mut answer = vec![0; MAX_RESPONSE_BYTES];
    let length = socket.recv(&mut answer)?;
    Ok(serde_json::from_slice(answer.get(..length).unwrap_or_default())?)
}

/// Timeout for the question whether the agent simulates its guests. An agent that does not answer
/// is a real one.
const SIMULATION_TIMEOUT: Duration = Duration::from_secs(1);

/// Whether an agent of this `state_dir` runs that simulates its guests.
pub(crate) fn simulates_guests(state_dir: &Path) -> bool {
    host_env::agent(state_dir) == host_env::Agent::Alive
        && ask(state_dir, SIMULATION_TIMEOUT).is_ok_and(|health| health.simulated)
}
