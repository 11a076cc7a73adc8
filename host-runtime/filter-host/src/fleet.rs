//! The fleet as the scheduler knows it: host documents from the store or from a watch, shared by
//! all sessions.
//!
//! The fleet keeps each host's document, to feed new instances, and the last changes, to update
//! running instances.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use serde::Deserialize;
use virt_usb_model::{DeviceId, HostDocument, Status};

use crate::error::DocumentError;

/// Maximum number of changes that are kept. A session that is further behind gets the whole fleet
/// again.
const MAX_CHANGES: usize = 1 << 16;

/// The hosts of a fleet. Clones are cheap and share their content.
#[derive(Debug, Clone, Default)]
pub struct Fleet {
    shared: Arc<RwLock<Hosts>>,
}

#[derive(Debug, Default)]
pub(crate) struct Hosts {
    hosts: HashMap<Arc<str>, Host>,
    changes: VecDeque<Change>,
    /// Number of all changes so far.
    count: u64,
}

#[derive(Debug, Clone)]
pub(crate) struct Host {
    pub(crate) name: Arc<str>,
    /// Document as one line.
    pub(crate) document: Arc<str>,
    pub(crate) received: u64,
    /// Changes of status since the document.
    pub(crate) statuses: Vec<(DeviceId, Status)>,
}

#[derive(Debug)]
struct Change {
    host: Arc<str>,
    kind: ChangeKind,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum ChangeKind {
    /// The document is new, replaced or removed.
    Document,
    Status(DeviceId, Status),
    /// The host is alive, without a new document.
    Touched,
}

/// The part of a document that the fleet reads. The filter reads the rest.
#[derive(Deserialize)]
struct Named<'a> {
    #[serde(borrow)]
    host: std::borrow::Cow<'a, str>,
}

impl Fleet {
    /// Creates an empty fleet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a host, or replaces its document.
    ///
    /// # Errors
    /// If the document cannot be written as JSON.
    pub fn put(&self, document: &HostDocument, received: u64) -> Result<(), DocumentError> {
        let text = serde_json::to_string(document).map_err(|e| DocumentError(e.to_string()))?;
        self.write().put(&document.host, text.into(), received);
        Ok(())
    }

    /// Adds a host, or replaces its document, by the published text. Only the JSON syntax and the
    /// host's name are checked here; [`crate::Session::problems`] lists documents that the filter
    /// refuses.
    ///
    /// # Errors
    /// If the text is not JSON, or names no host.
    pub fn put_text(&self, document: &str, received: u64) -> Result<(), DocumentError> {
        let named: Named<'_> =
            serde_json::from_str(document).map_err(|e| DocumentError(e.to_string()))?;
        self.put_line(&named.host, document, received);
        Ok(())
    }

    /// Like [`Self::put_text`], but refuses a document that names another host.
    ///
    /// # Errors
    /// If the text is not JSON, or names another host or none. The previous document then stays.
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
        // The filter reads one document per line. In JSON, an unescaped line break is white space.
        let line = if document.contains('\n') {
            document.replace('\n', " ").into()
        } else {
            document.into()
        };
        self.write().put(host, line, received);
    }

    /// Removes a host. Returns false if the host is unknown.
    pub fn remove(&self, host: &str) -> bool {
        let mut hosts = self.write();
        let Some((name, _)) = hosts.hosts.remove_entry(host) else { return false };
        hosts.changed(name, ChangeKind::Document);
        true
    }

    /// Records that a host is alive, although it sent no document. Returns false if the host is
    /// unknown.
    pub fn touch(&self, host: &str, received: u64) -> bool {
        let mut hosts = self.write();
        let Some(known) = hosts.hosts.get_mut(host) else { return false };
        known.received = received;
        let name = known.name.clone();
        hosts.changed(name, ChangeKind::Touched);
        true
    }

    /// Overrides the status of a device until the next document of its host. Returns false if the
    /// host is unknown. The filter checks whether the host has the device.
    pub fn set_status(&self, host: &str, device: DeviceId, status: Status) -> bool {
        let mut hosts = self.write();
        let Some(known) = hosts.hosts.get_mut(host) else { return false };
        known.statuses.retain(|(other, _)| *other != device);
        known.statuses.push((device, status));
        let name = known.name.clone();
        hosts.changed(name, ChangeKind::Status(device, status));
        true
    }

    /// Removes the override of [`Fleet::set_status`], so that the document of the host applies
    /// again. Returns false if there was none.
    pub fn forget_status(&self, host: &str, device: DeviceId) -> bool {
        let mut hosts = self.write();
        let Some(known) = hosts.hosts.get_mut(host) else { return false };
        let before = known.statuses.len();
        known.statuses.retain(|(other, _)| *other != device);
        let found = known.statuses.len() < before;
        if found {
            let name = known.name.clone();
            hosts.changed(name, ChangeKind::Document);
        }
        found
    }

    /// Number of hosts.
    pub fn len(&self) -> usize {
        self.read().hosts.len()
    }

    /// Whether the fleet has no hosts.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Names of all hosts, sorted.
    pub fn hosts(&self) -> Vec<String> {
        let mut names: Vec<String> = self.read().hosts.keys().map(ToString::to_string).collect();
        names.sort_unstable();
        names
    }

    // A poisoned lock is no problem: no operation here can fail half way.
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
        self.changed(name, ChangeKind::Document);
    }

    fn changed(&mut self, host: Arc<str>, kind: ChangeKind) {
        if self.changes.len() == MAX_CHANGES {
            self.changes.pop_front();
        }
        self.changes.push_back(Change { host, kind });
        self.count += 1;
    }

    /// Number of all changes so far.
    pub(crate) const fn count(&self) -> u64 {
        self.count
    }

    /// Returns the changes for a session that knows the first `seen` changes. If the session is too
    /// far behind, or `seen` is `None`, returns the whole fleet.
    pub(crate) fn update(&self, seen: Option<u64>) -> Update {
        let changes = seen.and_then(|seen| {
            let behind = usize::try_from(self.count.checked_sub(seen)?).ok()?;
            self.changes.len().checked_sub(behind).map(|skip| self.changes.range(skip..))
        });
        let Some(changes) = changes else {
            let documents = self.hosts.values().cloned().collect();
            return Update { is_full: true, documents, ..Update::default() };
        };
        let mut update = Update::default();
        let mut whole = BTreeSet::new();
        for Change { host, kind } in changes.clone() {
            if *kind == ChangeKind::Document && whole.insert(host) {
                match self.hosts.get(host) {
                    Some(known) => update.documents.push(known.clone()),
                    None => update.removed.push(host.clone()),
                }
            }
        }
        for Change { host, kind } in changes.filter(|change| !whole.contains(&change.host)) {
            match kind {
                ChangeKind::Status(device, status) => {
                    update.statuses.push((host.clone(), *device, *status));
                }
                ChangeKind::Touched => {
                    let known = self.hosts.get(host);
                    update.touched.extend(known.map(|h| (host.clone(), h.received)));
                }
                ChangeKind::Document => {}
            }
        }
        update
    }
}

/// Changes since the last update. Each host occurs once, except for the statuses of its devices.
#[derive(Debug, Default)]
pub(crate) struct Update {
    /// Whether the update contains the whole fleet, and replaces everything known before.
    pub(crate) is_full: bool,
    pub(crate) documents: Vec<Host>,
    pub(crate) removed: Vec<Arc<str>>,
    pub(crate) statuses: Vec<(Arc<str>, DeviceId, Status)>,
    pub(crate) touched: Vec<(Arc<str>, u64)>,
}
