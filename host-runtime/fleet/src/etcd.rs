//! The etcd client. It uses one endpoint at a time, moves to the next one when an endpoint fails,
//! and turns etcd's errors into messages that help an operator.

use std::path::PathBuf;
use std::time::Duration;

use etcd_client::{
    Certificate, Client, ConnectOptions, GetOptions, Identity, KeyValue, KvClient, TlsOptions,
    WatchClient,
};
use virt_usb_config::Fleet;

use crate::keys::Keys;

/// Timeout for a response.
const RESPONSE_TIMEOUT: Duration = Duration::from_secs(5);
/// Timeout for making a connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
/// Interval of keepalive pings on a connection with open requests. etcd closes a connection that
/// sends pings more often than every five seconds (`--grpc-keepalive-min-time`), or that sends them
/// without an open request.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);
/// Timeout for the response to a keepalive ping.
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(5);
/// Maximum number of keys in a page of a list.
const PAGE_KEYS: i64 = 128;
/// Maximum size of a message in bytes: a page, or a burst of events, of the largest documents.
const MAX_MESSAGE_BYTES: usize = 256 << 20;
/// Shortest and longest wait of a [`Backoff`].
const BACKOFF: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(10));

/// Error of a request to etcd.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Error {
    /// A file of the configuration cannot be used.
    #[error("{path}: {why}")]
    File {
        /// Path of the file.
        path: PathBuf,
        /// Reason why the file cannot be used.
        why: String,
    },
    /// No endpoint responds, or none has a leader.
    #[error("no etcd endpoint responds: {0}")]
    Unreachable(String),
    /// The user or the password is wrong, or etcd requires a user.
    #[error("etcd rejects the credentials: {0}: check fleet.user and fleet.password_file")]
    Unknown(String),
    /// The user's roles do not allow the request.
    #[error(
        "etcd does not allow {user} to {what}: /usr/share/virt-usb/etcd-roles (install/ in the \
            source) creates the roles"
    )]
    Denied {
        /// User that made the request.
        user: String,
        /// Purpose of the request, as in "read the fleet".
        what: &'static str,
    },
    /// The space quota is used up; etcd accepts reads only.
    #[error(
        "etcd has reached its space quota and accepts no writes: raise --quota-backend-bytes or \
            compact and defragment it, then run 'etcdctl alarm disarm'"
    )]
    Full,
    /// The requested revision is older than the oldest one that etcd keeps.
    #[error("etcd has compacted that revision")]
    Compacted,
    /// Any other error.
    #[error("etcd: {0}")]
    Other(String),
}

/// A client of the fleet's etcd endpoints.
#[derive(Debug, Clone)]
pub struct Etcd {
    fleet: Fleet,
    /// Index of the endpoint to try first.
    at: usize,
}

impl Etcd {
    /// Creates a client of the fleet. It connects at the first request.
    pub const fn new(fleet: Fleet) -> Self {
        Self { fleet, at: 0 }
    }

    /// Keys below the prefix of the fleet.
    pub fn keys(&self) -> Keys {
        Keys::new(self.fleet.prefix.clone())
    }

    /// Name of the user, for messages.
    pub fn user(&self) -> String {
        self.fleet
            .user
            .as_ref()
            .map_or_else(|| "anonymous clients".to_owned(), |user| format!("user {:?}", user.name))
    }

    /// URLs of the endpoints, in the order of the configuration.
    pub fn endpoints(&self) -> &[String] {
        &self.fleet.endpoints
    }

    /// Connects to the first endpoint that responds and has a leader. Begins with the endpoint that
    /// responded last.
    pub async fn connect(&mut self) -> Result<Connection, Error> {
        let mut failures = Vec::new();
        for _ in 0..self.fleet.endpoints.len() {
            match self.connect_to(self.at).await {
                Ok(connection) => return Ok(connection),
                Err(Error::Unreachable(why)) => failures.push(why),
                Err(e) => return Err(e),
            }
            self.next_endpoint();
        }
        Err(Error::Unreachable(failures.join("; ")))
    }

    /// Moves to the next endpoint, which later requests try first.
    pub fn next_endpoint(&mut self) {
        self.at = (self.at + 1) % self.fleet.endpoints.len().max(1);
    }

