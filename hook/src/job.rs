//! A call with its domain, its configuration, and what the hints say about the domain.

use std::path::{Path, PathBuf};

use virt_usb_config::{Config, ConfigError, rules};
use virt_usb_domxml::{Document, Domain};
use virt_usb_store::Store;
use virt_usb_store::hints::{Hint, HintSubject, look, may_know};

use crate::call::Call;

/// A path that cannot be a directory.
const NO_FOLDER: &str = "/dev/null";

/// Outcome in the record of a call that virt-usb has nothing to do with.
pub(crate) const NOTHING: &str = "nothing to do";

/// Error that prevents the handling of a call.
#[derive(Debug)]
pub struct HookError {
    /// Whether the domain requests or holds a device of virt-usb. If so, some operations are
    /// refused.
    pub concerned: bool,
    /// Message: the cause, and what to do.
    pub what: String,
}

impl HookError {
    pub(crate) fn of(concerned: bool, what: impl std::fmt::Display) -> Self {
        Self { concerned, what: what.to_string() }
    }
}

/// A call with its domain and its configuration.
pub(crate) struct Job<'a> {
    pub(crate) call: &'a Call,
    pub(crate) domain: &'a Domain,
    pub(crate) document: &'a Document<'a>,
    pub(crate) config: Result<Config, ConfigError>,
}

impl Job<'_> {
    /// Returns the configuration, or an error if it is invalid.
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

    /// Directory of the hints. If an invalid configuration does not show it, a path without hints,
    /// so that every hint is unsure.
    pub(crate) fn state_dir(&self) -> PathBuf {
        match &self.config {
            Ok(config) => config.state_dir.clone(),
            Err(e) => e.readable().state_dir.unwrap_or_else(|| NO_FOLDER.into()),
        }
    }

    /// Whether the database may contain anything about this instance.
    pub(crate) fn may_be_known(&self, state_dir: &Path) -> bool {
        let known = |id| {
            may_know(state_dir, HintSubject::Instance(id))
                || may_know(state_dir, HintSubject::Assigned(id))
        };
        self.domain.uuid.is_some_and(known)
    }

    /// Whether this instance is known to hold a device. Only then can an alias `ua-usb-N` be one of
    /// virt-usb.
    pub(crate) fn is_holder(&self, state_dir: &Path) -> bool {
        self.domain.uuid.is_some_and(|id| look(state_dir, HintSubject::Instance(id)) == Hint::Yes)
    }

    /// Whether this instance is known to have assignments.
    pub(crate) fn is_assigned(&self, state_dir: &Path) -> bool {
        self.domain.uuid.is_some_and(|id| look(state_dir, HintSubject::Assigned(id)) == Hint::Yes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_a_directory_no_hint_is_sure() {
        assert_eq!(look(Path::new(NO_FOLDER), HintSubject::Flavor("erp")), Hint::Unsure);
    }
}
