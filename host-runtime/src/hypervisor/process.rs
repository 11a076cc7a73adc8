//! The process of a guest on this host, read from procfs without calling libvirt.

use std::fs;
use std::path::Path;
use std::time::Duration;

use virt_usb_model::InstanceId;

/// QEMU process of a guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Process {
    /// Process id of QEMU.
    pub(super) pid: u32,
    /// State of the process.
    pub(super) state: State,
}

/// State of a process (proc_pid_stat(5)).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum State {
    /// The process runs or waits.
    Running,
    /// The process is stopped by a signal (`T`) or a debugger (`t`).
    Stopped,
    /// The process waits in the kernel and cannot be interrupted (`D`), for a disk or a network
    /// file system. Usually for a moment only.
    Blocked,
}

/// Wait between two reads that find a process blocked.
const BLOCKED_INTERVAL: Duration = Duration::from_millis(200);

/// Finds the QEMU of this instance, which has its UUID as argument `-uuid`. `None` if there is
/// none, or if it is not visible, as from a container with its own process namespace.
pub(super) fn of(instance: InstanceId) -> Option<Process> {
    find(Path::new("/proc"), instance)
}

/// Like [`of`], but the process is [`State::Blocked`] only if two reads find it blocked.
pub(super) fn settled(instance: InstanceId) -> Option<Process> {
    let process = of(instance)?;
    if process.state != State::Blocked {
        return Some(process);
    }
    std::thread::sleep(BLOCKED_INTERVAL);
    of(instance)
}

fn find(procfs_root: &Path, instance: InstanceId) -> Option<Process> {
    let uuid = instance.to_string();
    let pids = fs::read_dir(procfs_root).ok()?.flatten();
    let pids = pids.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    pids.filter(|pid| has_uuid(procfs_root, *pid, &uuid)).find_map(|pid| {
        let stat = fs::read_to_string(procfs_root.join(format!("{pid}/stat"))).ok()?;
        Some(Process { pid, state: state(&stat)? })
    })
}

fn has_uuid(procfs_root: &Path, pid: u32, uuid: &str) -> bool {
    let Ok(command) = fs::read(procfs_root.join(format!("{pid}/cmdline"))) else { return false };
    let mut words = command.split(|byte| *byte == 0);
    words.any(|word| word == b"-uuid")
        && words.next().is_some_and(|word| word.eq_ignore_ascii_case(uuid.as_bytes()))
}

/// Parses the state in `PID (NAME) STATE …`, where the name may contain any character. `None` for a
/// zombie.
fn state(stat: &str) -> Option<State> {
    match stat.rsplit_once(')')?.1.trim_start().chars().next()? {
        'T' | 't' => Some(State::Stopped),
        'D' => Some(State::Blocked),
        'Z' | 'X' => None,
        _ => Some(State::Running),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn process(root: &Path, pid: u32, command: &str, stat: &str) {
        let folder = root.join(pid.to_string());
        fs::create_dir_all(&folder).unwrap();
        fs::write(folder.join("cmdline"), command).unwrap();
        fs::write(folder.join("stat"), stat).unwrap();
    }

    #[test]
    fn a_guest_is_found_by_its_uuid() {
        let root = tempfile::tempdir().unwrap();
        let instance: InstanceId = "11111111-2222-4333-8444-555555555555".parse().unwrap();
        assert_eq!(find(root.path(), instance), None);
        fs::create_dir(root.path().join("sys")).unwrap();
        let other = "22222222-2222-4333-8444-555555555555";
        process(root.path(), 7, &format!("qemu\0-name\0x\0-uuid\0{other}\0"), "7 (qemu) S 1");
        process(root.path(), 8, &format!("grep\0{instance}\0"), "8 (grep) S 1");
        assert_eq!(find(root.path(), instance), None);
        let command = format!("qemu\0-name\0x\0-uuid\0{instance}\0-smp\01\0");
        for (stat, state) in [
            ("9 (qemu) S 1", Some(State::Running)),
            ("9 (a) T b) T 1", Some(State::Stopped)),
            ("9 (qemu) t 1", Some(State::Stopped)),
            ("9 (qemu) D 1", Some(State::Blocked)),
            ("9 (qemu) Z 1", None),
            ("9", None),
        ] {
            process(root.path(), 9, &command, stat);
            assert_eq!(find(root.path(), instance).map(|p| p.state), state, "{stat}");
        }
    }
}
