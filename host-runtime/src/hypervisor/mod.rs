//! The guests of this host: one trait, implemented by libvirt and by a simulation.
//!
//! ```text
//!   libvirt ──── calls ────► Libvirt ───┐
//!      └──── events ─► Event ─► agent   ├─► Hypervisor: running guests; attach, detach, stop
//!   TOML [[domain]] ──────► Simulated ──┘      │
//!                                          Supervised: unanswered calls, last known state
//! ```
//! An answer is never guessed: a failed query is a [`Failure`], and a domain counts as absent only
//! if libvirt says so.

mod events;
mod libvirt;
mod process;
mod simulated;
mod supervised;

use virt_usb_domxml::{Domain, XmlError};
use virt_usb_model::InstanceId;

pub use libvirt::{Libvirt, Started};
pub use simulated::SimulatedHypervisor;
pub(crate) use supervised::MEETING_TIMEOUT;
pub use supervised::{Changed, Known, Listeners, Supervised, Unanswered};

/// A running domain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Running {
    /// UUID of the instance.
    pub instance: InstanceId,
    /// Name of the domain.
    pub name: String,
    /// Live XML of the domain.
    pub xml: String,
    /// Whether its state is being transferred by a restore or migration. No device can be attached
    /// or detached in the meantime.
    pub moving: bool,
}

impl Running {
    /// Parses the live XML.
    ///
    /// # Errors
    /// If the XML is invalid.
    pub fn domain(&self) -> Result<Domain, XmlError> {
        virt_usb_domxml::read(self.xml.as_bytes())
    }
}

/// Failure of a call to the hypervisor.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Failure {
    /// libvirt is unreachable. The state of all guests is unknown.
    #[error("libvirt cannot be reached: {0}")]
    Away(String),
    /// The domain is not running.
    #[error("the domain is not running")]
    Gone,
    /// Another operation on the domain is in progress. A retry may succeed.
    #[error("libvirt is busy with the domain: {0}")]
    Busy(String),
    /// The guest's QEMU is stopped or blocked. The call was not made.
    #[error("{0}")]
    Hung(String),
    /// libvirt has not answered an earlier call, whose result is unknown. This call was not made.
    #[error("libvirt has not answered: {0}")]
    Silent(String),
    /// libvirt refused the call, with this reason.
    #[error("libvirt refuses it: {0}")]
    Refused(String),
}

/// An event about guests.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// The connection to libvirt was made, for the first time or again. Events may have been
    /// missed.
    Connected,
    /// The connection is lost, for this reason.
    Lost(String),
    /// A domain changed: it started, stopped, disappeared, or its devices changed.
    Changed(InstanceId),
    /// A domain was started here. A domain that migrated in only changes.
    Started(InstanceId),
}

/// A hypervisor that runs the guests.
pub trait Hypervisor: Send + Sync {
    /// Lists the running domains.
    ///
    /// # Errors
    /// [`Failure::Away`].
    fn running(&self) -> Result<Vec<InstanceId>, Failure>;

    /// Lists all domains, running or not.
    ///
    /// # Errors
    /// [`Failure::Away`].
    fn all(&self) -> Result<Vec<InstanceId>, Failure>;

    /// Reads a running domain. `None` if it is not running.
    ///
    /// # Errors
    /// [`Failure::Away`], [`Failure::Busy`].
    fn look(&self, instance: InstanceId) -> Result<Option<Running>, Failure>;

    /// Reads the XML of a domain: the live XML if it is running, otherwise its definition. `None`
    /// if there is no such domain.
    ///
    /// # Errors
    /// [`Failure::Away`].
    fn xml(&self, instance: InstanceId) -> Result<Option<String>, Failure>;

    /// Attaches a device to a running domain. Success does not mean that the domain still has the
    /// device; the live XML shows it.
    ///
    /// # Errors
    /// Any [`Failure`].
    fn attach(&self, instance: InstanceId, device: &str) -> Result<(), Failure>;

    /// Requests the detach of the device with this alias from a running domain. The live XML shows
    /// when the device is gone. A missing device is not an error.
    ///
    /// # Errors
    /// Any [`Failure`].
    fn detach(&self, instance: InstanceId, alias: &str) -> Result<(), Failure>;

    /// Stops a domain immediately, as a power cut would.
    ///
    /// # Errors
    /// Any [`Failure`].
    fn stop(&self, instance: InstanceId) -> Result<(), Failure>;

    /// Whether any program is changing the running domain: a requested change may still happen.
    ///
    /// # Errors
    /// [`Failure::Away`].
    fn is_busy(&self, instance: InstanceId) -> Result<bool, Failure>;

    /// Process id of this guest's QEMU on this host, independent of libvirt. `None` if there is no
    /// process, or it is not visible.
    fn process(&self, instance: InstanceId) -> Option<u32>;

    /// Identity of this libvirt: driver, URI and host. Another libvirt has other guests.
    ///
    /// # Errors
    /// [`Failure::Away`].
    fn identity(&self) -> Result<String, Failure>;
}
