//! Restore and rebuild of the inventory: a backup or rebuilt inventory is updated from the
//! plugged-in devices and the running guests before any other program sees it.
//!
//! ```text
//!  libvirt ─► guests ──┐
//!  libusb ─► snapshot ─┼─► store::recover::replace ─► reconcile ─► adopt, guest by guest
//!  backup, salvage ────┘                                             └─► replace the file
//!                                                                         └─► adopt once more
//! ```
//! A guest keeps the devices in its live XML (`virt_usb_hook::lifecycle::take_over`). A claim of
//! another instance on such a device ends, unless that instance's guest has the device too. Claims
//! of guests that are not running are kept, because the guests may be about to start; the agent
//! ends them.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Serialize;
use virt_usb_config::Config;
use virt_usb_config::host_env::{self, Agent};
use virt_usb_domxml::{Domain, UsbHostdev};
use virt_usb_hook::lifecycle::{TakenOver, take_over};
use virt_usb_hook::message;
use virt_usb_model::{DeviceId, InstanceId};
use virt_usb_store::adopt::Adoption;
use virt_usb_store::recover::{Kept, RebuildRequest, Recovered, replace};
use virt_usb_store::release::Witness;
use virt_usb_store::{ClaimRow, Context, Origin, Record, Store, StoreError};

use crate::discovery::Snapshot;
use crate::hypervisor::Hypervisor;
use crate::inventory::{self, plan};

/// A running guest.
#[derive(Debug, Clone)]
pub struct Guest {
    /// UUID of the instance.
    pub instance: InstanceId,
    /// Live XML of the domain.
    pub domain: Domain,
    /// Whether its state is being transferred. Its XML may then be wrong.
    pub moving: bool,
}

/// Reads all running guests.
///
/// # Errors
/// If any query fails, because an unknown guest might lose its device to another guest.
pub fn guests(hypervisor: &dyn Hypervisor) -> Result<Vec<Guest>, String> {
    let mut guests = Vec::new();
    for instance in hypervisor.running().map_err(|e| e.to_string())? {
        let running = hypervisor.look(instance).map_err(|e| format!("instance {instance}: {e}"))?;
        // A guest that has stopped in the meantime has no devices.
        let Some(running) = running else { continue };
        let domain = running
            .domain()
            .map_err(|e| format!("cannot read the XML of {}: {e}", running.name))?;
        guests.push(Guest { instance, domain, moving: running.moving });
    }
    Ok(guests)
}

/// Inputs of a restore or rebuild.
pub struct Recovery<'a> {
    /// The configuration to use.
    pub config: &'a Config,
    /// Source of the plugged-in devices.
    pub origin: Origin,
    /// Name of the host.
    pub host: &'a str,
    /// The plugged-in devices.
    pub snapshot: &'a Snapshot,
    /// Hypervisor of the guests; `None` to skip the query.
    pub hypervisor: Option<&'a dyn Hypervisor>,
    /// Backup to restore; `None` to rebuild.
    pub backup: Option<&'a Path>,
    /// Timeout for locks.
    pub lock_timeout: Duration,
    /// Time and actor of the changes.
    pub context: &'a Context,
}

/// Result of a restore or rebuild.
#[derive(Debug, Serialize)]
pub struct Report {
    /// Path of the inventory.
    pub file: PathBuf,
    /// Path of the previous inventory, if it was kept.
    pub aside: Option<PathBuf>,
    /// Whether a running agent has the old file open. It ends by itself.
    pub agent_ends: bool,
    /// Devices that are plugged in or held.
    pub devices: usize,
    /// Number of claims.
    pub claims: usize,
    /// Rows that were kept from the previous inventory, by table.
    pub kept: Vec<Kept>,
    /// Number of devices that had an id but whose rows cannot be read.
    pub lost_devices: u64,
    /// Warnings for the operator.
    pub warnings: Vec<String>,
}

/// The restore or rebuild was refused, and nothing was changed.
#[derive(Debug, thiserror::Error)]
pub enum Refusal {
    /// Error of the inventory.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The running guests cannot be read.
    #[error("{0}")]
    Guests(String),
}

