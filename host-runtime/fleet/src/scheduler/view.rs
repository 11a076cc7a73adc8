//! The fleet as this instance knows it: what etcd tells, and what was promised here and is not
//! published yet.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};
use std::time::{Duration, Instant};

use virt_usb_filter_host::{
    Error, Filter, Fleet, Placement, Question, Rejection, Session, Verdict,
};
use virt_usb_model::{DeviceId, HostDocument, Status};

use super::assume::{Assumed, Assumptions, Millis};
use super::metrics::Metrics;

/// Those who ask at once, each with an instance of the filter.
const SESSIONS: usize = 2;

/// What is known, for many who ask.
pub struct View {
    fleet: Fleet,
    sessions: Vec<Mutex<Session>>,
    assumptions: Mutex<Assumptions>,
    hearing: Mutex<Hearing>,
    begun: Instant,
    pub(super) metrics: Metrics,
}

/// How it is with etcd.
#[derive(Debug, Clone)]
pub(super) struct Hearing {
    /// All that there was has been told once.
    pub(super) listed: bool,
    /// Since when nothing is heard, and why.
    pub(super) deaf: Option<(Instant, String)>,
    /// Hosts whose documents cannot be read, and why.
    pub(super) refused: BTreeMap<String, String>,
}

/// A host that can serve, and what it would use.
#[derive(Debug, serde::Serialize)]
pub struct Chosen {
    #[serde(flatten)]
    pub placement: Placement,
    pub devices: Vec<DeviceId>,
}

/// What a selection comes to.
#[derive(Debug)]
pub struct Selected {
    pub matched: u32,
    pub chosen: Vec<Chosen>,
    /// By which what was assumed can be cancelled.
    pub token: Option<String>,
}

impl View {
    /// Creates an empty view, answered by `filter`.
    pub fn new(filter: &Filter) -> Self {
        let fleet = Fleet::new();
        let session = |_| Mutex::new(filter.session(&fleet));
        let begun = Instant::now();
        Self {
            sessions: (0..SESSIONS).map(session).collect(),
            fleet,
            assumptions: Mutex::default(),
            hearing: Mutex::new(Hearing {
                listed: false,
                deaf: Some((begun, "nothing was heard of etcd yet".into())),
                refused: BTreeMap::new(),
            }),
            begun,
            metrics: Metrics::default(),
        }
    }

