//! The guests' thread decides when each instance is checked. Each of its workers checks one
//! instance at a time, and executes the plan.
//!
//! ```text
//!  libvirt's events ─┐
//!  devices changed ──┼─► due ─► worker: read, plan, execute ─► Report ─► retries with backoff,
//!  clock, retries ───┘                                                   scheduled checks
//! ```
//! This thread never calls libvirt. A guest about which libvirt does not answer blocks one worker
//! and nothing else.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender};
use std::time::{Duration, Instant};

use virt_usb_config::host_env;
use virt_usb_model::InstanceId;
use virt_usb_store::{Durability, Store, StoreError};

use super::ACTOR;
use super::live_config::LiveConfig;
use super::observe::View;
use super::plan::{ABOUT_LIBVIRT, Absence};
use super::signals::{DeviceSignal, Pulse, Signal};
use super::work::{Found, ObservedAbsence, Report, WorkError, Worker, marks};
use super::workers::{SLOW_JOB_TIME, Work, Workers};
use crate::hypervisor::{Event, Failure, Hypervisor as _, MEETING_TIMEOUT, Supervised, Unanswered};
use crate::metrics::Metrics;
use crate::timeouts::STORE_LOCK_TIMEOUT;

/// Wait before a failed step is retried for the first time. It doubles up to
/// [`MAX_RETRY_INTERVAL`].
const MIN_RETRY_INTERVAL: Duration = Duration::from_millis(500);
/// Maximum wait before a failed step is retried.
const MAX_RETRY_INTERVAL: Duration = Duration::from_secs(60);
/// Wait before a failed pass is retried, and minimum interval between updates of the gauges.
const SECOND: Duration = Duration::from_secs(1);
/// Timeout for the list of all guests, after which a pass checks only the known ones.
const LIST_TIMEOUT: Duration = Duration::from_secs(2);

/// Absence of an instance.
#[derive(Debug, Clone, PartialEq)]
struct Missing {
    /// Claims at the first absence. Any change starts the wait again.
    claims: Vec<(i64, i64)>,
    since: Instant,
    undefined: Option<Instant>,
}

/// A failed step that is retried.
#[derive(Debug, Clone, Copy)]
struct Retry {
    /// Time of the retry. `None` if the retry is running.
    at: Option<Instant>,
    /// The wait before the retry.
    wait: Duration,
}

/// One pass over all guests.
struct Round {
    began: Instant,
    /// Whether the list of all guests is pending.
    listing: bool,
    /// Whether all guests were listed and read.
    is_whole: bool,
    /// Whether the round has ended, except for a pending list.
    has_passed: bool,
    /// Instances that were given to a worker in this round.
    queued: BTreeSet<InstanceId>,
    /// Instances of this round whose result is pending.
    open: BTreeSet<InstanceId>,
}

/// State of the guests' thread.
pub(crate) struct Guests {
    rules: LiveConfig,
    hypervisor: Arc<Supervised>,
    store: Store,
    metrics: Arc<Metrics>,
    devices: Sender<DeviceSignal>,
    pulse: Pulse,
    workers: Workers<Job>,
    /// Instances to check.
    due: BTreeSet<InstanceId>,
    /// Whether to check all instances.
    all_due: bool,
    round: Option<Round>,
    /// Whether a worker is listing all guests, and whether it began before this round.
    listing: bool,
    list_again: bool,
    /// Whether the connected libvirt is known to be the one that runs the guests.
    trusted: bool,
    /// Identity of libvirt; `None` if it was not queried since the connection.
    identity: Option<String>,
    /// The libvirt that was reported as a different one.
    reported_libvirt: Option<String>,
    absences: BTreeMap<InstanceId, Missing>,
    retries: BTreeMap<(InstanceId, String), Retry>,
    /// Times of scheduled checks.
    scheduled: BTreeMap<InstanceId, Instant>,
    /// Instances that a worker checks now, and whether to check them again afterwards.
    busy: BTreeMap<InstanceId, bool>,
    /// Unanswered calls that were reported, and whether a problem was recorded for each.
    reported: Vec<(Unanswered, bool)>,
    /// Whether it was reported that all workers wait for libvirt.
    reported_stall: bool,
    /// Whether it was reported that the agent makes no more calls.
    reported_block: bool,
    /// The error that was last reported for each instance.
    errors: BTreeMap<InstanceId, String>,
    last_pass: Option<Instant>,
    /// Time of the last update of the gauges.
    shown: Instant,
    /// Whether anything may have changed since that update.
    is_stale: bool,
}

