//! Common parts of all HTTP clients.

use std::fs::File;
use std::io::{self, ErrorKind, Read as _, Write as _};
use std::net::IpAddr;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, bail};
use tokio_rustls::rustls::crypto::ring;
use ureq::config::ConfigBuilder;
use ureq::http::Uri;
use ureq::tls::{Certificate, PemItem, RootCerts, TlsConfig, parse_pem};
use ureq::typestate::AgentScope;
use ureq::unversioned::resolver::DefaultResolver;
use ureq::unversioned::transport::{
    Buffers, ConnectionDetails, Connector, LazyBuffers, NextTimeout, Transport,
};
use ureq::{Agent, Error};

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
    let config = config(timeout).timeout_connect(Some(connect_timeout)).tls_config(tls(trusted)?);
    Ok(config.build().into())
}

/// A client of the server that listens on this unix socket, for URLs whose host is an IP address.
pub(crate) fn local_agent(socket: PathBuf, timeout: Duration) -> Agent {
    Agent::with_parts(config(timeout).build(), UnixSocket(socket), DefaultResolver::default())
}

fn config(timeout: Duration) -> ConfigBuilder<AgentScope> {
    Agent::config_builder()
        .http_status_as_error(false)
        .max_redirects(0)
        .timeout_global(Some(timeout))
        .user_agent(concat!("virt-usb/", env!("CARGO_PKG_VERSION")))
}

/// Connects to a unix socket, whatever the URL's host is.
#[derive(Debug)]
struct UnixSocket(PathBuf);

impl Connector for UnixSocket {
    type Out = UnixTransport;

    fn connect(
        &self,
        details: &ConnectionDetails<'_>,
        _chained: Option<()>,
    ) -> Result<Option<UnixTransport>, Error> {
        // The directory may belong to another user: no link is followed there.
        let place = File::options()
            .read(true)
            .custom_flags(libc::O_PATH | libc::O_NOFOLLOW)
            .open(&self.0)?;
        let stream = UnixStream::connect(format!("/proc/self/fd/{}", place.as_raw_fd()))?;
        let config = details.config;
        let buffers = LazyBuffers::new(config.input_buffer_size(), config.output_buffer_size());
        Ok(Some(UnixTransport { stream, buffers }))
    }
}

/// A connection to a unix socket.
#[derive(Debug)]
struct UnixTransport {
    stream: UnixStream,
    buffers: LazyBuffers,
}

impl Transport for UnixTransport {
    fn buffers(&mut self) -> &mut dyn Buffers {
        &mut self.buffers
    }

    fn transmit_output(&mut self, amount: usize, timeout: NextTimeout) -> Result<(), Error> {
        self.stream.set_write_timeout(timeout.not_zero().map(|timeout| *timeout))?;
        let output = self.buffers.output().get(..amount).unwrap_or_default();
        self.stream.write_all(output).map_err(|e| failure(e, &timeout))
    }

    fn await_input(&mut self, timeout: NextTimeout) -> Result<bool, Error> {
        self.stream.set_read_timeout(timeout.not_zero().map(|timeout| *timeout))?;
        let read = self.stream.read(self.buffers.input_append_buf());
        let amount = read.map_err(|e| failure(e, &timeout))?;
        self.buffers.input_appended(amount);
        Ok(amount > 0)
    }

    fn is_open(&mut self) -> bool {
        // Each request gets a connection of its own.
        false
    }
}

fn failure(e: io::Error, timeout: &NextTimeout) -> Error {
    match e.kind() {
        ErrorKind::WouldBlock | ErrorKind::TimedOut => Error::Timeout(timeout.reason),
        _ => e.into(),
    }
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
