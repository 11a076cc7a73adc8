//! Durations of one thing, measured many times.

use std::fmt;
use std::time::Duration;

#[derive(Debug, Clone, Default)]
pub(crate) struct Samples(Vec<Duration>);

impl Samples {
    pub(crate) fn push(&mut self, took: Duration) {
        self.0.push(took);
    }

    pub(crate) fn median(&self) -> Duration {
        let mut sorted = self.0.clone();
        sorted.sort_unstable();
        sorted.get(sorted.len() / 2).copied().unwrap_or_default()
    }

    pub(crate) fn min(&self) -> Duration {
        self.0.iter().min().copied().unwrap_or_default()
    }
}

impl fmt::Display for Samples {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (min {})", millis(self.median()), millis(self.min()))
    }
}

/// Milliseconds, three digits that count.
pub(crate) fn millis(time: Duration) -> String {
    let ms = time.as_secs_f64() * 1000.0;
    let digits = if ms < 10.0 { 3 } else { 1 };
    format!("{ms:.digits$} ms")
}
