//! Devices that are set aside whatever the rules say: disabled by an operator, quarantined after a
//! use, flapping. And an operator's tags.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Display;
use std::time::{SystemTime, UNIX_EPOCH};

use rusqlite::{OptionalExtension, Transaction, params};
use virt_usb_model::flavor::MAX_TAGS;
use virt_usb_model::{Descriptors, DeviceId, Serial, UsbId};

use crate::device::{
    ClaimRow, Record, joined, parse_some, read_id, refresh, sql_id, step_revision,
};
use crate::error::Sql;
use crate::events::{Event, record};
use crate::flaps::{Flaps, Limits, Outcome};
use crate::open::{Tx, TxError};
use crate::reconcile::label;
use crate::{Context, NOW, Store, StoreError, grants};

/// A moment, seconds since 1970, as it is stored.
const MOMENT: &str = "strftime('%Y-%m-%dT%H:%M:%fZ', ?2, 'unixepoch')";

/// Result of a change by an operator.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Wished {
    /// The device was changed.
    Done(Box<Record>),
    /// The device already was in that state.
    Already(Box<Record>),
    /// There never was such a device.
    Unknown,
    /// The device would have more tags than [`MAX_TAGS`].
    TooManyTags,
}

impl Store {
    /// Takes a device out of what is offered, or (`None`) offers it again. Who holds it keeps it.
    ///
    /// # Errors
    /// When the database cannot be written; then nothing was changed.
    pub fn set_disabled(
        &mut self,
        device: DeviceId,
        why: Option<&str>,
        context: &Context,
    ) -> Result<Wished, StoreError> {
        self.wish(device, context, |tx, was| {
            if was.disabled.as_deref() == why {
                return Ok(None);
            }
            tx.execute(
                "UPDATE usb_devices SET disabled = ?2 WHERE id = ?1",
                params![sql_id(device), why],
            )?;
            let event = if why.is_some() { "disabled" } else { "enabled" };
            Ok(Some(Event::new(event).with(why.unwrap_or_default().to_owned())))
        })
    }

    /// Ends the quarantine of a device that an operator has inspected: it is available again in its
    /// current form.
    ///
    /// # Errors
    /// When the database cannot be written; then nothing was changed.
    pub fn clear_quarantine(
        &mut self,
        device: DeviceId,
        context: &Context,
    ) -> Result<Wished, StoreError> {
        self.wish(device, context, |tx, was| {
            if was.quarantined.is_none() && was.flapping_until.is_none() {
                return Ok(None);
            }
            let sql = "UPDATE usb_devices SET quarantined = NULL, used_as = NULL, flapping_until = \
                NULL, flaps = NULL WHERE id = ?1";
            tx.execute(sql, [sql_id(device)])?;
            let was = was.quarantined.clone().unwrap_or_else(|| "it flapped".into());
            Ok(Some(Event::new("cleared").with(was)))
        })
    }

    /// Gives the device tags beside those of the rules, or takes such away.
    ///
    /// # Errors
    /// When the database cannot be written; then nothing was changed.
    pub fn set_tags(
        &mut self,
        device: DeviceId,
        add: &[String],
        remove: &[String],
        context: &Context,
    ) -> Result<Wished, StoreError> {
        let mut too_many = false;
        let wished = self.wish(device, context, |tx, was| {
            let kept = was.own_tags.iter().filter(|tag| !remove.contains(tag));
            let tags: Vec<String> =
                kept.chain(add).cloned().collect::<BTreeSet<_>>().into_iter().collect();
            // Those that a store has already may go on, and become fewer.
            too_many = tags.len() > MAX_TAGS && tags.len() > was.own_tags.len();
            if was.own_tags == tags || too_many {
                return Ok(None);
            }
            let text = serde_json::to_string(&tags).unwrap_or_else(|_| "[]".into());
            tx.execute(
                "UPDATE usb_devices SET own_tags = ?2 WHERE id = ?1",
                params![sql_id(device), text],
            )?;
            let classes = std::iter::once(&was.entry.class).chain(&was.entry.interface_classes);
            label(tx, device, classes, &joined(&was.rule_tags, &tags))?;
            grants::apply(tx)?;
            Ok(Some(Event::new("tagged").with(tags.join(", "))))
        })?;
        Ok(if too_many { Wished::TooManyTags } else { wished })
    }

    /// Records that the guest is about to get the device. If the program ended now, it would
    /// otherwise be unknown whether the device was used.
    ///
    /// # Errors
    /// When the database cannot be written.
    pub fn mark_used(&mut self, claim: &ClaimRow) -> Result<(), StoreError> {
        if claim.used {
            return Ok(());
        }
        self.write(|tx, _| {
            tx.execute("UPDATE claims SET used = 1 WHERE id = ?1", [claim.id])?;
            Ok(note_use(tx, claim.device_id)?)
        })
    }