    /// Connects to the endpoint with index `at`.
    pub async fn connect_to(&self, at: usize) -> Result<Connection, Error> {
        let endpoint = self.fleet.endpoints.get(at).cloned().unwrap_or_default();
        let at_endpoint = |e: Error| match e {
            Error::Unreachable(why) => Error::Unreachable(format!("{endpoint}: {why}")),
            other => other,
        };
        let connect = async {
            let client = Client::connect([&endpoint], Some(self.options()?)).await;
            let mut client = client.map_err(|e| self.explain(&e, "read the fleet's keys"))?;
            // Creating a client sends nothing. This request needs a leader.
            let options = GetOptions::new().with_keys_only();
            let answer = client.get(self.keys().next_number(), Some(options)).await;
            let answer = answer.map_err(|e| self.explain(&e, "read the fleet's keys"))?;
            let (cluster, revision) =
                answer.header().map_or((0, 0), |header| (header.cluster_id(), header.revision()));
            let kv = client.kv_client().max_decoding_message_size(MAX_MESSAGE_BYTES);
            let watch = client.watch_client().max_decoding_message_size(MAX_MESSAGE_BYTES);
            Ok(Connection { client, kv, watch, cluster, revision, endpoint: endpoint.clone() })
        };
        match tokio::time::timeout(CONNECT_TIMEOUT + RESPONSE_TIMEOUT, connect).await {
            Ok(connected) => connected.map_err(at_endpoint),
            Err(_) => Err(at_endpoint(timed_out())),
        }
    }

    fn options(&self) -> Result<ConnectOptions, Error> {
        let read = |path: &PathBuf| {
            std::fs::read(path).map_err(|e| Error::File { path: path.clone(), why: e.to_string() })
        };
        let mut options = ConnectOptions::new()
            .with_connect_timeout(CONNECT_TIMEOUT)
            .with_keep_alive(KEEPALIVE_INTERVAL, KEEPALIVE_TIMEOUT)
            .with_keep_alive_while_idle(false)
            .with_require_leader(true)
            .with_auto_token_refresh(true);
        if self.fleet.endpoints.iter().any(|endpoint| endpoint.starts_with("https://")) {
            let mut tls = match &self.fleet.ca {
                Some(ca) => TlsOptions::new().ca_certificate(Certificate::from_pem(read(ca)?)),
                None => TlsOptions::new().with_native_roots(),
            };
            if let Some(identity) = &self.fleet.identity {
                tls = tls.identity(Identity::from_pem(
                    read(&identity.certificate)?,
                    read(&identity.key)?,
                ));
            }
            options = options.with_tls(tls);
        }
        if let Some(user) = &self.fleet.user {
            let text = read(&user.password_file)?;
            let text = String::from_utf8_lossy(&text);
            let password = text.lines().next().unwrap_or_default();
            if password.is_empty() {
                return Err(Error::File {
                    path: user.password_file.clone(),
                    why: "the first line must be etcd's password, but it is empty".into(),
                });
            }
            options = options.with_user(&user.name, password);
        }
        Ok(options)
    }

    /// Lists all keys below the prefix at one revision, in the order of the keys. Returns that
    /// revision.
    pub async fn list(
        &self,
        connection: &mut Connection,
        prefix: &str,
        mut each: impl FnMut(&KeyValue),
    ) -> Result<i64, Error> {
        let mut from = prefix.as_bytes().to_vec();
        let mut at = 0;
        loop {
            let options =
                GetOptions::new().with_range(after(prefix)).with_limit(PAGE_KEYS).with_revision(at);
            let answer =
                self.within("read the fleet", connection.kv.get(from, Some(options))).await?;
            if at == 0 {
                at = answer.header().map_or(0, etcd_client::ResponseHeader::revision);
            }
            answer.kvs().iter().for_each(&mut each);
            match answer.kvs().last() {
                Some(last) if answer.more() => {
                    from = last.key().to_vec();
                    from.push(0);
                }
                _ => return Ok(at),
            }
        }
    }

