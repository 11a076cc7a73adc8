//! Confirming claims and giving devices back. All of it may be done twice; none of it touches
//! another instance's claims.

use rusqlite::{Connection, OptionalExtension, Transaction, params};
use virt_usb_model::{DeviceId, InstanceId};

use crate::device::{ClaimRow, refresh, sql_id, step_revision};
use crate::error::Sql;
use crate::events::{Event, record};
use crate::hints::HintSubject;
use crate::open::Tx;
use crate::{Context, Store, StoreError, nova_metadata, quarantine};

/// Extent of a release.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Extent {
    /// Devices that are held while the guest runs. Devices that are held for the instance stay
    /// claimed, unless the claim was never confirmed.
    Run,
    /// Everything, the assignments too: an operator says so.
    Everything,
    /// Everything, with the owner: the instance is gone.
    Gone,
}

/// How it is known that a guest runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Witness {
    /// libvirt reports that the guest has just started: it has the devices of its restore or
    /// migration.
    Start,
    /// The guest was found running, and may have been running before a restore or a migration
    /// claimed devices in its name.
    Look,
}

impl Store {
    /// Gives back what the instance holds. Returns the devices that became free; done twice, the
    /// second finds nothing.
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
        let everything = extent != Extent::Run;
        // Most often there is nothing: that needs no lock.
        if !everything && held(&*self.conn()?, instance).map_err(|e| self.fault(&e))?.is_empty() {
            self.forget_hint(instance)?;
            return Ok(Vec::new());
        }
        let freed = self.write(|tx, _| {
            let (kept, ended): (Vec<_>, Vec<_>) = held(tx, instance)?
                .into_iter()
                .partition(|c| !everything && c.is_lasting() && !c.pending);
            if !ended.is_empty() {
                step_revision(tx)?;
            }
            for claim in &ended {
                delete(tx, claim, if everything { "forced" } else { "released" }, why, context)?;
            }
            if everything {
                tx.mark_lasting();
                let dropped = tx.execute(
                    "DELETE FROM assignments WHERE instance_uuid = ?1",
                    [instance.to_string()],
                )?;
                if dropped > 0 {
                    let event = Event::about_instance("unassigned", instance)
                        .with(format!("{dropped} request(s): {why}"));
                    record(tx, context, &event)?;
                }
            }
            if extent == Extent::Gone {
                tx.execute("DELETE FROM owners WHERE instance_uuid = ?1", [instance.to_string()])?;
            }
            set_presence(tx, &kept, context, |_| GuestPresence::Over)?;
            nova_metadata::refresh(tx, instance)?;
            Ok(ended.iter().map(|c| c.device_id).collect())
        })?;
        self.forget_hint(instance)?;
        Ok(freed)
    }

    /// Confirms the claims of a running guest: the devices of `in_guest` are allocated, except
    /// those that must be reattached after a restore or migration. Only the guest's own start
    /// confirms pending claims; a guest that was found running never requested them. Returns the
    /// devices that the instance holds but that are not in the guest yet.
    ///
    /// # Errors
    /// When the database cannot be written.
    pub fn confirm(
        &mut self,
        instance: InstanceId,
        in_guest: &[DeviceId],
        witness: Witness,
        context: &Context,
    ) -> Result<Vec<DeviceId>, StoreError> {
        self.write(|tx, _| {
            let mut claims = valid(tx, instance, context)?;
            claims.retain(|c| !c.pending || witness == Witness::Start);
            set_presence(tx, &claims, context, |claim| {
                if in_guest.contains(&claim.device_id) {
                    GuestPresence::Inside
                } else {
                    GuestPresence::Outside
                }
            })?;
            Ok(claims.iter().map(|c| c.device_id).filter(|id| !in_guest.contains(id)).collect())
        })
    }

    /// Gives one device back. A `revision` is that of the claim when it was looked at: one that has
    /// changed since is not ended. Says whether it was.
    ///
    /// # Errors
    /// When the database cannot be written.
    pub fn release_device(
        &mut self,
        instance: InstanceId,
        device: DeviceId,
        revision: Option<i64>,
        why: &str,
        context: &Context,
    ) -> Result<bool, StoreError> {
        let ended = self.write(|tx, _| {
            let meant = |c: &ClaimRow| {
                c.device_id == device && revision.is_none_or(|known| c.revision == known)
            };
            let Some(claim) = held(tx, instance)?.into_iter().find(meant) else { return Ok(false) };
            step_revision(tx)?;
            delete(tx, &claim, "released", why, context)?;
            nova_metadata::refresh(tx, instance)?;
            Ok(true)
        })?;
        self.forget_hint(instance)?;
        Ok(ended)
    }

    /// Ends claims of an earlier boot and unconfirmed pending claims.
    ///
    /// # Errors
    /// When the database cannot be written.
    pub fn sweep(&mut self, context: &Context) -> Result<(), StoreError> {
        self.write(|tx, _| Ok(sweep(tx, context)?))
    }

    /// Records that the guest's process has exited and has no devices any longer; libvirt has not
    /// released them yet.
    ///
    /// # Errors
    /// When the database cannot be written.
    pub fn out_of_guest(
        &mut self,
        instance: InstanceId,
        context: &Context,
    ) -> Result<(), StoreError> {
        self.write(|tx, _| {
            let firm: Vec<_> =
                valid(tx, instance, context)?.into_iter().filter(|c| !c.pending).collect();
            Ok(set_presence(tx, &firm, context, |_| GuestPresence::Over)?)
        })
    }

    /// Removes the hints of an instance for which the database no longer has a row. This is a
    /// separate write, because only committed changes are certain.
    pub(crate) fn forget_hint(&mut self, instance: InstanceId) -> Result<(), StoreError> {
        for (hint, table) in [
            (HintSubject::Instance(instance), "claims"),
            (HintSubject::Assigned(instance), "assignments"),
        ] {
            if !self.hints.may_know(hint) {
                continue;
            }
            self.write(|tx, hints| {
                let sql = format!("SELECT EXISTS (SELECT 1 FROM {table} WHERE instance_uuid = ?1)");
                let known: bool = tx.query_row(&sql, [instance.to_string()], |row| row.get(0))?;
                if !known {
                    hints.remove(hint)?;
                }
                Ok(())
            })?;
        }
        Ok(())
    }
}

