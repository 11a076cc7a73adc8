//! Whether the host itself uses a device, in words.
//!
//! Three uses are told: storage that is mounted, swapped to or held by another block device (LVM, dm-crypt, md); a
//! network interface that is up; a keyboard that the kernel's driver listens to. What cannot be told is said to be in
//! use: taking a disk from under a mounted file system costs more than a device that an administrator has to release
//! by naming it in the whitelist.
//!
//! Not told: who has a character device open (serial ports, printers), ZFS pools and guests that have the block device
//! as their disk; the kernel shows no link from the device to them.

mod mounts;
mod storage;
mod subtree;

use std::cell::OnceCell;
use std::path::{Path, PathBuf};

use virt_usb_hook::sysfs::attribute;
use virt_usb_model::clean_text;
use virt_usb_model::device::Problem;

use super::about;
use super::sysfs::{Interface, Plugged};
use mounts::Mounts;
use storage::Storage;
use subtree::Subtree;

/// HID, boot interface, keyboard (HID 1.11, 4.2 and 4.3).
const BOOT_KEYBOARD: [u8; 3] = [0x03, 0x01, 0x01];

/// The flag of an interface that is up (`IFF_UP`, netdevice(7)).
const UP: u64 = 1;

/// What the host does with its devices, read at most once a look.
pub(super) struct HostUse<'a> {
    sysfs_root: &'a Path,
    procfs_root: &'a Path,
    mounts: OnceCell<Result<Mounts, String>>,
}

impl<'a> HostUse<'a> {
    pub(super) const fn new(sysfs_root: &'a Path, procfs_root: &'a Path) -> Self {
        Self { sysfs_root, procfs_root, mounts: OnceCell::new() }
    }

    /// What the host uses the device for, joined by `; `. Problems name the device's port.
    pub(super) fn of(&self, plugged: &Plugged, problems: &mut Vec<Problem>) -> Option<String> {
        let subtree = Subtree::of(&plugged.dir);
        let mut wrong: Vec<String> = subtree.problems.clone();
        let mut uses = Vec::new();
        uses.extend(self.storage(&subtree.blocks, &mut wrong));
        uses.extend(subtree.nets.iter().filter_map(|net| network(net, &mut wrong)));
        uses.extend(keyboard(&plugged.interfaces));
        if !subtree.problems.is_empty() {
            uses.push("it cannot be told whether the host uses it".to_owned());
        }
        problems.extend(wrong.into_iter().map(|what| about(&plugged.port, what)));
        uses.sort();
        uses.dedup();
        (!uses.is_empty()).then(|| uses.join("; "))
    }

    fn storage(&self, blocks: &[PathBuf], wrong: &mut Vec<String>) -> Vec<String> {
        if blocks.is_empty() {
            return Vec::new();
        }
        let mounts = self.mounts.get_or_init(|| Mounts::read(self.procfs_root));
        let told = match mounts {
            Ok(mounts) => Storage::new(self.sysfs_root, mounts).uses(blocks),
            Err(e) => Err(e.clone()),
        };
        told.unwrap_or_else(|e| {
            wrong.push(e);
            vec!["storage, and it cannot be told whether it is mounted".to_owned()]
        })
    }
}

fn network(net: &Path, wrong: &mut Vec<String>) -> Option<String> {
    let name = net.file_name().and_then(|name| clean_text(&name.to_string_lossy())).unwrap_or_default();
    let flags = match attribute(net, "flags") {
        Ok(None) => return None,
        Ok(Some(text)) => number(&text).ok_or_else(|| format!("{} holds {text:?}", net.join("flags").display())),
        Err(e) => Err(e.to_string()),
    };
    match flags {
        Ok(flags) => (flags & UP != 0).then(|| format!("network interface {name} is up")),
        Err(e) => {
            wrong.push(e);
            Some(format!("network interface {name}, and it cannot be told whether it is up"))
        }
    }
}

fn number(text: &str) -> Option<u64> {
    u64::from_str_radix(text.trim().strip_prefix("0x")?, 16).ok()
}

fn keyboard(interfaces: &[Interface]) -> Option<String> {
    let listens = |i: &Interface| i.class == BOOT_KEYBOARD && i.driver.as_deref() == Some("usbhid");
    interfaces.iter().any(listens).then(|| "keyboard in use by the host".to_owned())
}
