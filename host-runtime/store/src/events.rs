//! The audit: who got what when and why. Append-only.

use rusqlite::{Row, Transaction, params};
use serde::Serialize;
use virt_usb_model::{DeviceId, InstanceId};

use crate::claim::Claimant;
use crate::device::{ClaimRow, parse_some, read_id, sql_id};
use crate::error::Sql;
use crate::{Context, NOW, Store, StoreError};

/// An event to be recorded.
pub(crate) struct Event {
    event: &'static str,
    instance: Option<InstanceId>,
    domain: Option<String>,
    project: Option<String>,
    device: Option<DeviceId>,
    detail: Option<String>,
}

impl Event {
    pub(crate) const fn new(event: &'static str) -> Self {
        Self { event, instance: None, domain: None, project: None, device: None, detail: None }
    }
    pub(crate) fn of(event: &'static str, claimant: &Claimant) -> Self {
        let project = claimant.project.as_ref().map(ToString::to_string);
        Self {
            instance: Some(claimant.instance),
            domain: Some(claimant.domain.clone()),
            project,
            ..Self::new(event)
        }
    }
    pub(crate) fn about_claim(event: &'static str, claim: &ClaimRow) -> Self {
        Self {
            instance: Some(claim.instance_uuid),
            domain: Some(claim.domain.clone()),
            project: claim.project_id.clone(),
            device: Some(claim.device_id),
            ..Self::new(event)
        }
    }
    pub(crate) fn about_instance(event: &'static str, instance: InstanceId) -> Self {
        Self { instance: Some(instance), ..Self::new(event) }
    }
    pub(crate) fn about(self, device: DeviceId) -> Self {
        Self { device: Some(device), ..self }
    }
    pub(crate) fn with(self, detail: String) -> Self {
        Self { detail: Some(detail), ..self }
    }
}

/// The longest detail that is kept, in characters: what people write into requests has no end.
const DETAIL: usize = 1024;

pub(crate) fn record(tx: &Transaction<'_>, context: &Context, event: &Event) -> Sql<()> {
    tx.prepare_cached(&format!(
        "INSERT INTO events (at, event, instance_uuid, domain, project_id, device_id, actor, \
            detail) VALUES ({NOW}, ?1, ?2, ?3, ?4, ?5, ?6, ?7)"
    ))?
    .execute(params![
        event.event,
        event.instance.map(|i| i.to_string()),
        event.domain,
        event.project,
        event.device.map(sql_id),
        context.actor,
        event.detail.as_deref().map(shortened),
    ])?;
    Ok(())
}

fn shortened(detail: &str) -> std::borrow::Cow<'_, str> {
    match detail.char_indices().nth(DETAIL) {
        Some((end, _)) => format!("{}…", &detail[..end]).into(),
        None => detail.into(),
    }
}

/// A recorded event.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct EventRow {
    /// Grows with time.
    pub id: i64,
    /// UTC, ISO 8601.
    pub at: String,
    /// Type of the event: `assigned`, `unassigned`, `claimed`, `allocated`, `detached`, `released`,
    /// `refused`, `voided`, `forced`, `adopted`, `problem`, `solved`, `added`, `changed`,
    /// `removed`, `returned`, `altered`, `flapping`, `steady`, `quarantined`, `cleared`,
    /// `disabled`, `enabled`, `tagged`, `flavor-set`, `flavor-removed`, `owner-set`,
    /// `owner-cleared`, `restored`, `rebuilt`.
    pub event: String,
    /// To which instance.
    pub instance_uuid: Option<InstanceId>,
    /// Name of the domain at the time of the event.
    pub domain: Option<String>,
    /// Owner project of the instance.
    pub project_id: Option<String>,
    /// With which device.
    pub device_id: Option<DeviceId>,
    /// By which program, doing what.
    pub actor: String,
    /// Details of the event.
    pub detail: Option<String>,
}

impl EventRow {
    pub(crate) fn read(row: &Row<'_>) -> Sql<Self> {
        let device: Option<i64> = row.get("device_id")?;
        Ok(Self {
            id: row.get("id")?,
            at: row.get("at")?,
            event: row.get("event")?,
            instance_uuid: parse_some(row, "instance_uuid")?,
            domain: row.get("domain")?,
            project_id: row.get("project_id")?,
            device_id: device.map(|_| read_id(row, "device_id")).transpose()?,
            actor: row.get("actor")?,
            detail: row.get("detail")?,
        })
    }
}

/// Selection of events to read.
#[derive(Debug, Clone, Default)]
pub struct Filter {
    /// Only of this instance.
    pub instance: Option<InstanceId>,
    /// Only of this device.
    pub device: Option<DeviceId>,
    /// Only those that came after the one of this id.
    pub after: i64,
    /// Only those that came before the one of this id; 0: all.
    pub before: i64,
    /// Maximum number of events, newest first; 0 for all.
    pub limit: u32,
}

