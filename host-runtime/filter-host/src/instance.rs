//! An instance of a filter with one inventory. Every call is limited, and every answer is checked.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};
use virt_usb_model::scheduling::{Placement, Question, Selection, Verdict};
use virt_usb_model::{DeviceId, Status};
use wasmtime::component::ResourceAny;
use wasmtime::{ResourceLimiter, Store, Trap, UpdateDeadline};

use crate::bindings::{self, FilterPre, Guest, clean, wit};
use crate::error::Fault;
use crate::filter::cause;
use crate::{Error, Filter, Limits, Statistics};

/// Data of the store beside the instance.
pub(crate) struct State {
    max_memory: usize,
    memory: usize,
    elements: usize,
    exceeded: bool,
    /// Processor time of the thread at the start of the call.
    began: Duration,
}

/// Processor time of this thread. Unlike wall time, it does not depend on other load.
fn processor_time() -> Duration {
    let now = clock_gettime(ClockId::ThreadCPUTime);
    Duration::try_from(now).unwrap_or_default()
}

/// Maximum number of elements in all tables, of at most 16 bytes each.
const MAX_TABLE_ELEMENTS: usize = 1 << 20;
/// Maximum number of memories, of tables, and of core instances. Components have a handful of each.
const MAX_PARTS: usize = 64;

impl ResourceLimiter for State {
    fn memory_growing(
        &mut self,
        now: usize,
        wanted: usize,
        _: Option<usize>,
    ) -> wasmtime::Result<bool> {
        // Sum over all memories of the instance.
        let all = self.memory.saturating_add(wanted.saturating_sub(now));
        let fits = all <= self.max_memory;
        match fits {
            true => self.memory = all,
            false => self.exceeded = true,
        }
        Ok(fits)
    }

    fn memory_grow_failed(&mut self, e: wasmtime::Error) -> wasmtime::Result<()> {
        // A filter that received the error would trap in its own way, or continue without the
        // memory.
        Err(e)
    }

    fn table_growing(
        &mut self,
        now: usize,
        wanted: usize,
        _: Option<usize>,
    ) -> wasmtime::Result<bool> {
        let all = self.elements.saturating_add(wanted.saturating_sub(now));
        let fits = all <= MAX_TABLE_ELEMENTS;
        if fits {
            self.elements = all;
        }
        Ok(fits)
    }

    fn instances(&self) -> usize {
        MAX_PARTS
    }

    fn tables(&self) -> usize {
        MAX_PARTS
    }

    fn memories(&self) -> usize {
        MAX_PARTS
    }
}

/// An instance of a filter. After a fault it must not be used again.
pub(crate) struct Instance {
    filter: Filter,
    store: Store<State>,
    bindings: bindings::Filter,
    inventory: ResourceAny,
}

/// A question that the instance has prepared.
#[derive(Clone, Copy)]
pub(crate) struct PreparedHandle(ResourceAny);

impl Instance {
    pub(crate) fn new(filter: &Filter, pre: &FilterPre<State>) -> Result<Self, Error> {
        let Limits { memory: max_memory, epoch } = filter.limits();
        let began = processor_time();
        let state = State { max_memory, memory: 0, elements: 0, exceeded: false, began };
        let mut store = Store::new(pre.engine(), state);
        store.limiter(|state| state);
        store.epoch_deadline_callback(move |store| {
            let is_over = processor_time().saturating_sub(store.data().began) >= epoch;
            Ok(if is_over { UpdateDeadline::Interrupt } else { UpdateDeadline::Continue(1) })
        });
        store.set_epoch_deadline(1);
        let created = pre.instantiate(&mut store).and_then(|bindings| {
            let inventory =
                bindings.virt_usb_scheduler_inventory().inventory().call_constructor(&mut store)?;
            Ok((bindings, inventory))
        });
        match created {
            Ok((bindings, inventory)) => {
                Ok(Self { filter: filter.clone(), store, bindings, inventory })
            }
            Err(e) => Err(broken(filter, fault(filter, &store, &e))),
        }
    }

