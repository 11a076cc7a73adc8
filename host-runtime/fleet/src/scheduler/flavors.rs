//! The fleet's flavors, for questions that name one.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use virt_usb_model::{Flavor, ParseError};

use crate::reader::Sink;

/// As they stand in etcd; clones are the same.
#[derive(Debug, Clone, Default)]
pub(super) struct Flavors(Arc<Mutex<Known>>);

#[derive(Debug, Default)]
struct Known {
    by_name: HashMap<String, String>,
    /// Whether all of them were heard of.
    listed: bool,
}

impl Flavors {
    fn known(&self) -> MutexGuard<'_, Known> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// None: there is none of that name.
    pub(super) fn find(&self, name: &str) -> Option<Result<Flavor, ParseError>> {
        self.known().by_name.get(name).map(|text| Flavor::parse(text))
    }

    /// Whether all of them are known.
    pub(super) fn listed(&self) -> bool {
        self.known().listed
    }
}

impl Sink for Flavors {
    fn put(&mut self, key: &str, value: &[u8], _: i64) {
        let text = String::from_utf8_lossy(value).into_owned();
        self.known().by_name.insert(key.to_owned(), text);
    }

    fn gone(&mut self, key: &str) {
        self.known().by_name.remove(key);
    }

    fn listed(&mut self) {
        self.known().listed = true;
    }
}
