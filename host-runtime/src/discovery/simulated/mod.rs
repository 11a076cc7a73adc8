//! The simulated source, which reads a file in the format that [`Simulated`] documents.

mod format;
mod tree;

use std::io;
use std::path::{Path, PathBuf};

use virt_usb_model::Device;
use virt_usb_store::Origin;

use super::ties::Ties;
use super::{Snapshot, UsbSource, about};

#[doc = include_str!("../README.md")]
///
/// # Example
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
/// let key = &keys.snapshot().devices[0].key;
/// assert_eq!(key.to_string(), "0529:0001 at port 1-1.4, serial HL-0001");
/// # Ok::<(), virt_usb::discovery::SimError>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Simulated {
    devices: Vec<Entry>,
}

/// A `[[device]]` of the file.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Entry {
    device: Device,
    ties: Ties,
    unreadable: bool,
}

/// Error of a simulation file.
#[derive(Debug, thiserror::Error)]
pub enum SimError {
    /// The file does not exist or cannot be read.
    #[error("cannot read the simulation file {path}: {why}")]
    Read {
        /// Path of the file.
        path: PathBuf,
        /// Cause of the failure.
        why: io::Error,
    },
    /// The content of the file is invalid.
    #[error("the simulation file {path} is wrong: {what}")]
    Wrong {
        /// Path of the file.
        path: PathBuf,
        /// The device, the key, the value that was found, and the wanted value.
        what: String,
    },
    /// A text that was not read from a file is invalid.
    #[error("the simulation is wrong: {0}")]
    Text(String),
}

/// Source of the devices that a scan finds: those of the simulation file, or those below
/// `sysfs_root`, which a simulation may have written.
pub fn origin(sim: Option<&Path>, sysfs_root: &Path) -> Origin {
    match sim.is_some() || tree::is_simulated(sysfs_root) {
        true => Origin::Simulation,
        false => Origin::Host,
    }
}

impl Simulated {
    /// Reads a file in the format above.
    ///
    /// # Errors
    /// If the file cannot be read, or is invalid.
    pub fn load(path: &Path) -> Result<Self, SimError> {
        let text = std::fs::read_to_string(path)
            .map_err(|why| SimError::Read { path: path.into(), why })?;
        format::parse(&text)
            .map(|devices| Self { devices })
            .map_err(|what| SimError::Wrong { path: path.into(), what })
    }

    /// Parses a text in the format above.
    ///
    /// # Errors
    /// A message of one line that names the device (counted from 1) and the key.
    pub fn parse(text: &str) -> Result<Self, SimError> {
        format::parse(text).map(|devices| Self { devices }).map_err(SimError::Text)
    }

    /// Writes the devices to `root` in the layout of `/sys`, so that the hook can verify them.
    /// Replaces the output of an earlier call.
    ///
    /// # Errors
    /// If `root` cannot be written, or contains USB devices that this function did not write.
    pub fn write_sysfs(&self, root: &Path) -> io::Result<()> {
        tree::write(root, &self.devices)
    }
}

impl UsbSource for Simulated {
    fn snapshot(&self) -> Snapshot {
        let (lost, found): (Vec<_>, Vec<_>) =
            self.devices.iter().cloned().partition(|entry| entry.unreadable);
        let problem =
            |entry: &Entry| about(&entry.device.key.port, "cannot be read in this simulation");
        let ties = found.iter().filter(|entry| entry.ties != Ties::default());
        let ties = ties.map(|entry| (entry.device.key.port.clone(), entry.ties.clone())).collect();
        let problems = lost.iter().map(problem).collect();
        Snapshot {
            ties,
            ..Snapshot::new(found.into_iter().map(|entry| entry.device).collect(), problems)
        }
    }
}

#[cfg(test)]
mod tests {
    use virt_usb_config::sysfs::at_port;
    use virt_usb_model::Serial;

    use super::*;
    use crate::discovery::sysfs::scan;

