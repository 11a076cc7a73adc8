//! Telling the fleet what this host has: its document, under a lease, whenever it changes and now
//! and then besides.
//!
//! What happens to etcd changes nothing on the host: this thread reads the inventory, and is waited
//! for by nobody. What it missed is caught up by telling how things are now.

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
use super::news;
use crate::hypervisor::Supervised;
use crate::metrics::Metrics;
use crate::timeouts::STORE_LOCK_TIMEOUT;
use virt_usb_fleet::etcd::{Connection, Error, Etcd, Pause};
use virt_usb_fleet::join::{Place, place};
use virt_usb_fleet::keys::{Keys, Node};
use virt_usb_fleet::replicated::Mirror;

/// A document is no longer than this, in bytes; etcd takes 1.5 MiB.
pub const LARGEST: usize = 1_000_000;
/// Writes that come together are told together.
const GATHER: Duration = Duration::from_millis(5);
/// How often is looked when the kernel does not tell of writes.
const LOOK: Duration = Duration::from_secs(1);
/// How often is looked whether a host that is in no fleet has joined it.
const UNJOINED: Duration = Duration::from_secs(5);

/// Why nothing is published now.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error(transparent)]
    Etcd(#[from] Error),
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("this host has not joined the fleet, or has left it: 'virt-usb fleet join'")]
    NotJoined,
    #[error(
        "the inventory has number {inventory}, in the fleet this machine is {fleet}: 'virt-usb \
            fleet join' renumbers it"
    )]
    OtherNumber { inventory: u64, fleet: u64 },
    #[error("{0}")]
    Machine(String),
    /// etcd was not heard of for so long that the lease has ended.
    #[error("the lease has ended")]
    LeaseEnded,
}

/// Who publishes.
pub struct Publisher {
    /// What is published through.
    pub fleet: Fleet,
    /// Says where the inventory is.
    pub config: Config,
    /// This host's name.
    pub host: String,
    /// What runs its guests; none: they are not told of.
    pub hypervisor: Option<Arc<Supervised>>,
    /// What is counted.
    pub metrics: Arc<Metrics>,
}

/// The publisher's thread.
pub struct Publishing {
    stop: watch::Sender<bool>,
    thread: std::thread::JoinHandle<()>,
}

impl Publishing {
    /// Publishes no more. What was published stays until its lease ends: an agent that starts anew
    /// is not missed.
    pub fn stop(self) {
        self.stop.send_replace(true);
        drop(self.thread.join());
    }
}

impl Publisher {
    /// Begins.
    ///
    /// # Errors
    /// When there can be no thread for it.
    pub fn start(self) -> std::io::Result<Publishing> {
        let (stop, mut stopped) = watch::channel(false);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let news = news::follow(&self.config.state_dir);
        if let Err(e) = &news {
            tracing::warn!("the inventory is looked at every {LOOK:?}: {e}");
        }
        let flavors = Mirror::<Flavor>::new(&self.fleet, &self.config);
        let grants = Mirror::<Grant>::new(&self.fleet, &self.config);
        let thread = std::thread::Builder::new().name("fleet".into()).spawn(move || {
            runtime.block_on(async {
                tokio::select! {
                    _ = stopped.wait_for(|stop| *stop) => {}
                    () = self.publish(news.ok()) => {}
                    () = flavors.follow() => {}
                    () = grants.follow() => {}
                }
            });
        })?;
        Ok(Publishing { stop, thread })
    }

    /// For ever. `news` tells of each write to the inventory; without it, it is looked at now and
    /// then.
    pub(super) async fn publish(self, news: Option<Arc<Notify>>) {
        let guests = Guests::new(self.hypervisor.clone(), self.config.state_dir.clone());
        tokio::select! {
            () = guests.follow() => {}
            () = self.sessions(news.as_deref(), &guests) => {}
        }
    }

