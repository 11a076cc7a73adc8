//! The fleet: its hosts as rows of devices, and the index over them.
//!
//! ```text
//! names: "host1" ─► head row ─► Row { devices, serials, next } ─► … (one row per 64 devices)
//! blocks: 64 rows each: what is free, when it was received, which rows can be counted by words
//! keys: vendor, vendor:product, port, class, tag ─► Posting (row ─► a bit a device)
//! serials, pages: hash ─► the row that may have it
//! ```
//! A device that changes its state changes one bit and the counts of its few keys.

use alloc::boxed::Box;
use alloc::collections::BTreeMap;
use alloc::string::{String, ToString};
use alloc::vec::Vec;

use hashbrown::{DefaultHashBuilder, HashTable};
use virt_usb_model::scheduling::Statistics;
use virt_usb_model::{DeviceId, Status};

use crate::document::{self, Read};
use crate::hash_index::{Hint, Sparse};
use crate::host_builder::{Draft, DraftDevice, Traits, texts};
use crate::interner::Sets;
use crate::keys::{Key, Keys};
use crate::posting::{LANES, bits, split};
use crate::refusal::Refusal;

/// Marks the absence of a row.
const NONE: u32 = u32::MAX;
/// Device ids are given out by the million: see the host's number in DESIGN.
const PAGE: u64 = 1_000_000;
/// Maximum number of refused lines of one load that are described; the rest are counted.
const SHOWN: usize = 100;

/// A device, as far as the index does not say it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Device {
    pub(crate) id: u64,
    /// Numbers of keys, and of a set of them.
    kind: u32,
    port: u32,
    traits: u32,
    /// Where its serial ends among the row's.
    serial_end: u32,
}

/// Up to 64 devices of one host.
#[derive(Debug)]
pub(crate) struct Row {
    /// The host's first row.
    pub(crate) head: u32,
    next: u32,
    pub(crate) devices: Box<[Device]>,
    serials: Box<str>,
    /// Devices that only some projects may have: the set of projects, and the devices.
    restricted: Box<[(u32, u64)]>,
    /// Of a head alone.
    name: Box<str>,
}

impl Row {
    fn unused() -> Self {
        Self {
            head: NONE,
            next: NONE,
            devices: Box::default(),
            serials: Box::default(),
            restricted: Box::default(),
            name: Box::default(),
        }
    }

    fn serial(&self, at: usize) -> &str {
        let start = at
            .checked_sub(1)
            .and_then(|before| self.devices.get(before))
            .map_or(0, |d| d.serial_end);
        let end = self.devices.get(at).map_or(0, |d| d.serial_end);
        self.serials.get(start as usize..end as usize).unwrap_or_default()
    }

    /// Whether the host has no row after this.
    pub(crate) const fn is_last(&self) -> bool {
        self.next == NONE
    }

    /// The devices with this serial.
    pub(crate) fn with_serial(&self, serial: &str) -> u64 {
        (0..self.devices.len())
            .filter(|at| self.serial(*at) == serial)
            .fold(0, |word, at| word | 1 << at)
    }

    pub(crate) fn with_id(&self, id: u64) -> u64 {
        self.devices.binary_search_by_key(&id, |device| device.id).map_or(0, |at| 1 << at)
    }

    /// The devices that are available only to projects that `allows` rejects.
    pub(crate) fn withheld(&self, allows: impl Fn(u32) -> bool) -> u64 {
        self.restricted
            .iter()
            .filter(|(set, _)| !allows(*set))
            .fold(0, |word, (_, devices)| word | devices)
    }
}

/// A query about 64 rows at once.
#[derive(Debug, Clone)]
pub(crate) struct Block {
    /// For each row its free devices.
    pub(crate) available: [u64; LANES],
    /// For each host of one row how many there are.
    pub(crate) free: [u8; LANES],
    /// For each head the hash that orders equal scores.
    pub(crate) ties: [u16; LANES],
    /// For each head when it was last heard of.
    pub(crate) received: [u64; LANES],
    /// The least of those.
    pub(crate) oldest: u64,
    /// Rows that are a host's first.
    pub(crate) heads: u64,
    /// Rows whose host has no other row.
    pub(crate) single: u64,
    /// Rows of `single` whose devices are all available to all projects.
    pub(crate) plain: u64,
}

impl Block {
    const fn new() -> Self {
        Self {
            available: [0; LANES],
            free: [0; LANES],
            ties: [0; LANES],
            received: [0; LANES],
            oldest: u64::MAX,
            heads: 0,
            single: 0,
            plain: 0,
        }
    }

