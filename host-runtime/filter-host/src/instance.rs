//! One instance of a filter with one inventory in it: every call bounded, every answer looked at.

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
    most: usize,
    memory: usize,
    elements: usize,
    exceeded: bool,
    /// Processor time of the thread when the call began.
    began: Duration,
}

/// The processor time of this thread: on a machine that is busy a call takes longer, and computes
/// no more.
fn computed() -> Duration {
    let now = clock_gettime(ClockId::ThreadCPUTime);
    Duration::try_from(now).unwrap_or_default()
}

/// Maximum number of elements in all tables, of at most 16 bytes each.
const MOST_ELEMENTS: usize = 1 << 20;
/// Memories, tables and core instances, each kind: components that tools make have a handful.
const MOST_PARTS: usize = 64;

impl ResourceLimiter for State {
    fn memory_growing(
        &mut self,
        now: usize,
        wanted: usize,
        _: Option<usize>,
    ) -> wasmtime::Result<bool> {
        // All memories of the instance together.
        let all = self.memory.saturating_add(wanted.saturating_sub(now));
        let fits = all <= self.most;
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
        let fits = all <= MOST_ELEMENTS;
        if fits {
            self.elements = all;
        }
        Ok(fits)
    }

    fn instances(&self) -> usize {
        MOST_PARTS
    }

    fn tables(&self) -> usize {
        MOST_PARTS
    }

    fn memories(&self) -> usize {
        MOST_PARTS
    }
}

/// After a fault an instance must not be used again.
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
        let Limits { memory: most, epoch } = filter.limits();
        let state = State { most, memory: 0, elements: 0, exceeded: false, began: computed() };
        let mut store = Store::new(pre.engine(), state);
        store.limiter(|state| state);
        store.epoch_deadline_callback(move |store| {
            let is_over = computed().saturating_sub(store.data().began) >= epoch;
            Ok(if is_over { UpdateDeadline::Interrupt } else { UpdateDeadline::Continue(1) })
        });
        store.set_epoch_deadline(1);
        let made = pre.instantiate(&mut store).and_then(|bindings| {
            let inventory =
                bindings.virt_usb_scheduler_inventory().inventory().call_constructor(&mut store)?;
            Ok((bindings, inventory))
        });
        match made {
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
        self.store.data_mut().began = computed();
        // One that went on without the memory was not stopped for it.
        self.store.data_mut().exceeded = false;
        let guest = self.bindings.virt_usb_scheduler_inventory();
        act(guest, &mut self.store, self.inventory)
            .map_err(|e| broken(&self.filter, fault(&self.filter, &self.store, &e)))
    }

    fn rubbish(&self, why: String) -> Error {
        broken(&self.filter, Fault::Rubbish(why))
    }

    /// Feeds documents, a line each, and returns the lines that were refused, from 0, with the
    /// reason.
    pub(crate) fn load(
        &mut self,
        lines: &str,
        received: u64,
        count: usize,
    ) -> Result<Vec<(usize, String)>, Error> {
        let report =
            self.call(|guest, store, at| guest.inventory().call_load(store, at, lines, received))?;
        let taken =
            usize::try_from(report.nodes.saturating_add(report.refused)).unwrap_or(usize::MAX);
        if taken != count {
            let told = format!(
                "it was fed {count} hosts, and says that it took {} and refused {}",
                report.nodes, report.refused
            );
            return Err(self.rubbish(told));
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
        let asked = question.into();
        let answer = self
            .call(|guest, store, at| {
                guest.inventory().call_select(store, at, &asked, candidates, limit)
            })?
            .map_err(refused)?;
        let placement = |p: wit::Placement| Placement { host: p.node, score: p.score };
        let placements = answer.placements.into_iter().map(placement).collect();
        let selection = Selection { matched: answer.matched, placements };
        self.look_at(&selection, candidates, limit, known)?;
        Ok(selection)
    }

    /// Checks the answer: a filter may be wrong, but must not name unknown hosts.
    fn look_at(
        &self,
        selection: &Selection,
        candidates: Option<&[String]>,
        limit: u32,
        known: &HashSet<Arc<str>>,
    ) -> Result<(), Error> {
        let Selection { matched, placements } = selection;
        let choice = candidates.map_or(known.len(), <[String]>::len);
        if usize::try_from(*matched).is_ok_and(|matched| matched > choice) {
            return Err(self.rubbish(format!("it says that {matched} hosts of {choice} can serve")));
        }
        let most = usize::try_from(limit.min(*matched)).unwrap_or(usize::MAX);
        if placements.len() > most {
            return Err(self.rubbish(format!(
                "it names {} hosts, of {matched} that it says can serve and {limit} that were \
                 requested",
                placements.len()
            )));
        }
        if let Some(pair) = placements.windows(2).find(|pair| pair[0].score < pair[1].score) {
            return Err(self.rubbish(format!(
                "{:?} stands before {:?}, which scores more",
                clean(&pair[0].host),
                clean(&pair[1].host)
            )));
        }
        let mut named: HashSet<&str> = HashSet::with_capacity(placements.len());
        for placement in placements {
            if !named.insert(&placement.host) {
                return Err(self.rubbish(format!("it names {:?} twice", clean(&placement.host))));
            }
        }
        let stranger = match candidates {
            Some(candidates) => {
                for candidate in candidates {
                    named.remove(candidate.as_str());
                }
                named.into_iter().next()
            }
            None => named.into_iter().find(|host| !known.contains(*host)),
        };
        match stranger {
            Some(host) => {
                Err(self
                    .rubbish(format!("it names {:?}, which was not to choose from", clean(host))))
            }
            None => Ok(()),
        }
    }

    fn devices(&self, ids: &[u64], question: &Question) -> Result<Vec<DeviceId>, Error> {
        // From here on, at most as many as a flavor can request.
        if ids.len() != question.devices() {
            return Err(self.rubbish(format!(
                "it would use {} devices, but {} were requested",
                ids.len(),
                question.devices()
            )));
        }
        let devices: Vec<DeviceId> = ids.iter().copied().filter_map(DeviceId::new).collect();
        let twice = (1..ids.len()).any(|at| ids[..at].contains(&ids[at]));
        if devices.len() != ids.len() || twice {
            return Err(self.rubbish(clean(&format!(
                "it would use the devices {ids:?}: wanted ids, each once"
            ))));
        }
        Ok(devices)
    }

    pub(crate) fn explain(&mut self, question: &Question, host: &str) -> Result<Verdict, Error> {
        let asked = question.into();
        let answer = self
            .call(|guest, store, at| guest.inventory().call_explain(store, at, &asked, host))?
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
        let asked = question.into();
        let answer =
            self.call(|guest, store, at| guest.inventory().call_prepare(store, at, &asked))?;
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

    /// Gives up a prepared question.
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
    /// The size of its memory, in bytes.
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
        // Everything else comes from reading what it answered.
        None => Fault::Rubbish(cause(e)),
    }
}