impl Store {
    /// Returns the instance of the newest event that names the domain `domain`.
    ///
    /// # Errors
    /// When the database cannot be read.
    pub fn last_named(&self, domain: &str) -> Result<Option<InstanceId>, StoreError> {
        let named = self.all(
            "SELECT * FROM events WHERE domain = ?1 AND instance_uuid IS NOT NULL \
             ORDER BY id DESC LIMIT 1",
            params![domain],
            EventRow::read,
        )?;
        Ok(named.into_iter().find_map(|event| event.instance_uuid))
    }

    /// Events, oldest first.
    ///
    /// # Errors
    /// When the database cannot be read.
    pub fn events(&self, filter: &Filter) -> Result<Vec<EventRow>, StoreError> {
        let limit = if filter.limit == 0 { -1 } else { i64::from(filter.limit) };
        let mut events = self.all(
            "SELECT * FROM events WHERE (?1 IS NULL OR instance_uuid = ?1) AND (?2 IS NULL OR \
                device_id = ?2) AND id > ?3
             AND (?4 = 0 OR id < ?4) ORDER BY id DESC LIMIT ?5",
            params![
                filter.instance.map(|i| i.to_string()),
                filter.device.map(sql_id),
                filter.after,
                filter.before,
                limit
            ],
            EventRow::read,
        )?;
        events.reverse();
        Ok(events)
    }

    /// When the newest event was, if the clock has not come that far by more than a minute: it was
    /// set back.
    ///
    /// # Errors
    /// When the database cannot be read.
    pub fn newest_ahead(&self) -> Result<Option<String>, StoreError> {
        let sql = "SELECT at FROM events WHERE id = (SELECT max(id) FROM events) AND at > \
            strftime('%Y-%m-%dT%H:%M:%fZ', 'now', '+60 seconds')";
        Ok(self.all(sql, [], |row| row.get(0))?.pop())
    }

    /// Removes events older than `days` days (at least one), at most [`PRUNED_AT_ONCE`] under one
    /// lock; returns how many.
    ///
    /// The age is measured against `compute_nodes.audit_time`, which a leap of the clock does not
    /// move ([`follow_clock`]). Where no discovery has set it yet, it is measured against the
    /// newest event.
    ///
    /// # Errors
    /// When the database cannot be written.
    pub fn prune_events(&mut self, days: u32) -> Result<usize, StoreError> {
        let age = format!("-{} days", days.max(1));
        let sql = format!(
            "DELETE FROM events WHERE id IN (SELECT id FROM events WHERE at < strftime({ISO}, \
                min({NOW}, coalesce(
                (SELECT max(audit_time) FROM compute_nodes WHERE deleted = 0),
                (SELECT at FROM events ORDER BY id DESC LIMIT 1))), ?1) ORDER BY id LIMIT \
                {PRUNED_AT_ONCE})"
        );
        let mut pruned = 0;
        loop {
            let now = self.write(|tx, _| Ok(tx.execute(&sql, [&age])?))?;
            pruned += now;
            if now < PRUNED_AT_ONCE {
                return Ok(pruned);
            }
        }
    }
}

/// The most events that are removed under one lock.
const PRUNED_AT_ONCE: usize = 10_000;

/// How many times faster than real time the audit's time may follow a clock that is ahead of it. A
/// host that was off for a month has caught up after five days. A clock that is wrong for an hour
/// costs the oldest seven hours of the audit.
const CATCH_UP: f64 = 7.0;

/// A clock that says less is wrong: this format is younger.
const EARLIEST: &str = "'2026-01-01T00:00:00.000Z'";

const ISO: &str = "'%Y-%m-%dT%H:%M:%fZ'";

/// Moves the audit's time towards the clock's, by no more than the time that has passed since the
/// last discovery allows: uptime measures that, which no change of the clock moves. It never moves
/// back, and begins at the newest event.
pub(crate) fn follow_clock(tx: &Transaction<'_>, context: &Context) -> Sql<()> {
    let then: Option<f64> = tx
        .prepare_cached("SELECT scanned_uptime FROM compute_nodes WHERE deleted = 0")?
        .query_row([], |row| row.get(0))?;
    // Less than before: the host has booted since.
    let passed = then
        .filter(|then| *then <= context.uptime)
        .map_or(context.uptime, |then| context.uptime - then);
    let sql = format!(
        "UPDATE compute_nodes SET scanned_uptime = ?1, audit_time = coalesce(
             max(audit_time, min({NOW}, coalesce(strftime({ISO}, audit_time, ?2), audit_time))),
             max({EARLIEST}, min({NOW}, coalesce((SELECT at FROM events ORDER BY id DESC LIMIT 1), \
             {NOW}))))
         WHERE deleted = 0"
    );
    let ahead = format!("+{:.3} seconds", passed * CATCH_UP);
    tx.prepare_cached(&sql)?.execute(params![context.uptime, ahead])?;
    Ok(())
}
