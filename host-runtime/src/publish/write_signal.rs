//! Notifications of writes to the inventory, through inotify instead of polling.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;

use rustix::fs::inotify::{self, CreateFlags, Reader, WatchFlags};
use rustix::io::Errno;
use tokio::sync::Notify;
use virt_usb_store::FILE_NAME;

/// Returns a signal that is notified after each write to the database or its log in `state_dir`, as
/// long as the process runs. Writes while no task waits are merged into one notification.
///
/// # Errors
/// If the limit of inotify instances or watches is reached.
pub(super) fn follow(state_dir: &Path) -> io::Result<Arc<Notify>> {
    let events = inotify::init(CreateFlags::CLOEXEC)?;
    // Watch the directory, because 'store restore' replaces the files.
    inotify::add_watch(
        &events,
        state_dir,
        WatchFlags::MODIFY | WatchFlags::MOVED_TO | WatchFlags::CREATE,
    )?;
    let writes = Arc::new(Notify::new());
    let notify = writes.clone();
    std::thread::Builder::new().name("writes".into()).spawn(move || forward(&events, &notify))?;
    Ok(writes)
}

fn forward(events: &OwnedFd, writes: &Notify) {
    let mut buffer = [MaybeUninit::uninit(); 4096];
    let mut reader = Reader::new(events, &mut buffer);
    loop {
        match reader.next() {
            // An event without a name is a queue overflow, or concerns the directory itself.
            Ok(event) => {
                if event
                    .file_name()
                    .is_none_or(|name| name.to_bytes().starts_with(FILE_NAME.as_bytes()))
                {
                    writes.notify_one();
                }
            }
            Err(Errno::INTR) => {}
            Err(e) => {
                tracing::error!("the agent no longer receives notifications of writes: {e}");
                return;
            }
        }
    }
}