    /// Whether libvirt was lost before it answered that it had attached the claim's device.
    ///
    /// # Errors
    /// When the database cannot be written.
    pub fn mark_unsure(&mut self, claim: &ClaimRow, unsure: bool) -> Result<(), StoreError> {
        self.write(|tx, _| {
            tx.execute("UPDATE claims SET unsure = ?2 WHERE id = ?1", params![claim.id, unsure])?;
            Ok::<_, TxError>(())
        })
    }

    /// Records that the claim's device is no longer in the guest: the guest has the next generation
    /// of it that is attached.
    ///
    /// # Errors
    /// When the database cannot be written.
    pub fn forget_generation(&mut self, claim: &ClaimRow) -> Result<(), StoreError> {
        self.write(|tx, _| {
            tx.execute("UPDATE claims SET generation = NULL WHERE id = ?1", [claim.id])?;
            Ok::<_, TxError>(())
        })
    }

    fn wish(
        &mut self,
        device: DeviceId,
        context: &Context,
        act: impl FnOnce(&Transaction<'_>, &Record) -> Sql<Option<Event>>,
    ) -> Result<Wished, StoreError> {
        self.write(|tx, _| {
            let read = |tx: &Transaction<'_>| {
                tx.query_row(
                    "SELECT * FROM usb_devices WHERE id = ?1",
                    [sql_id(device)],
                    Record::read,
                )
                .optional()
            };
            let Some(was) = read(tx)? else { return Ok::<_, TxError>(Wished::Unknown) };
            let Some(event) = act(tx, &was)? else { return Ok(Wished::Already(Box::new(was))) };
            step_revision(tx)?;
            refresh(tx, device)?;
            record(tx, context, &event.about(device))?;
            Ok(read(tx)?.map_or(Wished::Unknown, |now| Wished::Done(Box::new(now))))
        })
    }
}

/// Records the use of a one-time-use device, which must survive a power cut.
pub(crate) fn note_use(tx: &Tx<'_>, device: DeviceId) -> Sql<()> {
    let sql = "SELECT one_time_use FROM usb_devices WHERE id = ?1";
    if tx.prepare_cached(sql)?.query_row([sql_id(device)], |row| row.get(0))? {
        tx.mark_lasting();
    }
    Ok(())
}

/// Sets a device of one use aside, now that the claim has ended with which it was in a guest.
pub(crate) fn after_use(tx: &Tx<'_>, claim: &ClaimRow, context: &Context) -> Sql<()> {
    if !claim.used {
        return Ok(());
    }
    let (once, now) = tx
        .prepare_cached("SELECT one_time_use, descriptors FROM usb_devices WHERE id = ?1")?
        .query_row([sql_id(claim.device_id)], |row| {
            Ok((
                row.get::<_, bool>("one_time_use")?,
                parse_some::<Descriptors>(row, "descriptors")?,
            ))
        })?;
    if !once {
        return Ok(());
    }
    let difference = claim.descriptors.as_ref().zip(now).and_then(|(was, is)| was.difference(&is));
    let used = format!("{} ({}) has used it", claim.domain, claim.instance_uuid);
    let why = match difference {
        None => used,
        Some(difference) => format!("{used}, AND IT HAS CHANGED: {difference}"),
    };
    quarantine(tx, claim.device_id, &why, claim.descriptors.as_ref(), context)
}

/// The longest reason, in bytes: the first of what was added stays.
const LONGEST: usize = 600;

/// A further reason behind those that are there.
fn both(before: &str, more: &str) -> String {
    match before.len() + more.len() {
        _ if before.contains(more) => before.to_owned(),
        0..=LONGEST => format!("{before}; {more}"),
        _ => before.to_owned(),
    }
}

fn quarantine(
    tx: &Tx<'_>,
    device: DeviceId,
    why: &str,
    used_as: Option<&Descriptors>,
    context: &Context,
) -> Sql<()> {
    let before: Option<String> = tx
        .prepare_cached("SELECT quarantined FROM usb_devices WHERE id = ?1")?
        .query_row([sql_id(device)], |row| row.get(0))?;
    tx.mark_lasting();
    // What was there first stays: a loose plug is not to cover an alarm.
    let why = &before.map_or_else(|| why.to_owned(), |before| both(&before, why));
    tx.prepare_cached(
        "UPDATE usb_devices SET quarantined = ?2, used_as = coalesce(?3, used_as) WHERE id = ?1",
    )?
    .execute(params![sql_id(device), why, used_as.map(ToString::to_string)])?;
    record(tx, context, &Event::new("quarantined").about(device).with(why.clone()))
}

