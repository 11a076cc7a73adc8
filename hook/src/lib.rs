//! The hook that libvirt calls at every step of a domain's life.
//!
//! ```text
//!  argv ──► Call ──┐
//!                  ├─► run ──► prepare │ incoming │ lifecycle ──► Answer ──► stdout, stderr, exit
//!  stdin ─► Input ─┘           (claims in the store,             └──► one journal record
//!                               devices in sysfs)
//! ```
//! The hook is also a library, so that the agent and the command line claim devices and rewrite XML
//! with the same code: they use [`verify`], [`lifecycle::take_over`], [`flavor_source`] and
//! [`run::handle_with`]. Nothing here may need libvirt, libusb or an async runtime.
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