    /// The heads that were received at `oldest` or later.
    pub(crate) fn fresh(&self, oldest: u64) -> u64 {
        if self.oldest >= oldest {
            return self.heads;
        }
        let heard = |lane: &usize| self.received[*lane] >= oldest;
        bits(self.heads).filter(heard).fold(0, |word, lane| word | 1 << lane)
    }

    fn hear(&mut self, lane: usize, received: u64) {
        let before = core::mem::replace(&mut self.received[lane], received);
        if before <= self.oldest {
            self.oldest =
                bits(self.heads).map(|lane| self.received[lane]).min().unwrap_or(u64::MAX);
        } else {
            self.oldest = self.oldest.min(received);
        }
    }
}

/// The fleet's devices, indexed.
#[derive(Debug, Default)]
pub struct Inventory {
    names: HashTable<u32>,
    hasher: DefaultHashBuilder,
    rows: Vec<Row>,
    pub(crate) blocks: Vec<Block>,
    unused: Vec<u32>,
    pub(crate) keys: Keys,
    traits: Sets<Box<[u32]>>,
    pub(crate) projects: Sets<()>,
    serials: Sparse,
    pages: Sparse,
    revision: u64,
    edition: u64,
    draft: Draft,
}

/// Result of a load.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Loaded {
    /// Hosts taken, new ones and replaced ones.
    pub hosts: u32,
    /// Devices of those.
    pub devices: u32,
    /// Lines refused. A refused line changes nothing: its host, if it is known, is as it was.
    pub refused: u32,
    /// The first hundred of them.
    pub problems: Vec<RefusedLine>,
}

/// A line that was not taken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RefusedLine {
    /// Number of the line in the text, from 1.
    pub line: u32,
    /// The place, what was found there, and what was wanted.
    pub why: String,
}

impl Inventory {
    /// An empty one.
    pub fn new() -> Self {
        Self::default()
    }

    /// Grows by one with every change; the same number means the same inventory.
    pub const fn revision(&self) -> u64 {
        self.revision
    }

    /// Counts what there is, a host at a time.
    pub fn statistics(&self) -> Statistics {
        let rows = || self.rows.iter().filter(|row| row.head != NONE);
        let count = |block: &Block| {
            block.available.iter().map(|word| u64::from(word.count_ones())).sum::<u64>()
        };
        Statistics {
            revision: self.revision,
            hosts: self.names.len() as u64,
            devices: rows().map(|row| row.devices.len() as u64).sum(),
            available: self.blocks.iter().map(count).sum(),
            keys: self.keys.len() as u64,
        }
    }

    /// Takes host documents, one a line; empty lines are passed over. Each is a host that is new or
    /// replaced whole, last heard of at `received`. A line that is refused keeps no other from
    /// being taken.
    pub fn load(&mut self, lines: &str, received: u64) -> Loaded {
        let mut loaded = Loaded::default();
        let mut draft = core::mem::take(&mut self.draft);
        let (mut rest, mut line) = (lines, 0);
        while !rest.is_empty() {
            let read;
            (read, rest) = document::read(rest, &mut draft);
            line += 1;
            let done = match read {
                Read::Done => self.put(&mut draft, received).map_err(|e| e.to_string()),
                Read::Nothing => continue,
                Read::Refused(why) => Err(why),
            };
            match done {
                Ok(()) => {
                    loaded.hosts += 1;
                    loaded.devices += draft.devices.len() as u32;
                }
                Err(why) => {
                    loaded.refused += 1;
                    if loaded.problems.len() < SHOWN {
                        loaded.problems.push(RefusedLine { line, why });
                    }
                }
            }
        }
        self.draft = draft;
        loaded
    }

    /// Takes one host, new or in place of what was known of it.
    ///
    /// # Errors
    /// [`Refusal::Host`] for a name or devices that cannot be.
    pub fn put(&mut self, draft: &mut Draft, received: u64) -> Result<(), Refusal> {
        draft.settle()?;
        self.revision += 1;
        self.edition += 1;
        let head = match self.find(&draft.name) {
            Some(head) => {
                self.empty(head);
                head
            }
            None => self.name(&draft.name),
        };
        let (block, lane) = split(head);
        let mut row = head;
        let mut parts = draft.devices.chunks(LANES).peekable();
        let mut restricted = self.fill(row, head, parts.next().unwrap_or_default(), draft);
        let block_of_head = &mut self.blocks[block as usize];
        block_of_head.heads |= 1 << lane;
        block_of_head.hear(lane, received);
        let single = parts.peek().is_none();
        for part in parts {
            let next = self.row();
            self.rows[row as usize].next = next;
            restricted |= self.fill(next, head, part, draft);
            row = next;
        }
        let block = &mut self.blocks[block as usize];
        block.single |= u64::from(single) << lane;
        block.plain |= u64::from(single && !restricted) << lane;
        Ok(())
    }

