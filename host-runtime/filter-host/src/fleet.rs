//! The fleet as the scheduler knows it: host documents, fed from the store or from a watch, shared
//! by all sessions.
//!
//! It keeps each host's document, so that a fresh instance can be fed, and the last changes, so
//! that one that runs need not be.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use serde::Deserialize;
use virt_usb_model::{DeviceId, HostDocument, Status};

use crate::error::DocumentError;

/// Maximum number of changes that are kept. A session that is further behind gets the whole fleet
/// again.
const KEPT: usize = 1 << 16;

/// The hosts. Cheap to clone: clones are the same fleet.
#[derive(Debug, Clone, Default)]
pub struct Fleet {
    shared: Arc<RwLock<Hosts>>,
}

#[derive(Debug, Default)]
pub(crate) struct Hosts {
    hosts: HashMap<Arc<str>, Host>,
    changes: VecDeque<Change>,
    /// How many changes there have been.
    count: u64,
}

#[derive(Debug, Clone)]
pub(crate) struct Host {
    pub(crate) name: Arc<str>,
    /// Document as one line.
    pub(crate) document: Arc<str>,
    pub(crate) received: u64,
    /// Changes of state since the document.
    pub(crate) statuses: Vec<(DeviceId, Status)>,
}

#[derive(Debug)]
struct Change {
    host: Arc<str>,
    what: What,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum What {
    /// The document is new, replaced or removed.
    Document,
    Status(DeviceId, Status),
    Heard,
}

/// As much of a document as the fleet needs to know; the filter reads the rest.
#[derive(Deserialize)]
struct Named<'a> {
    #[serde(borrow)]
    host: std::borrow::Cow<'a, str>,
}

impl Fleet {
    /// An empty one.
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes a host, new or in place of what was known of it.
    ///
    /// # Errors
    /// If it cannot be written as JSON.
    pub fn put(&self, document: &HostDocument, received: u64) -> Result<(), DocumentError> {
        let text = serde_json::to_string(document).map_err(|e| DocumentError(e.to_string()))?;
        self.write().put(&document.host, text.into(), received);
        Ok(())
    }

    /// The same with the document's text, as a host has published it. Only that it is JSON and
    /// which host it is of is looked at here; what the filter refuses is found in
    /// [`crate::Session::problems`].
    ///
    /// # Errors
    /// If it is not JSON, or names no host.
    pub fn put_text(&self, document: &str, received: u64) -> Result<(), DocumentError> {
        let named: Named<'_> =
            serde_json::from_str(document).map_err(|e| DocumentError(e.to_string()))?;
        self.put_line(&named.host, document, received);
        Ok(())
    }

    /// Like [`Self::put_text`], but refuses a document that names another host.
    ///
    /// # Errors
    /// If it is not JSON, or names another host or none; what was known of the host counts on.
    pub fn put_of(&self, host: &str, document: &str, received: u64) -> Result<(), DocumentError> {
        let named: Named<'_> =
            serde_json::from_str(document).map_err(|e| DocumentError(e.to_string()))?;
        if named.host != host {
            return Err(DocumentError(format!("it names another host: {:?}", named.host)));
        }
        self.put_line(host, document, received);
        Ok(())
    }

    fn put_line(&self, host: &str, document: &str, received: u64) {
        // Documents go to the filter a line each. In JSON a line break is white space, or else it
        // is escaped.
        let line = if document.contains('\n') {
            document.replace('\n', " ").into()
        } else {
            document.into()
        };
        self.write().put(host, line, received);
    }

    /// Forgets a host; false if there was none.
    pub fn remove(&self, host: &str) -> bool {
        let mut hosts = self.write();
        let Some((name, _)) = hosts.hosts.remove_entry(host) else { return false };
        hosts.changed(name, What::Document);
        true
    }

    /// Records that a host is alive, although it sent no document; false if the host is unknown.
    pub fn touch(&self, host: &str, received: u64) -> bool {
        let mut hosts = self.write();
        let Some(known) = hosts.hosts.get_mut(host) else { return false };
        known.received = received;
        let name = known.name.clone();
        hosts.changed(name, What::Heard);
        true
    }

