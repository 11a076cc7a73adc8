#![doc = include_str!("../README.md")]

mod format;
mod tree;

use std::io;
use std::path::{Path, PathBuf};

use virt_usb_model::Device;

use super::{Snapshot, UsbSource, about};

/// USB devices out of a file: starts the whole system on a machine that has none.
///
/// ```
/// use virt_usb::discovery::{Simulated, UsbSource};
///
/// let keys = Simulated::parse(
///     r#"
///     [[device]]
///     vendor = "0529"
///     product = "0001"
///     bus = 1
///     device = 5
///     port = "1-1.4"
///     serial = "HL-0001"
///     "#,
/// )?;
/// assert_eq!(keys.snapshot().devices[0].key.to_string(), "0529:0001 at port 1-1.4, serial HL-0001");
/// # Ok::<(), virt_usb::discovery::SimError>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Simulated {
    devices: Vec<Entry>,
}

/// One `[[device]]`.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Entry {
    device: Device,
    unreadable: bool,
}

/// The simulation file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum SimError {
    /// The file is not there or not readable.
    #[error("cannot read the simulation file {path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The file does not say what a simulation may say.
    #[error("the simulation file {path} is wrong: {what}")]
    Wrong {
        /// The file.
        path: PathBuf,
        /// Which device, which key, what was found and wanted.
        what: String,
    },
    /// The same, of text that came from no file.
    #[error("the simulation is wrong: {0}")]
    Text(String),
}

impl Simulated {
    /// Reads a file in the format above.
    ///
    /// # Errors
    /// When it cannot be read, or is wrong anywhere.
    pub fn load(path: &Path) -> Result<Self, SimError> {
        let text = std::fs::read_to_string(path).map_err(|source| SimError::Read { path: path.into(), source })?;
        format::parse(&text)
            .map(|devices| Self { devices })
            .map_err(|what| SimError::Wrong { path: path.into(), what })
    }

    /// Reads text in the format above.
    ///
    /// # Errors
    /// One line that says which device (counted from 1) and key is wrong.
    pub fn parse(text: &str) -> Result<Self, SimError> {
        format::parse(text).map(|devices| Self { devices }).map_err(SimError::Text)
    }

    /// Writes the devices as the kernel would show them, under `root` in place of `/sys`, so that the hook's check of
    /// the port sees them. What an earlier call wrote there is replaced as a whole.
    ///
    /// # Errors
    /// When `root` cannot be written, or holds USB devices that this function did not write.
    pub fn write_sysfs(&self, root: &Path) -> io::Result<()> {
        tree::write(root, &self.devices)
    }
}

impl UsbSource for Simulated {
    fn snapshot(&self) -> Snapshot {
        let (lost, found): (Vec<_>, Vec<_>) = self.devices.iter().cloned().partition(|entry| entry.unreadable);
        let problem = |entry: &Entry| about(&entry.device.key.port, "cannot be read: the simulation says so");
        Snapshot::new(found.into_iter().map(|entry| entry.device).collect(), lost.iter().map(problem).collect())
    }
}
