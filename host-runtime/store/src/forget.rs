//! Rows of devices that are gone for good: removed when nothing of them is worth to be remembered,
//! or when an operator says so.
//!
//! A device that is forgotten and comes back is another one, with another id. No id is used again.

use std::collections::BTreeSet;

use rusqlite::{OptionalExtension as _, Transaction, params};
use serde_json::Value;
use virt_usb_model::DeviceId;

use crate::device::{Record, read_id, sql_id, step_revision};
use crate::error::Sql;
use crate::events::{Event, record};
use crate::open::TxError;
use crate::{Context, NOW, Store, StoreError};

/// Maximum number of rows of one kind and port that have different serials and were never held. A
/// device that shows another serial at each plug would otherwise fill the inventory.
const CROWD: u32 = 32;
/// The most rows that are removed under one lock.
const AT_ONCE: usize = 5_000;

/// How [`Store::forget`] ended.
#[derive(Debug, Clone, PartialEq)]
pub enum Forgotten {
    /// The device's row was removed; this is its last content.
    Done(Box<Record>),
    /// There is no such device.
    Unknown,
    /// The device is plugged in or held: nothing was changed.
    Here(Box<Record>),
    /// Something that is stored names it by its id, a flavor for instance: nothing was done.
    Named(Box<Record>, String),
}

impl Store {
    /// Forgets a device that is not plugged in, whatever was known of it.
    ///
    /// # Errors
    /// When the database cannot be written; then nothing was changed.
    pub fn forget(&mut self, device: DeviceId, context: &Context) -> Result<Forgotten, StoreError> {
        self.write(|tx, _| {
            let row = tx
                .query_row(
                    "SELECT * FROM usb_devices WHERE id = ?1",
                    [sql_id(device)],
                    Record::read,
                )
                .optional()?;
            let Some(row) = row.map(Box::new) else { return Ok::<_, TxError>(Forgotten::Unknown) };
            if row.deleted == 0 {
                return Ok(Forgotten::Here(row));
            }
            let naming = named(tx)?.into_iter().find(|(_, ids)| ids.contains(&device.get()));
            if let Some((what, _)) = naming {
                return Ok(Forgotten::Named(row, what));
            }
            remove(tx, device, "by an operator", context)?;
            step_revision(tx)?;
            Ok(Forgotten::Done(row))
        })
    }

    /// Forgets devices that were never held, have no setting of an operator, are not named by id,
    /// and have been unplugged for `days` days or are older than the newest [`CROWD`] of their kind
    /// and port. Days are counted as for [`Store::prune_events`]. Returns the number of forgotten
    /// devices.
    ///
    /// # Errors
    /// When the database cannot be written.
    pub fn forget_old(&mut self, days: u32, context: &Context) -> Result<usize, StoreError> {
        let age = format!("-{} days", days.max(1));
        let mut forgotten = 0;
        loop {
            let now = self.write(|tx, _| {
                let named: BTreeSet<u64> =
                    named(tx)?.into_iter().flat_map(|(_, ids)| ids).collect();
                let old = old(tx, &age)?;
                let old: Vec<DeviceId> =
                    old.into_iter().filter(|id| !named.contains(&id.get())).take(AT_ONCE).collect();
                for device in &old {
                    remove(tx, *device, "unplugged for a long time, and never held", context)?;
                }
                if !old.is_empty() {
                    step_revision(tx)?;
                }
                Ok::<_, TxError>(old.len())
            })?;
            forgotten += now;
            if now < AT_ONCE {
                return Ok(forgotten);
            }
        }
    }
}

fn old(tx: &Transaction<'_>, age: &str) -> Sql<Vec<DeviceId>> {
    let sql = format!(
        "SELECT id FROM (
             SELECT id, deleted_at, serial_kind,
                 row_number() OVER (PARTITION BY vendor_id, product_id, port_path, serial_kind \
                 ORDER BY id DESC) AS place
             FROM usb_devices WHERE deleted <> 0 AND NOT was_held AND disabled IS NULL AND \
             quarantined IS NULL
                 AND own_tags = '[]' AND serial_kind <> 'duplicate')
         WHERE (serial_kind = 'unique' AND place > {CROWD})
             OR deleted_at < strftime('%Y-%m-%dT%H:%M:%fZ', min({NOW}, coalesce(
                 (SELECT max(audit_time) FROM compute_nodes WHERE deleted = 0), {NOW})), ?1)
         ORDER BY id"
    );
    tx.prepare(&sql)?.query_map([age], |row| read_id(row, "id"))?.collect()
}

fn remove(tx: &Transaction<'_>, device: DeviceId, why: &str, context: &Context) -> Sql<()> {
    tx.prepare_cached("DELETE FROM device_labels WHERE device_id = ?1")?
        .execute([sql_id(device)])?;
    tx.prepare_cached("DELETE FROM usb_devices WHERE id = ?1")?.execute(params![sql_id(device)])?;
    record(tx, context, &Event::new("forgotten").about(device).with(why.to_owned()))
}

/// Stored objects that name devices by id: a description of each, with the ids.
fn named(tx: &Transaction<'_>) -> Sql<Vec<(String, BTreeSet<u64>)>> {
    let sql = "SELECT 'the flavor ' || name, document FROM flavors
        UNION ALL SELECT 'the grant ' || name, document FROM grants
        UNION ALL SELECT 'an assignment to instance ' || instance_uuid, request FROM assignments";
    let read = |row: &rusqlite::Row<'_>| {
        let (what, document): (String, String) = (row.get(0)?, row.get(1)?);
        let mut ids = BTreeSet::new();
        collect(&serde_json::from_str(&document).unwrap_or_default(), &mut ids);
        Ok((what, ids))
    };
    tx.prepare(sql)?.query_map([], read)?.collect()
}

fn collect(value: &Value, ids: &mut BTreeSet<u64>) {
    match value {
        Value::Object(object) => {
            ids.extend(object.get("id").and_then(Value::as_u64));
            object.values().for_each(|value| collect(value, ids));
        }
        Value::Array(list) => list.iter().for_each(|value| collect(value, ids)),
        _ => {}
    }
}
