//! Checks the inventory's file.

use virt_usb_store::StoreError;

use super::{Host, Level, Report};

/// Size in bytes of SQLite's log that means that checkpoints do not work. Writers make a checkpoint
/// at 0.5 MiB.
const MAX_LOG_BYTES: u64 = 16 << 20;

pub(super) fn check(host: &Host, report: &Report) {
    let store = match host.store() {
        Ok(store) => store,
        Err(e) => {
            // Most errors of the inventory contain their fix.
            let fix = match &e {
                StoreError::Other { .. } | StoreError::File { .. } => {
                    Some("'virt-usb store check' shows details".to_owned())
                }
                _ => None,
            };
            return report.add(Level::Broken, e, fix);
        }
    };
    match store.check() {
        Ok(findings) if findings.is_empty() => {
            report.ok(format!("{} is sound", store.path().display()));
        }
        Ok(findings) => {
            for finding in findings {
                report.broken(
                    finding,
                    "'virt-usb store rebuild' rebuilds it and keeps what it can, or 'virt-usb \
                     store restore FILE' restores a backup; for a missing hint, run 'virt-usb \
                     discover'",
                );
            }
        }
        Err(e) => report.broken(e, "'virt-usb store check' shows details"),
    }
    let log = store.path().with_extension("sqlite-wal");
    if let Some(size) =
        std::fs::metadata(&log).ok().map(|found| found.len()).filter(|size| *size > MAX_LOG_BYTES)
    {
        report.warn(
            format!(
                "{} has {} MiB: a program that has been reading for very long keeps it from being \
                 checkpointed",
                log.display(),
                size >> 20
            ),
            "find the program that has it open: 'fuser -v' with its name",
        );
    }
}
