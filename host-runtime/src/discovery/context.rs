//! libusb's contexts, and their safe end.
//!
//! `libusb_exit` crashes the program (`usbi_hotplug_exit`, in 1.0.26 and 1.0.27) if a device in the
//! context's list has a parent hub that is not in the list. libusb removes a hub from the list when
//! udev reports its removal. A reset or rebound controller leads to such a list: libusb finds the
//! new hub and the new device in sysfs, under the numbers of the old ones, and then reads udev's
//! report about the old hub. Therefore the agent keeps one context, which follows the events. A
//! replaced context is exited at the next scan, after its own events have been handled.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use rusb::{Context, Device, UsbContext};

/// The contexts of this process. Only one thread at a time lists devices.
struct Contexts {
    /// The context for listing devices.
    lasting: Option<Context>,
    /// Contexts that were replaced and not exited yet.
    replaced: Vec<Context>,
}

static CONTEXTS: Mutex<Contexts> = Mutex::new(Contexts { lasting: None, replaced: Vec::new() });

/// Lists the devices of the lasting context.
///
/// # Errors
/// If libusb cannot start, as on a machine without USB.
pub(super) fn devices() -> rusb::Result<Vec<Device<Context>>> {
    let mut contexts = CONTEXTS.lock().unwrap_or_else(PoisonError::into_inner);
    let context = match contexts.lasting.take() {
        Some(context) => context,
        None => Context::new()?,
    };
    let found = list(&context);
    contexts.lasting = Some(context);
    found
}

/// Replaces the lasting context and lists the devices of the new one, which libusb finds in sysfs.
/// Needed if libusb missed events, or receives none because there is no udev.
///
/// # Errors
/// If libusb cannot start.
pub(super) fn devices_of_new_context() -> rusb::Result<Vec<Device<Context>>> {
    let replaced = CONTEXTS.lock().unwrap_or_else(PoisonError::into_inner).lasting.take();
    replaced.into_iter().for_each(exit_later);
    devices()
}

/// Keeps a context until [`exit_replaced`].
pub(super) fn exit_later(context: Context) {
    CONTEXTS.lock().unwrap_or_else(PoisonError::into_inner).replaced.push(context);
}

/// Exits the contexts that an earlier scan replaced, except those that would crash `libusb_exit`.
pub(super) fn exit_replaced() {
    let mut contexts = CONTEXTS.lock().unwrap_or_else(PoisonError::into_inner);
    contexts.replaced.retain(|context| !has_all_parents(context));
}

/// Whether each parent of a listed device is listed.
fn has_all_parents(context: &Context) -> bool {
    list(context).is_ok_and(|devices| {
        let is_listed = |hub: &Device<Context>| devices.iter().any(|d| d.as_raw() == hub.as_raw());
        devices.iter().filter_map(Device::get_parent).all(|hub| is_listed(&hub))
    })
}

fn list(context: &Context) -> rusb::Result<Vec<Device<Context>>> {
    // libusb keeps a message for each event, and the removed device, until they are handled.
    context.handle_events(Some(Duration::ZERO))?;
    context.devices().map(|list| list.iter().collect())
}
