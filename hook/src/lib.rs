//! The hook that libvirt calls at every step of a domain's life.
//!
//! ```text
//!  argv ──► Call ──┐
//!                  ├─► run: what may fail how ──► prepare │ incoming │ notice ──► Answer ──► stdout, stderr, exit
//!  stdin ─► Input ─┘                               │ (claims in the store, sysfs at the ports)   └──► one journal record
//! ```
//! It is a library too, so that agent and command line claim and rewrite with the same code:
//! [`config`], [`sysfs`], [`machine`], [`verify`], [`lifecycle::take_over`], [`rules`], [`flavor_source`] and
//! [`run::handle_with`] are shared, and nothing here may need libvirt, libusb or an async runtime.
//!
//! libvirt holds the domain's lock while the hook runs, and waits until every descriptor that it
//! passed is closed. Therefore the hook calls no service, starts no process, and waits only for the
//! store's lock, for at most two seconds.

pub mod answer;
pub mod call;
mod device_use;
pub mod flavor_source;
mod incoming;
pub mod input;
mod job;
pub mod journal;
pub mod lifecycle;
pub mod message;
mod prepare;
pub mod run;
pub mod verify;
