//! Checks the boot id and the clock, which claims and events refer to.

use virt_usb_config::host_env;

use super::{Host, Report};

pub(super) fn check(host: &Host, report: &Report) {
    match host_env::context(&host.config, "virt-usb doctor") {
        Ok(_) => report.ok("it has a boot id, which claims need"),
        Err(e) => report.broken(e, "mount procfs, or correct procfs_root in the configuration"),
    }
    let Ok(store) = host.store() else { return };
    match store.newest_ahead() {
        Ok(Some(at)) => report.warn(
            format!(
                "the newest event has the time {at}, which is in the future: the clock was set \
                    back, \
                 and the audit is out of order"
            ),
            "'timedatectl' shows whether the clock is synchronised; claims do not depend on it",
        ),
        Ok(None) => report.ok("the clock is not behind the audit"),
        Err(e) => report.broken(e, "'virt-usb store check' shows details"),
    }
}
