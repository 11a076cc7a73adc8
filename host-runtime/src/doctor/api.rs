//! The API's address, and the certificate that it uses there.

use std::net::TcpStream;
use std::time::{Duration, SystemTime};

use virt_usb_config::{Api, Tls};

use super::process::warn_if_open_to_all;
use super::{CONNECT_TIMEOUT, Host, Report, address};
use virt_usb_fleet::http_server::{Certificate, expiry};

/// Time before the end of a certificate at which it is reported, in days.
const WARN_DAYS: u64 = 14;

pub(super) fn check(host: &Host, report: &Report) {
    let Api::On(address) = host.config.api else { return };
    // With port 0 the kernel chooses one.
    if address.port() != 0 {
        let connected = TcpStream::connect_timeout(&address, CONNECT_TIMEOUT).map(drop);
        address::check(host, report, "api", address, connected, |health| health.api_served);
    }
    if let Some(tls) = &host.config.api_tls {
        certificate(tls, report);
    }
}

fn certificate(tls: &Tls, report: &Report) {
    if let Err(e) = Certificate::new(tls.clone()).read() {
        return report.warn(
            format!("its certificate cannot be used: {e}"),
            "correct api_certificate and api_key; until then the agent uses the previous \
             certificate, if it has one",
        );
    }
    warn_if_open_to_all("its key", &tls.key, report);
    let name = tls.certificate.display();
    let renew = "renew it; the agent reads the new one without a restart";
    match expiry(&tls.certificate).map(|expires| expires.duration_since(SystemTime::now())) {
        Err(e) => report.warn(
            format!("its certificate's end cannot be read: {e}"),
            "'openssl x509 -enddate' shows it",
        ),
        Ok(Err(since)) => {
            let days = days(since.duration());
            report.warn(
                format!("its certificate {name}, or one of its chain, expired {days} day(s) ago"),
                renew,
            );
        }
        Ok(Ok(left)) if days(left) < WARN_DAYS => {
            report.warn(
                format!(
                    "its certificate {name}, or one of its chain, expires in {} day(s)",
                    days(left)
                ),
                renew,
            );
        }
        Ok(Ok(left)) => report.ok(format!("its certificate is valid for {} more days", days(left))),
    }
}

const fn days(time: Duration) -> u64 {
    time.as_secs() / (24 * 3600)
}
