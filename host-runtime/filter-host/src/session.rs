//! A session: the use of a filter by one thread.
//!
//! ```text
//!              first call, or after a fault                 every call
//!   (nothing) ──────────────────────────────► instance ◄────────────────────┐
//!                new instance, whole fleet       │ feed changes, then call ─┘
//!       ▲                                        │
//!       └────────────────────────────────────────┘ fault: drop the instance
//! ```

use std::collections::{BTreeMap, HashSet};
use std::sync::{Arc, Mutex, PoisonError};

use virt_usb_model::scheduling::{Question, Selection, Verdict};

use crate::fleet::{Host, Update};
use crate::instance::{Instance, PreparedHandle};
use crate::{Error, Filter, Fleet, Statistics};

/// Maximum number of hosts in a chunk of documents, because a filter describes at most this number
/// of refused lines.
const CHUNK_HOSTS: usize = 100;
/// Maximum size of a chunk in bytes, unless one document is longer. A chunk that fits the
/// processor's cache is cheap to copy.
const CHUNK_BYTES: usize = 128 << 10;

/// An instance of a filter that follows a fleet. A session may move between threads, but serves one
/// at a time: create one for each thread. Each has its own copy of the fleet's inventory.
pub struct Session {
    filter: Filter,
    fleet: Fleet,
    running: Option<Running>,
    problems: BTreeMap<String, String>,
    dropped: Dropped,
}

/// Prepared questions that were dropped, which the instance can forget.
type Dropped = Arc<Mutex<Vec<u64>>>;

struct Running {
    instance: Instance,
    /// Number of the fleet's changes that the instance knows.
    seen: u64,
    /// Hosts that the filter knows.
    known: HashSet<Arc<str>>,
    prepared: BTreeMap<u64, PreparedHandle>,
}

/// A question that was prepared in a session. It stays valid after faults of the filter. After it
/// was dropped, the next call frees it in the instance.
#[derive(Debug)]
pub struct Prepared {
    question: Question,
    number: u64,
    dropped: Dropped,
}

impl Drop for Prepared {
    fn drop(&mut self) {
        self.dropped.lock().unwrap_or_else(PoisonError::into_inner).push(self.number);
    }
}

impl std::fmt::Debug for Session {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Session")
            .field("filter", &self.filter)
            .field("running", &self.running.is_some())
            .finish_non_exhaustive()
    }
}

impl Session {
    pub(crate) fn new(filter: Filter, fleet: Fleet) -> Self {
        Self {
            filter,
            fleet,
            running: None,
            problems: BTreeMap::new(),
            dropped: Dropped::default(),
        }
    }

    /// Selects the best hosts, at most `limit`, among the candidates or in the whole fleet.
    ///
    /// # Errors
    /// [`Error::Refused`] if the question is invalid, [`Error::Broken`] if the filter failed.
    pub fn select(
        &mut self,
        question: &Question,
        candidates: Option<&[String]>,
        limit: u32,
    ) -> Result<Selection, Error> {
        self.ask(|running| running.instance.select(question, candidates, limit, &running.known))
    }

    /// Verdict of the filter about one host, with the reason.
    ///
    /// # Errors
    /// As [`Session::select`].
    pub fn explain(&mut self, question: &Question, host: &str) -> Result<Verdict, Error> {
        self.ask(|running| running.instance.explain(question, host))
    }

    /// Prepares a question for [`Session::check`] with many hosts.
    ///
    /// # Errors
    /// As [`Session::select`].
    pub fn prepare(&mut self, question: Question) -> Result<Prepared, Error> {
        use std::sync::atomic::{AtomicU64, Ordering};
        static NUMBER: AtomicU64 = AtomicU64::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let prepared = Prepared { question, number, dropped: self.dropped.clone() };
        self.ask(|running| running.handle(&prepared).map(drop))?;
        Ok(prepared)
    }

    /// Verdict of the filter about one host at the time `now`, which matters if the question has a
    /// time.
    ///
    /// # Errors
    /// As [`Session::select`].
    pub fn check(&mut self, prepared: &Prepared, host: &str, now: u64) -> Result<Verdict, Error> {
        self.ask(|running| {
            let handle = running.handle(prepared)?;
            running.instance.check(handle, &prepared.question, host, now)
        })
    }

    /// Statistics of the filter's inventory.
    ///
    /// # Errors
    /// As [`Session::select`].
    pub fn statistics(&mut self) -> Result<Statistics, Error> {
        self.ask(|running| running.instance.statistics())
    }

    /// Memory of the instance in bytes, or 0 if there is none.
    pub fn memory(&self) -> usize {
        self.running.as_ref().map_or(0, |running| running.instance.memory())
    }

