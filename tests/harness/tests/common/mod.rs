//! Hooks written in shell, for the tests of the harness.
#![allow(dead_code, reason = "each test file uses its part")]
#![allow(clippy::unwrap_used, reason = "a test may fail")]

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use tempfile::TempDir;

/// A folder that goes away with the test.
pub(crate) fn folder() -> TempDir {
    TempDir::new().unwrap()
}

/// Writes an executable shell script.
///
/// Another process writes it: a test that forks meanwhile would inherit a descriptor of ours that is open for writing,
/// and the kernel executes no file that somebody writes.
pub(crate) fn script(path: &Path, body: &str) -> PathBuf {
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    raw_script(path, &format!("#!/bin/sh\n{body}\n"))
}

/// The same without `#!`.
pub(crate) fn raw_script(path: &Path, text: &str) -> PathBuf {
    let mut writer = Command::new("/bin/sh")
        .args(["-c", "cat > \"$1\" && chmod 755 \"$1\"", "sh"])
        .arg(path)
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    writer.stdin.take().unwrap().write_all(text.as_bytes()).unwrap();
    assert!(writer.wait().unwrap().success());
    path.to_owned()
}

/// A domain's XML.
pub(crate) fn domain(name: &str, devices: &str) -> String {
    format!(
        "<domain type='kvm'>\n  <name>{name}</name>\n  <uuid>00000000-0000-4000-8000-00000000000a</uuid>\n  <devices>{devices}</devices>\n</domain>\n"
    )
}

/// A hook that appends `NAME OP SUBOP EXTRA` to `log` and then does what `more` says.
pub(crate) fn recorder(path: &Path, log: &Path, more: &str) -> PathBuf {
    script(
        path,
        &format!("[ \"$1\" != --config ] || shift 2\necho \"$1 $2 $3 $4\" >> {}\n{more}", log.display()),
    )
}

/// What a recorder wrote, `OP EXTRA` for each call.
pub(crate) fn recorded(log: &Path) -> Vec<String> {
    let text = std::fs::read_to_string(log).unwrap_or_default();
    let words = |line: &str| line.split(' ').map(str::to_owned).collect::<Vec<_>>();
    text.lines().map(words).map(|w| format!("{} {}", w[1], w[3])).collect()
}
