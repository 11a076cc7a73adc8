//! Assignments: this instance is to have these devices, whenever it runs.

use rusqlite::{OptionalExtension as _, Row, Transaction, params};
use serde::Serialize;
use virt_usb_model::{DeviceId, DeviceRequest, Flavor, InstanceId};

use crate::claim::Asker;
use crate::device::sql_id;
use crate::error::{Sql, bad_row};
use crate::events::{Event, record};
use crate::hints::Known;
use crate::{Context, NOW, Store, StoreError};

/// Who made an assignment.
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

/// Lasting intent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Assignment {
    /// Its number.
    pub id: i64,
    /// Since when.
    pub created_at: String,
    /// For whom.
    pub instance_uuid: InstanceId,
    /// What.
    pub request: DeviceRequest,
    /// By whom.
    pub source: Source,
}

impl Assignment {
    pub(crate) fn read(row: &Row<'_>) -> Sql<Self> {
        let text: String = row.get("request")?;
        let flavor = Flavor::parse_lists(Some(&text), None).map_err(|e| bad_row(row, "request", e))?;
        let request =
            flavor.usb_devices.into_iter().next().ok_or_else(|| bad_row(row, "request", "is empty"))?;
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
    /// What is assigned to the instance, in the order it was.
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

    /// Makes the instance's assignments of one source exactly `requests`; says whether that changed anything.
    ///
    /// # Errors
    /// When the database cannot be written.
    pub fn assign(
        &mut self,
        asker: &Asker,
        source: Source,
        requests: &[DeviceRequest],
        context: &Context,
    ) -> Result<bool, StoreError> {
        let instance = asker.instance;
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
            hints.add(Known::Assigned(instance))?;
            tx.execute(
                "DELETE FROM assignments WHERE instance_uuid = ?1 AND source = ?2",
                params![instance.to_string(), source.name()],
            )?;
            for request in requests {
                insert(tx, instance, request, source)?;
            }
            let detail = serde_json::to_string(requests).unwrap_or_default();
            record(tx, context, &Event::of("assigned", asker).with(format!("{}: {detail}", source.name())))?;
            Ok(())
        })?;
        self.forget_hint(instance)?;
        Ok(true)
    }

    /// Assigns more to the instance, on an operator's behalf, beside whatever others do at the same time; returns the numbers of the
    /// assignments that were made. A device that is assigned by its id already is not assigned twice: no start could have it so.
    ///
    /// # Errors
    /// When the database cannot be written; then nothing was assigned.
    pub fn assign_more(
        &mut self,
        asker: &Asker,
        requests: &[DeviceRequest],
        context: &Context,
    ) -> Result<Vec<i64>, StoreError> {
        let instance = asker.instance;
        self.write(|tx, hints| {
            hints.add(Known::Assigned(instance))?;
            let mut made = Vec::new();
            for request in requests {
                let sql = "SELECT EXISTS (SELECT 1 FROM assignments WHERE instance_uuid = ?1 AND source = ?2 AND request = ?3)";
                let known = params![instance.to_string(), Source::Operator.name(), request.to_string()];
                if request.selector.id.is_some() && tx.query_row(sql, known, |row| row.get(0))? {
                    continue;
                }
                insert(tx, instance, request, Source::Operator)?;
                made.push(tx.last_insert_rowid());
            }
            let detail = serde_json::to_string(requests).unwrap_or_default();
            record(tx, context, &Event::of("assigned", asker).with(format!("operator: {detail}")))?;
            Ok(made)
        })
    }

    /// Ends assignments, by their numbers. One that has ended already is none the worse for it.
    ///
    /// # Errors
    /// When the database cannot be written; then none has ended.
    pub fn unassign(
        &mut self,
        asker: &Asker,
        assignments: &[i64],
        context: &Context,
    ) -> Result<(), StoreError> {
        if assignments.is_empty() {
            return Ok(());
        }
        self.write(|tx, _| {
            for id in assignments {
                let request: Option<String> = tx
                    .query_row(
                        "DELETE FROM assignments WHERE id = ?1 AND instance_uuid = ?2 RETURNING request",
                        params![id, asker.instance.to_string()],
                        |row| row.get(0),
                    )
                    .optional()?;
                if let Some(request) = request {
                    record(
                        tx,
                        context,
                        &Event::of("unassigned", asker).with(format!("operator: {request}")),
                    )?;
                }
            }
            Ok(())
        })?;
        self.forget_hint(asker.instance)
    }

    /// The instance is not to have the device any more: the operator's assignment that asked for it ends (the one that names it, or else
    /// the first that it would serve), and a claim on it is marked, for whoever takes the device out of the guest. Says what there was.
    ///
    /// # Errors
    /// When the database cannot be written.
    pub fn dismiss(
        &mut self,
        asker: &Asker,
        device: DeviceId,
        serves: impl Fn(&DeviceRequest) -> bool,
        context: &Context,
    ) -> Result<Dismissed, StoreError> {
        let instance = asker.instance;
        let mut asked: Vec<Assignment> = self
            .assignments(instance)?
            .into_iter()
            .filter(|a| a.source == Source::Operator && serves(&a.request))
            .collect();
        asked.sort_by_key(|a| (a.request.selector.id != Some(device), a.id));
        let dismissed = self.write(|tx, _| {
            let assignment = match asked.first() {
                None => false,
                Some(Assignment { id, request, .. }) if request.count > 1 => {
                    let fewer = DeviceRequest { count: request.count - 1, ..request.clone() };
                    tx.execute(
                        "UPDATE assignments SET request = ?2 WHERE id = ?1",
                        params![id, fewer.to_string()],
                    )? > 0
                }
                Some(Assignment { id, .. }) => tx.execute("DELETE FROM assignments WHERE id = ?1", [id])? > 0,
            };
            let claim = tx.execute(
                "UPDATE claims SET ending = 1 WHERE instance_uuid = ?1 AND device_id = ?2",
                params![instance.to_string(), sql_id(device)],
            )? > 0;
            if assignment {
                record(tx, context, &Event::of("unassigned", asker).about(device))?;
            }
            Ok(Dismissed { assignment, claim })
        })?;
        self.forget_hint(instance)?;
        Ok(dismissed)
    }
}

fn insert(tx: &Transaction<'_>, instance: InstanceId, request: &DeviceRequest, source: Source) -> Sql<()> {
    tx.execute(
        &format!(
            "INSERT INTO assignments (created_at, instance_uuid, request, source) VALUES ({NOW}, ?1, ?2, ?3)"
        ),
        params![instance.to_string(), request.to_string(), source.name()],
    )?;
    Ok(())
}

/// What ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Dismissed {
    /// An assignment.
    pub assignment: bool,
    /// A claim is to end.
    pub claim: bool,
}
