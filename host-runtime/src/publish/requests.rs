//! Requests from the API of one host to the agent of another, through etcd. A request is executed
//! at most once, and answered once.
//!
//! ```text
//!  API of A                      etcd                          agent of B
//!  puts, if B is published ───► requests/B/ID (lease) ───────► reads
//!                               answers/B/ID "begun" ◄──────── puts, if there is no answer yet
//!  waits ◄───────────────────── answers/B/ID "done", body ◄─── executes, reads the state, puts
//! ```
//! If an agent finds a request that it has begun and not answered, it was interrupted: it reports
//! the current state, and does not execute the request again.

use std::collections::HashSet;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use etcd_client::{
    Compare, CompareOp, EventType, GetOptions, PutOptions, Txn, TxnOp, WatchOptions,
};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio::sync::mpsc;
use tokio::time::Instant;
use virt_usb_config::Fleet;

use virt_usb_fleet::Error;
use virt_usb_fleet::etcd::{Connection, Etcd};
use virt_usb_fleet::reader::{Reader, Sink};

/// Lifetime of a request, in seconds.
const REQUEST_TTL_SECONDS: i64 = 60;
/// Lifetime of an answer, in seconds. Longer than a request, so that the caller can read it.
const ANSWER_TTL_SECONDS: i64 = 600;
/// Timeout for writing an answer, retries included.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(120);
/// Wait between attempts to write an answer.
const ANSWER_RETRY_INTERVAL: Duration = Duration::from_secs(1);
/// Wait before the caller reconnects to etcd.
const RECONNECT_INTERVAL: Duration = Duration::from_millis(200);

/// A request to the agent of another host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Request {
    /// The call, `attach` or `detach`.
    pub(crate) call: String,
    /// UUID of the server.
    pub(crate) server: String,
    /// Requested devices in the API's format.
    pub(crate) usb_devices_requests: Value,
    /// Name of the caller, for the audit trail.
    pub(crate) caller: String,
    pub(crate) project_id: Option<String>,
    pub(crate) role: String,
    /// Host that received the call.
    pub(crate) from: String,
}

/// Result of a request, as a response of the API.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) body: Value,
}

/// Value of an answer's key.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum State {
    Begun,
    Done(Answer),
}

/// Reason why a request has no answer. The API has the message for each.
#[derive(Debug, Clone)]
pub(crate) enum Unanswered {
    /// The host is not published now. Nothing was done.
    Unreachable,
    /// The host did not begin in time. The request was cancelled, and nothing was done.
    Late,
    /// The host may have begun, and did not report the result in time.
    Unknown,
    /// etcd cannot be used. Nothing was done.
    Etcd(Error),
}

impl From<Error> for Unanswered {
    fn from(e: Error) -> Self {
        Self::Etcd(e)
    }
}

/// Sends a request to the agent of `host`, and waits for the answer.
///
/// # Errors
/// If there is no answer in time. The variant tells whether the request may have been executed.
pub(crate) async fn ask(
    fleet: &Fleet,
    host: &str,
    request: &Request,
) -> Result<Answer, Unanswered> {
    let mut etcd = Etcd::new(fleet.clone());
    let mut connection = etcd.connect().await?;
    let keys = etcd.keys();
    let mut random = [0; 16];
    getrandom::fill(&mut random).map_err(|e| Error::Other(e.to_string()))?;
    let id: String = random.iter().map(|byte| format!("{byte:02x}")).collect();
    let (key, answer) = (format!("{}{id}", keys.requests(host)), keys.answer(host, &id));
    let granting = connection.client.lease_grant(REQUEST_TTL_SECONDS, None);
    let lease = etcd.within("send a request to another host", granting).await?.id();
    let text = serde_json::to_string(request).unwrap_or_default();
    let is_published = Compare::version(keys.host(host), CompareOp::Greater, 0);
    let put = TxnOp::put(key.clone(), text, Some(PutOptions::new().with_lease(lease)));
    let txn = connection.client.txn(Txn::new().when([is_published]).and_then([put]));
    let put = etcd.within("send a request to another host", txn).await?;
    if !put.succeeded() {
        return Err(Unanswered::Unreachable);
    }
    let mut revision = put.header().map_or(0, etcd_client::ResponseHeader::revision);
    let until = Instant::now() + Duration::from_secs(REQUEST_TTL_SECONDS.unsigned_abs());
    loop {
        let waiting = wait_for(&etcd, &mut connection, &answer, &mut revision);
        match tokio::time::timeout_at(until, waiting).await {
            Ok(Ok(done)) => {
                // If this fails, the lease expires later and removes the request.
                let revoking = connection.client.lease_revoke(lease);
                drop(etcd.within("remove a request to another host", revoking).await);
                return Ok(done);
            }
            Ok(Err(_)) if Instant::now() < until => {
                tokio::time::sleep(RECONNECT_INTERVAL).await;
                etcd.next_endpoint();
                if let Ok(again) = etcd.connect().await {
                    connection = again;
                }
            }
            _ => return Err(give_up(&mut etcd, &key, &answer).await),
        }
    }
}