    /// Forgets a host; false if there was none.
    pub fn remove(&mut self, name: &str) -> bool {
        let Some(head) = self.find(name) else { return false };
        self.revision += 1;
        self.edition += 1;
        self.empty(head);
        let hash = name_hash(&self.hasher, name);
        if let Ok(entry) = self.names.find_entry(hash, |row| *row == head) {
            entry.remove();
        }
        let (block, lane) = split(head);
        let block = &mut self.blocks[block as usize];
        block.heads &= !(1 << lane);
        // Later than any, so that it is never the oldest.
        block.hear(lane, u64::MAX);
        self.free(head);
        true
    }

    /// Records that a host is alive, although it sent no document; false if the host is unknown.
    pub fn touch(&mut self, name: &str, received: u64) -> bool {
        let Some(head) = self.find(name) else { return false };
        let (block, lane) = split(head);
        self.revision += 1;
        self.blocks[block as usize].hear(lane, received);
        true
    }

    /// Gives one device another state; true if that makes a difference to who may have it.
    ///
    /// # Errors
    /// [`Refusal::UnknownHost`], [`Refusal::UnknownDevice`].
    pub fn set_status(
        &mut self,
        host: &str,
        device: DeviceId,
        status: Status,
    ) -> Result<bool, Refusal> {
        let head = self.find(host).ok_or_else(|| Refusal::UnknownHost(host.to_string()))?;
        let (row, bit) = self
            .chain(head)
            .map(|row| (row, self.rows[row as usize].with_id(device.get())))
            .find(|(_, bit)| *bit != 0)
            .ok_or(Refusal::UnknownDevice(device.get()))?;
        let (number, lane) = split(row);
        let block = &mut self.blocks[number as usize];
        let before = block.available[lane];
        let after = if status == Status::Available { before | bit } else { before & !bit };
        if before == after {
            return Ok(false);
        }
        self.revision += 1;
        block.available[lane] = after;
        block.free[lane] = after.count_ones() as u8;
        let device = self.rows[row as usize].devices[bit.trailing_zeros() as usize];
        let vendor = self.keys.vendor_of(device.kind);
        let shared = self.traits.get(device.traits).iter().copied();
        for key in [vendor, device.kind, device.port].into_iter().chain(shared) {
            self.keys.posting_mut(key).recount(row, after);
        }
        Ok(true)
    }

    // --- what the other modules look at ---

    /// Grows when keys or projects may have got another number: what was planned before is void.
    pub(crate) const fn edition(&self) -> u64 {
        self.edition
    }

    /// A host's first row.
    pub(crate) fn find(&self, name: &str) -> Option<u32> {
        let hash = name_hash(&self.hasher, name);
        self.names.find(hash, |row| &*self.rows[*row as usize].name == name).copied()
    }

    pub(crate) fn row_at(&self, row: u32) -> &Row {
        &self.rows[row as usize]
    }

    pub(crate) fn host_name(&self, head: u32) -> &str {
        &self.rows[head as usize].name
    }

    /// All rows of a host.
    pub(crate) fn chain(&self, head: u32) -> impl Iterator<Item = u32> {
        core::iter::successors(Some(head), |row| {
            Some(self.rows[*row as usize].next).filter(|n| *n != NONE)
        })
    }

    pub(crate) fn available(&self, row: u32) -> u64 {
        let (block, lane) = split(row);
        self.blocks[block as usize].available[lane]
    }

