//! Rate limits for changes and wrong tokens. The limits on connections bound reads.

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

/// Changes by one caller: burst size, and rate per second.
const CHANGES: (u32, u32) = (200, 20);
/// Wrong tokens from one address: burst size, and rate per second.
const GUESSES: (u32, u32) = (50, 5);
/// Number of callers above which idle ones are forgotten.
const KNOWN: usize = 4096;

type Limiter<K> = RateLimiter<K, HashMapStateStore<K>, DefaultClock>;

/// Remaining budgets of all callers.
pub(super) struct Rates {
    changes: Limiter<String>,
    guesses: Limiter<IpAddr>,
    /// Addresses that sent too many wrong tokens, with the end of their wait.
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
    /// Counts a change by the caller of this name.
    pub(super) fn change(&self, caller: &str) -> Result<(), ApiError> {
        check(&self.changes, &caller.to_owned())
    }

    /// Counts a wrong token.
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

    /// The error for an address that must wait before its next attempt.
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
    fn a_caller_over_its_limit_does_not_block_others() {
        let rates = Rates::default();
        let done = (0..CHANGES.0 * 2).filter(|_| rates.change("loud").is_ok()).count();
        assert!(done >= CHANGES.0 as usize && done < 2 * CHANGES.0 as usize, "{done}");
        // The budget grows by one every 50 ms, on a busy machine perhaps at this moment.
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
