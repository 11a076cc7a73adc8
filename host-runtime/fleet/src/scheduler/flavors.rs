//! The fleet's flavors, for requests that name one.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use virt_usb_model::{Flavor, ParseError};

use crate::reader::Sink;

/// The flavors in etcd. Clones share their content.
#[derive(Debug, Clone, Default)]
pub(super) struct Flavors(Arc<Mutex<Known>>);

#[derive(Debug, Default)]
struct Known {
    by_name: HashMap<String, String>,
    /// Whether the first list is complete.
    listed: bool,
}

impl Flavors {
    fn known(&self) -> MutexGuard<'_, Known> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Parses the flavor with that name. `None` if there is none.
    pub(super) fn find(&self, name: &str) -> Option<Result<Flavor, ParseError>> {
        self.known().by_name.get(name).map(|text| Flavor::parse(text))
    }

    /// Whether all flavors are known.
    pub(super) fn listed(&self) -> bool {
        self.known().listed
    }
}

impl Sink for Flavors {
    fn put(&mut self, key: &str, value: &[u8], _: i64) {
        let text = String::from_utf8_lossy(value).into_owned();
        self.known().by_name.insert(key.to_owned(), text);
    }

    fn removed(&mut self, key: &str) {
        self.known().by_name.remove(key);
    }

    fn listed(&mut self) {
        self.known().listed = true;
    }
}
