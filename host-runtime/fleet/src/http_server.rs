//! Serving HTTP: sockets, and what a connection may cost: how many, how long, how large. Whatever
//! comes, the others are served.

use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::{FileTypeExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime};

use axum::Router;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream, UnixListener};
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

/// Connections over the network at once; the unix socket has as many of its own.
pub const CONNECTIONS: usize = 256;
/// How long the head of a request may take to arrive, and a connection may idle.
const HEAD_TIME: Duration = Duration::from_secs(30);
/// The largest head, in bytes.
const HEAD: usize = 16 << 10;
/// How long TLS may take to begin.
const HANDSHAKE_TIME: Duration = Duration::from_secs(10);
/// How long a reader may take nothing.
const WRITE_TIME: Duration = Duration::from_secs(30);
/// After so long a connection is to end with the answer that it is at: whoever reads a byte now and
/// then keeps its place no longer.
const CONNECTION_TIME: Duration = Duration::from_secs(600);
/// Access bits of the socket of the API or the scheduler: its user and its group.
pub const SOCKET_MODE: u32 = 0o660;
/// How long requests that were begun may take once the end has come.
pub const END_TIME: Duration = Duration::from_secs(15);
/// Until a socket that could not be had is tried again.
const RETRY: Duration = Duration::from_secs(10);

/// From where a connection comes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Peer {
    /// Over the network.
    Remote(std::net::IpAddr),
    /// Over the unix socket, which only those can open who may enter its folder and write to it.
    Local {
        /// User ID of the peer process.
        uid: u32,
    },
}

/// What is served at a socket. Requests find a [`Peer`] among their extensions.
#[derive(Clone)]
pub struct Server {
    /// For messages: `the API`.
    pub what: &'static str,
    /// Routes.
    pub router: Router,
    /// A place for each connection.
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
        self.served.store(true, Ordering::Relaxed);
        let scheme = if tls.is_some() { "https" } else { "http" };
        tracing::info!("{} is served at {scheme}://{at}/", self.what);
        let mut stopping = self.stopping.clone();
        loop {
            let accepted = tokio::select! {
                accepted = listener.accept() => accepted,
                () = end(&mut stopping) => return,
            };
            match accepted {
                Ok((stream, from)) => {
                    // Answers are small and whole: nothing is gained by waiting for more.
                    drop(stream.set_nodelay(true));
                    let peer = Peer::Remote(from.ip());
                    match tls.as_mut().map(Certificate::now) {
                        None => self.take(stream, peer),
                        Some(Some(acceptor)) => self.shake_hands(stream, peer, &acceptor),
                        // It is said why, and tried again with the next.
                        Some(None) => {}
                    }
                }
                Err(e) => pause(self.what, &e).await,
            }
        }
    }

    /// Serves the unix socket at `path`, with the access bits `mode`.
    pub async fn local(self, path: PathBuf, mode: u32) {
        let place = path.clone();
        let bind = || async { bind_local(&place, mode) };
        let Some(listener) = self.listen(&path.display().to_string(), bind).await else { return };
        self.served.store(true, Ordering::Relaxed);
        let mut stopping = self.stopping.clone();
        loop {
            let accepted = tokio::select! {
                accepted = listener.accept() => accepted,
                () = end(&mut stopping) => return,
            };
            match accepted {
                Ok((stream, _)) => match stream.peer_cred() {
                    Ok(peer) => self.take(stream, Peer::Local { uid: peer.uid() }),
                    Err(e) => tracing::warn!("somebody at {} cannot be named: {e}", path.display()),
                },
                Err(e) => pause(self.what, &e).await,
            }
        }
    }

    /// The socket, as soon as it can be had; none where the end comes first.
    async fn listen<L, F: Future<Output = io::Result<L>>>(
        &self,
        place: &str,
        bind: impl Fn() -> F,
    ) -> Option<L> {
        let mut stopping = self.stopping.clone();
        let mut told = false;
        loop {
            match bind().await {
                Ok(listener) => return Some(listener),
                Err(e) if !told => {
                    tracing::error!(
                        "{} cannot be served at {place}: {e}; it is tried again every {} s",
                        self.what,
                        RETRY.as_secs()
                    );
                    told = true;
                }
                Err(_) => {}
            }
            tokio::select! {
                () = tokio::time::sleep(RETRY) => {}
                () = end(&mut stopping) => return None,
            }
        }
    }

    /// Serves a connection, if there are not too many already.
    fn take(&self, stream: impl AsyncRead + AsyncWrite + Send + 'static, peer: Peer) {
        match self.limit.clone().try_acquire_owned() {
            Ok(place) => drop(tokio::spawn(self.clone().serve(stream, peer, place))),
            Err(_) => drop(tokio::spawn(turn_away(stream))),
        }
    }

    /// The same, once it is encrypted.
    fn shake_hands(&self, stream: TcpStream, peer: Peer, acceptor: &TlsAcceptor) {
        // There is nobody yet to whom to say that there are too many.
        let Ok(place) = self.limit.clone().try_acquire_owned() else { return };
        let (accepted, server) = (acceptor.accept(stream), self.clone());
        tokio::spawn(async move {
            match tokio::time::timeout(HANDSHAKE_TIME, accepted).await {
                Ok(Ok(stream)) => server.serve(stream, peer, place).await,
                Ok(Err(e)) => tracing::debug!("no TLS with {peer:?}: {e}"),
                Err(_) => {}
            }
        });
    }

    async fn serve(
        self,
        stream: impl AsyncRead + AsyncWrite + Send + 'static,
        peer: Peer,
        place: OwnedSemaphorePermit,
    ) {
        let Self { router, mut stopping, .. } = self;
        let mut stream = TimeoutStream::new(stream);
        stream.set_write_timeout(Some(WRITE_TIME));
        let service = service_fn(move |mut request: hyper::Request<Incoming>| {
            request.extensions_mut().insert(peer);
            router.clone().call(request)
        });
        let mut builder = http1::Builder::new();
        builder.timer(TokioTimer::new()).header_read_timeout(HEAD_TIME).max_buf_size(HEAD);
        let serving = builder.serve_connection(TokioIo::new(Box::pin(stream)), service);
        let mut serving = std::pin::pin!(serving);
        // How a connection ends is its client's matter.
        tokio::select! {
            _ = serving.as_mut() => {}
            _ = tokio::time::timeout(CONNECTION_TIME, end(&mut stopping)) => {
                serving.as_mut().graceful_shutdown();
                drop(tokio::time::timeout(END_TIME, serving).await);
            }
        }
        drop(place);
    }
}

