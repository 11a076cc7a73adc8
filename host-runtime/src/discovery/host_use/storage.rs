//! Uses of block devices: mounted, used as swap, or held by other block devices.
//!
//! ```text
//!   sdb ── sdb1 mounted on /boot
//!       └─ sdb2 ── holders/dm-0 (a crypt) ── holders/dm-1 (a logical volume) mounted on /
//! ```

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use virt_usb_config::sysfs::attribute;
use virt_usb_model::clean_text;

use super::mounts::Mounts;
use super::subtree::folders;
use super::udev::{self, Number};

/// Maximum number of holders that are followed. LVM on dm-crypt on md has three; a volume group has
/// some dozen volumes.
const MAX_HOLDERS: usize = 500;
/// Maximum number of mount points that a description names. Others are counted.
const MAX_NAMED: usize = 4;

pub(super) struct Storage<'a> {
    sysfs_root: &'a Path,
    mounts: &'a Mounts,
    uses: BTreeSet<String>,
    followed: BTreeSet<PathBuf>,
}

impl<'a> Storage<'a> {
    pub(super) const fn new(sysfs_root: &'a Path, mounts: &'a Mounts) -> Self {
        Self { sysfs_root, mounts, uses: BTreeSet::new(), followed: BTreeSet::new() }
    }

    /// Returns the uses of all `blocks` (directories of disks), sorted.
    ///
    /// # Errors
    /// If a part cannot be read. The use is then unknown.
    pub(super) fn uses(mut self, blocks: &[PathBuf]) -> Result<Vec<String>, String> {
        for block in blocks {
            self.disk(block, "")?;
        }
        Ok(self.uses.into_iter().collect())
    }

    /// Adds the uses of a disk and its partitions. `held` names the holders that led here, as in
    /// `held by dm-0 `.
    fn disk(&mut self, dir: &Path, held: &str) -> Result<bool, String> {
        let mut used = self.block(dir, held)?;
        for child in list(dir)? {
            // Partitions have a device number. Other directories (queue, power, holders) have none.
            if read(&child, "dev")?.is_some() {
                used |= self.block(&child, held)?;
            }
        }
        Ok(used)
    }

    fn block(&mut self, dir: &Path, held: &str) -> Result<bool, String> {
        let Some(number) = read(dir, "dev")? else { return Ok(false) };
        let names = names(dir)?;
        let mounted = mounted(self.mounts.points(number.trim(), &names));
        let swap = self.mounts.is_swap(&names).then(|| "swap".to_owned());
        let pool = self.btrfs(dir)?;
        let member = Number::parse(&number, true).and_then(|number| self.member(number));
        let others = [swap, self.behind_loop(&names)?, member].into_iter().flatten();
        let own: Vec<String> = mounted.or(pool).into_iter().chain(others).collect();
        self.uses.extend(own.iter().map(|what| format!("{held}{what}")));
        Ok(self.holders(dir, held)? || !own.is_empty())
    }

    fn holders(&mut self, dir: &Path, held: &str) -> Result<bool, String> {
        let holders = dir.join("holders");
        let mut any = false;
        for name in entries(&holders)? {
            any = true;
            let held = format!("{held}held by {} ", clean_text(&name).unwrap_or_default());
            let holder = self.sysfs_root.join("class/block").join(&name);
            if !self.followed.insert(holder.clone()) {
                continue; // Its uses are known already.
            }
            if self.followed.len() > MAX_HOLDERS || !self.disk(&holder, &held)? {
                self.uses.insert(held.trim_end().to_owned());
            }
        }
        Ok(any)
    }

    /// Describes the volume group, pool or RAID that this device is a member of, active or not. The
    /// kernel shows no link from a disk to a ZFS pool.
    fn member(&self, number: Number) -> Option<String> {
        let entry = udev::entry(&udev::folder(self.sysfs_root), number);
        let content = entry.content.as_deref().unwrap_or_default();
        match content {
            "zfs_member" => Some("member of a ZFS pool".to_owned()),
            "LVM2_member" | "LVM1_member" => Some("member of a volume group (LVM)".to_owned()),
            "bcache" | "ceph_bluestore" | "drbd" => {
                Some(format!("member of something larger ({content})"))
            }
            other if entry.usage.as_deref() == Some("raid") => {
                Some(format!("member of a RAID ({})", clean_text(other).unwrap_or_default()))
            }
            _ => None,
        }
    }

    /// Finds the loop device that is set up on one of these names. A loop device is not a holder.
    fn behind_loop(&self, names: &[String]) -> Result<Option<String>, String> {
        for name in entries(&self.sysfs_root.join("class/block"))? {
            if !name.starts_with("loop") {
                continue;
            }
            let dir = self.sysfs_root.join("class/block").join(&name).join("loop");
            if read(&dir, "backing_file")?.is_some_and(|file| names.contains(&file)) {
                return Ok(Some(format!("behind {name}")));
            }
        }
        Ok(None)
    }

    /// Checks whether the device is a member of a mounted btrfs. For a btrfs on several devices,
    /// mountinfo names one of them, and `fs/btrfs` all of them.
    fn btrfs(&self, dir: &Path) -> Result<Option<String>, String> {
        let Some(name) = dir.file_name() else { return Ok(None) };
        let pools = self.sysfs_root.join("fs/btrfs");
        for pool in list(&pools)? {
            if entries(&pool.join("devices"))?.iter().any(|member| name == member.as_str()) {
                return Ok(Some("part of a mounted btrfs".to_owned()));
            }
        }
        Ok(None)
    }
}

/// Describes mount points, as in `mounted on /boot, /efi`.
fn mounted<'a>(points: impl Iterator<Item = &'a str>) -> Option<String> {
    let points: BTreeSet<String> =
        points.map(|point| clean_text(point).unwrap_or_default()).collect();
    let named: Vec<&str> = points.iter().take(MAX_NAMED).map(String::as_str).collect();
    let more = match points.len() {
        0 => return None,
        n if n > MAX_NAMED => format!(" and {} more", n - MAX_NAMED),
        _ => String::new(),
    };
    Some(format!("mounted on {}{more}", named.join(", ")))
}

/// Names of the device's node that mountinfo and swaps may contain.
fn names(dir: &Path) -> Result<Vec<String>, String> {
    let kernel = dir.file_name().map(|name| format!("/dev/{}", name.to_string_lossy()));
    let mapped = read(&dir.join("dm"), "name")?.map(|name| format!("/dev/mapper/{name}"));
    Ok(kernel.into_iter().chain(mapped).collect())
}

fn read(dir: &Path, name: &str) -> Result<Option<String>, String> {
    attribute(dir, name).map_err(|e| e.to_string())
}

fn list(dir: &Path) -> Result<Vec<PathBuf>, String> {
    folders(dir).map_err(|e| format!("cannot list {}: {e}", dir.display()))
}

/// Names in a directory of links. Empty if the directory does not exist.
fn entries(dir: &Path) -> Result<Vec<String>, String> {
    let wrong = |e: &std::io::Error| format!("cannot list {}: {e}", dir.display());
    let entries = match std::fs::read_dir(dir) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        read => read.map_err(|e| wrong(&e))?,
    };
    let name = |entry: std::io::Result<std::fs::DirEntry>| {
        entry.map(|entry| entry.file_name().to_string_lossy().into_owned()).map_err(|e| wrong(&e))
    };
    let mut names = entries.map(name).collect::<Result<Vec<_>, _>>()?;
    names.sort();
    Ok(names)
}
