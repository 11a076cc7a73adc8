//! The guests' thread: who is to be looked at, and when; and the workers that do what is to be done, an instance at a time each.
//!
//! ```text
//!  libvirt's events ─┐                          nothing to do
//!  devices changed ──┼─► due ─► look ─► plan ─┬──────────────► (until the next event)
//!  clock, retries ───┘                        └─► worker: converge ─► Report ─► retries with back-off
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use virt_usb_model::InstanceId;
use virt_usb_store::{Durability, Store, StoreError};

use super::devices::{Nudge, Rules};
use super::guest_uses::{ByGuest, Shared, Using};
use super::metrics::Metrics;
use super::observe::{View, guest};
use super::plan::{Gone, Seen};
use super::work::{Report, WorkError, Worker};
use super::{ACTOR, PATIENCE};
use crate::hypervisor::{Event, Failure, Hypervisor, Running};

/// So many instances are worked on at once: libvirt may keep each waiting for half a minute.
const WORKERS: usize = 4;
/// The first wait before something that failed is tried again; it doubles up to [`LONGEST`].
const SHORTEST: Duration = Duration::from_millis(500);
const LONGEST: Duration = Duration::from_secs(60);
/// Until another look, when one failed; the gauges are not shown more often.
const SECOND: Duration = Duration::from_secs(1);

/// What the thread is told.
#[derive(Debug)]
pub(super) enum Signal {
    /// By libvirt.
    Hypervisor(Event),
    /// The inventory's devices changed.
    Devices,
    /// By a worker.
    Done(InstanceId, Result<Report, WorkError>),
    /// End.
    Stop,
}

/// How long an instance has been gone.
#[derive(Debug, Clone, PartialEq)]
struct Absence {
    /// Its claims when that was first seen: any change begins anew.
    claims: Vec<(i64, i64)>,
    since: Instant,
    undefined: Option<Instant>,
}

/// What failed is tried again.
#[derive(Debug, Clone, Copy)]
struct Retry {
    /// When; none: it has been its turn, and what came of it is still to be heard.
    at: Option<Instant>,
    /// The wait that led there.
    wait: Duration,
}

/// The thread's belongings.
pub(super) struct Guests {
    rules: Rules,
    hypervisor: Arc<dyn Hypervisor>,
    store: Store,
    metrics: Arc<Metrics>,
    uses: Uses,
    jobs: Sender<Job>,
    /// Whoever is to be looked at.
    due: BTreeSet<InstanceId>,
    everybody: bool,
    absences: BTreeMap<InstanceId, Absence>,
    retries: BTreeMap<(InstanceId, String), Retry>,
    /// Looks that were promised.
    promised: BTreeMap<InstanceId, Instant>,
    /// With a worker now; true: to be looked at again afterwards.
    busy: BTreeMap<InstanceId, bool>,
    last_pass: Option<Instant>,
    /// When the gauges were last true, and whether anything may have changed since.
    shown: Instant,
    is_stale: bool,
}

/// Where this thread leaves what guests use without a claim.
pub(super) struct Uses {
    pub(super) shared: Shared,
    pub(super) devices: Sender<Nudge>,
}

struct Job {
    instance: InstanceId,
    gone: Gone,
    blocked: BTreeSet<String>,
}

