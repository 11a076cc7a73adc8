//! Fills an empty inventory with the salvaged rows that make sense.

use std::collections::{BTreeMap, HashMap};

use rusqlite::types::Value;
use rusqlite::{Row, Transaction, params, params_from_iter};
use virt_usb_model::{DeviceId, DevicePath, InstanceId, PortPath, Serial, UsbId};

use super::{Built, Kept};
use crate::device::{ClaimRow, Record, parse};
use crate::error::{Sql, bad_row};
use crate::events::EventRow;
use crate::reconcile::label;
use crate::release::{HELD_BY_THE_AUDIT, SEEN_BY_THE_AUDIT};
use crate::renumber::{self, IDS};
use crate::salvage::{Salvage, Table};
use crate::{Assignment, Owner, Store, StoreError, StoredFlavor, StoredGrant, grants};

/// Number of device ids that are skipped if the assigned ids are not known, so that an id never
/// names another device.
const MARGIN: i64 = 1000;

/// The tables in an order in which no row comes before the one that it points to; those of a later
/// schema come last.
const ORDER: [&str; 9] = [
    "compute_nodes",
    "usb_devices",
    "flavors",
    "grants",
    "assignments",
    "owners",
    "rule_ports",
    "instance_system_metadata",
    "events",
];
/// Tables that are derived from others, or that the agent fills again.
const DERIVED: [&str; 3] = ["device_labels", "problems", "sqlite_sequence"];

/// Fills an empty inventory with what was salvaged and makes sense.
pub(super) fn take_over(
    new: &mut Store,
    salvage: Option<&Salvage>,
    ids: &[DeviceId],
) -> Result<Built, StoreError> {
    let nothing = Salvage::default();
    let (was_there, salvage) = (salvage.is_some(), salvage.unwrap_or(&nothing));
    new.write(|tx, _| {
        let mut built = Built::default();
        let mut names: Vec<&str> = ORDER.to_vec();
        let own = tables(tx)?;
        names.extend(
            own.iter().map(String::as_str).filter(|n| !ORDER.contains(n) && !DERIVED.contains(n)),
        );
        for name in names {
            if let Some(table) = salvage.table(name) {
                let mut kept = copy(tx, name, table)?;
                if name == "usb_devices" {
                    let doubles = drop_doubles(tx)?;
                    kept.rows -= doubles;
                    kept.refused += doubles;
                }
                built.kept.push(kept);
            }
            if name == "compute_nodes" {
                remember_node(tx, salvage, ids)?;
            }
        }
        if salvage.table("claims").is_some_and(|claims| claims.column("seen_in_guest").is_none()) {
            tx.execute(SEEN_BY_THE_AUDIT, [])?;
        }
        if salvage.table("usb_devices").is_some_and(|devices| devices.column("was_held").is_none())
        {
            tx.execute(HELD_BY_THE_AUDIT, [])?;
        }
        // The boot of the claims is checked again.
        tx.execute("UPDATE compute_nodes SET boot_id = NULL, revision = revision + 1", [])?;
        built.lost_devices = continue_ids(tx, salvage, was_there, ids)?;
        // What a device's row says follows from the grants that are left.
        grants::apply(tx)?;
        Ok(built)
    })
}

fn tables(tx: &Transaction<'_>) -> Sql<Vec<String>> {
    tx.prepare(
        "SELECT name FROM sqlite_schema WHERE type = 'table' AND name NOT LIKE 'sqlite_%' ORDER BY \
            rowid",
    )?
    .query_map([], |row| row.get(0))?
    .collect()
}

/// Copies the columns that both have; a row that is refused or that this program never writes is
/// left out.
pub(super) fn copy(tx: &Transaction<'_>, name: &str, table: &Table) -> Sql<Kept> {
    let known = columns(tx, name)?;
    let shared: Vec<usize> =
        (0..table.columns.len()).filter(|at| known.contains(&table.columns[*at])).collect();
    let mut kept = Kept { table: name.into(), rows: 0, refused: 0, torn: table.torn };
    if shared.is_empty() {
        return Ok(kept);
    }
    let list: Vec<&str> = shared.iter().map(|at| table.columns[*at].as_str()).collect();
    let marks = vec!["?"; list.len()].join(", ");
    let sql = format!("INSERT INTO {name} ({}) VALUES ({marks}) RETURNING *", list.join(", "));
    let id = table.column("id");
    // Hosts come first.
    let node = renumber::node(tx)?;
    for row in &table.rows {
        let values = shared.iter().filter_map(|at| row.get(*at));
        // A number that is no id of ours would be the last that there can be.
        let id = id.and_then(|at| row.get(at));
        let sane = !matches!(id, Some(Value::Integer(id)) if !(1..1 << 53).contains(id));
        tx.execute_batch("SAVEPOINT one")?;
        let taken = sane
            && tx
                .prepare_cached(&sql)?
                .query_row(params_from_iter(values), |row| makes_sense(name, node, row))
                .is_ok();
        tx.execute_batch(if taken { "RELEASE one" } else { "ROLLBACK TO one; RELEASE one" })?;
        if taken {
            kept.rows += 1;
        } else {
            kept.refused += 1;
        }
    }
    Ok(kept)
}

