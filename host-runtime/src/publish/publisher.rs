//! Publishes this host's document under a lease, on each change and at each heartbeat.
//!
//! A failure of etcd changes nothing on the host: this thread reads the inventory, and no other
//! thread waits for it. After an outage it publishes the current state.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use etcd_client::{Compare, CompareOp, GetOptions, PutOptions, Txn, TxnOp, TxnOpResponse};
use tokio::sync::{Notify, watch};
use tokio::time::{Instant, MissedTickBehavior, interval_at, sleep, sleep_until};
use virt_usb_config::{Config, Fleet};
use virt_usb_model::{Flavor, Grant, HostDocument};
use virt_usb_store::watch::Watched;
use virt_usb_store::{Store, StoreError};

use super::guests::Guests;
use super::write_signal;
use crate::hypervisor::Supervised;
use crate::metrics::Metrics;
use crate::timeouts::STORE_LOCK_TIMEOUT;
use virt_usb_fleet::etcd::{Backoff, Connection, Error, Etcd};
use virt_usb_fleet::join::{Membership, membership};
use virt_usb_fleet::keys::{Keys, Node};
use virt_usb_fleet::replicated::Mirror;

/// Maximum size of a document in bytes; etcd accepts 1.5 MiB.
pub const MAX_DOCUMENT_BYTES: usize = 1_000_000;
/// Wait after a write, so that writes that arrive together are published together.
const DEBOUNCE_INTERVAL: Duration = Duration::from_millis(5);
/// Interval at which the inventory is read if the kernel does not report writes.
const POLL_INTERVAL: Duration = Duration::from_secs(1);
/// Interval at which a host that is not a member checks whether it has joined.
const MEMBERSHIP_INTERVAL: Duration = Duration::from_secs(5);

/// Reason why this host cannot publish now.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error(transparent)]
    Etcd(#[from] Error),
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("this host has not joined the fleet, or has left it: 'virt-usb fleet join'")]
    NotJoined,
    #[error(
        "the inventory has number {inventory}, but in the fleet this machine has number {fleet}: \
            'virt-usb fleet join' renumbers it"
    )]
    OtherNumber { inventory: u64, fleet: u64 },
    #[error("{0}")]
    Machine(String),
    /// The lease has expired, because etcd was unreachable for too long.
    #[error("the lease has expired")]
    LeaseExpired,
}

/// Publisher of one host.
pub struct Publisher {
    /// The fleet to publish to.
    pub fleet: Fleet,
    /// Configuration with the path of the inventory.
    pub config: Config,
    /// Name of this host.
    pub host: String,
    /// Hypervisor of the guests. `None`: guests are not published.
    pub hypervisor: Option<Arc<Supervised>>,
    /// Metrics to update.
    pub metrics: Arc<Metrics>,
}

/// The publisher's thread.
pub struct Publishing {
    stop: watch::Sender<bool>,
    thread: std::thread::JoinHandle<()>,
}

impl Publishing {
    /// Stops publishing. The published values stay until their lease ends, so that a restart of the
    /// agent is not visible in the fleet.
    pub fn stop(self) {
        self.stop.send_replace(true);
        drop(self.thread.join());
    }
}

impl Publisher {
    /// Starts the publisher's thread.
    ///
    /// # Errors
    /// If the thread cannot be started.
    pub fn start(self) -> std::io::Result<Publishing> {
        let (stop, mut stopped) = watch::channel(false);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let writes = write_signal::follow(&self.config.state_dir);
        if let Err(e) = &writes {
            tracing::warn!("polling the inventory every {POLL_INTERVAL:?}, without inotify: {e}");
        }
        let flavors = Mirror::<Flavor>::new(&self.fleet, &self.config);
        let grants = Mirror::<Grant>::new(&self.fleet, &self.config);
        let thread = std::thread::Builder::new().name("fleet".into()).spawn(move || {
            runtime.block_on(async {
                tokio::select! {
                    _ = stopped.wait_for(|stop| *stop) => {}
                    () = self.publish(writes.ok()) => {}
                    () = flavors.follow() => {}
                    () = grants.follow() => {}
                }
            });
        })?;
        Ok(Publishing { stop, thread })
    }

    /// Publishes forever. `writes` is notified of each write to the inventory; without it, the
    /// inventory is polled.
    pub(super) async fn publish(self, writes: Option<Arc<Notify>>) {
        let guests = Guests::new(self.hypervisor.clone(), self.config.state_dir.clone());
        tokio::select! {
            () = guests.follow() => {}
            () = self.sessions(writes.as_deref(), &guests) => {}
        }
    }

