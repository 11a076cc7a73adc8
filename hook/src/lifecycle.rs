//! `started`, `stopped`, `release`, `reconnect`: the hook cannot refuse these operations, and its
//! errors never fail the call.

use std::collections::BTreeSet;
use std::path::Path;

use virt_usb_config::host_env::{self, Agent};
use virt_usb_domxml::Domain;
use virt_usb_model::{DeviceId, InstanceId};
use virt_usb_store::adopt::{Adoption, Stage};
use virt_usb_store::release::{Extent, Witness};
use virt_usb_store::{ClaimRow, Context, Store, StoreError};

use crate::answer::Answer;
use crate::job::{HookError, Job, NOTHING};
use crate::message;
use crate::verify::{Ports, claimant, holding, open};

/// Records that the guest runs with the devices in its live XML.
pub(crate) fn started(job: &Job<'_>) -> Result<Answer, HookError> {
    running(job, job.may_be_known(&job.state_dir()), Witness::Start)
}

/// Adopts the devices of a guest that libvirtd has found running after a restart.
pub(crate) fn reconnect(job: &Job<'_>) -> Result<Answer, HookError> {
    let concerned = job.may_be_known(&job.state_dir()) || job.domain.has_host_devices();
    running(job, concerned, Witness::Look)
}

fn running(job: &Job<'_>, concerned: bool, witness: Witness) -> Result<Answer, HookError> {
    let (Some(instance), true) = (job.domain.uuid, concerned) else {
        return Ok(Answer::unchanged(NOTHING));
    };
    let error = |e: StoreError| HookError::of(true, e);
    let config = job.config(true)?;
    let (mut store, context) = open(config, &job.call.op, true)?;
    let TakenOver { adopted, in_guest, waiting } =
        take_over(&mut store, job.domain, instance, &config.sysfs_root, witness, &context)
            .map_err(error)?;
    let reattach = store
        .claims_of(instance)
        .map_err(error)?
        .iter()
        .filter(|c| c.needs_reattach && !c.pending)
        .count();
    let mut did = format!("{} in the guest, {} to be attached", in_guest.len(), waiting.len());
    if reattach > 0 {
        did.push_str(&format!(", {reattach} to be reattached"));
    }
    let mut answer = Answer::unchanged(did);
    if reattach > 0 && host_env::agent(&config.state_dir) != Agent::Alive {
        answer = answer.warn(format!(
            "{}: QEMU releases its USB devices when it loads a saved state, and no agent is \
             running to reattach them: run 'systemctl start virt-usbd', or 'virsh detach-device' \
             and 'virsh attach-device'",
            job.domain.name
        ));
    }
    for adoption in &adopted {
        if let Adoption::HeldBy(device, claim) = adoption {
            answer = answer.warn(format!(
                "{} is running with {} although {} ({}) holds it: detach it from one of them",
                job.domain.name,
                message::device(device),
                claim.domain,
                claim.instance_uuid
            ));
        }
    }
    Ok(answer)
}

/// Devices of a running guest.
#[derive(Debug)]
pub struct TakenOver {
    /// Result of the adoption of each hostdev in the live XML.
    pub adopted: Vec<Adoption>,
    /// Devices that are in the guest.
    pub in_guest: BTreeSet<DeviceId>,
    /// Devices that the instance holds, but that are not in the guest yet.
    pub waiting: Vec<DeviceId>,
}

/// Adopts the devices in the live XML of a running guest, and updates its claims to match them.
///
/// # Errors
/// If the database cannot be written.
pub fn take_over(
    store: &mut Store,
    domain: &Domain,
    instance: InstanceId,
    sysfs_root: &Path,
    witness: Witness,
    context: &Context,
) -> Result<TakenOver, StoreError> {
    let holdings: Vec<_> = domain.host_devices().map(holding).collect();
    let adopted = match holdings.is_empty() {
        true => Vec::new(),
        false => {
            let claimant = claimant(store, domain, instance)?;
            store.adopt(&claimant, &holdings, Stage::Running, &mut Ports { sysfs_root }, context)?
        }
    };
    // An injected device is in the guest even if its port cannot be read now. `confirm` ignores
    // aliases of devices that the instance does not hold.
    let unread = domain.host_devices().zip(&adopted).filter(|(_, a)| **a == Adoption::Unknown);
    let injected = unread.filter_map(|(hostdev, _)| hostdev.injected());
    let in_guest: BTreeSet<DeviceId> =
        adopted.iter().filter_map(Adoption::device).chain(injected).collect();
    let inside: Vec<DeviceId> = in_guest.iter().copied().collect();
    let waiting = store.confirm(instance, &inside, witness, context)?;
    Ok(TakenOver { adopted, in_guest, waiting })
}

/// Records that QEMU has exited. The instance keeps its devices until `release`. Until then,
/// libvirt still counts them as the domain's, and would refuse another guest that gets one of them
/// (qemuProcessStop in src/qemu/qemu_process.c: this hook, qemuHostdevReAttachDomainDevices, the
/// release hook).
pub(crate) fn stopped(job: &Job<'_>) -> Result<Answer, HookError> {
    with_store(job, |store, context| {
        let Some(instance) = job.domain.uuid else { return Ok(NOTHING.into()) };
        note_use(store, job.domain, instance)?;
        store.out_of_guest(instance, context)?;
        Ok("out of the guest".into())
    })
}

/// Releases the devices of this instance, after libvirt has released them.
pub(crate) fn released(job: &Job<'_>, reason: &str) -> Result<Answer, HookError> {
    with_store(job, |store, context| {
        let Some(instance) = job.domain.uuid else { return Ok(NOTHING.into()) };
        note_use(store, job.domain, instance)?;
        let freed = store.release(instance, Extent::Run, &format!("libvirt: {reason}"), context)?;
        let ids: Vec<String> = freed.iter().map(ToString::to_string).collect();
        Ok(if ids.is_empty() {
            "nothing to release".into()
        } else {
            format!("released {}", ids.join(", "))
        })
    })
}

/// Marks the devices in the XML of a stopped guest as used, even if its start was not recorded.
fn note_use(store: &mut Store, domain: &Domain, instance: InstanceId) -> Result<(), StoreError> {
    if !domain.has_host_devices() {
        return Ok(());
    }
    let shown = |claim: &ClaimRow| {
        claim.by_hand || domain.hostdevs.iter().any(|h| h.injected() == Some(claim.device_id))
    };
    let unseen: Vec<ClaimRow> =
        store.claims_of(instance)?.into_iter().filter(|c| !c.used && shown(c)).collect();
    unseen.iter().try_for_each(|claim| store.mark_used(claim))
}

fn with_store(
    job: &Job<'_>,
    work: impl FnOnce(&mut Store, &Context) -> Result<String, StoreError>,
) -> Result<Answer, HookError> {
    if !job.may_be_known(&job.state_dir()) {
        return Ok(Answer::unchanged(NOTHING));
    }
    let (mut store, context) = open(job.config(true)?, &job.call.op, true)?;
    work(&mut store, &context).map(Answer::unchanged).map_err(|e| {
        HookError::of(
            true,
            format!(
                "{e}; the claims of {} stay until the agent or 'virt-usb claims release' releases \
                 them",
                job.domain.name
            ),
        )
    })
}