/// Makes the row of this id what another file says, in the columns that both have.
pub(super) fn overwrite(
    tx: &Transaction<'_>,
    name: &str,
    table: &Table,
    row: &[Value],
    id: i64,
) -> Sql<()> {
    let known = columns(tx, name)?;
    let shared = || (0..table.columns.len()).filter(|at| known.contains(&table.columns[*at]));
    let list: Vec<String> = shared().map(|at| format!("{} = ?", table.columns[at])).collect();
    let sql = format!("UPDATE {name} SET {} WHERE id = {id}", list.join(", "));
    tx.prepare_cached(&sql)?
        .execute(params_from_iter(shared().filter_map(|at| row.get(at))))
        .map(drop)
}

fn columns(tx: &Transaction<'_>, name: &str) -> Sql<Vec<String>> {
    let statement = tx.prepare(&format!("SELECT * FROM {name}"))?;
    Ok(statement.column_names().map(ToOwned::to_owned).collect())
}

/// Whether this program may have written the row.
fn makes_sense(name: &str, node: i64, row: &Row<'_>) -> Sql<()> {
    let refuse = |column, what: &str| Err(bad_row(row, column, what));
    match name {
        "compute_nodes" => {
            let (id, revision): (i64, i64) = (row.get("id")?, row.get("revision")?);
            let host: String = row.get("host")?;
            if !(1..=(1 << 53) / IDS).contains(&id)
                || !(0..1 << 53).contains(&revision)
                || host.is_empty()
            {
                return refuse("id", "is not this host");
            }
        }
        "usb_devices" => {
            let record = Record::read(row)?;
            let entry = &record.entry;
            let id = i64::try_from(entry.id.get()).unwrap_or(i64::MAX);
            // Said twice in a row: what contradicts itself is damaged.
            let twice = row.get::<_, Option<u8>>("bus_id")? == Some(entry.address.bus())
                && row.get::<_, Option<u8>>("device_id")? == Some(entry.address.device())
                && row.get::<_, Option<u8>>("port_id")? == Some(entry.port_path.port_id())
                && entry.port_path.bus() == entry.address.bus()
                && (record.deleted == 0 || record.deleted == entry.id.get())
                && Serial::KINDS.contains(&entry.serial_kind.as_str())
                && entry
                    .path
                    .as_ref()
                    .is_none_or(|path| path.ports().len() == entry.port_path.ports().len())
                && (entry.serial_kind == "missing") == entry.serial.is_none();
            if !twice || !is_own(node, id) {
                return refuse("id", "contradicts itself");
            }
        }
        "claims" => {
            let claim = ClaimRow::read(row)?;
            let known = ["claimed", "allocated"].contains(&claim.state.as_str())
                && ["running", "instance"].contains(&claim.hold.as_str())
                && claim.boot_id.len() <= 36;
            if !known {
                return refuse("state", "is none");
            }
        }
        "assignments" => drop(Assignment::read(row)?),
        "owners" => drop(Owner::read(row)?),
        "rule_ports" => {
            drop(parse::<PortPath>(row, "port")?);
            drop(parse::<DevicePath>(row, "path")?);
        }
        "flavors" => drop(StoredFlavor::read(row)?),
        "grants" => drop(StoredGrant::read(row)?),
        "events" => drop(EventRow::read(row)?),
        "instance_system_metadata" => drop(parse::<InstanceId>(row, "instance_uuid")?),
        _ => {}
    }
    Ok(())
}

/// Where nothing tells the host's number but the ids of its devices, most of them do.
fn remember_node(tx: &Transaction<'_>, salvage: &Salvage, guests: &[DeviceId]) -> Sql<()> {
    let mut votes: BTreeMap<i64, usize> = BTreeMap::new();
    let devices = salvage.table("usb_devices").into_iter().flat_map(|table| table.numbers("id"));
    for id in devices.chain(guests.iter().map(|id| sql(*id))) {
        *votes.entry((id - 1).div_euclid(IDS) + 1).or_default() += 1;
    }
    if let Some((node, _)) =
        votes.into_iter().max_by_key(|(_, votes)| *votes).filter(|(node, _)| *node > 1)
    {
        // The next scan says what it is called.
        let sql = "INSERT INTO compute_nodes (id, host) SELECT ?1, '-' WHERE NOT EXISTS (SELECT 1 \
            FROM compute_nodes)";
        tx.execute(sql, [node])?;
    }
    Ok(())
}

/// Whether a device's id can be one of the host of that number.
fn is_own(node: i64, id: i64) -> bool {
    (1..=IDS).contains(&(id - (node - 1) * IDS))
}

