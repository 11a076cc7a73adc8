//! The guests of this host as published to the fleet: owner, run state, and requested devices.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Notify, watch};
use virt_usb_model::InstanceId;
use virt_usb_store::{Durability, Store};

use super::peers::{Server, publish};
use crate::hypervisor::{Known, Supervised};
use crate::timeouts::STORE_LOCK_TIMEOUT;

/// Interval at which the guests are read again. A guest that starts or stops without a device
/// changes nothing in the inventory, and gives no other signal.
const READ_INTERVAL: Duration = Duration::from_secs(5);

/// Reader of this host's guests.
pub(super) struct Guests {
    hypervisor: Option<Arc<Supervised>>,
    state_dir: PathBuf,
    /// The value to publish. `None` until the guests were read once.
    pub(super) text: watch::Sender<Option<String>>,
    /// Signal to read the guests now.
    pub(super) refresh: Notify,
}

impl Guests {
    pub(super) fn new(hypervisor: Option<Arc<Supervised>>, state_dir: PathBuf) -> Self {
        Self { hypervisor, state_dir, text: watch::Sender::default(), refresh: Notify::new() }
    }

    /// Keeps `text` up to date forever.
    pub(super) async fn follow(&self) {
        let Some(hypervisor) = self.hypervisor.clone() else { return std::future::pending().await };
        loop {
            let (hypervisor, state_dir) = (hypervisor.clone(), self.state_dir.clone());
            let read = move || match hypervisor.known() {
                Some(known) => servers(known, &state_dir).map(Some),
                None => Ok(None),
            };
            // If the guests cannot be read now, the previous value stays.
            if let Ok(Ok(Some(servers))) = tokio::task::spawn_blocking(read).await {
                let text = publish(&servers);
                self.text.send_if_modified(|known| {
                    let changed = known.as_ref() != Some(&text);
                    *known = Some(text);
                    changed
                });
            }
            drop(tokio::time::timeout(READ_INTERVAL, self.refresh.notified()).await);
        }
    }
}

fn servers(known: Vec<Known>, state_dir: &Path) -> anyhow::Result<Vec<Server>> {
    let store = Store::open(state_dir, STORE_LOCK_TIMEOUT, Durability::Boot)?;
    let mut owners: HashMap<InstanceId, _> =
        store.owners()?.into_iter().map(|owner| (owner.instance_uuid, owner.project_id)).collect();
    let mut requests: HashMap<InstanceId, Vec<_>> = HashMap::new();
    for assignment in store.all_assignments()? {
        requests.entry(assignment.instance_uuid).or_default().push(assignment.request);
    }
    let server = |Known { instance: id, running, domain, .. }: Known| Server {
        id,
        name: domain.name.clone(),
        running,
        project: domain.project.clone().or_else(|| owners.remove(&id)),
        by_domain: domain.project.is_some(),
        requests: requests.remove(&id).unwrap_or_default(),
    };
    // `known` is sorted by UUID.
    Ok(known.into_iter().map(server).collect())
}
