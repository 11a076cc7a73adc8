//! Owners of instances that an administrator has set. An owner in the domain takes precedence.

use rusqlite::{OptionalExtension as _, Row, params};
use serde::Serialize;
use virt_usb_model::{InstanceId, ProjectId};

use crate::claim::Claimant;
use crate::device::{parse, step_revision};
use crate::error::Sql;
use crate::events::{Event, record};
use crate::{Context, NOW, Store, StoreError};

/// An instance and its project.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Owner {
    /// UUID of the instance.
    pub instance_uuid: InstanceId,
    /// Time when the owner was set.
    pub created_at: String,
    /// The domain's name then.
    pub domain: String,
    /// Owner project of the instance.
    pub project_id: ProjectId,
}

impl Owner {
    pub(crate) fn read(row: &Row<'_>) -> Sql<Self> {
        Ok(Self {
            instance_uuid: parse(row, "instance_uuid")?,
            created_at: row.get("created_at")?,
            domain: row.get("domain")?,
            project_id: parse(row, "project_id")?,
        })
    }
}

impl Store {
    /// All of them, by instance.
    ///
    /// # Errors
    /// When the database cannot be read.
    pub fn owners(&self) -> Result<Vec<Owner>, StoreError> {
        self.all("SELECT * FROM owners ORDER BY instance_uuid", [], Owner::read)
    }

    /// Owner of the instance, as set by an administrator.
    ///
    /// # Errors
    /// When the database cannot be read.
    pub fn owner(&self, instance: InstanceId) -> Result<Option<Owner>, StoreError> {
        let conn = self.conn()?;
        let read = || {
            conn.prepare_cached("SELECT * FROM owners WHERE instance_uuid = ?1")?
                .query_row([instance.to_string()], Owner::read)
                .optional()
        };
        read().map_err(|e| self.fault(&e))
    }

    /// The instance and owner for which devices are claimed. `project` is the owner in the domain,
    /// which takes precedence over one set by an administrator.
    ///
    /// # Errors
    /// When the database cannot be read.
    pub fn claimant(
        &self,
        instance: InstanceId,
        domain: &str,
        project: Option<&ProjectId>,
    ) -> Result<Claimant, StoreError> {
        let project = match project {
            Some(project) => Some(project.clone()),
            None => self.owner(instance)?.map(|owner| owner.project_id),
        };
        Ok(Claimant { instance, domain: domain.to_owned(), project })
    }

    /// Sets the owner of an instance and of its claims, or removes it with `None`. Returns whether
    /// that changed anything. The owner has no effect if the instance's domain names its project.
    ///
    /// # Errors
    /// When the database cannot be written.
    pub fn set_owner(
        &mut self,
        instance: InstanceId,
        domain: &str,
        project: Option<&ProjectId>,
        context: &Context,
    ) -> Result<bool, StoreError> {
        self.write(|tx, _| {
            let id = instance.to_string();
            let owner: Option<ProjectId> = tx
                .prepare_cached("SELECT * FROM owners WHERE instance_uuid = ?1")?
                .query_row([&id], Owner::read)
                .optional()?
                .map(|owner| owner.project_id);
            let event = match (&owner, project) {
                (None, None) => return Ok(false),
                (Some(owner), Some(project)) if owner == project => return Ok(false),
                (_, Some(project)) => {
                    tx.execute(
                        &format!(
                            "INSERT INTO owners (instance_uuid, created_at, domain, project_id) \
                                VALUES (?1, {NOW}, ?2, ?3)
                             ON CONFLICT (instance_uuid) DO UPDATE
                             SET created_at = excluded.created_at, domain = excluded.domain, \
                             project_id = excluded.project_id"
                        ),
                        params![id, domain, project.to_string()],
                    )?;
                    "owner-set"
                }
                (Some(_), None) => {
                    tx.execute("DELETE FROM owners WHERE instance_uuid = ?1", [&id])?;
                    "owner-cleared"
                }
            };
            let claims = tx.execute(
                "UPDATE claims SET project_id = ?2 WHERE instance_uuid = ?1",
                params![id, project.map(ToString::to_string)],
            )?;
            if claims > 0 {
                step_revision(tx)?;
            }
            let whom = Claimant {
                instance,
                domain: domain.to_owned(),
                project: project.or(owner.as_ref()).cloned(),
            };
            record(tx, context, &Event::of(event, &whom))?;
            Ok(true)
        })
    }
}