/// A job of a worker.
enum Job {
    /// List all guests.
    List,
    /// Check one instance, and carry out its plan.
    Converge { instance: InstanceId, absence: ObservedAbsence, blocked: BTreeSet<String> },
}

impl Guests {
    /// Starts the workers.
    ///
    /// # Errors
    /// If a thread cannot be started, or the inventory cannot be opened.
    pub(crate) fn new(
        rules: LiveConfig,
        hypervisor: Arc<Supervised>,
        metrics: Arc<Metrics>,
        signals: Sender<Signal>,
        devices: Sender<DeviceSignal>,
        pulse: Pulse,
    ) -> anyhow::Result<Self> {
        let store = Store::open(&rules.now().state_dir, STORE_LOCK_TIMEOUT, Durability::Power)?;
        let (of, supervised, counted) = (rules.clone(), hypervisor.clone(), metrics.clone());
        let make = move || -> anyhow::Result<Work<Job>> {
            let mut worker = Worker::open(of.now(), supervised.clone(), counted.clone(), ACTOR)?;
            let (rules, hypervisor, signals) = (of.clone(), supervised.clone(), signals.clone());
            Ok(Box::new(move |job| {
                worker.config = rules.now();
                let signal = match job {
                    Job::List => {
                        if let Ok(identity) = hypervisor.identity() {
                            drop(signals.send(Signal::Identified(identity)));
                        }
                        Signal::Listed(hypervisor.all())
                    }
                    Job::Converge { instance, absence, blocked } => {
                        Signal::Done(instance, worker.converge(instance, &absence, &blocked))
                    }
                };
                // The guests' thread may have ended.
                drop(signals.send(signal));
            }))
        };
        Ok(Self {
            rules,
            hypervisor,
            store,
            metrics,
            devices,
            pulse,
            workers: Workers::new(make)?,
            due: BTreeSet::new(),
            all_due: true,
            round: None,
            listing: false,
            list_again: false,
            trusted: false,
            identity: None,
            reported_libvirt: None,
            absences: BTreeMap::new(),
            retries: BTreeMap::new(),
            scheduled: BTreeMap::new(),
            busy: BTreeMap::new(),
            reported: Vec::new(),
            reported_stall: false,
            reported_block: false,
            errors: BTreeMap::new(),
            last_pass: None,
            shown: Instant::now(),
            is_stale: false,
        })
    }

    /// Runs until the thread is stopped.
    pub(crate) fn run(mut self, signals: &Receiver<Signal>) {
        loop {
            match signals.recv_timeout(self.wait()) {
                Ok(Signal::Stop) | Err(RecvTimeoutError::Disconnected) => return,
                Ok(signal) => self.handle(signal),
                Err(RecvTimeoutError::Timeout) => {}
            }
            while let Ok(signal) = signals.try_recv() {
                if matches!(signal, Signal::Stop) {
                    return;
                }
                self.handle(signal);
            }
            self.pulse.beat();
            self.wake();
            if self.all_due || !self.due.is_empty() {
                self.pass();
            }
            self.report_delays();
            if self.is_stale && self.shown.elapsed() >= SECOND {
                self.store.restart_lock_timeout();
                self.show(&View::read(&self.store));
            }
        }
    }

    /// Updates the gauges from the inventory.
    fn show(&mut self, read: &Result<View, StoreError>) {
        (self.is_stale, self.shown) = (false, Instant::now());
        match read {
            Ok(view) => {
                let claims =
                    view.instances().into_iter().flat_map(|instance| view.claims(instance));
                self.metrics.show(view.devices(), claims, view.problems());
            }
            Err(e) => tracing::error!("the metrics are out of date: {e}"),
        }
    }

