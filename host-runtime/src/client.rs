//! Common parts of all HTTP clients.

use std::net::IpAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, bail};
use tokio_rustls::rustls::crypto::ring;
use ureq::Agent;
use ureq::http::Uri;
use ureq::tls::{Certificate, PemItem, RootCerts, TlsConfig, parse_pem};

/// Creates a client that follows no redirects and returns responses of every status. It trusts the
/// certificates of [`tls`]. `connect_timeout` limits the connection, `timeout` the whole request.
///
/// # Errors
/// Errors of [`tls`].
pub(crate) fn agent(
    trusted: Option<&Path>,
    connect_timeout: Duration,
    timeout: Duration,
) -> anyhow::Result<Agent> {
    let config = Agent::config_builder()
        .http_status_as_error(false)
        .max_redirects(0)
        .timeout_connect(Some(connect_timeout))
        .timeout_global(Some(timeout))
        .user_agent(concat!("virt-usb/", env!("CARGO_PKG_VERSION")))
        .tls_config(tls(trusted)?)
        .build();
    Ok(config.into())
}

/// Whether other hosts can read data that is sent to this address.
pub(crate) fn is_open(address: &Uri) -> bool {
    let is_loopback = |host: &str| {
        let bare = host.trim_start_matches('[').trim_end_matches(']');
        bare.eq_ignore_ascii_case("localhost")
            || bare.parse().is_ok_and(|ip: IpAddr| ip.is_loopback())
    };
    address.scheme_str() == Some("http") && !address.host().is_some_and(is_loopback)
}

/// Returns a configuration that trusts the certificates in the PEM file `trusted`, or, without a
/// file, those that this machine trusts.
///
/// # Errors
/// If the file cannot be read, or contains no certificate.
fn tls(trusted: Option<&Path>) -> anyhow::Result<TlsConfig> {
    let roots = match trusted {
        None => RootCerts::PlatformVerifier,
        Some(file) => {
            let pem = std::fs::read(file).with_context(|| file.display().to_string())?;
            let certificates = parse_pem(&pem)
                .filter_map(|item| match item {
                    Ok(PemItem::Certificate(certificate)) => Some(Ok(certificate)),
                    Ok(_) => None,
                    Err(e) => Some(Err(e)),
                })
                .collect::<Result<Vec<Certificate<'static>>, _>>()
                .with_context(|| file.display().to_string())?;
            if certificates.is_empty() {
                bail!("{}: it contains no PEM certificate", file.display());
            }
            RootCerts::Specific(Arc::new(certificates))
        }
    };
    let provider = Arc::new(ring::default_provider());
    Ok(TlsConfig::builder().root_certs(roots).unversioned_rustls_crypto_provider(provider).build())
}
