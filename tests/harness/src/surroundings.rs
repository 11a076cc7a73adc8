//! Surroundings of a hook: its environment, and how this machine differs from libvirtd's.

use std::ffi::OsString;
use std::fs;

/// systemd's default search path on Debian, which is what libvirtd has; ours must not leak into the
/// hook.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Passed on when they are set, in this order.
const PASSED: [&str; 4] = ["HOME", "USER", "LOGNAME", "TMPDIR"];

/// The environment that a hook is given, in libvirt's order (`virCommandAddEnvPassCommon`,
/// src/util/vircommand.c).
///
/// libvirt passes `LD_PRELOAD` and `LD_LIBRARY_PATH` on, too. systemd sets neither for libvirtd, so
/// here they reach the hook only when `keep` names them; that, and nothing else, is what `keep` is
/// for.
pub fn environment(keep: &[String]) -> Vec<(String, OsString)> {
    let fixed =
        [("LC_ALL".to_owned(), OsString::from("C")), ("PATH".to_owned(), OsString::from(PATH))];
    let set = |name: &String| std::env::var_os(name).map(|value| (name.clone(), value));
    let passed = PASSED.map(str::to_owned);
    let kept = keep
        .iter()
        .filter(|name| !passed.contains(name) && !["LC_ALL", "PATH"].contains(&name.as_str()));
    fixed.into_iter().chain(passed.iter().chain(kept).filter_map(set)).collect()
}

/// Differences between a hook called from here and one called by libvirtd, one sentence each.
///
/// libvirt closes every descriptor from 3 up (`virExec`); a program without unsafe code can only
/// say which ones it was itself started with.
pub fn differences() -> Vec<String> {
    inherited_descriptors()
        .into_iter()
        .map(|(fd, target)| {
            format!(
                "descriptor {fd} ({target}) was open when the harness was started; the hook \
                gets it, under libvirtd it would not: add {fd}>&- to the command"
            )
        })
        .collect()
}

fn inherited_descriptors() -> Vec<(u32, String)> {
    let Ok(entries) = fs::read_dir("/proc/self/fd") else { return Vec::new() };
    let mut found: Vec<_> = entries
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<u32>().ok())
        .filter(|fd| *fd > 2 && passes_exec(*fd))
        .map(|fd| (fd, target(fd)))
        .collect();
    found.sort_unstable();
    found
}

/// Whether the close-on-exec flag (octal 02000000, proc(5)) is absent.
fn passes_exec(fd: u32) -> bool {
    let info = fs::read_to_string(format!("/proc/self/fdinfo/{fd}")).unwrap_or_default();
    let flags = info.lines().find_map(|line| line.strip_prefix("flags:"));
    flags
        .and_then(|octal| u32::from_str_radix(octal.trim(), 8).ok())
        .is_some_and(|flags| flags & 0o2_000_000 == 0)
}

fn target(fd: u32) -> String {
    fs::read_link(format!("/proc/self/fd/{fd}"))
        .map_or_else(|_| "gone".to_owned(), |path| path.display().to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_locale_and_the_path_are_libvirtds() {
        let names: Vec<_> = environment(&["PATH".into(), "LC_ALL".into(), "CARGO".into()]);
        assert_eq!(names[0], ("LC_ALL".into(), "C".into()));
        assert_eq!(names[1], ("PATH".into(), PATH.into()));
        assert_eq!(names.iter().filter(|(name, _)| name == "PATH").count(), 1);
        assert_eq!(names.last().map(|(name, _)| name.as_str()), Some("CARGO"));
    }
}
