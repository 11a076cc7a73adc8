//! Bringing the rows in line with what is plugged in. What to do is planned elsewhere, purely; this
//! does it.

use std::collections::{BTreeMap, BTreeSet};

use rusqlite::{Transaction, params};
use serde::Serialize;
use virt_usb_model::{Aliases, Class, Device, DeviceId, DeviceKey, RuleVerdict};

use crate::device::{Record, joined, read_id, refresh, sql_id, step_revision};
use crate::error::Sql;
use crate::events::{Event, follow_clock, record};
use crate::flaps::Limits;
use crate::open::Tx;
use crate::{
    Context, NOW, Store, StoreError, grants, nova_metadata, origin, quarantine, release, renumber,
};

/// One step of a plan.
#[derive(Debug, Clone, PartialEq)]
pub enum Change {
    /// A device that was never seen.
    Add(Box<Device>, RuleVerdict),
    /// A device that is known is (still, or again) plugged in.
    See(DeviceId, Box<Device>, RuleVerdict),
    /// A device that was plugged in is gone.
    Gone(DeviceId),
}

/// Result of a step. Steps that changed nothing are not reported.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Done {
    /// Id of the device.
    pub id: DeviceId,
    /// `added`, `returned` (plugged in again, or under another number), `changed` or `removed`.
    pub what: &'static str,
    /// How the device has changed since it was claimed: its descriptors, or that its serial is no
    /// longer unique.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub altered: Option<String>,
}

/// The devices that are plugged in, and which kinds are one device by declaration.
pub struct SeenKeys<'a, T> {
    /// Identities of the devices.
    pub keys: T,
    /// The kinds that one device shows in turn.
    pub aliases: &'a Aliases,
}

impl<'a, T: Iterator<Item = &'a DeviceKey>> SeenKeys<'a, T> {
    /// The rows that [`Store::reconcile`] gives to its plan. Of devices that are gone only those
    /// are read that share a serial with one that is seen, that no serial identifies, or that may
    /// have shown another kind: a device that shows another serial each time leaves a row each
    /// time.
    fn rows(self, tx: &Transaction<'_>) -> Sql<Vec<Record>> {
        let (mut kinds, mut serials) = (BTreeSet::new(), BTreeSet::new());
        for key in self.keys {
            kinds.insert(key.usb.to_string());
            serials.extend(key.serial.text());
        }
        let joined: BTreeSet<String> = self.aliases.kinds().map(|usb| usb.to_string()).collect();
        let of_kinds = "FROM json_each({}) k CROSS JOIN usb_devices d
             ON d.vendor_id = substr(k.value, 1, 4) AND d.product_id = substr(k.value, 6, 4) AND \
             d.deleted <> 0";
        let sql = format!(
            "SELECT * FROM usb_devices WHERE id IN (
                 SELECT id FROM usb_devices INDEXED BY usb_devices_port WHERE deleted = 0
                 UNION SELECT d.id FROM json_each(?1) s CROSS JOIN usb_devices d ON d.serial = \
                 s.value AND d.deleted <> 0
                 UNION SELECT d.id {} AND d.serial_kind IN ('missing', 'duplicate')
                 UNION SELECT d.id {}) ORDER BY id",
            of_kinds.replace("{}", "?2"),
            of_kinds.replace("{}", "?3"),
        );
        let lists = params![json(&serials), json(&kinds), json(&joined)];
        tx.prepare_cached(&sql)?.query_map(lists, Record::read)?.collect()
    }
}

type KnownDevices<'a> = BTreeMap<DeviceId, &'a Record>;

