//! One call with what it is about: the domain, the configuration, and what the hints say of it.

use std::path::{Path, PathBuf};

use virt_usb_config::{Config, ConfigError, rules};
use virt_usb_domxml::{Document, Domain};
use virt_usb_store::Store;
use virt_usb_store::hints::{Hint, HintSubject, look, may_know};

use crate::call::Call;

/// Where no folder can be.
const NO_FOLDER: &str = "/dev/null";

/// What a record says of a call that was none of our business.
pub(crate) const NOTHING: &str = "nothing to do";

/// A call that could not be handled.
#[derive(Debug)]
pub struct HookError {
    /// Whether the domain asks for a device of ours or holds one: then some operations are refused.
    pub concerned: bool,
    /// What went wrong, and what to do.
    pub what: String,
}

impl HookError {
    pub(crate) fn of(concerned: bool, what: impl std::fmt::Display) -> Self {
        Self { concerned, what: what.to_string() }
    }
}

/// One call with all that it is about.
pub(crate) struct Job<'a> {
    pub(crate) call: &'a Call,
    pub(crate) domain: &'a Domain,
    pub(crate) document: &'a Document<'a>,
    pub(crate) config: Result<Config, ConfigError>,
}

impl Job<'_> {
    /// The configuration, for whoever cannot do without.
    pub(crate) fn config(&self, concerned: bool) -> Result<&Config, HookError> {
        self.config.as_ref().map_err(|e| HookError::of(concerned, e))
    }

    /// Refuses a configuration that has lost the whitelist.
    pub(crate) fn admit(
        &self,
        store: &Store,
        config: &Config,
        concerned: bool,
    ) -> Result<(), HookError> {
        rules::admit(store, config, self.call.config.as_deref())
            .map_err(|e| HookError::of(concerned, e))
    }

    /// Where hints are looked for. With a wrong configuration that does not say where: a place
    /// where nothing can be looked up, so that no hint is sure.
    pub(crate) fn state_dir(&self) -> PathBuf {
        match &self.config {
            Ok(config) => config.state_dir.clone(),
            Err(e) => e.readable().state_dir.unwrap_or_else(|| NO_FOLDER.into()),
        }
    }

    /// Whether the database is worth asking about this instance.
    pub(crate) fn may_be_known(&self, state_dir: &Path) -> bool {
        let known = |id| {
            may_know(state_dir, HintSubject::Instance(id))
                || may_know(state_dir, HintSubject::Assigned(id))
        };
        self.domain.uuid.is_some_and(known)
    }

    /// Whether this instance surely holds a device: only then may an alias of our form be ours.
    pub(crate) fn is_holder(&self, state_dir: &Path) -> bool {
        self.domain.uuid.is_some_and(|id| look(state_dir, HintSubject::Instance(id)) == Hint::Yes)
    }

    /// Whether something is surely assigned to this instance.
    pub(crate) fn is_assigned(&self, state_dir: &Path) -> bool {
        self.domain.uuid.is_some_and(|id| look(state_dir, HintSubject::Assigned(id)) == Hint::Yes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn where_no_folder_can_be_no_hint_is_sure() {
        assert_eq!(look(Path::new(NO_FOLDER), HintSubject::Flavor("erp")), Hint::Unsure);
    }
}
