//! The best hosts of the fleet.
//!
//! The request with the fewest rows leads: only its rows are checked, a chunk of 64 at a time. A
//! single request with a single key (the usual flavor) needs no check of devices: the counts of the
//! chunk decide about all 64 rows. Hosts with more than one row, and hosts with devices for certain
//! projects only, are checked one by one.

use alloc::string::ToString;
use alloc::vec::Vec;

use virt_usb_model::scheduling::{Placement, Question, Selection, Weights};

use crate::feasibility::FEW;
use crate::inventory::{Block, Inventory};
use crate::plan::{Plan, Rows, SelectorKeys};
use crate::posting::{Chunk, LANES, Posting, bits, split};
use crate::rank::{self, Best, rank};
use crate::refusal::Refusal;

impl Inventory {
    /// The best hosts, at most `limit` of them, among the `candidates` or else in the whole fleet.
    ///
    /// A candidate that the inventory does not know cannot serve, and is passed over, as is one
    /// named twice. Who asks for no device is refused nowhere: every candidate will do, stale and
    /// unknown ones too; hosts with few free devices are preferred.
    ///
    /// # Errors
    /// [`Refusal::Question`].
    pub fn select(
        &self,
        question: &Question,
        candidates: Option<&mut dyn Iterator<Item = &str>>,
        limit: usize,
    ) -> Result<Selection, Refusal> {
        let plan = Plan::new(self, question)?;
        if question.requests.is_empty() {
            return Ok(self.any(&plan, candidates, limit));
        }
        let among = candidates.map(|names| Among::new(self, names));
        let by_name = |a: u32, b: u32| self.host_name(a).cmp(self.host_name(b));
        let mut search = Search {
            inventory: self,
            plan: &plan,
            among,
            best: Best::new(limit, by_name),
            matched: 0,
        };
        search.run();
        let matched = search.matched;
        let place = |(ranked, head): (i32, u32)| Placement {
            host: self.host_name(head).to_string(),
            score: rank::score_of(ranked),
        };
        Ok(Selection { matched, placements: search.best.finish().into_iter().map(place).collect() })
    }

    /// Selects hosts for a question without requests.
    fn any(
        &self,
        plan: &Plan,
        candidates: Option<&mut dyn Iterator<Item = &str>>,
        limit: usize,
    ) -> Selection {
        let score = |head: Option<u32>| {
            let free = head.map_or(0, |head| {
                self.chain(head).map(|row| self.available(row).count_ones()).sum::<u32>()
            });
            rank::score(plan.weights, 0, free)
        };
        let names: Vec<&str> = match candidates {
            Some(names) => names.filter(|name| !name.is_empty()).collect(),
            None => self.heads().map(|head| self.host_name(head)).collect(),
        };
        let mut ranked: Vec<(i32, &str)> = names
            .into_iter()
            .map(|name| (rank(score(self.find(name)), crate::inventory::tie(name)), name))
            .collect();
        ranked.sort_unstable_by(|a, b| b.0.cmp(&a.0).then_with(|| a.1.cmp(b.1)));
        ranked.dedup();
        let place = |(ranked, name): &(i32, &str)| Placement {
            host: (*name).to_string(),
            score: rank::score_of(*ranked),
        };
        Selection {
            matched: ranked.len() as u32,
            placements: ranked.iter().take(limit).map(place).collect(),
        }
    }

    pub(crate) fn heads(&self) -> impl Iterator<Item = u32> {
        (0u32..).zip(&self.blocks).flat_map(|(number, block)| {
            bits(block.heads).map(move |lane| number * LANES as u32 + lane as u32)
        })
    }
}

/// The heads of the candidates.
struct Among {
    blocks: Vec<u64>,
    heads: usize,
}

impl Among {
    fn new(inventory: &Inventory, names: &mut dyn Iterator<Item = &str>) -> Self {
        let mut blocks = alloc::vec![0u64; inventory.blocks.len()];
        for head in names.filter_map(|name| inventory.find(name)) {
            let (block, lane) = split(head);
            blocks[block as usize] |= 1 << lane;
        }
        let heads = blocks.iter().map(|word| word.count_ones() as usize).sum();
        Self { blocks, heads }
    }

    fn heads(&self) -> impl Iterator<Item = u32> {
        (0u32..).zip(&self.blocks).flat_map(|(number, word)| {
            bits(*word).map(move |lane| number * LANES as u32 + lane as u32)
        })
    }
}

