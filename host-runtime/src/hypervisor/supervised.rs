//! A wrapper of a hypervisor that tracks unanswered calls, and remembers the last answers.
//!
//! A call may stay unanswered forever if QEMU hangs, or if another program's hook hangs and
//! libvirtd keeps the domain locked. Only the caller waits. Another call about the same guest fails
//! ([`Failure::Silent`]). A caller that only needs the last known state reads that
//! ([`Supervised::known`]).

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::{Duration, Instant, SystemTime};

use virt_usb_domxml::Domain;
use virt_usb_model::InstanceId;

use super::{Failure, Hypervisor, Running};

/// Time after which a call without an answer is reported.
pub(crate) const MEETING_TIMEOUT: Duration = Duration::from_secs(5);
/// Time after which a guest counts as silent, if a call about it has no answer. Further calls about
/// it fail. On a busy machine, calls take seconds.
const SILENCE_TIMEOUT: Duration = Duration::from_secs(15);
/// Maximum time that a call waits for its turn while other calls are answered.
const TURN_TIMEOUT: Duration = Duration::from_secs(60);
/// Maximum number of concurrent calls. libvirtd has 20 workers for all of its clients
/// (`max_workers` in libvirtd.conf).
pub(super) const MAX_CALLS: usize = 16;
/// A second call about one guest is made only while there are fewer calls than this, so that silent
/// guests do not use up all calls.
const CALLS_FOR_SECONDS: usize = 8;
/// Maximum number of silent guests. If there are more, no call is made at all.
const MAX_SILENT_GUESTS: usize = 12;

/// Last known state of a guest.
#[derive(Debug, Clone)]
pub struct Known {
    /// UUID of the instance.
    pub instance: InstanceId,
    /// Whether the guest is running.
    pub running: bool,
    /// Live XML of a running domain, otherwise its definition.
    pub domain: Arc<Domain>,
    /// Time of the answer.
    pub seen: SystemTime,
}

/// A call without an answer yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Unanswered {
    /// Instance that the call is about; `None` for all guests.
    pub instance: Option<InstanceId>,
    /// Description of the call.
    pub what: &'static str,
    /// Time when the call began.
    pub since: Instant,
    /// Whether a caller has given up waiting for it.
    pub missed: bool,
}

/// Callback with the old and the new state of a guest.
pub type Changed = Box<dyn Fn(Option<&Known>, Option<&Known>) + Send + Sync>;

/// Receivers of notifications.
pub struct Listeners {
    /// Called after a late answer about a guest, if another call was refused in the meantime.
    pub answered: Box<dyn Fn(InstanceId) + Send + Sync>,
    /// Called after the state of a guest was read.
    pub changed: Changed,
}

impl Listeners {
    /// Creates listeners that ignore all notifications.
    pub fn nobody() -> Self {
        Self { answered: Box::new(|_| {}), changed: Box::new(|_, _| {}) }
    }
}

/// A hypervisor whose calls are supervised; see the module.
pub struct Supervised {
    inner: Arc<dyn Hypervisor>,
    listeners: Listeners,
    calls: Mutex<Calls>,
    /// Notified when a call has ended.
    ended: Condvar,
    known: RwLock<BTreeMap<InstanceId, Known>>,
    /// Whether all guests were read once.
    complete: RwLock<bool>,
}

#[derive(Default)]
struct Calls {
    next: u64,
    open: BTreeMap<u64, Unanswered>,
    /// Instances of the calls that wait for their turn, by the calls' numbers.
    waiting: BTreeMap<u64, Option<InstanceId>>,
}

/// Decision about a call.
enum Turn {
    Now,
    /// The call must wait, and is decided again after this time at the latest.
    Later(Duration),
    Never(Failure),
}

impl Calls {
    /// Number of silent guests.
    fn silent(&self) -> usize {
        let silent = self.open.values().filter(|call| call.since.elapsed() >= SILENCE_TIMEOUT);
        silent.map(|call| call.instance).collect::<BTreeSet<_>>().len()
    }