impl Guests {
    /// Starts the workers.
    ///
    /// # Errors
    /// When a thread or the inventory cannot be had.
    pub(super) fn new(
        rules: Rules,
        hypervisor: Arc<dyn Hypervisor>,
        metrics: Arc<Metrics>,
        signals: &Sender<Signal>,
        uses: Uses,
    ) -> anyhow::Result<Self> {
        let (jobs, queue) = channel::<Job>();
        let queue = Arc::new(Mutex::new(queue));
        for number in 0..WORKERS {
            let mut worker = Worker::open(rules.now(), hypervisor.clone(), metrics.clone(), ACTOR)?;
            let (rules, queue, signals) = (rules.clone(), queue.clone(), signals.clone());
            let work = move || {
                loop {
                    let job = queue.lock().unwrap_or_else(PoisonError::into_inner).recv();
                    let Ok(job) = job else { return };
                    worker.config = rules.now();
                    let done = worker.converge(job.instance, job.gone, &job.blocked);
                    if signals.send(Signal::Done(job.instance, done)).is_err() {
                        return;
                    }
                }
            };
            std::thread::Builder::new().name(format!("guests-{number}")).spawn(work)?;
        }
        let store = Store::open(&rules.now().state_dir, PATIENCE, Durability::Power)?;
        Ok(Self {
            rules,
            hypervisor,
            store,
            metrics,
            uses,
            jobs,
            due: BTreeSet::new(),
            everybody: true,
            absences: BTreeMap::new(),
            retries: BTreeMap::new(),
            promised: BTreeMap::new(),
            busy: BTreeMap::new(),
            last_pass: None,
            shown: Instant::now(),
            is_stale: false,
        })
    }

    /// Until it is told to stop.
    pub(super) fn run(mut self, signals: &Receiver<Signal>) {
        loop {
            match signals.recv_timeout(self.wait()) {
                Ok(Signal::Stop) | Err(RecvTimeoutError::Disconnected) => return,
                Ok(signal) => self.hear(signal),
                Err(RecvTimeoutError::Timeout) => {}
            }
            while let Ok(signal) = signals.try_recv() {
                if matches!(signal, Signal::Stop) {
                    return;
                }
                self.hear(signal);
            }
            self.wake();
            if self.everybody || !self.due.is_empty() {
                self.pass();
            }
            if self.is_stale && self.shown.elapsed() >= SECOND {
                self.store.restart_patience();
                self.show(&View::read(&self.store));
            }
        }
    }

    /// Brings the gauges in line with the inventory, as it was just read.
    fn show(&mut self, read: &Result<View, StoreError>) {
        (self.is_stale, self.shown) = (false, Instant::now());
        match read {
            Ok(view) => self.metrics.show(view),
            Err(e) => tracing::error!("the metrics are out of date: {e}"),
        }
    }

    /// Until the next promise, retry or pass over everybody.
    fn wait(&self) -> Duration {
        let interval = self.rules.now().scan_interval;
        let pass = self.last_pass.map_or(Duration::ZERO, |at| interval.saturating_sub(at.elapsed()));
        let until = |at: &Instant| at.saturating_duration_since(Instant::now());
        let promised = self.promised.values().map(until).min();
        let retry = self.retries.values().filter_map(|r| r.at.as_ref().map(until)).min();
        let show = self.is_stale.then(|| SECOND.saturating_sub(self.shown.elapsed()));
        [promised, retry, show].into_iter().flatten().fold(pass, Duration::min)
    }

    fn hear(&mut self, signal: Signal) {
        self.is_stale = true;
        match signal {
            Signal::Hypervisor(Event::Connected) => {
                tracing::info!("connected to libvirt");
                self.metrics.connected(true);
                self.everybody = true;
            }
            Signal::Hypervisor(Event::Lost(why)) => {
                tracing::warn!("no connection to libvirt: {why}; it is tried again");
                self.metrics.connected(false);
            }
            Signal::Hypervisor(Event::Started(instance) | Event::Changed(instance)) => {
                // A new run, or somebody has done something: what failed before may go now.
                self.forget_retries(instance);
                self.due.insert(instance);
            }
            Signal::Devices => {
                // What failed for want of a device may go now; what goes on failing is tried less and less often all the same.
                let now = Instant::now();
                self.retries.values_mut().for_each(|retry| retry.at = Some(now));
                self.everybody = true;
            }
            Signal::Done(instance, done) => self.done(instance, done),
            Signal::Stop => {}
        }
    }

