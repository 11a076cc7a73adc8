//! A host's number in a fleet, and with it the ids of its devices: `(number − 1) × 1 000 000 + n`.

use rusqlite::{OptionalExtension as _, Transaction, params};
use serde::Serialize;
use virt_usb_model::{DeviceId, Selector};

use crate::assignments::Assignment;
use crate::device::step_revision;
use crate::error::Sql;
use crate::events::{Event, record};
use crate::{ClaimRow, Context, LONE_NODE, NOW, Store, StoreError, StoredFlavor, StoredGrant};

/// Number of device ids of a host: those of host N follow `(N − 1) × IDS_A_HOST`.
pub const IDS_A_HOST: u64 = 1_000_000;
pub(crate) const IDS: i64 = IDS_A_HOST.cast_signed();

/// Result of the assignment of a host number.
#[derive(Debug, Clone, PartialEq)]
pub enum Numbered {
    /// The host already had that number.
    Already,
    /// Some devices are held, by these claims: nothing was changed.
    Held(Vec<ClaimRow>),
    /// The host's devices have new ids.
    Renumbered(Renumbered),
}

/// The renumbering of the device ids.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Renumbered {
    /// The number before.
    pub was: u64,
    /// How many devices, those that were ever seen.
    pub devices: usize,
    /// To each id this was added.
    pub added: i64,
    /// Stored flavors that name a device by its old id and must be changed by hand.
    pub flavors: Vec<String>,
    /// Grants that do the same.
    pub grants: Vec<String>,
    /// How many assignments named one, and name the new id now.
    pub assignments: usize,
}

/// The host's number; 1 as long as it is in no fleet.
pub(crate) fn node(tx: &rusqlite::Connection) -> Sql<i64> {
    let known = tx
        .prepare_cached("SELECT id FROM compute_nodes WHERE deleted = 0 ORDER BY id LIMIT 1")?
        .query_row([], |row| row.get(0))
        .optional()?;
    Ok(known.unwrap_or_else(|| i64::try_from(LONE_NODE).unwrap_or(1)))
}

impl Store {
    /// The host's number; 1 as long as it is in no fleet.
    ///
    /// # Errors
    /// When the database cannot be read.
    pub fn node(&self) -> Result<u64, StoreError> {
        let node = node(&*self.conn()?).map_err(|e| self.fault(&e))?;
        Ok(u64::try_from(node).unwrap_or(LONE_NODE))
    }

    /// Gives the host that number, and its devices the ids that come with it; not while any is
    /// held.
    ///
    /// # Errors
    /// When the database cannot be written.
    pub fn renumber(
        &mut self,
        host: &str,
        number: u64,
        context: &Context,
    ) -> Result<Numbered, StoreError> {
        let wanted = i64::try_from(number).unwrap_or(i64::MAX / IDS);
        self.write(|tx, _| {
            let was = node(tx)?;
            if was == wanted {
                return Ok(Numbered::Already);
            }
            let held = tx
                .prepare("SELECT * FROM claims ORDER BY device_id")?
                .query_map([], ClaimRow::read)?
                .collect::<Sql<Vec<_>>>()?;
            if !held.is_empty() {
                return Ok(Numbered::Held(held));
            }
            let added = (wanted - was) * IDS;
            // Labels point to devices: both change.
            tx.pragma_update(None, "defer_foreign_keys", true)?;
            let (flavors, grants) = (flavors(tx)?, grants(tx)?);
            let assignments = assignments(tx, added)?;
            let devices = tx.execute(
                "UPDATE usb_devices SET id = id + ?1, compute_node_id = ?2, deleted = iif(deleted \
                    = 0, 0, id + ?1)",
                params![added, wanted],
            )?;
            tx.execute("UPDATE device_labels SET device_id = device_id + ?1", [added])?;
            tx.execute(
                &format!(
                    "INSERT INTO compute_nodes (created_at, updated_at, id, host) VALUES ({NOW}, \
                        {NOW}, ?1, ?2) ON CONFLICT (id) DO NOTHING"
                ),
                params![was, host],
            )?;
            tx.execute(
                &format!("UPDATE compute_nodes SET id = ?2, updated_at = {NOW} WHERE id = ?1"),
                params![was, wanted],
            )?;
            continue_ids(tx, wanted, added)?;
            crate::grants::apply(tx)?;
            step_revision(tx)?;
            let detail =
                format!("number {was} became {wanted}: {added} was added to each device id");
            record(tx, context, &Event::new("renumbered").with(detail))?;
            let was = u64::try_from(was).unwrap_or(LONE_NODE);
            Ok(Numbered::Renumbered(Renumbered {
                was,
                devices,
                added,
                flavors,
                grants,
                assignments,
            }))
        })
    }

