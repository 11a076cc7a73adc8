//! Mounted file systems and swap areas: `mountinfo` (proc_pid_mountinfo(5)) and `swaps`
//! (proc_swaps(5)).

use std::fs;
use std::io;
use std::path::Path;

/// Mounts and swap areas of the kernel.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Mounts {
    mounts: Vec<Mount>,
    swaps: Vec<String>,
}

#[derive(Debug, PartialEq, Eq)]
struct Mount {
    /// Device number, such as `8:1`. File systems on several devices (btrfs) have a number of their
    /// own, such as `0:41`.
    number: String,
    /// Device node of the file system, such as `/dev/sda1`, if it has one.
    source: String,
    point: String,
}

impl Mounts {
    /// Reads the mounts of the first process, or, if they are not readable, those of this process,
    /// which a sandbox may limit.
    ///
    /// # Errors
    /// If neither can be read, or the swap areas cannot be read.
    pub(super) fn read(procfs_root: &Path) -> Result<Self, String> {
        let own = procfs_root.join("self/mountinfo");
        let mountinfo = fs::read(procfs_root.join("1/mountinfo"))
            .or_else(|_| fs::read(&own))
            .map_err(|e| format!("cannot read {}: {e}", own.display()))?;
        let swaps = procfs_root.join("swaps");
        let swaps = match fs::read(&swaps) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => Vec::new(), // a kernel without swap
            read => read.map_err(|e| format!("cannot read {}: {e}", swaps.display()))?,
        };
        Self::parse(&String::from_utf8_lossy(&mountinfo), &String::from_utf8_lossy(&swaps))
    }

    fn parse(mountinfo: &str, swaps: &str) -> Result<Self, String> {
        let mount = |line: &str| {
            Mount::parse(line)
                .ok_or_else(|| format!("cannot understand the mountinfo line {line:?}"))
        };
        let lines = mountinfo.lines().filter(|line| !line.trim().is_empty());
        let swap = |line: &str| line.split_whitespace().next().map(unescape);
        Ok(Self {
            mounts: lines.map(mount).collect::<Result<_, _>>()?,
            swaps: swaps.lines().skip(1).filter_map(swap).collect(),
        })
    }

    /// Mount points of a block device, by its number (`8:1`) or one of its names (`/dev/sda1`).
    pub(super) fn points<'a>(
        &'a self,
        number: &'a str,
        names: &'a [String],
    ) -> impl Iterator<Item = &'a str> {
        let is = move |mount: &&Mount| mount.number == number || names.contains(&mount.source);
        self.mounts.iter().filter(is).map(|mount| mount.point.as_str())
    }

    pub(super) fn is_swap(&self, names: &[String]) -> bool {
        self.swaps.iter().any(|swap| names.contains(swap))
    }
}

impl Mount {
    /// Parses a line such as `36 35 98:0 /root /point options … - type source options`.
    fn parse(line: &str) -> Option<Self> {
        let (head, tail) = line.split_once(" - ")?;
        let mut head = head.split(' ').skip(2);
        let number = head.next()?.to_owned();
        let point = unescape(head.nth(1)?);
        let source = tail.split(' ').nth(1).map(unescape).unwrap_or_default();
        Some(Self { number, source, point })
    }
}

/// Decodes white space and backslashes, which are written as `\` and three octal digits.
fn unescape(text: &str) -> String {
    let mut out = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&first, tail)) = rest.split_first() {
        match tail.get(..3).filter(|_| first == b'\\').and_then(octal) {
            Some(byte) => {
                out.push(byte);
                rest = tail.get(3..).unwrap_or_default();
            }
            None => {
                out.push(first);
                rest = tail;
            }
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}

fn octal(digits: &[u8]) -> Option<u8> {
    let digits =
        std::str::from_utf8(digits).ok().filter(|text| text.bytes().all(|b| b.is_ascii_digit()))?;
    u8::from_str_radix(digits, 8).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const MOUNTINFO: &str = "\
22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
23 22 8:17 / /mnt/a\\040b rw - vfat /dev/sdb1 rw
24 22 0:41 / /data rw - btrfs /dev/sdc rw,space_cache
25 22 0:20 / /proc rw - proc proc rw
";
    const SWAPS: &str = "Filename\tType\tSize\tUsed\tPriority\n/dev/sdb2 partition 4 0 \
        -2\n/swap\\040file file 4 0 -3\n";

    fn names(name: &str) -> Vec<String> {
        vec![format!("/dev/{name}")]
    }

    #[test]
    fn finds_mounts_by_number_and_by_source() {
        let mounts = Mounts::parse(MOUNTINFO, SWAPS).unwrap();
        assert_eq!(mounts.points("8:17", &names("sdb1")).collect::<Vec<_>>(), ["/mnt/a b"]);
        assert_eq!(mounts.points("8:32", &names("sdc")).collect::<Vec<_>>(), ["/data"]);
        assert_eq!(mounts.points("8:18", &names("sdb2")).count(), 0);
        assert!(mounts.is_swap(&names("sdb2")));
        assert!(!mounts.is_swap(&names("sdb")));
        assert!(Mounts::parse("36 35 98:0 /", "").is_err());
    }

    #[test]
    fn escapes() {
        assert_eq!(unescape("a\\134b\\012"), "a\\b\n");
        assert_eq!(unescape("\\0\\999\\777\\"), "\\0\\999\\777\\");
    }

    #[test]
    fn the_first_process_takes_precedence() {
        let root = tempfile::tempdir().unwrap();
        assert!(Mounts::read(root.path()).unwrap_err().contains("self/mountinfo"));
        for (who, text) in [("self", "1 0 8:1 / /own rw - ext4 /dev/sda1 rw"), ("1", MOUNTINFO)] {
            std::fs::create_dir_all(root.path().join(who)).unwrap();
            std::fs::write(root.path().join(who).join("mountinfo"), text).unwrap();
            assert!(Mounts::read(root.path()).unwrap().swaps.is_empty());
        }
        assert_eq!(Mounts::read(root.path()).unwrap().mounts.len(), 4);
    }
}
