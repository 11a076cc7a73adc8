//! One key of the index: which rows have it, and on each row which of its devices.
//!
//! A *row* is a host's place in the inventory, with up to 64 devices, each a bit. So a request that
//! names several things is an AND of a few words a host, and no device is looked at. Rows are kept
//! in chunks of 64: a chunk with few rows packs their words by rank; one with many has a word for
//! each row, and beside it how many of those devices are free, so that a common key is answered by
//! looking at 64 small numbers at once.

use alloc::boxed::Box;
use alloc::vec::Vec;

/// Rows in a chunk, and devices in a row.
pub(crate) const LANES: usize = 64;
/// Number of rows from which a chunk has a word for each row.
const DENSE: usize = 24;
/// Number of rows below which a chunk is packed again; less than [`DENSE`], so that a change of one
/// row does not repack it each time.
const SPARSE: usize = 12;

#[derive(Debug, Default, Clone)]
pub(crate) struct Posting {
    blocks: Vec<u32>,
    chunks: Vec<Chunk>,
    rows: usize,
}

#[derive(Debug, Clone)]
pub(crate) struct Chunk {
    present: u64,
    /// By rank among `present`, or by lane once there are counts.
    words: Vec<u64>,
    counts: Option<Box<[u8; LANES]>>,
}

pub(crate) const fn split(row: u32) -> (u32, usize) {
    (row / LANES as u32, row as usize % LANES)
}

/// The numbers of the bits that are set, ascending.
pub(crate) fn bits(mut word: u64) -> impl Iterator<Item = usize> {
    core::iter::from_fn(move || {
        let bit = word.trailing_zeros() as usize;
        (word != 0).then(|| {
            word &= word - 1;
            bit
        })
    })
}

fn free(word: u64, available: u64) -> u8 {
    (word & available).count_ones() as u8
}

impl Chunk {
    const fn new() -> Self {
        Self { present: 0, words: Vec::new(), counts: None }
    }

    /// The rows that have the key, a bit each.
    pub(crate) const fn present(&self) -> u64 {
        self.present
    }

    /// For each row how many free devices have the key; only where many rows do.
    pub(crate) fn counts(&self) -> Option<&[u8; LANES]> {
        self.counts.as_deref()
    }

    fn place(&self, lane: usize) -> usize {
        match self.counts {
            Some(_) => lane,
            None => (self.present & ((1 << lane) - 1)).count_ones() as usize,
        }
    }

    /// The devices of the row that have the key.
    pub(crate) fn get(&self, lane: usize) -> u64 {
        if self.present >> lane & 1 == 0 {
            return 0;
        }
        self.words.get(self.place(lane)).copied().unwrap_or_default()
    }

    fn set(&mut self, lane: usize, word: u64, available: u64) {
        let place = self.place(lane);
        match self.present >> lane & 1 == 1 || self.counts.is_some() {
            true => self.words[place] = word,
            false => {
                // Grown by little: there are many chunks, and most of them stay small.
                self.words.reserve_exact(if self.words.len() == self.words.capacity() {
                    2 + self.words.len() / 4
                } else {
                    0
                });
                self.words.insert(place, word);
            }
        }
        self.present |= 1 << lane;
        if let Some(counts) = &mut self.counts {
            counts[lane] = free(word, available);
        }
    }

    fn unset(&mut self, lane: usize) {
        let place = self.place(lane);
        self.present &= !(1 << lane);
        match &mut self.counts {
            Some(counts) => {
                counts[lane] = 0;
                self.words[place] = 0;
            }
            None => drop(self.words.remove(place)),
        }
    }

    /// Packs or unpacks, where the number of rows has come to call for it.
    fn settle(&mut self, available: &[u64; LANES]) {
        let rows = self.present.count_ones() as usize;
        if self.counts.is_none() && rows >= DENSE {
            let mut words = [0; LANES];
            let mut counts = [0; LANES];
            for (lane, word) in bits(self.present).zip(&self.words) {
                words[lane] = *word;
                counts[lane] = free(*word, available[lane]);
            }
            self.words = words.to_vec();
            self.counts = Some(Box::new(counts));
        } else if self.counts.is_some() && rows < SPARSE {
            self.words = bits(self.present).map(|lane| self.words[lane]).collect();
            self.counts = None;
        }
    }
}

