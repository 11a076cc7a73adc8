//! Grants: which projects may have which devices, beside what the whitelist's rules say. Each
//! device's row holds the projects of those that match it (`granted`), so that a claim reads that
//! row alone.

use std::collections::{BTreeMap, BTreeSet};

use rusqlite::{OptionalExtension, Row, Transaction, params, params_from_iter};
use serde::Serialize;
use virt_usb_model::grant::joined;
use virt_usb_model::{DeviceId, Grant, ProjectId};

use crate::device::{read_id, refresh, sql_id, step_revision};
use crate::error::{Sql, bad_row};
use crate::events::{Event, record};
use crate::{Context, NOW, Store, StoreError, places, query};

/// A grant as it is stored.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct StoredGrant {
    /// Name of the grant.
    pub name: String,
    /// Time when the grant was first stored.
    pub created_at: String,
    /// Time when the grant was last stored.
    pub updated_at: String,
    /// Devices and projects of the grant.
    #[serde(flatten)]
    pub grant: Grant,
}

impl StoredGrant {
    pub(crate) fn read(row: &Row<'_>) -> Sql<Self> {
        let document: String = row.get("document")?;
        Ok(Self {
            name: row.get("name")?,
            created_at: row.get("created_at")?,
            updated_at: row.get("updated_at")?,
            grant: Grant::parse(&document).map_err(|e| bad_row(row, "document", e))?,
        })
    }
}

impl Store {
    /// All grants, by name.
    ///
    /// # Errors
    /// When the database cannot be read.
    pub fn grants(&self) -> Result<Vec<StoredGrant>, StoreError> {
        self.all("SELECT * FROM grants ORDER BY name", [], StoredGrant::read)
    }

    /// The grant of that name.
    ///
    /// # Errors
    /// When the database cannot be read.
    pub fn grant(&self, name: &str) -> Result<Option<StoredGrant>, StoreError> {
        let conn = self.conn()?;
        let read = || {
            conn.prepare_cached("SELECT * FROM grants WHERE name = ?1")?
                .query_row([name], StoredGrant::read)
                .optional()
        };
        read().map_err(|e| self.fault(&e))
    }

    /// Stores a grant, with each port replaced by its path; says whether that changed anything. Who
    /// holds a device keeps it.
    ///
    /// # Errors
    /// When the database cannot be written.
    pub fn set_grant(
        &mut self,
        name: &str,
        grant: &Grant,
        context: &Context,
    ) -> Result<bool, StoreError> {
        let usb_devices = {
            let conn = self.conn()?;
            let resolved =
                grant.usb_devices.iter().map(|selector| places::resolve(&conn, selector));
            resolved.collect::<Sql<_>>().map_err(|e| self.fault(&e))?
        };
        let grant = Grant { usb_devices, ..grant.clone() };
        let (one, none) = (BTreeMap::from([(name.to_owned(), grant)]), BTreeSet::new());
        self.change_grants(&one, &none, context).map(|changed| changed > 0)
    }

    /// Removes a grant; says whether it was there. Who holds a device keeps it.
    ///
    /// # Errors
    /// When the database cannot be written.
    pub fn remove_grant(&mut self, name: &str, context: &Context) -> Result<bool, StoreError> {
        let (none, one) = (BTreeMap::new(), BTreeSet::from([name.to_owned()]));
        self.change_grants(&none, &one, context).map(|changed| changed > 0)
    }

    /// Replaces the stored grants by these, except grants with unclear names, which stay unchanged.
    /// Returns the number of changes. The change is atomic: a device that moves from one grant to
    /// another is never available to all in between.
    ///
    /// # Errors
    /// When the database cannot be written; then nothing was changed.
    pub fn mirror_grants(
        &mut self,
        grants: &BTreeMap<String, Grant>,
        unclear: &BTreeSet<String>,
        context: &Context,
    ) -> Result<usize, StoreError> {
        let known = self.grants()?.into_iter().map(|stored| stored.name);
        let remove =
            known.filter(|name| !grants.contains_key(name) && !unclear.contains(name)).collect();
        self.change_grants(grants, &remove, context)
    }

    fn change_grants(
        &mut self,
        set: &BTreeMap<String, Grant>,
        remove: &BTreeSet<String>,
        context: &Context,
    ) -> Result<usize, StoreError> {
        let known: BTreeMap<String, Grant> =
            self.grants()?.into_iter().map(|stored| (stored.name, stored.grant)).collect();
        if remove.iter().all(|name| !known.contains_key(name))
            && set.iter().all(|(name, grant)| known.get(name) == Some(grant))
        {
            return Ok(0);
        }
        self.write(|tx, _| {
            let mut changed = 0;
            for name in remove {
                if tx.execute("DELETE FROM grants WHERE name = ?1", [name])? > 0 {
                    record(tx, context, &Event::new("grant-removed").with(name.clone()))?;
                    changed += 1;
                }
            }
            for (name, grant) in set {
                let sql = format!(
                    "INSERT INTO grants (name, created_at, updated_at, document) VALUES (?1, \
                        {NOW}, {NOW}, ?2)
                     ON CONFLICT (name) DO UPDATE SET document = excluded.document, updated_at = \
                     excluded.updated_at
                     WHERE document <> excluded.document"
                );
                if tx.execute(&sql, params![name, grant.to_string()])? > 0 {
                    record(tx, context, &Event::new("grant-set").with(format!("{name}: {grant}")))?;
                    changed += 1;
                }
            }
            if apply(tx)? {
                step_revision(tx)?;
            }
            Ok(changed)
        })
    }
}

/// Stores for each device the projects that the grants give it to; returns whether that changed
/// anything.
pub(crate) fn apply(tx: &Transaction<'_>) -> Sql<bool> {
    let grants: Vec<Grant> = tx
        .prepare_cached("SELECT * FROM grants ORDER BY name")?
        .query_map([], |row| StoredGrant::read(row).map(|stored| stored.grant))?
        .collect::<Sql<_>>()?;
    let mut given: BTreeMap<DeviceId, Vec<ProjectId>> = BTreeMap::new();
    for grant in &grants {
        for selector in &grant.usb_devices {
            let found = query::find(selector);
            let mut statement = tx.prepare(&found.sql("d.id AS id", "1"))?;
            for device in
                statement.query_map(params_from_iter(&found.params), |row| read_id(row, "id"))?
            {
                let projects = given.entry(device?).or_default();
                *projects = joined(projects, &grant.projects);
            }
        }
    }
    let mut changed = false;
    let known: Vec<(DeviceId, String)> = tx
        .prepare_cached("SELECT id, granted FROM usb_devices WHERE deleted = 0")?
        .query_map([], |row| Ok((read_id(row, "id")?, row.get("granted")?)))?
        .collect::<Sql<_>>()?;
    for (device, before) in known {
        let projects = given.get(&device).map_or(&[][..], Vec::as_slice);
        let now = serde_json::to_string(projects).unwrap_or_else(|_| "[]".into());
        if now != before {
            tx.execute(
                "UPDATE usb_devices SET granted = ?2 WHERE id = ?1",
                params![sql_id(device), now],
            )?;
            refresh(tx, device)?;
            changed = true;
        }
    }
    Ok(changed)
}
