//! A question against the index: which postings to look at, and what each host has for each
//! request.

use alloc::boxed::Box;
use alloc::vec::Vec;

use virt_usb_model::scheduling::{Moment, Question, Weights};
use virt_usb_model::{Selector, flavor};

use crate::feasibility::{FEW, Served, Wants};
use crate::hash_index::Hint;
use crate::host_builder::{canonical, path_tag, texts};
use crate::inventory::{Inventory, Row};
use crate::keys::{Key, kind, port_code};
use crate::posting::Posting;
use crate::rank;
use crate::refusal::Refusal;

/// Keys of one selector. Requests with the same selector share an entry.
#[derive(Debug)]
pub(crate) struct SelectorKeys {
    /// Keys that a device must all have; `None` if no device has one of them.
    pub(crate) keys: Option<Vec<u32>>,
    pub(crate) id: Option<u64>,
    pub(crate) serial: Option<Box<str>>,
}

#[derive(Debug)]
pub(crate) struct Plan {
    pub(crate) entries: Vec<SelectorKeys>,
    pub(crate) wants: Wants,
    /// For each request its entry, and its own count.
    pub(crate) of: Vec<(usize, u32)>,
    /// By number of the set of projects.
    allows: Vec<bool>,
    pub(crate) oldest: Option<u64>,
    pub(crate) weights: Weights,
}

/// The rows that an entry need look at.
pub(crate) enum Rows<'a> {
    None,
    One(u32),
    Posting(&'a Posting),
}

impl Rows<'_> {
    pub(crate) const fn len(&self) -> usize {
        match self {
            Self::None => 0,
            Self::One(_) => 1,
            Self::Posting(posting) => posting.rows(),
        }
    }
}

impl<'a> From<Hint<'a>> for Rows<'a> {
    fn from(hint: Hint<'a>) -> Self {
        match hint {
            Hint::None => Self::None,
            Hint::One(row) => Self::One(row),
            Hint::Many(posting) => Self::Posting(posting),
        }
    }
}

impl SelectorKeys {
    fn new(inventory: &Inventory, selector: &Selector) -> Self {
        let Selector { id, vendor_id, product_id, serial, port, path, class, tags } = selector;
        let mut keys = Vec::new();
        match (*vendor_id, *product_id) {
            (Some(vendor), Some(product)) => {
                keys.push(Key::Kind(kind(vendor.get(), product.get())));
            }
            (Some(vendor), None) => keys.push(Key::Vendor(vendor.get())),
            (None, _) => {}
        }
        keys.extend(port.as_ref().map(|port| Key::Port(port_code(port))));
        keys.extend(class.map(|class| Key::Class(class.get())));
        keys.extend(tags.iter().map(|tag| Key::Tag(tag)));
        let path = path.as_ref().map(path_tag);
        keys.extend(path.as_deref().map(Key::Tag));
        Self {
            keys: keys.into_iter().map(|key| inventory.keys.find(key)).collect(),
            id: id.map(virt_usb_model::DeviceId::get),
            serial: serial.as_deref().map(Into::into),
        }
    }

    /// The fewest rows that have all the devices that match.
    pub(crate) fn rows<'a>(&self, inventory: &'a Inventory) -> Rows<'a> {
        let Some(keys) = &self.keys else { return Rows::None };
        let postings = keys.iter().map(|key| Rows::Posting(inventory.keys.posting(*key)));
        let page = self.id.map(|id| inventory.page(id).into());
        let serial = self.serial.as_deref().map(|serial| inventory.serial(serial).into());
        postings.chain(page).chain(serial).min_by_key(Rows::len).unwrap_or(Rows::None)
    }

    /// The devices of a row that match.
    pub(crate) fn matching(&self, inventory: &Inventory, number: u32, row: &Row) -> u64 {
        let Some(keys) = &self.keys else { return 0 };
        let word =
            keys.iter().fold(u64::MAX, |word, key| word & inventory.keys.posting(*key).get(number));
        self.closer(row, word)
    }

    /// Of the devices that have all keys those that have the id and serial as well.
    pub(crate) fn closer(&self, row: &Row, word: u64) -> u64 {
        let id = self.id.map_or(u64::MAX, |id| row.with_id(id));
        let serial = self.serial.as_deref().map_or(u64::MAX, |serial| row.with_serial(serial));
        word & id & serial
    }

    /// The one key that decides alone.
    pub(crate) fn lone_key(&self) -> Option<u32> {
        match (self.keys.as_deref(), self.id, &self.serial) {
            (Some([key]), None, None) => Some(*key),
            _ => None,
        }
    }
}

