//! Assignments: this instance is to have these devices, whenever it runs.

use std::cmp::Reverse;

use rusqlite::{OptionalExtension as _, Row, Transaction, params};
use serde::Serialize;
use virt_usb_model::flavor::MAX_DEVICES;
use virt_usb_model::{DeviceId, DeviceRequest, Flavor, InstanceId, matching};

use crate::claim::{self, ClaimMode, ClaimRequest, ClaimVerifier, Claimant, Claimed, Shortage};
use crate::device::{ClaimRow, step_revision};
use crate::error::{Sql, bad_row};
use crate::events::{Event, record};
use crate::hints::{HintSubject, Hints};
use crate::open::{Tx, TxError};
use crate::{Context, NOW, Store, StoreError, places, release};

/// Origin of an assignment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Source {
    /// The flavor, because the configuration says `hold = "instance"`.
    Flavor,
    /// An attach through API or command line.
    Operator,
}

impl Source {
    const fn name(self) -> &'static str {
        match self {
            Self::Flavor => "flavor",
            Self::Operator => "operator",
        }
    }
}

/// An assignment of a device to an instance: lasting intent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Assignment {
    /// Number of the assignment.
    pub id: i64,
    /// Time of the assignment.
    pub created_at: String,
    /// Instance that gets the device.
    pub instance_uuid: InstanceId,
    /// The requested device.
    pub request: DeviceRequest,
    /// Origin of the assignment.
    pub source: Source,
}

impl Assignment {
    pub(crate) fn read(row: &Row<'_>) -> Sql<Self> {
        let text: String = row.get("request")?;
        let flavor =
            Flavor::parse_lists(Some(&text), None).map_err(|e| bad_row(row, "request", e))?;
        let request = flavor
            .usb_devices
            .into_iter()
            .next()
            .ok_or_else(|| bad_row(row, "request", "is empty"))?;
        let source: String = row.get("source")?;
        Ok(Self {
            id: row.get("id")?,
            created_at: row.get("created_at")?,
            instance_uuid: crate::device::parse(row, "instance_uuid")?,
            request,
            source: if source == "flavor" { Source::Flavor } else { Source::Operator },
        })
    }
}

impl Store {
    /// Assignments of the instance, in the order in which they were made.
    ///
    /// # Errors
    /// When the database cannot be read.
    pub fn assignments(&self, instance: InstanceId) -> Result<Vec<Assignment>, StoreError> {
        self.all(
            "SELECT * FROM assignments WHERE instance_uuid = ?1 ORDER BY id",
            [instance.to_string()],
            Assignment::read,
        )
    }

    /// All assignments, in the order they were made.
    ///
    /// # Errors
    /// When the database cannot be read.
    pub fn all_assignments(&self) -> Result<Vec<Assignment>, StoreError> {
        self.all("SELECT * FROM assignments ORDER BY id", [], Assignment::read)
    }

    /// Makes the instance's assignments of one source exactly `requests`; says whether that changed
    /// anything.
    ///
    /// # Errors
    /// When the database cannot be written.
    pub fn assign(
        &mut self,
        claimant: &Claimant,
        source: Source,
        requests: &[DeviceRequest],
        context: &Context,
    ) -> Result<bool, StoreError> {
        let instance = claimant.instance;
        let requests = places::resolve_all(&*self.conn()?, requests).map_err(|e| self.fault(&e))?;
        let now: Vec<DeviceRequest> = self
            .assignments(instance)?
            .into_iter()
            .filter(|a| a.source == source)
            .map(|a| a.request)
            .collect();
        if now == requests {
            return Ok(false);
        }
        self.write(|tx, hints| {
            lasting(tx, hints, instance)?;
            tx.execute(
                "DELETE FROM assignments WHERE instance_uuid = ?1 AND source = ?2",
                params![instance.to_string(), source.name()],
            )?;
            for request in &requests {
                insert(tx, instance, request, source)?;
            }
            let detail = serde_json::to_string(&requests).unwrap_or_default();
            record(
                tx,
                context,
                &Event::of("assigned", claimant).with(format!("{}: {detail}", source.name())),
            )?;
            Ok(())
        })?;
        self.forget_hint(instance)?;
        Ok(true)
    }