/// Compares a device that sends other descriptors with those at the claim of its current or last
/// holder. A stick that returns as a keyboard is an attack until an operator decides otherwise.
pub(crate) fn altered(
    tx: &Transaction<'_>,
    known: &Record,
    now: &Descriptors,
    context: &Context,
) -> Sql<Option<String>> {
    let device = known.entry.id;
    let held: Option<(String, Option<Descriptors>)> = tx
        .prepare_cached("SELECT domain, descriptors FROM claims WHERE device_id = ?1")?
        .query_row([sql_id(device)], |row| {
            Ok((row.get("domain")?, parse_some(row, "descriptors")?))
        })
        .optional()?;
    let (whose, before) = match (held, &known.used_as) {
        (Some((domain, Some(at_claim))), _) => (format!("{domain} claimed it"), at_claim),
        (None, Some(used_as)) => ("its last use".to_owned(), used_as.clone()),
        _ => return Ok(None),
    };
    let Some(difference) = before.difference(now) else { return Ok(None) };
    let what = format!("it has changed since {whose}: {difference}");
    record(tx, context, &Event::new("altered").about(device).with(what.clone()))?;
    if let Some(why) = known.quarantined.as_ref().filter(|why| !why.contains(&difference)) {
        let sql = "UPDATE usb_devices SET quarantined = ?2 WHERE id = ?1";
        let why = both(why, &format!("IT HAS CHANGED: {difference}"));
        tx.execute(sql, params![sql_id(device), why])?;
    }
    Ok(Some(what))
}

/// Quarantines devices that cannot be identified after a restart of the host: they have neither a
/// serial nor a path, and ports begin with bus numbers, which are assigned at boot. Unplugged
/// devices count, because they may be back in another port. A device that is the only one of its
/// kind is not quarantined, unless it is held and was not seen before the restart.
pub(crate) fn set_aside_after_restart(tx: &Tx<'_>, context: &Context) -> Sql<()> {
    let mut doubtful: BTreeMap<UsbId, Vec<Record>> = BTreeMap::new();
    let all = tx
        .prepare(
            "SELECT * FROM usb_devices WHERE (vendor_id, product_id) IN
             (SELECT vendor_id, product_id FROM usb_devices WHERE path IS NULL) ORDER BY id",
        )?
        .query_map([], Record::read)?
        .collect::<Sql<Vec<_>>>()?;
    for record in all.into_iter().filter(|record| !record.key().serial_decides()) {
        doubtful.entry(record.usb()).or_default().push(record);
    }
    let mut stepped = false;
    for twins in doubtful.into_values() {
        let alone = twins.len() == 1;
        let ids: Vec<DeviceId> = twins.iter().map(|twin| twin.entry.id).collect();
        let unseen = |twin: &&Record| !twin.present && twin.entry.instance_uuid.is_some();
        for twin in
            twins.iter().filter(|twin| is_unplaced(twin)).filter(|twin| !alone || unseen(twin))
        {
            if !std::mem::replace(&mut stepped, true) {
                step_revision(tx)?;
            }
            set_aside(tx, twin.entry.id, &indistinct(&ids, &twin.entry.port_path), context)?;
        }
    }
    Ok(())
}

/// Quarantines, at the first discovery after a restart, a device that is known by its port alone
/// and one of its kind that was never seen: bus numbers may have changed, and each of them may be
/// the one that was known.
///
/// `known` are the rows before the discovery, `newcomers` those that it added without a serial.
pub(crate) fn set_aside_with_newcomers(
    tx: &Tx<'_>,
    known: &[Record],
    newcomers: &[(UsbId, DeviceId)],
    context: &Context,
) -> Sql<()> {
    let mut kinds: BTreeMap<UsbId, Vec<DeviceId>> = BTreeMap::new();
    for (usb, id) in newcomers {
        kinds.entry(*usb).or_default().push(*id);
    }
    for (usb, new) in kinds {
        let is_twin = |r: &&Record| r.usb() == usb && r.deleted == 0 && !r.key().serial_decides();
        let twins = known.iter().filter(|r| is_twin(r) && is_unplaced(r));
        let ids: Vec<DeviceId> = twins.map(|r| r.entry.id).chain(new.iter().copied()).collect();
        if ids.len() == new.len() {
            continue;
        }
        for id in &ids {
            let sql = "SELECT port_path FROM usb_devices WHERE id = ?1";
            let port: String = tx.query_row(sql, [sql_id(*id)], |row| row.get(0))?;
            set_aside(tx, *id, &indistinct(&ids, &port), context)?;
        }
    }
    Ok(())
}

/// Whether nothing but its port says where the device is, and it is not quarantined yet.
const fn is_unplaced(record: &Record) -> bool {
    record.entry.path.is_none() && record.quarantined.is_none()
}