/// Removes devices with two ids: at least one of them belonged to another device, and it is unknown
/// which. Returns the number of removed devices.
fn drop_doubles(tx: &Transaction<'_>) -> Sql<usize> {
    let all: Vec<Record> = tx
        .prepare("SELECT * FROM usb_devices")?
        .query_map([], Record::read)?
        .collect::<Sql<_>>()?;
    let mut alike: HashMap<(UsbId, Option<&str>), Vec<&Record>> = HashMap::new();
    for record in &all {
        alike.entry((record.usb(), record.entry.serial.as_deref())).or_default().push(record);
    }
    let mut dropped = 0;
    for record in &all {
        let others = &alike[&(record.usb(), record.entry.serial.as_deref())];
        // One that was gone is no double of one that is alive: it goes, and the other stays.
        let rivals = |other: &&&Record| other.deleted == 0 || record.deleted != 0;
        let doubled = others
            .iter()
            .filter(rivals)
            .any(|other| other.entry.id != record.entry.id && other.key().is(&record.key()));
        if doubled {
            dropped +=
                tx.execute("DELETE FROM usb_devices WHERE id = ?1", [sql(record.entry.id)])?;
            continue;
        }
        relabel(tx, record)?;
    }
    Ok(dropped)
}

pub(super) fn relabel(tx: &Transaction<'_>, record: &Record) -> Sql<()> {
    let classes = std::iter::once(&record.entry.class).chain(&record.entry.interface_classes);
    label(tx, record.entry.id, classes, &record.entry.tags)
}

pub(super) fn sql(id: DeviceId) -> i64 {
    i64::try_from(id.get()).unwrap_or(i64::MAX)
}

/// New devices and rows get ids above all that were ever seen. Returns how many devices had an id
/// and are lost.
fn continue_ids(
    tx: &Transaction<'_>,
    salvage: &Salvage,
    was_there: bool,
    guests: &[DeviceId],
) -> Sql<u64> {
    let mut last: BTreeMap<String, i64> = BTreeMap::new();
    let node = renumber::node(tx)?;
    if let Some(table) = salvage.table("sqlite_sequence")
        && let (Some(name), Some(seq)) = (table.column("name"), table.column("seq"))
    {
        for row in &table.rows {
            if let (Some(Value::Text(name)), Some(Value::Integer(seq))) =
                (row.get(name), row.get(seq))
                && (1..1 << 53).contains(seq)
            {
                last.insert(name.clone(), *seq);
            }
        }
    }
    let devices = "usb_devices";
    let given = last.get(devices).copied().filter(|id| is_own(node, *id));
    let named = |table: &str, column: &str| -> Vec<i64> {
        salvage.table(table).map(|table| table.numbers(column).collect()).unwrap_or_default()
    };
    let mut seen = named(devices, "id");
    for table in ["events", "device_labels", "claims"] {
        seen.extend(named(table, "device_id"));
    }
    seen.extend(guests.iter().map(|id| sql(*id)));
    let asked = |request: &virt_usb_model::DeviceRequest| request.selector.id.map(sql);
    let flavors: Vec<StoredFlavor> = tx
        .prepare("SELECT * FROM flavors")?
        .query_map([], StoredFlavor::read)?
        .collect::<Sql<_>>()?;
    seen.extend(flavors.iter().flat_map(|f| &f.flavor.usb_devices).filter_map(asked));
    let grants: Vec<StoredGrant> = tx
        .prepare("SELECT * FROM grants")?
        .query_map([], StoredGrant::read)?
        .collect::<Sql<_>>()?;
    seen.extend(grants.iter().flat_map(|g| &g.grant.usb_devices).filter_map(|s| s.id).map(sql));
    let assigned: Vec<Assignment> = tx
        .prepare("SELECT * FROM assignments")?
        .query_map([], Assignment::read)?
        .collect::<Sql<_>>()?;
    seen.extend(assigned.iter().map(|a| &a.request).filter_map(asked));
    let highest = seen.into_iter().filter(|id| is_own(node, *id)).max().unwrap_or((node - 1) * IDS);
    let top = match given {
        Some(given) => given.max(highest),
        None if !was_there && guests.is_empty() => highest,
        None => (highest / MARGIN + 1) * MARGIN,
    };
    last.insert(devices.into(), top);
    for (name, seq) in &last {
        raise(tx, name, *seq)?;
    }
    // Those that were forgotten are not missed.
    let kept: i64 = tx.query_row(
        "SELECT (SELECT count(*) FROM usb_devices) + (SELECT count(*) FROM events WHERE event = \
            'forgotten')",
        [],
        |row| row.get(0),
    )?;
    Ok(given.map_or(0, |given| u64::try_from(given - (node - 1) * IDS - kept).unwrap_or(0)))
}

/// No row of the table gets an id up to `seq`.
pub(super) fn raise(tx: &Transaction<'_>, table: &str, seq: i64) -> Sql<()> {
    let known = tx.execute(
        "UPDATE sqlite_sequence SET seq = max(seq, ?2) WHERE name = ?1",
        params![table, seq],
    )?;
    if known == 0 && tables(tx)?.iter().any(|name| name == table) {
        tx.execute("INSERT INTO sqlite_sequence (name, seq) VALUES (?1, ?2)", params![table, seq])?;
    }
    Ok(())
}
