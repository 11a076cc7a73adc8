//! HTTP server on TCP and unix sockets. Bounds on the number, the duration and the request size of
//! connections keep one client from affecting the others.

use std::future::poll_fn;
use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::{FileTypeExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{self, Poll};
use std::time::{Duration, SystemTime};

use axum::Router;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio_io_timeout::TimeoutStream;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls;
use tokio_rustls::rustls::pki_types::pem::{self, PemObject as _};
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tower::Service as _;
use virt_usb_config::{Tls, read_bounded};
use virt_usb_store::user::User;
use x509_cert::der::Decode as _;

use crate::stamp::{Stamp, stamp};

/// Maximum number of connections over the network; the unix socket has as many of its own.
pub const CONNECTIONS: usize = 256;
/// Timeout for the head of a request, and for an idle connection.
const HEAD_TIMEOUT: Duration = Duration::from_secs(30);
/// Maximum size of a request's head in bytes.
const MAX_HEAD_BYTES: usize = 16 << 10;
/// Timeout for the TLS handshake.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// Timeout for a client that does not read its response.
const WRITE_TIMEOUT: Duration = Duration::from_secs(30);
/// Maximum duration of a connection. Afterwards the connection ends with its current response, so
/// that a client that reads very slowly cannot occupy it forever.
const CONNECTION_TIMEOUT: Duration = Duration::from_secs(600);
/// Mode of the socket of the API or the scheduler: access for its user and its group.
pub const SOCKET_MODE: u32 = 0o660;
/// Timeout for running requests at shutdown.
pub const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(15);
/// Wait between attempts to bind a socket.
const BIND_RETRY_INTERVAL: Duration = Duration::from_secs(10);
/// Wait after a connection that could not be accepted.
const ACCEPT_RETRY_INTERVAL: Duration = Duration::from_millis(100);
/// Timeout for sending the response to a connection above the limit.
const REFUSAL_TIMEOUT: Duration = Duration::from_secs(1);

/// Origin of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Peer {
    /// Connection over the network.
    Remote(std::net::IpAddr),
    /// Connection over the unix socket. A client needs access to its directory and write access to
    /// the socket.
    Local {
        /// User ID of the peer process.
        uid: u32,
    },
}

/// A service on a socket. Each request has a [`Peer`] among its extensions.
#[derive(Clone)]
pub struct Server {
    /// Name for messages, as in `the API`.
    pub what: &'static str,
    /// Routes of the service.
    pub router: Router,
    /// One permit for each connection.
    pub limit: Arc<Semaphore>,
    /// Becomes true when the server must stop.
    pub stopping: watch::Receiver<bool>,
    /// Set once the socket or the address is served.
    pub served: Arc<AtomicBool>,
}

impl Server {
    /// Serves `address`, with TLS if there is a certificate, until the server must stop.
    pub async fn network(self, address: SocketAddr, mut tls: Option<Certificate>) {
        let bind = || async move { TcpListener::bind(address).await };
        let Some(listener) = self.listen(&address.to_string(), bind).await else { return };
        let at = listener.local_addr().map_or_else(|_| address.to_string(), |at| at.to_string());
        let scheme = if tls.is_some() { "https" } else { "http" };
        tracing::info!("{} is served at {scheme}://{at}/", self.what);
        let serve = |stream: TcpStream, from: SocketAddr| {
            // Responses are small and written as a whole: there is nothing to wait for.
            drop(stream.set_nodelay(true));
            let peer = Peer::Remote(from.ip());
            match tls.as_mut().map(Certificate::current) {
                None => self.admit(stream, peer),
                Some(Some(acceptor)) => self.shake_hands(stream, peer, &acceptor),
                // The error was logged. The next connection reads the certificate again.
                Some(None) => {}
            }
        };
        self.accept(|context| listener.poll_accept(context), serve).await;
    }

    /// Serves the unix socket at `path`, with mode `mode`.
    pub async fn local(self, path: PathBuf, mode: u32) {
        let bind = || async { bind_local(&path, mode) };
        let Some(listener) = self.listen(&path.display().to_string(), bind).await else { return };
        let serve = |stream: UnixStream, _| match stream.peer_cred() {
            Ok(peer) => self.admit(stream, Peer::Local { uid: peer.uid() }),
            Err(e) => tracing::warn!("cannot identify a client of {}: {e}", path.display()),
        };
        self.accept(|context| listener.poll_accept(context), serve).await;
    }