    fn call<T>(
        &mut self,
        act: impl FnOnce(&Guest, &mut Store<State>, ResourceAny) -> wasmtime::Result<T>,
    ) -> Result<T, Error> {
        self.store.set_epoch_deadline(1);
        self.store.data_mut().began = processor_time();
        // An earlier call may have handled a failed allocation itself.
        self.store.data_mut().exceeded = false;
        let guest = self.bindings.virt_usb_scheduler_inventory();
        act(guest, &mut self.store, self.inventory)
            .map_err(|e| broken(&self.filter, fault(&self.filter, &self.store, &e)))
    }

    fn invalid_answer(&self, why: String) -> Error {
        broken(&self.filter, Fault::InvalidAnswer(why))
    }

    /// Feeds documents, one per line. Returns the index of each refused line, with the reason.
    pub(crate) fn load(
        &mut self,
        lines: &str,
        received: u64,
        count: usize,
    ) -> Result<Vec<(usize, String)>, Error> {
        let report =
            self.call(|guest, store, at| guest.inventory().call_load(store, at, lines, received))?;
        let reported =
            usize::try_from(report.nodes.saturating_add(report.refused)).unwrap_or(usize::MAX);
        if reported != count {
            return Err(self.invalid_answer(format!(
                "it was fed {count} hosts, but reports {} accepted and {} refused",
                report.nodes, report.refused
            )));
        }
        let problems =
            report.problems.into_iter().map(|p| ((p.line as usize).wrapping_sub(1), clean(&p.why)));
        Ok(problems.filter(|(line, _)| *line < count).collect())
    }

    pub(crate) fn remove(&mut self, host: &str) -> Result<bool, Error> {
        self.call(|guest, store, at| guest.inventory().call_remove(store, at, host))
    }

    pub(crate) fn touch(&mut self, host: &str, received: u64) -> Result<bool, Error> {
        self.call(|guest, store, at| guest.inventory().call_touch(store, at, host, received))
    }

    pub(crate) fn set_status(
        &mut self,
        host: &str,
        device: DeviceId,
        status: Status,
    ) -> Result<bool, Error> {
        self.call(|guest, store, at| {
            guest.inventory().call_set_status(store, at, host, device.get(), status.into())
        })?
        .map_err(refused)
    }

    pub(crate) fn select(
        &mut self,
        question: &Question,
        candidates: Option<&[String]>,
        limit: u32,
        known: &HashSet<Arc<str>>,
    ) -> Result<Selection, Error> {
        let question = question.into();
        let answer = self
            .call(|guest, store, at| {
                guest.inventory().call_select(store, at, &question, candidates, limit)
            })?
            .map_err(refused)?;
        let placement = |p: wit::Placement| Placement { host: p.node, score: p.score };
        let placements = answer.placements.into_iter().map(placement).collect();
        let selection = Selection { matched: answer.matched, placements };
        self.check_selection(&selection, candidates, limit, known)?;
        Ok(selection)
    }

    /// Checks that an answer is consistent, and names only known hosts.
    fn check_selection(
        &self,
        selection: &Selection,
        candidates: Option<&[String]>,
        limit: u32,
        known: &HashSet<Arc<str>>,
    ) -> Result<(), Error> {
        let Selection { matched, placements } = selection;
        let choice = candidates.map_or(known.len(), <[String]>::len);
        if usize::try_from(*matched).is_ok_and(|matched| matched > choice) {
            return Err(
                self.invalid_answer(format!("it reports {matched} matches in {choice} hosts"))
            );
        }
        let max = usize::try_from(limit.min(*matched)).unwrap_or(usize::MAX);
        if placements.len() > max {
            return Err(self.invalid_answer(format!(
                "it names {} hosts, but reports {matched} matches, and {limit} were requested",
                placements.len()
            )));
        }
        if let Some(pair) = placements.windows(2).find(|pair| pair[0].score < pair[1].score) {
            return Err(self.invalid_answer(format!(
                "{:?} comes before {:?}, which has a higher score",
                clean(&pair[0].host),
                clean(&pair[1].host)
            )));
        }
        let mut named: HashSet<&str> = HashSet::with_capacity(placements.len());
        for placement in placements {
            if !named.insert(&placement.host) {
                let host = clean(&placement.host);
                return Err(self.invalid_answer(format!("it names {host:?} twice")));
            }
        }
        let unexpected = match candidates {
            Some(candidates) => {
                for candidate in candidates {
                    named.remove(candidate.as_str());
                }
                named.into_iter().next()
            }
            None => named.into_iter().find(|host| !known.contains(*host)),
        };
        match unexpected {
            Some(host) => Err(self.invalid_answer(format!(
                "it names {:?}, which is not one of the candidates",
                clean(host)
            ))),
            None => Ok(()),
        }
    }

