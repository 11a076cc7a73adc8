//! Brings a restored backup up to date with the inventory that it replaces.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use rusqlite::types::Value;
use rusqlite::{Transaction, params};
use virt_usb_model::{DeviceId, UsbId};

use super::take_over::{copy, overwrite, raise, relabel, sql};
use crate::device::{Record, refresh};
use crate::error::Sql;
use crate::salvage::{Salvage, Table};
use crate::{Store, StoreError};

/// Keeps devices set aside that were set aside since the backup: a backup of last week must not
/// make a device available that was quarantined yesterday.
fn set_aside_still(tx: &Transaction<'_>, id: DeviceId, present: &Record) -> Sql<()> {
    if !present.is_set_aside() {
        return Ok(());
    }
    tx.execute(
        "UPDATE usb_devices SET quarantined = coalesce(?2, quarantined), used_as = coalesce(?3, \
            used_as), disabled = coalesce(?4, disabled), flapping_until = coalesce(?5, \
            flapping_until) WHERE id = ?1",
        params![
            sql(id),
            present.quarantined,
            present.used_as.as_ref().map(ToString::to_string),
            present.disabled,
            present.flapping_until,
        ],
    )?;
    refresh(tx, id)
}

/// A backup goes on where the inventory was: devices that were seen since keep their ids, the audit
/// its events, and who holds a device now is not a matter of the past. `all`: every claim of the
/// present could be read.
pub(super) fn continue_with(
    new: &mut Store,
    present: &Store,
    all: bool,
    guests_known: bool,
) -> Result<(), StoreError> {
    let since = Salvage::read(&*present.conn()?);
    let records = present.all_devices()?;
    let claims = present.claims()?;
    new.write(|tx, _| {
        let restored: Vec<Record> =
            tx.prepare("SELECT * FROM usb_devices ORDER BY \
                id")?.query_map([], Record::read)?.collect::<Sql<_>>()?;
        let mut alike: HashMap<(UsbId, Option<&str>), Vec<&Record>> = HashMap::new();
        for record in &restored {
            alike.entry((record.usb(), record.entry.serial.as_deref())).or_default().push(record);
        }
        let taken: BTreeSet<i64> = restored.iter().map(|record| sql(record.entry.id)).collect();
        // From an id of the present to the backup's.
        let mut ids: BTreeMap<i64, i64> = BTreeMap::new();
        let mut seen_since = Table::default();
        let born: BTreeMap<i64, &Option<String>> =
            restored.iter().map(|record| (sql(record.entry.id), &record.created_at)).collect();
        let row_of = |id: i64| {
            let table = since.table("usb_devices")?;
            let at = table.column("id")?;
            let row = table.rows.iter().find(|row| row.get(at) == Some(&Value::Integer(id)))?;
            Some((table, row))
        };
        for record in &records {
            let id = sql(record.entry.id);
            // An id is given once: this is the row of that device, whatever it shows and wherever
            // it is by now.
            if born.get(&id).is_some_and(|at| **at == record.created_at)
                && let Some((table, row)) = row_of(id)
            {
                overwrite(tx, "usb_devices", table, row, id)?;
                relabel(tx, record)?;
                ids.insert(id, id);
                continue;
            }
            let same = alike
                .get(&(record.usb(), record.entry.serial.as_deref()))
                .and_then(|those| those.iter().find(|r| r.key().is(&record.key())));
            match same {
                Some(same) => {
                    ids.insert(id, sql(same.entry.id));
                    set_aside_still(tx, same.entry.id, record)?;
                }
                None if taken.contains(&id) => {}
                None => {
                    if let Some((table, row)) = row_of(id) {
                        seen_since.columns.clone_from(&table.columns);
                        seen_since.rows.push(row.clone());
                        ids.insert(id, id);
                    }
                }
            }
        }
        copy(tx, "usb_devices", &seen_since)?;
        // Which socket a rule's port meant, and that there were rules, is of the configuration and
        // not of the past.
        if let Some(ports) = since.table("rule_ports").filter(|table| !table.rows.is_empty()) {
            tx.execute("DELETE FROM rule_ports", [])?;
            copy(tx, "rule_ports", ports)?;
        }
        let is_new = |r: &&Record| {
            let id = sql(r.entry.id);
            !taken.contains(&id) && ids.contains_key(&id)
        };
        for record in records.iter().filter(is_new) {
            relabel(tx, record)?;
        }
        if let Some(table) = since.table("sqlite_sequence") {
            for row in &table.rows {
                if let [Value::Text(name), Value::Integer(seq)] = row.as_slice() {
                    raise(tx, name, *seq)?;
                }
            }
        }
        if all {
            tx.execute("DELETE FROM claims", [])?;
        } else if guests_known {
            tx.execute("DELETE FROM claims WHERE hold = 'running'", [])?;
        }
        let held: Vec<(i64, i64)> =
            claims.iter().filter_map(|c| Some((c.id, *ids.get(&sql(c.device_id))?))).collect();
        if let Some(table) = since.table("claims") {
            let (own, about) = (table.column("id"), table.column("device_id"));
            let mut moved = Table { columns: table.columns.clone(), ..Table::default() };
            for row in &table.rows {
                let id = own.and_then(|at| row.get(at));
                let device = held.iter().find(|(claim, _)| id == Some(&Value::Integer(*claim)));
                if let (Some((_, device)), Some(own), Some(about)) = (device, own, about) {
                    tx.execute("DELETE FROM claims WHERE device_id = ?1", [device])?;
                    let mut row = row.clone();
                    row[about] = Value::Integer(*device);
                    // A number of its own, which no claim of the backup has.
                    row[own] = Value::Null;
                    moved.rows.push(row);
                }
            }
            copy(tx, "claims", &moved)?;
        }
        if let Some(table) = since.table("events") {
            let newest: i64 = tx.query_row("SELECT coalesce(max(id), 0) FROM \
                events", [], |row| row.get(0))?;
            let at = table.column("id");
            let later = |row: &&Vec<Value>| {
                matches!(at.and_then(|at| row.get(at)), Some(Value::Integer(id)) if *id > newest)
            };
            let rows = table.rows.iter().filter(later).cloned().collect();
            copy(tx, "events", &Table { columns: table.columns.clone(), rows, torn: false })?;
        }
        let hosts = since.table("compute_nodes");
        let revision = hosts.and_then(|table| table.numbers("revision").max());
        tx.execute(
            "UPDATE compute_nodes SET boot_id = NULL, revision = max(revision, ?1) + 1",
            [revision.unwrap_or_default()],
        )?;
        Ok(())
    })
}