    fn turn(&mut self, number: u64, instance: Option<InstanceId>) -> Turn {
        let same = self.open.iter_mut().filter(|(_, call)| call.instance == instance);
        let mut same: Vec<&mut Unanswered> = same.map(|(_, call)| call).collect();
        let count = same.len();
        let oldest = same.first_mut().map(|call| (call.since.elapsed(), call));
        if let Some((age, call)) = oldest.filter(|(age, _)| *age >= SILENCE_TIMEOUT) {
            call.missed = true;
            let about = if instance.is_some() { "about this guest" } else { "about all guests" };
            let seconds = age.as_secs();
            return Turn::Never(Failure::Silent(format!(
                "a call {about} has had no answer for {seconds} s ({})",
                call.what
            )));
        }
        if self.silent() >= MAX_SILENT_GUESTS {
            return Turn::Never(Failure::Silent(format!(
                "libvirt leaves calls about {MAX_SILENT_GUESTS} guests or more unanswered, so the \
                 agent makes no more calls"
            )));
        }
        let most = if self.open.len() < CALLS_FOR_SECONDS { 2 } else { 1 };
        let is_behind = self.waiting.range(..number).any(|(_, other)| *other == instance);
        if count >= most || is_behind || self.open.len() >= MAX_CALLS {
            // A call that times out in the meantime notifies no one.
            return Turn::Later(Duration::from_secs(1));
        }
        Turn::Now
    }
}

impl Supervised {
    /// Supervises the calls of `inner`.
    pub fn new(inner: Arc<dyn Hypervisor>, listeners: Listeners) -> Self {
        Self {
            inner,
            listeners,
            calls: Mutex::default(),
            ended: Condvar::new(),
            known: RwLock::default(),
            complete: RwLock::default(),
        }
    }

    /// Calls without an answer for `age` or longer, oldest first.
    pub fn unanswered(&self, age: Duration) -> Vec<Unanswered> {
        let mut old: Vec<Unanswered> = self
            .calls()
            .open
            .values()
            .filter(|call| call.since.elapsed() >= age)
            .copied()
            .collect();
        old.sort_by_key(|call| call.since);
        old
    }

    /// Whether no call is made, because too many guests are silent.
    pub fn is_blocked(&self) -> bool {
        self.calls().silent() >= MAX_SILENT_GUESTS
    }

    /// Last known state of all guests, sorted by UUID. `None` until all were read once.
    pub fn known(&self) -> Option<Vec<Known>> {
        let complete = *self.complete.read().unwrap_or_else(PoisonError::into_inner);
        complete.then(|| self.seen())
    }

    /// Last known state of the guests that were read so far.
    pub fn seen(&self) -> Vec<Known> {
        self.known.read().unwrap_or_else(PoisonError::into_inner).values().cloned().collect()
    }

    /// Last known state of a guest.
    pub fn guest(&self, instance: InstanceId) -> Option<Known> {
        self.known.read().unwrap_or_else(PoisonError::into_inner).get(&instance).cloned()
    }

    /// Records that all guests were read. Returns true the first time.
    pub fn complete(&self) -> bool {
        !std::mem::replace(
            &mut *self.complete.write().unwrap_or_else(PoisonError::into_inner),
            true,
        )
    }

    fn calls(&self) -> MutexGuard<'_, Calls> {
        self.calls.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until the call may be made, and records it. Returns its number. Calls about one guest
    /// are made in the order of their arrival.
    fn begin(&self, instance: Option<InstanceId>, what: &'static str) -> Result<u64, Failure> {
        let end = Instant::now() + TURN_TIMEOUT;
        let mut calls = self.calls();
        let number = calls.next;
        calls.next += 1;
        calls.waiting.insert(number, instance);
        let begun = loop {
            match calls.turn(number, instance) {
                Turn::Now => break Ok(number),
                Turn::Never(why) => break Err(why),
                Turn::Later(longest) => {
                    let left = end.saturating_duration_since(Instant::now());
                    if left.is_zero() {
                        let seconds = TURN_TIMEOUT.as_secs();
                        break Err(Failure::Silent(format!(
                            "it has been busy with other calls for {seconds} s"
                        )));
                    }
                    let waited = self.ended.wait_timeout(calls, longest.min(left));
                    calls = waited.unwrap_or_else(PoisonError::into_inner).0;
                }
            }
        };
        calls.waiting.remove(&number);
        if begun.is_ok() {
            calls.open.insert(
                number,
                Unanswered { instance, what, since: Instant::now(), missed: false },
            );
        }
        drop(calls);
        // Other calls may have waited for this one's turn.
        self.ended.notify_all();
        begun
    }

