//! Small sets that many devices share, each kept once: classes with tags, and projects.

use alloc::boxed::Box;
use alloc::vec::Vec;

use hashbrown::HashMap;

/// Sets by number, with a use count; the number of an unused set is free again.
#[derive(Debug)]
pub(crate) struct Sets<T> {
    numbers: HashMap<Box<[u8]>, u32>,
    sets: Vec<Set<T>>,
    unused: Vec<u32>,
}

#[derive(Debug)]
struct Set<T> {
    spelled: Box<[u8]>,
    uses: u32,
    meaning: T,
}

impl<T> Default for Sets<T> {
    fn default() -> Self {
        Self { numbers: HashMap::new(), sets: Vec::new(), unused: Vec::new() }
    }
}

impl<T> Sets<T> {
    /// Adds a use of the set with this spelling. `meaning` is called only for a new set.
    pub(crate) fn take(&mut self, spelled: &[u8], meaning: impl FnOnce() -> T) -> u32 {
        if let Some(&number) = self.numbers.get(spelled) {
            self.sets[number as usize].uses += 1;
            return number;
        }
        let set = Set { spelled: spelled.into(), uses: 1, meaning: meaning() };
        let number = match self.unused.pop() {
            Some(number) => {
                self.sets[number as usize] = set;
                number
            }
            None => {
                self.sets.push(set);
                self.sets.len() as u32 - 1
            }
        };
        self.numbers.insert(spelled.into(), number);
        number
    }

    /// One use less.
    pub(crate) fn give_back(&mut self, number: u32) {
        let set = &mut self.sets[number as usize];
        set.uses -= 1;
        if set.uses == 0 {
            self.numbers.remove(&set.spelled);
            set.spelled = Box::default();
            self.unused.push(number);
        }
    }

    pub(crate) fn get(&self, number: u32) -> &T {
        &self.sets[number as usize].meaning
    }

    /// How every set is spelled, by number; unused ones as nothing.
    pub(crate) fn spellings(&self) -> impl Iterator<Item = &[u8]> {
        self.sets.iter().map(|set| &*set.spelled)
    }
}