    fn devices(&self, ids: &[u64], question: &Question) -> Result<Vec<DeviceId>, Error> {
        // This check also bounds the number of ids for the checks below.
        if ids.len() != question.devices() {
            return Err(self.invalid_answer(format!(
                "it would use {} devices, but {} were requested",
                ids.len(),
                question.devices()
            )));
        }
        let devices: Vec<DeviceId> = ids.iter().copied().filter_map(DeviceId::new).collect();
        let twice = (1..ids.len()).any(|at| ids[..at].contains(&ids[at]));
        if devices.len() != ids.len() || twice {
            return Err(self.invalid_answer(clean(&format!(
                "it would use the devices {ids:?}: wanted valid ids, each once"
            ))));
        }
        Ok(devices)
    }

    pub(crate) fn explain(&mut self, question: &Question, host: &str) -> Result<Verdict, Error> {
        let wanted = question.into();
        let answer = self
            .call(|guest, store, at| guest.inventory().call_explain(store, at, &wanted, host))?
            .map_err(refused)?;
        self.verdict(answer, question)
    }

    fn verdict(&self, answer: wit::Verdict, question: &Question) -> Result<Verdict, Error> {
        Ok(match answer {
            wit::Verdict::Accepted(accepted) => {
                let devices = self.devices(&accepted.devices, question)?;
                Verdict::Accepted { score: accepted.score, devices }
            }
            wit::Verdict::Rejected(rejection) => Verdict::Rejected(rejection.into()),
        })
    }

    pub(crate) fn prepare(&mut self, question: &Question) -> Result<PreparedHandle, Error> {
        let question = question.into();
        let answer =
            self.call(|guest, store, at| guest.inventory().call_prepare(store, at, &question))?;
        answer.map(PreparedHandle).map_err(refused)
    }

    pub(crate) fn check(
        &mut self,
        prepared: PreparedHandle,
        question: &Question,
        host: &str,
        now: u64,
    ) -> Result<Verdict, Error> {
        let answer =
            self.call(|guest, store, _| guest.prepared().call_check(store, prepared.0, host, now))?;
        self.verdict(answer, question)
    }

    /// Frees a prepared question.
    pub(crate) fn forget(&mut self, prepared: PreparedHandle) -> Result<(), Error> {
        self.call(|_, store, _| prepared.0.resource_drop(store))
    }

    pub(crate) fn statistics(&mut self) -> Result<Statistics, Error> {
        let s = self.call(|guest, store, at| guest.inventory().call_statistics(store, at))?;
        let wit::Statistics { revision, nodes, devices, available, keys } = s;
        Ok(Statistics { revision, hosts: nodes, devices, available, keys })
    }
}

impl Instance {
    /// Size of the instance's memory in bytes.
    pub(crate) fn memory(&self) -> usize {
        self.store.data().memory
    }
}

fn refused(refusal: wit::Refusal) -> Error {
    Error::Refused(bindings::refusal(refusal))
}

fn broken(filter: &Filter, fault: Fault) -> Error {
    Error::Broken { path: filter.path().to_owned(), fault }
}

fn fault(filter: &Filter, store: &Store<State>, e: &wasmtime::Error) -> Fault {
    if store.data().exceeded {
        return Fault::Memory(filter.limits().memory);
    }
    match e.downcast_ref::<Trap>() {
        Some(Trap::Interrupt) => Fault::Time(filter.limits().epoch),
        Some(trap) => Fault::Trap(trap.to_string()),
        // All other errors come from decoding the answer.
        None => Fault::InvalidAnswer(cause(e)),
    }
}
