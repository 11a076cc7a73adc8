//! libusb's hotplug events. An event only says that something came or went: what there is now is
//! for a scan to say.

use std::sync::mpsc::Sender;
use std::time::Duration;

use rusb::{Context, Device, Hotplug, HotplugBuilder, UsbContext};

use super::context::exit_later;

/// How long one wait for events lasts. It has no effect on how soon they arrive.
const WAIT: Duration = Duration::from_secs(60);
/// How long until another attempt on a machine without USB, or where libusb has failed.
const AGAIN: Duration = Duration::from_secs(5);

/// Sends a message for each device that is plugged in or out, from a thread of its own, until the
/// receiver is dropped. If hotplug is not available, calls `failed` once for each reason, and
/// retries.
///
/// # Errors
/// When no thread can be started.
pub fn follow<T: Clone + Send + 'static>(
    to: Sender<T>,
    message: T,
    failed: impl Fn(&str) + Send + 'static,
) -> std::io::Result<()> {
    let watch = move || {
        let mut told = None;
        loop {
            let why = match listen(&to, &message) {
                Ok(()) => return,
                Err(e) => e.to_string(),
            };
            if told.as_ref() != Some(&why) {
                failed(&why);
            }
            told = Some(why);
            std::thread::sleep(AGAIN);
            // What came in between was not heard.
            if to.send(message.clone()).is_err() {
                return;
            }
        }
    };
    std::thread::Builder::new().name("hotplug".into()).spawn(watch).map(drop)
}

/// Returns when the receiver is dropped.
fn listen<T: Clone + Send + 'static>(to: &Sender<T>, message: &T) -> rusb::Result<()> {
    // Not rusb::has_hotplug: it panics on a machine where libusb cannot start.
    let context = Context::new()?;
    let done = hear(&context, to, message);
    exit_later(context);
    done
}

fn hear<T: Clone + Send + 'static>(
    context: &Context,
    to: &Sender<T>,
    message: &T,
) -> rusb::Result<()> {
    let bell = Bell { to: to.clone(), message: message.clone() };
    let _registered = HotplugBuilder::new().enumerate(false).register(context, Box::new(bell))?;
    // Between the last scan and this moment something may have come.
    while to.send(message.clone()).is_ok() {
        context.handle_events(Some(WAIT))?;
    }
    Ok(())
}

struct Bell<T> {
    to: Sender<T>,
    message: T,
}

impl<T: Clone + Send> Hotplug<Context> for Bell<T> {
    fn device_arrived(&mut self, _: Device<Context>) {
        // The receiver may have been dropped.
        drop(self.to.send(self.message.clone()));
    }

    fn device_left(&mut self, _: Device<Context>) {
        drop(self.to.send(self.message.clone()));
    }
}