    /// Time until the next scheduled check, retry or full pass, at most one second.
    fn wait(&self) -> Duration {
        let interval = self.rules.now().scan_interval;
        let pass =
            self.last_pass.map_or(Duration::ZERO, |at| interval.saturating_sub(at.elapsed()));
        let until = |at: &Instant| at.saturating_duration_since(Instant::now());
        let scheduled = self.scheduled.values().map(until).min();
        let retry = self.retries.values().filter_map(|r| r.at.as_ref().map(until)).min();
        let show = self.is_stale.then(|| SECOND.saturating_sub(self.shown.elapsed()));
        let relieve = (!self.busy.is_empty() || self.listing).then_some(SLOW_JOB_TIME);
        let all = [scheduled, retry, show, relieve, Some(SECOND)];
        all.into_iter().flatten().fold(pass, Duration::min)
    }

    fn handle(&mut self, signal: Signal) {
        self.is_stale = true;
        match signal {
            Signal::Hypervisor(Event::Connected) => {
                tracing::info!("connected to libvirt");
                self.metrics.connected(true);
                self.all_due = true;
                // An absence that another connection reported is checked again.
                self.absences.clear();
                (self.trusted, self.identity) = (false, None);
            }
            Signal::Hypervisor(Event::Lost(why)) => {
                tracing::warn!("no connection to libvirt: {why}; the agent retries");
                self.metrics.connected(false);
            }
            Signal::Hypervisor(Event::Started(instance) | Event::Changed(instance)) => {
                // After a new start, or an operator's action, a failed step may succeed.
                self.forget_retries(instance);
                self.due.insert(instance);
            }
            Signal::Answered(instance) => drop(self.due.insert(instance)),
            Signal::Devices => {
                // A step that failed for lack of a device may succeed now. The backoff of repeated
                // failures continues.
                let now = Instant::now();
                self.retries.values_mut().for_each(|retry| retry.at = Some(now));
                self.all_due = true;
            }
            Signal::Identified(identity) => {
                self.identity = Some(identity);
                self.compare_libvirt(None);
            }
            Signal::Listed(listed) => self.listed(listed),
            Signal::Done(instance, done) => self.done(instance, done),
            Signal::Stop => {}
        }
    }

    fn done(&mut self, instance: InstanceId, done: Result<Report, WorkError>) {
        if self.busy.remove(&instance).unwrap_or(false) {
            self.due.insert(instance);
        }
        self.close_in_round(instance);
        let (failed, blocked) = match done {
            Ok(report) => {
                self.errors.remove(&instance);
                if report.later {
                    self.schedule(instance);
                }
                if let Err(e) = self.found(instance, report.found) {
                    tracing::error!(%instance, "instance {instance}: {e}; the agent retries");
                    self.scheduled.insert(instance, Instant::now() + SECOND);
                }
                (report.failed, report.blocked)
            }
            // Once libvirt is reachable, all instances are checked; once it has answered, this one.
            // A single connection of several may be down.
            Err(WorkError::Hypervisor(Failure::Away(_) | Failure::Silent(_))) => {
                self.miss();
                self.schedule(instance);
                return;
            }
            Err(e) => {
                let why = e.to_string();
                // Log each reason once.
                if self.errors.get(&instance) != Some(&why) {
                    tracing::error!(%instance, "instance {instance}: {why}; the agent retries");
                    self.errors.insert(instance, why);
                }
                // The state of the guest is unknown.
                self.absences.remove(&instance);
                self.miss();
                if matches!(e, WorkError::Hypervisor(_) | WorkError::Xml(_)) {
                    self.schedule(instance);
                    return;
                }
                (BTreeSet::from([String::new()]), BTreeSet::new())
            }
        };
        self.retries.retain(|(of, about), _| {
            *of != instance || failed.contains(about) || blocked.contains(about)
        });
        for about in failed {
            let wait = self
                .retries
                .get(&(instance, about.clone()))
                .map_or(MIN_RETRY_INTERVAL, |r| (r.wait * 2).min(MAX_RETRY_INTERVAL));
            self.retries.insert((instance, about), Retry { at: Some(Instant::now() + wait), wait });
        }
    }

    /// Schedules a check of the instance, regardless of events.
    fn schedule(&mut self, instance: InstanceId) {
        self.scheduled.insert(instance, Instant::now() + self.rules.now().recheck_delay);
    }