struct Search<'a, F> {
    inventory: &'a Inventory,
    plan: &'a Plan,
    among: Option<Among>,
    best: Best<F>,
    matched: u32,
}

impl<'a, F: Fn(u32, u32) -> core::cmp::Ordering> Search<'a, F> {
    fn run(&mut self) {
        let (inventory, entries) = (self.inventory, &self.plan.entries);
        let leader = entries
            .iter()
            .map(|entry| (entry, entry.rows(inventory)))
            .min_by_key(|(_, rows)| rows.len());
        let Some((_, rows)) = leader else { return };
        if let Some(among) = self.among.take_if(|among| among.heads < rows.len()) {
            among.heads().for_each(|head| self.host(head));
            return;
        }
        match (rows, entries.as_slice()) {
            (Rows::None, _) => {}
            (Rows::One(row), _) => self.host(inventory.row_at(row).head),
            (Rows::Posting(posting), [one]) if one.lone_key().is_some() => self.count(posting),
            (Rows::Posting(posting), _) => self.look(posting),
        }
    }

    /// The heads of a block that are candidates and heard of lately.
    fn eligible(&self, number: u32, block: &Block) -> u64 {
        let fresh = self.plan.oldest.map_or(block.heads, |oldest| block.fresh(oldest));
        let among = self.among.as_ref().map_or(u64::MAX, |among| among.blocks[number as usize]);
        fresh & among
    }

    fn accept(&mut self, head: u32, score: i16) {
        let (block, lane) = split(head);
        self.matched += 1;
        self.best.offer(rank(score, self.inventory.blocks[block as usize].ties[lane]), head);
    }

    /// One host, whatever it is.
    fn host(&mut self, head: u32) {
        let (number, lane) = split(head);
        let block = &self.inventory.blocks[number as usize];
        if self.eligible(number, block) >> lane & 1 == 0 {
            return;
        }
        let score = |served| self.plan.score(self.inventory, head, served);
        let matter = |served| rank(score(served), block.ties[lane]) >= self.best.least();
        if let Some(served) = self.plan.serve(self.inventory, head, matter) {
            self.accept(head, score(served));
        }
    }

    /// Hosts that could not be decided with the others of their chunk, each once.
    fn closer(&mut self, mut heads: Vec<u32>) {
        heads.sort_unstable();
        heads.dedup();
        heads.into_iter().for_each(|head| self.host(head));
    }

    /// One request, one key: how many free devices have it decides.
    fn count(&mut self, posting: &Posting) {
        let wanted = self.plan.wants.total();
        let mut closer = Vec::new();
        for (number, chunk) in posting.chunks() {
            let block = &self.inventory.blocks[number as usize];
            let first = number * LANES as u32;
            let odd = chunk.present() & !block.plain;
            closer.extend(bits(odd).map(|lane| self.inventory.row_at(first + lane as u32).head));
            let lanes = chunk.present() & block.plain & self.eligible(number, block);
            match chunk.counts() {
                Some(counts) => {
                    let chunk = Counted { present: chunk.present(), counts };
                    self.count_together(first, block, &chunk, lanes, wanted);
                }
                None => {
                    for lane in bits(lanes) {
                        let has = (chunk.get(lane) & block.available[lane]).count_ones();
                        if let Some(slack) = has.checked_sub(wanted) {
                            let others = u32::from(block.free[lane]) - has;
                            self.accept(
                                first + lane as u32,
                                rank::score(self.plan.weights, slack, others),
                            );
                        }
                    }
                }
            }
        }
        self.closer(closer);
    }

    /// The hosts of one chunk, those of `lanes`. Most of them are not among the best, which their
    /// scores alone tell.
    fn count_together(
        &mut self,
        first: u32,
        block: &Block,
        chunk: &Counted<'_>,
        lanes: u64,
        wanted: u32,
    ) {
        let mut scores = scores(chunk.counts, &block.free, wanted, self.plan.weights);
        // Those that are out for another reason; mostly there are none.
        for lane in bits(chunk.present & !lanes) {
            scores[lane] = NOT;
        }
        let served =
            |most: (u16, i16), score: &i16| (most.0 + u16::from(*score != NOT), most.1.max(*score));
        let (matched, most) = scores.iter().fold((0, NOT), served);
        self.matched += u32::from(matched);
        let least = self.best.least();
        if i32::from(most) < rank::score_of(least) {
            return;
        }
        for (group, scores) in scores.chunks_exact(GROUP).enumerate() {
            let least = rank::score_of(self.best.least());
            if i32::from(scores.iter().fold(NOT, |most, score| most.max(*score))) < least {
                continue;
            }
            for (lane, score) in (group * GROUP..).zip(scores) {
                if *score != NOT && i32::from(*score) >= least {
                    self.best.offer(rank(*score, block.ties[lane]), first + lane as u32);
                }
            }
        }
    }

