//! The API's address, and the certificate that it uses there.

use std::net::TcpStream;
use std::time::{Duration, SystemTime};

use virt_usb_hook::config::{Api, Tls};
use virt_usb_hook::machine::{self, Agent};

use super::process::open_to_all;
use super::{CONNECT_TIMEOUT, Host, Report};
use crate::agent::health;
use crate::listen::{Certificate, expiry};

/// Time before the end of a certificate at which it is reported, in days.
const WARN_DAYS: u64 = 14;

pub(super) fn check(host: &Host, report: &Report) {
    let Api::On(address) = host.config.api else { return };
    let connected = TcpStream::connect_timeout(&address, CONNECT_TIMEOUT);
    match (connected, machine::agent(&host.config.state_dir) == Agent::Alive) {
        // With port 0 the kernel chooses one.
        (_, _) if address.port() == 0 => {}
        (Err(e), true) => report.warn(
            format!("nobody serves it at {address}: {e}"),
            "'journalctl -u virt-usbd' shows why; guests get their devices all the same",
        ),
        (Ok(_), true) => match health::ask(&host.config.state_dir, CONNECT_TIMEOUT) {
            Ok(health) if health.api_served == Some(false) => report.warn(
                format!("another program listens at {address}: the agent does not serve the API there"),
                "set api to another address, and restart the agent (guests keep their devices)",
            ),
            Ok(_) => report.ok(format!("it is served at {address}")),
            // The check of the agent reports that it does not answer.
            Err(_) => {}
        },
        (Ok(_), false) => report.warn(
            format!("another program listens at {address}"),
            "set api to another address before you start the agent",
        ),
        // The check of the agent reports that it does not run.
        (Err(_), false) => {}
    }
    if let Some(tls) = &host.config.api_tls {
        certificate(tls, report);
    }
}

fn certificate(tls: &Tls, report: &Report) {
    if let Err(e) = Certificate::new(tls.clone()).read() {
        return report.warn(
            format!("its certificate cannot be used: {e}"),
            "correct api_certificate and api_key; until then the agent uses the ones before, if it has any",
        );
    }
    open_to_all("its key", &tls.key, report);
    let name = tls.certificate.display();
    let renew = "renew it; the agent reads the new one without a restart";
    match expiry(&tls.certificate).map(|expires| expires.duration_since(SystemTime::now())) {
        Err(e) => report
            .warn(format!("its certificate's end cannot be read: {e}"), "'openssl x509 -enddate' shows it"),
        Ok(Err(since)) => {
            let days = days(since.duration());
            report.warn(
                format!("its certificate {name}, or one of its chain, expired {days} day(s) ago"),
                renew,
            );
        }
        Ok(Ok(left)) if days(left) < WARN_DAYS => {
            report.warn(
                format!("its certificate {name}, or one of its chain, expires in {} day(s)", days(left)),
                renew,
            );
        }
        Ok(Ok(left)) => report.ok(format!("its certificate is valid for {} more days", days(left))),
    }
}

const fn days(time: Duration) -> u64 {
    time.as_secs() / (24 * 3600)
}