    async fn sessions(&self, news: Option<&Notify>, guests: &Guests) {
        let mut etcd = Etcd::new(self.fleet.clone());
        let mut pause = Pause::default();
        let mut told = None;
        loop {
            let failure = match self.session(&mut etcd, news, guests, &mut pause, &mut told).await {
                Ok(never) => match never {},
                Err(failure) => failure,
            };
            self.metrics.fleet(None);
            let wait = match &failure {
                // A new one is taken at once.
                Failure::LeaseEnded => Duration::ZERO,
                Failure::NotJoined | Failure::OtherNumber { .. } => UNJOINED,
                _ => {
                    etcd.pass_on();
                    pause.next_wait()
                }
            };
            // Once for each reason: it is tried again and again.
            let text = failure.to_string();
            if told.as_ref() != Some(&text) {
                tracing::warn!("the fleet does not hear of this host: {text}");
                told = Some(text);
            }
            sleep(wait).await;
        }
    }

    /// Until it fails.
    async fn session(
        &self,
        etcd: &mut Etcd,
        news: Option<&Notify>,
        guests: &Guests,
        pause: &mut Pause,
        told: &mut Option<String>,
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
        let mut beat = Instant::now() + self.fleet.heartbeat;
        let mut ends = Instant::now() + self.fleet.lease;
        loop {
            let due = Instant::now() >= beat;
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
                    if told.take().is_some() || last.is_none() {
                        tracing::info!(
                            "the fleet hears of this host: {}, number {}",
                            connection.endpoint,
                            me.number
                        );
                    }
                    pause.reset();
                    last = Some(text);
                    beat = Instant::now() + self.fleet.heartbeat;
                }
            }
            if due {
                // An inventory that says nothing of this host yet is no reason to ask it again and
                // again.
                beat = Instant::now() + self.fleet.heartbeat;
            }
            let written = async {
                match news {
                    Some(news) => news.notified().await,
                    None => sleep(LOOK).await,
                }
            };
            tokio::select! {
                () = written => {
                    guests.look.notify_one();
                    sleep(GATHER).await;
                }
                changed = servers.changed() => {
                    let text = servers.borrow_and_update().clone();
                    if let (Ok(()), Some(text)) = (changed, text) {
                        me.put(etcd, connection, lease, &me.servers, &text).await?;
                    }
                }
                () = sleep_until(beat) => {}
                _ = keep.tick() => {
                    etcd.within("keep a lease", keeper.keep_alive()).await?;
                }
                answer = kept.message() => {
                    let answer = answer.map_err(|e| etcd.explain(&e, "keep a lease"))?;
                    match answer {
                        Some(answer) if answer.ttl() > 0 => ends = Instant::now() + self.fleet.lease,
                        Some(_) => return Err(Failure::LeaseEnded),
                        None => return Err(Error::Unreachable("it has ended the lease's \
                            stream".into()).into()),
                    }
                }
                // Nobody has answered for a whole lease: others may see this host as gone.
                () = sleep_until(ends) => return Err(Error::Unreachable("the lease was not kept in \
                    time".into()).into()),
            }
        }
    }

    fn text(&self, document: &HostDocument) -> String {
        let published = document.published(LARGEST);
        if published.left_out > 0 {
            tracing::error!(
                "{} devices of {} are not told to the fleet: the document would be larger than \
                    {LARGEST} bytes",
                published.left_out,
                document.devices.len()
            );
        }
        published.text
    }
}

/// This host in the fleet.
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
        match place(etcd, connection, keys, &machine).await? {
            Place { number: Some(number), node: Some(node) }
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

    /// No reader is to see a revision that is lower than one before: an inventory that was restored
    /// goes on above what is known of it.
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
                "the fleet knows revision {known} of this host: the inventory, which is older, \
                    goes on from there"
            );
        }
        Ok(())
    }

    /// Puts what this host says, if it is still in the fleet.
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
                return Err(Failure::LeaseEnded);
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
                "number {} is another's in the fleet now ({other}): 'virt-usb fleet join'",
                self.number
            ))),
        }
    }
}