impl Posting {
    /// How many rows have the key.
    pub(crate) const fn rows(&self) -> usize {
        self.rows
    }

    /// Each chunk that any row of has the key, with its block's number, ascending.
    pub(crate) fn chunks(&self) -> impl Iterator<Item = (u32, &Chunk)> {
        self.blocks.iter().copied().zip(&self.chunks)
    }

    fn find(&self, block: u32) -> Result<usize, usize> {
        // A key that every block has stands at its own number; a fleet that is being loaded
        // appends.
        let guess = (block as usize).min(self.blocks.len().saturating_sub(1));
        match self.blocks.get(guess) {
            Some(&at) if at == block => Ok(guess),
            _ => self.blocks.binary_search(&block),
        }
    }

    pub(crate) fn chunk(&self, block: u32) -> Option<&Chunk> {
        self.find(block).ok().map(|at| &self.chunks[at])
    }

    /// The devices of the row that have the key.
    pub(crate) fn get(&self, row: u32) -> u64 {
        let (block, lane) = split(row);
        self.chunk(block).map_or(0, |chunk| chunk.get(lane))
    }

    /// Adds devices of a row. `available` is of all rows of the block.
    pub(crate) fn add(&mut self, row: u32, devices: u64, available: &[u64; LANES]) {
        let (block, lane) = split(row);
        let at = match self.find(block) {
            Ok(at) => at,
            Err(at) => {
                self.blocks.insert(at, block);
                self.chunks.insert(at, Chunk::new());
                at
            }
        };
        let chunk = &mut self.chunks[at];
        let word = chunk.get(lane);
        self.rows += usize::from(word == 0);
        chunk.set(lane, word | devices, available[lane]);
        if word == 0 {
            chunk.settle(available);
        }
    }

    /// Takes devices of a row away.
    pub(crate) fn clear(&mut self, row: u32, devices: u64, available: &[u64; LANES]) {
        let (block, lane) = split(row);
        let Ok(at) = self.find(block) else { return };
        let chunk = &mut self.chunks[at];
        let word = chunk.get(lane);
        if word == 0 {
            return;
        }
        match word & !devices {
            0 => {
                chunk.unset(lane);
                self.rows -= 1;
                if chunk.present == 0 {
                    self.blocks.remove(at);
                    self.chunks.remove(at);
                } else {
                    chunk.settle(available);
                }
            }
            left => chunk.set(lane, left, available[lane]),
        }
    }

    /// Counts again after devices of the row were claimed or released.
    pub(crate) fn recount(&mut self, row: u32, available: u64) {
        let (block, lane) = split(row);
        if let Ok(at) = self.find(block) {
            let chunk = &mut self.chunks[at];
            let word = chunk.get(lane);
            if let Some(counts) = &mut chunk.counts {
                counts[lane] = free(word, available);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::collections::BTreeMap;
    use proptest::prelude::*;

    proptest! {
        /// Against a map of words, through packing and unpacking.
        #[test]
        fn a_posting_is_a_map_of_words(
            steps in prop::collection::vec((0u32..140, 0u32..64, 0u8..3, any::<u64>()), 0..400),
        ) {
            let mut available = [[0u64; LANES]; 3];
            let (mut posting, mut oracle) = (Posting::default(), BTreeMap::<u32, u64>::new());
            for (row, device, what, free) in steps {
                let (block, lane) = split(row);
                match what {
                    0 | 1 => {
                        posting.add(row, 1 << device, &available[block as usize]);
                        *oracle.entry(row).or_default() |= 1 << device;
                    }
                    _ => {
                        posting.clear(row, 1 << device, &available[block as usize]);
                        let word = oracle.entry(row).or_default();
                        *word &= !(1 << device);
                    }
                }
                oracle.retain(|_, word| *word != 0);
                available[block as usize][lane] = free;
                posting.recount(row, free);
                prop_assert_eq!(posting.rows(), oracle.len());
            }
            for row in 0..192 {
                prop_assert_eq!(posting.get(row), oracle.get(&row).copied().unwrap_or_default());
            }
            for (block, chunk) in posting.chunks() {
                prop_assert!(chunk.present() != 0);
                for lane in bits(chunk.present()) {
                    if let Some(counts) = chunk.counts() {
                        let available = available[block as usize][lane];
                        prop_assert_eq!(counts[lane], free(chunk.get(lane), available));
                    }
                }
            }
        }
    }
}
