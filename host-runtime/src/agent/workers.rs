//! The threads that work on guests, each on one instance at a time.
//!
//! ```text
//!   push ─► queue ─► a thread with a slot ─► the job ends
//!                        └─ the job is slow: the thread continues without its slot, which another
//!                           thread gets
//! ```
//! A guest that blocks its thread does not block other guests.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::metrics::Load;

/// Maximum number of threads that work at the same time, without the slow ones.
const SLOTS: usize = 4;
/// Duration of a job after which its thread counts as slow, so that other guests wait at most a
/// second.
pub(super) const SLOW_JOB_TIME: Duration = Duration::from_millis(300);
/// Maximum number of threads. It is larger than the number of concurrent calls to libvirt
/// (`MAX_CALLS` in supervised.rs), so that calls without an answer cannot block all threads.
const MAX_THREADS: usize = 20;

/// Function that a thread calls for each job.
pub(super) type Work<J> = Box<dyn FnMut(J) + Send>;

/// The threads. They end when this is dropped.
pub(super) struct Workers<J>(Arc<Shared<J>>);

struct Shared<J> {
    state: Mutex<State<J>>,
    /// Notified of a new job, a free slot, or the end.
    wakeup: Condvar,
    /// Creates the function of a new thread.
    make: Box<dyn Fn() -> anyhow::Result<Work<J>> + Send + Sync>,
}

struct State<J> {
    queue: VecDeque<(J, Instant)>,
    /// Start of the job of each busy thread.
    began: BTreeMap<usize, Instant>,
    threads: usize,
    next: usize,
    ended: bool,
}

impl<J> State<J> {
    fn slow(&self) -> usize {
        self.began.values().filter(|began| began.elapsed() >= SLOW_JOB_TIME).count()
    }

    fn free_slots(&self) -> usize {
        SLOTS.saturating_sub(self.began.len() - self.slow())
    }
}

impl<J: Send + 'static> Workers<J> {
    /// Starts a thread for each slot.
    ///
    /// # Errors
    /// If a thread cannot be started, or `make` fails.
    pub(super) fn new(
        make: impl Fn() -> anyhow::Result<Work<J>> + Send + Sync + 'static,
    ) -> anyhow::Result<Self> {
        let state = State {
            queue: VecDeque::new(),
            began: BTreeMap::new(),
            threads: 0,
            next: 0,
            ended: false,
        };
        let shared = Arc::new(Shared {
            state: Mutex::new(state),
            wakeup: Condvar::new(),
            make: Box::new(make),
        });
        let workers = Self(shared);
        for _ in 0..SLOTS {
            start(&workers.0)?;
        }
        Ok(workers)
    }

    /// Queues a job for the next free thread.
    pub(super) fn push(&self, job: J) {
        self.0.state().queue.push_back((job, Instant::now()));
        self.0.wakeup.notify_one();
    }

    /// Gives the slots of slow threads to other threads. Returns the load.
    pub(super) fn relieve(&self) -> Load {
        let (load, lacking) = {
            let state = self.0.state();
            let (busy, slow) = (state.began.len(), state.slow());
            let waiting = state.queue.front().map_or(Duration::ZERO, |(_, since)| since.elapsed());
            let idle = state.threads.saturating_sub(busy);
            let lacking = state.free_slots().min(state.queue.len()).saturating_sub(idle);
            (Load { busy, slow, waiting }, lacking.min(MAX_THREADS.saturating_sub(state.threads)))
        };
        if load.waiting > Duration::ZERO {
            self.0.wakeup.notify_all();
        }
        for _ in 0..lacking {
            if let Err(e) = start(&self.0) {
                tracing::error!("cannot start another thread for the guests: {e:#}");
                break;
            }
        }
        load
    }
}

impl<J> Drop for Workers<J> {
    fn drop(&mut self) {
        self.0.state().ended = true;
        self.0.wakeup.notify_all();
    }
}

