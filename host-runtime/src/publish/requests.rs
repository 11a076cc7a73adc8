//! What the API of one host asks the agent of another, through etcd: done once or not at all, and
//! answered once.
//!
//! ```text
//!  API of A                          etcd                                agent of B
//!  put, if B is there ───────► requests/B/ID (lease: the deadline) ─────► reads
//!                              answers/B/ID  "begun" ◄─────────────────── put, if the request is there and no answer is
//!  waits ◄──────────────────── answers/B/ID  "done", status, body ◄────── does it, looks again, puts
//! ```
//! An agent that finds a request that it has begun and not answered was interrupted: it does not do
//! it again, but says how things are.

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

/// How long a request counts, in seconds.
const DEADLINE: i64 = 60;
/// How long an answer is kept, in seconds: longer than whoever asks waits.
const KEPT: i64 = 600;
/// How long an answer is tried to be given.
const GIVING: Duration = Duration::from_secs(120);

/// What is asked, in whose name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Request {
    /// `attach`, `detach`.
    pub(crate) call: String,
    /// The server's UUID.
    pub(crate) server: String,
    /// As the API has them.
    pub(crate) usb_devices_requests: Value,
    /// Who asks: for the audit.
    pub(crate) caller: String,
    pub(crate) project_id: Option<String>,
    pub(crate) role: String,
    /// On which host.
    pub(crate) from: String,
}

/// What came of it, as the API would have answered.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) body: Value,
}

/// What stands under an answer's key.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum State {
    Begun,
    Done(Answer),
}

/// A request was not answered.
#[derive(Debug, Clone, thiserror::Error)]
pub(crate) enum Unanswered {
    /// The host is not heard of: nothing was done.
    #[error("the host is not heard of")]
    Unreachable,
    /// It has not begun in time, and will not.
    #[error("the host did not begin in time")]
    Late,
    /// It has begun and has not said how it ended.
    #[error("the host has begun, and did not say in time how it ended")]
    Unknown,
    /// etcd.
    #[error(transparent)]
    Etcd(#[from] Error),
}

/// Asks the agent of that host, and waits for its answer.
///
/// # Errors
/// When there is none; each says whether something may have been done.
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
    let lease =
        etcd.within("ask another host", connection.client.lease_grant(DEADLINE, None)).await?.id();
    let text = serde_json::to_string(request).unwrap_or_default();
    let there = Compare::version(keys.host(host), CompareOp::Greater, 0);
    let put = TxnOp::put(key.clone(), text, Some(PutOptions::new().with_lease(lease)));
    let txn = connection.client.txn(Txn::new().when([there]).and_then([put]));
    let put = etcd.within("ask another host", txn).await?;
    if !put.succeeded() {
        return Err(Unanswered::Unreachable);
    }
    let mut revision = put.header().map_or(0, etcd_client::ResponseHeader::revision);
    let until = Instant::now() + Duration::from_secs(DEADLINE.unsigned_abs());
    loop {
        let waiting = wait_for(&etcd, &mut connection, &answer, &mut revision);
        match tokio::time::timeout_at(until, waiting).await {
            Ok(Ok(done)) => {
                // It goes with its lease at the latest.
                drop(etcd.within("ask another host", connection.client.lease_revoke(lease)).await);
                return Ok(done);
            }
            Ok(Err(_)) if Instant::now() < until => {
                tokio::time::sleep(Duration::from_millis(200)).await;
                etcd.pass_on();
                if let Ok(again) = etcd.connect().await {
                    connection = again;
                }
            }
            _ => return Err(give_up(&mut etcd, &key, &answer).await),
        }
    }
}

/// Until it is answered.
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
    // What came while nobody listened.
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

/// Takes the request back, if it was not begun: it will not be then.
async fn give_up(etcd: &mut Etcd, key: &str, answer: &str) -> Unanswered {
    let mut connection = match etcd.connect().await {
        Ok(connection) => connection,
        // The lease ends it; whether it was begun before nobody can tell.
        Err(_) => return Unanswered::Unknown,
    };
    let txn = Txn::new()
        .when([Compare::version(answer, CompareOp::Equal, 0)])
        .and_then([TxnOp::delete(key, None)])
        .or_else([TxnOp::get(answer, Some(GetOptions::new()))]);
    match etcd.within("ask another host", connection.client.txn(txn)).await {
        Ok(answer) if answer.succeeded() => Unanswered::Late,
        _ => Unanswered::Unknown,
    }
}

