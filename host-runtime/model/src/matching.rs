//! Assignment of devices to the requests of one instance.
//!
//! Requests may overlap: "any key of this vendor" and "the key with this serial" compete for one
//! device, and taking the first that fits gives wrong refusals. So it is a bipartite matching
//! (Kuhn's augmenting paths): every request brings a row a device that it needs, and the rows get
//! distinct devices, or as many of them as possible.

use alloc::vec;
use alloc::vec::Vec;

/// For each row, the candidate (an index below `candidates`) that it gets, `None` where none is
/// left for it.
///
/// `rows[r]` lists what row `r` is content with, the most wanted first. The result has the largest
/// possible number of served rows, and a row is never left out for a later one. Time O(rows × sum
/// of candidates).
pub fn assign(rows: &[Vec<usize>], candidates: usize) -> Vec<Option<usize>> {
    let mut owner: Vec<Option<usize>> = vec![None; candidates];
    for row in 0..rows.len() {
        augment(rows, row, &mut owner, &mut vec![false; candidates]);
    }
    let mut served = vec![None; rows.len()];
    for (candidate, row) in owner.iter().enumerate() {
        if let Some(slot) = row.and_then(|row| served.get_mut(row)) {
            *slot = Some(candidate);
        }
    }
    served
}

/// As [`assign`], and of all choices that serve as many rows the one whose candidates come first in
/// `order`, whatever the rows prefer: they only decide who gets which of the chosen. Chosen again
/// from what was chosen before and others behind it, the choice is the same.
///
/// Candidates that can be used together are a transversal matroid: taking each in its turn that
/// goes with those before it is best, and never costs a row (Edmonds and Fulkerson, "Transversals
/// and matroid partition", 1965).
pub fn assign_in_order(
    rows: &[Vec<usize>],
    order: &[usize],
    candidates: usize,
) -> Vec<Option<usize>> {
    let takers = |candidate: &usize| {
        let takes = |row: &usize| rows[*row].contains(candidate);
        (0..rows.len()).filter(takes).collect::<Vec<usize>>()
    };
    let takers: Vec<Vec<usize>> = order.iter().map(takers).collect();
    let mut chosen = vec![false; candidates];
    for (candidate, taker) in order.iter().zip(assign(&takers, rows.len())) {
        if let (Some(slot), true) = (chosen.get_mut(*candidate), taker.is_some()) {
            *slot = true;
        }
    }
    let is_chosen = |candidate: &usize| chosen.get(*candidate).copied().unwrap_or(false);
    let rows: Vec<Vec<usize>> =
        rows.iter().map(|row| row.iter().copied().filter(is_chosen).collect()).collect();
    assign(&rows, candidates)
}

/// Finds a place for `row`, moving others to their alternatives; true if that went.
/// Iterative: the depth is bounded by the number of rows, but input decides that number.
fn augment(
    rows: &[Vec<usize>],
    row: usize,
    owner: &mut [Option<usize>],
    seen: &mut [bool],
) -> bool {
    let mut path: Vec<(usize, usize)> = vec![(row, 0)];
    while let Some((row, next)) = path.pop() {
        let wanted = rows.get(row).map_or(&[][..], Vec::as_slice);
        let Some(&candidate) = wanted.get(next) else { continue };
        path.push((row, next + 1));
        if seen.get(candidate).copied().unwrap_or(true) {
            continue;
        }
        seen[candidate] = true;
        match owner[candidate] {
            Some(other) => path.push((other, 0)),
            None => {
                for (row, tried) in path {
                    owner[rows[row][tried - 1]] = Some(row);
                }
                return true;
            }
        }
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The slow, obviously right oracle: the most rows that can be served, by trying everything.
    fn best(rows: &[Vec<usize>], used: &mut Vec<usize>) -> usize {
        let Some((first, rest)) = rows.split_first() else { return 0 };
        let mut most = best(rest, used);
        for &candidate in first {
            if !used.contains(&candidate) {
                used.push(candidate);
                most = most.max(1 + best(rest, used));
                used.pop();
            }
        }
        most
    }

    proptest! {
        #[test]
        fn serves_as_many_rows_as_brute_force(
            rows in prop::collection::vec(prop::collection::vec(0usize..6, 0..5), 0..6),
        ) {
            let served = assign(&rows, 6);
            let given: Vec<usize> = served.iter().flatten().copied().collect();
            let mut distinct = given.clone();
            distinct.sort_unstable();
            distinct.dedup();
            prop_assert_eq!(distinct.len(), given.len(), "one device, one row");
            for (row, got) in served.iter().enumerate() {
                prop_assert!(got.is_none_or(|c| rows[row].contains(&c)));
            }
            prop_assert_eq!(given.len(), best(&rows, &mut Vec::new()));
        }
    }

    /// The first set of candidates in `order`, by trying everything, that serves `most` rows.
    fn first(rows: &[Vec<usize>], order: &[usize], most: usize) -> Vec<usize> {
        let sets = (0u32..1 << order.len()).filter(|set| set.count_ones() as usize == most);
        let members =
            |set: u32| (0..order.len()).filter(move |n| set >> n & 1 == 1).collect::<Vec<usize>>();
        let serves = |set: &Vec<usize>| {
            let given: Vec<usize> = set.iter().map(|n| order[*n]).collect();
            let only =
                |row: &Vec<usize>| row.iter().copied().filter(|c| given.contains(c)).collect();
            best(&rows.iter().map(only).collect::<Vec<_>>(), &mut Vec::new()) == most
        };
        let mut first: Vec<usize> =
            sets.map(members).filter(serves).min().unwrap().iter().map(|n| order[*n]).collect();
        first.sort_unstable();
        first
    }

    proptest! {
        #[test]
        fn takes_what_comes_first_in_the_order(
            rows in prop::collection::vec(prop::collection::vec(0usize..6, 0..5), 0..6),
            order in Just((0usize..6).collect::<Vec<_>>()).prop_shuffle(),
        ) {
            let served = assign_in_order(&rows, &order, 6);
            let mut given: Vec<usize> = served.into_iter().flatten().collect();
            given.sort_unstable();
            prop_assert_eq!(given, first(&rows, &order, best(&rows, &mut Vec::new())));
        }
    }

    #[test]
    fn an_overlap_is_resolved() {
        assert_eq!(assign(&[vec![0, 1], vec![0]], 2), [Some(1), Some(0)]);
        assert_eq!(assign(&[vec![0], vec![0]], 1), [Some(0), None], "the earlier row keeps it");
        assert_eq!(assign(&[], 0), []);
    }
}