    /// Assigns more to the instance, on an operator's behalf, beside whatever others do at the same
    /// time. A device that is assigned by its id already is not assigned twice: no start could have
    /// it so.
    ///
    /// # Errors
    /// When the database cannot be written; then nothing was assigned.
    pub fn assign_more(
        &mut self,
        claimant: &Claimant,
        requests: &[DeviceRequest],
        context: &Context,
    ) -> Result<Result<(), TooMany>, StoreError> {
        self.write(|tx, hints| {
            match unassigned(tx, claimant.instance, &places::resolve_all(tx, requests)?)? {
                Ok(new) => add(tx, hints, claimant, &new, context).map(|_| Ok(())),
                Err(too_many) => Ok(Err(too_many)),
            }
        })
    }

    /// Assigns the requests of an operator to a running instance and claims the devices, all or
    /// nothing. Devices that the instance already holds stay and serve none of the requests. The
    /// exception is a device that is requested by its id: it is returned, and it stays even if it
    /// was being detached.
    ///
    /// # Errors
    /// When the database cannot be written; then nothing was given.
    pub fn give(
        &mut self,
        claimant: &Claimant,
        requests: &[DeviceRequest],
        verifier: &mut dyn ClaimVerifier,
        context: &Context,
    ) -> Result<Given, StoreError> {
        self.write(|tx, hints| {
            let requests = &places::resolve_all(tx, requests)?;
            let mine = release::held(tx, claimant.instance)?;
            let (mut new, mut already, mut missing) = (Vec::new(), Vec::new(), Vec::new());
            let (mut kept, mut wanted) = (Vec::new(), Vec::new());
            for request in requests {
                let id = request.selector.id.filter(|_| request.count == 1);
                match mine.iter().find(|c| Some(c.device_id) == id) {
                    Some(claim) if claim.ending => {
                        kept.push(claim);
                        wanted.push(request.clone());
                    }
                    Some(claim) => already.push(claim.device_id),
                    // A device that is requested by its id is claimed only once.
                    None if id.is_some() && missing.contains(request) => {}
                    None => missing.push(request.clone()),
                }
            }
            wanted.extend(missing.iter().cloned());
            let wanted = match unassigned(tx, claimant.instance, &wanted)? {
                Ok(wanted) => wanted,
                Err(too_many) => return Ok(Given::TooMany(too_many)),
            };
            if !missing.is_empty() {
                let want = |request: &DeviceRequest| ClaimRequest::new(request.clone(), true);
                let wants: Vec<ClaimRequest> = missing.iter().map(want).collect();
                match claim::take(
                    tx,
                    hints,
                    claimant,
                    &wants,
                    &[],
                    ClaimMode::Add,
                    verifier,
                    context,
                )? {
                    Claimed::Granted(granted) => {
                        new.extend(granted.iter().map(|g| g.device.entry.id));
                    }
                    Claimed::Short(short) => return Ok(Given::Short(short)),
                    Claimed::Unfit(why) => return Ok(Given::Unfit(why)),
                }
            }
            for claim in kept {
                step_revision(tx)?;
                tx.mark_lasting();
                tx.execute(
                    "UPDATE claims SET ending = 0, hold = 'instance', revision = (SELECT \
                        max(revision) FROM compute_nodes) WHERE id = ?1",
                    [claim.id],
                )?;
                new.push(claim.device_id);
            }
            let assigned = add(tx, hints, claimant, &wanted, context)?;
            let mut claims = release::held(tx, claimant.instance)?;
            claims.retain(|c| new.contains(&c.device_id));
            Ok(Given::Granted { new: claims, already, assigned })
        })
    }

