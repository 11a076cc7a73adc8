//! Taking devices for an instance: all that it asks for, or none.
//!
//! ```text
//! write lock ─► sweep what is void ─► candidates ─► matching ─► verify each chosen one ─► fits? ─► write ─► commit
//!                                         ▲                            │ not who it was
//!                                         └────────────────────────────┘
//! ```
//! Everything happens under the write lock: of two hooks that run at once, the second sees what the first has done.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use rusqlite::{OptionalExtension, Transaction, params, params_from_iter};
use serde::Serialize;
use virt_usb_model::{BusAddress, DeviceId, DeviceRequest, InstanceId, ProjectId, matching};

use crate::device::{ClaimRow, Record, refresh, sql_id, step_revision};
use crate::error::Sql;
use crate::events::{Event, record};
use crate::open::Fault;
use crate::{Context, NOW, Store, StoreError, give_back, hints, query};

/// For whom devices are taken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Asker {
    /// The instance.
    pub instance: InstanceId,
    /// The domain's name, for messages.
    pub domain: String,
    /// The project that owns it; `None`: unknown.
    pub project: Option<ProjectId>,
}

/// One request of the instance.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Want {
    /// What is asked for.
    pub request: DeviceRequest,
    /// Whether the claim outlives the run of the guest.
    pub lasting: bool,
}

/// Whether a claim stands, or waits for the step that follows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Standing {
    /// Made at prepare.
    Firm,
    /// Made by an incoming restore or migration: void unless confirmed within [`crate::PENDING_SECONDS`].
    Pending,
}

/// What is really at a candidate's port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verified {
    /// The device, under this address.
    Here(BusAddress),
    /// Not the device: why, in words.
    Not(String),
}

/// What is asked of the world while devices are chosen. Called under the write lock: must be quick.
pub trait Judge {
    /// Looks at the candidate's port.
    fn verify(&mut self, candidate: &Record) -> Verified;
    /// Whether the guest can take these devices; `Err` says why not.
    ///
    /// # Errors
    /// The reason, in words, to be shown to the user.
    fn fits(&mut self, chosen: &[Granted]) -> Result<(), String>;
}

/// A device that the instance has now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Granted {
    /// The device, its address as verified.
    pub device: Record,
    /// Which request it serves, counted from 0.
    pub request: usize,
    /// Whether it was the instance's already.
    pub already: bool,
}

/// How a claim ended.
#[derive(Debug, Clone, PartialEq)]
pub enum Claimed {
    /// The instance has all that it asked for.
    Granted(Vec<Granted>),
    /// Not enough devices; nothing was taken.
    Short(Vec<Shortage>),
    /// The guest cannot take them; nothing was taken.
    Unfit(String),
}

/// A request that cannot be served, and what there is for it.
#[derive(Debug, Clone, PartialEq)]
pub struct Shortage {
    /// The request's position, counted from 0.
    pub number: usize,
    /// The request.
    pub request: DeviceRequest,
    /// How many of `count` could be had.
    pub got: u32,
    /// The devices of this host that match, with what stands in the way of each. At most [`SHOWN`].
    pub matching: Vec<Obstacle>,
    /// How many match in all.
    pub total: usize,
}

/// How many devices a shortage lists.
pub const SHOWN: usize = 8;

/// What stands between a request and one device that matches it.
#[derive(Debug, Clone, PartialEq)]
pub struct Obstacle {
    /// The device.
    pub device: Record,
    /// Why it cannot be had.
    pub why: Why,
}

/// Why a matching device cannot be had.
#[derive(Debug, Clone, PartialEq)]
pub enum Why {
    /// Another instance has it.
    HeldBy(Box<ClaimRow>),
    /// It serves another request of the same instance.
    OtherRequest,
    /// It is not offered.
    Unavailable,
    /// It is for other projects.
    Project,
    /// It is not at its port: the words of [`Verified::Not`].
    NotThere(String),
}

/// After so many candidates that were not who the inventory says, it is out of date: no more are tried.
const MAX_PASSED_OVER: usize = 256;

impl Store {
    /// Takes all devices that `wants` asks for, or none. Asked twice, the answer is the same claim. What the instance holds
    /// beyond that (an older flavor's) is given back. `prefer` lists devices to be chosen before others.
    ///
    /// # Errors
    /// When the database cannot be written; then nothing was taken.
    pub fn claim(
        &mut self,
        asker: &Asker,
        wants: &[Want],
        prefer: &[DeviceId],
        standing: Standing,
        judge: &mut dyn Judge,
        context: &Context,
    ) -> Result<Claimed, StoreError> {
        let outcome = self.write(|tx, state_dir| {
            give_back::sweep(tx, context)?;
            let mut choice = Choice::new(tx, asker, prefer, judge)?;
            let chosen = match choice.choose(wants)? {
                Ok(chosen) => chosen,
                Err(short) => {
                    let detail = format!("request {}: {}", short[0].number, short[0].request);
                    record(tx, context, &Event::of("refused", asker).with(detail))?;
                    return Ok(Claimed::Short(short));
                }
            };
            if let Err(why) = choice.judge.fits(&chosen) {
                record(tx, context, &Event::of("refused", asker).with(why.clone()))?;
                return Ok(Claimed::Unfit(why));
            }
            let grant = Grant { tx, state_dir, asker, standing, context };
            grant.write(wants, &chosen, &choice.mine)?;
            Ok(Claimed::Granted(chosen))
        })?;
        self.bound_wal()?;
        Ok(outcome)
    }
}