    /// Records that this round did not find all guests.
    const fn miss(&mut self) {
        if let Some(round) = &mut self.round {
            round.is_whole = false;
        }
    }

    /// Handles the state of the guest in a worker's report.
    fn found(&mut self, instance: InstanceId, found: Found) -> Result<(), StoreError> {
        match found {
            Found::Running | Found::Unknown => drop(self.absences.remove(&instance)),
            Found::Absent { is_known } => {
                self.store.restart_lock_timeout();
                let view = View::read_about(&self.store, instance, None)?;
                if view.knows(instance) && !self.trusted {
                    self.absences.remove(&instance);
                    self.scheduled.insert(instance, Instant::now() + SECOND);
                } else if view.knows(instance) {
                    self.absent(instance, is_known, &view);
                } else {
                    // The instance has nothing in the inventory.
                    self.absences.remove(&instance);
                    self.forget_retries(instance);
                }
            }
        }
        Ok(())
    }

    /// Ends the wait for this instance in this round.
    fn close_in_round(&mut self, instance: InstanceId) {
        if let Some(round) = &mut self.round {
            round.open.remove(&instance);
        }
    }

    /// Handles the list of all guests, or its failure.
    fn listed(&mut self, listed: Result<Vec<InstanceId>, Failure>) {
        self.listing = false;
        if std::mem::take(&mut self.list_again) {
            // This list may come from a previous connection.
            self.listing = true;
            self.workers.push(Job::List);
            return;
        }
        let all = match listed {
            Ok(all) => {
                self.compare_libvirt(Some(&all));
                all
            }
            // Once libvirt is reachable, all instances are checked.
            Err(Failure::Away(_)) => {
                self.round = None;
                return;
            }
            Err(e) => {
                tracing::warn!("cannot list the guests: {e}; the agent checks only the known ones");
                self.miss();
                self.seen()
            }
        };
        let Some(round) = &mut self.round else { return };
        round.listing = false;
        self.add_to_round(all);
    }

    /// Queues the guests that the current round does not include yet.
    fn add_to_round(&mut self, guests: Vec<InstanceId>) {
        let Some(round) = &mut self.round else { return };
        let new: Vec<InstanceId> =
            guests.into_iter().filter(|i| !round.queued.contains(i)).collect();
        round.open.extend(&new);
        round.queued.extend(&new);
        for instance in new {
            self.assign(instance);
        }
    }

    /// Guests that any answer of libvirt has named so far.
    fn seen(&self) -> Vec<InstanceId> {
        self.hypervisor.seen().into_iter().map(|known| known.instance).collect()
    }

    /// Makes instances due whose retry or scheduled check has come.
    fn wake(&mut self) {
        let now = Instant::now();
        for ((of, _), retry) in
            self.retries.iter_mut().filter(|(_, r)| r.at.is_some_and(|at| at <= now))
        {
            // Only once: otherwise the instance would be due again immediately, until libvirt
            // answers.
            retry.at = None;
            self.due.insert(*of);
        }
        self.due.extend(self.scheduled.iter().filter(|(_, at)| **at <= now).map(|(of, _)| *of));
        self.scheduled.retain(|_, at| *at > now);
        self.all_due |=
            self.last_pass.is_none_or(|at| at.elapsed() >= self.rules.now().scan_interval);
    }

    /// Checks whether the connected libvirt is the one that runs the guests with devices. `all` are
    /// the guests that it knows.
    fn compare_libvirt(&mut self, all: Option<&[InstanceId]>) {
        let Some(identity) = self.identity.clone().filter(|_| !self.trusted) else { return };
        match self.is_trusted(&identity, all) {
            Ok(trusted) => self.trusted = trusted,
            Err(e) => {
                tracing::error!("cannot check whether this is the same libvirt as before: {e}");
            }
        }
    }

