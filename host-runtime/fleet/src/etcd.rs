//! Talking to etcd: one endpoint at a time, the next one when it fails; and what etcd says, in
//! words that help.

use std::path::PathBuf;
use std::time::Duration;

use etcd_client::{
    Certificate, Client, ConnectOptions, GetOptions, Identity, KeyValue, KvClient, TlsOptions,
    WatchClient,
};
use virt_usb_config::Fleet;

use crate::keys::Keys;

/// How long an answer may take.
pub const ANSWER: Duration = Duration::from_secs(5);
/// How long making a connection may take.
const CONNECTING: Duration = Duration::from_secs(3);
/// How often a connection is tried while nothing comes, and how long it may be silent then. etcd
/// closes one that is tried more often than every five seconds (`--grpc-keepalive-min-time`), or
/// while nothing is asked on it.
const ALIVE: (Duration, Duration) = (Duration::from_secs(10), Duration::from_secs(5));
/// So many keys a page …
const PAGE: i64 = 128;
/// … and so many bytes a message: a page of the largest documents, or a burst of them.
const MESSAGE: usize = 256 << 20;
/// Pauses between attempts, at first and at most.
const PAUSE: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(10));

/// What keeps this host from the fleet.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Error {
    /// A file of the configuration cannot be used.
    #[error("{path}: {why}")]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        why: String,
    },
    /// No endpoint answers, or none has a leader.
    #[error("no etcd answers: {0}")]
    Unreachable(String),
    /// The password is wrong, or there is no such user, or one is needed.
    #[error("etcd does not know who this is: {0}: look at fleet.user and fleet.password_file")]
    Unknown(String),
    /// The user's roles do not allow it.
    #[error(
        "etcd does not allow it to {user}: {what}: /usr/share/virt-usb/etcd-roles (install/ in the \
            source) makes roles"
    )]
    Denied {
        /// As whom this was asked.
        user: String,
        /// What was asked.
        what: &'static str,
    },
    /// Its quota is used up: it only answers questions.
    #[error(
        "etcd takes nothing more, its space is used up: raise --quota-backend-bytes or compact and \
            defragment it, then 'etcdctl alarm disarm'"
    )]
    Full,
    /// What was asked for is older than what etcd remembers.
    #[error("etcd has forgotten that revision")]
    Compacted,
    /// Anything else.
    #[error("etcd: {0}")]
    Other(String),
}

/// The endpoints, and which is asked.
#[derive(Debug, Clone)]
pub struct Etcd {
    fleet: Fleet,
    /// Index of the endpoint that is asked first.
    at: usize,
}

