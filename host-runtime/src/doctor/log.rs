//! Checks the destination of the hook's records.

use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::Path;

use virt_usb_config::Log;

use super::{Host, Report};

pub(super) fn check(host: &Host, report: &Report) {
    match &host.config.log {
        Log::Off => report.ok("records are switched off"),
        Log::Journal => {
            let socket = host.places.run.join("systemd/journal/socket");
            match std::fs::metadata(&socket) {
                Ok(found) if found.file_type().is_socket() => {
                    report.ok("the journal accepts records");
                }
                _ => report.warn(
                    format!(
                        "the journal's socket {} is missing: the hook's records are lost",
                        socket.display()
                    ),
                    "'systemctl status systemd-journald'; without systemd: log \
                        = \"/var/log/virt-usb.log\"",
                ),
            }
        }
        Log::File(file) => to_file(file, report),
    }
}

/// Checks a log file. The hook runs as root and creates the file, but not its directory.
fn to_file(file: &Path, report: &Report) {
    let folder = file.parent().unwrap_or(Path::new("/"));
    match std::fs::metadata(folder) {
        Ok(found) if !found.is_dir() => report.warn(
            format!("log = {file:?}: {} is not a folder", folder.display()),
            "correct log in the configuration; until then records go to the journal",
        ),
        Ok(found) if found.mode() & 0o002 != 0 && found.mode() & 0o1000 == 0 => report.warn(
            format!("log = {file:?}: every user may replace files in {}", folder.display()),
            format!("'chmod o-w {}'", folder.display()),
        ),
        Ok(_) => report.ok(format!("records are written to {}", file.display())),
        Err(e) => report.warn(
            format!("log = {file:?}: the folder {} cannot be read: {e}", folder.display()),
            format!("'mkdir -p {}'; until then records go to the journal", folder.display()),
        ),
    }
}
