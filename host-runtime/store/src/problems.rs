//! What stands between an instance and what it is to have: no USB bus in the guest, no free port, no SPICE. It is shown for as long as it
//! lasts, and goes with it.

use rusqlite::{OptionalExtension, params};
use serde::Serialize;
use virt_usb_model::InstanceId;

use crate::claim::Asker;
use crate::device::parse;
use crate::error::Sql;
use crate::events::{Event, record};
use crate::{Context, NOW, Store, StoreError};

/// One of them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Problem {
    /// Whose.
    pub instance_uuid: InstanceId,
    /// What it does not get: `device 5`, `redirection 0`.
    pub about: String,
    /// The domain's name.
    pub domain: String,
    /// Since when, UTC.
    pub since: String,
    /// What is wrong, and what to do.
    pub what: String,
}

impl Store {
    /// All of them, by instance.
    ///
    /// # Errors
    /// When the database cannot be read.
    pub fn problems(&self) -> Result<Vec<Problem>, StoreError> {
        self.all("SELECT * FROM problems ORDER BY instance_uuid, about", [], |row| {
            Ok(Problem {
                instance_uuid: parse(row, "instance_uuid")?,
                about: row.get("about")?,
                domain: row.get("domain")?,
                since: row.get("since")?,
                what: row.get("what")?,
            })
        })
    }

    /// Notes a problem, or that there is none any more; says whether that is news. Only news is an event.
    ///
    /// # Errors
    /// When the database cannot be written.
    pub fn note_problem(
        &mut self,
        asker: &Asker,
        about: &str,
        what: Option<&str>,
        context: &Context,
    ) -> Result<bool, StoreError> {
        let instance = asker.instance.to_string();
        let known: Option<String> = self
            .conn
            .prepare_cached("SELECT what FROM problems WHERE instance_uuid = ?1 AND about = ?2")
            .and_then(|mut known| known.query_row([&instance, about], |row| row.get(0)).optional())
            .map_err(|e| self.fault(&e))?;
        if known.as_deref() == what {
            return Ok(false);
        }
        self.write(|tx, _| {
            let event = match what {
                Some(what) => {
                    let sql = format!(
                        "INSERT INTO problems (instance_uuid, about, domain, since, what) VALUES (?1, ?2, ?3, {NOW}, ?4)
                         ON CONFLICT DO UPDATE SET what = excluded.what, domain = excluded.domain"
                    );
                    tx.execute(&sql, params![instance, about, asker.domain, what])?;
                    Event::of("problem", asker).with(format!("{about}: {what}"))
                }
                None => {
                    tx.execute("DELETE FROM problems WHERE instance_uuid = ?1 AND about = ?2", [&instance, about])?;
                    Event::of("solved", asker).with(about.to_owned())
                }
            };
            record(tx, context, &event)?;
            Ok(true)
        })
    }

    /// Forgets the problems of an instance that does not run any more.
    ///
    /// # Errors
    /// When the database cannot be written.
    pub fn forget_problems(&mut self, instance: InstanceId) -> Result<(), StoreError> {
        self.write(|tx, _| {
            let gone: Sql<usize> =
                tx.execute("DELETE FROM problems WHERE instance_uuid = ?1", [instance.to_string()]);
            gone.map(drop).map_err(Into::into)
        })
    }
}
