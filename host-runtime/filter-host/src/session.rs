//! One thread's conversation with a filter.
//!
//! ```text
//!              first call, or after a fault                     every call
//!   (nothing) ──────────────────────────────► instance ◄──────────────────────────┐
//!                fresh instance, whole fleet     │ feed what has changed, then ask ─┘
//!       ▲                                        │
//!       └────────────────────────────────────────┘ fault: the instance is thrown away
//! ```

use std::collections::{BTreeMap, HashSet};
use std::sync::{Arc, Mutex, PoisonError};

use virt_usb_model::scheduling::{Question, Selection, Verdict};

use crate::fleet::{Host, News};
use crate::instance::{Instance, PreparedHandle};
use crate::{Error, Filter, Fleet, Statistics};

/// Maximum number of hosts in a chunk of documents, because a filter describes at most this number
/// of refused lines.
const CHUNK_HOSTS: usize = 100;
/// Maximum size of a chunk in bytes, unless one document is longer. A chunk that fits the
/// processor's cache is cheap to copy.
const CHUNK_BYTES: usize = 128 << 10;

/// A filter's instance, which follows a fleet. It may move between threads, and serves one at a
/// time; make one for each. Each holds the fleet's inventory in memory of its own.
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
    /// How many of the fleet's changes it knows.
    seen: u64,
    /// Hosts that the filter knows.
    known: HashSet<Arc<str>>,
    prepared: BTreeMap<u64, PreparedHandle>,
}

/// A question that was prepared in a session. It outlives faults of the filter. Once it is dropped
/// the next call gives it up.
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

    /// The best hosts, at most `limit`, among the candidates or else in the whole fleet.
    ///
    /// # Errors
    /// [`Error::Refused`] and [`Error::Broken`] are two things: see there.
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

    /// Prepares a question that will be asked host by host.
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

    /// The memory of its instance, in bytes; 0 while there is none.
    pub fn memory(&self) -> usize {
        self.running.as_ref().map_or(0, |running| running.instance.memory())
    }

    /// Hosts whose last document or change the filter has refused, and why; as of the last call.
    /// What an instance knew of them before still counts; a fresh one does not know them.
    pub const fn problems(&self) -> &BTreeMap<String, String> {
        &self.problems
    }

    /// Brings the instance up to date, makes one if need be, and asks it. A fault ends the
    /// instance.
    fn ask<T>(
        &mut self,
        question: impl FnOnce(&mut Running) -> Result<T, Error>,
    ) -> Result<T, Error> {
        let running = self.running.take();
        // The fleet is not held up by a filter that takes its time.
        let (news, seen) = {
            let hosts = self.fleet.read();
            (hosts.news(running.as_ref().map(|running| running.seen)), hosts.count())
        };
        let mut running = match running {
            Some(running) if !news.everything => running,
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
        running.feed(news, &mut self.problems)?;
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

    fn feed(&mut self, news: News, problems: &mut Problems) -> Result<(), Error> {
        let News { everything: _, whole, gone, statuses, heard } = news;
        for host in gone {
            self.instance.remove(&host)?;
            self.known.remove(&host);
            problems.remove(&*host);
        }
        self.documents(whole, problems)?;
        for (host, device, status) in statuses {
            let done = self.instance.set_status(&host, device, status);
            note(done, &host, problems)?;
        }
        for (host, received) in heard {
            self.instance.touch(&host, received)?;
        }
        Ok(())
    }

    /// Feeds documents in chunks of one time each, and then what has changed since.
    fn documents(&mut self, mut whole: Vec<Host>, problems: &mut Problems) -> Result<(), Error> {
        whole.sort_unstable_by(|a, b| (a.received, &a.name).cmp(&(b.received, &b.name)));
        let (mut lines, mut chunk) = (String::new(), Vec::new());
        let mut time = 0;
        for host in &whole {
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
        for host in &whole {
            for (device, status) in &host.statuses {
                let done = self.instance.set_status(&host.name, *device, *status);
                note(done, &host.name, problems)?;
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

/// A refused change is a problem of its host, and no fault.
fn note<T>(done: Result<T, Error>, host: &str, problems: &mut Problems) -> Result<(), Error> {
    match done {
        Err(Error::Refused(why)) => {
            // The first error is the one to fix.
            problems.entry(host.to_owned()).or_insert(why);
            Ok(())
        }
        done => done.map(drop),
    }
}
