//! Choosing the devices of a claim: reads, asks the judge, writes nothing.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::rc::Rc;

use rusqlite::params_from_iter;
use virt_usb_model::{DeviceId, Selector, matching};

use crate::claim::{
    ClaimMode, ClaimRequest, ClaimVerifier, Claimant, Granted, Obstacle, SHOWN, Shortage, Verified,
    Why,
};
use crate::device::{ClaimRow, Location, Record};
use crate::error::Sql;
use crate::open::Tx;
use crate::query::{self, Query};
use crate::release;

/// Number of mismatched candidates after which the inventory counts as outdated and the search
/// ends.
const MAX_PASSED_OVER: usize = 256;

pub(crate) struct Choice<'a> {
    pub(crate) tx: &'a Tx<'a>,
    pub(crate) claimant: &'a Claimant,
    pub(crate) prefer: &'a [DeviceId],
    pub(crate) mode: ClaimMode,
    verifier: &'a mut dyn ClaimVerifier,
    /// Claims of the instance.
    mine: Vec<ClaimRow>,
    verified: BTreeMap<DeviceId, Location>,
    passed_over: BTreeMap<DeviceId, String>,
    /// The rows that were read for a selector. The write lock is held: they are read once, and once
    /// more after the first device was passed over, as many then as can be needed.
    found: HashMap<Selector, Vec<Rc<Record>>>,
    wide: bool,
}

/// The candidates of all requests, each once.
#[derive(Default)]
struct Pool {
    devices: Vec<Rc<Record>>,
    positions: BTreeMap<DeviceId, usize>,
}

impl Pool {
    fn place(&mut self, device: Rc<Record>) -> usize {
        let next = self.devices.len();
        let at = *self.positions.entry(device.entry.id).or_insert(next);
        if at == next {
            self.devices.push(device);
        }
        at
    }
}

/// A device that serves a request, both by position.
type Served = (usize, usize);

impl<'a> Choice<'a> {
    pub(crate) fn new(
        tx: &'a Tx<'a>,
        claimant: &'a Claimant,
        prefer: &'a [DeviceId],
        mode: ClaimMode,
        verifier: &'a mut dyn ClaimVerifier,
    ) -> Sql<Self> {
        let mine = release::held(tx, claimant.instance)?;
        let (verified, passed_over, found) = <_>::default();
        Ok(Self {
            tx,
            claimant,
            prefer,
            mode,
            verifier,
            mine,
            verified,
            passed_over,
            found,
            wide: false,
        })
    }

    pub(crate) fn mine(&self) -> &[ClaimRow] {
        &self.mine
    }

    /// Leaves these devices to others.
    pub(crate) fn pass_over(&mut self, devices: impl IntoIterator<Item = DeviceId>, why: &str) {
        self.passed_over.extend(devices.into_iter().map(|id| (id, why.to_owned())));
    }

    pub(crate) fn fits(&mut self, chosen: &[Granted]) -> Result<(), String> {
        self.verifier.fits(chosen)
    }

    /// Devices for all of `requests`, or what is missing. Each round either ends or passes over a
    /// device more.
    pub(crate) fn choose(
        &mut self,
        requests: &[ClaimRequest],
    ) -> Sql<Result<Vec<Granted>, Vec<Shortage>>> {
        let total: usize = requests.iter().map(|w| w.request.count as usize).sum();
        loop {
            if !self.wide && !self.passed_over.is_empty() {
                self.wide = true;
                self.found.clear();
            }
            let mut pool = Pool::default();
            // One row a device that is needed.
            let (mut rows, mut numbers) = (Vec::new(), Vec::new());
            for (number, request) in requests.iter().enumerate() {
                let candidates = self.candidates(number, request, total)?;
                let row: Vec<usize> = candidates.into_iter().map(|d| pool.place(d)).collect();
                for _ in 0..request.request.count {
                    rows.push(row.clone());
                    numbers.push(number);
                }
            }
            let assigned = matching::assign_in_order(&rows, &self.order(&pool), pool.devices.len());
            let served: Vec<Served> = numbers
                .iter()
                .zip(assigned)
                .filter_map(|(&number, got)| Some((number, got?)))
                .collect();
            if served.len() < rows.len() {
                return self.shortages(requests, &pool, &served).map(Err);
            }
            if self.verify(served.iter().map(|&(_, at)| &*pool.devices[at])) {
                let granted = |&(number, at): &Served| self.granted(&pool.devices[at], number);
                return Ok(Ok(served.iter().map(granted).collect()));
            }
        }
    }