/// Why a device in `port` is quarantined that may be any of `ids`.
fn indistinct(ids: &[DeviceId], port: impl Display) -> String {
    let names: Vec<String> = ids.iter().map(ToString::to_string).collect();
    format!(
        "the host was restarted, and no serial identifies {} {}: bus numbers are assigned at \
         boot, so another device of the same kind may be at port {port} now: check which one it is",
        if ids.len() == 1 { "device" } else { "devices" },
        names.join(", ")
    )
}

fn set_aside(tx: &Tx<'_>, device: DeviceId, why: &str, context: &Context) -> Sql<()> {
    quarantine(tx, device, why, None, context)?;
    refresh(tx, device)
}

/// Notes that a held device's serial, unique so far, has been seen on another device of the kind.
/// Says so in words.
pub(crate) fn serial_is_shared(
    tx: &Transaction<'_>,
    known: &Record,
    now: &Serial,
    context: &Context,
) -> Sql<Option<String>> {
    let Serial::Duplicate(serial) = now else { return Ok(None) };
    let held = known.entry.instance_uuid.is_some();
    if !held || !known.key().serial_decides() {
        return Ok(None);
    }
    let id = known.entry.id;
    tx.execute("UPDATE claims SET serial_shared = 1 WHERE device_id = ?1", [sql_id(id)])?;
    let what = format!(
        "another device of its kind has the same serial, {serial:?}: only its port identifies it \
            now"
    );
    record(tx, context, &Event::new("serial-shared").about(id).with(what.clone()))?;
    Ok(Some(what))
}

/// The device has come back once more.
pub(crate) fn returned(
    tx: &Tx<'_>,
    device: DeviceId,
    limits: &Limits,
    context: &Context,
) -> Sql<()> {
    let (until, text) = tx
        .prepare_cached(
            "SELECT CAST(strftime('%s', flapping_until) AS INTEGER), flaps FROM usb_devices WHERE \
                id = ?1",
        )?
        .query_row([sql_id(device)], |row| {
            Ok((row.get::<_, Option<u64>>(0)?, row.get::<_, Option<String>>(1)?))
        })?;
    // A value that does not parse was not written by virt-usb: the count begins again.
    let mut flaps: Flaps =
        text.and_then(|text| serde_json::from_str(&text).ok()).unwrap_or_default();
    let outcome = flaps.returned(now(), until, limits);
    tx.prepare_cached("UPDATE usb_devices SET flaps = ?2 WHERE id = ?1")?
        .execute(params![sql_id(device), serde_json::to_string(&flaps).ok()])?;
    let often = format!("it reconnected {} times within {} s", limits.limit, limits.window);
    match outcome {
        Outcome::Steady => Ok(()),
        Outcome::Until(moment) => {
            tx.prepare_cached(&format!(
                "UPDATE usb_devices SET flapping_until = {MOMENT} WHERE id = ?1"
            ))?
            .execute(params![sql_id(device), moment])?;
            if until.is_some() {
                return Ok(());
            }
            let pause = moment.saturating_sub(now());
            record(
                tx,
                context,
                &Event::new("flapping")
                    .about(device)
                    .with(format!("{often}: unavailable for {pause} s")),
            )
        }
        Outcome::Quarantine(times) => {
            tx.prepare_cached("UPDATE usb_devices SET flapping_until = NULL WHERE id = ?1")?
                .execute([sql_id(device)])?;
            quarantine(
                tx,
                device,
                &format!(
                    "{often}, as it did {times} times in a day: check its plug, cable and hub"
                ),
                None,
                context,
            )
        }
    }
}

/// Makes devices available again that have stayed connected long enough. A time further in the
/// future than any pause comes from a wrong clock.
pub(crate) fn settle(tx: &Transaction<'_>, context: &Context) -> Sql<Vec<DeviceId>> {
    let steady: Vec<DeviceId> = tx
        .prepare_cached(&format!(
            "SELECT id FROM usb_devices WHERE flapping_until <= {NOW} OR flapping_until > \
                strftime('%Y-%m-%dT%H:%M:%fZ', 'now', '+2 days')"
        ))?
        .query_map([], |row| read_id(row, "id"))?
        .collect::<Sql<_>>()?;
    if !steady.is_empty() {
        step_revision(tx)?;
    }
    for device in &steady {
        tx.prepare_cached("UPDATE usb_devices SET flapping_until = NULL WHERE id = ?1")?
            .execute([sql_id(*device)])?;
        refresh(tx, *device)?;
        record(
            tx,
            context,
            &Event::new("steady").about(*device).with(
                "it has stayed connected: it is available \
                again"
                    .into(),
            ),
        )?;
    }
    Ok(steady)
}

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}
