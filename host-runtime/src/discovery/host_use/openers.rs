//! Processes that have device nodes open.
//!
//! | source | visible to |
//! |---|---|
//! | `/proc/*/fd` (proc_pid_fd(5)) | the process's own user, root, `CAP_SYS_PTRACE` |
//! | the controlling terminal in `/proc/*/stat` (proc_pid_stat(5)): a getty, a login | all users |
//! | the kernel's consoles, `/proc/consoles` | all users |
//! | lock files of serial ports, `/run/lock/LCK..ttyUSB0` (FHS 3.0, 5.9) | all users |
//!
//! The agent has no privileges. SECURITY.md describes the consequences.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use virt_usb_model::clean_text;

use super::udev::Number;

/// Maximum number of processes that a description names. Others are counted.
const MAX_NAMED: usize = 3;
/// Maximum number of descriptors that a scan checks. A busy host has some ten thousand.
const MAX_DESCRIPTORS: usize = 500_000;
/// Processes of udev, which open a new device for a moment.
const PROBES: [&str; 3] = ["systemd-udevd", "(udev-worker)", "udevd"];

/// Processes by the device nodes that they have open.
#[derive(Debug, Default)]
pub(super) struct Openers {
    by_number: BTreeMap<Number, Vec<String>>,
    /// Process by the name of a node, from lock files.
    by_name: BTreeMap<String, String>,
}

impl Openers {
    /// Reads all processes. Those that are not accessible, or end in the meantime, are left out.
    pub(super) fn read(procfs_root: &Path, locks: &Path) -> Self {
        let mut openers = Self::default();
        openers.consoles(procfs_root);
        openers.locks(procfs_root, locks);
        let mut left = MAX_DESCRIPTORS;
        let own = std::process::id().to_string();
        for entry in fs::read_dir(procfs_root).into_iter().flatten().flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            if name == own || !name.bytes().all(|b| b.is_ascii_digit()) {
                continue;
            }
            openers.add(&entry.path(), &name, &mut left);
        }
        openers
    }

    fn consoles(&mut self, procfs_root: &Path) {
        let text = fs::read_to_string(procfs_root.join("consoles")).unwrap_or_default();
        let numbers =
            text.lines().filter_map(|line| Number::parse(line.split_whitespace().last()?, false));
        for number in numbers {
            self.by_number.entry(number).or_default().push("the kernel, as its console".into());
        }
    }

    fn locks(&mut self, procfs_root: &Path, locks: &Path) {
        for lock in fs::read_dir(locks).into_iter().flatten().flatten() {
            let file = lock.file_name().to_string_lossy().into_owned();
            let Some(name) = file.strip_prefix("LCK..") else { continue };
            let pid = fs::read_to_string(lock.path()).unwrap_or_default().trim().to_owned();
            // A killed program leaves its lock file.
            if pid.bytes().all(|b| b.is_ascii_digit())
                && let Some(label) = named(&procfs_root.join(&pid), &pid)
            {
                self.by_name.insert(name.to_owned(), label);
            }
        }
    }

    fn add(&mut self, process: &Path, pid: &str, left: &mut usize) {
        if let (Some(number), Some(label)) = (terminal(process), named(process, pid)) {
            self.by_number.entry(number).or_default().push(label);
        }
        let Ok(descriptors) = fs::read_dir(process.join("fd")) else { return };
        let mut label = None;
        for descriptor in descriptors.flatten() {
            *left = left.saturating_sub(1);
            if *left == 0 {
                return;
            }
            let Some(number) = number(&descriptor.path()) else { continue };
            let label = label.get_or_insert_with(|| named(process, pid));
            let Some(label) = label else { return };
            let openers = self.by_number.entry(number).or_default();
            if !openers.contains(label) {
                openers.push(label.clone());
            }
        }
    }

    /// Describes the processes that have one of these nodes open, as in `open in picocom (812)`.
    pub(super) fn of(&self, numbers: &[Number], names: &[String]) -> Option<String> {
        let by_number = numbers.iter().filter_map(|number| self.by_number.get(number)).flatten();
        let by_name = names.iter().filter_map(|name| self.by_name.get(name));
        let mut processes: Vec<&str> = by_number.chain(by_name).map(String::as_str).collect();
        processes.sort_unstable();
        processes.dedup();
        let named = processes.get(..MAX_NAMED.min(processes.len()))?.join(", ");
        let more = processes.len().saturating_sub(MAX_NAMED);
        let others = if more > 0 { format!(" and {more} more") } else { String::new() };
        (!named.is_empty()).then(|| format!("open in {named}{others}"))
    }
}