    /// The candidates in the order in which they are wanted by all requests together: the
    /// preferred, the instance's others, free ones. What the instance holds is in an order of its
    /// own, so that it is chosen again.
    fn order(&self, pool: &Pool) -> Vec<usize> {
        let mut order: Vec<usize> = (0..pool.devices.len()).collect();
        order.sort_by_key(|at| {
            let id = pool.devices[*at].entry.id;
            let (preferred, mine) =
                (self.prefer.contains(&id), self.mine.iter().any(|c| c.device_id == id));
            (!preferred, !mine, (preferred || mine).then_some(id))
        });
        order
    }

    /// Verifies each chosen device; false if one did not match, and the choice must be repeated.
    fn verify<'b>(&mut self, chosen: impl Iterator<Item = &'b Record>) -> bool {
        let mut all = true;
        for device in chosen {
            let id = device.entry.id;
            if self.verified.contains_key(&id) {
                continue;
            }
            match self.verifier.verify(device) {
                Verified::Here(seen) => {
                    self.verified.insert(id, seen);
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
        let stored = device.location();
        if let Some(seen) = self.verified.get(&device.entry.id) {
            device.set_location(seen.clone());
        }
        let already = self.mine.iter().any(|c| c.device_id == device.entry.id);
        Granted { device, request, already, stored }
    }

    /// The devices that would serve the request, the most wanted first: the preferred, those that
    /// serve it already, the instance's others, free ones. Of the free ones at most as many as all
    /// requests together need: more cannot change whether all can be served.
    fn candidates(
        &mut self,
        number: usize,
        request: &ClaimRequest,
        total: usize,
    ) -> Sql<Vec<Rc<Record>>> {
        if self.passed_over.len() > MAX_PASSED_OVER {
            return Ok(Vec::new());
        }
        let selector = &request.request.selector;
        if !self.found.contains_key(selector) {
            let most = if self.wide { total + MAX_PASSED_OVER } else { total };
            let read = self.read(selector, most)?;
            self.found.insert(selector.clone(), read);
        }
        let of_selector = self.found.get(selector).into_iter().flatten();
        let mut found: Vec<Rc<Record>> =
            of_selector.filter(|d| !self.passed_over.contains_key(&d.entry.id)).cloned().collect();
        found.sort_by_key(|d| {
            let claim = self.mine.iter().find(|c| c.device_id == d.entry.id);
            let serves_it = claim.is_some_and(|c| c.request.is_some_and(|r| r as usize == number));
            (!self.prefer.contains(&d.entry.id), !serves_it, claim.is_none())
        });
        Ok(found)
    }

    /// Reads what a selector finds: the preferred, the instance's others, at most `most` free ones.
    fn read(&self, selector: &Selector, most: usize) -> Sql<Vec<Rc<Record>>> {
        let mut found = Vec::new();
        let (test, find) = (query::test(selector), query::find(selector));
        for id in self.prefer {
            found.extend(self.gather(
                &test,
                "d.status = 'available' AND d.id = CAST(? AS INTEGER)",
                Some(id.to_string()),
                1,
            )?);
        }
        if !self.mine.is_empty() && self.mode != ClaimMode::Add {
            let instance = self.claimant.instance.to_string();
            // Like the agent, no start gives a guest what waits for an operator, though the guest
            // holds it.
            let condition = "d.instance_uuid = ? AND d.quarantined IS NULL";
            found.extend(self.gather(&test, condition, Some(instance), usize::MAX)?);
        }
        found.extend(self.gather(&find, "d.status = 'available'", None, most)?);
        let mut seen = BTreeSet::new();
        found.retain(|d| seen.insert(d.entry.id));
        Ok(found.into_iter().map(Rc::new).collect())
    }

    /// At most `most` devices of the query that this instance may have.
    fn gather(
        &self,
        query: &Query,
        condition: &str,
        value: Option<String>,
        most: usize,
    ) -> Sql<Vec<Record>> {
        let mut statement = self.tx.prepare_cached(&query.sorted("d.*", condition))?;
        let params = query.params.iter().cloned().chain(value.map(Into::into));
        let mut rows = statement.query(params_from_iter(params))?;
        let mut found = Vec::new();
        while found.len() < most
            && let Some(row) = rows.next()?
        {
            let device = Record::read(row)?;
            // An incoming guest keeps the devices that it already holds, even if they are now
            // reserved for other projects.
            let is_mine = || self.mine.iter().any(|c| c.device_id == device.entry.id);
            let keeps = self.mode == ClaimMode::Provisional && is_mine();
            if keeps || device.is_for(self.claimant.project.as_ref()) {
                found.push(device);
            }
        }
        Ok(found)
    }

    fn shortages(
        &self,
        requests: &[ClaimRequest],
        pool: &Pool,
        served: &[Served],
    ) -> Sql<Vec<Shortage>> {
        let taken: BTreeMap<DeviceId, usize> =
            served.iter().map(|&(number, at)| (pool.devices[at].entry.id, number)).collect();
        let mut short = Vec::new();
        for (number, request) in requests.iter().enumerate() {
            let got = taken.values().filter(|&&n| n == number).count();
            if got < request.request.count as usize {
                short.push(self.shortage(number, request, got, &taken)?);
            }
        }
        Ok(short)
    }

    /// Looks up what else matches a request that cannot be served, whatever its state.
    fn shortage(
        &self,
        number: usize,
        request: &ClaimRequest,
        got: usize,
        taken: &BTreeMap<DeviceId, usize>,
    ) -> Sql<Shortage> {
        let query = query::find(&request.request.selector);
        let params = || params_from_iter(&query.params);
        let total = self.tx.query_row(&query.sql("count(*)", "1"), params(), |row| row.get(0))?;
        let mut statement = self.tx.prepare(&query.sql("d.*", "1"))?;
        let mut rows = statement.query(params())?;
        let mut matching = Vec::new();
        while matching.len() < SHOWN
            && let Some(row) = rows.next()?
        {
            let device = Record::read(row)?;
            if taken.get(&device.entry.id) != Some(&number) {
                let why = self.why(&device, taken)?;
                matching.push(Obstacle { device, why });
            }
        }
        let got = u32::try_from(got).unwrap_or(u32::MAX);
        Ok(Shortage { number, request: request.request.clone(), got, matching, total })
    }

    fn why(&self, device: &Record, taken: &BTreeMap<DeviceId, usize>) -> Sql<Why> {
        let id = device.entry.id;
        if !device.is_for(self.claimant.project.as_ref()) {
            return Ok(Why::Project);
        }
        if let Some(claim) = release::holder(self.tx, id, self.claimant.instance)? {
            return Ok(Why::HeldBy(Box::new(claim)));
        }
        if device.quarantined.is_some() {
            return Ok(Why::Unavailable);
        }
        Ok(match self.passed_over.get(&id) {
            Some(why) => Why::NotThere(why.clone()),
            None if taken.contains_key(&id)
                || device.entry.instance_uuid == Some(self.claimant.instance) =>
            {
                Why::OtherRequest
            }
            None if device.entry.status_reason.is_some() => Why::Unavailable,
            None => Why::NotThere(
                "it was not checked: too many devices were not at their recorded ports".into(),
            ),
        })
    }
}