    /// The rows that may have the serial.
    pub(crate) fn serial(&self, serial: &str) -> Hint<'_> {
        self.serials.find(self.serials.hash(serial.as_bytes()))
    }

    /// The rows that may have the device id.
    pub(crate) fn page(&self, id: u64) -> Hint<'_> {
        self.pages.find(self.pages.hash(id / PAGE))
    }

    // --- rows ---

    fn name(&mut self, name: &str) -> u32 {
        let head = self.row();
        self.rows[head as usize].name = name.into();
        let (block, lane) = split(head);
        self.blocks[block as usize].ties[lane] = tie(name);
        let (rows, hasher) = (&self.rows, &self.hasher);
        self.names.insert_unique(name_hash(hasher, name), head, |row| {
            name_hash(hasher, &rows[*row as usize].name)
        });
        head
    }

    fn row(&mut self) -> u32 {
        if let Some(row) = self.unused.pop() {
            return row;
        }
        let row = self.rows.len() as u32;
        self.rows.push(Row::unused());
        if self.rows.len() > self.blocks.len() * LANES {
            self.blocks.push(Block::new());
        }
        row
    }

    fn free(&mut self, row: u32) {
        self.rows[row as usize] = Row::unused();
        self.unused.push(row);
    }

    /// Fills an empty row; true if some of its devices are available to certain projects only.
    fn fill(&mut self, row: u32, head: u32, devices: &[DraftDevice], draft: &Draft) -> bool {
        let (block, lane) = split(row);
        let available = devices
            .iter()
            .enumerate()
            .filter(|(_, device)| device.available)
            .fold(0u64, |word, (at, _)| word | 1 << at);
        let block = &mut self.blocks[block as usize];
        block.available[lane] = available;
        block.free[lane] = available.count_ones() as u8;
        let mut stored = Vec::with_capacity(devices.len());
        let mut serials = String::new();
        let mut restricted = BTreeMap::<u32, u64>::new();
        let mut page = 0;
        for (at, device) in devices.iter().enumerate() {
            let bit = 1 << at;
            let add = |keys: &mut Keys, key: Key<'_>| {
                let number = keys.number(key);
                keys.posting_mut(number).add(row, bit, &block.available);
                number
            };
            let kind = add(&mut self.keys, Key::Kind(device.kind));
            self.keys.posting_mut(self.keys.vendor_of(kind)).add(row, bit, &block.available);
            let port = add(&mut self.keys, Key::Port(device.port));
            let traits = self.traits.take(draft.slice(&device.traits), || {
                let read = Traits::read(draft.slice(&device.traits));
                let classes = read.classes.iter().map(|class| Key::Class(*class));
                let mut numbers: Vec<u32> = classes
                    .chain(texts(read.tags).map(Key::Tag))
                    .map(|key| self.keys.number(key))
                    .collect();
                numbers.sort_unstable();
                numbers.dedup();
                numbers.into_boxed_slice()
            });
            for number in self.traits.get(traits) {
                self.keys.posting_mut(*number).add(row, bit, &block.available);
            }
            let serial = draft.slice(&device.serial);
            if !serial.is_empty() {
                self.serials.add(self.serials.hash(serial), row);
                serials.push_str(core::str::from_utf8(serial).unwrap_or_default());
            }
            if !device.projects.is_empty() {
                let set = self.projects.take(draft.slice(&device.projects), || ());
                *restricted.entry(set).or_default() |= bit;
            }
            if at == 0 || device.id / PAGE != page {
                page = device.id / PAGE;
                self.pages.add(self.pages.hash(page), row);
            }
            stored.push(Device {
                id: device.id,
                kind,
                port,
                traits,
                serial_end: serials.len() as u32,
            });
        }
        let place = &mut self.rows[row as usize];
        place.head = head;
        place.next = NONE;
        place.devices = stored.into_boxed_slice();
        place.serials = serials.into_boxed_str();
        place.restricted = restricted.into_iter().collect();
        !place.restricted.is_empty()
    }

    /// Takes all devices of a host out of the index, and gives its further rows back; the first
    /// stays, with its name.
    fn empty(&mut self, head: u32) {
        let rows: Vec<u32> = self.chain(head).collect();
        for row in rows {
            let (block, lane) = split(row);
            let block = &mut self.blocks[block as usize];
            let place = &self.rows[row as usize];
            for (at, device) in place.devices.iter().enumerate() {
                let bit = 1 << at;
                let serial = place.serial(at);
                if !serial.is_empty() {
                    self.serials.remove(self.serials.hash(serial.as_bytes()), row);
                }
                let vendor = self.keys.vendor_of(device.kind);
                let shared = self.traits.get(device.traits).iter().copied();
                for key in [vendor, device.kind, device.port].into_iter().chain(shared) {
                    self.keys.clear(key, row, bit, &block.available);
                }
                self.traits.give_back(device.traits);
                self.pages.remove(self.pages.hash(device.id / PAGE), row);
            }
            for (set, devices) in &place.restricted {
                for _ in 0..devices.count_ones() {
                    self.projects.give_back(*set);
                }
            }
            block.available[lane] = 0;
            block.free[lane] = 0;
            block.single &= !(1 << lane);
            block.plain &= !(1 << lane);
            let place = &mut self.rows[row as usize];
            place.devices = Box::default();
            place.serials = Box::default();
            place.restricted = Box::default();
            place.next = NONE;
            if row != head {
                self.free(row);
            }
        }
    }
}

fn name_hash(hasher: &DefaultHashBuilder, name: &str) -> u64 {
    core::hash::BuildHasher::hash_one(hasher, name)
}

/// Orders hosts of equal score: FNV-1a of the name, folded to 16 bits.
pub(crate) fn tie(name: &str) -> u16 {
    let hash = name
        .bytes()
        .fold(0x811c_9dc5u32, |hash, b| (hash ^ u32::from(b)).wrapping_mul(0x0100_0193));
    (hash ^ hash >> 16) as u16
}
