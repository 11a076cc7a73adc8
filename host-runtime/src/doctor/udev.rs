//! Checks udevd, from which libusb receives hotplug events.

use super::{Host, Report};

/// Socket of a running udevd, below the folder for runtime files.
const CONTROL_SOCKET: &str = "udev/control";

pub(super) fn check(host: &Host, report: &Report) {
    let socket = host.places.run.join(CONTROL_SOCKET);
    if socket.exists() {
        report.ok("udevd runs");
    } else {
        report.warn(
            format!(
                "udevd does not run ({} is missing): the agent sees a plugged-in device up to 10 s \
                    late",
                socket.display()
            ),
            "'systemctl start systemd-udevd'; in a container, mount /run/udev from the host",
        );
    }
}
