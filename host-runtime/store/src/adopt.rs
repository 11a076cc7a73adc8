//! Taking over what a domain's own XML already holds: a hostdev that somebody wrote by hand, or one that a running guest
//! was found with when the daemon came back.

use rusqlite::{Transaction, params};
use virt_usb_model::{BusAddress, DeviceId, UsbId};

use crate::claim::{Asker, Judge, Verified};
use crate::device::{self, ClaimRow, Record, refresh, sql_id, step_revision};
use crate::error::Sql;
use crate::events::{Event, record};
use crate::hints::Known;
use crate::{Context, NOW, Store, StoreError, give_back, metadata};

/// A hostdev as the XML names its source.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Holding {
    /// From our alias.
    pub id: Option<DeviceId>,
    /// From vendor and product.
    pub usb: Option<UsbId>,
    /// From the source's address.
    pub address: Option<BusAddress>,
}

/// What became of one holding.
#[derive(Debug, Clone, PartialEq)]
pub enum Adoption {
    /// Now claimed for the instance.
    New(DeviceId),
    /// It was the instance's already.
    AlreadyYours(DeviceId),
    /// Another instance holds it.
    HeldBy(Box<Record>, Box<ClaimRow>),
    /// It is set aside, whatever the rules say: nobody starts with it.
    SetAside(Box<Record>),
    /// No device of the inventory, or it cannot be told which.
    Unknown,
}

/// How far the instance has come with what is adopted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// The guest is about to start.
    Starting,
    /// The guest runs with it.
    Running,
}

impl Store {
    /// Claims what the domain's own XML holds, one answer a holding. What another instance holds stays with it.
    /// Devices that the rules do not offer are adopted too: whoever wrote the XML may do that. What is set aside is adopted only from a guest
    /// that runs with it.
    ///
    /// # Errors
    /// When the database cannot be written; then nothing was adopted.
    pub fn adopt(
        &mut self,
        asker: &Asker,
        holdings: &[Holding],
        stage: Stage,
        judge: &mut dyn Judge,
        context: &Context,
    ) -> Result<Vec<Adoption>, StoreError> {
        self.write(|tx, hints| {
            give_back::sweep(tx, context)?;
            let mut adopted = Vec::new();
            for holding in holdings {
                let Some((device, address)) = find(tx, holding, asker, judge)? else {
                    adopted.push(Adoption::Unknown);
                    continue;
                };
                let id = device.entry.id;
                if let Some(claim) = give_back::holder(tx, id, asker.instance)? {
                    adopted.push(Adoption::HeldBy(Box::new(device), Box::new(claim)));
                    continue;
                }
                if stage == Stage::Starting && device.is_set_aside() && device.entry.instance_uuid.is_none() {
                    adopted.push(Adoption::SetAside(Box::new(device)));
                    continue;
                }
                hints.add(Known::Instance(asker.instance))?;
                device::set_address(tx, id, address)?;
                adopted.push(take(tx, asker, id, stage, context)?);
            }
            metadata::refresh(tx, asker.instance)?;
            Ok(adopted)
        })
    }
}

/// The device that a holding means, and where it really is; none if it cannot be told. Of several the one that is
/// the instance's already is meant.
fn find(
    tx: &Transaction<'_>,
    holding: &Holding,
    asker: &Asker,
    judge: &mut dyn Judge,
) -> Sql<Option<(Record, BusAddress)>> {
    // An alias that names no device of this inventory, or one of another kind, was given by another one: it counts as written by hand.
    let id = match holding.id {
        Some(id) if holding.address.is_some() && !is_kind(tx, id, holding.usb)? => None,
        id => id,
    };
    let mut statement = tx.prepare_cached(
        "SELECT * FROM usb_devices WHERE deleted = 0 AND present = 1 AND (?1 IS NULL OR id = ?1) AND (?2 IS NULL OR vendor_id = ?2)
         AND (?3 IS NULL OR product_id = ?3) ORDER BY id",
    )?;
    let found = statement.query_map(
        params![
            id.map(sql_id),
            holding.usb.map(|u| u.vendor.to_string()),
            holding.usb.map(|u| u.product.to_string()),
        ],
        Record::read,
    )?;
    let mut there = Vec::new();
    for device in found {
        let device = device?;
        // The stored address is a memory: ask the port, but only of those that it could be.
        let recorded = &device.entry;
        if recorded.path.is_none() && holding.address.is_some_and(|a| a.bus() != recorded.port_path.bus()) {
            continue;
        }
        if let Verified::Here(address) = judge.verify(&device)
            && holding.address.is_none_or(|a| a == address)
        {
            there.push((device, address));
        }
    }
    if there.len() > 1 {
        there.retain(|(d, _)| d.entry.instance_uuid == Some(asker.instance));
    }
    let only = there.pop();
    Ok(if there.is_empty() { only } else { None })
}

fn is_kind(tx: &Transaction<'_>, id: DeviceId, usb: Option<UsbId>) -> Sql<bool> {
    tx.prepare_cached(
        "SELECT EXISTS (SELECT 1 FROM usb_devices WHERE id = ?1 AND (?2 IS NULL OR vendor_id = ?2) AND (?3 IS NULL OR product_id = ?3))",
    )?
    .query_row(params![sql_id(id), usb.map(|u| u.vendor.to_string()), usb.map(|u| u.product.to_string())], |row| row.get(0))
}

fn take(tx: &Transaction<'_>, asker: &Asker, id: DeviceId, stage: Stage, context: &Context) -> Sql<Adoption> {
    let (state, place) = match stage {
        Stage::Running => ("allocated", give_back::Place::Inside),
        Stage::Starting => ("claimed", give_back::Place::Coming),
    };
    let known = give_back::held(tx, asker.instance)?.into_iter().find(|c| c.device_id == id);
    if let Some(claim) = known {
        give_back::set_places(tx, &[claim], context, |_| place)?;
        return Ok(Adoption::AlreadyYours(id));
    }
    step_revision(tx)?;
    tx.prepare_cached(&format!(
        "INSERT INTO claims (created_at, device_id, instance_uuid, domain, project_id, state, hold, boot_id, revision, descriptors, used)
         VALUES ({NOW}, ?1, ?2, ?3, ?4, ?5, 'running', ?6, (SELECT max(revision) FROM compute_nodes),
                 (SELECT descriptors FROM usb_devices WHERE id = ?1), ?5 = 'allocated')"
    ))?
    .execute(params![
        sql_id(id),
        asker.instance.to_string(),
        asker.domain,
        asker.project.as_ref().map(ToString::to_string),
        state,
        context.boot_id,
    ])?;
    refresh(tx, id)?;
    record(tx, context, &Event::of("adopted", asker).about(id).with("found in the domain's own XML".into()))?;
    Ok(Adoption::New(id))
}