    /// Accepts connections, and passes each to `serve`, until the server must stop.
    async fn accept<S, A>(
        &self,
        mut poll: impl FnMut(&mut task::Context<'_>) -> Poll<io::Result<(S, A)>>,
        mut serve: impl FnMut(S, A),
    ) {
        self.served.store(true, Ordering::Relaxed);
        let mut stopping = self.stopping.clone();
        loop {
            let accepted = tokio::select! {
                accepted = poll_fn(&mut poll) => accepted,
                () = stopped(&mut stopping) => return,
            };
            match accepted {
                Ok((stream, from)) => serve(stream, from),
                // For example, the process has too many open files: wait until some are closed.
                Err(e) => {
                    tracing::warn!("{} cannot accept a connection: {e}", self.what);
                    tokio::time::sleep(ACCEPT_RETRY_INTERVAL).await;
                }
            }
        }
    }

    /// Binds the socket, and retries until that succeeds. `None` if the server must stop first.
    async fn listen<L, F: Future<Output = io::Result<L>>>(
        &self,
        address: &str,
        bind: impl Fn() -> F,
    ) -> Option<L> {
        let mut stopping = self.stopping.clone();
        let mut is_logged = false;
        loop {
            match bind().await {
                Ok(listener) => return Some(listener),
                Err(e) if !is_logged => {
                    tracing::error!(
                        "{} cannot be served at {address}: {e}; retrying every {} s",
                        self.what,
                        BIND_RETRY_INTERVAL.as_secs()
                    );
                    is_logged = true;
                }
                Err(_) => {}
            }
            tokio::select! {
                () = tokio::time::sleep(BIND_RETRY_INTERVAL) => {}
                () = stopped(&mut stopping) => return None,
            }
        }
    }

    /// Serves a connection, unless the limit is reached.
    fn admit(&self, stream: impl AsyncRead + AsyncWrite + Send + 'static, peer: Peer) {
        match self.limit.clone().try_acquire_owned() {
            Ok(permit) => drop(tokio::spawn(self.clone().serve(stream, peer, permit))),
            Err(_) => drop(tokio::spawn(turn_away(stream))),
        }
    }

    /// Serves a connection after a TLS handshake, unless the limit is reached.
    fn shake_hands(&self, stream: TcpStream, peer: Peer, acceptor: &TlsAcceptor) {
        // Before the handshake, the client cannot receive an error response.
        let Ok(permit) = self.limit.clone().try_acquire_owned() else { return };
        let (accepted, server) = (acceptor.accept(stream), self.clone());
        tokio::spawn(async move {
            match tokio::time::timeout(HANDSHAKE_TIMEOUT, accepted).await {
                Ok(Ok(stream)) => server.serve(stream, peer, permit).await,
                Ok(Err(e)) => tracing::debug!("TLS handshake with {peer:?} failed: {e}"),
                Err(_) => {}
            }
        });
    }

    async fn serve(
        self,
        stream: impl AsyncRead + AsyncWrite + Send + 'static,
        peer: Peer,
        permit: OwnedSemaphorePermit,
    ) {
        let Self { router, mut stopping, .. } = self;
        let mut stream = TimeoutStream::new(stream);
        stream.set_write_timeout(Some(WRITE_TIMEOUT));
        let service = service_fn(move |mut request: hyper::Request<Incoming>| {
            request.extensions_mut().insert(peer);
            router.clone().call(request)
        });
        let mut builder = http1::Builder::new();
        builder
            .timer(TokioTimer::new())
            .header_read_timeout(HEAD_TIMEOUT)
            .max_buf_size(MAX_HEAD_BYTES);
        let serving = builder.serve_connection(TokioIo::new(Box::pin(stream)), service);
        let mut serving = std::pin::pin!(serving);
        // Errors of a connection concern only its client.
        tokio::select! {
            _ = serving.as_mut() => {}
            _ = tokio::time::timeout(CONNECTION_TIMEOUT, stopped(&mut stopping)) => {
                serving.as_mut().graceful_shutdown();
                drop(tokio::time::timeout(SHUTDOWN_TIMEOUT, serving).await);
            }
        }
        drop(permit);
    }
}

/// A certificate that is read again when its files change, so that a renewal needs no restart.
pub struct Certificate {
    files: Tls,
    stamp: Option<(Option<Stamp>, Option<Stamp>)>,
    acceptor: Option<TlsAcceptor>,
}

impl Certificate {
    /// Creates a certificate from its two files. They are read at the first connection.
    pub const fn new(files: Tls) -> Self {
        Self { files, stamp: None, acceptor: None }
    }

