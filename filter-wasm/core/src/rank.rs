//! The best of many hosts, without sorting all of them.

use alloc::vec::Vec;
use core::cmp::Ordering;

use virt_usb_model::scheduling::Weights;

use crate::feasibility;

/// More free devices for others than this make no difference.
const MOST_OTHERS: u32 = 255;

/// From −25 500 to 12 700, for weights of at most [`Weights::MAX`].
pub(crate) fn score(weights: Weights, slack: u32, others: u32) -> i16 {
    let part = |weight: u8, n: u32, most: u32| i32::from(weight) * n.min(most) as i32;
    let score =
        part(weights.spare, slack, feasibility::MOST) - part(weights.reserve, others, MOST_OTHERS);
    i16::try_from(score).unwrap_or(i16::MIN)
}

/// A host's score, and below it the hash that orders equal ones, as one number.
pub(crate) const fn rank(score: i16, tie: u16) -> i32 {
    (score as i32) << 16 | tie as i32
}

/// The score of a rank.
pub(crate) const fn score_of(rank: i32) -> i32 {
    rank >> 16
}

/// Keeps the best hosts, up to a limit.
pub(crate) struct Best<F> {
    limit: usize,
    kept: Vec<(i32, u32)>,
    /// Lower ranks are not kept.
    least: i32,
    /// Orders hosts of one rank.
    names: F,
}

impl<F: Fn(u32, u32) -> Ordering> Best<F> {
    pub(crate) const fn new(limit: usize, names: F) -> Self {
        let least = if limit == 0 { i32::MAX } else { i32::MIN };
        Self { limit, kept: Vec::new(), least, names }
    }

    /// Ranks below this need not be offered.
    pub(crate) const fn least(&self) -> i32 {
        self.least
    }

    pub(crate) fn offer(&mut self, rank: i32, host: u32) {
        if rank < self.least || self.limit == 0 {
            return;
        }
        self.kept.push((rank, host));
        if self.kept.len() >= self.limit.saturating_mul(2).saturating_add(64) {
            self.prune();
        }
    }

    fn prune(&mut self) {
        let names = &self.names;
        if self.kept.len() >= self.limit && self.limit > 0 {
            let order =
                |a: &(i32, u32), b: &(i32, u32)| b.0.cmp(&a.0).then_with(|| names(a.1, b.1));
            let (_, (least, _), _) = self.kept.select_nth_unstable_by(self.limit - 1, order);
            self.least = *least;
            self.kept.truncate(self.limit);
        }
    }

    /// The best, the best first.
    pub(crate) fn finish(mut self) -> Vec<(i32, u32)> {
        self.prune();
        let names = &self.names;
        self.kept.sort_unstable_by(|a, b| b.0.cmp(&a.0).then_with(|| names(a.1, b.1)));
        self.kept
    }
}
