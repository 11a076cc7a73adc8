//! Signals between the devices' thread and the guests' thread.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use virt_usb_model::InstanceId;

use super::work::{Report, WorkError};
use crate::hypervisor::{Event, Failure};

/// Signal for the thread of the guests.
#[derive(Debug)]
pub(crate) enum Signal {
    /// Event of libvirt.
    Hypervisor(Event),
    /// A late answer of libvirt about a guest.
    Answered(InstanceId),
    /// The devices in the inventory have changed.
    Devices,
    /// Identity of libvirt, from a worker.
    Identified(String),
    /// List of all guests, from a worker.
    Listed(Result<Vec<InstanceId>, Failure>),
    /// Result of the check of an instance, from a worker.
    Done(InstanceId, Result<Report, WorkError>),
    /// Request to stop the thread.
    Stop,
}

/// Signal for the thread of the devices.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum DeviceSignal {
    /// A device was plugged in or unplugged, or guests use other devices than before.
    Usb,
    /// Request to reload the configuration.
    Reload,
    /// Request to stop the thread.
    Stop,
}

/// Heartbeat of the guests' thread.
#[derive(Clone)]
pub(crate) struct Pulse(Arc<Mutex<Instant>>);

/// Age of the last heartbeat after which the guests' thread counts as stuck. The thread waits only
/// for the store's lock, for at most `STORE_LOCK_TIMEOUT` each time.
const PULSE_TIMEOUT: Duration = Duration::from_secs(25);

impl Pulse {
    pub(crate) fn new() -> Self {
        Self(Arc::new(Mutex::new(Instant::now())))
    }

    pub(crate) fn beat(&self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
    }

    pub(super) fn is_alive(&self) -> bool {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).elapsed() < PULSE_TIMEOUT
    }
}
