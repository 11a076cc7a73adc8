//! Checks that libvirt's daemons call the hook, and may run it.

use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::process::Command;

use virt_usb_config::DEFAULT_PATH;
use virt_usb_store::FILE_NAME;

use super::process::find_daemons;
use super::{Host, Places, Report, VERSION};

/// Path of the hook in libvirt's directory of hooks.
const HOOK: &str = "qemu.d/50-virt-usb";
/// Maximum number of links that are followed to a file.
const MAX_LINKS: usize = 8;

pub(super) fn check(places: &Places, report: &Report) {
    let hook = places.hooks.join(HOOK);
    let Ok(found) = std::fs::metadata(&hook) else {
        report.broken(
            format!("there is none at {}", hook.display()),
            "'apt install --reinstall virt-usb' installs it; from source: 'make install-hook'",
        );
        return;
    };
    if !found.is_file() || found.permissions().mode() & 0o111 == 0 {
        let fix = format!("chmod 0755 {}", hook.display());
        report.broken(format!("{} is not executable: libvirt ignores it", hook.display()), fix);
        return;
    }
    if found.uid() != 0 || found.permissions().mode() & 0o022 != 0 {
        let fix = format!("chown root:root {0} && chmod 0755 {0}", hook.display());
        report.broken(
            format!(
                "users other than root may write {}, which libvirtd runs as root",
                hook.display()
            ),
            fix,
        );
    }
    let version = Command::new(&hook).arg("--version").output();
    let version =
        version.map(|o| String::from_utf8_lossy(&o.stdout).trim().to_owned()).unwrap_or_default();
    match version.strip_prefix("virt-usb-hook ") {
        Some(VERSION) => {
            report.ok(format!("{} is of this version", hook.display()));
        }
        Some(version) => report.warn(
            format!("{} is version {version}, this program is {}", hook.display(), VERSION),
            "install both from one package ('apt install virt-usb'); from source: 'make \
             install-hook'",
        ),
        None => report.broken(
            format!(
                "{} does not answer to --version: it is not virt-usb's hook, or it cannot run",
                hook.display()
            ),
            "'apt install --reinstall virt-usb' installs it again; from source: \
             'make install-hook'",
        ),
    }
    seen_by_daemon(places, report);
}

/// Checks that libvirt's daemons know the hook. They look for hooks only when they start or reload.
fn seen_by_daemon(places: &Places, report: &Report) {
    let folder = places.hooks.join("qemu.d");
    let made = std::fs::metadata(&folder).and_then(|found| found.created());
    for (daemon, pid) in find_daemons(places) {
        let began =
            std::fs::metadata(Path::new("/proc").join(&pid)).and_then(|found| found.modified());
        match (&made, began) {
            (Ok(made), Ok(began)) if *made > began => report.warn(
                format!(
                    "{daemon} was started before {} was created, and may not know of the hooks in \
                     it",
                    folder.display()
                ),
                format!(
                    "'systemctl reload {daemon}' (guests keep running); ignore this if you did \
                        that already"
                ),
            ),
            (Ok(_), Ok(_)) => {
                report.ok(format!("{daemon} was started after {} was created", folder.display()));
            }
            // The daemon has stopped, or the file system does not record creation times.
            _ => {}
        }
    }
}

/// Checks whether AppArmor or SELinux may keep libvirt's daemons from running the hook.
pub(super) fn confinement(host: &Host, report: &Report) {
    let Host { places, config } = host;
    let hook = std::fs::canonicalize(places.hooks.join(HOOK));
    for (daemon, pid) in find_daemons(places) {
        let label = std::fs::read_to_string(config.procfs_root.join(&pid).join("attr/current"))
            .unwrap_or_default();
        if !label.trim_end_matches(['\0', '\n']).ends_with("(enforce)") {
            continue;
        }
        // Debian's profiles (/etc/apparmor.d/usr.sbin.libvirtd, usr.sbin.virtqemud) allow these.
        let hooks = std::fs::canonicalize(&places.hooks).unwrap_or_else(|_| places.hooks.clone());
        let allowed = [hooks.as_path(), Path::new("/usr/bin"), Path::new("/usr/sbin")];
        match &hook {
            Ok(real) if !allowed.iter().any(|folder| real.starts_with(folder)) => report.broken(
                format!(
                    "AppArmor confines {daemon}: its profile does not allow the hook's target, {}",
                    real.display()
                ),
                "put the program itself there, or a link into /usr/sbin: 'apt install --reinstall \
                 virt-usb', or, from source, 'make install-hook'",
            ),
            _ => report.ok(format!("AppArmor lets {daemon} run it")),
        }
    }
    let enforces = std::fs::read_to_string(config.sysfs_root.join("fs/selinux/enforce"));
    if enforces.is_ok_and(|enforces| enforces.trim() == "1") {
        report.warn(
            "SELinux enforces its policy, which has no rules for virt-usb's hook: it may keep \
             libvirt from running the hook, or the hook from opening the inventory",
            "start a guest, then 'ausearch -m avc -ts recent': audit2allow makes a policy module \
             from the denials",
        );
    }
}

/// Checks that a libvirtd in a container sees the host's hook, configuration and inventory.
pub(super) fn containers(host: &Host, report: &Report) {
    let hook = host.places.hooks.join(HOOK);
    let config = host.places.config.clone().unwrap_or_else(|| DEFAULT_PATH.into());
    let files = [hook, config, host.config.state_dir.join(FILE_NAME)];
    for (daemon, pid) in find_daemons(&host.places) {
        let process = Path::new("/proc").join(pid);
        // The file of a process id may be older than the process.
        let name = std::fs::read_to_string(process.join("comm")).unwrap_or_default();
        if name.trim() != daemon {
            continue;
        }
        let root = process.join("root");
        for file in files.iter().filter(|file| file.exists() && !is_same(&root, file)) {
            report.broken(
                format!(
                    "{daemon} has another root directory, as in a container, in which {} is \
                     missing or is another file: guests get no devices, or the wrong ones",
                    file.display()
                ),
                "mount it (install/README.md, \"libvirt in a container\"); after an upgrade, \
                    restart the container",
            );
        }
    }
}

/// Whether a path names the same file below another root directory. Links are followed as by a
/// process with that root.
fn is_same(root: &Path, file: &Path) -> bool {
    let Ok(here) = std::fs::metadata(file) else { return false };
    let mut path = file.to_owned();
    for _ in 0..MAX_LINKS {
        let Ok(relative) = path.strip_prefix("/") else { return false };
        let there = root.join(relative);
        match std::fs::read_link(&there) {
            Ok(target) => path = path.parent().unwrap_or(Path::new("/")).join(target),
            Err(_) => {
                return std::fs::metadata(&there)
                    .is_ok_and(|there| (there.dev(), there.ino()) == (here.dev(), here.ino()));
            }
        }
    }
    false
}