/// Choosing: reads only, but for nothing.
struct Choice<'a> {
    tx: &'a Transaction<'a>,
    asker: &'a Asker,
    prefer: &'a [DeviceId],
    judge: &'a mut dyn Judge,
    /// What the instance holds already.
    mine: Vec<ClaimRow>,
    verified: BTreeMap<DeviceId, BusAddress>,
    passed_over: BTreeMap<DeviceId, String>,
}

type Chosen = Result<Vec<Granted>, Vec<Shortage>>;

impl<'a> Choice<'a> {
    fn new(
        tx: &'a Transaction<'a>,
        asker: &'a Asker,
        prefer: &'a [DeviceId],
        judge: &'a mut dyn Judge,
    ) -> Sql<Self> {
        let mine = give_back::held(tx, asker.instance)?;
        Ok(Self { tx, asker, prefer, judge, mine, verified: BTreeMap::new(), passed_over: BTreeMap::new() })
    }

    fn choose(&mut self, wants: &[Want]) -> Sql<Chosen> {
        let total: usize = wants.iter().map(|w| w.request.count as usize).sum();
        loop {
            let mut pool: Vec<Record> = Vec::new();
            let mut rows = Vec::new();
            for (number, want) in wants.iter().enumerate() {
                let row = self.candidates(number, want, total, &mut pool)?;
                rows.extend((0..want.request.count).map(|_| (number, row.clone())));
            }
            let lists: Vec<Vec<usize>> = rows.iter().map(|(_, row)| row.clone()).collect();
            let served = matching::assign(&lists, pool.len());
            let short: BTreeSet<usize> = rows
                .iter()
                .zip(&served)
                .filter(|(_, got)| got.is_none())
                .map(|((number, _), _)| *number)
                .collect();
            let used: Vec<(usize, usize)> =
                rows.iter().zip(&served).filter_map(|((number, _), got)| Some((*number, (*got)?))).collect();
            if !short.is_empty() {
                let taken: BTreeSet<DeviceId> = used.iter().map(|(_, c)| pool[*c].entry.id).collect();
                return short
                    .iter()
                    .map(|&n| self.shortage(n, &wants[n], &used, &taken))
                    .collect::<Sql<_>>()
                    .map(Err);
            }
            if self.verify(used.iter().map(|(_, c)| &pool[*c])) {
                return Ok(Ok(used.into_iter().map(|(number, c)| self.granted(&pool[c], number)).collect()));
            }
        }
    }

