//! libusb's contexts, and how one ends.
//!
//! `libusb_exit` crashes the program (`usbi_hotplug_exit`, in 1.0.26 and 1.0.27) when a device in
//! the context's list has a parent hub that is not in the list. libusb removes a hub from the list
//! when udev reports its end. A controller that is reset, or unbound and bound again, makes such a
//! list: libusb finds the new hub and the new device in sysfs, under the numbers of the old ones,
//! and then reads udev's report about the old hub. The agent used a new context for each look, and
//! ended in this way. Now one context lasts and follows the events. A context that is replaced is
//! exited at the next look, when its own events have been handled.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use rusb::{Context, Device, UsbContext};

/// The contexts of this process. One thread at a time looks at devices.
struct Contexts {
    /// The context that devices are listed from.
    lasting: Option<Context>,
    /// Contexts that were replaced and not exited yet.
    replaced: Vec<Context>,
}

static CONTEXTS: Mutex<Contexts> = Mutex::new(Contexts { lasting: None, replaced: Vec::new() });

/// Lists the devices of the lasting context.
///
/// # Errors
/// When libusb cannot start, as on a machine without USB.
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
/// For when libusb missed events, and where it hears none, as without udev.
///
/// # Errors
/// When libusb cannot start.
pub(super) fn devices_anew() -> rusb::Result<Vec<Device<Context>>> {
    let replaced = CONTEXTS.lock().unwrap_or_else(PoisonError::into_inner).lasting.take();
    replaced.into_iter().for_each(exit_later);
    devices()
}

/// Keeps a context until [`exit_replaced`].
pub(super) fn exit_later(context: Context) {
    CONTEXTS.lock().unwrap_or_else(PoisonError::into_inner).replaced.push(context);
}

/// Exits the contexts that an earlier look replaced, except those that would crash `libusb_exit`.
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
    // libusb keeps a message for each event, and what has gone with it, until they are handled.
    context.handle_events(Some(Duration::ZERO))?;
    context.devices().map(|list| list.iter().collect())
}