    const FILE: &str = r#"
        [[device]]
        vendor = "0951"
        product = "1666"
        bus = 1
        device = 7
        port = "1-2"
        serial = " twin\u0007 "
        interfaces = ["08"]
        speed = 480
        driver = "usb-storage"
        [[device]]
        vendor = "0951"
        product = "1666"
        bus = 1
        device = 6
        port = "1-1.4"
        serial = "twin\u0007"
        host_use = "mounted on /"
        [[device]]
        vendor = "0529"
        product = "0001"
        bus = 2
        device = 2
        port = "2-1"
        serial = "HL-1"
        [[device]]
        vendor = "0409"
        product = "55aa"
        bus = 1
        device = 2
        port = "1-1"
        class = "hub"
        [[device]]
        vendor = "dead"
        product = "beef"
        bus = 3
        device = 2
        port = "3-1"
        unreadable = true
    "#;

    #[test]
    fn a_snapshot_separates_hubs_twins_and_problems() {
        let snapshot = Simulated::parse(FILE).unwrap().snapshot();
        let ports =
            |devices: &[Device]| devices.iter().map(|d| d.key.port.to_string()).collect::<Vec<_>>();
        assert_eq!(ports(&snapshot.devices), ["1-1.4", "1-2", "2-1"]);
        assert_eq!(ports(&snapshot.hubs), ["1-1"]);
        assert_eq!(snapshot.devices[0].key.serial, Serial::Duplicate("twin\u{fffd}".into()));
        assert_eq!(snapshot.devices[1].key.serial, Serial::Duplicate("twin\u{fffd}".into()));
        assert_eq!(snapshot.devices[2].key.serial, Serial::Unique("HL-1".into()));
        assert_eq!(snapshot.devices[0].host_use.as_deref(), Some("mounted on /"));
        assert!(!snapshot.failed());
        assert!(
            snapshot.is_unsure(&"3-1".parse().unwrap())
                && !snapshot.is_unsure(&"1-2".parse().unwrap())
        );
    }

    #[test]
    fn the_hook_and_discovery_see_the_tree() {
        let root = tempfile::tempdir().unwrap();
        let simulated = Simulated::parse(FILE).unwrap();
        simulated.write_sysfs(root.path()).unwrap();
        let snapshot = simulated.snapshot();
        let found = scan(root.path());
        for device in snapshot.devices.iter().chain(&snapshot.hubs) {
            let seen = at_port(root.path(), &device.key.port).unwrap().unwrap();
            assert_eq!((seen.usb, seen.address), (device.key.usb, device.address));
            assert_eq!(seen.serial.as_deref(), device.key.serial.text());
            let plugged = found.by_address(device.address).unwrap();
            assert_eq!(
                (&plugged.port, plugged.speed, plugged.drivers()),
                (&device.key.port, device.speed, device.driver.clone())
            );
            assert_eq!(
                plugged.interfaces.iter().map(|i| i.class[0]).collect::<Vec<_>>(),
                device.interfaces.iter().map(|c| c.get()).collect::<Vec<_>>()
            );
        }
        assert!(at_port(root.path(), &"3-1".parse().unwrap()).is_err(), "unreadable is not absent");
        assert_eq!(found.plugged.len(), 4);

        Simulated::default().write_sysfs(root.path()).unwrap();
        assert!(scan(root.path()).is_empty());
        simulated.write_sysfs(root.path()).unwrap();
        assert_eq!(scan(root.path()).plugged.len(), 4);
    }

    #[test]
    fn a_tree_that_is_not_ours_is_left_alone() {
        let root = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(root.path().join("bus/usb/devices/1-1")).unwrap();
        let refused = Simulated::default().write_sysfs(root.path()).unwrap_err();
        assert!(refused.to_string().contains("was not written by a simulation"), "{refused}");
        assert!(root.path().join("bus/usb/devices/1-1").exists());
    }

    #[test]
    fn errors_name_the_file() {
        let root = tempfile::tempdir().unwrap();
        let file = root.path().join("keys.toml");
        assert!(
            Simulated::load(&file)
                .unwrap_err()
                .to_string()
                .starts_with("cannot read the simulation file /")
        );
        std::fs::write(&file, "x = 1").unwrap();
        let wrong = Simulated::load(&file).unwrap_err().to_string();
        assert!(wrong.contains("keys.toml is wrong: unknown key \"x\""), "{wrong}");
        assert!(
            Simulated::parse("[[device]]")
                .unwrap_err()
                .to_string()
                .ends_with("device 1: vendor is missing")
        );
    }
}