    /// Gives a device another state, until the next document of its host; false if there is no such
    /// host. That the host has the device is for the filter to say.
    pub fn set_status(&self, host: &str, device: DeviceId, status: Status) -> bool {
        let mut hosts = self.write();
        let Some(known) = hosts.hosts.get_mut(host) else { return false };
        known.statuses.retain(|(other, _)| *other != device);
        known.statuses.push((device, status));
        let name = known.name.clone();
        hosts.changed(name, What::Status(device, status));
        true
    }

    /// Takes back what [`Fleet::set_status`] has said of a device: its host's document counts
    /// again; false if nothing was said of it.
    pub fn forget_status(&self, host: &str, device: DeviceId) -> bool {
        let mut hosts = self.write();
        let Some(known) = hosts.hosts.get_mut(host) else { return false };
        let before = known.statuses.len();
        known.statuses.retain(|(other, _)| *other != device);
        let found = known.statuses.len() < before;
        if found {
            let name = known.name.clone();
            hosts.changed(name, What::Document);
        }
        found
    }

    /// How many hosts there are.
    pub fn len(&self) -> usize {
        self.read().hosts.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The names, sorted.
    pub fn hosts(&self) -> Vec<String> {
        let mut names: Vec<String> = self.read().hosts.keys().map(ToString::to_string).collect();
        names.sort_unstable();
        names
    }

    // A panic elsewhere leaves whole entries: nothing here can fail half way.
    pub(crate) fn read(&self) -> RwLockReadGuard<'_, Hosts> {
        self.shared.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Hosts> {
        self.shared.write().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Hosts {
    fn name(&self, host: &str) -> Arc<str> {
        self.hosts.get(host).map_or_else(|| host.into(), |known| known.name.clone())
    }

    fn put(&mut self, host: &str, document: Arc<str>, received: u64) {
        let name = self.name(host);
        let host = Host { name: name.clone(), document, received, statuses: Vec::new() };
        self.hosts.insert(name.clone(), host);
        self.changed(name, What::Document);
    }

    fn changed(&mut self, host: Arc<str>, what: What) {
        if self.changes.len() == KEPT {
            self.changes.pop_front();
        }
        self.changes.push_back(Change { host, what });
        self.count += 1;
    }

    /// How many changes there have been.
    pub(crate) const fn count(&self) -> u64 {
        self.count
    }

    /// Changes for a session that knows the first `seen` changes; the whole fleet if it knows too
    /// few or none.
    pub(crate) fn news(&self, seen: Option<u64>) -> News {
        let changes = seen.and_then(|seen| {
            let behind = usize::try_from(self.count.checked_sub(seen)?).ok()?;
            self.changes.len().checked_sub(behind).map(|skip| self.changes.range(skip..))
        });
        let Some(changes) = changes else {
            let whole = self.hosts.values().cloned().collect();
            return News { everything: true, whole, ..News::default() };
        };
        let mut news = News::default();
        let mut whole = BTreeSet::new();
        for Change { host, what } in changes.clone() {
            if *what == What::Document && whole.insert(host) {
                match self.hosts.get(host) {
                    Some(known) => news.whole.push(known.clone()),
                    None => news.gone.push(host.clone()),
                }
            }
        }
        for Change { host, what } in changes.filter(|change| !whole.contains(&change.host)) {
            match what {
                What::Status(device, status) => {
                    news.statuses.push((host.clone(), *device, *status));
                }
                What::Heard => {
                    news.heard.extend(self.hosts.get(host).map(|h| (host.clone(), h.received)));
                }
                What::Document => {}
            }
        }
        news
    }
}

/// Changes since the last update; each host occurs once, except for changes of its devices.
#[derive(Debug, Default)]
pub(crate) struct News {
    /// Nothing that was known before counts.
    pub(crate) everything: bool,
    pub(crate) whole: Vec<Host>,
    pub(crate) gone: Vec<Arc<str>>,
    pub(crate) statuses: Vec<(Arc<str>, DeviceId, Status)>,
    pub(crate) heard: Vec<(Arc<str>, u64)>,
}