    /// Whether an unknown guest counts as absent: libvirt must be the remembered one, or know one
    /// of the holders of devices.
    fn is_trusted(
        &mut self,
        identity: &str,
        all: Option<&[InstanceId]>,
    ) -> Result<bool, StoreError> {
        self.store.restart_lock_timeout();
        let before = self.store.libvirt()?;
        if before.as_deref() == Some(identity) {
            return Ok(true);
        }
        let Some(all) = all else { return Ok(false) };
        let holders = View::read(&self.store)?.instances();
        let knows_one = holders.iter().any(|holder| all.contains(holder));
        // If the inventory has no libvirt yet, a running process of a holder shows that there is
        // another libvirt.
        let runs_elsewhere =
            || holders.iter().any(|holder| self.hypervisor.process(*holder).is_some());
        let is_doubtful = !holders.is_empty() && !knows_one;
        let before =
            is_doubtful.then(|| before.or_else(|| runs_elsewhere().then(|| "unknown".into())));
        if let Some(before) = before.flatten() {
            if self.reported_libvirt.as_deref() != Some(identity) {
                tracing::error!(
                    "this libvirt ({identity}) knows none of the {} guests that hold devices, \
                     which ran under another libvirt ({before}), or that have assignments: \
                     nothing is released. Check libvirt_uri; if it is right, release the devices \
                     of such a guest with 'virt-usb claims release INSTANCE --force'",
                    holders.len()
                );
                self.reported_libvirt = Some(identity.to_owned());
            }
            return Ok(false);
        }
        self.reported_libvirt = None;
        self.store.note_libvirt(identity)?;
        Ok(true)
    }

    fn pass(&mut self) {
        if std::mem::take(&mut self.all_due) {
            self.last_pass = Some(Instant::now());
            self.store.restart_lock_timeout();
            if let Err(e) = self.begin_round() {
                tracing::error!("cannot check the guests: {e}; the agent retries");
                let interval = self.rules.now().scan_interval;
                self.last_pass = Instant::now().checked_sub(interval.saturating_sub(SECOND));
            }
        }
        for instance in std::mem::take(&mut self.due) {
            self.assign(instance);
        }
    }

    /// Begins a pass over all guests: known instances at once, the others after the list has
    /// arrived.
    fn begin_round(&mut self) -> Result<(), StoreError> {
        let read = View::read(&self.store);
        self.show(&read);
        let view = read?;
        self.absences.retain(|instance, _| view.knows(*instance));
        let queued = view.instances();
        self.due.extend(&queued);
        self.round = Some(Round {
            began: Instant::now(),
            listing: true,
            is_whole: true,
            has_passed: false,
            open: queued.clone(),
            queued,
        });
        self.list_again = std::mem::replace(&mut self.listing, true);
        if !self.list_again {
            self.workers.push(Job::List);
        }
        Ok(())
    }

    /// Queues a check of the instance for a worker.
    fn assign(&mut self, instance: InstanceId) {
        if let Some(again) = self.busy.get_mut(&instance) {
            *again = true;
            return;
        }
        self.busy.insert(instance, false);
        let absence = ObservedAbsence {
            gone: self.absence(instance),
            claims: Some(
                self.absences
                    .get(&instance)
                    .map(|missing| missing.claims.clone())
                    .unwrap_or_default(),
            ),
        };
        let blocked = self.blocked(instance);
        self.workers.push(Job::Converge { instance, absence, blocked });
    }

    /// Reports calls that take too long, without waiting for them.
    fn report_delays(&mut self) {
        let load = self.workers.relieve();
        let unanswered = self.hypervisor.unanswered(MEETING_TIMEOUT);
        let is_blocked = self.hypervisor.is_blocked();
        if is_blocked && !std::mem::replace(&mut self.reported_block, true) {
            tracing::error!(
                "libvirt does not answer about too many guests: the agent makes no more calls, \
                 and no guest gets a device, until libvirt answers about some of them"
            );
        }
        if !is_blocked && std::mem::take(&mut self.reported_block) {
            tracing::info!(
                "libvirt answers about enough guests again: the agent resumes its calls"
            );
        }
        self.metrics.working(&load, unanswered.len(), is_blocked);
        self.report_unanswered(&unanswered);
        let all_wait = load.waiting >= MEETING_TIMEOUT;
        if all_wait && !self.reported_stall {
            tracing::error!(
                "{} guests keep all workers waiting: other guests are not checked until libvirt \
                 answers about some of them",
                load.busy
            );
        }
        self.reported_stall = all_wait;
        let Some(round) = &mut self.round else { return };
        // Instances of the list are handled when it arrives.
        for call in &unanswered {
            let was_open = call.instance.is_some_and(|instance| round.open.remove(&instance));
            round.is_whole &= !was_open;
        }
        if round.listing && round.began.elapsed() >= LIST_TIMEOUT {
            // The list arrives later: other guests are unknown until then.
            round.listing = false;
            let seen = self.seen();
            self.add_to_round(seen);
        }
        let Some(round) = &mut self.round else { return };
        if !round.open.is_empty() || round.listing {
            return;
        }
        if !is_blocked && !std::mem::replace(&mut round.has_passed, true) {
            self.metrics.passed(round.began.elapsed());
        }
        // Without the list, the set of guests is incomplete.
        if self.listing {
            return;
        }
        if round.is_whole && self.hypervisor.complete() {
            // The devices' thread ends after this one.
            let _ = self.devices.send(DeviceSignal::Usb);
        }
        self.round = None;
    }

