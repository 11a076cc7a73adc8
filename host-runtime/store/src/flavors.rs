//! Stored flavors: from a name to what it asks for.

use std::collections::{BTreeMap, BTreeSet};

use rusqlite::{OptionalExtension, Row, params};
use serde::Serialize;
use virt_usb_model::Flavor;

use crate::error::{Sql, bad_row};
use crate::events::{Event, record};
use crate::hints::{HintRow, HintSubject};
use crate::{Context, NOW, Store, StoreError, places};

/// A flavor as it is stored.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct StoredFlavor {
    /// Name of the flavor, as in Nova and the metadata.
    pub name: String,
    /// Time when the flavor was first stored.
    pub created_at: String,
    /// Time when the flavor was last stored.
    pub updated_at: String,
    /// Requests of the flavor.
    #[serde(flatten)]
    pub flavor: Flavor,
}

impl StoredFlavor {
    pub(crate) fn read(row: &Row<'_>) -> Sql<Self> {
        let document: String = row.get("document")?;
        Ok(Self {
            name: row.get("name")?,
            created_at: row.get("created_at")?,
            updated_at: row.get("updated_at")?,
            flavor: Flavor::parse(&document).map_err(|e| bad_row(row, "document", e))?,
        })
    }
}

impl Store {
    /// All flavors, by name.
    ///
    /// # Errors
    /// When the database cannot be read.
    pub fn flavors(&self) -> Result<Vec<StoredFlavor>, StoreError> {
        self.all("SELECT * FROM flavors ORDER BY name", [], StoredFlavor::read)
    }

    /// The flavor of that name.
    ///
    /// # Errors
    /// When the database cannot be read.
    pub fn flavor(&self, name: &str) -> Result<Option<StoredFlavor>, StoreError> {
        let conn = self.conn()?;
        let read = || {
            conn.prepare_cached("SELECT * FROM flavors WHERE name = ?1")?
                .query_row([name], StoredFlavor::read)
                .optional()
        };
        read().map_err(|e| self.fault(&e))
    }

    /// Stores a flavor, with each port replaced by its path; says whether that changed anything.
    ///
    /// # Errors
    /// When the database cannot be written.
    pub fn set_flavor(
        &mut self,
        name: &str,
        flavor: &Flavor,
        context: &Context,
    ) -> Result<bool, StoreError> {
        let usb_devices =
            places::resolve_all(&*self.conn()?, &flavor.usb_devices).map_err(|e| self.fault(&e))?;
        self.put_flavor(name, &Flavor { usb_devices, ..flavor.clone() }, context)
    }

    /// Stores a flavor without further checks.
    fn put_flavor(
        &mut self,
        name: &str,
        flavor: &Flavor,
        context: &Context,
    ) -> Result<bool, StoreError> {
        if self.flavor(name)?.is_some_and(|stored| stored.flavor == *flavor) {
            return Ok(false);
        }
        self.write(|tx, hints| {
            hints.add(HintSubject::Flavor(name))?;
            tx.execute(
                &format!(
                    "INSERT INTO flavors (name, created_at, updated_at, document) VALUES (?1, \
                        {NOW}, {NOW}, ?2)
                     ON CONFLICT (name) DO UPDATE SET document = excluded.document, updated_at = \
                     excluded.updated_at"
                ),
                params![name, flavor.to_string()],
            )?;
            record(tx, context, &Event::new("flavor-set").with(format!("{name}: {flavor}")))?;
            Ok(true)
        })
    }

    /// Removes a flavor; says whether it was there. Instances that run keep what they have.
    ///
    /// # Errors
    /// When the database cannot be written.
    pub fn remove_flavor(&mut self, name: &str, context: &Context) -> Result<bool, StoreError> {
        let removed = self.write(|tx, _| {
            let removed = tx.execute("DELETE FROM flavors WHERE name = ?1", [name])? > 0;
            if removed {
                record(tx, context, &Event::new("flavor-removed").with(name.to_owned()))?;
            }
            Ok(removed)
        })?;
        self.forget_flavor(name)?;
        Ok(removed)
    }

    /// Replaces the stored flavors by these, except flavors with unclear names, which stay
    /// unchanged. Returns the number of changes.
    ///
    /// # Errors
    /// When the database cannot be written; what was changed before stays.
    pub fn mirror_flavors(
        &mut self,
        flavors: &BTreeMap<String, Flavor>,
        unclear: &BTreeSet<String>,
        context: &Context,
    ) -> Result<usize, StoreError> {
        let mut changed = 0;
        for (name, flavor) in flavors {
            changed += usize::from(self.put_flavor(name, flavor, context)?);
        }
        for StoredFlavor { name, .. } in self.flavors()? {
            if !flavors.contains_key(&name) && !unclear.contains(&name) {
                changed += usize::from(self.remove_flavor(&name, context)?);
            }
        }
        Ok(changed)
    }

    /// Removes the hint, unless a flavor that is there, perhaps by another name, has the same. A
    /// write of its own: only what is committed is surely gone.
    fn forget_flavor(&mut self, name: &str) -> Result<(), StoreError> {
        if !self.hints.may_know(HintSubject::Flavor(name)) {
            return Ok(());
        }
        self.write(|tx, hints| {
            let hint = HintSubject::Flavor(name).name();
            let needed = HintRow::all(tx)?.iter().any(|row| row.subject().name() == hint);
            if !needed {
                hints.remove(HintSubject::Flavor(name))?;
            }
            Ok(())
        })
    }
}
