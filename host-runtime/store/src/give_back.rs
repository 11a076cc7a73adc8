//! Confirming claims and giving devices back. All of it may be done twice; none of it touches another instance's claims.

use rusqlite::{Transaction, params};
use virt_usb_model::{DeviceId, InstanceId};

use crate::device::{ClaimRow, refresh, sql_id, step_revision};
use crate::error::Sql;
use crate::events::{Event, record};
use crate::{Context, NOW, PENDING_SECONDS, Store, StoreError, hints};

/// What is given back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Extent {
    /// What is held while the guest runs; what is held for the instance stays claimed.
    Run,
    /// Everything, the assignments too: the instance is gone, or an operator says so.
    Everything,
}

impl Store {
    /// Gives back what the instance holds. Returns the devices that became free.
    ///
    /// # Errors
    /// When the database cannot be read or written; then everything is as it was.
    pub fn release(
        &mut self,
        instance: InstanceId,
        extent: Extent,
        why: &str,
        context: &Context,
    ) -> Result<Vec<DeviceId>, StoreError> {
        let held = self.all(
            "SELECT * FROM claims WHERE instance_uuid = ?1",
            [instance.to_string()],
            ClaimRow::read,
        )?;
        if held.is_empty() && extent == Extent::Run {
            self.forget_hint(instance)?;
            return Ok(Vec::new());
        }
        let event = if extent == Extent::Everything { "forced" } else { "released" };
        let freed = self.write(|tx, _| {
            step_revision(tx)?;
            let mut freed = Vec::new();
            for claim in self::held(tx, instance)? {
                if extent == Extent::Run && claim.hold == "instance" {
                    keep(tx, &claim)?;
                } else {
                    delete(tx, &claim, event, why, context)?;
                    freed.push(claim.device_id);
                }
            }
            if extent == Extent::Everything {
                tx.execute("DELETE FROM assignments WHERE instance_uuid = ?1", [instance.to_string()])?;
            }
            Ok(freed)
        })?;
        self.forget_hint(instance)?;
        self.bound_wal()?;
        Ok(freed)
    }

    /// The guest runs: its pending claims stand, and the devices of `in_guest` are allocated. Returns those that the
    /// instance holds but that are not in the guest yet.
    ///
    /// # Errors
    /// When the database cannot be written.
    pub fn confirm(
        &mut self,
        instance: InstanceId,
        in_guest: &[DeviceId],
        context: &Context,
    ) -> Result<Vec<DeviceId>, StoreError> {
        self.set_states(instance, context, |claim| {
            if in_guest.contains(&claim.device_id) { "allocated" } else { "claimed" }
        })?;
        let claims = self.all(
            "SELECT * FROM claims WHERE instance_uuid = ?1",
            [instance.to_string()],
            ClaimRow::read,
        )?;
        Ok(claims.iter().map(|c| c.device_id).filter(|id| !in_guest.contains(id)).collect())
    }

    /// The guest's process is gone, libvirt has not let go of its devices yet: nothing is in the guest any more.
    ///
    /// # Errors
    /// When the database cannot be written.
    pub fn out_of_guest(&mut self, instance: InstanceId, context: &Context) -> Result<(), StoreError> {
        self.set_states(instance, context, |_| "claimed")
    }

    fn set_states(
        &mut self,
        instance: InstanceId,
        context: &Context,
        state: impl Fn(&ClaimRow) -> &'static str,
    ) -> Result<(), StoreError> {
        self.write(|tx, _| {
            let changed: Vec<_> = held(tx, instance)?.into_iter().filter(|c| c.state != state(c) || c.pending).collect();
            if changed.is_empty() {
                return Ok(());
            }
            step_revision(tx)?;
            for claim in changed {
                tx.prepare_cached("UPDATE claims SET state = ?2, pending_since = NULL, revision = (SELECT max(revision) FROM compute_nodes) WHERE id = ?1")?
                    .execute(params![claim.id, state(&claim)])?;
                refresh(tx, claim.device_id)?;
                if claim.state != state(&claim) {
                    record(tx, context, &Event::about_claim(state(&claim), &claim))?;
                }
            }
            Ok(())
        })
    }