    async fn sessions(&self, writes: Option<&Notify>, guests: &Guests) {
        let mut etcd = Etcd::new(self.fleet.clone());
        let mut backoff = Backoff::default();
        let mut logged = None;
        loop {
            let session = self.session(&mut etcd, writes, guests, &mut backoff, &mut logged);
            let failure = match session.await {
                Ok(never) => match never {},
                Err(failure) => failure,
            };
            self.metrics.fleet(None);
            let wait = match &failure {
                // The next session takes a new lease at once.
                Failure::LeaseExpired => Duration::ZERO,
                Failure::NotJoined | Failure::OtherNumber { .. } => MEMBERSHIP_INTERVAL,
                _ => {
                    etcd.next_endpoint();
                    backoff.next_wait()
                }
            };
            // Log each reason once, not with each retry.
            let text = failure.to_string();
            if logged.as_ref() != Some(&text) {
                tracing::warn!("cannot publish this host to the fleet: {text}");
                logged = Some(text);
            }
            sleep(wait).await;
        }
    }

    /// Publishes over one connection until it fails.
    async fn session(
        &self,
        etcd: &mut Etcd,
        writes: Option<&Notify>,
        guests: &Guests,
        backoff: &mut Backoff,
        logged: &mut Option<String>,
    ) -> Result<Infallible, Failure> {
        let connection = &mut etcd.connect().await?;
        let etcd = &*etcd;
        let keys = etcd.keys();
        let me = Me::new(self, etcd, connection, &keys).await?;
        let ttl = i64::try_from(self.fleet.lease.as_secs()).unwrap_or(i64::MAX);
        let lease =
            etcd.within("take a lease", connection.client.lease_grant(ttl, None)).await?.id();
        let keeping = connection.client.lease_keep_alive(lease);
        let (mut keeper, mut kept) = etcd.within("keep a lease", keeping).await?;
        let mut watched = Watched::open(&self.config.state_dir, STORE_LOCK_TIMEOUT)?;
        me.raise(etcd, connection, &self.config.state_dir).await?;
        let mut last = None;
        let mut servers = guests.text.subscribe();
        servers.mark_changed();
        let mut keep = interval_at(Instant::now(), self.fleet.lease / 3);
        keep.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut heartbeat = Instant::now() + self.fleet.heartbeat;
        let mut expiry = Instant::now() + self.fleet.lease;
        loop {
            let due = Instant::now() >= heartbeat;
            if (watched.has_news()? || due || last.is_none())
                && let Some(document) = watched.store().host_document()?
            {
                let text = self.text(&document);
                if due || last.as_ref() != Some(&text) {
                    me.put(etcd, connection, lease, &me.key, &text).await?;
                    self.metrics.fleet(Some(document.revision));
                    tracing::debug!(
                        "published revision {} ({} bytes)",
                        document.revision,
                        text.len()
                    );
                    if logged.take().is_some() || last.is_none() {
                        tracing::info!(
                            "published this host to the fleet at {}, with number {}",
                            connection.endpoint,
                            me.number
                        );
                    }
                    backoff.reset();
                    last = Some(text);
                    heartbeat = Instant::now() + self.fleet.heartbeat;
                }
            }
            if due {
                // If the inventory has no document of this host yet, wait for the next heartbeat.
                heartbeat = Instant::now() + self.fleet.heartbeat;
            }
            let written = async {
                match writes {
                    Some(writes) => writes.notified().await,
                    None => sleep(POLL_INTERVAL).await,
                }
            };
            tokio::select! {
                () = written => {
                    guests.refresh.notify_one();
                    sleep(DEBOUNCE_INTERVAL).await;
                }
                changed = servers.changed() => {
                    let text = servers.borrow_and_update().clone();
                    if let (Ok(()), Some(text)) = (changed, text) {
                        me.put(etcd, connection, lease, &me.servers, &text).await?;
                    }
                }
                () = sleep_until(heartbeat) => {}
                _ = keep.tick() => {
                    etcd.within("keep a lease", keeper.keep_alive()).await?;
                }
                answer = kept.message() => {
                    let answer = answer.map_err(|e| etcd.explain(&e, "keep a lease"))?;
                    match answer {
                        Some(answer) if answer.ttl() > 0 => {
                            expiry = Instant::now() + self.fleet.lease;
                        }
                        Some(_) => return Err(Failure::LeaseExpired),
                        None => {
                            let why = "etcd has closed the stream of the lease";
                            return Err(Error::Unreachable(why.into()).into());
                        }
                    }
                }
                // After a lease without a response, other hosts may see this one as unreachable.
                () = sleep_until(expiry) => {
                    let why = "etcd did not renew the lease in time";
                    return Err(Error::Unreachable(why.into()).into());
                }
            }
        }
    }

