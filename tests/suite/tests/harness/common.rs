//! Hooks written in shell, for the tests of the harness.

use std::path::{Path, PathBuf};

use tempfile::TempDir;

/// A folder that is removed after the test.
pub(crate) fn folder() -> TempDir {
    TempDir::new().unwrap()
}

/// Writes an executable shell script.
pub(crate) fn script(path: &Path, body: &str) -> PathBuf {
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    raw_script(path, &format!("#!/bin/sh\n{body}\n"))
}

/// The same without `#!`.
pub(crate) fn raw_script(path: &Path, text: &str) -> PathBuf {
    virt_usb_suite::write_program(path, text.as_bytes());
    path.to_owned()
}

/// A domain's XML.
pub(crate) fn domain(name: &str, devices: &str) -> String {
    format!(
        "<domain type='kvm'>\n  <name>{name}</name>\n  \
            <uuid>00000000-0000-4000-8000-00000000000a</uuid>\n  \
            <devices>{devices}</devices>\n</domain>\n"
    )
}

/// A hook that appends `NAME OP SUBOP EXTRA` to `log` and then does what `more` says.
pub(crate) fn recorder(path: &Path, log: &Path, more: &str) -> PathBuf {
    script(
        path,
        &format!(
            "[ \"$1\" != --config ] || shift 2\necho \"$1 $2 $3 $4\" >> {}\n{more}",
            log.display()
        ),
    )
}

/// Records of the fake hook, `OP EXTRA` for each call.
pub(crate) fn recorded(log: &Path) -> Vec<String> {
    let text = std::fs::read_to_string(log).unwrap_or_default();
    let words = |line: &str| line.split(' ').map(str::to_owned).collect::<Vec<_>>();
    text.lines().map(words).map(|w| format!("{} {}", w[1], w[3])).collect()
}
