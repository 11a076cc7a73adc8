//! What the threads of the devices and of the guests tell each other.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use virt_usb_model::InstanceId;

use super::work::{Report, WorkError};
use crate::hypervisor::{Event, Failure};

/// Signal for the thread of the guests.
#[derive(Debug)]
pub(crate) enum Signal {
    /// By libvirt.
    Hypervisor(Event),
    /// libvirt has answered about a guest for which others did not wait.
    Answered(InstanceId),
    /// The inventory's devices changed.
    Devices,
    /// By a worker: which libvirt it is.
    Identified(String),
    /// By a worker: which guests there are.
    Listed(Result<Vec<InstanceId>, Failure>),
    /// By a worker.
    Done(InstanceId, Result<Report, WorkError>),
    /// End.
    Stop,
}

/// Signal for the thread of the devices.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum DeviceSignal {
    /// A device came or went, or guests use others than before.
    Usb,
    /// Read the configuration again.
    Reload,
    /// End.
    Stop,
}

/// Heartbeat of the guests' thread.
#[derive(Clone)]
pub(crate) struct Pulse(Arc<Mutex<Instant>>);

/// The guests' thread waits for nothing but the store's lock, `STORE_LOCK_TIMEOUT` at the
/// most each time.
const PULSE: Duration = Duration::from_secs(25);

impl Pulse {
    pub(crate) fn new() -> Self {
        Self(Arc::new(Mutex::new(Instant::now())))
    }

    pub(crate) fn beat(&self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
    }

    pub(super) fn is_there(&self) -> bool {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).elapsed() < PULSE
    }
}