impl<J> Shared<J> {
    fn state(&self) -> MutexGuard<'_, State<J>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn start<J: Send + 'static>(shared: &Arc<Shared<J>>) -> anyhow::Result<()> {
    let work = (shared.make)()?;
    let number = {
        let mut state = shared.state();
        state.threads += 1;
        state.next += 1;
        state.next
    };
    let this = shared.clone();
    let started = std::thread::Builder::new().name(format!("guests-{number}")).spawn(move || {
        run(&this, number, work);
    });
    if let Err(e) = started {
        shared.state().threads -= 1;
        return Err(e.into());
    }
    Ok(())
}

/// Runs jobs until the end, or until there are enough other threads.
fn run<J>(shared: &Shared<J>, number: usize, mut work: Work<J>) {
    let mut state = shared.state();
    loop {
        if state.ended || state.threads - state.slow() > SLOTS {
            state.threads -= 1;
            // Pass the notification on to another thread.
            shared.wakeup.notify_one();
            return;
        }
        let job = if state.free_slots() > 0 { state.queue.pop_front() } else { None };
        let Some((job, _)) = job else {
            state = shared.wakeup.wait(state).unwrap_or_else(PoisonError::into_inner);
            continue;
        };
        state.began.insert(number, Instant::now());
        drop(state);
        work(job);
        state = shared.state();
        state.began.remove(&number);
        // The slot of this thread is free.
        shared.wakeup.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::sync::mpsc::{Sender, channel};

    use super::*;

    /// A job that waits for a signal, and reports its beginning and its end.
    struct Job(usize, Option<std::sync::mpsc::Receiver<()>>);

    fn workers(began: Sender<usize>, made: Arc<AtomicUsize>) -> Workers<Job> {
        Workers::new(move || {
            made.fetch_add(1, Ordering::SeqCst);
            let began = began.clone();
            Ok(Box::new(move |Job(number, wait): Job| {
                began.send(number).unwrap();
                if let Some(wait) = wait {
                    let _ = wait.recv();
                }
            }))
        })
        .unwrap()
    }

    /// Waits until `busy` threads work, all of them for longer than the limit.
    fn settle(workers: &Workers<Job>, busy: usize) {
        loop {
            let load = workers.relieve();
            if (load.busy, load.slow) == (busy, busy) {
                return;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    #[test]
    fn slow_jobs_do_not_delay_others() {
        let (to, began) = channel();
        let made = Arc::new(AtomicUsize::new(0));
        let workers = workers(to, made);
        let mut ends = Vec::new();
        for number in 0..MAX_THREADS - SLOTS {
            let (end, wait) = channel();
            ends.push(end);
            workers.push(Job(number, Some(wait)));
        }
        workers.push(Job(100, None));
        let mut seen = Vec::new();
        while seen.last() != Some(&100) {
            workers.relieve();
            if let Ok(number) = began.recv_timeout(Duration::from_millis(20)) {
                seen.push(number);
            }
        }
        // All other jobs are still running.
        assert_eq!(seen.len(), MAX_THREADS - SLOTS + 1);
        settle(&workers, MAX_THREADS - SLOTS);
        drop(ends);
        let threads = || workers.0.state().threads;
        while threads() > SLOTS {
            workers.0.wakeup.notify_all();
            std::thread::sleep(Duration::from_millis(5));
        }
        settle(&workers, 0);
        workers.push(Job(101, None));
        assert_eq!(began.recv(), Ok(101));
    }

    #[test]
    fn the_number_of_threads_is_limited() {
        let (to, began) = channel();
        let made = Arc::new(AtomicUsize::new(0));
        let workers = workers(to, made.clone());
        let mut ends = Vec::new();
        for number in 0..MAX_THREADS * 2 {
            let (end, wait) = channel();
            ends.push(end);
            workers.push(Job(number, Some(wait)));
        }
        let mut seen = BTreeSet::new();
        while seen.len() < MAX_THREADS {
            workers.relieve();
            seen.extend(began.recv_timeout(Duration::from_millis(20)));
        }
        assert_eq!(seen, (0..MAX_THREADS).collect());
        settle(&workers, MAX_THREADS);
        assert!(began.try_recv().is_err(), "the others wait");
        assert_eq!(made.load(Ordering::SeqCst), MAX_THREADS);
        drop(ends);
        let rest: BTreeSet<usize> =
            (MAX_THREADS..MAX_THREADS * 2).map(|_| began.recv().unwrap()).collect();
        assert_eq!(rest, (MAX_THREADS..MAX_THREADS * 2).collect());
    }
}