    fn call<T>(
        &self,
        instance: Option<InstanceId>,
        what: &'static str,
        call: impl FnOnce(&dyn Hypervisor) -> Result<T, Failure>,
    ) -> Result<T, Failure> {
        let number = self.begin(instance, what)?;
        let done = call(&*self.inner);
        let answered = self.calls().open.remove(&number);
        self.ended.notify_all();
        if let Some(Unanswered { instance: Some(instance), since, missed, .. }) = answered
            && since.elapsed() >= MEETING_TIMEOUT
        {
            let seconds = since.elapsed().as_secs();
            tracing::info!(%instance, "instance {instance}: libvirt has answered after {seconds} s \
                ({what})");
            if missed {
                (self.listeners.answered)(instance);
            }
        }
        done
    }

    /// Changes the last known state of a guest.
    fn note(&self, instance: InstanceId, change: impl FnOnce(Option<&Known>) -> Option<Known>) {
        let (before, now) = {
            let mut known = self.known.write().unwrap_or_else(PoisonError::into_inner);
            let before = known.get(&instance).cloned();
            let now = change(before.as_ref());
            match &now {
                Some(now) => drop(known.insert(instance, now.clone())),
                None => drop(known.remove(&instance)),
            }
            (before, now)
        };
        (self.listeners.changed)(before.as_ref(), now.as_ref());
    }

    /// Records a guest's XML. Invalid XML changes nothing.
    fn note_xml(&self, instance: InstanceId, running: Option<bool>, xml: &str) {
        let Ok(domain) = virt_usb_domxml::read(xml.as_bytes()) else { return };
        self.note(instance, |before| {
            let running = running.unwrap_or_else(|| before.is_some_and(|known| known.running));
            Some(Known { instance, running, domain: Arc::new(domain), seen: SystemTime::now() })
        });
    }
}

impl Hypervisor for Supervised {
    fn running(&self) -> Result<Vec<InstanceId>, Failure> {
        self.call(None, "list", |inner| inner.running())
    }

    fn all(&self) -> Result<Vec<InstanceId>, Failure> {
        let asked = SystemTime::now();
        let all = self.call(None, "list", |inner| inner.all())?;
        let there: BTreeSet<InstanceId> = all.iter().copied().collect();
        let is_gone = |known: &Known| !there.contains(&known.instance) && known.seen < asked;
        for gone in self.seen().into_iter().filter(is_gone) {
            self.note(gone.instance, |now| now.filter(|now| now.seen >= asked).cloned());
        }
        Ok(all)
    }

    fn look(&self, instance: InstanceId) -> Result<Option<Running>, Failure> {
        let running = self.call(Some(instance), "look", |inner| inner.look(instance))?;
        match &running {
            Some(running) => self.note_xml(instance, Some(true), &running.xml),
            None => self.note(instance, |before| {
                before.map(|known| Known {
                    running: false,
                    seen: SystemTime::now(),
                    ..known.clone()
                })
            }),
        }
        Ok(running)
    }

    fn xml(&self, instance: InstanceId) -> Result<Option<String>, Failure> {
        let xml = self.call(Some(instance), "read its XML", |inner| inner.xml(instance))?;
        match &xml {
            Some(xml) => self.note_xml(instance, None, xml),
            None => self.note(instance, |_| None),
        }
        Ok(xml)
    }