    /// Ends assignments, by their numbers, and devices, by their claims, for an operator in one
    /// step. A claim is marked for the agent, which detaches its device. The assignment that
    /// requested the device, as `serves` says, ends with it. If several request it, the one ends
    /// without which most of the remaining claims have an assignment. Assignments and claims that
    /// have already ended are skipped, and a claim that was made since then does not change.
    ///
    /// `held` lists the claims of the instance on which the caller based its decision, if any. If
    /// the instance holds more now, the function changes nothing and returns false, and the caller
    /// must decide again.
    ///
    /// # Errors
    /// When the database cannot be written; then nothing has ended.
    pub fn dismiss(
        &mut self,
        claimant: &Claimant,
        held: Option<&[ClaimRow]>,
        assignments: &[i64],
        claims: &[ClaimRow],
        serves: impl Fn(&DeviceRequest, DeviceId) -> bool,
        context: &Context,
    ) -> Result<bool, StoreError> {
        if assignments.is_empty() && claims.is_empty() {
            return Ok(true);
        }
        let instance = claimant.instance;
        let done = self.write(|tx, _| {
            let is_known =
                |c: &ClaimRow| held.is_none_or(|held| held.iter().any(|known| known.id == c.id));
            if !release::held(tx, instance)?.iter().all(is_known) {
                return Ok(false);
            }
            tx.mark_lasting();
            let remove = |id: i64| {
                let sql = "DELETE FROM assignments WHERE id = ?1 AND instance_uuid = ?2 RETURNING \
                    request";
                tx.query_row(sql, params![id, instance.to_string()], |row| row.get::<_, String>(0))
                    .optional()
            };
            for id in assignments {
                if let Some(request) = remove(*id)? {
                    let detail = format!("operator: {request}");
                    record(tx, context, &Event::of("unassigned", claimant).with(detail))?;
                }
            }
            let mut leaving = Vec::new();
            for claim in claims {
                let sql = "UPDATE claims SET ending = 1 WHERE id = ?1 AND instance_uuid = ?2 AND \
                    NOT ending";
                if tx.execute(sql, params![claim.id, instance.to_string()])? > 0 {
                    leaving.push(claim.device_id);
                }
            }
            let mut staying = release::held(tx, instance)?;
            staying.retain(|claim| !claim.ending);
            for device in leaving {
                let Some(asked) =
                    ending_with(device, &of_operators(tx, instance)?, &staying, &serves)
                else {
                    continue;
                };
                if asked.request.count > 1 {
                    let fewer = DeviceRequest { count: asked.request.count - 1, ..asked.request };
                    let sql = "UPDATE assignments SET request = ?2 WHERE id = ?1";
                    tx.execute(sql, params![asked.id, fewer.to_string()])?;
                } else {
                    remove(asked.id)?;
                }
                record(tx, context, &Event::of("unassigned", claimant).about(device))?;
            }
            Ok(true)
        })?;
        self.forget_hint(instance)?;
        Ok(done)
    }
}

/// An instance's assignments by operators, in the order they were made.
fn of_operators(tx: &Transaction<'_>, instance: InstanceId) -> Sql<Vec<Assignment>> {
    let sql = "SELECT * FROM assignments WHERE instance_uuid = ?1 AND source = ?2 ORDER BY id";
    let mut query = tx.prepare_cached(sql)?;
    query
        .query_map(params![instance.to_string(), Source::Operator.name()], Assignment::read)?
        .collect()
}