/// A certificate, read again when its files have changed: one that is renewed needs no restart.
pub struct Certificate {
    files: Tls,
    stamp: Option<(Option<Stamp>, Option<Stamp>)>,
    acceptor: Option<TlsAcceptor>,
}

impl Certificate {
    /// Creates a certificate from its two files; reads them at the first connection.
    pub const fn new(files: Tls) -> Self {
        Self { files, stamp: None, acceptor: None }
    }

    /// As it is now; the one before, where what is there now is wrong.
    fn now(&mut self) -> Option<TlsAcceptor> {
        let now = (stamp(&self.files.certificate), stamp(&self.files.key));
        if self.stamp != Some(now) {
            self.stamp = Some(now);
            match self.read() {
                Ok(acceptor) => self.acceptor = Some(acceptor),
                Err(e) => {
                    let then = if self.acceptor.is_some() {
                        "the one before counts on"
                    } else {
                        "nobody is let in over the network"
                    };
                    tracing::error!("the API's certificate cannot be used: {e}; {then}");
                }
            }
        }
        self.acceptor.clone()
    }

    /// Reads both files, and whether they belong together.
    ///
    /// # Errors
    /// What is wrong with them.
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
                "{certificate} and {key} do not belong together, or are of a kind that is not \
                    supported: {e}"
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
        return Err(format!("{} holds no PEM certificate", file.display()));
    }
    Ok(chain)
}

fn content(file: &Path) -> Result<Vec<u8>, String> {
    read_bounded(file).map_err(|e| format!("{}: {e}", file.display()))
}

/// When the certificate in this PEM file, or one that leads to its authority, expires. An
/// authority's own certificate does not count: clients have theirs.
///
/// # Errors
/// When the file cannot be read, or its first certificate cannot be decoded.
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
        chain.split_first().ok_or_else(|| format!("{} holds no certificate", file.display()))?;
    let own = read(first).map_err(|e: String| e)?.0;
    let others =
        others.iter().filter_map(|der| read(der).ok()).filter(|(_, is_authority)| !is_authority);
    Ok(others.map(|(end, _)| end).fold(own, SystemTime::min))
}

/// Until it is to end.
async fn end(stopping: &mut watch::Receiver<bool>) {
    drop(stopping.wait_for(|stop| *stop).await);
}

/// Too many open files, for instance: those that there are will end.
async fn pause(what: &str, e: &io::Error) {
    tracing::warn!("{what} cannot take a connection: {e}");
    tokio::time::sleep(Duration::from_millis(100)).await;
}

async fn turn_away(stream: impl AsyncRead + AsyncWrite + Send) {
    let body =
        r#"{"serviceUnavailable":{"code":503,"message":"Too many connections: try again."}}"#;
    let text = format!(
        "HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nRetry-After: \
            5\r\nConnection: close\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    );
    let mut stream = std::pin::pin!(stream);
    let told = async {
        stream.write_all(text.as_bytes()).await?;
        stream.shutdown().await
    };
    drop(tokio::time::timeout(Duration::from_secs(1), told).await);
}

/// In `state_dir`, which only root and the agent's group may enter.
/// Removes the socket that an earlier process has left, and binds a new one.
///
/// # Errors
/// When another program listens at the path, or the path cannot be used.
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
