//! What the agent says of itself to `virt-usb doctor`: asked and answered over the socket at which it hears hooks, by the thread
//! that hears them. So it answers though its other threads wait.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::path::Path;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use virt_usb_hook::machine::HOOK_SOCKET;

use super::metrics::Metrics;
use crate::hypervisor::{IMPATIENCE, Supervised};

/// What it is asked.
pub(super) const QUESTION: &str = "health";
/// So many calls without an answer are named.
const NAMED: usize = 10;
/// The largest answer, in bytes.
const MOST: usize = 16 << 10;

/// How the agent is. Times are seconds until now; none: never.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct Health {
    /// Since all guests were looked at.
    pub last_pass: Option<f64>,
    /// Since all devices were looked at.
    pub last_scan: Option<f64>,
    /// Since libvirt was reached; none: it is not reached.
    pub connected: Option<f64>,
    /// How often libvirt was reached.
    pub connections: u64,
    /// Calls to libvirt that have had no answer for long, the oldest first; not all of them where there are many.
    pub unanswered: Vec<Call>,
}

/// A call to libvirt that has no answer yet.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Call {
    /// The guest's name, or its UUID where the name is not known; none: the call is about all guests.
    pub about: Option<String>,
    /// Which call.
    pub what: String,
    /// How long ago it was made.
    pub age: f64,
}

/// How the agent is now, as JSON.
pub(super) fn tell(metrics: &Metrics, hypervisor: &Supervised) -> String {
    let age = |since: Option<Instant>| since.map(|since| since.elapsed().as_secs_f64());
    let moments = metrics.moments();
    let call = |call: &crate::hypervisor::Unanswered| {
        let name =
            |id| hypervisor.guest(id).map_or_else(|| id.to_string(), |known| known.domain.name.clone());
        Call {
            about: call.instance.map(name),
            what: call.what.to_owned(),
            age: call.since.elapsed().as_secs_f64(),
        }
    };
    let health = Health {
        last_pass: age(moments.passed),
        last_scan: age(moments.scanned),
        connected: age(moments.connected),
        connections: metrics.connections(),
        unanswered: hypervisor.unanswered(IMPATIENCE).iter().take(NAMED).map(call).collect(),
    };
    serde_json::to_string(&health).unwrap_or_default()
}

/// Asks the agent of this `state_dir`.
///
/// # Errors
/// When nobody listens there, or there is no answer for so long.
pub fn ask(state_dir: &Path, patience: Duration) -> io::Result<Health> {
    // As in `tell_agent`: no link of the folder's owner is followed.
    let place = File::options()
        .read(true)
        .custom_flags(libc::O_PATH | libc::O_NOFOLLOW)
        .open(state_dir.join(HOOK_SOCKET))?;
    let mut name = [0; 16];
    getrandom::fill(&mut name).map_err(io::Error::other)?;
    let name = format!("virt-usb-{:032x}", u128::from_ne_bytes(name));
    let socket = UnixDatagram::bind_addr(&SocketAddr::from_abstract_name(name)?)?;
    socket.set_read_timeout(Some(patience))?;
    socket.set_write_timeout(Some(patience))?;
    socket.send_to(QUESTION.as_bytes(), format!("/proc/self/fd/{}", place.as_raw_fd()))?;
    let mut answer = vec![0; MOST];
    let length = socket.recv(&mut answer)?;
    Ok(serde_json::from_slice(answer.get(..length).unwrap_or_default())?)
}
