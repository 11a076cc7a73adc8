//! libusb's contexts, and how one ends.
//!
//! `libusb_exit` crashes the program (`usbi_hotplug_exit`, in 1.0.26 and 1.0.27) when a device in
//! the context's list has a parent hub that is not in the list. libusb removes a hub from the list
//! when udev reports its end. A controller that is reset, or unbound and bound again, makes such a
//! list: libusb finds the new hub and the new device in sysfs, under the numbers of the old ones,
//! and then reads udev's report about the old hub. The agent used a new context for each look, and
//! ended in this way. Now one context lasts and follows the events.

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

/// What a new context lists. It looks at everything again: for when events were missed, or where
/// there are none, as without udev. The caller keeps no device of [`devices`] meanwhile.
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