/// The instance's claims without those that ended with an earlier boot.
fn valid(tx: &Transaction<'_>, instance: InstanceId, context: &Context) -> Sql<Vec<ClaimRow>> {
    let outlives = |c: &ClaimRow| c.is_lasting() && !c.pending;
    let mut claims = held(tx, instance)?;
    claims.retain(|c| c.boot_id == context.boot_id || outlives(c));
    Ok(claims)
}

/// Where a claim's device is, as libvirt shows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum GuestPresence {
    /// In the XML of a guest that is about to run.
    Coming {
        /// Whether the guest arrived with a saved state, for which QEMU releases the device.
        arriving: bool,
    },
    /// In the XML of the guest that runs.
    Inside,
    /// Not in the guest.
    Outside,
    /// Nowhere: the guest's process is gone.
    Over,
}

impl GuestPresence {
    /// State of the claim, whether the device must still be reattached, and whether it was seen in
    /// the guest.
    fn of(self, claim: &ClaimRow) -> (&'static str, bool, bool) {
        match self {
            Self::Inside if !claim.needs_reattach => ("allocated", false, true),
            Self::Inside => ("claimed", true, claim.seen_in_guest),
            Self::Coming { arriving } => ("claimed", claim.needs_reattach || arriving, false),
            Self::Outside => ("claimed", false, claim.seen_in_guest),
            Self::Over => ("claimed", false, false),
        }
    }
}

/// Makes the claims firm, of this boot, and of the state that follows from where their devices are.
pub(crate) fn set_presence(
    tx: &Tx<'_>,
    claims: &[ClaimRow],
    context: &Context,
    presence: impl Fn(&ClaimRow) -> GuestPresence,
) -> Sql<()> {
    let mut stepped = false;
    for claim in claims {
        let presence = presence(claim);
        let is_anew = matches!(presence, GuestPresence::Coming { .. } | GuestPresence::Over)
            || claim.boot_id != context.boot_id;
        let (state, needs_reattach, seen) = presence.of(claim);
        let same = claim.state == state
            && claim.needs_reattach == needs_reattach
            && claim.seen_in_guest == seen;
        let named = claim.pending || claim.incoming_since.is_some();
        if same && !named && claim.boot_id == context.boot_id {
            continue;
        }
        if !std::mem::replace(&mut stepped, true) {
            step_revision(tx)?;
        }
        tx.prepare_cached(
            "UPDATE claims SET state = ?2, pending_since = NULL, incoming_since = NULL, unsure = 0,
             generation = CASE WHEN ?6 THEN NULL WHEN ?2 = 'allocated' THEN coalesce(generation, \
             (SELECT generation FROM usb_devices WHERE id = claims.device_id))
                 ELSE generation END, boot_id = ?3, arrived = ?4, seen_in_guest = ?5, used = used \
                 OR ?2 = 'allocated', revision = (SELECT max(revision) FROM compute_nodes) WHERE \
                 id = ?1",
        )?
        .execute(params![
            claim.id,
            state,
            context.boot_id,
            needs_reattach,
            seen,
            is_anew
        ])?;
        if claim.pending && claim.is_lasting() {
            tx.mark_lasting();
        }
        if state == "allocated" && !claim.used {
            quarantine::note_use(tx, claim.device_id)?;
        }
        refresh(tx, claim.device_id)?;
        if claim.state != state {
            // The claim stays, its device is no longer in the guest.
            let event = if state == "claimed" { "detached" } else { state };
            record(tx, context, &Event::about_claim(event, claim))?;
        }
    }
    Ok(())
}

