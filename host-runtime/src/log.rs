//! Where the long-running programs write what happens.

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;

use tracing::Level;
use tracing_subscriber::filter::LevelFilter;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

/// To the journal, where systemd says that stderr is connected to it (JOURNAL_STREAM, systemd.exec(5)); to stderr otherwise.
pub fn start(level: Level) {
    let registry = tracing_subscriber::registry().with(LevelFilter::from_level(level));
    match is_journal().then(tracing_journald::layer).and_then(Result::ok) {
        Some(journal) => registry.with(journal).init(),
        None => {
            let plain = tracing_subscriber::fmt::layer()
                .with_writer(std::io::stderr)
                .with_target(false)
                .with_ansi(false);
            registry.with(plain).init();
        }
    }
}

/// Whether JOURNAL_STREAM is about our stderr: programs started from a service inherit the variable with another one.
fn is_journal() -> bool {
    let Some(stream) = std::env::var_os("JOURNAL_STREAM") else { return false };
    let stderr = std::io::stderr().as_fd().try_clone_to_owned().map(File::from);
    let ours =
        stderr.and_then(|file| file.metadata()).map(|found| format!("{}:{}", found.dev(), found.ino()));
    ours.is_ok_and(|ours| stream == *ours)
}
