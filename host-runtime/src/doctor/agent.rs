//! Checks the agent: that it runs as the right user, and the status that it reports.

use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt;
use std::time::Duration;

use virt_usb_config::Config;
use virt_usb_config::host_env::{self, Agent};
use virt_usb_model::clean;

use super::process::{find_lock_holder, may_access};
use super::{CONNECT_TIMEOUT, Host, Places, Report, VERSION};
use crate::agent::health::{self, Health};

/// Delay of a pass or a scan that is normal on a busy machine.
const LATE_GRACE: Duration = Duration::from_secs(60);
/// Seconds without a connection to libvirt that are normal, for example after a restart.
const CONNECT_GRACE_SECONDS: f64 = 10.0;

pub(super) fn check(host: &Host, report: &Report) {
    let Host { places, config } = host;
    let health = match host_env::agent(&config.state_dir) {
        Agent::Alive => health::ask(&config.state_dir, CONNECT_TIMEOUT),
        Agent::Dead => {
            return report.broken(
                "it is installed but not running: guests that request a device are refused, or do \
                 not get it",
                "'systemctl start virt-usbd'; if it stops again, see 'journalctl -u virt-usbd'",
            );
        }
        Agent::NotInstalled => {
            return report.warn(
                "none is installed: guests get their devices only with 'virt-usb start'",
                "'apt install virt-usb' (from source: 'make install-agent'), then 'systemctl \
                 enable --now virt-usbd'",
            );
        }
    };
    // If the agent is connected, its access to the sockets needs no check.
    let is_connected = health.as_ref().is_ok_and(|health| health.connected.is_some());
    check_user(places, config, is_connected, report);
    let restart = "'systemctl restart virt-usbd' (guests keep their devices)";
    match health {
        Ok(health) => check_health(&health, config, report),
        Err(e) if e.kind() == ErrorKind::PermissionDenied => {
            report.warn("this user may not query its status", "'sudo virt-usb doctor'");
        }
        Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => report.broken(
            format!(
                "it has not answered for {} s: it hangs, or it is older than version {VERSION}",
                CONNECT_TIMEOUT.as_secs()
            ),
            restart,
        ),
        Err(e) => report.warn(
            format!(
                "it is running but does not answer at its socket {}: {e}",
                host_env::HOOK_SOCKET
            ),
            restart,
        ),
    }
}

/// Checks that the agent runs as the right user, and may talk to libvirt.
fn check_user(places: &Places, config: &Config, is_connected: bool, report: &Report) {
    let Some(process) = find_lock_holder(&config.state_dir.join(host_env::AGENT_LOCK)) else {
        return;
    };
    let Ok(owner) = std::fs::metadata(&config.state_dir).map(|found| found.uid()) else { return };
    let state_dir = config.state_dir.display();
    if process.uid != owner {
        report.warn(
            format!(
                "it runs as user {}, but {state_dir} belongs to user {owner}: files that it \
                 creates there get the wrong owner",
                process.uid
            ),
            format!(
                "start it by its unit ('systemctl restart virt-usbd'), or 'chown -R' {state_dir} \
                    to its user"
            ),
        );
    }
    for socket in ["libvirt/libvirt-sock", "libvirt/virtqemud-sock"] {
        let socket = places.run.join(socket);
        let Ok(found) = std::fs::metadata(&socket) else { continue };
        if is_connected || may_access(&found, process.uid, &process.groups, 0o2) {
            report.ok(format!("it may talk to libvirt at {}", socket.display()));
        } else {
            report.broken(
                format!(
                    "it runs as user {}, which may not write {} (group {}): it cannot attach \
                     devices",
                    process.uid,
                    socket.display(),
                    found.gid()
                ),
                format!(
                    "'getent group {}' names that group; 'usermod --append --groups GROUP \
                        virt-usb', then \
                     'systemctl restart virt-usbd'",
                    found.gid()
                ),
            );
        }
    }
}

/// Checks the status that the agent reports.
fn check_health(health: &Health, config: &Config, report: &Report) {
    let fix = "'journalctl -u virt-usbd' shows why; 'systemctl restart virt-usbd' (guests keep \
        their devices)";
    if health.version != VERSION {
        report.warn(
            format!("it is version {}, this program is {VERSION}", clean(&health.version)),
            "'systemctl restart virt-usbd' after an upgrade (guests keep their devices)",
        );
    }
    if let Some(why) = &health.certificate_error {
        report.warn(
            format!("it cannot use the API's certificate: {}", clean(why)),
            "correct api_certificate and api_key, and let the agent's user read both",
        );
    }
    let late = (2 * config.scan_interval + LATE_GRACE).as_secs_f64();
    // Without a scan so far, the delay counts from the agent's start.
    let scan = health.last_scan.unwrap_or(health.uptime);
    if scan > late {
        report.broken(
            format!("it has not completed a scan of the devices without an error for {scan:.0} s"),
            fix,
        );
    }
    let Some(connected) = health.connected else {
        let lost = health.lost.unwrap_or(health.uptime);
        if lost < CONNECT_GRACE_SECONDS {
            return report.ok("it runs, and is connecting to libvirt");
        }
        return report.broken(
            format!("it has had no connection to libvirt for {lost:.0} s: guests get no devices"),
            format!(
                "'systemctl status libvirtd virtqemud'; libvirt_uri is {:?}",
                config.libvirt_uri
            ),
        );
    };
    // A pass needs a connection, so the delay counts at most from the connection.
    let pass = health.last_pass.unwrap_or(connected).min(connected);
    if pass > late {
        report.broken(format!("it has not completed a pass over all guests for {pass:.0} s"), fix);
    }
    if health.blocked {
        report.broken(
            "libvirt does not answer about too many guests: the agent makes no more calls, and no \
             guest gets a device",
            "destroy the guests below ('virsh destroy'), or resume their QEMU",
        );
    }
    for call in &health.unanswered {
        let about = call.about.as_deref().map_or_else(|| "all guests".into(), clean);
        report.warn(
            format!(
                "libvirt has not answered about {about} for {:.0} s ({})",
                call.age,
                clean(&call.what)
            ),
            "look at the guest's QEMU: 'virsh domcontrol GUEST', 'ps -o pid,stat,wchan,cmd'",
        );
    }
    report.ok(format!(
        "it runs, connected to libvirt for {connected:.0} s ({} connection(s) since its start)",
        health.connections
    ));
}
