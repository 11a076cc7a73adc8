//! Problems that keep an instance from its devices: no USB bus in the guest, no free port, no
//! SPICE. A problem is shown while it lasts.

use rusqlite::{OptionalExtension, params};
use serde::Serialize;
use virt_usb_model::{DeviceId, InstanceId};

use crate::claim::Claimant;
use crate::device::parse;
use crate::events::{Event, record};
use crate::{Context, NOW, Store, StoreError};

/// One of them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Problem {
    /// Instance that has the problem.
    pub instance_uuid: InstanceId,
    /// Subject of the problem: `device 5`, `redirection 0`; `start` if the guest was stopped for
    /// it.
    pub about: String,
    /// The domain's name.
    pub domain: String,
    /// Since when, UTC.
    pub since: String,
    /// Description of the problem, and what to do.
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

    /// Records a problem, or that it is solved; returns whether that is a change. Only a change is
    /// an event.
    ///
    /// # Errors
    /// When the database cannot be written.
    pub fn note_problem(
        &mut self,
        claimant: &Claimant,
        about: &str,
        what: Option<&str>,
        context: &Context,
    ) -> Result<bool, StoreError> {
        let instance = claimant.instance.to_string();
        let known: Option<(String, String)> = self
            .conn()?
            .prepare_cached(
                "SELECT what, domain FROM problems WHERE instance_uuid = ?1 AND about = ?2",
            )
            .and_then(|mut known| {
                known.query_row([&instance, about], |row| Ok((row.get(0)?, row.get(1)?))).optional()
            })
            .map_err(|e| self.fault(&e))?;
        if known.as_ref().map(|(what, _)| what.as_str()) == what {
            return Ok(false);
        }
        let device =
            about.strip_prefix("device ").and_then(|id| id.parse().ok()).and_then(DeviceId::new);
        self.write(|tx, _| {
            let event = match what {
                Some(what) => {
                    let sql = format!(
                        "INSERT INTO problems (instance_uuid, about, domain, since, what) VALUES \
                            (?1, ?2, ?3, {NOW}, ?4)
                         ON CONFLICT DO UPDATE SET what = excluded.what, domain = excluded.domain"
                    );
                    tx.execute(&sql, params![instance, about, claimant.domain, what])?;
                    Event::of("problem", claimant).with(format!("{about}: {what}"))
                }
                None => {
                    tx.execute(
                        "DELETE FROM problems WHERE instance_uuid = ?1 AND about = \
                        ?2",
                        [&instance, about],
                    )?;
                    // Of a guest that is gone the record knows the name.
                    let domain =
                        known.map_or_else(|| claimant.domain.clone(), |(_, domain)| domain);
                    Event::of("solved", &Claimant { domain, ..claimant.clone() })
                        .with(about.to_owned())
                }
            };
            let event = match device {
                Some(device) => event.about(device),
                None => event,
            };
            record(tx, context, &event)?;
            Ok(true)
        })
    }
}
