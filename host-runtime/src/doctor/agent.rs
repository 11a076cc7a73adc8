//! The agent: its process, and what it reports of itself.

use std::os::unix::fs::MetadataExt;
use std::time::Duration;

use virt_usb_hook::config::Config;
use virt_usb_hook::machine::{self, Agent};

use super::process::{holder, may};
use super::{CONNECT_TIMEOUT, Host, Places, Report};
use crate::agent::health::{self, Health};

/// Time that a pass or a scan may be late, on a machine with much to do.
const LATE: Duration = Duration::from_secs(60);

/// Whether the agent runs as the right user, and may talk to libvirt.
fn user(places: &Places, config: &Config, report: &Report) {
    let Some(process) = holder(&config.state_dir.join(machine::AGENT_LOCK)) else { return };
    let Ok(owner) = std::fs::metadata(&config.state_dir).map(|found| found.uid()) else { return };
    if process.uid != owner {
        report.warn(
            format!(
                "it runs as user {}, and {} belongs to user {owner}: files that it makes there are not its owner's",
                process.uid,
                config.state_dir.display()
            ),
            format!("start it by its unit ('systemctl restart virt-usbd'), or 'chown -R' {} to its user", config.state_dir.display()),
        );
    }
    for socket in ["libvirt/libvirt-sock", "libvirt/virtqemud-sock"] {
        let socket = places.run.join(socket);
        let Ok(found) = std::fs::metadata(&socket) else { continue };
        match may(&found, process.uid, &process.groups, 0o2) {
            true => report.ok(format!("it may talk to libvirt at {}", socket.display())),
            false => report.broken(
                format!(
                    "it runs as user {}, which may not write {} (group {}): it cannot give guests anything",
                    process.uid,
                    socket.display(),
                    found.gid()
                ),
                "'usermod --append --groups libvirt virt-usb', then 'systemctl restart virt-usbd'",
            ),
        }
    }
}

pub(super) fn check(host: &Host, report: &Report) {
    let Host { places, config } = host;
    user(places, config, report);
    match machine::agent(&config.state_dir) {
        Agent::Alive => match health::ask(&config.state_dir, CONNECT_TIMEOUT) {
            Ok(health) => of_health(&health, config, report),
            Err(e) => report.warn(
                format!("it runs, and does not answer at its socket hook.sock: {e}"),
                "'systemctl restart virt-usbd' (guests keep their devices)",
            ),
        },
        Agent::Dead => report.broken(
            "it is installed and does not run: guests that ask for a device are refused, or do not \
             get it",
            "'systemctl start virt-usbd', and if it does not stay: 'journalctl -u virt-usbd'",
        ),
        Agent::NotInstalled => report.warn(
            "none is installed: only 'virt-usb start' gives guests their devices",
            "'make install-agent', then 'systemctl enable --now virt-usbd'",
        ),
    }
}

/// What the agent reports of itself.
fn of_health(health: &Health, config: &Config, report: &Report) {
    let restart = "'journalctl -u virt-usbd' shows why; 'systemctl restart virt-usbd' (guests keep their \
                   devices)";
    let late = 2 * config.scan_interval + LATE;
    let is_late = |seconds: f64| seconds > late.as_secs_f64();
    let Some(connected) = health.connected else {
        return report.broken(
            "it has no connection to libvirt: guests get no devices",
            format!("'systemctl status libvirtd virtqemud'; libvirt_uri is {:?}", config.libvirt_uri),
        );
    };
    match health.last_pass {
        Some(seconds) if is_late(seconds) => {
            report.broken(format!("it last looked at all guests {seconds:.0} s ago"), restart);
        }
        None if is_late(connected) => {
            report.broken(format!("it has not looked at all guests in {connected:.0} s"), restart);
        }
        _ => {}
    }
    match health.last_scan {
        Some(seconds) if is_late(seconds) => {
            report.broken(format!("it last looked at all devices {seconds:.0} s ago"), restart);
        }
        _ => {}
    }
    for call in &health.unanswered {
        let about = call.about.as_deref().unwrap_or("all guests");
        report.warn(
            format!("libvirt has not answered about {about} for {:.0} s ({})", call.age, call.what),
            "look at the guest's QEMU ('virsh domcontrol GUEST', 'ps -o pid,stat,wchan,cmd'); other guests \
             are served meanwhile",
        );
    }
    report.ok(format!(
        "it runs: connected to libvirt for {connected:.0} s ({} connection(s) since its start)",
        health.connections
    ));
}
