//! Questions of a scheduler to the filter, and its answers.
//!
//! The same words as in `wit/types.wit`, which says what is promised of them and what is not.

use alloc::string::String;
use alloc::vec::Vec;
use core::fmt;

use serde::{Serialize, Serializer};

use crate::{DeviceId, DeviceRequest, Flavor, ProjectId};

/// A question about the fleet.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Question {
    /// Requests of the instance, all for one host, each device once. If empty, every host can
    /// serve.
    pub requests: Vec<DeviceRequest>,
    /// The project that asks. None: it gets only devices that are for every project.
    pub project: Option<ProjectId>,
    /// When it is asked. None: no host is too stale.
    pub moment: Option<Moment>,
    /// Weights of the score.
    pub weights: Weights,
}

impl Question {
    /// For the devices of a flavor; its redirections need no device of any host.
    pub fn new(flavor: Flavor) -> Self {
        Self { requests: flavor.usb_devices, ..Self::default() }
    }

    /// How many devices are wanted in all.
    pub fn devices(&self) -> usize {
        self.requests.iter().map(|r| r.count as usize).sum()
    }
}

/// The feeder's clock: the filter has none. The unit is the feeder's own; each host carries the
/// time of its last document in the same unit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Moment {
    /// The current time.
    pub now: u64,
    /// A host that was last heard of longer ago than this is stale.
    pub max_age: u64,
}

impl Moment {
    /// Hosts last heard of before this are stale.
    pub const fn oldest(self) -> u64 {
        self.now.saturating_sub(self.max_age)
    }
}

/// Weights of a host's score, `spare × slack − reserve × others`.
///
/// *slack* is the number of devices of the scarcest request that the host could lose and still
/// serve, at most 127. *others* is the number of available devices that no request matches, at most
/// 255: they are kept for instances that request them. Each weight is 0 to [`Weights::MAX`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Weights {
    /// Weight of each spare device.
    pub spare: u8,
    /// Cost of each available device that is not requested.
    pub reserve: u8,
}

impl Weights {
    /// The largest weight.
    pub const MAX: u8 = 100;

    /// Whether both are at most [`Weights::MAX`].
    pub const fn are_valid(self) -> bool {
        self.spare <= Self::MAX && self.reserve <= Self::MAX
    }
}

impl Default for Weights {
    /// A device to spare counts four times a device that is kept for others.
    fn default() -> Self {
        Self { spare: 4, reserve: 1 }
    }
}

/// Answer of the filter about one host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// The host can serve all requests.
    Accepted {
        /// More is better; see [`Weights`].
        score: i32,
        /// The devices that its hook would claim now, in the order of the requests, and by id
        /// within one.
        devices: Vec<DeviceId>,
    },
    /// The host cannot serve the requests.
    Rejected(Rejection),
}

/// Why a host cannot serve, and the counts behind it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Rejection {
    /// The first request that is not served, from 0; none where the host as a whole is out.
    pub request: Option<u32>,
    /// Reason of the rejection.
    pub reason: RejectionReason,
    /// How many devices the request wants.
    pub wanted: u32,
    /// How many the host has that match, in whatever state.
    pub matching: u32,
    /// How many of those the project may have.
    pub allowed: u32,
    /// How many of those are free.
    pub free: u32,
}

impl Rejection {
    /// Of the host as a whole.
    pub const fn of_host(reason: RejectionReason) -> Self {
        Self { request: None, reason, wanted: 0, matching: 0, allowed: 0, free: 0 }
    }
}

/// Why a host cannot serve.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum RejectionReason {
    /// The host has no matching device.
    NoSuchDevice,
    /// The host has matching devices, but too few are available.
    TooFewFree,
    /// Each request could be served alone, but not all at once: they want the same devices.
    Contention,
    /// The host has enough devices, but they are not available to this project.
    NotAllowed,
    /// The host was last updated too long ago.
    HostStale,
    /// The inventory has no such host.
    UnknownHost,
    /// Another filter's own reason, for people to read.
    Other(String),
}

impl RejectionReason {
    /// The spelling in JSON; of [`RejectionReason::Other`] its text.
    pub fn name(&self) -> &str {
        match self {
            Self::NoSuchDevice => "no-such-device",
            Self::TooFewFree => "too-few-free",
            Self::Contention => "contention",
            Self::NotAllowed => "not-allowed",
            Self::HostStale => "host-stale",
            Self::UnknownHost => "unknown-host",
            Self::Other(text) => text,
        }
    }
}

impl Serialize for RejectionReason {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.name())
    }
}

impl fmt::Display for Rejection {
    /// In words: `usb_devices[0] wants 2, and of 3 that match 1 is free`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { request, reason, wanted, matching, allowed, free } = self;
        if let Some(request) = request {
            write!(f, "usb_devices[{request}] wants {wanted}: ")?;
        }
        match reason {
            RejectionReason::NoSuchDevice => write!(f, "no device of the host matches"),
            RejectionReason::TooFewFree if allowed < matching => {
                write!(
                    f,
                    "{matching} match, {allowed} of them are for this project, {free} of those are \
                        free"
                )
            }
            RejectionReason::TooFewFree => write!(f, "{matching} match, {free} of them are free"),
            RejectionReason::Contention => {
                write!(f, "{free} are free, but other requests of the flavor need them")
            }
            RejectionReason::NotAllowed => {
                write!(f, "{matching} match, {allowed} of them are for this project")
            }
            RejectionReason::HostStale => write!(f, "the host was last heard of too long ago"),
            RejectionReason::UnknownHost => write!(f, "the host is not in the inventory"),
            RejectionReason::Other(text) => f.write_str(text),
        }
    }
}

/// One host of a selection.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Placement {
    /// The host's name.
    pub host: String,
    /// More is better; see [`Weights`].
    pub score: i32,
}

/// The best hosts.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Selection {
    /// How many hosts can serve, listed or not.
    pub matched: u32,
    /// The best of them, the best first.
    pub placements: Vec<Placement>,
}

/// Statistics of a filter's inventory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Statistics {
    /// Grows with every change.
    pub revision: u64,
    /// Number of hosts.
    pub hosts: u64,
    /// Number of devices.
    pub devices: u64,
    /// Number of available devices.
    pub available: u64,
    /// Number of keys by which devices are found: vendors, kinds, ports, classes and tags; the
    /// filter's own count.
    pub keys: u64,
}

impl Serialize for Verdict {
    /// `{"accepted":true,"score":8,"devices":[5]}`, or
    /// `{"accepted":false,"request":0,"reason":"too-few-free",…}`.
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        #[derive(Serialize)]
        struct Accepted<'a> {
            accepted: bool,
            score: i32,
            devices: &'a [DeviceId],
        }
        #[derive(Serialize)]
        struct Rejected<'a> {
            accepted: bool,
            #[serde(flatten)]
            rejection: &'a Rejection,
        }
        match self {
            Self::Accepted { score, devices } => {
                Accepted { accepted: true, score: *score, devices }.serialize(serializer)
            }
            Self::Rejected(rejection) => {
                Rejected { accepted: false, rejection }.serialize(serializer)
            }
        }
    }
}
