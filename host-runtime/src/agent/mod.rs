//! The agent: keeps the inventory true, and makes a claim into a device in the guest.
//!
//! ```text
//!  libusb, sysfs ─► devices (thread) ─► store ◄── hook, virt-usb
//!                        │ something changed       ▲
//!                        ▼                         │ claims settled, given back, ended
//!  libvirt ─ events ─► guests (thread) ─► workers ─┴─► libvirt: attach, detach
//! ```
//! | module | what it does |
//! |---|---|
//! | [`plan`] | what is to be done about one instance: pure |
//! | [`observe`] | what the planner is shown |
//! | [`work`] | does it, until nothing is left |
//! | [`operate`] | what people ask for: attach, detach, start |
//! | `guests` | who is looked at when; retries |
//! | `workers` | the threads that do it |
//! | `devices` | from events to rows; the configuration |
//! | `guest_uses` | what guests use of the host's devices without a claim |
//! | `signals` | what the two threads tell each other |
//! | `live_config` | the configuration that counts now |
//! | [`health`] | what it says of itself to `virt-usb doctor` |
//!
//! It may be killed at any moment: what it knows it reads again, from the store, from sysfs and
//! from the live XML.

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

/// The agent in the audit.
pub(crate) const ACTOR: &str = "virt-usbd";
