//! Whether one host serves all requests at once, and what it would have to spare.
//!
//! Requests of one instance may overlap, and each device serves one: a bipartite matching. Hall's
//! theorem decides without finding a matching: the requests can be satisfied exactly if every set
//! of requests S finds as many matching devices as it needs, |N(S)| ≥ c(S). The least of |N(S)| −
//! c(S) is the *slack*: the number of devices, of the scarcest, that the host can lose and still
//! serve. Up to five different requests have at most 31 sets, each an OR and a count of bits. More
//! requests are matched by augmenting paths over whole requests, and the slack is how often the
//! scarcest request could be served once more. That is slow, and is computed only for hosts that
//! the slack could bring among the best.

use alloc::vec;
use alloc::vec::Vec;

/// Maximum number of different requests that are decided by their sets.
pub(crate) const FEW: usize = 5;
const SETS: usize = 1 << FEW;
/// More to spare than this makes no difference to the score.
pub(crate) const MOST: u32 = 127;

/// Demand of all sets of the requests.
#[derive(Debug, Clone)]
pub(crate) struct Wants {
    counts: Vec<u32>,
    /// By set, a bit a request.
    sets: [u32; SETS],
}

/// A host that serves them all.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Served {
    /// At most [`MOST`].
    pub(crate) slack: u32,
    /// Free devices that some request matches.
    pub(crate) wanted: u32,
}

impl Wants {
    pub(crate) fn new(counts: Vec<u32>) -> Self {
        let mut sets = [0; SETS];
        if counts.len() <= FEW {
            for set in 1..1usize << counts.len() {
                sets[set] = sets[set & (set - 1)] + counts[set.trailing_zeros() as usize];
            }
        }
        Self { counts, sets }
    }

    /// How many devices are wanted in all.
    pub(crate) fn total(&self) -> u32 {
        self.counts.iter().sum()
    }

    pub(crate) const fn are_few(&self) -> bool {
        self.counts.len() <= FEW
    }

    /// A host of one row and few requests; `words` are the free devices that each request matches.
    #[inline]
    pub(crate) fn one_row(&self, words: &[u64; FEW]) -> Option<Served> {
        let mut unions = [0u64; SETS];
        let last = (1usize << self.counts.len()) - 1;
        let mut slack = MOST;
        for set in 1..=last {
            unions[set] = unions[set & (set - 1)] | words[set.trailing_zeros() as usize];
            slack = slack.min(unions[set].count_ones().checked_sub(self.sets[set])?);
        }
        Some(Served { slack, wanted: unions[last].count_ones() })
    }

    /// Decides for any host; `words[request]` has one word per row. If the slack is slow to compute
    /// and does not `matter` for a host with at most this slack, returns that maximum.
    pub(crate) fn any(
        &self,
        words: &[Vec<u64>],
        matter: impl FnOnce(Served) -> bool,
    ) -> Option<Served> {
        let rows = words.first().map_or(0, Vec::len);
        let union = |row: usize, set: usize| {
            crate::posting::bits(set as u64).fold(0, |union, request| union | words[request][row])
        };
        if self.are_few() {
            let size = |set| (0..rows).map(|row| union(row, set).count_ones()).sum::<u32>();
            let last = (1 << self.counts.len()) - 1;
            let slack = (1..=last).try_fold(MOST, |least, set| {
                size(set).checked_sub(self.sets[set]).map(|slack| least.min(slack))
            })?;
            return Some(Served { slack, wanted: size(last) });
        }
        // What the sets of one request, and of all, say; the others can only say less.
        let all = |row: usize| words.iter().fold(0, |union, of| union | of[row]).count_ones();
        let wanted: u32 = (0..rows).map(all).sum();
        let most = wanted.checked_sub(self.total())?.min(MOST);
        let most = words.iter().zip(&self.counts).try_fold(most, |most, (of, count)| {
            let matching: u32 = of.iter().map(|word| word.count_ones()).sum();
            matching.checked_sub(*count).map(|slack| most.min(slack))
        })?;
        let mut flow = Flow::new(words);
        let all_served = self
            .counts
            .iter()
            .enumerate()
            .all(|(request, count)| flow.serve(request, *count) == *count);
        let best = Served { slack: most, wanted };
        match all_served {
            false => None,
            true if !matter(best) => Some(best),
            true => {
                let slack =
                    (0..words.len()).fold(most, |least, request| flow.spare(request, least));
                Some(Served { slack, wanted })
            }
        }
    }
}

/// Devices given to requests, a bit each, so far.
#[derive(Debug)]
struct Flow<'a> {
    matching: &'a [Vec<u64>],
    given: Vec<Vec<u64>>,
    taken: Vec<u64>,
}

