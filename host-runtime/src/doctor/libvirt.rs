//! Checks libvirt's daemon, and the capabilities of its QEMU.

use super::{Host, Report};
use crate::hypervisor::Libvirt;

pub(super) fn check(host: &Host, report: &Report) {
    let libvirt = match Libvirt::open(&host.config.libvirt_uri) {
        Ok(libvirt) => libvirt,
        Err(e) => {
            return report.broken(
                e,
                "'systemctl status libvirtd virtqemud'; check that this user may access it (group \
                 libvirt)",
            );
        }
    };
    match libvirt.domain_capabilities() {
        Ok(text) => capabilities(&text, report),
        Err(e) => report.warn(
            format!("it does not report its guests' capabilities: {e}"),
            "check 'virsh domcapabilities'",
        ),
    }
}

fn capabilities(capabilities: &str, report: &Report) {
    let section = |name: &str| {
        let begin = capabilities.find(&format!("<{name} supported='yes'"))?;
        capabilities.get(begin..)?.split(&format!("</{name}>")).next()
    };
    if section("hostdev").is_some_and(|s| s.contains("<value>usb</value>")) {
        report.ok("QEMU can pass USB devices through");
    } else {
        report.broken(
            "QEMU has no usb-host: no device can be attached to a guest",
            "install a QEMU that was built with libusb (Debian: qemu-system-x86)",
        );
    }
    if section("graphics").is_some_and(|s| s.contains("<value>spice</value>")) {
        report.ok("QEMU has SPICE");
    } else {
        report.warn(
            "QEMU has no SPICE: redirections are \
            refused",
            "install its SPICE module (Debian 13: qemu-system-modules-spice, 12: \
                qemu-system-gui), if redirections are wanted",
        );
    }
}