/// Waits for an answer.
async fn wait_for(
    etcd: &Etcd,
    connection: &mut Connection,
    key: &str,
    revision: &mut i64,
) -> Result<Answer, Error> {
    let read = |bytes: &[u8]| match serde_json::from_slice(bytes) {
        Ok(State::Done(answer)) => Some(answer),
        _ => None,
    };
    // The answer may have arrived before the watch.
    let known = etcd.within("read an answer", connection.client.get(key, None)).await?;
    if let Some(done) = known.kvs().first().and_then(|kv| read(kv.value())) {
        return Ok(done);
    }
    *revision = known.header().map_or(*revision, etcd_client::ResponseHeader::revision);
    let options = WatchOptions::new().with_start_revision(*revision + 1);
    let watch = connection.client.watch(key, Some(options));
    let mut stream = etcd.within("read an answer", watch).await?;
    loop {
        let message = stream.message().await.map_err(|e| etcd.explain(&e, "read an answer"))?;
        let Some(message) = message.filter(|message| !message.canceled()) else {
            return Err(Error::Unreachable("the watch has ended".into()));
        };
        for event in message.events().iter().filter(|event| event.event_type() == EventType::Put) {
            if let Some(done) = event.kv().and_then(|kv| read(kv.value())) {
                return Ok(done);
            }
        }
    }
}

/// Cancels the request, unless the host has begun it.
async fn give_up(etcd: &mut Etcd, key: &str, answer: &str) -> Unanswered {
    let mut connection = match etcd.connect().await {
        Ok(connection) => connection,
        // The lease cancels the request. Whether the host had begun it before is unknown.
        Err(_) => return Unanswered::Unknown,
    };
    let txn = Txn::new()
        .when([Compare::version(answer, CompareOp::Equal, 0)])
        .and_then([TxnOp::delete(key, None)])
        .or_else([TxnOp::get(answer, Some(GetOptions::new()))]);
    match etcd.within("cancel a request to another host", connection.client.txn(txn)).await {
        Ok(answer) if answer.succeeded() => Unanswered::Late,
        _ => Unanswered::Unknown,
    }
}

/// Future that executes a request.
pub(crate) type Doing = Pin<Box<dyn Future<Output = Answer> + Send>>;

/// Executor of requests on this host.
pub(crate) trait Doer: Send + Sync + 'static {
    /// Executes the request.
    fn act(self: Arc<Self>, request: Request) -> Doing;
    /// Reports the current state, without executing the request. Called for a request that an
    /// earlier agent has begun and not answered.
    fn look(self: Arc<Self>, request: Request) -> Doing;
}

/// Id of a request, its revision in etcd, and its text.
type Read = (String, i64, Vec<u8>);

struct Subscriber {
    requests: mpsc::UnboundedSender<Read>,
    /// Ids of the requests in etcd that this agent has begun. They are reported again when another
    /// etcd is listed.
    begun: HashSet<String>,
}

impl Sink for Subscriber {
    fn put(&mut self, key: &str, value: &[u8], revision: i64) {
        if self.begun.insert(key.to_owned()) {
            // This fails only while the agent stops.
            let _ = self.requests.send((key.to_owned(), revision, value.to_vec()));
        }
    }

    fn removed(&mut self, key: &str) {
        self.begun.remove(key);
    }
}

