//! Finds the daemons and the agent, and checks which files a user may read.

use std::fs::Metadata;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use virt_usb_config::Config;

use super::{Places, Report};

/// User and groups of a process.
pub(super) struct Process {
    /// Effective user id.
    pub(super) uid: u32,
    /// Group ids, including the supplementary ones.
    pub(super) groups: Vec<u32>,
}

/// Names and process ids of libvirt's running daemons.
pub(super) fn find_daemons(places: &Places) -> Vec<(&'static str, String)> {
    let pid = |daemon: &'static str| {
        let text = std::fs::read_to_string(places.run.join(format!("{daemon}.pid"))).ok()?;
        Some((daemon, text.trim().to_owned()))
    };
    ["virtqemud", "libvirtd"].into_iter().filter_map(pid).collect()
}

/// Finds the process that holds the lock on this file (proc_locks(5)).
pub(super) fn find_lock_holder(lock: &Path) -> Option<Process> {
    let inode = std::fs::metadata(lock).ok()?.ino().to_string();
    let locks = std::fs::read_to_string("/proc/locks").ok()?;
    let pid = locks.lines().find_map(|line| {
        let words: Vec<&str> = line.split_whitespace().collect();
        let [_, "FLOCK", _, _, pid, file, ..] = words.as_slice() else { return None };
        (file.rsplit(':').next() == Some(&inode)).then_some(*pid)
    })?;
    let status = std::fs::read_to_string(Path::new("/proc").join(pid).join("status")).ok()?;
    let numbers = |key: &str| -> Vec<u32> {
        let line = status.lines().find_map(|line| line.strip_prefix(key));
        line.into_iter().flat_map(str::split_whitespace).filter_map(|n| n.parse().ok()).collect()
    };
    // The fields are the real, effective, saved and file system ids.
    let (uid, mut groups) = (*numbers("Uid:").get(1)?, numbers("Groups:"));
    groups.extend(numbers("Gid:"));
    Some(Process { uid, groups })
}

/// Whether a user of these groups may read a file (`access` 4), or write to it (2).
pub(super) fn may_access(file: &Metadata, uid: u32, groups: &[u32], access: u32) -> bool {
    uid == 0
        || (file.uid() == uid && file.mode() & (access << 6) != 0)
        || (groups.contains(&file.gid()) && file.mode() & (access << 3) != 0)
        || file.mode() & access != 0
}

/// Checks that the agent may read a file with a secret, and that not every user may. `name` is the
/// description of the file in messages.
pub(super) fn check_secret(name: &str, file: &Path, config: &Config, report: &Report) {
    let (Ok(found), Ok(agent)) = (std::fs::metadata(file), std::fs::metadata(&config.state_dir))
    else {
        return;
    };
    if !may_access(&found, agent.uid(), &[agent.gid()], 0o4) {
        let (file, owner) = (file.display(), agent.uid());
        report.warn(
            format!("{name} {file}: the agent may not read it"),
            format!(
                "'chown {owner} {file}; chmod 600 {file}': {owner} is the agent's user, which owns \
                    {}",
                config.state_dir.display()
            ),
        );
    }
    warn_if_open_to_all(name, file, report);
}

/// Warns if every user may read or change a file with a secret.
pub(super) fn warn_if_open_to_all(name: &str, file: &Path, report: &Report) {
    if std::fs::metadata(file).is_ok_and(|found| found.mode() & 0o007 != 0) {
        let file = file.display();
        report.warn(
            format!("{name} {file}: every user of this host may read it, or write to it"),
            format!("'chmod o= {file}'"),
        );
    }
}
