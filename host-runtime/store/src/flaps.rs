//! Devices that come and go: a loose plug, a hub with too little power, a device that crashes.
//! Pure.
//!
//! ```text
//! `limit` returns within `window` ──► not offered for `pause`, the next time twice as long, …
//!                                     the time after `quarantine` such times a day: quarantined
//! ```

use serde::{Deserialize, Serialize};

/// The longest pause, in seconds.
const LONGEST: u64 = 6 * 3600;
/// After so long without flapping, in seconds, the next time is the first again.
const FORGIVEN: u64 = 24 * 3600;

/// When a device counts as flapping. Times in seconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Number of reconnections within the window that make a device flap.
    pub limit: u32,
    /// Window in which the reconnections are counted. A `limit` of 0 disables the check.
    pub window: u64,
    /// How long the device is unavailable and is not returned to its guest.
    pub pause: u64,
    /// Number of pauses per day after which the device is quarantined; 0 disables the quarantine.
    pub quarantine: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Self { limit: 5, window: 60, pause: 300, quarantine: 3 }
    }
}

/// Flapping history of a device. Times are in seconds since 1970.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Flaps {
    /// Last reconnections, at most as many as make the device flap.
    returns: Vec<u64>,
    /// How many times it has flapped.
    times: u32,
    /// When it did last.
    last: u64,
}

/// Consequence of a reconnection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// The device stays available.
    Steady,
    /// The device is unavailable until this time.
    Until(u64),
    /// The device is quarantined after this number of pauses.
    Quarantine(u32),
}

impl Flaps {
    /// The device has come back. `until`: it flaps already, until then.
    pub(crate) fn returned(&mut self, now: u64, until: Option<u64>, limits: &Limits) -> Outcome {
        if limits.limit == 0 {
            return Outcome::Steady;
        }
        self.returns.push(now);
        // A clock that was set back makes moments of the future: they say nothing.
        self.returns.retain(|at| *at <= now && now - at <= limits.window);
        if self.returns.len() < limits.limit as usize {
            let longer = until.map(|until| until.max(now.saturating_add(self.pause(limits))));
            return longer.map_or(Outcome::Steady, Outcome::Until);
        }
        self.returns.clear();
        if now.abs_diff(self.last) > FORGIVEN {
            self.times = 0;
        }
        self.times = self.times.saturating_add(1);
        self.last = now;
        if limits.quarantine > 0 && self.times > limits.quarantine {
            return Outcome::Quarantine(self.times);
        }
        Outcome::Until(now.saturating_add(self.pause(limits)))
    }

    /// Twice as long each time.
    fn pause(&self, limits: &Limits) -> u64 {
        let doubled = 1u64.checked_shl(self.times.saturating_sub(1)).unwrap_or(u64::MAX);
        limits.pause.saturating_mul(doubled).min(LONGEST.max(limits.pause))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: Limits = Limits { limit: 3, window: 10, pause: 100, quarantine: 2 };

    fn after(flaps: &mut Flaps, moments: &[u64]) -> Outcome {
        moments.iter().map(|at| flaps.returned(*at, None, &LIMITS)).last().unwrap()
    }

    #[test]
    fn too_often_within_the_window_and_not_otherwise() {
        assert_eq!(after(&mut Flaps::default(), &[0, 10, 20, 30, 40]), Outcome::Steady);
        assert_eq!(after(&mut Flaps::default(), &[100, 104, 110]), Outcome::Until(210));
        assert_eq!(after(&mut Flaps::default(), &[100, 104, 111]), Outcome::Steady);
        assert_eq!(
            after(&mut Flaps::default(), &[200, 201, 100]),
            Outcome::Steady,
            "the clock was set back"
        );
        let never = Limits { limit: 0, ..LIMITS };
        assert!((0..50).all(|at| Flaps::default().returned(at, None, &never) == Outcome::Steady));
    }

    #[test]
    fn twice_as_long_each_time_and_then_an_operator() {
        let mut flaps = Flaps::default();
        assert_eq!(after(&mut flaps, &[100, 101, 102]), Outcome::Until(202));
        assert_eq!(after(&mut flaps, &[300, 301, 302]), Outcome::Until(502));
        assert_eq!(after(&mut flaps, &[600, 601, 602]), Outcome::Quarantine(3));
        let day = 86_400;
        assert_eq!(
            after(&mut flaps, &[2 * day, 2 * day + 1, 2 * day + 2]),
            Outcome::Until(2 * day + 102)
        );
    }

    #[test]
    fn while_it_flaps_each_return_makes_it_longer() {
        let mut flaps = Flaps::default();
        assert_eq!(after(&mut flaps, &[0, 1, 2]), Outcome::Until(102));
        assert_eq!(flaps.returned(50, Some(102), &LIMITS), Outcome::Until(150));
        let forever = Limits { quarantine: 0, ..LIMITS };
        for _ in 0..200 {
            let longest = (0..3).map(|at| flaps.returned(at, None, &forever)).last();
            assert!(
                matches!(longest, Some(Outcome::Until(until)) if until <= 2 + LONGEST),
                "{longest:?}"
            );
        }
    }
}
