//! libusb's hotplug events. An event only signals a change. A scan determines the current devices.

use std::sync::mpsc::Sender;
use std::time::Duration;

use rusb::{Context, Device, Hotplug, HotplugBuilder, UsbContext};

use super::context::exit_later;

/// Timeout of one wait for events. It has no effect on their delay.
const EVENT_TIMEOUT: Duration = Duration::from_secs(60);
/// Wait before a retry on a machine without USB, or after libusb has failed.
const RETRY_INTERVAL: Duration = Duration::from_secs(5);

/// Sends a message for each device that is plugged in or out, from a thread of its own, until the
/// receiver is dropped. If hotplug is not available, calls `failed` once for each reason, and
/// retries.
///
/// # Errors
/// If the thread cannot be started.
pub fn follow<T: Clone + Send + 'static>(
    to: Sender<T>,
    message: T,
    failed: impl Fn(&str) + Send + 'static,
) -> std::io::Result<()> {
    let watch = move || {
        let mut reported = None;
        loop {
            let why = match listen(&to, &message) {
                Ok(()) => return,
                Err(e) => e.to_string(),
            };
            if reported.as_ref() != Some(&why) {
                failed(&why);
            }
            reported = Some(why);
            std::thread::sleep(RETRY_INTERVAL);
            // Events in the meantime were missed.
            if to.send(message.clone()).is_err() {
                return;
            }
        }
    };
    std::thread::Builder::new().name("hotplug".into()).spawn(watch).map(drop)
}

/// Follows events until the receiver is dropped.
fn listen<T: Clone + Send + 'static>(to: &Sender<T>, message: &T) -> rusb::Result<()> {
    // Not rusb::has_hotplug: it panics on a machine where libusb cannot start.
    let context = Context::new()?;
    let done = forward(&context, to, message);
    exit_later(context);
    done
}

fn forward<T: Clone + Send + 'static>(
    context: &Context,
    to: &Sender<T>,
    message: &T,
) -> rusb::Result<()> {
    let sender = EventSender { to: to.clone(), message: message.clone() };
    let _registered = HotplugBuilder::new().enumerate(false).register(context, Box::new(sender))?;
    // The devices may have changed since the last scan.
    while to.send(message.clone()).is_ok() {
        context.handle_events(Some(EVENT_TIMEOUT))?;
    }
    Ok(())
}

struct EventSender<T> {
    to: Sender<T>,
    message: T,
}

impl<T: Clone + Send> Hotplug<Context> for EventSender<T> {
    fn device_arrived(&mut self, _: Device<Context>) {
        // The receiver may have been dropped.
        drop(self.to.send(self.message.clone()));
    }

    fn device_left(&mut self, _: Device<Context>) {
        drop(self.to.send(self.message.clone()));
    }
}
