//! How often somebody may do something. Reading is bounded by connections; what changes something,
//! and guessing, by these.

use std::collections::HashMap;
use std::hash::Hash;
use std::net::IpAddr;
use std::num::NonZeroU32;
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use governor::clock::{Clock as _, DefaultClock};
use governor::state::keyed::HashMapStateStore;
use governor::{Quota, RateLimiter};

use super::error::ApiError;

/// Changes by one caller: so many at once, and so many a second after that.
const CHANGES: (u32, u32) = (200, 20);
/// Tokens that nobody has, from one address.
const GUESSES: (u32, u32) = (50, 5);
/// Whoever is as good as new is forgotten once there are more than so many.
const KNOWN: usize = 4096;

type Limiter<K> = RateLimiter<K, HashMapStateStore<K>, DefaultClock>;

/// What everybody may still do.
pub(super) struct Rates {
    changes: Limiter<String>,
    guesses: Limiter<IpAddr>,
    /// Who has guessed too often, and until when.
    waiting: Mutex<HashMap<IpAddr, Instant>>,
}

fn limiter<K: Hash + Eq + Clone>((burst, rate): (u32, u32)) -> Limiter<K> {
    let some = |n: u32| NonZeroU32::new(n).unwrap_or(NonZeroU32::MIN);
    RateLimiter::hashmap(Quota::per_second(some(rate)).allow_burst(some(burst)))
}

fn check<K: Hash + Eq + Clone>(limiter: &Limiter<K>, key: &K) -> Result<(), ApiError> {
    if limiter.len() > KNOWN {
        limiter.retain_recent();
    }
    limiter.check_key(key).map_err(|not_until| {
        let wait = not_until.wait_time_from(DefaultClock::default().now());
        ApiError::too_often(wait.as_secs().saturating_add(1))
    })
}

impl Default for Rates {
    fn default() -> Self {
        Self { changes: limiter(CHANGES), guesses: limiter(GUESSES), waiting: Mutex::default() }
    }
}

impl Rates {
    /// One more change by the caller of that name.
    pub(super) fn change(&self, caller: &str) -> Result<(), ApiError> {
        check(&self.changes, &caller.to_owned())
    }

    /// One more token that nobody has.
    pub(super) fn guess(&self, from: IpAddr) -> Result<(), ApiError> {
        let checked = check(&self.guesses, &from);
        if let Some(wait) = checked.as_ref().err().and_then(ApiError::retry_after) {
            let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
            let now = Instant::now();
            if waiting.len() > KNOWN {
                waiting.retain(|_, until| *until > now);
            }
            waiting.insert(from, now + wait);
        }
        checked
    }

    /// What somebody at this address is told who is to guess no more for now.
    pub(super) fn waits(&self, from: IpAddr) -> Option<ApiError> {
        let waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        let left = waiting.get(&from)?.checked_duration_since(Instant::now())?;
        Some(ApiError::too_often(left.as_secs().saturating_add(1)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_who_does_too_much_keeps_nobody_else_from_it() {
        let rates = Rates::default();
        let done = (0..CHANGES.0 * 2).filter(|_| rates.change("loud").is_ok()).count();
        assert!(done >= CHANGES.0 as usize && done < 2 * CHANGES.0 as usize, "{done}");
        // A place comes free every 50 ms: on a busy machine perhaps just now.
        let refused = (0..CHANGES.0 * 2).find_map(|_| rates.change("loud").err()).unwrap();
        assert_eq!(refused.status.as_u16(), 429);
        assert!(rates.change("quiet").is_ok());
        let from = IpAddr::from([192, 0, 2, 1]);
        assert!(rates.waits(from).is_none());
        assert!((0..GUESSES.0 * 2).any(|_| rates.guess(from).is_err()));
        assert_eq!(rates.waits(from).unwrap().status.as_u16(), 429);
        assert!(rates.waits(IpAddr::from([192, 0, 2, 2])).is_none());
        assert!(rates.guess(IpAddr::from([192, 0, 2, 2])).is_ok());
    }
}