/// The controlling terminal of a process, which is the seventh field. The second field may contain
/// spaces and parentheses.
fn terminal(process: &Path) -> Option<Number> {
    let stat = fs::read(process.join("stat")).ok()?;
    let text = String::from_utf8_lossy(&stat);
    let number: i64 = text.rsplit_once(')')?.1.split_whitespace().nth(4)?.parse().ok()?;
    let device = u64::try_from(number).ok().filter(|number| *number > 0)?;
    Some(Number::of_rdev(device, false))
}

/// The device that a descriptor refers to. The text of the link is meaningless in another mount
/// namespace, so the link is followed.
fn number(descriptor: &Path) -> Option<Number> {
    let link = fs::read_link(descriptor).ok()?;
    let text = link.to_str().unwrap_or("/");
    // Skip sockets, pipes and terminals, which most descriptors are.
    if !text.starts_with('/') || text == "/dev/null" || text.starts_with("/dev/pts/") {
        return None;
    }
    let found = fs::metadata(descriptor).ok()?;
    let kind = found.file_type();
    (kind.is_block_device() || kind.is_char_device())
        .then(|| Number::of_rdev(found.rdev(), kind.is_block_device()))
}

/// Describes a process, as in `picocom (812)`. `None` for a process of udev.
fn named(process: &Path, pid: &str) -> Option<String> {
    let comm = fs::read_to_string(process.join("comm")).ok()?;
    let comm = clean_text(&comm).unwrap_or_else(|| "?".into());
    // Semicolons separate the descriptions of several uses.
    (!PROBES.contains(&comm.as_str())).then(|| format!("{} ({pid})", comm.replace(';', ",")))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    fn process(root: &Path, pid: &str, comm: &str, open: &[&str]) {
        let fds = root.join(pid).join("fd");
        fs::create_dir_all(&fds).unwrap();
        fs::write(root.join(pid).join("comm"), format!("{comm}\n")).unwrap();
        for (n, target) in open.iter().enumerate() {
            symlink(target, fds.join(n.to_string())).unwrap();
        }
    }

    #[test]
    fn processes_are_found_by_their_open_nodes() {
        let root = tempfile::tempdir().unwrap();
        let zero = Number::parse("1:5", false).unwrap();
        for pid in ["10", "11", "12", "13"] {
            process(
                root.path(),
                pid,
                "pico;com",
                &["/dev/zero", "/dev/zero", "socket:[1]", "/gone"],
            );
        }
        process(root.path(), "14", "(udev-worker)", &["/dev/zero"]);
        process(root.path(), &std::process::id().to_string(), "virt-usbd", &["/dev/zero"]);
        fs::create_dir_all(root.path().join("15")).unwrap();
        fs::create_dir_all(root.path().join("self/fd")).unwrap();
        let nowhere = root.path().join("nowhere");
        let openers = Openers::read(root.path(), &nowhere);
        assert_eq!(
            openers.of(&[zero], &[]).unwrap(),
            "open in pico,com (10), pico,com (11), pico,com (12) and 1 more"
        );
        assert_eq!(openers.of(&[Number { is_block: true, ..zero }], &[]), None);
        assert_eq!(openers.of(&[], &[]), None);
        assert_eq!(Openers::read(&nowhere, &nowhere).of(&[zero], &[]), None);
    }

    #[test]
    fn consoles_gettys_and_locks_are_found_without_privileges() {
        let root = tempfile::tempdir().unwrap();
        let (proc, locks) = (root.path().join("proc"), root.path().join("lock"));
        process(&proc, "20", "agetty", &[]);
        // Terminal 188:0 in the kernel's encoding.
        fs::write(proc.join("20/stat"), "20 (a) b) S 1 20 20 48128 20 4194304").unwrap();
        process(&proc, "21", "cron", &[]);
        fs::write(proc.join("21/stat"), "21 (cron) S 1 21 21 0 -1 4194304").unwrap();
        process(&proc, "22", "minicom", &[]);
        fs::write(proc.join("consoles"), "tty0 -WU (EC p  )    4:1\nttyUSB1 -W- (E  p  )  188:1\n")
            .unwrap();
        fs::create_dir(&locks).unwrap();
        for (name, pid) in [
            ("LCK..ttyUSB2", "        22\n"),
            ("LCK..ttyUSB3", "99\n"),
            ("LCK..ttyUSB4", "../22"),
            ("subsys", "22"),
        ] {
            fs::write(locks.join(name), pid).unwrap();
        }
        let openers = Openers::read(&proc, &locks);
        let of = |minor: u32| {
            let number = Number { is_block: false, major: 188, minor };
            openers.of(&[number], &[format!("ttyUSB{minor}")]).unwrap_or_default()
        };
        assert_eq!(of(0), "open in agetty (20)");
        assert_eq!(of(1), "open in the kernel, as its console");
        assert_eq!(of(2), "open in minicom (22)");
        assert_eq!((of(3), of(4), of(5)), (String::new(), String::new(), String::new()));
    }
}
