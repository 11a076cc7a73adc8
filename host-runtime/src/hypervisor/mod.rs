//! The guests of this host: one trait, libvirt behind it and a simulation.
//!
//! ```text
//!   libvirt ──── calls ────► Libvirt ───┐
//!      └──── events ─► Event ─► agent   ├─► Hypervisor: who runs, with which live XML; attach, detach, stop
//!   TOML [[domain]] ──────► Simulated ──┘      │
//!                                          Supervised: which calls are not answered, and what the last answers were
//! ```
//! An answer is never guessed: what could not be asked is a [`Failure`], and a domain is absent
//! only where libvirt has said so.

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

/// A domain that runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Running {
    /// UUID of the instance.
    pub instance: InstanceId,
    /// Name of the domain.
    pub name: String,
    /// Live XML of the domain.
    pub xml: String,
    /// Whether its state is being loaded or sent, by restore or migration: then no device can be
    /// attached or detached.
    pub moving: bool,
}

impl Running {
    /// Parses the live XML.
    ///
    /// # Errors
    /// When it is no domain that libvirt could have written.
    pub fn domain(&self) -> Result<Domain, XmlError> {
        virt_usb_domxml::read(self.xml.as_bytes())
    }
}

/// Something could not be done.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Failure {
    /// libvirt cannot be reached: nothing is known about any guest.
    #[error("libvirt cannot be reached: {0}")]
    Away(String),
    /// The domain does not run.
    #[error("the domain is not running")]
    Gone,
    /// Another operation on the domain goes on: to be tried again.
    #[error("libvirt is busy with the domain: {0}")]
    Busy(String),
    /// The guest's QEMU does not go on: it was not asked for anything.
    #[error("{0}")]
    Hung(String),
    /// libvirt has not answered an earlier call: whether that was done is not known, and no other
    /// is made meanwhile.
    #[error("libvirt has not answered: {0}")]
    Silent(String),
    /// libvirt will not, and says why.
    #[error("libvirt refuses it: {0}")]
    Refused(String),
}

/// An event about guests.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// libvirt can be reached, from now on or again: anything may have happened.
    Connected,
    /// The connection is lost, for this reason.
    Lost(String),
    /// A domain changed: it started, stopped, disappeared, or its devices changed.
    Changed(InstanceId),
    /// A domain was started here: not one that migrated in.
    Started(InstanceId),
}

/// A hypervisor that runs the guests.
pub trait Hypervisor: Send + Sync {
    /// All domains that run.
    ///
    /// # Errors
    /// [`Failure::Away`].
    fn running(&self) -> Result<Vec<InstanceId>, Failure>;

    /// All domains, whether they run or not.
    ///
    /// # Errors
    /// [`Failure::Away`].
    fn all(&self) -> Result<Vec<InstanceId>, Failure>;

    /// One domain; `None` when it does not run.
    ///
    /// # Errors
    /// [`Failure::Away`], [`Failure::Busy`].
    fn look(&self, instance: InstanceId) -> Result<Option<Running>, Failure>;

    /// The XML of a domain, live where it runs, or else as it is defined; `None` where there is no
    /// such domain.
    ///
    /// # Errors
    /// [`Failure::Away`].
    fn xml(&self, instance: InstanceId) -> Result<Option<String>, Failure>;

    /// Gives a running domain a device. That it was taken does not say that it is still there:
    /// look.
    ///
    /// # Errors
    /// Each of [`Failure`].
    fn attach(&self, instance: InstanceId, device: &str) -> Result<(), Failure>;

    /// Takes the device of this alias from a running domain. It may take a moment after that: look.
    /// One that is not there is no failure.
    ///
    /// # Errors
    /// Each of [`Failure`].
    fn detach(&self, instance: InstanceId, alias: &str) -> Result<(), Failure>;

    /// Stops a domain, as pulling its plug would.
    ///
    /// # Errors
    /// Each of [`Failure`].
    fn stop(&self, instance: InstanceId) -> Result<(), Failure>;

    /// Whether any program is changing the running domain: a requested change may still happen.
    ///
    /// # Errors
    /// [`Failure::Away`].
    fn is_busy(&self, instance: InstanceId) -> Result<bool, Failure>;

    /// The number of the process that runs this guest on this host, whatever libvirt says of it;
    /// none where there is none, or where it cannot be seen.
    fn process(&self, instance: InstanceId) -> Option<u32>;

    /// Identity of this libvirt in words: its driver, its URI and its host. Another libvirt knows
    /// other guests.
    ///
    /// # Errors
    /// [`Failure::Away`].
    fn identity(&self) -> Result<String, Failure>;
}
