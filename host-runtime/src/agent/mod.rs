//! The agent: keeps the inventory up to date, and attaches claimed devices to guests.
//!
//! ```text
//!  libusb, sysfs ─► devices (thread) ─► store ◄── hook, virt-usb
//!                        │ something changed       ▲
//!                        ▼                         │ claims confirmed, released, ended
//!  libvirt ─ events ─► guests (thread) ─► workers ─┴─► libvirt: attach, detach
//! ```
//! | module | what it does |
//! |---|---|
//! | [`plan`] | plans the steps for one instance, without IO |
//! | [`observe`] | reads the inputs of the planner |
//! | [`work`] | executes the steps until none remain |
//! | [`operate`] | operations of users: attach, detach, start |
//! | `guests` | the guests' thread: schedules checks and retries |
//! | `workers` | the threads that check guests |
//! | `devices` | the devices' thread: scans devices, reloads the configuration |
//! | `guest_uses` | finds devices that guests use without a claim |
//! | `signals` | signals between the two threads |
//! | `live_config` | the configuration in effect |
//! | [`health`] | reports the agent's state to `virt-usb doctor` |
//!
//! The agent may be killed at any moment. At its start it reads its state again from the store,
//! sysfs and the live XML.

pub(crate) mod devices;
pub mod guest_uses;
pub(crate) mod guests;
pub mod health;
pub(crate) mod live_config;
pub mod observe;
pub mod operate;
pub mod plan;
pub(crate) mod signals;
pub mod work;
mod workers;

/// Name of the agent in the audit trail.
pub(crate) const ACTOR: &str = "virt-usbd";
