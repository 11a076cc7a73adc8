//! Checks whether a valid configuration makes sense on this host.

use virt_usb_config::rules;

use super::{Host, Report};

pub(super) fn check(host: &Host, report: &Report) {
    let whitelist = &host.config.whitelist;
    if whitelist.on && whitelist.rules.is_empty() {
        report.warn(
            "usb_white_list_switch is on and there is no rule: no device is available",
            "write rules into usb_passthrough_whitelist, or turn the switch off",
        );
    }
    let lost = host
        .store()
        .ok()
        .map(|store| rules::admit(&store, &host.config, host.places.config.as_deref()));
    match lost {
        Some(Err(lost)) => report.broken(
            lost,
            "no guest starts with a device until the file is complete: restore it from a backup",
        ),
        _ => report.ok("it can be read"),
    }
}
