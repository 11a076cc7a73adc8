//! The part of sysfs that belongs to one device: its directory with all subdirectories, without
//! those of USB devices behind it. Links are not followed.

use std::borrow::Cow;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use virt_usb_model::PortPath;

/// Maximum depth of directories. `<port>:1.0/host6/target6:0:0/6:0:0:0/block/sda/sda1` has 7
/// levels, card readers have up to 9.
const MAX_DEPTH: usize = 16;
/// Maximum number of directories. A device has some hundred.
const MAX_FOLDERS: usize = 20_000;

/// Block devices and network interfaces below a device.
#[derive(Debug, Default)]
pub(super) struct Subtree {
    /// Directories of disks (`…/block/sda`), which contain their partitions.
    pub(super) blocks: Vec<PathBuf>,
    /// Directories of network interfaces (`…/net/enx…`).
    pub(super) nets: Vec<PathBuf>,
    /// Directories of character devices (`…/tty/ttyUSB0`), including the device's own.
    pub(super) characters: Vec<PathBuf>,
    /// Names of SCSI host adapters (`host6`).
    pub(super) scsi_hosts: Vec<String>,
    /// Whether a network interface belongs to another network namespace. The kernel hides such an
    /// interface, but shows the directory `net`.
    pub(super) hidden_net: bool,
    /// Reasons why the subtree is incomplete.
    pub(super) problems: Vec<String>,
    visited: usize,
}

impl Subtree {
    pub(super) fn of(device: &Path) -> Self {
        let mut subtree = Self::default();
        subtree.walk(device, 0);
        subtree
    }

    fn walk(&mut self, dir: &Path, depth: usize) {
        self.visited += 1;
        if depth > MAX_DEPTH || self.visited > MAX_FOLDERS {
            if self.problems.is_empty() {
                self.problems.push(format!(
                    "{} has more subdirectories than any known device",
                    dir.display()
                ));
            }
            return;
        }
        if dir.join("dev").exists() {
            self.characters.push(dir.to_owned());
        }
        match folders(dir) {
            Ok(children) => {
                self.hidden_net |= children.is_empty() && name(dir) == "net";
                children.iter().for_each(|child| self.enter(child, depth + 1));
            }
            Err(e) => self.problems.push(format!("cannot list {}: {e}", dir.display())),
        }
    }

    fn enter(&mut self, child: &Path, depth: usize) {
        match name(child.parent().unwrap_or(child)).as_ref() {
            "block" => self.blocks.push(child.to_owned()),
            "net" => self.nets.push(child.to_owned()),
            _ if name(child).parse::<PortPath>().is_ok() => {}
            _ => {
                if is_scsi_host(&name(child)) {
                    self.scsi_hosts.push(name(child).into_owned());
                }
                self.walk(child, depth);
            }
        }
    }
}

fn is_scsi_host(name: &str) -> bool {
    let number = name.strip_prefix("host").unwrap_or_default();
    !number.is_empty() && number.bytes().all(|b| b.is_ascii_digit())
}

fn name(path: &Path) -> Cow<'_, str> {
    path.file_name().unwrap_or_default().to_string_lossy()
}

/// Subdirectories of `dir`, sorted, without links. Empty if `dir` does not exist.
pub(super) fn folders(dir: &Path) -> io::Result<Vec<PathBuf>> {
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(e),
    };
    let mut folders = Vec::new();
    for entry in entries {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            folders.push(entry.path());
        }
    }
    folders.sort();
    Ok(folders)
}