    /// Returns the current certificate. If the files are invalid, the previous one stays in use.
    fn current(&mut self) -> Option<TlsAcceptor> {
        let now = (stamp(&self.files.certificate), stamp(&self.files.key));
        if self.stamp != Some(now) {
            self.stamp = Some(now);
            match self.read() {
                Ok(acceptor) => self.acceptor = Some(acceptor),
                Err(e) => {
                    let effect = if self.acceptor.is_some() {
                        "the previous one stays in use"
                    } else {
                        "connections over the network are rejected"
                    };
                    tracing::error!("the API's certificate cannot be used: {e}; {effect}");
                }
            }
        }
        self.acceptor.clone()
    }

    /// Reads both files, and checks that they belong together.
    ///
    /// # Errors
    /// A message that says what is wrong with the files.
    pub fn read(&self) -> Result<TlsAcceptor, String> {
        let Tls { certificate, key } = &self.files;
        let chain = chain(certificate)?;
        let private =
            PrivateKeyDer::from_pem_slice(&content(key)?).map_err(|e| wrong_pem(key, &e))?;
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = rustls::ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions();
        let config =
            config.and_then(|config| config.with_no_client_auth().with_single_cert(chain, private));
        let mut config = config.map_err(|e| {
            let (certificate, key) = (certificate.display(), key.display());
            format!(
                "{certificate} and {key} do not belong together, or their type is not supported: \
                    {e}"
            )
        })?;
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        Ok(TlsAcceptor::from(Arc::new(config)))
    }
}

fn wrong_pem(file: &Path, e: &pem::Error) -> String {
    format!("{}: {e}", file.display())
}

fn chain(file: &Path) -> Result<Vec<CertificateDer<'static>>, String> {
    let content = content(file)?;
    let chain: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&content).collect();
    let chain = chain.map_err(|e| wrong_pem(file, &e))?;
    if chain.is_empty() {
        return Err(format!("{} contains no PEM certificate", file.display()));
    }
    Ok(chain)
}

fn content(file: &Path) -> Result<Vec<u8>, String> {
    read_bounded(file).map_err(|e| format!("{}: {e}", file.display()))
}

/// Returns the time at which the certificate in this PEM file, or an intermediate certificate in
/// it, expires. Root certificates are ignored, because clients use their own copy.
///
/// # Errors
/// If the file cannot be read, or its first certificate cannot be decoded.
pub fn expiry(file: &Path) -> Result<SystemTime, String> {
    let read = |der: &CertificateDer<'_>| {
        let certificate = x509_cert::Certificate::from_der(der)
            .map_err(|e| format!("{}: {e}", file.display()))?;
        let content = certificate.tbs_certificate();
        let is_authority = content.issuer() == content.subject();
        Ok((SystemTime::UNIX_EPOCH + content.validity().not_after.to_unix_duration(), is_authority))
    };
    let chain = chain(file)?;
    let (first, others) =
        chain.split_first().ok_or_else(|| format!("{} contains no certificate", file.display()))?;
    let own = read(first).map_err(|e: String| e)?.0;
    let others =
        others.iter().filter_map(|der| read(der).ok()).filter(|(_, is_authority)| !is_authority);
    Ok(others.map(|(end, _)| end).fold(own, SystemTime::min))
}

/// Waits until the server must stop.
async fn stopped(stopping: &mut watch::Receiver<bool>) {
    drop(stopping.wait_for(|stop| *stop).await);
}

/// Responds to a connection above the limit with status 503, and closes it.
async fn turn_away(stream: impl AsyncRead + AsyncWrite + Send) {
    let body =
        r#"{"serviceUnavailable":{"code":503,"message":"Too many connections: try again."}}"#;
    let text = format!(
        "HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nRetry-After: \
            5\r\nConnection: close\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    );
    let mut stream = std::pin::pin!(stream);
    let response = async {
        stream.write_all(text.as_bytes()).await?;
        stream.shutdown().await
    };
    drop(tokio::time::timeout(REFUSAL_TIMEOUT, response).await);
}

/// Removes the socket that an earlier process has left, and binds a new one.
///
/// # Errors
/// If another program listens at the path, or the path cannot be used.
fn bind_local(path: &Path, mode: u32) -> io::Result<UnixListener> {
    let _owner = User::of_folder_of(path)?.enter()?;
    if std::fs::symlink_metadata(path).is_ok_and(|found| found.file_type().is_socket()) {
        if std::os::unix::net::UnixStream::connect(path).is_ok() {
            return Err(io::Error::other("another program listens there"));
        }
        std::fs::remove_file(path)?;
    }
    let listener = UnixListener::bind(path)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode))?;
    Ok(listener)
}