impl<'a> Flow<'a> {
    fn new(matching: &'a [Vec<u64>]) -> Self {
        let rows = matching.first().map_or(0, Vec::len);
        Self { matching, given: vec![vec![0; rows]; matching.len()], taken: vec![0; rows] }
    }

    /// Gives the request up to `count` more devices, and moves other requests to their
    /// alternatives.
    fn serve(&mut self, request: usize, count: u32) -> u32 {
        let mut seen = vec![false; self.matching.len()];
        let mut one = || {
            seen.fill(false);
            self.augment(request, &mut seen)
        };
        (0..count).take_while(|_| one()).count() as u32
    }

    /// How many devices more the request could have, at most `most`.
    fn spare(&mut self, request: usize, most: u32) -> u32 {
        let spare = self.serve(request, most);
        // Whichever are taken back: the others are still served.
        let (given, taken) = (&mut self.given[request], &mut self.taken);
        let mut left = spare;
        for (given, taken) in given.iter_mut().zip(taken) {
            while left > 0 && *given != 0 {
                let device = *given & given.wrapping_neg();
                *given ^= device;
                *taken ^= device;
                left -= 1;
            }
        }
        spare
    }

    /// Gives one device more; false if that cannot be. As deep as there are requests, at most 127.
    fn augment(&mut self, request: usize, seen: &mut [bool]) -> bool {
        seen[request] = true;
        for row in 0..self.taken.len() {
            let free = self.matching[request][row] & !self.taken[row];
            if free != 0 {
                let device = free & free.wrapping_neg();
                self.taken[row] |= device;
                self.given[request][row] |= device;
                return true;
            }
        }
        for other in 0..self.matching.len() {
            if seen[other] {
                continue;
            }
            let shared = |row: &usize| self.given[other][*row] & self.matching[request][*row] != 0;
            let Some(row) = (0..self.taken.len()).find(shared) else { continue };
            if self.augment(other, seen) {
                let wanted = self.given[other][row] & self.matching[request][row];
                let device = wanted & wanted.wrapping_neg();
                self.given[other][row] &= !device;
                self.given[request][row] |= device;
                return true;
            }
        }
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The slow, obviously right way: tries every device for every copy of every request.
    fn possible(words: &[u64], counts: &[u32], used: u64) -> bool {
        let Some(request) = counts.iter().position(|count| *count > 0) else { return true };
        let mut left = counts.to_vec();
        left[request] -= 1;
        crate::posting::bits(words[request] & !used)
            .any(|device| possible(words, &left, used | 1 << device))
    }

    /// By definition: how often can the scarcest request be asked once more?
    fn slack(words: &[u64], counts: &[u32]) -> Option<u32> {
        if !possible(words, counts, 0) {
            return None;
        }
        let spare = |request: usize| {
            let more = |extra: &u32| {
                let mut counts = counts.to_vec();
                counts[request] += extra;
                possible(words, &counts, 0)
            };
            (1..).take_while(more).count() as u32
        };
        (0..counts.len()).map(spare).min()
    }

    proptest! {
        #[test]
        fn sets_and_paths_agree_with_brute_force(
            requests in prop::collection::vec((0u64..128, 1u32..3), 1..5),
        ) {
            let words: Vec<u64> = requests.iter().map(|(word, _)| *word).collect();
            let counts: Vec<u32> = requests.iter().map(|(_, count)| *count).collect();
            let wants = Wants::new(counts.clone());
            let mut few = [0; FEW];
            few[..words.len()].copy_from_slice(&words);
            let served = wants.one_row(&few);
            prop_assert_eq!(served.map(|s| s.slack), slack(&words, &counts));
            // The same devices on two rows.
            let split = |word: &u64| vec![word & 0b10_1010, word & 0b101_0101];
            let rows: Vec<Vec<u64>> = words.iter().map(split).collect();
            prop_assert_eq!(wants.any(&rows, |_| true), served);
            // A request that is there six times over, each for its share: too many to look at sets.
            let again = core::iter::repeat_n(&rows[0], 6);
            let many: Vec<Vec<u64>> = rows.iter().chain(again).cloned().collect();
            let spread: Vec<u32> = counts.iter().copied().chain([1; 6]).collect();
            let mut merged = counts;
            merged[0] += 6;
            let merged = Wants::new(merged).one_row(&few);
            let spread = Wants::new(spread);
            prop_assert_eq!(spread.any(&many, |_| true), merged);
            // Where it does not matter the slack is no less, and all else the same.
            let bound = spread.any(&many, |_| false);
            prop_assert_eq!(bound.map(|b| b.wanted), merged.map(|m| m.wanted));
            prop_assert!(bound.map(|b| b.slack) >= merged.map(|m| m.slack));
        }
    }
}
