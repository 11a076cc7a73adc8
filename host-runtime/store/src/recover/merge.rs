//! Brings a restored backup up to date with the inventory that it replaces.

use std::collections::{BTreeMap, HashMap};

use rusqlite::types::Value;
use rusqlite::{Transaction, params};
use virt_usb_model::{DeviceId, UsbId};

use super::take_over::{copy, overwrite, raise, relabel, sql};
use crate::device::{ClaimRow, Record, refresh};
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

/// Brings a restored backup up to date: devices seen since keep their ids, the audit keeps its
/// events, and the holders of devices do not change. `all`: every claim of the present could be
/// read. `guests_known`: the guests that run are known.
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
        let since = &since;
        let ids = Devices::of_backup(tx, since)?.merge(&records)?;
        rule_ports(tx, since)?;
        sequences(tx, since)?;
        if all {
            tx.execute("DELETE FROM claims", [])?;
        } else if guests_known {
            tx.execute("DELETE FROM claims WHERE hold = 'running'", [])?;
        }
        let held = |claim: &ClaimRow| Some((claim.id, *ids.get(&sql(claim.device_id))?));
        let held: Vec<(i64, i64)> = claims.iter().filter_map(held).collect();
        move_claims(tx, since, &held)?;
        events(tx, since)?;
        let revision =
            since.table("compute_nodes").and_then(|table| table.numbers("revision").max());
        tx.execute(
            "UPDATE compute_nodes SET boot_id = NULL, revision = max(revision, ?1) + 1",
            [revision.unwrap_or_default()],
        )?;
        Ok(())
    })
}

/// The devices of the backup, to which those of the present are added.
struct Devices<'a> {
    tx: &'a Transaction<'a>,
    since: &'a Salvage,
    restored: Vec<Record>,
}

impl<'a> Devices<'a> {
    fn of_backup(tx: &'a Transaction<'a>, since: &'a Salvage) -> Sql<Self> {
        let mut query = tx.prepare("SELECT * FROM usb_devices ORDER BY id")?;
        let restored = query.query_map([], Record::read)?.collect::<Sql<_>>()?;
        Ok(Self { tx, since, restored })
    }

    /// Merges the devices of the present. Returns the id in the backup for each id of the present.
    fn merge(&self, present: &[Record]) -> Sql<BTreeMap<i64, i64>> {
        let mut alike: HashMap<(UsbId, Option<&str>), Vec<&Record>> = HashMap::new();
        for record in &self.restored {
            alike.entry((record.usb(), record.entry.serial.as_deref())).or_default().push(record);
        }
        let created: BTreeMap<i64, &Option<String>> =
            self.restored.iter().map(|record| (sql(record.entry.id), &record.created_at)).collect();
        let mut ids = BTreeMap::new();
        let mut seen_since = Table::default();
        let mut added = Vec::new();
        for record in present {
            let id = sql(record.entry.id);
            // An id is used once: this is the row of that device, even if it shows other
            // descriptors or is plugged in elsewhere now.
            if created.get(&id).is_some_and(|at| **at == record.created_at)
                && let Some((table, row)) = self.row_since(id)
            {
                overwrite(self.tx, "usb_devices", table, row, id)?;
                relabel(self.tx, record)?;
                ids.insert(id, id);
                continue;
            }
            let same = alike
                .get(&(record.usb(), record.entry.serial.as_deref()))
                .and_then(|alike| alike.iter().find(|r| r.key().is(&record.key())));
            if let Some(same) = same {
                ids.insert(id, sql(same.entry.id));
                set_aside_still(self.tx, same.entry.id, record)?;
            } else if !created.contains_key(&id)
                && let Some((table, row)) = self.row_since(id)
            {
                seen_since.columns.clone_from(&table.columns);
                seen_since.rows.push(row.clone());
                ids.insert(id, id);
                added.push(record);
            }
        }
        copy(self.tx, "usb_devices", &seen_since)?;
        for record in added {
            relabel(self.tx, record)?;
        }
        Ok(ids)
    }

    /// Row of a device in the inventory that the backup replaces.
    fn row_since(&self, id: i64) -> Option<(&'a Table, &'a Vec<Value>)> {
        let table = self.since.table("usb_devices")?;
        let at = table.column("id")?;
        let row = table.rows.iter().find(|row| row.get(at) == Some(&Value::Integer(id)))?;
        Some((table, row))
    }
}

/// Keeps the sockets that the ports of whitelist rules meant, and whether there were rules: they
/// belong to the configuration, which the backup does not restore.
fn rule_ports(tx: &Transaction<'_>, since: &Salvage) -> Sql<()> {
    if let Some(ports) = since.table("rule_ports").filter(|table| !table.rows.is_empty()) {
        tx.execute("DELETE FROM rule_ports", [])?;
        copy(tx, "rule_ports", ports)?;
    }
    Ok(())
}

/// Keeps every number from being used twice.
fn sequences(tx: &Transaction<'_>, since: &Salvage) -> Sql<()> {
    let Some(table) = since.table("sqlite_sequence") else { return Ok(()) };
    for row in &table.rows {
        if let [Value::Text(name), Value::Integer(seq)] = row.as_slice() {
            raise(tx, name, *seq)?;
        }
    }
    Ok(())
}

/// Copies the claims of the present. `held` has each claim with its device's id in the backup.
fn move_claims(tx: &Transaction<'_>, since: &Salvage, held: &[(i64, i64)]) -> Sql<()> {
    let Some(table) = since.table("claims") else { return Ok(()) };
    let (Some(id_at), Some(device_at)) = (table.column("id"), table.column("device_id")) else {
        return Ok(());
    };
    let mut moved = Table { columns: table.columns.clone(), ..Table::default() };
    for row in &table.rows {
        let is_row = |(claim, _): &&(i64, i64)| row.get(id_at) == Some(&Value::Integer(*claim));
        let Some((_, device)) = held.iter().find(is_row) else { continue };
        tx.execute("DELETE FROM claims WHERE device_id = ?1", [device])?;
        let mut row = row.clone();
        row[device_at] = Value::Integer(*device);
        // A new number, which no claim of the backup has.
        row[id_at] = Value::Null;
        moved.rows.push(row);
    }
    copy(tx, "claims", &moved).map(drop)
}

/// Copies the events that are newer than the backup's.
fn events(tx: &Transaction<'_>, since: &Salvage) -> Sql<()> {
    let Some(table) = since.table("events") else { return Ok(()) };
    let sql = "SELECT coalesce(max(id), 0) FROM events";
    let newest: i64 = tx.query_row(sql, [], |row| row.get(0))?;
    let at = table.column("id");
    let is_later = |row: &&Vec<Value>| match at.and_then(|at| row.get(at)) {
        Some(Value::Integer(id)) => *id > newest,
        _ => false,
    };
    let rows = table.rows.iter().filter(is_later).cloned().collect();
    copy(tx, "events", &Table { columns: table.columns.clone(), rows, torn: false }).map(drop)
}