/// Executes requests to this host forever.
pub(crate) async fn serve(fleet: Fleet, host: String, doer: Arc<dyn Doer>) {
    let (sender, mut requests) = mpsc::unbounded_channel();
    let keys = Etcd::new(fleet.clone()).keys();
    let mut reader = Reader::new(&fleet, keys.requests(&host));
    let mut subscriber = Subscriber { requests: sender, begun: HashSet::new() };
    let work = async {
        while let Some((id, revision, text)) = requests.recv().await {
            let received =
                Received { fleet: fleet.clone(), host: host.clone(), id, revision, text };
            tokio::spawn(received.serve(doer.clone()));
        }
    };
    tokio::join!(reader.follow(&mut subscriber), work);
}

/// A request that this host has received.
struct Received {
    fleet: Fleet,
    host: String,
    id: String,
    revision: i64,
    text: Vec<u8>,
}

impl Received {
    async fn serve(self, doer: Arc<dyn Doer>) {
        let request: Request = match serde_json::from_slice(&self.text) {
            Ok(request) => request,
            Err(e) => return tracing::warn!("ignoring an invalid request through etcd: {e}"),
        };
        let (lease, is_first) = match self.begin().await {
            Ok(begun) => begun,
            // The caller gets no answer, and cancels the request at its deadline.
            Err(e) => {
                return tracing::warn!("cannot begin a request of {}: {e}", request.from);
            }
        };
        let Some(lease) = lease else { return };
        let what = format!(
            "{} for {} by {} on {}",
            request.call, request.server, request.caller, request.from
        );
        let answer = match is_first {
            true => doer.act(request).await,
            false => doer.look(request).await,
        };
        tracing::info!("request through etcd: {what}: {}", answer.status);
        self.answer(lease, &answer).await;
    }

    /// Records in etcd that this agent begins the request. Returns the lease of the answer, or
    /// `None` if there is nothing to do; and whether the request was not begun before. If it was,
    /// the earlier agent has stopped without an answer.
    async fn begin(&self) -> Result<(Option<i64>, bool), Error> {
        let mut etcd = Etcd::new(self.fleet.clone());
        let mut connection = etcd.connect().await?;
        let keys = etcd.keys();
        let (key, answer) = (
            format!("{}{}", keys.requests(&self.host), self.id),
            keys.answer(&self.host, &self.id),
        );
        let granting = connection.client.lease_grant(ANSWER_TTL_SECONDS, None);
        let lease = etcd.within("answer", granting).await?.id();
        let begun = serde_json::to_string(&State::Begun).unwrap_or_default();
        let txn = Txn::new()
            .when([
                Compare::mod_revision(key, CompareOp::Equal, self.revision),
                Compare::version(answer.clone(), CompareOp::Equal, 0),
            ])
            .and_then([TxnOp::put(
                answer.clone(),
                begun,
                Some(PutOptions::new().with_lease(lease)),
            )]);
        if etcd.within("answer", connection.client.txn(txn)).await?.succeeded() {
            return Ok((Some(lease), true));
        }
        let known = etcd.within("answer", connection.client.get(answer, None)).await?;
        let was_begun = known
            .kvs()
            .first()
            .is_some_and(|kv| matches!(serde_json::from_slice(kv.value()), Ok(State::Begun)));
        Ok((was_begun.then_some(lease), false))
    }

    /// Writes the answer, with retries until the caller no longer waits for it.
    async fn answer(&self, lease: i64, answer: &Answer) {
        let until = Instant::now() + ANSWER_TIMEOUT;
        let mut etcd = Etcd::new(self.fleet.clone());
        let key = etcd.keys().answer(&self.host, &self.id);
        let text = serde_json::to_string(&State::Done(answer.clone())).unwrap_or_default();
        while Instant::now() < until {
            let written = async {
                let mut connection = etcd.connect().await?;
                let options = PutOptions::new().with_lease(lease);
                etcd.within(
                    "answer",
                    connection.client.put(key.clone(), text.clone(), Some(options)),
                )
                .await
            };
            match written.await {
                Ok(_) => return,
                Err(e) => tracing::warn!("cannot write an answer to etcd, retrying: {e}"),
            }
            etcd.next_endpoint();
            tokio::time::sleep(ANSWER_RETRY_INTERVAL).await;
        }
    }
}