impl Recovery<'_> {
    /// Restores or rebuilds the inventory.
    ///
    /// # Errors
    /// The reason of the refusal.
    pub fn run(&self) -> Result<Report, Refusal> {
        let known = self.hypervisor.map(guests).transpose().map_err(Refusal::Guests)?;
        let ids: Vec<DeviceId> = known
            .iter()
            .flatten()
            .flat_map(|g| &g.domain.hostdevs)
            .filter_map(|h| h.injected())
            .collect();
        let request = RebuildRequest {
            what: if self.backup.is_some() { "restore" } else { "rebuild" },
            backup: self.backup,
            guests_known: known.is_some(),
            ids: &ids,
        };
        let mut warnings = BTreeSet::new();
        let mut fill = |store: &mut Store| {
            store.admit(self.origin)?;
            let Config { whitelist, aliases, flapping, sysfs_root, .. } = self.config;
            let whitelist = &inventory::located(whitelist, store, self.snapshot, sysfs_root)?;
            let plan = |rows: &[Record]| plan(self.snapshot, rows, whitelist, aliases);
            store.reconcile(
                self.host,
                flapping,
                self.snapshot.seen(aliases),
                plan,
                self.context,
            )?;
            warnings = settle(
                store,
                known.as_deref().unwrap_or_default(),
                &self.config.sysfs_root,
                self.context,
            )?;
            Ok(())
        };
        let recovered =
            replace(&self.config.state_dir, self.lock_timeout, &request, self.context, &mut fill)?;
        let Recovered { mut store, aside, kept, lost_devices, in_place } = recovered;
        // Guests may have started or received devices between the query and the lock.
        if let Some(hypervisor) = self.hypervisor {
            match guests(hypervisor) {
                Ok(again) => {
                    store.restart_lock_timeout();
                    warnings = settle(&mut store, &again, &self.config.sysfs_root, self.context)?;
                    warnings.extend(idle(&store.claims()?, &again));
                }
                Err(why) => {
                    warnings.insert(format!(
                        "{why}: the agent adopts devices that guests got in the meantime"
                    ));
                }
            }
        }
        Ok(Report {
            file: store.path().to_owned(),
            aside,
            agent_ends: !in_place && host_env::agent(&self.config.state_dir) == Agent::Alive,
            devices: store.devices()?.len(),
            claims: store.claims()?.len(),
            kept,
            lost_devices,
            warnings: warnings.into_iter().collect(),
        })
    }
}

/// Updates the claims to match the devices in the guests. Returns warnings for the operator.
///
/// # Errors
/// If the inventory cannot be written.
pub fn settle(
    store: &mut Store,
    guests: &[Guest],
    sysfs_root: &Path,
    context: &Context,
) -> Result<BTreeSet<String>, StoreError> {
    let mut warnings = BTreeSet::new();
    for guest in guests {
        let name = &guest.domain.name;
        if guest.moving {
            warnings.insert(format!(
                "{name} is being restored or migrated: the agent adopts its devices afterwards"
            ));
            continue;
        }
        let mut taken =
            take_over(store, &guest.domain, guest.instance, sysfs_root, Witness::Look, context)?;
        let mut freed = false;
        for (device, claim) in held_by_others(&taken) {
            let other = guests.iter().find(|g| g.instance == claim.instance_uuid);
            match other.is_some_and(|other| shows(&other.domain, device)) {
                true => drop(warnings.insert(format!(
                    "{name} is running with {} although {} ({}) has it too: detach it from one of \
                     them (virsh detach-device)",
                    message::device(device),
                    claim.domain,
                    claim.instance_uuid
                ))),
                false => {
                    let why = format!("{name} runs with it");
                    let id = claim.device_id;
                    freed |= store.release_device(
                        claim.instance_uuid,
                        id,
                        Some(claim.revision),
                        &why,
                        context,
                    )?;
                }
            }
        }
        if freed {
            taken = take_over(
                store,
                &guest.domain,
                guest.instance,
                sysfs_root,
                Witness::Look,
                context,
            )?;
        }
        let strange = guest.domain.host_devices().zip(&taken.adopted);
        let unknown = |(hostdev, adopted): &(&UsbHostdev, &Adoption)| {
            **adopted == Adoption::Unknown && (hostdev.names_a_device() || hostdev.alias.is_some())
        };
        for (hostdev, _) in strange.filter(unknown) {
            let what = match (hostdev.injected(), hostdev.address) {
                (Some(id), _) => format!("device {id} (alias ua-usb-{id})"),
                (None, Some(address)) => format!("a device at {address}"),
                (None, None) => match &hostdev.port {
                    Some(port) => format!("a device at port {port}"),
                    None => "a device without an address".into(),
                },
            };
            warnings.insert(format!(
                "the XML of {name} names {what}, and virt-usb cannot tell which plugged-in device \
                 that is: 'virsh dumpxml {name}', 'virt-usb devices'"
            ));
        }
    }
    Ok(warnings)
}

fn held_by_others(taken: &TakenOver) -> Vec<(&Record, &ClaimRow)> {
    let held = taken.adopted.iter().filter_map(|a| match a {
        Adoption::HeldBy(device, claim) => Some((&**device, &**claim)),
        _ => None,
    });
    held.collect()
}

fn shows(domain: &Domain, device: &Record) -> bool {
    domain.host_devices().any(|h| {
        h.address == Some(device.entry.address)
            || h.port.as_ref() == Some(&device.entry.port_path)
            || (h.address.is_none() && h.injected() == Some(device.entry.id))
    })
}

/// Returns a warning about claims of guests that are not running.
fn idle(claims: &[ClaimRow], guests: &[Guest]) -> Option<String> {
    let runs = |claim: &ClaimRow| guests.iter().any(|g| g.instance == claim.instance_uuid);
    let idle: Vec<&ClaimRow> =
        claims.iter().filter(|c| !c.is_lasting() && !c.pending && !runs(c)).collect();
    let names: BTreeSet<&str> = idle.iter().map(|c| c.domain.as_str()).collect();
    (!idle.is_empty()).then(|| {
        format!(
            "{} claim(s) of guests that are not running ({}) were kept, because the guests may be \
             about to start: the agent releases them; without an agent, use 'virt-usb claims \
             release INSTANCE --force'",
            idle.len(),
            names.into_iter().collect::<Vec<_>>().join(", ")
        )
    })
}