    /// Reports calls without an answer: immediately in the log, later as a problem of the guest.
    fn report_unanswered(&mut self, unanswered: &[Unanswered]) {
        let is_same = |one: &Unanswered, other: &Unanswered| {
            (one.instance, one.since) == (other.instance, other.since)
        };
        let timeout = self.rules.now().libvirt_timeout;
        self.reported.retain(|(reported, _)| unanswered.iter().any(|call| is_same(reported, call)));
        for call in unanswered {
            let known = self.reported.iter().position(|(reported, _)| is_same(reported, call));
            let at = known.unwrap_or_else(|| {
                self.reported.push((*call, false));
                self.reported.len() - 1
            });
            let domain = call.instance.map(|instance| self.name(instance));
            if known.is_none() {
                let about = domain.as_deref().map_or("all guests", |domain| domain);
                tracing::warn!(
                    "libvirt has not answered about {about} for {} s ({}): other guests are not \
                        affected",
                    call.since.elapsed().as_secs(),
                    call.what
                );
            }
            let (Some(instance), Some(domain)) = (call.instance, domain) else { continue };
            if call.since.elapsed() >= timeout && !self.reported[at].1 {
                match self.note_silence(instance, &domain, call.what, timeout) {
                    Ok(()) => self.reported[at].1 = true,
                    Err(e) => tracing::error!(%instance, "instance {instance}: {e}"),
                }
            }
        }
    }

    fn note_silence(
        &mut self,
        instance: InstanceId,
        domain: &str,
        what: &str,
        timeout: Duration,
    ) -> Result<(), WorkError> {
        let context = host_env::context(&self.rules.now(), ACTOR)?;
        self.store.restart_lock_timeout();
        let claimant = self.store.claimant(instance, domain, None)?;
        let why = format!(
            "libvirt has not answered about {domain} for {} s ({what}): QEMU or a libvirt hook \
             hangs: 'virsh domcontrol {domain}' and 'journalctl -u libvirtd' show more. The agent \
             continues when libvirt answers; if it never does, run 'virsh destroy {domain}'",
            timeout.as_secs()
        );
        if self.store.note_problem(&claimant, ABOUT_LIBVIRT, Some(&why), &context)? {
            tracing::warn!(domain, %instance, "{domain}: {why}");
        }
        self.is_stale = true;
        Ok(())
    }

    /// Last known name of the domain, or its UUID.
    fn name(&self, instance: InstanceId) -> String {
        match self.hypervisor.guest(instance) {
            Some(known) => known.domain.name.clone(),
            None => instance.to_string(),
        }
    }

    /// Records the absence of an instance, and schedules the next check.
    fn absent(&mut self, instance: InstanceId, is_known: bool, view: &View) {
        let now = Instant::now();
        let claims = marks(view.claims(instance));
        let fresh = Missing { claims: claims.clone(), since: now, undefined: None };
        let absence = self.absences.entry(instance).or_insert(fresh);
        if absence.claims != claims {
            (absence.claims, absence.since) = (claims, now);
        }
        absence.undefined = (!is_known).then(|| absence.undefined.unwrap_or(now));
        let Absence { seconds, undefined } = self.absence(instance);
        let config = self.rules.now();
        let ahead = [
            (seconds, config.absent_grace.as_secs_f64()),
            (undefined.unwrap_or(f64::MAX), config.undefined_grace.as_secs_f64()),
        ];
        let next = ahead
            .iter()
            .filter(|(at, limit)| at < limit)
            .map(|(at, limit)| limit - at)
            .reduce(f64::min);
        if let Some(next) = next {
            self.scheduled.insert(instance, now + Duration::from_secs_f64(next + 0.01));
        }
    }

