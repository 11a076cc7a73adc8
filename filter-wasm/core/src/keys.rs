//! The keys by which devices are found, and the posting of each key.

use alloc::boxed::Box;
use alloc::vec::Vec;
use core::hash::Hash;

use hashbrown::{Equivalent, HashMap};
use virt_usb_model::PortPath;

use crate::posting::{LANES, Posting};

/// A key that devices share.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Key<'a> {
    Vendor(u16),
    /// Vendor in the upper half, product in the lower.
    Kind(u32),
    Port(u64),
    Class(u8),
    Tag(&'a str),
}

#[derive(Debug, PartialEq, Eq, Hash)]
enum Stored {
    Vendor(u16),
    Kind(u32),
    Port(u64),
    Class(u8),
    Tag(Box<str>),
}

impl Equivalent<Stored> for Key<'_> {
    fn equivalent(&self, stored: &Stored) -> bool {
        *self == stored.key()
    }
}

impl Stored {
    fn key(&self) -> Key<'_> {
        match self {
            Self::Vendor(v) => Key::Vendor(*v),
            Self::Kind(k) => Key::Kind(*k),
            Self::Port(p) => Key::Port(*p),
            Self::Class(c) => Key::Class(*c),
            Self::Tag(t) => Key::Tag(t),
        }
    }
}

impl Key<'_> {
    fn stored(self) -> Stored {
        match self {
            Self::Vendor(v) => Stored::Vendor(v),
            Self::Kind(k) => Stored::Kind(k),
            Self::Port(p) => Stored::Port(p),
            Self::Class(c) => Stored::Class(c),
            Self::Tag(t) => Stored::Tag(t.into()),
        }
    }
}

/// Vendor and product as one number.
pub(crate) const fn kind(vendor: u16, product: u16) -> u32 {
    (vendor as u32) << 16 | product as u32
}

/// A port path as one number: the bus, then up to seven ports, a byte each; no port is 0.
pub(crate) fn port_code(port: &PortPath) -> u64 {
    let mut bytes = [0; 8];
    bytes[0] = port.bus();
    for (byte, port) in bytes[1..].iter_mut().zip(port.ports()) {
        *byte = *port;
    }
    u64::from_be_bytes(bytes)
}

/// The postings, by key and by number. A key lives as long as a device has it.
#[derive(Debug, Default)]
pub(crate) struct Keys {
    numbers: HashMap<Stored, u32>,
    postings: Vec<IndexedKey>,
    unused: Vec<u32>,
}

#[derive(Debug)]
struct IndexedKey {
    key: Stored,
    posting: Posting,
    /// For a kind, the number of its vendor: a device of the kind is a device of the vendor.
    vendor: u32,
}

impl Keys {
    pub(crate) fn len(&self) -> usize {
        self.numbers.len()
    }

    pub(crate) fn find(&self, key: Key<'_>) -> Option<u32> {
        self.numbers.get(&key).copied()
    }

    /// The key's number; a new one if need be, for the caller to give it a device.
    pub(crate) fn number(&mut self, key: Key<'_>) -> u32 {
        if let Some(number) = self.find(key) {
            return number;
        }
        let vendor = match key {
            Key::Kind(kind) => self.number(Key::Vendor((kind >> 16) as u16)),
            _ => 0,
        };
        let entry = IndexedKey { key: key.stored(), posting: Posting::default(), vendor };
        let number = match self.unused.pop() {
            Some(number) => {
                self.postings[number as usize] = entry;
                number
            }
            None => {
                self.postings.push(entry);
                self.postings.len() as u32 - 1
            }
        };
        self.numbers.insert(key.stored(), number);
        number
    }

    /// The vendor of a kind.
    pub(crate) fn vendor_of(&self, kind: u32) -> u32 {
        self.postings[kind as usize].vendor
    }

    pub(crate) fn posting(&self, number: u32) -> &Posting {
        &self.postings[number as usize].posting
    }

    pub(crate) fn posting_mut(&mut self, number: u32) -> &mut Posting {
        &mut self.postings[number as usize].posting
    }

    /// Takes devices of a row away, and the key with the last of them.
    pub(crate) fn clear(&mut self, number: u32, row: u32, devices: u64, available: &[u64; LANES]) {
        let IndexedKey { key, posting, .. } = &mut self.postings[number as usize];
        if posting.rows() == 0 {
            return;
        }
        posting.clear(row, devices, available);
        if posting.rows() == 0 {
            self.numbers.remove(&key.key());
            self.unused.push(number);
        }
    }
}
