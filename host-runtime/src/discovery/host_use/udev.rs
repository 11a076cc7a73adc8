//! udev's database: the links that lead to a device node, and the content of a block device
//! (`/run/udev/data`, written by `device_update_db` in systemd's `sd-device`). All users may read
//! it.

use std::path::{Path, PathBuf};

/// A device number and its kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Number {
    pub(super) is_block: bool,
    pub(super) major: u32,
    pub(super) minor: u32,
}

impl Number {
    /// Parses the attribute `dev` of sysfs, as in `8:16`.
    pub(super) fn parse(text: &str, is_block: bool) -> Option<Self> {
        let (major, minor) = text.trim().split_once(':')?;
        Some(Self { is_block, major: major.parse().ok()?, minor: minor.parse().ok()? })
    }

    /// Creates a number from `st_rdev`.
    pub(super) fn of_rdev(rdev: u64, is_block: bool) -> Self {
        Self { is_block, major: libc::major(rdev), minor: libc::minor(rdev) }
    }
}

/// Entry of the database for one device node.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Entry {
    /// Names of udev's links, below `/dev`.
    pub(super) links: Vec<String>,
    /// Content of a block device, such as `zfs_member`.
    pub(super) content: Option<String>,
    /// Purpose of the content, such as `raid` for a member of a RAID or pool.
    pub(super) usage: Option<String>,
}

/// Directory of the database that belongs to this sysfs.
pub(super) fn folder(sysfs_root: &Path) -> PathBuf {
    sysfs_root.parent().unwrap_or(Path::new("/")).join("run/udev/data")
}

/// Reads udev's entry of a node. Empty if there is no entry, or udev does not run.
pub(super) fn entry(folder: &Path, number: Number) -> Entry {
    let kind = if number.is_block { 'b' } else { 'c' };
    let file = folder.join(format!("{kind}{}:{}", number.major, number.minor));
    let text = std::fs::read(file).map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
    let mut entry = Entry::default();
    for line in text.unwrap_or_default().lines() {
        match line.split_once(':') {
            Some(("S", link)) => entry.links.push(link.to_owned()),
            Some(("E", property)) => match property.split_once('=') {
                Some(("ID_FS_TYPE", value)) => entry.content = Some(value.to_owned()),
                Some(("ID_FS_USAGE", value)) => entry.usage = Some(value.to_owned()),
                _ => {}
            },
            _ => {}
        }
    }
    entry
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_unpacked_as_the_kernel_packs_them() {
        let number = |is_block, major, minor| Number { is_block, major, minor };
        assert_eq!(Number::parse("8:17\n", true), Some(number(true, 8, 17)));
        assert_eq!(Number::parse("8", true), None);
        for (rdev, major, minor) in [
            (0x0811, 8, 17),
            (0xbc00, 188, 0),
            (0x0010_0102, 1, 0x102),
            (0x0000_1000_0010_0b02, 0x100b, 0x102),
        ] {
            assert_eq!(Number::of_rdev(rdev, true), number(true, major, minor), "{rdev:x}");
        }
    }

    #[test]
    fn links_and_content_are_read() {
        let root = tempfile::tempdir().unwrap();
        let database = folder(&root.path().join("sys"));
        std::fs::create_dir_all(&database).unwrap();
        let text = "S:disk/by-id/usb-K\nS:disk/by-label/a:b\nI:12\nE:ID_FS_TYPE=zfs_member\n\
            E:ID_FS_USAGE=raid\nG:systemd\n";
        std::fs::write(database.join("b8:17"), text).unwrap();
        let number = Number::parse("8:17", true).unwrap();
        let found = entry(&database, number);
        assert_eq!(found.links, ["disk/by-id/usb-K", "disk/by-label/a:b"]);
        assert_eq!(
            (found.content.as_deref(), found.usage.as_deref()),
            (Some("zfs_member"), Some("raid"))
        );
        assert_eq!(entry(&database, Number { is_block: false, ..number }), Entry::default());
    }
}
