//! Follows the keys below a prefix: lists them, then watches from that revision on.
//!
//! ```text
//!             ┌── another etcd, or one that was restored, or the revision was compacted ───┐
//!             ▼                                                                            │
//!  connect ─► list at one revision, page by page ─► watch from the next revision on ───────┤
//!     ▲        (reports new, changed and                            │                      │
//!     │         removed keys only)                                  ▼                      │
//!     └──────────── backoff, next endpoint ◄────────────── the stream ends ────────────────┘
//!                                          (continues from the last revision: no list)
//! ```

use std::collections::{HashMap, HashSet};

use etcd_client::{EventType, KeyValue, WatchOptions};
use virt_usb_config::Fleet;

use crate::etcd::{Backoff, Connection, Error, Etcd, after, name};

/// Receiver of changes, in etcd's order. Keys are passed without the reader's prefix.
pub trait Sink {
    /// Called when `key` is new or has a new value.
    fn put(&mut self, key: &str, value: &[u8], revision: i64);
    /// Called when `key` was removed.
    fn removed(&mut self, key: &str);
    /// Called when the sink knows all keys of one revision and receives all later changes.
    fn listed(&mut self) {}
    /// Called when the connection is lost. Keys that were reported before stay valid.
    fn disconnected(&mut self, _why: &Error) {}
}

/// Follows the keys below one prefix.
pub struct Reader {
    etcd: Etcd,
    prefix: String,
    /// Each known key with the revision of its value.
    known: HashMap<String, i64>,
    /// The revision up to which all changes were reported, or 0.
    revision: i64,
    cluster: u64,
}

impl Reader {
    /// Creates a reader of the keys below `prefix`.
    pub fn new(fleet: &Fleet, prefix: String) -> Self {
        let etcd = Etcd::new(fleet.clone());
        Self { etcd, prefix, known: HashMap::new(), revision: 0, cluster: 0 }
    }

    /// Follows the keys forever, beginning with a list. After the future was dropped, it can be
    /// called again: the list then reports only what has changed in the meantime.
    pub async fn follow(&mut self, sink: &mut impl Sink) {
        self.revision = 0;
        let mut backoff = Backoff::default();
        loop {
            let failure = match self.etcd.connect().await {
                Ok(mut connection) => {
                    let failure = self.follow_at(&mut connection, sink, &mut backoff).await;
                    if !matches!(failure, Error::Compacted) {
                        self.etcd.next_endpoint();
                    }
                    failure
                }
                Err(failure) => failure,
            };
            if matches!(failure, Error::Compacted) {
                tracing::info!(
                    "etcd has compacted revision {}: listing {} again",
                    self.revision,
                    self.prefix
                );
                self.revision = 0;
                continue;
            }
            sink.disconnected(&failure);
            tokio::time::sleep(backoff.next_wait()).await;
        }
    }

    /// Follows the keys over one connection until it fails.
    async fn follow_at(
        &mut self,
        connection: &mut Connection,
        sink: &mut impl Sink,
        backoff: &mut Backoff,
    ) -> Error {
        if connection.cluster != self.cluster || connection.revision < self.revision {
            // Another etcd, or one that was restored: the known revisions mean nothing to it.
            self.cluster = connection.cluster;
            self.revision = 0;
            self.known.values_mut().for_each(|revision| *revision = 0);
        }
        if self.revision == 0
            && let Err(e) = self.list(connection, sink).await
        {
            return e;
        }
        match self.watch(connection, sink, backoff).await {
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
        // A key is known as soon as it was reported. If this list fails half way, the next one must
        // report the removal of such a key.
        let each = |kv: &KeyValue| {
            let Some(key) = name(prefix, kv.key()) else { return };
            if known.insert(key.clone(), kv.mod_revision()) != Some(kv.mod_revision()) {
                sink.put(&key, kv.value(), kv.mod_revision());
            }
            seen.insert(key);
        };
        self.revision = etcd.list(connection, prefix, each).await?;
        known.retain(|key, _| {
            let is_listed = seen.contains(key);
            if !is_listed {
                sink.removed(key);
            }
            is_listed
        });
        Ok(())
    }

    async fn watch(
        &mut self,
        connection: &mut Connection,
        sink: &mut impl Sink,
        backoff: &mut Backoff,
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
                backoff.reset();
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
                        sink.removed(&key);
                        self.known.remove(&key);
                    }
                }
                self.revision = self.revision.max(kv.mod_revision());
            }
            if message.events().is_empty() && !message.created() {
                // A progress notification: there is no change up to this revision.
                let now = message.header().map_or(0, etcd_client::ResponseHeader::revision);
                self.revision = self.revision.max(now);
            }
        }
    }
}
