//! Detects whether a configuration has lost the whitelist. A file that was truncated or removed
//! must not offer every device to all projects, so the inventory remembers what the file contained.

use std::path::Path;

use virt_usb_store::rules::Rules;
use virt_usb_store::{Store, StoreError};

use crate::{Config, DEFAULT_PATH};

/// Reason why a configuration is rejected.
#[derive(Debug, thiserror::Error)]
pub enum RulesError {
    /// The file contained rules when it was last read.
    #[error("{0}")]
    Lost(String),
    /// The inventory cannot be read.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Returns the state of the whitelist in a configuration, as the inventory records it.
pub fn remembered(config: &Config) -> Rules {
    match (config.whitelist.on, config.whitelist.rules.is_empty()) {
        (true, _) => Rules::On,
        (false, false) => Rules::Off,
        (false, true) => Rules::None,
    }
}

/// Refuses a configuration that has lost the whitelist. To turn the whitelist off, a file must
/// contain its key. `file` is the path of the configuration, if it is not the default one.
///
/// # Errors
/// If a key is missing, with advice; or if the inventory cannot be read.
pub fn admit(store: &Store, config: &Config, file: Option<&Path>) -> Result<(), RulesError> {
    let (now, keys) = (remembered(config), config.whitelist_keys);
    if keys.switch && keys.rules {
        return Ok(());
    }
    let lost = match store.rules()? {
        Rules::On if now < Rules::On && !keys.switch => {
            "usb_white_list_switch, which was \"on\": every device would be offered. Restore the \
                file, or write usb_white_list_switch = \"off\""
        }
        Rules::Off if now == Rules::None && !keys.rules => {
            "usb_passthrough_whitelist, which contained rules. Restore the file, or write \
                usb_passthrough_whitelist = []"
        }
        _ => return Ok(()),
    };
    let file = file.unwrap_or(Path::new(DEFAULT_PATH));
    let why = if file.exists() { "may be truncated: it" } else { "is missing, and the default" };
    Err(RulesError::Lost(format!(
        "the configuration {} {why} does not contain {lost}",
        file.display()
    )))
}