impl Store {
    /// Plans and executes under one lock. `seen` are the devices that are plugged in, `limits` say
    /// when a device comes and goes too often. `plan` is given the rows of all devices that are
    /// plugged in or held, and of those gone that may be one of `seen`.
    ///
    /// # Errors
    /// When the database cannot be written; then nothing was changed.
    pub fn reconcile<'a>(
        &mut self,
        host: &str,
        limits: &Limits,
        seen: SeenKeys<'a, impl Iterator<Item = &'a DeviceKey>>,
        plan: impl FnOnce(&[Record]) -> Vec<Change>,
        context: &Context,
    ) -> Result<Vec<Done>, StoreError> {
        self.mend_hints()?;
        // Checkpoint before the write and not after it: the first writer after a checkpoint
        // restarts the log and syncs its header, and that must not be a hook. If the checkpoint is
        // not possible now, a later write does it.
        drop(self.checkpoint("PASSIVE"));
        let admitted = self.origin.map(|origin| (origin, self.refusal(origin)));
        self.write(|tx, _| {
            register_host(tx, host)?;
            if let Some((origin, refusal)) = admitted
                && !origin::mark(tx, origin)?
            {
                return Err(refusal.into());
            }
            let restarted = is_first_of_boot(tx, context)?;
            follow_clock(tx, context)?;
            release::sweep(tx, context)?;
            let steady = quarantine::settle(tx, context)?;
            let known = seen.rows(tx)?;
            let changes = plan(&known);
            let rows = &known;
            let known: KnownDevices<'_> = rows.iter().map(|r| (r.entry.id, r)).collect();
            let changes: Vec<Change> = changes.into_iter().filter(|c| is_news(&known, c)).collect();
            if !changes.is_empty() {
                step_revision(tx)?;
            }
            let mut done: Vec<Done> =
                steady.into_iter().map(|id| Done { id, what: "steady", altered: None }).collect();
            let mut newcomers = Vec::new();
            for change in changes {
                let unmarked = match &change {
                    Change::Add(device, _) if !device.key.serial_decides() => Some(device.key.usb),
                    _ => None,
                };
                let step = execute(tx, &known, change, limits, context)?;
                newcomers.extend(unmarked.map(|usb| (usb, step.id)));
                done.push(step);
            }
            if restarted {
                quarantine::set_aside_with_newcomers(tx, rows, &newcomers, context)?;
            }
            if !done.is_empty() {
                grants::apply(tx)?;
            }
            Ok(done)
        })
    }
}

fn register_host(tx: &Transaction<'_>, host: &str) -> Sql<()> {
    let node = renumber::node(tx)?;
    tx.execute(
        &format!(
            "INSERT INTO compute_nodes (created_at, updated_at, id, host, scanned_at) VALUES \
                ({NOW}, {NOW}, ?1, ?2, {NOW})
             ON CONFLICT (id) DO UPDATE SET host = excluded.host, scanned_at = {NOW}, updated_at = \
             iif(host = excluded.host, updated_at, {NOW})"
        ),
        params![node, host],
    )?;
    Ok(())
}

/// Whether no discovery has run since the host was restarted. Notes that one runs now.
fn is_first_of_boot(tx: &Transaction<'_>, context: &Context) -> Sql<bool> {
    let sql =
        "UPDATE compute_nodes SET scanned_boot = ?1 WHERE deleted = 0 AND scanned_boot IS NOT ?1";
    Ok(tx.execute(sql, [&context.boot_id])? > 0)
}

/// Whether the rows do not say so already.
fn is_news(known: &KnownDevices<'_>, change: &Change) -> bool {
    match change {
        Change::Add(..) => true,
        Change::See(id, device, verdict) => {
            known.get(id).is_none_or(|r| !r.present || !is_same(r, device, verdict))
        }
        Change::Gone(id) => known.get(id).is_some_and(|r| r.present),
    }
}

fn execute(
    tx: &Tx<'_>,
    known: &KnownDevices<'_>,
    change: Change,
    limits: &Limits,
    context: &Context,
) -> Sql<Done> {
    let mut altered = None;
    let (id, what, detail) = match change {
        Change::Add(device, verdict) => {
            (insert(tx, &device, &verdict)?, "added", device.key.to_string())
        }
        Change::See(id, device, verdict) => {
            let before = known.get(&id);
            let own_tags = before.map_or(&[][..], |r| &r.own_tags);
            update(tx, id, &device, &verdict, own_tags)?;
            if before.is_some_and(|r| r.generation.is_none()) {
                // Known for the first time: it is the stay that the guest has.
                let sql = "UPDATE claims SET generation = ?2 WHERE device_id = ?1 AND generation \
                    IS NULL AND state = 'allocated'";
                tx.prepare_cached(sql)?.execute(params![sql_id(id), device.generation])?;
            }
            if let (Some(before), Some(now)) = (before, &device.descriptors)
                && before.descriptors.as_ref() != Some(now)
            {
                altered = quarantine::altered(tx, before, now, context)?;
            }
            if let Some(before) = before {
                altered = quarantine::serial_is_shared(tx, before, &device.key.serial, context)?
                    .or(altered);
            }
            // Another number or generation: it was unplugged, or its controller was, between two
            // looks.
            let is_new =
                |r: &Record| r.generation.zip(device.generation).is_some_and(|(was, is)| was != is);
            let returned = before
                .is_some_and(|r| !r.present || r.entry.address != device.address || is_new(r));
            if returned {
                quarantine::returned(tx, id, limits, context)?;
            }
            let what = if returned { "returned" } else { "changed" };
            (id, what, format!("{} as {}", device.key, device.address))
        }
        Change::Gone(id) => {
            tx.execute("UPDATE usb_devices SET present = 0 WHERE id = ?1", [sql_id(id)])?;
            (id, "removed", "no longer plugged in".to_owned())
        }
    };
    refresh(tx, id)?;
    if let Some(instance) = known.get(&id).and_then(|r| r.entry.instance_uuid) {
        nova_metadata::refresh(tx, instance)?;
    }
    record(tx, context, &Event::new(what).about(id).with(detail))?;
    Ok(Done { id, what, altered })
}

