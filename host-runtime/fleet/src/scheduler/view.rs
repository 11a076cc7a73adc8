//! The fleet as this instance knows it: the host documents in etcd, and the assumptions of this
//! instance that are not published yet.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};
use std::time::{Duration, Instant};

use virt_usb_filter_host::{
    Error, Filter, Fleet, Placement, Question, Rejection, Session, Verdict,
};
use virt_usb_model::{DeviceId, HostDocument, Status};

use super::assume::{Assumed, Assumptions, Millis};
use super::metrics::Metrics;

/// Number of filter sessions, which is the number of requests that are answered at once.
const SESSIONS: usize = 2;

/// The known fleet, shared by all requests.
pub struct View {
    fleet: Fleet,
    sessions: Vec<Mutex<Session>>,
    assumptions: Mutex<Assumptions>,
    sync: Mutex<SyncState>,
    begun: Instant,
    pub(super) metrics: Metrics,
}

/// State of the synchronization with etcd.
#[derive(Debug, Clone)]
pub(super) struct SyncState {
    /// Whether the first list is complete.
    pub(super) listed: bool,
    /// Time and reason of the loss of the connection. `None` while connected.
    pub(super) disconnected: Option<(Instant, String)>,
    /// Hosts with unreadable documents, with the reason for each.
    pub(super) refused: BTreeMap<String, String>,
}

/// A host that can serve the flavor, and the devices that it would use.
#[derive(Debug, serde::Serialize)]
pub struct Chosen {
    #[serde(flatten)]
    pub placement: Placement,
    pub devices: Vec<DeviceId>,
}

/// Result of a selection.
#[derive(Debug)]
pub struct Selected {
    pub matched: u32,
    pub chosen: Vec<Chosen>,
    /// Token that cancels the assumption.
    pub token: Option<String>,
}

impl View {
    /// Creates an empty view with sessions of `filter`.
    pub fn new(filter: &Filter) -> Self {
        let fleet = Fleet::new();
        let session = |_| Mutex::new(filter.session(&fleet));
        let begun = Instant::now();
        Self {
            sessions: (0..SESSIONS).map(session).collect(),
            fleet,
            assumptions: Mutex::default(),
            sync: Mutex::new(SyncState {
                listed: false,
                disconnected: Some((begun, "etcd has not responded yet".into())),
                refused: BTreeMap::new(),
            }),
            begun,
            metrics: Metrics::default(),
        }
    }

    fn now(&self) -> Millis {
        u64::try_from(self.begun.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    pub(super) fn sync(&self) -> MutexGuard<'_, SyncState> {
        self.sync.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn assumptions(&self) -> MutexGuard<'_, Assumptions> {
        self.assumptions.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn hosts(&self) -> usize {
        self.fleet.len()
    }

    /// Age of the view: the time since the connection to etcd was lost, or zero.
    pub(super) fn age(&self) -> Duration {
        self.sync().disconnected.as_ref().map_or(Duration::ZERO, |(since, _)| since.elapsed())
    }

    /// Locks an idle session. If all are busy, waits for one of them.
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

    /// Selects the best hosts. With `assume`, the devices of the best host count as taken for that
    /// time.
    pub fn select(
        &self,
        question: &Question,
        candidates: Option<&[String]>,
        limit: u32,
        assume: Option<Duration>,
    ) -> Result<Selected, Error> {
        // The lock prevents a second promise of the same devices.
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

    /// Verdict of the filter about one host.
    pub(super) fn explain(&self, question: &Question, host: &str) -> Result<Verdict, Error> {
        self.session().explain(question, host)
    }

    /// Names of all hosts that cannot serve the flavor, with the reason for each.
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

    /// All assumptions, by token.
    pub fn assumed(&self) -> BTreeMap<String, Assumed> {
        self.assumptions().all().clone()
    }

    /// Cancels the assumption with that token. `None` if there is none.
    pub fn cancel(&self, token: &str) -> Option<Assumed> {
        let mut assumptions = self.assumptions();
        let assumed = assumptions.cancel(token)?;
        self.restore_published(&assumed);
        Some(assumed)
    }

    /// Resets the devices of an ended assumption to the status that their host has published.
    fn restore_published(&self, assumed: &Assumed) {
        for device in &assumed.devices {
            self.fleet.forget_status(&assumed.host, *device);
        }
    }

    /// Ends expired assumptions, and passes pending changes to the idle sessions, so that requests
    /// do not wait for that. Must be called periodically.
    pub fn tick(&self) {
        let mut assumptions = self.assumptions();
        for assumed in assumptions.expire(self.now()) {
            self.restore_published(&assumed);
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
        let put = self.fleet.put_of(host, &text, self.now());
        self.metrics.changes.inc();
        let mut sync = self.sync();
        match put {
            Ok(()) => drop(sync.refused.remove(host)),
            Err(e) => {
                let why = e.to_string();
                if sync.refused.insert(host.to_owned(), why.clone()).as_ref() != Some(&why) {
                    tracing::warn!("ignoring the document of {host}: {why}");
                }
            }
        }
        drop(sync);
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

    fn removed(&mut self, host: &str) {
        self.fleet.remove(host);
        self.sync().refused.remove(host);
        self.metrics.changes.inc();
    }

    fn listed(&mut self) {
        let mut sync = self.sync();
        sync.listed = true;
        if sync.disconnected.take().is_some() {
            tracing::info!("following the fleet: {} host(s)", self.fleet.len());
        }
    }

    fn disconnected(&mut self, why: &crate::Error) {
        let mut sync = self.sync();
        match &mut sync.disconnected {
            Some((_, before)) => *before = why.to_string(),
            none => {
                tracing::warn!(
                    "lost the connection to the fleet: {why}; the last view stays valid"
                );
                *none = Some((Instant::now(), why.to_string()));
            }
        }
    }
}

/// Creates a token that cannot be guessed.
fn token() -> String {
    let mut random = [0; 16];
    // The kernel's generator does not fail once it is initialized.
    let _ = getrandom::fill(&mut random);
    random.iter().map(|byte| format!("{byte:02x}")).collect()
}
