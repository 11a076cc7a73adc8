//! Keys that hardly two rows share: serials, and the number ranges of device ids.
//!
//! Only a 32-bit hash of a key is kept, with the one row that has it: nine bytes where a
//! [`Posting`] would take a hundred. What is found is a hint, and the row's own devices decide. A
//! hash that several rows have, such as that of a serial which a maker prints on a whole production
//! run, gets a posting after all.

use alloc::vec::Vec;
use core::hash::BuildHasher;

use hashbrown::{DefaultHashBuilder, HashTable};

use crate::posting::{LANES, Posting};

#[derive(Debug, Clone, Copy)]
enum HashedRows {
    One(u32),
    /// The number of a posting.
    Many(u32),
}

#[derive(Debug, Default)]
pub(crate) struct Sparse {
    table: HashTable<(u32, HashedRows)>,
    many: Vec<Posting>,
    unused: Vec<u32>,
    hasher: DefaultHashBuilder,
}

/// The rows that may have a key.
pub(crate) enum Hint<'a> {
    None,
    One(u32),
    Many(&'a Posting),
}

/// A posting here says which rows, not which of their devices.
const SOME: u64 = 1;
const NOBODY: [u64; LANES] = [0; LANES];

/// The table mixes the bits that it wants by itself.
const fn spread(hash: u32) -> u64 {
    (hash as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

impl Sparse {
    pub(crate) fn hash(&self, key: impl core::hash::Hash) -> u32 {
        let hash = self.hasher.hash_one(key);
        (hash ^ hash >> 32) as u32
    }

    pub(crate) fn find(&self, hash: u32) -> Hint<'_> {
        match self.table.find(spread(hash), |(known, _)| *known == hash) {
            None => Hint::None,
            Some((_, HashedRows::One(row))) => Hint::One(*row),
            Some((_, HashedRows::Many(at))) => {
                self.many.get(*at as usize).map_or(Hint::None, Hint::Many)
            }
        }
    }

    /// Says that the row has a key of this hash; again changes nothing.
    pub(crate) fn add(&mut self, hash: u32, row: u32) {
        let found = self.table.find_mut(spread(hash), |(known, _)| *known == hash);
        match found {
            None => {
                self.table.insert_unique(
                    spread(hash),
                    (hash, HashedRows::One(row)),
                    |(known, _)| spread(*known),
                );
            }
            Some((_, HashedRows::One(other))) if *other == row => {}
            Some((_, rows @ HashedRows::One(_))) => {
                let HashedRows::One(other) = *rows else { return };
                let mut posting = Posting::default();
                posting.add(other, SOME, &NOBODY);
                posting.add(row, SOME, &NOBODY);
                let at = match self.unused.pop() {
                    Some(at) => {
                        self.many[at as usize] = posting;
                        at
                    }
                    None => {
                        self.many.push(posting);
                        self.many.len() as u32 - 1
                    }
                };
                *rows = HashedRows::Many(at);
            }
            Some((_, HashedRows::Many(at))) => {
                let at = *at as usize;
                self.many[at].add(row, SOME, &NOBODY);
            }
        }
    }

    /// Removes this hash of a key from the row.
    pub(crate) fn remove(&mut self, hash: u32, row: u32) {
        let Ok(found) = self.table.find_entry(spread(hash), |(known, _)| *known == hash) else {
            return;
        };
        match found.get().1 {
            HashedRows::One(known) => {
                if known == row {
                    found.remove();
                }
            }
            HashedRows::Many(at) => {
                let posting = &mut self.many[at as usize];
                posting.clear(row, SOME, &NOBODY);
                if posting.rows() == 0 {
                    self.unused.push(at);
                    found.remove();
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::collections::BTreeSet;
    use proptest::prelude::*;

    fn rows(sparse: &Sparse, hash: u32) -> Vec<u32> {
        match sparse.find(hash) {
            Hint::None => Vec::new(),
            Hint::One(row) => alloc::vec![row],
            Hint::Many(posting) => posting
                .chunks()
                .flat_map(|(block, chunk)| {
                    crate::posting::bits(chunk.present())
                        .map(move |lane| block * LANES as u32 + lane as u32)
                })
                .collect(),
        }
    }

    proptest! {
        #[test]
        fn it_is_a_set_of_pairs(
            steps in prop::collection::vec((0u32..4, 0u32..200, any::<bool>()), 0..300),
        ) {
            let (mut sparse, mut oracle) = (Sparse::default(), BTreeSet::new());
            for (hash, row, add) in steps {
                if add {
                    sparse.add(hash, row);
                    oracle.insert((hash, row));
                } else {
                    sparse.remove(hash, row);
                    oracle.remove(&(hash, row));
                }
            }
            for hash in 0..4 {
                let pairs = oracle.iter().filter(|(h, _)| *h == hash);
                let expected: Vec<u32> = pairs.map(|(_, row)| *row).collect();
                prop_assert_eq!(rows(&sparse, hash), expected);
            }
        }
    }
}
