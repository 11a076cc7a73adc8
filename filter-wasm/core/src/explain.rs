//! One host, and why.

use alloc::vec::Vec;

use virt_usb_model::scheduling::{Question, Rejection, RejectionReason, Verdict};
use virt_usb_model::{DeviceId, matching};

use crate::inventory::Inventory;
use crate::plan::{Plan, Prepared};
use crate::posting::{LANES, bits, split};
use crate::rank;
use crate::refusal::Refusal;

impl Inventory {
    /// Verdict of the filter about one host, with the reason.
    ///
    /// # Errors
    /// [`Refusal::Question`]. A host that is not known is a verdict.
    pub fn explain(&self, question: &Question, host: &str) -> Result<Verdict, Refusal> {
        Ok(self.judge(&Plan::new(self, question)?, host))
    }

    /// The same for a question that was prepared, at another time `now` if it goes by time.
    ///
    /// # Errors
    /// As [`Inventory::explain`].
    pub fn check(
        &self,
        prepared: &mut Prepared,
        host: &str,
        now: Option<u64>,
    ) -> Result<Verdict, Refusal> {
        Ok(self.judge(prepared.plan(self, now)?, host))
    }

    pub(crate) fn judge(&self, plan: &Plan, host: &str) -> Verdict {
        let head = self.find(host);
        if plan.entries.is_empty() {
            let free = head
                .map_or(0, |head| self.chain(head).map(|r| self.available(r).count_ones()).sum());
            return Verdict::Accepted {
                score: rank::score(plan.weights, 0, free).into(),
                devices: Vec::new(),
            };
        }
        let Some(head) = head else {
            return Verdict::Rejected(Rejection::of_host(RejectionReason::UnknownHost));
        };
        let (block, lane) = split(head);
        if plan.is_stale(self.blocks[block as usize].received[lane]) {
            return Verdict::Rejected(Rejection::of_host(RejectionReason::HostStale));
        }
        match plan.serve(self, head, |_| true) {
            Some(served) => Verdict::Accepted {
                score: plan.score(self, head, served).into(),
                devices: self.devices(plan, head),
            },
            None => Verdict::Rejected(self.rejection(plan, head)),
        }
    }

    fn rejection(&self, plan: &Plan, head: u32) -> Rejection {
        for (number, (at, wanted)) in (0u32..).zip(plan.of.iter().copied()) {
            let entry = &plan.entries[at];
            let (mut matching, mut allowed, mut free) = (0, 0, 0);
            for number in self.chain(head) {
                let row = self.row_at(number);
                let word = entry.matching(self, number, row);
                let may = word & !row.withheld(|set| plan.allows(set));
                matching += word.count_ones();
                allowed += may.count_ones();
                free += (may & self.available(number)).count_ones();
            }
            if free >= wanted {
                continue;
            }
            let reason = match () {
                () if matching == 0 => RejectionReason::NoSuchDevice,
                () if allowed == 0 || allowed < wanted && wanted <= matching => {
                    RejectionReason::NotAllowed
                }
                () => RejectionReason::TooFewFree,
            };
            return Rejection { request: Some(number), reason, wanted, matching, allowed, free };
        }
        self.contention(plan, head)
    }

    /// Each request could be served alone: the first that goes short when all are served in turn.
    fn contention(&self, plan: &Plan, head: u32) -> Rejection {
        let wishes = self.wishes(plan, head);
        let served = matching::assign(&wishes.rows, wishes.pool.len());
        let short = wishes
            .requests
            .iter()
            .zip(served)
            .find(|(_, got)| got.is_none())
            .map_or(0, |(r, _)| *r);
        let (at, wanted) = plan.of[short];
        let entry = &plan.entries[at];
        let rows = || self.chain(head).map(|number| (number, self.row_at(number)));
        let count = |mask: &dyn Fn(u32, &crate::inventory::Row) -> u64| {
            rows().map(|(n, row)| (entry.matching(self, n, row) & mask(n, row)).count_ones()).sum()
        };
        Rejection {
            request: Some(short as u32),
            reason: RejectionReason::Contention,
            wanted,
            matching: count(&|_, _| u64::MAX),
            allowed: count(&|_, row| !row.withheld(|set| plan.allows(set))),
            free: count(&|n, row| plan.offered(self, n, row)),
        }
    }

    /// The devices that the hook of a host that serves would claim: the store chooses in the same
    /// way.
    pub(crate) fn devices(&self, plan: &Plan, head: u32) -> Vec<DeviceId> {
        if let ([(_, count)], [entry]) = (plan.of.as_slice(), plan.entries.as_slice()) {
            // A single request gets its first devices.
            let of_row = |number: u32| {
                let row = self.row_at(number);
                let word = entry.matching(self, number, row) & plan.offered(self, number, row);
                bits(word).filter_map(|bit| DeviceId::new(row.devices[bit].id))
            };
            return self.chain(head).flat_map(of_row).take(*count as usize).collect();
        }
        let Wishes { requests, rows, pool } = self.wishes(plan, head);
        let served = matching::assign(&rows, pool.len());
        let mut chosen: Vec<(usize, DeviceId)> = requests
            .into_iter()
            .zip(served)
            .filter_map(|(request, got)| Some((request, pool[got?])))
            .collect();
        chosen.sort_unstable();
        chosen.into_iter().map(|(_, device)| device).collect()
    }

    fn wishes(&self, plan: &Plan, head: u32) -> Wishes {
        let mut wishes = Wishes { requests: Vec::new(), rows: Vec::new(), pool: Vec::new() };
        for number in self.chain(head) {
            let devices = &self.row_at(number).devices;
            wishes.pool.extend(devices.iter().filter_map(|device| DeviceId::new(device.id)));
        }
        for (request, (at, count)) in plan.of.iter().enumerate() {
            let entry = &plan.entries[*at];
            let of_row = |(place, number): (usize, u32)| {
                let row = self.row_at(number);
                let word = entry.matching(self, number, row) & plan.offered(self, number, row);
                bits(word).map(move |bit| place * LANES + bit)
            };
            let row: Vec<usize> = self.chain(head).enumerate().flat_map(of_row).collect();
            wishes.requests.extend(core::iter::repeat_n(request, *count as usize));
            wishes.rows.extend(core::iter::repeat_n(row, *count as usize));
        }
        wishes
    }
}

/// The devices of a host, and the requests that each could serve.
struct Wishes {
    /// A request for each device that is wanted.
    requests: Vec<usize>,
    /// For each of those the free devices that would do, by place in the pool.
    rows: Vec<Vec<usize>>,
    /// All devices of the host, by id.
    pool: Vec<DeviceId>,
}
