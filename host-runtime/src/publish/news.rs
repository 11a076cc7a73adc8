//! Whether somebody has written to the inventory: the kernel tells, so that nobody has to ask all
//! the time.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;

use rustix::fs::inotify::{self, CreateFlags, Reader, WatchFlags};
use rustix::io::Errno;
use tokio::sync::Notify;
use virt_usb_store::FILE_NAME;

/// Told after each write to the database or its log in that folder, for as long as the process
/// lives; what comes while nobody waits is told once to whoever waits next.
///
/// # Errors
/// When the kernel does not follow one folder more.
pub(super) fn follow(state_dir: &Path) -> io::Result<Arc<Notify>> {
    let events = inotify::init(CreateFlags::CLOEXEC)?;
    // The folder, not the files: those are replaced by 'store restore'.
    inotify::add_watch(
        &events,
        state_dir,
        WatchFlags::MODIFY | WatchFlags::MOVED_TO | WatchFlags::CREATE,
    )?;
    let news = Arc::new(Notify::new());
    let told = news.clone();
    std::thread::Builder::new().name("news".into()).spawn(move || tell(&events, &told))?;
    Ok(news)
}

fn tell(events: &OwnedFd, news: &Notify) {
    let mut buffer = [MaybeUninit::uninit(); 4096];
    let mut reader = Reader::new(events, &mut buffer);
    loop {
        match reader.next() {
            // Without a name: too many at once, or the folder itself.
            Ok(event) => {
                if event
                    .file_name()
                    .is_none_or(|name| name.to_bytes().starts_with(FILE_NAME.as_bytes()))
                {
                    news.notify_one();
                }
            }
            Err(Errno::INTR) => {}
            Err(e) => {
                tracing::error!("writes to the inventory are not heard of any more: {e}");
                return;
            }
        }
    }
}