/// Fills `seen_in_guest` from the audit, for claims that were written before the column was there:
/// as migration 0008 does.
pub(crate) const SEEN_BY_THE_AUDIT: &str = "UPDATE claims SET seen_in_guest = 1 WHERE state = \
    'allocated' OR id IN (
    SELECT c.id FROM events e CROSS JOIN claims c ON c.device_id = e.device_id AND c.instance_uuid \
    = e.instance_uuid
    WHERE e.event = 'allocated' AND e.at >= c.created_at)";

/// Notes which devices were held where only the audit knows: as migration 0010 does.
pub(crate) const HELD_BY_THE_AUDIT: &str = "UPDATE usb_devices SET was_held = 1 WHERE \
    instance_uuid IS NOT NULL OR id IN (SELECT device_id FROM events WHERE instance_uuid IS NOT \
    NULL)";

/// Pending claims not made after uptime ?1 − ?2. Spelled so that the index finds them.
pub(crate) const UNCONFIRMED: &str =
    "SELECT * FROM claims WHERE pending_since IS NOT NULL AND pending_since < ?1 - ?2";

/// Ends invalid claims: those of an earlier boot, and pending ones that were not confirmed. A claim
/// held for the instance survives a boot, but its device is then in no guest.
pub(crate) fn sweep(tx: &Tx<'_>, context: &Context) -> Sql<()> {
    let unconfirmed = tx
        .prepare_cached(UNCONFIRMED)?
        .query_map(params![context.uptime, context.pending_grace], ClaimRow::read)?
        .collect::<Sql<Vec<_>>>()?;
    let mut doubtful = of_earlier_boots(tx, context)?;
    doubtful.extend(unconfirmed.into_iter().filter(|c| c.boot_id == context.boot_id));
    let (kept, void): (Vec<ClaimRow>, Vec<ClaimRow>) =
        doubtful.into_iter().partition(|c| c.is_lasting() && !c.pending);
    if !void.is_empty() {
        step_revision(tx)?;
    }
    for claim in void {
        let why =
            if claim.boot_id == context.boot_id { "never confirmed" } else { "of an earlier boot" };
        delete(tx, &claim, "voided", why, context)?;
        nova_metadata::refresh(tx, claim.instance_uuid)?;
    }
    set_presence(tx, &kept, context, |_| GuestPresence::Over)
}

/// Claims of other boots than this. Looked for once a boot, which the host's row remembers.
fn of_earlier_boots(tx: &Tx<'_>, context: &Context) -> Sql<Vec<ClaimRow>> {
    let boot_id = context.boot_id.as_str();
    let first = tx
        .prepare_cached(
            "UPDATE compute_nodes SET boot_id = ?1 WHERE deleted = 0 AND boot_id IS NOT ?1",
        )?
        .execute([boot_id])?;
    if first == 0 {
        return Ok(Vec::new());
    }
    quarantine::set_aside_after_restart(tx, context)?;
    // Those of another boot mean nothing, until a discovery sees the devices.
    tx.execute("UPDATE usb_devices SET generation = NULL WHERE generation IS NOT NULL", [])?;
    tx.prepare_cached("SELECT * FROM claims WHERE boot_id <> ?1")?
        .query_map([boot_id], ClaimRow::read)?
        .collect()
}

/// Claims of the instance, by device.
pub(crate) fn held(conn: &Connection, instance: InstanceId) -> Sql<Vec<ClaimRow>> {
    conn.prepare_cached("SELECT * FROM claims WHERE instance_uuid = ?1 ORDER BY device_id")?
        .query_map([instance.to_string()], ClaimRow::read)?
        .collect()
}

/// Ends one claim. The caller refreshes the instance's metadata after the last one.
pub(crate) fn delete(
    tx: &Tx<'_>,
    claim: &ClaimRow,
    event: &'static str,
    why: &str,
    context: &Context,
) -> Sql<()> {
    tx.prepare_cached("DELETE FROM claims WHERE id = ?1")?.execute([claim.id])?;
    if claim.is_lasting() && !claim.pending {
        tx.mark_lasting();
    }
    quarantine::after_use(tx, claim, context)?;
    refresh(tx, claim.device_id)?;
    record(tx, context, &Event::about_claim(event, claim).with(why.to_owned()))
}

/// The claim of an instance other than `instance` on the device.
pub(crate) fn holder(
    tx: &Transaction<'_>,
    device: DeviceId,
    instance: InstanceId,
) -> Sql<Option<ClaimRow>> {
    tx.prepare_cached("SELECT * FROM claims WHERE device_id = ?1 AND instance_uuid <> ?2")?
        .query_row(params![sql_id(device), instance.to_string()], ClaimRow::read)
        .optional()
}