    /// Removes the instance's hint if the database knows nothing of it any more.
    fn forget_hint(&mut self, instance: InstanceId) -> Result<(), StoreError> {
        if !hints::may_know(&self.state_dir, hints::Known::Instance(instance)) {
            return Ok(());
        }
        self.write(|tx, state_dir| {
            let known: bool = tx.query_row(
                "SELECT EXISTS (SELECT 1 FROM claims WHERE instance_uuid = ?1) OR EXISTS (SELECT 1 FROM assignments WHERE instance_uuid = ?1)",
                [instance.to_string()],
                |row| row.get(0),
            )?;
            if !known {
                hints::remove(state_dir, hints::Known::Instance(instance))?;
            }
            Ok(())
        })
    }
}

/// Ends claims that no longer hold: of an earlier boot, unless held for the instance; and pending ones that nobody confirmed.
pub(crate) fn sweep(tx: &Transaction<'_>, context: &Context) -> Sql<()> {
    let void: Vec<ClaimRow> = tx
        .prepare_cached(
            "SELECT * FROM claims WHERE (boot_id <> ?1 AND hold = 'running')
             OR (pending_since IS NOT NULL AND (boot_id <> ?1 OR pending_since < ?2 - ?3))",
        )?
        .query_map(params![context.boot_id, context.uptime, PENDING_SECONDS], ClaimRow::read)?
        .collect::<Sql<_>>()?;
    if void.is_empty() {
        return Ok(());
    }
    step_revision(tx)?;
    for claim in void {
        let why = if claim.boot_id == context.boot_id { "never confirmed" } else { "of an earlier boot" };
        delete(tx, &claim, "voided", why, context)?;
    }
    Ok(())
}

/// What the instance holds, by device.
pub(crate) fn held(tx: &Transaction<'_>, instance: InstanceId) -> Sql<Vec<ClaimRow>> {
    tx.prepare_cached("SELECT * FROM claims WHERE instance_uuid = ?1 ORDER BY device_id")?
        .query_map([instance.to_string()], ClaimRow::read)?
        .collect()
}

pub(crate) fn delete(
    tx: &Transaction<'_>,
    claim: &ClaimRow,
    event: &'static str,
    why: &str,
    context: &Context,
) -> Sql<()> {
    tx.prepare_cached("DELETE FROM claims WHERE id = ?1")?.execute([claim.id])?;
    refresh(tx, claim.device_id)?;
    let left: i64 = tx
        .prepare_cached("SELECT count(*) FROM claims WHERE instance_uuid = ?1")?
        .query_row([claim.instance_uuid.to_string()], |r| r.get(0))?;
    if left == 0 {
        write_metadata(tx, claim.instance_uuid, None)?;
    }
    record(tx, context, &Event::about_claim(event, claim).with(why.to_owned()))
}

/// The claim outlives the run: it is a claim again.
fn keep(tx: &Transaction<'_>, claim: &ClaimRow) -> Sql<()> {
    tx.prepare_cached("UPDATE claims SET state = 'claimed', pending_since = NULL, revision = (SELECT max(revision) FROM compute_nodes) WHERE id = ?1")?
        .execute([claim.id])?;
    refresh(tx, claim.device_id)
}

/// Sets or ends the instance's `usb_devices` entry in `instance_system_metadata`.
pub(crate) fn write_metadata(tx: &Transaction<'_>, instance: InstanceId, value: Option<&str>) -> Sql<()> {
    let instance = instance.to_string();
    match value {
        Some(value) => tx
            .prepare_cached(&format!(
                "INSERT INTO instance_system_metadata (created_at, updated_at, instance_uuid, key, value) VALUES ({NOW}, {NOW}, ?1, 'usb_devices', ?2)
                 ON CONFLICT (instance_uuid, key) WHERE deleted = 0 DO UPDATE SET value = excluded.value, updated_at = excluded.updated_at"
            ))?
            .execute(params![instance, value])?,
        None => tx
            .prepare_cached(&format!(
                "UPDATE instance_system_metadata SET deleted = id, deleted_at = {NOW} WHERE instance_uuid = ?1 AND key = 'usb_devices' AND deleted = 0"
            ))?
            .execute([instance])?,
    };
    Ok(())
}

/// Whether a device is held by somebody else than `instance`.
pub(crate) fn holder(tx: &Transaction<'_>, device: DeviceId, instance: InstanceId) -> Sql<Option<ClaimRow>> {
    use rusqlite::OptionalExtension;
    tx.prepare_cached("SELECT * FROM claims WHERE device_id = ?1 AND instance_uuid <> ?2")?
        .query_row(params![sql_id(device), instance.to_string()], ClaimRow::read)
        .optional()
}