    /// Converts an error of the etcd client. `what` is the purpose of the request, as in "read the
    /// fleet".
    pub fn explain(&self, e: &etcd_client::Error, what: &'static str) -> Error {
        use etcd_client::Error as E;
        let E::GRpcStatus(status) = e else {
            return match e {
                E::TransportError(e) => Error::Unreachable(chain(e)),
                E::IoError(e) => Error::Unreachable(e.to_string()),
                other => Error::Other(other.to_string()),
            };
        };
        let text = status.message();
        // The status codes alone do not distinguish these errors:
        // https://github.com/etcd-io/etcd/blob/release-3.4/etcdserver/api/v3rpc/rpctypes/error.go
        match text.strip_prefix("etcdserver: ").unwrap_or(text) {
            "permission denied" => Error::Denied { user: self.user(), what },
            "mvcc: database space exceeded" => Error::Full,
            "mvcc: required revision has been compacted" => Error::Compacted,
            why @ ("user name is empty"
            | "authentication failed, invalid user ID or password"
            | "invalid auth token"
            | "authentication is not enabled") => Error::Unknown(why.to_owned()),
            why if matches!(
                i32::from(status.code()),
                UNKNOWN | CANCELLED | DEADLINE_EXCEEDED | UNAVAILABLE
            ) =>
            {
                let cause = std::error::Error::source(status).map(|e| format!(": {}", chain(e)));
                Error::Unreachable(why.to_owned() + &cause.unwrap_or_default())
            }
            why => Error::Other(why.to_owned()),
        }
    }

    /// Waits for a response with a timeout, and converts errors like [`Etcd::explain`].
    pub async fn within<T>(
        &self,
        what: &'static str,
        answer: impl Future<Output = Result<T, etcd_client::Error>>,
    ) -> Result<T, Error> {
        match tokio::time::timeout(RESPONSE_TIMEOUT, answer).await {
            Ok(answer) => answer.map_err(|e| self.explain(&e, what)),
            Err(_) => Err(timed_out()),
        }
    }
}

fn timed_out() -> Error {
    Error::Unreachable("no response in time".into())
}

// https://grpc.io/docs/guides/status-codes/
const CANCELLED: i32 = 1;
const UNKNOWN: i32 = 2;
const DEADLINE_EXCEEDED: i32 = 4;
const UNAVAILABLE: i32 = 14;

/// Connection to an endpoint that has responded.
pub struct Connection {
    /// Client for requests.
    pub client: Client,
    /// Client for large responses.
    kv: KvClient,
    /// Client for watches, which need a connection without a deadline.
    pub watch: WatchClient,
    /// Identifier of the etcd cluster.
    pub cluster: u64,
    /// Revision of the cluster when the connection was made.
    pub revision: i64,
    /// URL of the endpoint in use.
    pub endpoint: String,
}

/// Returns the first key after all keys that begin with the prefix.
pub fn after(prefix: &str) -> Vec<u8> {
    let mut end = prefix.as_bytes().to_vec();
    while let Some(last) = end.pop() {
        if last < u8::MAX {
            end.push(last + 1);
            return end;
        }
    }
    vec![0]
}

/// Returns the key without the prefix. `None` if the key does not begin with it, or is not UTF-8.
pub fn name(prefix: &str, key: &[u8]) -> Option<String> {
    String::from_utf8(key.strip_prefix(prefix.as_bytes())?.to_vec()).ok()
}

/// Message of an error with those of all its causes.
fn chain(e: &(dyn std::error::Error + 'static)) -> String {
    let mut text = e.to_string();
    let mut cause = e.source();
    while let Some(e) = cause {
        let more = e.to_string();
        if !text.contains(&more) {
            text = format!("{text}: {more}");
        }
        cause = e.source();
    }
    text
}

/// Exponential backoff with jitter.
#[derive(Debug, Default)]
pub struct Backoff(Option<Duration>);

impl Backoff {
    /// Returns the time to wait before the next attempt, which doubles each time.
    pub fn next_wait(&mut self) -> Duration {
        let next = self.0.map_or(BACKOFF.0, |last| (last * 2).min(BACKOFF.1));
        self.0 = Some(next);
        // The jitter keeps hosts that lost one etcd together from reconnecting together.
        let mut random = [0; 1];
        let _ = getrandom::fill(&mut random);
        next.mul_f64(0.75 + f64::from(random[0]) / 512.0)
    }

    /// Starts again with the shortest wait, after a success.
    pub const fn reset(&mut self) {
        self.0 = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prefix_ends_where_the_next_begins() {
        assert_eq!(after("/virt-usb/hosts/"), b"/virt-usb/hosts0");
        assert!(b"/virt-usb/hosts/\xff".as_slice() < after("/virt-usb/hosts/").as_slice());
        assert_eq!(name("/a/", b"/a/b/c").as_deref(), Some("b/c"));
        assert_eq!(name("/a/", b"/b/c"), None);
    }
}