/// The assignment that ends with a device: among those that request it, the one without which most
/// of the claims that stay are served. Among equals, an assignment that names the device by its id
/// comes first, then the oldest.
fn ending_with(
    device: DeviceId,
    assigned: &[Assignment],
    staying: &[ClaimRow],
    serves: &impl Fn(&DeviceRequest, DeviceId) -> bool,
) -> Option<Assignment> {
    let served_without = |ending: &Assignment| {
        let slots = assigned.iter().flat_map(|a| {
            let count = a.request.count as usize - usize::from(a.id == ending.id);
            std::iter::repeat_n(&a.request, count)
        });
        let by_slot = |request: &DeviceRequest| {
            (0..staying.len()).filter(|at| serves(request, staying[*at].device_id)).collect()
        };
        let rows: Vec<Vec<usize>> = slots.map(by_slot).collect();
        matching::assign(&rows, staying.len()).iter().flatten().count()
    };
    let rank =
        |a: &&Assignment| (Reverse(served_without(a)), a.request.selector.id != Some(device), a.id);
    assigned.iter().filter(|a| serves(&a.request, device)).min_by_key(rank).cloned()
}

/// The requests that must be assigned: a device by its id is assigned only once.
fn unassigned(
    tx: &Transaction<'_>,
    instance: InstanceId,
    requests: &[DeviceRequest],
) -> Sql<Result<Vec<DeviceRequest>, TooMany>> {
    let known = of_operators(tx, instance)?;
    let mut new: Vec<DeviceRequest> = Vec::new();
    for request in requests {
        let is_there = known.iter().any(|a| a.request == *request) || new.contains(request);
        if request.selector.id.is_none() || !is_there {
            new.push(request.clone());
        }
    }
    let all = known.iter().map(|a| &a.request).chain(&new);
    let devices: u64 = all.map(|request| u64::from(request.count)).sum();
    Ok(if devices > u64::from(MAX_DEVICES) { Err(TooMany { devices }) } else { Ok(new) })
}

/// Makes assignments; returns their numbers.
fn add(
    tx: &Tx<'_>,
    hints: &Hints,
    claimant: &Claimant,
    requests: &[DeviceRequest],
    context: &Context,
) -> Result<Vec<i64>, TxError> {
    if requests.is_empty() {
        return Ok(Vec::new());
    }
    lasting(tx, hints, claimant.instance)?;
    let mut made = Vec::new();
    for request in requests {
        insert(tx, claimant.instance, request, Source::Operator)?;
        made.push(tx.last_insert_rowid());
    }
    let detail = serde_json::to_string(requests).unwrap_or_default();
    record(tx, context, &Event::of("assigned", claimant).with(format!("operator: {detail}")))?;
    Ok(made)
}

/// Prepares the write of an assignment, which must survive a power cut together with its hint.
fn lasting(tx: &Tx<'_>, hints: &Hints, instance: InstanceId) -> Result<(), StoreError> {
    tx.mark_lasting();
    hints.add_lasting(HintSubject::Assigned(instance))
}

fn insert(
    tx: &Transaction<'_>,
    instance: InstanceId,
    request: &DeviceRequest,
    source: Source,
) -> Sql<()> {
    tx.execute(
        &format!(
            "INSERT INTO assignments (created_at, instance_uuid, request, source) VALUES ({NOW}, \
                ?1, ?2, ?3)"
        ),
        params![instance.to_string(), request.to_string(), source.name()],
    )?;
    Ok(())
}

/// How [`Store::give`] ended.
#[derive(Debug, Clone, PartialEq)]
pub enum Given {
    /// The instance is to have it all.
    Granted {
        /// The claims that were made for it.
        new: Vec<ClaimRow>,
        /// The devices that it had already.
        already: Vec<DeviceId>,
        /// The numbers of the assignments that were made for it.
        assigned: Vec<i64>,
    },
    /// Not enough devices; nothing was given.
    Short(Vec<Shortage>),
    /// The guest cannot take them; nothing was given.
    Unfit(String),
    /// More devices than a guest can have; nothing was assigned.
    TooMany(TooMany),
}

/// More devices assigned to one instance than a USB bus has addresses: [`MAX_DEVICES`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{devices} devices would be assigned to it: at most {MAX_DEVICES} are allowed")]
pub struct TooMany {
    /// As many as there would be.
    pub devices: u64,
}