    fn attach(&self, instance: InstanceId, device: &str) -> Result<(), Failure> {
        self.call(Some(instance), "attach", |inner| inner.attach(instance, device))
    }

    fn detach(&self, instance: InstanceId, alias: &str) -> Result<(), Failure> {
        self.call(Some(instance), "detach", |inner| inner.detach(instance, alias))
    }

    fn stop(&self, instance: InstanceId) -> Result<(), Failure> {
        self.call(Some(instance), "stop", |inner| inner.stop(instance))
    }

    fn is_busy(&self, instance: InstanceId) -> Result<bool, Failure> {
        self.call(Some(instance), "look", |inner| inner.is_busy(instance))
    }

    fn process(&self, instance: InstanceId) -> Option<u32> {
        self.inner.process(instance)
    }

    fn identity(&self) -> Result<String, Failure> {
        self.call(None, "read its identity", |inner| inner.identity())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    /// Hypervisor that answers once `gate` is open.
    #[derive(Default)]
    struct Slow {
        asked: AtomicUsize,
        gate: Mutex<bool>,
        opened: Condvar,
    }

    impl Hypervisor for Slow {
        fn running(&self) -> Result<Vec<InstanceId>, Failure> {
            Ok(Vec::new())
        }

        fn all(&self) -> Result<Vec<InstanceId>, Failure> {
            Ok(Vec::new())
        }

        fn look(&self, _: InstanceId) -> Result<Option<Running>, Failure> {
            self.asked.fetch_add(1, Ordering::SeqCst);
            drop(self.opened.wait_while(self.gate.lock().unwrap(), |open| !*open).unwrap());
            Ok(None)
        }

        fn xml(&self, _: InstanceId) -> Result<Option<String>, Failure> {
            Ok(None)
        }

        fn attach(&self, _: InstanceId, _: &str) -> Result<(), Failure> {
            Ok(())
        }

        fn detach(&self, _: InstanceId, _: &str) -> Result<(), Failure> {
            Ok(())
        }

        fn stop(&self, _: InstanceId) -> Result<(), Failure> {
            Ok(())
        }

        fn is_busy(&self, _: InstanceId) -> Result<bool, Failure> {
            Ok(false)
        }

        fn process(&self, _: InstanceId) -> Option<u32> {
            None
        }

        fn identity(&self) -> Result<String, Failure> {
            Ok(String::new())
        }
    }

    #[test]
    fn concurrent_calls_wait_for_their_turn() {
        let instance =
            |n: usize| format!("{n:08}-2222-4333-8444-555555555555").parse::<InstanceId>().unwrap();
        let slow = Arc::new(Slow::default());
        let supervised = Supervised::new(slow.clone(), Listeners::nobody());
        let asked = || slow.asked.load(Ordering::SeqCst);
        // The gate is opened in any case, so that the threads end.
        let (one_guest, others, in_all) = std::thread::scope(|scope| {
            let supervised = &supervised;
            let ask = |instance| scope.spawn(move || supervised.look(instance));
            let settled = |expected| {
                let until = Instant::now() + Duration::from_secs(60);
                while asked() < expected && Instant::now() < until {
                    std::thread::sleep(Duration::from_millis(1));
                }
                std::thread::sleep(Duration::from_millis(50));
                asked()
            };
            let mut all: Vec<_> = (0..10).map(|_| ask(instance(0))).collect();
            let one_guest = settled(2);
            let others = supervised.identity();
            all.extend((1..=MAX_CALLS).map(|n| ask(instance(n))));
            let in_all = settled(MAX_CALLS);
            *slow.gate.lock().unwrap() = true;
            slow.opened.notify_all();
            for one in all {
                assert_eq!(one.join().unwrap(), Ok(None));
            }
            (one_guest, others, in_all)
        });
        assert_eq!((one_guest, in_all), (2, MAX_CALLS));
        assert_eq!(others, Ok(String::new()), "other calls are answered in the meantime");
        assert_eq!(asked(), 10 + MAX_CALLS);
    }
}
