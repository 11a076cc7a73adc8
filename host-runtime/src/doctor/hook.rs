//! The hook: whether libvirt's daemons call it, and may.

use std::io::ErrorKind;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::process::Command;

use super::process::daemons;
use super::{Host, Places, Report, VERSION};

/// The hook in libvirt's folder of hooks.
const HOOK: &str = "qemu.d/50-virt-usb";

pub(super) fn check(places: &Places, report: &Report) {
    let hook = places.hooks.join(HOOK);
    let Ok(found) = std::fs::metadata(&hook) else {
        report.broken(
            format!("there is none at {}", hook.display()),
            "install it: 'make install-hook', or the package again",
        );
        return;
    };
    if !found.is_file() || found.permissions().mode() & 0o111 == 0 {
        let fix = format!("chmod 0755 {}", hook.display());
        report.broken(format!("{} is not executable: libvirt passes it over", hook.display()), fix);
        return;
    }
    if found.uid() != 0 || found.permissions().mode() & 0o022 != 0 {
        let fix = format!("chown root:root {0} && chmod 0755 {0}", hook.display());
        report.broken(
            format!("others than root may write {}, which libvirtd runs as root", hook.display()),
            fix,
        );
    }
    let version = Command::new(&hook).arg("--version").output();
    let version = version.map(|o| String::from_utf8_lossy(&o.stdout).trim().to_owned()).unwrap_or_default();
    match version.strip_prefix("virt-usb-hook ") {
        Some(VERSION) => {
            report.ok(format!("{} is of this version", hook.display()));
        }
        Some(version) => report.warn(
            format!("{} is version {version}, this program is {}", hook.display(), VERSION),
            "install both from one package, or with 'make install-hook'",
        ),
        None => report.broken(
            format!("{} does not answer to --version: it is not ours, or cannot run", hook.display()),
            "install it again: 'make install-hook', or the package",
        ),
    }
    seen_by_daemon(places, report);
}

/// libvirt's daemons look for hooks when they start or reload, and at no other time.
fn seen_by_daemon(places: &Places, report: &Report) {
    let folder = places.hooks.join("qemu.d");
    let made = std::fs::metadata(&folder).and_then(|found| found.created());
    for (daemon, pid) in daemons(places) {
        if misses_hook(&pid, places) {
            report.broken(
                format!(
                    "{daemon} has another root folder, as in a container, and there the hook is missing at {}: \
                     guests get no devices",
                    places.hooks.join(HOOK).display()
                ),
                "mount what install/README.md names (\"libvirt in a container\") into it",
            );
            continue;
        }
        let began = std::fs::metadata(Path::new("/proc").join(&pid)).and_then(|found| found.modified());
        match (&made, began) {
            (Ok(made), Ok(began)) if *made > began => report.warn(
                format!(
                    "{daemon} runs for longer than {} exists, and may not know of hooks",
                    folder.display()
                ),
                format!(
                    "'systemctl reload {daemon}' (guests keep running); ignore this if you did that already"
                ),
            ),
            (Ok(_), Ok(_)) => {
                report.ok(format!("{daemon} was started after {} was made", folder.display()));
            }
            // The daemon is gone, or the file system does not record when files are made.
            _ => {}
        }
    }
}

/// Whether a process has another root folder than the doctor, in which the hook is missing.
fn misses_hook(pid: &str, places: &Places) -> bool {
    let root = Path::new("/proc").join(pid).join("root");
    let Ok(hook) = places.hooks.join(HOOK).strip_prefix("/").map(|hook| root.join(hook)) else {
        return false;
    };
    // Where the process is gone, or may not be looked at, nothing is known.
    root.metadata().is_ok() && hook.symlink_metadata().is_err_and(|e| e.kind() == ErrorKind::NotFound)
}

/// AppArmor and SELinux, which may keep libvirt's daemons from running the hook.
pub(super) fn confinement(host: &Host, report: &Report) {
    let Host { places, config } = host;
    let hook = std::fs::canonicalize(places.hooks.join(HOOK));
    for (daemon, pid) in daemons(places) {
        let label =
            std::fs::read_to_string(config.procfs_root.join(&pid).join("attr/current")).unwrap_or_default();
        if !label.trim_end_matches(['\0', '\n']).ends_with("(enforce)") {
            continue;
        }
        // Debian's profiles (/etc/apparmor.d/usr.sbin.libvirtd, usr.sbin.virtqemud) allow these.
        let hooks = std::fs::canonicalize(&places.hooks).unwrap_or_else(|_| places.hooks.clone());
        let allowed = [hooks.as_path(), Path::new("/usr/bin"), Path::new("/usr/sbin")];
        match &hook {
            Ok(real) if !allowed.iter().any(|folder| real.starts_with(folder)) => report.broken(
                format!("AppArmor confines {daemon}, whose profile does not let it run {}, which the hook is a link to", real.display()),
                "put the program itself there, or a link into /usr/sbin: 'make install-hook', or the package",
            ),
            _ => report.ok(format!("AppArmor lets {daemon} run it")),
        }
    }
    let enforces = std::fs::read_to_string(config.sysfs_root.join("fs/selinux/enforce"));
    if enforces.is_ok_and(|enforces| enforces.trim() == "1") {
        report.warn(
            "SELinux enforces its policy, in which virt-usb's hook has no rules: libvirt's daemon may be kept from running it, or it from its inventory",
            "start a guest, then 'ausearch -m avc -ts recent': audit2allow makes a policy module of what was denied",
        );
    }
}