    /// Makes the inventory's revision at least this: what others have seen of it never falls.
    ///
    /// # Errors
    /// When the database cannot be written.
    pub fn raise_revision(&mut self, least: u64) -> Result<(), StoreError> {
        let least = i64::try_from(least).unwrap_or(i64::MAX);
        self.write(|tx, _| {
            tx.execute(
                "UPDATE compute_nodes SET revision = max(revision, ?1) WHERE deleted = 0",
                [least],
            )?;
            Ok(())
        })
    }
}

/// The next device gets an id of that number, above all that were given.
fn continue_ids(tx: &Transaction<'_>, number: i64, added: i64) -> Sql<()> {
    if tx
        .execute("UPDATE sqlite_sequence SET seq = seq + ?1 WHERE name = 'usb_devices'", [added])?
        == 0
    {
        let none = (number - 1) * IDS;
        tx.execute("INSERT INTO sqlite_sequence (name, seq) VALUES ('usb_devices', ?1)", [none])?;
    }
    Ok(())
}

/// Flavors that name a device of this host by its id.
fn flavors(tx: &Transaction<'_>) -> Sql<Vec<String>> {
    let all = tx
        .prepare("SELECT * FROM flavors ORDER BY name")?
        .query_map([], StoredFlavor::read)?
        .collect::<Sql<Vec<_>>>()?;
    let named =
        all.iter().map(|f| (&f.name, f.flavor.usb_devices.iter().map(|request| &request.selector)));
    naming(tx, named)
}

fn grants(tx: &Transaction<'_>) -> Sql<Vec<String>> {
    let all = tx
        .prepare("SELECT * FROM grants ORDER BY name")?
        .query_map([], StoredGrant::read)?
        .collect::<Sql<Vec<_>>>()?;
    naming(tx, all.iter().map(|g| (&g.name, g.grant.usb_devices.iter())))
}

fn naming<'a, S: Iterator<Item = &'a Selector>>(
    tx: &Transaction<'_>,
    named: impl Iterator<Item = (&'a String, S)>,
) -> Sql<Vec<String>> {
    let mut found = Vec::new();
    for (name, selectors) in named {
        for id in selectors.filter_map(|selector| selector.id) {
            if is_here(tx, id)? && found.last() != Some(name) {
                found.push(name.clone());
            }
        }
    }
    Ok(found)
}

fn is_here(tx: &Transaction<'_>, id: DeviceId) -> Sql<bool> {
    tx.prepare_cached("SELECT 1 FROM usb_devices WHERE id = ?1")?
        .exists([crate::device::sql_id(id)])
}

fn assignments(tx: &Transaction<'_>, added: i64) -> Sql<usize> {
    let all = tx
        .prepare("SELECT * FROM assignments")?
        .query_map([], Assignment::read)?
        .collect::<Sql<Vec<_>>>()?;
    let mut changed = 0;
    for assignment in all {
        let mut request = assignment.request;
        let Some(id) = request.selector.id else { continue };
        if !is_here(tx, id)? {
            continue;
        }
        request.selector.id = id.get().checked_add_signed(added).and_then(DeviceId::new);
        changed += tx.execute(
            "UPDATE assignments SET request = ?2 WHERE id = ?1",
            params![assignment.id, request.to_string()],
        )?;
    }
    Ok(changed)
}