    fn done(&mut self, instance: InstanceId, done: Result<Report, WorkError>) {
        if self.busy.remove(&instance).unwrap_or(false) {
            self.due.insert(instance);
        }
        let failed = match done {
            Ok(report) => report.failed,
            Err(WorkError::Hypervisor(Failure::Away(_))) => return,
            Err(e) => {
                tracing::error!(%instance, "instance {instance}: {e}; it is tried again");
                BTreeSet::from([String::new()])
            }
        };
        self.retries.retain(|(of, about), _| *of != instance || failed.contains(about));
        for about in failed {
            let wait =
                self.retries.get(&(instance, about.clone())).map_or(SHORTEST, |r| (r.wait * 2).min(LONGEST));
            self.retries.insert((instance, about), Retry { at: Some(Instant::now() + wait), wait });
        }
    }

    /// Whose time has come.
    fn wake(&mut self) {
        let now = Instant::now();
        for ((of, _), retry) in self.retries.iter_mut().filter(|(_, r)| r.at.is_some_and(|at| at <= now)) {
            // Once: otherwise it would be its turn again at once, until somebody answers.
            retry.at = None;
            self.due.insert(*of);
        }
        self.due.extend(self.promised.iter().filter(|(_, at)| **at <= now).map(|(of, _)| *of));
        self.promised.retain(|_, at| *at > now);
        self.everybody |= self.last_pass.is_none_or(|at| at.elapsed() >= self.rules.now().scan_interval);
    }

    fn pass(&mut self) {
        let (began, everybody) = (Instant::now(), self.everybody);
        self.everybody = false;
        let due = std::mem::take(&mut self.due);
        if everybody {
            self.last_pass = Some(began);
        }
        match self.look(everybody, due.clone()) {
            // When libvirt is back everybody is looked at.
            Ok(()) | Err(WorkError::Hypervisor(Failure::Away(_))) => {}
            Err(e) => {
                tracing::error!("the guests cannot be looked at: {e}; it is tried again");
                let next = Instant::now() + SECOND;
                self.promised.extend(due.into_iter().map(|instance| (instance, next)));
                if everybody {
                    let interval = self.rules.now().scan_interval;
                    self.last_pass = Instant::now().checked_sub(interval.saturating_sub(SECOND));
                }
            }
        }
        if everybody {
            self.metrics.passed(began.elapsed());
        }
    }

    fn look(&mut self, everybody: bool, mut due: BTreeSet<InstanceId>) -> Result<(), WorkError> {
        self.store.restart_patience();
        // For a few there is no need to read all devices.
        let whole = everybody.then(|| View::read(&self.store));
        if let Some(read) = &whole {
            self.show(read);
        }
        let whole = whole.transpose()?;
        let running = self.running(everybody, &due)?;
        match self.note_uses(everybody, &due, &running) {
            Ok(()) | Err(Failure::Away(_)) => {}
            // What is recorded stays; guests get their devices all the same.
            Err(e) => tracing::warn!("what guests use without a claim cannot be asked: {e}"),
        }
        if let Some(view) = &whole {
            due.extend(view.instances());
            due.extend(running.keys());
            self.absences.retain(|instance, _| view.knows(*instance));
        }
        let config = self.rules.now();
        for instance in due {
            if let Some(again) = self.busy.get_mut(&instance) {
                *again = true;
                continue;
            }
            let read = match running.get(&instance) {
                None => Ok(None),
                Some(Err(failure)) => Err(failure.to_string()),
                Some(Ok(running)) => guest(running, &config, &self.store)
                    .map(Some)
                    .map_err(|e| format!("cannot read its XML ({}): {e}", running.name)),
            };
            let read = match read {
                Ok(read) => read,
                // Nothing is known about this one; the others are looked at.
                Err(why) => {
                    self.absences.remove(&instance);
                    tracing::error!(%instance, "instance {instance}: {why}; it is looked at again");
                    self.promised.insert(instance, Instant::now() + config.recheck_delay);
                    continue;
                }
            };
            let about;
            let view = match &whole {
                Some(view) => view,
                None => {
                    about = View::read_about(&self.store, instance, read.as_ref())?;
                    &about
                }
            };
            let (seen, gone) = match &read {
                Some(guest) => {
                    self.absences.remove(&instance);
                    (Seen::Running(guest), Gone::default())
                }
                None if view.knows(instance) => {
                    let gone = self.absent(instance, view)?;
                    (Seen::Absent(gone), gone)
                }
                // Nobody's guest, or one that is gone with all that was held for it.
                None => {
                    self.forget_retries(instance);
                    continue;
                }
            };
            let blocked = self.blocked(instance);
            let steps = view.plan(instance, seen, &config);
            if steps.iter().any(|s| s.about().is_none_or(|about| !blocked.contains(&about))) {
                self.busy.insert(instance, false);
                // The workers end with this thread.
                drop(self.jobs.send(Job { instance, gone, blocked }));
            } else if steps.is_empty() {
                self.forget_retries(instance);
            }
        }
        Ok(())
    }