    /// Looks at each chosen device; false when one was not who it should be, and the choice must be made anew.
    fn verify<'b>(&mut self, chosen: impl Iterator<Item = &'b Record>) -> bool {
        let mut all = true;
        for device in chosen {
            let id = device.entry.id;
            if self.verified.contains_key(&id) {
                continue;
            }
            match self.judge.verify(device) {
                Verified::Here(address) => {
                    self.verified.insert(id, address);
                }
                Verified::Not(why) => {
                    self.passed_over.insert(id, why);
                    all = false;
                }
            }
        }
        all
    }

    fn granted(&self, device: &Record, request: usize) -> Granted {
        let mut device = device.clone();
        if let Some(address) = self.verified.get(&device.entry.id) {
            device.entry.address = *address;
            device.entry.bus_id = address.bus();
            device.entry.device_id = address.device();
        }
        let already = self.mine.iter().any(|c| c.device_id == device.entry.id);
        Granted { device, request, already }
    }

    /// Positions in `pool` of the devices that would serve the request, the most wanted first. At most as many as
    /// all requests together need, and one more for each that was passed over: more cannot change whether all can be served.
    fn candidates(
        &self,
        number: usize,
        want: &Want,
        total: usize,
        pool: &mut Vec<Record>,
    ) -> Sql<Vec<usize>> {
        let mut found: Vec<Record> = Vec::new();
        if self.passed_over.len() > MAX_PASSED_OVER {
            return Ok(Vec::new());
        }
        let clause = query::clause(&want.request.selector);
        let mut gather = |condition: &str, extra: Option<String>, most: usize| -> Sql<()> {
            let sql = format!(
                "SELECT d.* FROM usb_devices d WHERE {} AND d.deleted = 0 AND {condition} ORDER BY d.id",
                clause.sql
            );
            let mut statement = self.tx.prepare_cached(&sql)?;
            let params = clause.params.iter().cloned().chain(extra.map(Into::into));
            let mut rows = statement.query(params_from_iter(params))?;
            let before = found.len();
            while found.len() - before < most {
                let Some(row) = rows.next()? else { break };
                let device = Record::read(row)?;
                if self.allowed(&device) && !self.passed_over.contains_key(&device.entry.id) {
                    found.push(device);
                }
            }
            Ok(())
        };
        for id in self.prefer {
            gather("d.status = 'available' AND d.id = CAST(? AS INTEGER)", Some(id.to_string()), 1)?;
        }
        gather("d.instance_uuid = ?", Some(self.asker.instance.to_string()), usize::MAX)?;
        gather("d.status = 'available'", None, total)?;
        let rank = |d: &Record| {
            let claim = self.mine.iter().find(|c| c.device_id == d.entry.id);
            let same_request = claim.is_some_and(|c| c.request.is_some_and(|r| r as usize == number));
            (!self.prefer.contains(&d.entry.id), !same_request, claim.is_none())
        };
        found.sort_by_key(rank);
        let mut row = Vec::new();
        for device in found {
            let at = match pool.iter().position(|p| p.entry.id == device.entry.id) {
                Some(at) => at,
                None => {
                    pool.push(device);
                    pool.len() - 1
                }
            };
            if !row.contains(&at) {
                row.push(at);
            }
        }
        Ok(row)
    }

    fn allowed(&self, device: &Record) -> bool {
        let projects = &device.entry.projects;
        projects.is_empty()
            || self.asker.project.as_ref().is_some_and(|mine| projects.iter().any(|p| p.is(mine)))
    }

    /// Looks up what matches a request that cannot be served, whatever its state.
    fn shortage(
        &self,
        number: usize,
        want: &Want,
        used: &[(usize, usize)],
        taken: &BTreeSet<DeviceId>,
    ) -> Sql<Shortage> {
        let clause = query::clause(&want.request.selector);
        let count = format!("SELECT count(*) FROM usb_devices d WHERE {} AND d.deleted = 0", clause.sql);
        let total = self.tx.query_row(&count, params_from_iter(clause.params.iter()), |row| row.get(0))?;
        let sql = format!(
            "SELECT d.* FROM usb_devices d WHERE {} AND d.deleted = 0 ORDER BY d.id LIMIT {SHOWN}",
            clause.sql
        );
        let devices: Vec<Record> = self
            .tx
            .prepare(&sql)?
            .query_map(params_from_iter(clause.params.iter()), Record::read)?
            .collect::<Sql<_>>()?;
        let mut obstacles = Vec::new();
        for device in devices {
            let why = self.why(&device, taken)?;
            obstacles.push(Obstacle { device, why });
        }
        let got = used.iter().filter(|(n, _)| *n == number).count();
        let request = want.request.clone();
        Ok(Shortage {
            number,
            request,
            got: u32::try_from(got).unwrap_or(u32::MAX),
            matching: obstacles,
            total,
        })
    }

    fn why(&self, device: &Record, taken: &BTreeSet<DeviceId>) -> Sql<Why> {
        let id = device.entry.id;
        if !self.allowed(device) {
            return Ok(Why::Project);
        }
        let holder = self
            .tx
            .prepare_cached("SELECT * FROM claims WHERE device_id = ?1 AND instance_uuid <> ?2")?
            .query_row(params![sql_id(id), self.asker.instance.to_string()], ClaimRow::read)
            .optional()?;
        Ok(match holder {
            Some(claim) => Why::HeldBy(Box::new(claim)),
            None => match self.passed_over.get(&id) {
                Some(why) => Why::NotThere(why.clone()),
                None if taken.contains(&id) => Why::OtherRequest,
                None if device.entry.status_reason.is_some() => Why::Unavailable,
                None => Why::NotThere(
                    "it was not looked at: too many devices were not where the inventory has them".into(),
                ),
            },
        })
    }
}

/// Writing what was chosen: decides nothing.
struct Grant<'a> {
    tx: &'a Transaction<'a>,
    state_dir: &'a Path,
    asker: &'a Asker,
    standing: Standing,
    context: &'a Context,
}