impl Plan {
    pub(crate) fn new(inventory: &Inventory, question: &Question) -> Result<Self, Refusal> {
        let refused = |why: alloc::string::String| Refusal::Question(why);
        flavor::check_requests(&question.requests).map_err(|e| refused(alloc::format!("{e}")))?;
        let Weights { spare, reserve } = question.weights;
        if !question.weights.are_valid() {
            return Err(refused(alloc::format!(
                "weights: found {spare} and {reserve}, wanted 0 to {} each",
                Weights::MAX
            )));
        }
        let (mut selectors, mut counts, mut of) = (Vec::<&Selector>::new(), Vec::new(), Vec::new());
        for request in &question.requests {
            let entry = match selectors.iter().position(|known| **known == request.selector) {
                Some(known) => known,
                None => {
                    selectors.push(&request.selector);
                    counts.push(0);
                    selectors.len() - 1
                }
            };
            counts[entry] += request.count;
            of.push((entry, request.count));
        }
        let project = question.project.as_ref().map(canonical);
        let allows =
            |set: &[u8]| project.as_deref().is_some_and(|p| texts(set).any(|one| one == p));
        Ok(Self {
            entries: selectors
                .into_iter()
                .map(|selector| SelectorKeys::new(inventory, selector))
                .collect(),
            wants: Wants::new(counts),
            of,
            allows: inventory.projects.spellings().map(allows).collect(),
            oldest: question.moment.map(Moment::oldest),
            weights: question.weights,
        })
    }

    pub(crate) fn allows(&self, set: u32) -> bool {
        self.allows.get(set as usize).copied().unwrap_or(false)
    }

    /// Whether a host that was last heard of then is stale.
    pub(crate) fn is_stale(&self, received: u64) -> bool {
        self.oldest.is_some_and(|oldest| received < oldest)
    }

    /// The free devices of a row that the project may have.
    pub(crate) fn offered(&self, inventory: &Inventory, number: u32, row: &Row) -> u64 {
        inventory.available(number) & !row.withheld(|set| self.allows(set))
    }

    /// Whether the host serves all requests, however many rows it has; for `matter` see
    /// [`Wants::any`].
    pub(crate) fn serve(
        &self,
        inventory: &Inventory,
        head: u32,
        matter: impl FnOnce(Served) -> bool,
    ) -> Option<Served> {
        let row = inventory.row_at(head);
        if self.wants.are_few() && row.is_last() {
            let offered = self.offered(inventory, head, row);
            let mut words = [0; FEW];
            for (word, entry) in words.iter_mut().zip(&self.entries) {
                *word = entry.matching(inventory, head, row) & offered;
            }
            return self.wants.one_row(&words);
        }
        let words = |entry: &SelectorKeys| {
            let word = |number: u32| {
                let row = inventory.row_at(number);
                entry.matching(inventory, number, row) & self.offered(inventory, number, row)
            };
            inventory.chain(head).map(word).collect::<Vec<u64>>()
        };
        self.wants.any(&self.entries.iter().map(words).collect::<Vec<_>>(), matter)
    }

    /// The score of a host that serves.
    pub(crate) fn score(&self, inventory: &Inventory, head: u32, served: Served) -> i16 {
        let free: u32 =
            inventory.chain(head).map(|row| inventory.available(row).count_ones()).sum();
        rank::score(self.weights, served.slack, free - served.wanted)
    }
}

/// A question that is asked host by host. It stays valid while the inventory changes: it is planned
/// again after hosts were added, removed or replaced.
#[derive(Debug)]
pub struct Prepared {
    question: Question,
    plan: Plan,
    edition: u64,
}

impl Prepared {
    /// Prepares the question.
    ///
    /// # Errors
    /// [`Refusal::Question`].
    pub fn new(inventory: &Inventory, question: Question) -> Result<Self, Refusal> {
        let plan = Plan::new(inventory, &question)?;
        Ok(Self { question, plan, edition: inventory.edition() })
    }

    pub(crate) fn plan(
        &mut self,
        inventory: &Inventory,
        now: Option<u64>,
    ) -> Result<&Plan, Refusal> {
        if let (Some(moment), Some(now)) = (&mut self.question.moment, now) {
            moment.now = now;
            self.plan.oldest = Some(moment.oldest());
        }
        if self.edition != inventory.edition() {
            self.plan = Plan::new(inventory, &self.question)?;
            self.edition = inventory.edition();
        }
        Ok(&self.plan)
    }
}