    /// What the guests use without a claim, for the devices' thread: of all of them, or of those of
    /// `due`. A guest whose XML cannot be had at the moment uses what it used.
    fn note_uses(
        &self,
        everybody: bool,
        due: &BTreeSet<InstanceId>,
        running: &BTreeMap<InstanceId, Result<Running, Failure>>,
    ) -> Result<(), Failure> {
        let known = self.uses.shared.get();
        let (before, mut uses) = match (everybody, known) {
            (true, known) => (known.unwrap_or_default(), ByGuest::new()),
            (false, Some(known)) => (Arc::clone(&known), ByGuest::clone(&known)),
            // All of them first.
            (false, None) => return Ok(()),
        };
        // Who is with a worker was not looked at, and is due again afterwards.
        let few = || due.iter().copied().filter(|instance| !self.busy.contains_key(instance)).collect();
        let whom = if everybody { self.hypervisor.all()? } else { few() };
        for instance in whom {
            let xml = match running.get(&instance) {
                Some(Ok(running)) => Ok(Some(running.xml.clone())),
                Some(Err(failure)) => Err(failure.clone()),
                None => self.hypervisor.xml(instance),
            };
            let using = match xml {
                Ok(None) => None,
                Err(Failure::Away(why)) => return Err(Failure::Away(why)),
                Ok(Some(xml)) => match virt_usb_domxml::read(xml.as_bytes()) {
                    Ok(domain) => Using::new(&domain, running.contains_key(&instance)),
                    Err(_) => before.get(&instance).cloned(),
                },
                Err(_) => before.get(&instance).cloned(),
            };
            match using {
                Some(using) => drop(uses.insert(instance, using)),
                None => drop(uses.remove(&instance)),
            }
        }
        if self.uses.shared.set(uses) {
            // The devices' thread ends after this one.
            let _ = self.uses.devices.send(Nudge::Usb);
        }
        Ok(())
    }

    /// Those of `due`, or all, that run, or of which that cannot be said.
    fn running(
        &self,
        everybody: bool,
        due: &BTreeSet<InstanceId>,
    ) -> Result<BTreeMap<InstanceId, Result<Running, Failure>>, Failure> {
        let all = if everybody { self.hypervisor.running()? } else { Vec::new() };
        let few = due.iter().copied().filter(|i| !everybody && !self.busy.contains_key(i));
        let mut found = BTreeMap::new();
        for instance in all.into_iter().chain(few) {
            match self.hypervisor.look(instance) {
                Ok(Some(running)) => drop(found.insert(instance, Ok(running))),
                Ok(None) => {}
                Err(Failure::Away(why)) => return Err(Failure::Away(why)),
                Err(failure) => drop(found.insert(instance, Err(failure))),
            }
        }
        Ok(found)
    }