    fn text(&self, document: &HostDocument) -> String {
        let published = document.published(MAX_DOCUMENT_BYTES);
        if published.left_out > 0 {
            tracing::error!(
                "{} of {} devices are not published to the fleet: the document would be larger \
                    than {MAX_DOCUMENT_BYTES} bytes",
                published.left_out,
                document.devices.len()
            );
        }
        published.text
    }
}

/// This host's number and keys in the fleet.
struct Me {
    number: u64,
    node: Node,
    node_key: String,
    key: String,
    servers: String,
}

impl Me {
    async fn new(
        publisher: &Publisher,
        etcd: &Etcd,
        connection: &mut Connection,
        keys: &Keys,
    ) -> Result<Self, Failure> {
        let machine = virt_usb_fleet::join::this_machine(&publisher.fleet)
            .map_err(|e| Failure::Machine(e.to_string()))?;
        let inventory = Store::open(
            &publisher.config.state_dir,
            STORE_LOCK_TIMEOUT,
            virt_usb_store::Durability::Boot,
        )?
        .node()?;
        match membership(etcd, connection, keys, &machine).await? {
            Membership { number: Some(number), node: Some(node) }
                if node.machine == machine && node.host == publisher.host =>
            {
                if inventory != number {
                    return Err(Failure::OtherNumber { inventory, fleet: number });
                }
                let (node_key, key) = (keys.node(number), keys.host(&node.host));
                let servers = keys.servers(&node.host);
                Ok(Self { number, node, node_key, key, servers })
            }
            _ => Err(Failure::NotJoined),
        }
    }

    /// Raises the revision of an inventory that was restored above the published one. A revision
    /// that readers see never falls.
    async fn raise(
        &self,
        etcd: &Etcd,
        connection: &mut Connection,
        state_dir: &std::path::Path,
    ) -> Result<(), Failure> {
        let answer = etcd
            .within("read its own document", connection.client.get(self.key.clone(), None))
            .await?;
        let text = answer.kvs().first().map(|kv| String::from_utf8_lossy(kv.value()).into_owned());
        let known =
            text.and_then(|text| HostDocument::parse(&text).ok()).map(|document| document.revision);
        let Some(known) = known else { return Ok(()) };
        let mut store =
            Store::open(state_dir, STORE_LOCK_TIMEOUT, virt_usb_store::Durability::Power)?;
        if store.host_document()?.is_some_and(|own| own.revision < known) {
            store.raise_revision(known + 1)?;
            tracing::warn!(
                "the fleet has revision {known} of this host, which is newer than the inventory: \
                    the inventory continues from there"
            );
        }
        Ok(())
    }

    /// Puts a value of this host, if the host is still a member of the fleet.
    async fn put(
        &self,
        etcd: &Etcd,
        connection: &mut Connection,
        lease: i64,
        key: &str,
        text: &str,
    ) -> Result<(), Failure> {
        let still = Compare::value(self.node_key.clone(), CompareOp::Equal, self.node.text());
        let put = TxnOp::put(key, text, Some(PutOptions::new().with_lease(lease)));
        let who = TxnOp::get(self.node_key.clone(), Some(GetOptions::new()));
        let txn = Txn::new().when([still]).and_then([put]).or_else([who]);
        let sent = etcd.within("publish its document", connection.client.txn(txn)).await;
        let answer = match sent {
            Err(Error::Other(why)) if why == "requested lease not found" => {
                return Err(Failure::LeaseExpired);
            }
            answer => answer?,
        };
        if answer.succeeded() {
            return Ok(());
        }
        let other = answer.op_responses().into_iter().find_map(|answer| match answer {
            TxnOpResponse::Get(got) => {
                got.kvs().first().map(|kv| String::from_utf8_lossy(kv.value()).into_owned())
            }
            _ => None,
        });
        match other {
            None => Err(Failure::NotJoined),
            Some(other) => Err(Failure::Machine(format!(
                "number {} now belongs to another machine in the fleet ({other}): run 'virt-usb \
                    fleet join'",
                self.number
            ))),
        }
    }
}