/// What does what is asked.
pub(crate) type Doing = Pin<Box<dyn Future<Output = Answer> + Send>>;

/// Whoever can.
pub(crate) trait Doer: Send + Sync + 'static {
    /// Does it.
    fn act(self: Arc<Self>, request: Request) -> Doing;
    /// It was begun by an agent before this one, which has not said how it ended: says how things
    /// are, and does nothing.
    fn look(self: Arc<Self>, request: Request) -> Doing;
}

/// A request as it was read: its id, the revision that it was put at, its text.
type Read = (String, i64, Vec<u8>);

struct Subscriber {
    asked: mpsc::UnboundedSender<Read>,
    /// Those that this agent has begun, as long as they stand in etcd: they come again when another
    /// etcd is listed.
    begun: HashSet<String>,
}

impl Sink for Subscriber {
    fn put(&mut self, key: &str, value: &[u8], revision: i64) {
        if self.begun.insert(key.to_owned()) {
            // Nobody does it any more when the other end is gone.
            let _ = self.asked.send((key.to_owned(), revision, value.to_vec()));
        }
    }

    fn gone(&mut self, key: &str) {
        self.begun.remove(key);
    }
}

/// Does for ever what this host is asked.
pub(crate) async fn serve(fleet: Fleet, host: String, doer: Arc<dyn Doer>) {
    let (sender, mut asked) = mpsc::unbounded_channel();
    let keys = Etcd::new(fleet.clone()).keys();
    let mut reader = Reader::new(&fleet, keys.requests(&host));
    let mut ears = Subscriber { asked: sender, begun: HashSet::new() };
    let work = async {
        while let Some((id, revision, text)) = asked.recv().await {
            let one = One { fleet: fleet.clone(), host: host.clone(), id, revision, text };
            tokio::spawn(one.serve(doer.clone()));
        }
    };
    tokio::join!(reader.follow(&mut ears), work);
}

/// One request.
struct One {
    fleet: Fleet,
    host: String,
    id: String,
    revision: i64,
    text: Vec<u8>,
}

impl One {
    async fn serve(self, doer: Arc<dyn Doer>) {
        let request: Request = match serde_json::from_slice(&self.text) {
            Ok(request) => request,
            Err(e) => return tracing::warn!("a request through etcd is passed over: {e}"),
        };
        let (lease, mine) = match self.begin().await {
            Ok(begun) => begun,
            // Nothing was begun: whoever asks hears nothing, and is told so when its time is up.
            Err(e) => {
                return tracing::warn!(
                    "a request of {} through etcd is not begun: {e}",
                    request.from
                );
            }
        };
        let Some(lease) = lease else { return };
        let what = format!(
            "{} for {} by {} on {}",
            request.call, request.server, request.caller, request.from
        );
        let answer = match mine {
            true => doer.act(request).await,
            false => doer.look(request).await,
        };
        tracing::info!("asked through etcd: {what}: {}", answer.status);
        self.give(lease, &answer).await;
    }

    /// Says that it is begun. Without a lease there is nothing to do; false: it was begun before,
    /// by an agent that is no more.
    async fn begin(&self) -> Result<(Option<i64>, bool), Error> {
        let mut etcd = Etcd::new(self.fleet.clone());
        let mut connection = etcd.connect().await?;
        let keys = etcd.keys();
        let (key, answer) = (
            format!("{}{}", keys.requests(&self.host), self.id),
            keys.answer(&self.host, &self.id),
        );
        let lease = etcd.within("answer", connection.client.lease_grant(KEPT, None)).await?.id();
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

    /// Until it was taken, or nobody waits for it any more.
    async fn give(&self, lease: i64, answer: &Answer) {
        let until = Instant::now() + GIVING;
        let mut etcd = Etcd::new(self.fleet.clone());
        let key = etcd.keys().answer(&self.host, &self.id);
        let text = serde_json::to_string(&State::Done(answer.clone())).unwrap_or_default();
        while Instant::now() < until {
            let given = async {
                let mut connection = etcd.connect().await?;
                let options = PutOptions::new().with_lease(lease);
                etcd.within(
                    "answer",
                    connection.client.put(key.clone(), text.clone(), Some(options)),
                )
                .await
            };
            match given.await {
                Ok(_) => return,
                Err(e) => tracing::warn!("an answer through etcd waits: {e}"),
            }
            etcd.pass_on();
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
    }
}