    fn now(&self) -> Millis {
        u64::try_from(self.begun.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    pub(super) fn hearing(&self) -> MutexGuard<'_, Hearing> {
        self.hearing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn assumptions(&self) -> MutexGuard<'_, Assumptions> {
        self.assumptions.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn hosts(&self) -> usize {
        self.fleet.len()
    }

    /// For how long nothing was heard: what is known was true then.
    pub(super) fn age(&self) -> Duration {
        self.hearing().deaf.as_ref().map_or(Duration::ZERO, |(since, _)| since.elapsed())
    }

    /// A session that nobody uses, or else the first that is free.
    fn session(&self) -> MutexGuard<'_, Session> {
        for session in &self.sessions {
            match session.try_lock() {
                Ok(session) => return session,
                Err(TryLockError::Poisoned(poisoned)) => return poisoned.into_inner(),
                Err(TryLockError::WouldBlock) => {}
            }
        }
        let turn = usize::try_from(self.now()).unwrap_or_default() % SESSIONS;
        self.sessions[turn].lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The best hosts; with `assume` the devices of the best one count as taken for that long.
    pub fn select(
        &self,
        question: &Question,
        candidates: Option<&[String]>,
        limit: u32,
        assume: Option<Duration>,
    ) -> Result<Selected, Error> {
        // Nobody else is promised the same meanwhile.
        let promising = assume.map(|time| (self.assumptions(), time));
        let mut session = self.session();
        let selection = session.select(question, candidates, limit)?;
        let mut chosen = Vec::new();
        for placement in selection.placements {
            if let Verdict::Accepted { devices, .. } = session.explain(question, &placement.host)? {
                chosen.push(Chosen { placement, devices });
            }
        }
        drop(session);
        let token = match (promising, chosen.first()) {
            (Some((mut assumptions, time)), Some(best)) if !best.devices.is_empty() => {
                let token = token();
                let host = best.placement.host.clone();
                for device in &best.devices {
                    self.fleet.set_status(&host, *device, Status::Claimed);
                }
                let until =
                    self.now().saturating_add(u64::try_from(time.as_millis()).unwrap_or(u64::MAX));
                assumptions
                    .add(token.clone(), Assumed { host, devices: best.devices.clone(), until });
                Some(token)
            }
            _ => None,
        };
        Ok(Selected { matched: selection.matched, chosen, token })
    }

    /// Answer of the filter about one host.
    pub(super) fn explain(&self, question: &Question, host: &str) -> Result<Verdict, Error> {
        self.session().explain(question, host)
    }

    /// Each host that cannot serve, by name.
    pub(super) fn rejected(&self, question: &Question) -> Result<Vec<(String, Rejection)>, Error> {
        let mut session = self.session();
        let prepared = session.prepare(question.clone())?;
        let mut rejected = Vec::new();
        for host in self.fleet.hosts() {
            if let Verdict::Rejected(why) = session.check(&prepared, &host, 0)? {
                rejected.push((host, why));
            }
        }
        Ok(rejected)
    }

    /// What is assumed, by token.
    pub fn assumed(&self) -> BTreeMap<String, Assumed> {
        self.assumptions().all().clone()
    }

    /// Takes a promise back; none: there is none of that token.
    pub fn cancel(&self, token: &str) -> Option<Assumed> {
        let mut assumptions = self.assumptions();
        let assumed = assumptions.cancel(token)?;
        self.count_again(&assumed);
        Some(assumed)
    }

    /// They are as their host has published them.
    fn count_again(&self, assumed: &Assumed) {
        for device in &assumed.devices {
            self.fleet.forget_status(&assumed.host, *device);
        }
    }

    /// Now and then: ends promises whose time is up, and feeds the instances what has come, so that
    /// nobody who asks waits for that.
    pub fn tick(&self) {
        let mut assumptions = self.assumptions();
        for assumed in assumptions.expire(self.now()) {
            self.count_again(&assumed);
        }
        drop(assumptions);
        for session in &self.sessions {
            if let Ok(mut session) = session.try_lock()
                && let Err(e) = session.statistics()
            {
                tracing::error!("{e}");
            }
        }
    }
}

impl crate::reader::Sink for Arc<View> {
    fn put(&mut self, host: &str, document: &[u8], _: i64) {
        let text = String::from_utf8_lossy(document);
        let mut assumptions = self.assumptions();
        let taken = self.fleet.put_of(host, &text, self.now());
        self.metrics.changes.inc();
        let mut hearing = self.hearing();
        match taken {
            Ok(()) => drop(hearing.refused.remove(host)),
            Err(e) => {
                let why = e.to_string();
                if hearing.refused.insert(host.to_owned(), why.clone()).as_ref() != Some(&why) {
                    tracing::warn!("the document of {host} is passed over: {why}");
                }
            }
        }
        drop(hearing);
        if assumptions.concerns(host) {
            let read =
                HostDocument::parse(&text).map(|document| document.devices).unwrap_or_default();
            let is_free =
                |id| read.iter().any(|device| device.id == id && device.status == "available");
            for device in assumptions.published(host, is_free) {
                self.fleet.set_status(host, device, Status::Claimed);
            }
        }
    }

    fn gone(&mut self, host: &str) {
        self.fleet.remove(host);
        self.hearing().refused.remove(host);
        self.metrics.changes.inc();
    }

    fn listed(&mut self) {
        let mut hearing = self.hearing();
        hearing.listed = true;
        if hearing.deaf.take().is_some() {
            tracing::info!("the fleet is known: {} host(s)", self.fleet.len());
        }
    }

    fn deaf(&mut self, why: &crate::Error) {
        let mut hearing = self.hearing();
        match &mut hearing.deaf {
            Some((_, before)) => *before = why.to_string(),
            none => {
                tracing::warn!("nothing is heard of the fleet: {why}; what is known counts on");
                *none = Some((Instant::now(), why.to_string()));
            }
        }
    }
}

/// Nobody guesses it.
fn token() -> String {
    let mut random = [0; 16];
    // The kernel's: it does not fail once the machine is up.
    let _ = getrandom::fill(&mut random);
    random.iter().map(|byte| format!("{byte:02x}")).collect()
}