    /// Hosts whose last document or change the filter has refused, with the reason, as of the last
    /// call. An instance keeps the previous document of such a host; a new instance does not know
    /// the host.
    pub const fn problems(&self) -> &BTreeMap<String, String> {
        &self.problems
    }

    /// Creates an instance if there is none, feeds it the changes of the fleet, and calls it. A
    /// fault ends the instance.
    fn ask<T>(
        &mut self,
        question: impl FnOnce(&mut Running) -> Result<T, Error>,
    ) -> Result<T, Error> {
        let running = self.running.take();
        // Release the fleet's lock before calling the filter.
        let (update, seen) = {
            let hosts = self.fleet.read();
            (hosts.update(running.as_ref().map(|running| running.seen)), hosts.count())
        };
        let mut running = match running {
            Some(running) if !update.is_full => running,
            _ => {
                self.problems.clear();
                Running::new(self.filter.instance()?)
            }
        };
        let dropped =
            std::mem::take(&mut *self.dropped.lock().unwrap_or_else(PoisonError::into_inner));
        for number in dropped {
            if let Some(handle) = running.prepared.remove(&number) {
                running.instance.forget(handle)?;
            }
        }
        running.feed(update, &mut self.problems)?;
        running.seen = seen;
        match question(&mut running) {
            Err(fault @ Error::Broken { .. }) => Err(fault),
            answer => {
                self.running = Some(running);
                answer
            }
        }
    }
}

type Problems = BTreeMap<String, String>;

impl Running {
    fn new(instance: Instance) -> Self {
        Self { instance, seen: 0, known: HashSet::new(), prepared: BTreeMap::new() }
    }

    fn handle(&mut self, prepared: &Prepared) -> Result<PreparedHandle, Error> {
        if let Some(handle) = self.prepared.get(&prepared.number) {
            return Ok(*handle);
        }
        let handle = self.instance.prepare(&prepared.question)?;
        self.prepared.insert(prepared.number, handle);
        Ok(handle)
    }

    fn feed(&mut self, update: Update, problems: &mut Problems) -> Result<(), Error> {
        let Update { is_full: _, documents, removed, statuses, touched } = update;
        for host in removed {
            self.instance.remove(&host)?;
            self.known.remove(&host);
            problems.remove(&*host);
        }
        self.feed_documents(documents, problems)?;
        for (host, device, status) in statuses {
            let result = self.instance.set_status(&host, device, status);
            record_refusal(result, &host, problems)?;
        }
        for (host, received) in touched {
            self.instance.touch(&host, received)?;
        }
        Ok(())
    }

    /// Feeds documents in chunks with one time of receipt each, then the changes of their devices.
    fn feed_documents(
        &mut self,
        mut hosts: Vec<Host>,
        problems: &mut Problems,
    ) -> Result<(), Error> {
        hosts.sort_unstable_by(|a, b| (a.received, &a.name).cmp(&(b.received, &b.name)));
        let (mut lines, mut chunk) = (String::new(), Vec::new());
        let mut time = 0;
        for host in &hosts {
            let full =
                chunk.len() == CHUNK_HOSTS || lines.len() + host.document.len() > CHUNK_BYTES;
            if !chunk.is_empty() && (full || host.received != time) {
                self.load(&lines, time, &chunk, problems)?;
                lines.clear();
                chunk.clear();
            }
            time = host.received;
            lines.push_str(&host.document);
            lines.push('\n');
            chunk.push(host.name.clone());
        }
        if !chunk.is_empty() {
            self.load(&lines, time, &chunk, problems)?;
        }
        for host in &hosts {
            for (device, status) in &host.statuses {
                let result = self.instance.set_status(&host.name, *device, *status);
                record_refusal(result, &host.name, problems)?;
            }
        }
        Ok(())
    }

    fn load(
        &mut self,
        lines: &str,
        received: u64,
        chunk: &[Arc<str>],
        problems: &mut Problems,
    ) -> Result<(), Error> {
        let refused = self.instance.load(lines, received, chunk.len())?;
        for host in chunk {
            problems.remove(&**host);
            self.known.insert(host.clone());
        }
        for (line, why) in refused {
            problems.insert(chunk[line].to_string(), why);
        }
        Ok(())
    }
}

/// Records a refused change as a problem of its host. Other errors are returned.
fn record_refusal<T>(
    result: Result<T, Error>,
    host: &str,
    problems: &mut Problems,
) -> Result<(), Error> {
    match result {
        Err(Error::Refused(why)) => {
            // The first error is the one to fix.
            problems.entry(host.to_owned()).or_insert(why);
            Ok(())
        }
        result => result.map(drop),
    }
}
