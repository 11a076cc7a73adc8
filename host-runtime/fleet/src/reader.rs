//! Following what stands below a prefix: list it, then watch from that revision on.
//!
//! ```text
//!             ┌─ etcd is another one, or older than before; or has forgotten our revision ─┐
//!             ▼                                                                            │
//!  connect ─► list at one revision, page by page ─► watch from the next revision on ───────┤
//!     ▲        (only what is news is told, and what                 │                      │
//!     │         was there and is no more)                           ▼                      │
//!     └──────────── pause, next endpoint ◄───────────────── the stream ends ───────────────┘
//!                                          (goes on from the last revision: no list)
//! ```

use std::collections::{HashMap, HashSet};

use etcd_client::{EventType, KeyValue, WatchOptions};
use virt_usb_config::Fleet;

use crate::etcd::{Connection, Error, Etcd, Pause, after, name};

/// What is told of the keys, in etcd's order. A key is told without what all of them begin with.
pub trait Sink {
    /// It holds that now.
    fn put(&mut self, key: &str, value: &[u8], revision: i64);
    /// It is no more.
    fn gone(&mut self, key: &str);
    /// All that there was at some moment has been told, and every change is, from now on.
    fn listed(&mut self) {}
    /// Nothing is heard, for this reason; what was told counts on.
    fn deaf(&mut self, _why: &Error) {}
}

/// Follows one prefix.
pub struct Reader {
    etcd: Etcd,
    prefix: String,
    /// Each key with the revision that its value was put at.
    known: HashMap<String, i64>,
    /// All changes up to this were told; 0: nothing was.
    revision: i64,
    cluster: u64,
}

impl Reader {
    /// Creates a reader of the keys below `prefix`.
    pub fn new(fleet: &Fleet, prefix: String) -> Self {
        let etcd = Etcd::new(fleet.clone());
        Self { etcd, prefix, known: HashMap::new(), revision: 0, cluster: 0 }
    }

    /// Follows for ever, beginning with a list. Who stops it may begin anew later: only what is
    /// news then is told.
    pub async fn follow(&mut self, sink: &mut impl Sink) {
        self.revision = 0;
        let mut pause = Pause::default();
        loop {
            let failure = match self.etcd.connect().await {
                Ok(mut connection) => {
                    let failure = self.follow_at(&mut connection, sink, &mut pause).await;
                    if !matches!(failure, Error::Compacted) {
                        self.etcd.pass_on();
                    }
                    failure
                }
                Err(failure) => failure,
            };
            if matches!(failure, Error::Compacted) {
                tracing::info!(
                    "etcd has forgotten revision {}: {} is listed anew",
                    self.revision,
                    self.prefix
                );
                self.revision = 0;
                continue;
            }
            sink.deaf(&failure);
            tokio::time::sleep(pause.next_wait()).await;
        }
    }

    /// Until it fails.
    async fn follow_at(
        &mut self,
        connection: &mut Connection,
        sink: &mut impl Sink,
        pause: &mut Pause,
    ) -> Error {
        if connection.cluster != self.cluster || connection.revision < self.revision {
            // Another etcd, or one that was restored: its revisions are not those that we know.
            self.cluster = connection.cluster;
            self.revision = 0;
            self.known.values_mut().for_each(|revision| *revision = 0);
        }
        if self.revision == 0
            && let Err(e) = self.list(connection, sink).await
        {
            return e;
        }
        match self.watch(connection, sink, pause).await {
            Ok(()) => Error::Unreachable(format!("{}: the watch has ended", connection.endpoint)),
            Err(e) => e,
        }
    }

    async fn list(
        &mut self,
        connection: &mut Connection,
        sink: &mut impl Sink,
    ) -> Result<(), Error> {
        let Self { etcd, prefix, known, .. } = self;
        let mut seen = HashSet::new();
        // What is told counts as known at once: a list may fail half way, and a key of it be gone
        // at the next.
        let each = |kv: &KeyValue| {
            let Some(key) = name(prefix, kv.key()) else { return };
            if known.insert(key.clone(), kv.mod_revision()) != Some(kv.mod_revision()) {
                sink.put(&key, kv.value(), kv.mod_revision());
            }
            seen.insert(key);
        };
        self.revision = etcd.list(connection, prefix, each).await?;
        known.retain(|key, _| {
            let there = seen.contains(key);
            if !there {
                sink.gone(key);
            }
            there
        });
        Ok(())
    }

    async fn watch(
        &mut self,
        connection: &mut Connection,
        sink: &mut impl Sink,
        pause: &mut Pause,
    ) -> Result<(), Error> {
        let options = WatchOptions::new()
            .with_range(after(&self.prefix))
            .with_start_revision(self.revision + 1)
            .with_progress_notify();
        let watch = connection.watch.watch(self.prefix.clone(), Some(options));
        let mut stream = self.etcd.within("watch the fleet", watch).await?;
        loop {
            let message =
                stream.message().await.map_err(|e| self.etcd.explain(&e, "watch the fleet"))?;
            let Some(message) = message else { return Ok(()) };
            if message.compact_revision() > 0 {
                return Err(Error::Compacted);
            }
            if message.canceled() {
                return Err(match message.cancel_reason() {
                    why if why.contains("permission denied") => {
                        Error::Denied { user: self.etcd.user(), what: "watch the fleet" }
                    }
                    why => Error::Unreachable(format!("{}: {why}", connection.endpoint)),
                });
            }
            if message.created() {
                pause.reset();
                sink.listed();
            }
            for event in message.events() {
                let Some(kv) = event.kv() else { continue };
                let Some(key) = name(&self.prefix, kv.key()) else { continue };
                match event.event_type() {
                    EventType::Put => {
                        sink.put(&key, kv.value(), kv.mod_revision());
                        self.known.insert(key, kv.mod_revision());
                    }
                    EventType::Delete => {
                        sink.gone(&key);
                        self.known.remove(&key);
                    }
                }
                self.revision = self.revision.max(kv.mod_revision());
            }
            if message.events().is_empty() && !message.created() {
                // Nothing has happened up to there.
                let now = message.header().map_or(0, etcd_client::ResponseHeader::revision);
                self.revision = self.revision.max(now);
            }
        }
    }
}