fn insert(tx: &Transaction<'_>, device: &Device, verdict: &RuleVerdict) -> Sql<DeviceId> {
    let id = tx
        .prepare_cached(&format!(
            "INSERT INTO usb_devices (created_at, compute_node_id, address, status, port_path, \
                serial_kind, class) VALUES ({NOW}, ?1, ?2, 'available', ?3, 'missing', '00')
             RETURNING id"
        ))?
        .query_row(
            params![renumber::node(tx)?, device.address.to_string(), device.key.port.to_string()],
            |row| read_id(row, "id"),
        )?;
    update(tx, id, device, verdict, &[])?;
    Ok(id)
}

fn update(
    tx: &Transaction<'_>,
    id: DeviceId,
    d: &Device,
    verdict: &RuleVerdict,
    own_tags: &[String],
) -> Sql<()> {
    tx.prepare_cached(
        "UPDATE usb_devices SET address = ?2, product_id = ?3, vendor_id = ?4, bus_id = ?5, \
            device_id = ?6, port_id = ?7, port_path = ?8,
         serial = ?9, serial_kind = ?10, class = ?11, interface_classes = ?12, tags = ?13, \
         projects = ?14, speed = ?15, manufacturer = ?16,
         product_name = ?17, driver = ?18, host_use = ?19, withheld = ?20, one_time_use = ?21 OR \
         (one_time_use AND EXISTS (SELECT 1 FROM claims WHERE device_id = ?1)), descriptors = ?22, \
         path = ?23, generation = ?24, present = 1 WHERE id = ?1",
    )?
    .execute(params![
        sql_id(id),
        d.address.to_string(),
        d.key.usb.product.to_string(),
        d.key.usb.vendor.to_string(),
        d.address.bus(),
        d.address.device(),
        d.key.port.port_id(),
        d.key.port.to_string(),
        d.key.serial.text(),
        d.key.serial.kind(),
        d.class.to_string(),
        json(&d.interfaces),
        json(&verdict.tags),
        json(&verdict.projects),
        d.speed.map(virt_usb_model::Speed::name),
        d.manufacturer,
        d.product,
        d.driver,
        d.host_use,
        verdict.withheld.map(virt_usb_model::UnavailableReason::name),
        verdict.one_time_use,
        d.descriptors.as_ref().map(ToString::to_string),
        d.key.path.as_ref().map(ToString::to_string),
        d.generation,
    ])?;
    let tags = joined(&verdict.tags, own_tags);
    label(tx, id, std::iter::once(&d.class).chain(&d.interfaces), &tags)
}

/// Makes the device's labels these.
pub(crate) fn label<'a>(
    tx: &Transaction<'_>,
    id: DeviceId,
    classes: impl Iterator<Item = &'a Class>,
    tags: &[String],
) -> Sql<()> {
    tx.prepare_cached("DELETE FROM device_labels WHERE device_id = ?1")?.execute([sql_id(id)])?;
    let classes = classes.map(|c| ("class", c.to_string()));
    for (kind, value) in classes.chain(tags.iter().map(|t| ("tag", t.clone()))) {
        tx.prepare_cached(
            "INSERT OR IGNORE INTO device_labels (kind, value, device_id) VALUES (?1, ?2, ?3)",
        )?
        .execute(params![kind, value, sql_id(id)])?;
    }
    Ok(())
}

/// Whether the row says already what was seen.
fn is_same(r: &Record, d: &Device, verdict: &RuleVerdict) -> bool {
    let e = &r.entry;
    r.key() == d.key
        && e.address == d.address
        && e.class == d.class
        && e.interface_classes == d.interfaces
        && e.speed == d.speed
        && e.manufacturer == d.manufacturer
        && e.product_name == d.product
        && e.driver == d.driver
        && e.host_use == d.host_use
        && r.rule_tags == verdict.tags
        && (r.one_time_use == verdict.one_time_use || (r.one_time_use && e.instance_uuid.is_some()))
        && r.descriptors == d.descriptors
        && r.generation == d.generation
        && r.rule_projects == verdict.projects
        && r.rule_withheld == verdict.withheld
}

fn json(value: &impl Serialize) -> String {
    serde_json::to_string(value).unwrap_or_else(|_| "[]".into())
}