    /// Duration of the recorded absence of an instance; zero if there is none.
    fn absence(&self, instance: InstanceId) -> Absence {
        let Some(absence) = self.absences.get(&instance) else { return Absence::default() };
        Absence {
            seconds: absence.since.elapsed().as_secs_f64(),
            undefined: absence.undefined.map(|since| since.elapsed().as_secs_f64()),
        }
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
    use virt_usb_config::Config;

    use super::*;
    use crate::hypervisor::{Listeners, SimulatedHypervisor};
    use std::sync::mpsc::channel;

    fn guests(state: &std::path::Path) -> (Guests, Receiver<Signal>) {
        let config = Config { state_dir: state.to_owned(), ..Config::default() };
        drop(Store::create(state, STORE_LOCK_TIMEOUT).unwrap());
        let (to, signals) = channel();
        let simulated = Arc::new(SimulatedHypervisor::new(config.clone(), channel().0));
        let supervised = Arc::new(Supervised::new(simulated, Listeners::nobody()));
        let rules = LiveConfig::of(config);
        let guests = Guests::new(rules, supervised, Arc::default(), to, channel().0, Pulse::new());
        (guests.unwrap(), signals)
    }

    /// Handles signals up to the result of the instance.
    fn handle(guests: &mut Guests, signals: &Receiver<Signal>, instance: InstanceId) {
        loop {
            let signal = signals.recv().unwrap();
            let is_it = matches!(signal, Signal::Done(of, _) if of == instance);
            guests.handle(signal);
            if is_it {
                return;
            }
        }
    }

    #[test]
    fn a_retry_makes_its_instance_due_once() {
        let state = tempfile::tempdir().unwrap();
        let (mut guests, signals) = guests(state.path());
        let instance: InstanceId = "11111111-2222-4333-8444-555555555555".parse().unwrap();
        let retry = Retry { at: Some(Instant::now()), wait: MIN_RETRY_INTERVAL };
        guests.pass();
        guests.retries.insert((instance, "device 1".into()), retry);
        // A worker is still checking the instance.
        guests.busy.insert(instance, false);
        guests.wake();
        assert!(guests.due.contains(&instance));
        guests.pass();
        guests.wake();
        assert!(guests.due.is_empty(), "not again immediately");
        assert!(guests.wait() > Duration::ZERO);
        let failed = || Report { failed: BTreeSet::from(["device 1".into()]), ..Report::default() };
        guests.done(instance, Ok(failed()));
        let wait = |guests: &Guests| guests.retries.values().next().unwrap().wait;
        assert_eq!(wait(&guests), MIN_RETRY_INTERVAL * 2, "the backoff continues");
        // Another step is done in the meantime.
        guests.done(instance, Ok(Report { blocked: failed().failed, ..Report::default() }));
        assert_eq!(wait(&guests), MIN_RETRY_INTERVAL * 2);
        // Nothing remains to do: the retries are forgotten.
        guests.all_due = false;
        guests.due = BTreeSet::from([instance]);
        guests.pass();
        handle(&mut guests, &signals, instance);
        assert!(guests.retries.is_empty());
    }

    #[test]
    fn an_unreadable_inventory_is_retried_once_a_second() {
        let state = tempfile::tempdir().unwrap();
        let (mut guests, signals) = guests(state.path());
        let database =
            rusqlite::Connection::open(state.path().join(virt_usb_store::FILE_NAME)).unwrap();
        database.execute_batch("ALTER TABLE problems RENAME TO elsewhere").unwrap();
        guests.pass();
        assert!(guests.wait() > SECOND / 2, "{:?}", guests.wait());
        let instance: InstanceId = "11111111-2222-4333-8444-555555555555".parse().unwrap();
        guests.due.insert(instance);
        guests.pass();
        handle(&mut guests, &signals, instance);
        assert!(
            guests.wait() > SECOND / 4 && guests.retries.contains_key(&(instance, String::new()))
        );
    }
}