    /// Several requests or several keys: the words of each chunk decide.
    fn look(&mut self, posting: &Posting) {
        let mut closer = Vec::new();
        let mut chunks = Chunks::default();
        for (number, chunk) in posting.chunks() {
            let block = &self.inventory.blocks[number as usize];
            let first = number * LANES as u32;
            let wide = if self.plan.wants.are_few() {
                chunk.present() & !block.single
            } else {
                chunk.present()
            };
            closer.extend(bits(wide).map(|lane| self.inventory.row_at(first + lane as u32).head));
            let lanes = chunk.present() & !wide & self.eligible(number, block);
            if lanes == 0 || !chunks.find(self.inventory, &self.plan.entries, number) {
                continue;
            }
            for lane in bits(lanes) {
                self.look_at(&chunks, first + lane as u32, lane, block);
            }
        }
        self.closer(closer);
    }

    #[inline]
    fn look_at(&mut self, chunks: &Chunks<'a>, head: u32, lane: usize, block: &Block) {
        let mut offered = block.available[lane];
        if block.plain >> lane & 1 == 0 {
            let plan = self.plan;
            offered &= !self.inventory.row_at(head).withheld(|set| plan.allows(set));
        }
        let mut words = [0; FEW];
        for (at, entry) in self.plan.entries.iter().enumerate() {
            let word = chunks.of(at).iter().fold(offered, |word, chunk| word & chunk.get(lane));
            words[at] = match entry.lone_key() {
                Some(_) => word,
                None => entry.closer(self.inventory.row_at(head), word),
            };
        }
        if let Some(served) = self.plan.wants.one_row(&words) {
            let others = u32::from(block.free[lane]) - served.wanted;
            self.accept(head, rank::score(self.plan.weights, served.slack, others));
        }
    }
}

/// The chunks of one block, for all keys of all entries.
#[derive(Default)]
struct Chunks<'a> {
    chunks: Vec<&'a Chunk>,
    /// Where each entry's end.
    ends: Vec<usize>,
}

impl<'a> Chunks<'a> {
    /// False if some key has no row in the block: then no host of it serves.
    fn find(&mut self, inventory: &'a Inventory, entries: &[SelectorKeys], block: u32) -> bool {
        self.chunks.clear();
        self.ends.clear();
        for entry in entries {
            for key in entry.keys.iter().flatten() {
                match inventory.keys.posting(*key).chunk(block) {
                    Some(chunk) => self.chunks.push(chunk),
                    None => return false,
                }
            }
            self.ends.push(self.chunks.len());
        }
        true
    }

    fn of(&self, entry: usize) -> &[&'a Chunk] {
        let start = entry.checked_sub(1).map_or(0, |before| self.ends[before]);
        &self.chunks[start..self.ends[entry]]
    }
}

/// A chunk with counts.
struct Counted<'a> {
    present: u64,
    counts: &'a [u8; LANES],
}

/// Number of scores that are compared with the best ones at a time.
const GROUP: usize = 8;

/// Score of a host that cannot serve; no other score is as low.
const NOT: i16 = i16::MIN;

/// The scores of 64 hosts of one row. Written for the compiler to work out many at once: as
/// [`rank::score`], whose bounds a row cannot reach.
#[inline]
fn scores(counts: &[u8; LANES], free: &[u8; LANES], wanted: u32, weights: Weights) -> [i16; LANES] {
    let (spare, reserve) = (i16::from(weights.spare), i16::from(weights.reserve));
    let wanted = wanted.min(LANES as u32 + 1) as i16;
    let mut scores = [NOT; LANES];
    for lane in 0..LANES {
        let has = i16::from(counts[lane]);
        let others = i16::from(free[lane]) - has;
        let score = spare.wrapping_mul(has - wanted).wrapping_sub(reserve.wrapping_mul(others));
        scores[lane] = if has >= wanted { score } else { NOT };
    }
    scores
}