    /// How long an instance that is not there has been gone, and when to look again.
    fn absent(&mut self, instance: InstanceId, view: &View) -> Result<Gone, Failure> {
        let (now, known) = (Instant::now(), self.hypervisor.is_known(instance)?);
        let claims: Vec<(i64, i64)> = view.claims(instance).iter().map(|c| (c.id, c.revision)).collect();
        let fresh = Absence { claims: claims.clone(), since: now, undefined: None };
        let absence = self.absences.entry(instance).or_insert(fresh);
        if absence.claims != claims {
            (absence.claims, absence.since) = (claims, now);
        }
        absence.undefined = (!known).then(|| absence.undefined.unwrap_or(now));
        let absence = absence.clone();
        let seconds = absence.since.elapsed().as_secs_f64();
        let undefined = absence.undefined.map(|since| since.elapsed().as_secs_f64());
        let config = self.rules.now();
        let ahead = [
            (seconds, config.absent_grace.as_secs_f64()),
            (undefined.unwrap_or(f64::MAX), config.undefined_grace.as_secs_f64()),
        ];
        let next =
            ahead.iter().filter(|(at, limit)| at < limit).map(|(at, limit)| limit - at).reduce(f64::min);
        if let Some(next) = next {
            self.promised.insert(instance, now + Duration::from_secs_f64(next + 0.01));
        }
        Ok(Gone { seconds, undefined })
    }

    fn forget_retries(&mut self, instance: InstanceId) {
        self.retries.retain(|(of, _), _| *of != instance);
    }

    fn blocked(&self, instance: InstanceId) -> BTreeSet<String> {
        let now = Instant::now();
        let waiting = self
            .retries
            .iter()
            .filter(|((of, _), retry)| *of == instance && retry.at.is_some_and(|at| at > now));
        waiting.map(|((_, about), _)| about.clone()).collect()
    }
}

#[cfg(test)]
mod tests {
    use virt_usb_hook::config::Config;

    use super::*;
    use crate::hypervisor::SimulatedHypervisor;

    fn guests(state: &std::path::Path) -> (Guests, Receiver<Signal>) {
        let config = Config { state_dir: state.to_owned(), ..Config::default() };
        drop(Store::create(state, PATIENCE).unwrap());
        let (to, signals) = channel();
        let hypervisor = Arc::new(SimulatedHypervisor::new(config.clone(), channel().0));
        let rules = Rules::of(config);
        let uses = Uses { shared: Shared::default(), devices: channel().0 };
        (Guests::new(rules, hypervisor, Arc::default(), &to, uses).unwrap(), signals)
    }

    #[test]
    fn a_retry_has_its_turn_once() {
        let state = tempfile::tempdir().unwrap();
        let (mut guests, _signals) = guests(state.path());
        let instance: InstanceId = "11111111-2222-4333-8444-555555555555".parse().unwrap();
        let retry = Retry { at: Some(Instant::now()), wait: SHORTEST };
        guests.pass();
        guests.retries.insert((instance, "device 1".into()), retry);
        // It is with a worker, who takes his time.
        guests.busy.insert(instance, false);
        guests.wake();
        assert!(guests.due.contains(&instance));
        guests.pass();
        guests.wake();
        assert!(guests.due.is_empty(), "not at once again");
        assert!(guests.wait() > Duration::ZERO);
        guests.done(instance, Ok(Report { failed: BTreeSet::from(["device 1".into()]), changed: false }));
        assert_eq!(guests.retries.values().next().unwrap().wait, SHORTEST * 2, "the back-off goes on");
        // Nothing is to be done any more: it is forgotten.
        guests.everybody = false;
        guests.due = BTreeSet::from([instance]);
        guests.pass();
        assert!(guests.retries.is_empty());
    }

    #[test]
    fn an_inventory_that_cannot_be_read_is_looked_at_once_a_second() {
        let state = tempfile::tempdir().unwrap();
        let (mut guests, _signals) = guests(state.path());
        let database = rusqlite::Connection::open(state.path().join(virt_usb_store::FILE_NAME)).unwrap();
        database.execute_batch("ALTER TABLE problems RENAME TO elsewhere").unwrap();
        guests.pass();
        assert!(guests.wait() > SECOND / 2, "{:?}", guests.wait());
        let instance: InstanceId = "11111111-2222-4333-8444-555555555555".parse().unwrap();
        guests.due.insert(instance);
        guests.pass();
        assert!(guests.wait() > SECOND / 4 && guests.promised.contains_key(&instance));
    }
}
