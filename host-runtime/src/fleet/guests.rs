//! The guests of this host, as they are told to the fleet: whose they are, whether they run, what they are to have.

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Notify, watch};
use virt_usb_model::InstanceId;
use virt_usb_store::{Durability, Store};

use super::others::{Server, publish};
use crate::agent::PATIENCE;
use crate::hypervisor::Hypervisor;

/// A guest that came or went without a device is told of after so long.
const LOOK: Duration = Duration::from_secs(5);

/// Looks at them.
pub(super) struct Guests {
    hypervisor: Option<Arc<dyn Hypervisor>>,
    state_dir: PathBuf,
    /// As they are published; none: they could not be looked at yet.
    pub(super) text: watch::Sender<Option<String>>,
    /// Look now.
    pub(super) look: Notify,
}

impl Guests {
    pub(super) fn new(hypervisor: Option<Arc<dyn Hypervisor>>, state_dir: PathBuf) -> Self {
        Self { hypervisor, state_dir, text: watch::Sender::default(), look: Notify::new() }
    }

    /// For ever.
    pub(super) async fn follow(&self) {
        let Some(hypervisor) = self.hypervisor.clone() else { return std::future::pending().await };
        loop {
            let (hypervisor, state_dir) = (hypervisor.clone(), self.state_dir.clone());
            // libvirt takes its time.
            let looked = tokio::task::spawn_blocking(move || servers(&*hypervisor, &state_dir)).await;
            // What cannot be looked at now is as it was.
            if let Ok(Ok(servers)) = looked {
                let text = publish(&servers);
                self.text.send_if_modified(|known| {
                    let changed = known.as_ref() != Some(&text);
                    *known = Some(text);
                    changed
                });
            }
            drop(tokio::time::timeout(LOOK, self.look.notified()).await);
        }
    }
}

fn servers(hypervisor: &dyn Hypervisor, state_dir: &Path) -> anyhow::Result<Vec<Server>> {
    let store = Store::open(state_dir, PATIENCE, Durability::Boot)?;
    let running: HashSet<InstanceId> = hypervisor.running()?.into_iter().collect();
    let mut owners: HashMap<InstanceId, _> =
        store.owners()?.into_iter().map(|owner| (owner.instance_uuid, owner.project_id)).collect();
    let mut requests: HashMap<InstanceId, Vec<_>> = HashMap::new();
    for assignment in store.all_assignments()? {
        requests.entry(assignment.instance_uuid).or_default().push(assignment.request);
    }
    let mut found = Vec::new();
    for id in hypervisor.all()? {
        // One that has gone meanwhile, or whose XML cannot be read, is nobody's.
        let Some(xml) = hypervisor.xml(id)? else { continue };
        let Ok(domain) = virt_usb_domxml::read(xml.as_bytes()) else { continue };
        let by_domain = domain.project.is_some();
        found.push(Server {
            id,
            name: domain.name,
            running: running.contains(&id),
            project: domain.project.or_else(|| owners.remove(&id)),
            by_domain,
            requests: requests.remove(&id).unwrap_or_default(),
        });
    }
    found.sort_by_key(|server| server.id);
    Ok(found)
}
