//! libusb's contexts, and how one ends.
//!
//! `libusb_exit` takes a hub from the context's list that its last device refers to, whether it is in the list or not
//! (`usbi_hotplug_exit`; 1.0.26 to 1.0.28 have it), and the program ends with a segmentation fault. A hub is not in the
//! list where libusb heard that it has gone while its device stayed. That is what a controller brings about that is reset,
//! or unbound and bound again: there are a new hub and a new device under the numbers of the old ones, libusb finds them
//! in sysfs, and then hears udev tell of the end of the old hub. A fresh context for each look ended agents in this way,
//! so one context lasts, and follows the events.

use std::sync::{Mutex, PoisonError};

use rusb::{Context, Device, UsbContext};

/// The context that devices are listed from. It lasts as long as the process.
static LISTING: Mutex<Option<Context>> = Mutex::new(None);

/// What one context lists.
///
/// # Errors
/// When libusb cannot start, as on a machine without USB.
pub(super) fn devices() -> rusb::Result<Vec<Device<Context>>> {
    let mut listing = LISTING.lock().unwrap_or_else(PoisonError::into_inner);
    let context = match listing.take() {
        Some(context) => context,
        None => Context::new()?,
    };
    let found = list(&context);
    *listing = Some(context);
    found
}

/// What a fresh context lists, which looks at everything again: for when events were missed, or where there are none, as
/// without udev. Nobody may keep a device of [`devices`] meanwhile.
///
/// # Errors
/// When libusb cannot start.
pub(super) fn devices_anew() -> rusb::Result<Vec<Device<Context>>> {
    let before = LISTING.lock().unwrap_or_else(PoisonError::into_inner).take();
    if let Some(context) = before {
        end(context);
    }
    devices()
}

/// Ends a context, unless libusb would crash: then it stays, and costs some memory.
pub(super) fn end(context: Context) {
    let is_whole = list(&context).is_ok_and(|devices| {
        let is_listed = |hub: &Device<Context>| devices.iter().any(|d| d.as_raw() == hub.as_raw());
        devices.iter().filter_map(Device::get_parent).all(|hub| is_listed(&hub))
    });
    if !is_whole {
        std::mem::forget(context);
    }
}

fn list(context: &Context) -> rusb::Result<Vec<Device<Context>>> {
    context.devices().map(|list| list.iter().collect())
}