impl Grant<'_> {
    fn write(&self, wants: &[Want], chosen: &[Granted], mine: &[ClaimRow]) -> Result<(), Fault> {
        let unchanged = self.standing == Standing::Firm
            && chosen.len() == mine.len()
            && chosen.iter().all(|g| self.is_as_was(g, wants, mine));
        if unchanged {
            return Ok(());
        }
        step_revision(self.tx)?;
        let kept: BTreeSet<DeviceId> = chosen.iter().map(|g| g.device.entry.id).collect();
        // What was adopted from the domain's own XML was never asked for: it stays until release.
        for claim in mine.iter().filter(|c| c.request.is_some() && !kept.contains(&c.device_id)) {
            give_back::delete(self.tx, claim, "released", "no longer asked for", self.context)?;
        }
        if !chosen.is_empty() {
            hints::add(self.state_dir, hints::Known::Instance(self.asker.instance))?;
        }
        for granted in chosen {
            let lasting = wants.get(granted.request).is_some_and(|w| w.lasting);
            self.claim(granted, lasting, mine)?;
        }
        self.metadata(chosen)?;
        Ok(())
    }

    /// Nothing to write for this one: the same claim, the same request, firm, of this boot, the address as stored.
    fn is_as_was(&self, granted: &Granted, wants: &[Want], mine: &[ClaimRow]) -> bool {
        let hold = hold_name(wants.get(granted.request).is_some_and(|w| w.lasting));
        let stored = self.stored_address(granted.device.entry.id);
        mine.iter().any(|c| {
            c.device_id == granted.device.entry.id
                && c.request.is_some_and(|r| r as usize == granted.request)
                && !c.pending
                && c.hold == hold
                && c.boot_id == self.context.boot_id
        }) && stored.is_ok_and(|text| text == granted.device.entry.address.to_string())
    }

    fn stored_address(&self, id: DeviceId) -> Sql<String> {
        self.tx
            .prepare_cached("SELECT address FROM usb_devices WHERE id = ?1")?
            .query_row([sql_id(id)], |row| row.get(0))
    }

    fn claim(&self, granted: &Granted, lasting: bool, mine: &[ClaimRow]) -> Sql<()> {
        let device = granted.device.entry.id;
        let pending = (self.standing == Standing::Pending).then_some(self.context.uptime);
        let sql = format!(
            "INSERT INTO claims (created_at, device_id, instance_uuid, domain, project_id, request, state, hold, pending_since, boot_id, revision)
             VALUES ({NOW}, ?1, ?2, ?3, ?4, ?5, 'claimed', ?6, ?7, ?8, (SELECT max(revision) FROM compute_nodes))
             ON CONFLICT (device_id) DO UPDATE SET domain = excluded.domain, project_id = excluded.project_id, request = excluded.request,
             hold = excluded.hold, boot_id = excluded.boot_id, revision = excluded.revision, pending_since = excluded.pending_since
             WHERE instance_uuid = excluded.instance_uuid"
        );
        self.tx.prepare_cached(&sql)?.execute(params![
            sql_id(device),
            self.asker.instance.to_string(),
            self.asker.domain,
            self.asker.project.as_ref().map(ToString::to_string),
            u32::try_from(granted.request).unwrap_or(u32::MAX),
            hold_name(lasting),
            pending,
            self.context.boot_id,
        ])?;
        let address = granted.device.entry.address;
        self.tx
            .prepare_cached("UPDATE usb_devices SET address = ?2, bus_id = ?3, device_id = ?4 WHERE id = ?1 AND address <> ?2")?
            .execute(params![sql_id(device), address.to_string(), address.bus(), address.device()])?;
        refresh(self.tx, device)?;
        if mine.iter().any(|c| c.device_id == device) {
            return Ok(());
        }
        let detail = match self.standing {
            Standing::Firm => format!("request {}", granted.request),
            Standing::Pending => format!("request {}, to be confirmed", granted.request),
        };
        record(self.tx, self.context, &Event::of("claimed", self.asker).about(device).with(detail))
    }

    /// Nova's table: what was assigned to the instance.
    fn metadata(&self, chosen: &[Granted]) -> Sql<()> {
        let value: Vec<_> = chosen.iter().map(|g| Assigned::of(&g.device)).collect();
        let text = serde_json::to_string(&value).unwrap_or_default();
        give_back::write_metadata(self.tx, self.asker.instance, Some(&text))
    }
}

#[derive(Serialize)]
struct Assigned<'a> {
    id: DeviceId,
    vendor_id: virt_usb_model::VendorId,
    product_id: virt_usb_model::ProductId,
    #[serde(skip_serializing_if = "Option::is_none")]
    serial: Option<&'a str>,
    address: BusAddress,
}

impl<'a> Assigned<'a> {
    fn of(device: &'a Record) -> Self {
        let entry = &device.entry;
        Self {
            id: entry.id,
            vendor_id: entry.vendor_id,
            product_id: entry.product_id,
            serial: entry.serial.as_deref(),
            address: entry.address,
        }
    }
}

const fn hold_name(lasting: bool) -> &'static str {
    if lasting { "instance" } else { "running" }
}
