//! Reads the inputs of the planner: the inventory, and a guest's live XML.

use std::collections::{BTreeMap, BTreeSet};

use virt_usb_config::Config;
use virt_usb_domxml::{Domain, UsbHostdev, XmlError};
use virt_usb_hook::flavor_source::FlavorRequest;
use virt_usb_model::{BusAddress, DeviceId, Flavor, InstanceId, PortPath};
use virt_usb_store::{ClaimRow, Record, Store, StoreError};

use super::plan::{Guest, Host, Instance, Seen};
use crate::hypervisor::Running;

/// A snapshot of the inventory.
#[derive(Debug, Default)]
pub struct View {
    devices: BTreeMap<DeviceId, Record>,
    claims: BTreeMap<InstanceId, Vec<ClaimRow>>,
    holders: BTreeMap<DeviceId, InstanceId>,
    /// Instances that have assignments or an owner that an administrator set.
    assigned: BTreeSet<InstanceId>,
    problems: BTreeMap<InstanceId, BTreeMap<String, String>>,
}

impl View {
    /// Reads the whole inventory.
    ///
    /// # Errors
    /// If the database cannot be read.
    pub fn read(store: &Store) -> Result<Self, StoreError> {
        let mut view = Self {
            devices: store.devices()?.into_iter().map(|r| (r.entry.id, r)).collect(),
            assigned: store.all_assignments()?.into_iter().map(|a| a.instance_uuid).collect(),
            ..Self::default()
        };
        view.assigned.extend(store.owners()?.into_iter().map(|owner| owner.instance_uuid));
        for claim in store.claims()? {
            view.holders.insert(claim.device_id, claim.instance_uuid);
            view.claims.entry(claim.instance_uuid).or_default().push(claim);
        }
        for problem in store.problems()? {
            view.problems
                .entry(problem.instance_uuid)
                .or_default()
                .insert(problem.about, problem.what);
        }
        Ok(view)
    }

    /// Reads the part of the inventory that concerns one instance.
    ///
    /// # Errors
    /// If the database cannot be read.
    pub fn read_about(
        store: &Store,
        instance: InstanceId,
        guest: Option<&Guest>,
    ) -> Result<Self, StoreError> {
        let hostdevs = || guest.into_iter().flat_map(|g| g.domain.host_devices());
        let ids: Vec<DeviceId> = hostdevs().filter_map(UsbHostdev::injected).collect();
        let addresses: Vec<BusAddress> = hostdevs().filter_map(|h| h.address).collect();
        let ports: Vec<PortPath> = hostdevs().filter_map(|h| h.port.clone()).collect();
        let mut view = Self::default();
        for record in store.devices_about(instance, &ids, &addresses, &ports)? {
            let id = record.entry.id;
            view.holders.extend(record.entry.instance_uuid.map(|holder| (id, holder)));
            view.devices.insert(id, record);
        }
        let claims = store.claims_of(instance)?;
        if !claims.is_empty() {
            view.claims.insert(instance, claims);
        }
        if !store.assignments(instance)?.is_empty() || store.owner(instance)?.is_some() {
            view.assigned.insert(instance);
        }
        for problem in store.problems()?.into_iter().filter(|p| p.instance_uuid == instance) {
            view.problems.entry(instance).or_default().insert(problem.about, problem.what);
        }
        Ok(view)
    }

    /// All instances with claims, assignments or problems.
    pub fn instances(&self) -> BTreeSet<InstanceId> {
        let known = self.claims.keys().chain(&self.assigned).chain(self.problems.keys());
        known.copied().collect()
    }

    /// Number of recorded problems.
    pub fn problems(&self) -> usize {
        self.problems.values().map(BTreeMap::len).sum()
    }

    /// Whether the inventory contains anything about the instance.
    pub fn knows(&self, instance: InstanceId) -> bool {
        self.claims.contains_key(&instance)
            || self.assigned.contains(&instance)
            || self.problems.contains_key(&instance)
    }

    /// Claims of the instance.
    pub fn claims(&self, instance: InstanceId) -> &[ClaimRow] {
        self.claims.get(&instance).map_or(&[], Vec::as_slice)
    }

    /// A device that is plugged in or held.
    pub fn device(&self, device: DeviceId) -> Option<&Record> {
        self.devices.get(&device)
    }

    /// All devices of the snapshot.
    pub fn devices(&self) -> impl Iterator<Item = &Record> {
        self.devices.values()
    }

    /// Plans for one instance.
    pub fn plan(&self, id: InstanceId, seen: Seen<'_>, config: &Config) -> Vec<super::plan::Step> {
        let none = BTreeMap::new();
        let claims: Vec<&ClaimRow> = self.claims(id).iter().collect();
        let instance = Instance {
            id,
            seen,
            claims: &claims,
            assigned: self.assigned.contains(&id),
            problems: self.problems.get(&id).unwrap_or(&none),
        };
        let host = Host {
            devices: &self.devices,
            holders: &self.holders,
            replug: config.replug,
            absent_grace: config.absent_grace.as_secs_f64(),
            undefined_grace: config.undefined_grace.as_secs_f64(),
        };
        super::plan::plan(&instance, &host)
    }
}

/// Reads a running domain, and the requests of its flavor. An invalid flavor counts as empty,
/// because the hook has accepted the guest.
///
/// # Errors
/// If the XML cannot be read.
pub fn guest(running: &Running, config: &Config, store: &Store) -> Result<Guest, XmlError> {
    let domain = running.domain()?;
    let redirections =
        flavor(&domain, config, store).map_or(0, |f| f.usb_redirection_devices.len());
    Ok(Guest { domain, redirections, moving: running.moving })
}

/// Reads the domain's flavor.
///
/// # Errors
/// If the flavor is invalid or not stored.
pub fn flavor(domain: &Domain, config: &Config, store: &Store) -> Result<Flavor, String> {
    let request = FlavorRequest::read(&domain.flavor, &config.state_dir).map_err(|e| e.what)?;
    request.resolve(store).map_err(|e| e.what)
}