impl Etcd {
    /// Creates a client of the fleet; connects at the first request.
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
            .map_or_else(|| "nobody".to_owned(), |user| format!("user {:?}", user.name))
    }

    /// URLs of the endpoints, in the order of the configuration.
    pub fn endpoints(&self) -> &[String] {
        &self.fleet.endpoints
    }

    /// A client of the first endpoint that answers, with a leader behind it; begins with the one
    /// that answered last.
    pub async fn connect(&mut self) -> Result<Connection, Error> {
        let mut failures = Vec::new();
        for _ in 0..self.fleet.endpoints.len() {
            match self.connect_to(self.at).await {
                Ok(connection) => return Ok(connection),
                Err(Error::Unreachable(why)) => failures.push(why),
                Err(e) => return Err(e),
            }
            self.pass_on();
        }
        Err(Error::Unreachable(failures.join("; ")))
    }

    /// The next endpoint is asked first from now on.
    pub fn pass_on(&mut self) {
        self.at = (self.at + 1) % self.fleet.endpoints.len().max(1);
    }

    /// A client of that endpoint.
    pub async fn connect_to(&self, at: usize) -> Result<Connection, Error> {
        let endpoint = self.fleet.endpoints.get(at).cloned().unwrap_or_default();
        let at_endpoint = |e: Error| match e {
            Error::Unreachable(why) => Error::Unreachable(format!("{endpoint}: {why}")),
            other => other,
        };
        let connect = async {
            let client = Client::connect([&endpoint], Some(self.options()?)).await;
            let mut client = client.map_err(|e| self.explain(&e, "read the fleet's keys"))?;
            // A client is made without a word to etcd: ask it something that needs a leader.
            let options = GetOptions::new().with_keys_only();
            let answer = client.get(self.keys().next_number(), Some(options)).await;
            let answer = answer.map_err(|e| self.explain(&e, "read the fleet's keys"))?;
            let (cluster, revision) =
                answer.header().map_or((0, 0), |header| (header.cluster_id(), header.revision()));
            let kv = client.kv_client().max_decoding_message_size(MESSAGE);
            let watch = client.watch_client().max_decoding_message_size(MESSAGE);
            Ok(Connection { client, kv, watch, cluster, revision, endpoint: endpoint.clone() })
        };
        match tokio::time::timeout(CONNECTING + ANSWER, connect).await {
            Ok(connected) => connected.map_err(at_endpoint),
            Err(_) => Err(at_endpoint(Error::Unreachable("it does not answer in time".into()))),
        }
    }

    fn options(&self) -> Result<ConnectOptions, Error> {
        let read = |path: &PathBuf| {
            std::fs::read(path).map_err(|e| Error::File { path: path.clone(), why: e.to_string() })
        };
        let mut options = ConnectOptions::new()
            .with_connect_timeout(CONNECTING)
            .with_keep_alive(ALIVE.0, ALIVE.1)
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
                    why: "its first line is to be etcd's password, and is empty".into(),
                });
            }
            options = options.with_user(&user.name, password);
        }
        Ok(options)
    }

    /// All that stands below the prefix at one revision, in the order of the keys; returns that
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
                GetOptions::new().with_range(after(prefix)).with_limit(PAGE).with_revision(at);
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

    /// What etcd's answer means to whoever wanted to do `what`.
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
        // Codes are not enough:
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

    /// The same for what has not come in time, either.
    pub async fn within<T>(
        &self,
        what: &'static str,
        answer: impl Future<Output = Result<T, etcd_client::Error>>,
    ) -> Result<T, Error> {
        match tokio::time::timeout(ANSWER, answer).await {
            Ok(answer) => answer.map_err(|e| self.explain(&e, what)),
            Err(_) => Err(Error::Unreachable("it does not answer in time".into())),
        }
    }
}

// https://grpc.io/docs/guides/status-codes/
const CANCELLED: i32 = 1;
const UNKNOWN: i32 = 2;
const DEADLINE_EXCEEDED: i32 = 4;
const UNAVAILABLE: i32 = 14;

/// An endpoint that has answered.
pub struct Connection {
    /// Client for requests.
    pub client: Client,
    /// For large answers.
    kv: KvClient,
    /// Client for watches, which need a connection without a deadline.
    pub watch: WatchClient,
    /// Which etcd it is …
    pub cluster: u64,
    /// … and how far it was then.
    pub revision: i64,
    /// URL of the endpoint in use.
    pub endpoint: String,
}

/// The first key after all that begin with the prefix.
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

/// The key without the prefix; none: it is not one of those, or no text.
pub fn name(prefix: &str, key: &[u8]) -> Option<String> {
    String::from_utf8(key.strip_prefix(prefix.as_bytes())?.to_vec()).ok()
}

/// The whole chain of causes.
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

/// Longer with each attempt that fails.
#[derive(Debug, Default)]
pub struct Pause(Option<Duration>);

impl Pause {
    /// Returns the time to wait before the next attempt, which doubles each time.
    pub fn next_wait(&mut self) -> Duration {
        let next = self.0.map_or(PAUSE.0, |last| (last * 2).min(PAUSE.1));
        self.0 = Some(next);
        // Hosts that lost one etcd together do not come back together.
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
