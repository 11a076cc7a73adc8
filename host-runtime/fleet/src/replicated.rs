//! What all hosts of a fleet have in common, flavors and grants: in etcd, and mirrored into each
//! host's inventory, so that they work while etcd is away.
//!
//! ```text
//!  flavor set, grant set, API ─► change ─► etcd ─► mirror (each host) ─► store ◄── hook, on each start
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Display;
use std::marker::PhantomData;
use std::str::FromStr;
use std::time::Duration;

use etcd_client::{Compare, CompareOp, Txn, TxnOp};
use tokio::sync::watch;
use virt_usb_config::host_env;
use virt_usb_config::{Config, Fleet};
use virt_usb_model::flavor::is_name;
use virt_usb_model::{Flavor, Grant, ParseError};
use virt_usb_store::{Context, Durability, LONE_NODE, Store, StoreError};

use crate::etcd::Etcd;
use crate::join::{is_member, this_machine};
use crate::keys::Keys;
use crate::reader::{Reader, Sink};
use crate::{Error, wait};

/// Changes that come together are mirrored together.
const GATHER: Duration = Duration::from_millis(20);
/// Until what could not be mirrored is tried again.
const RETRY: Duration = Duration::from_secs(5);
/// How long the mirror waits for the store's lock: the document is published by the same thread.
const ETCD_TIMEOUT: Duration = Duration::from_secs(2);

/// One kind of it: each has a name, and is a text.
pub trait Shared:
    FromStr<Err = ParseError> + Display + Clone + PartialEq + Send + Sync + 'static
{
    /// What they are called, in keys and in messages.
    const PLURAL: &'static str;
    /// What is done with them at etcd, for messages.
    const READ: &'static str;
    /// The same.
    const CHANGE: &'static str;

    /// Those of the inventory.
    fn all(store: &Store) -> Result<BTreeMap<String, Self>, StoreError>;
    /// Says whether that changed anything.
    fn set(&self, store: &mut Store, name: &str, context: &Context) -> Result<bool, StoreError>;
    /// Says whether it was there.
    fn remove(store: &mut Store, name: &str, context: &Context) -> Result<bool, StoreError>;
    /// Makes them these, but for those of unclear names; returns how many were changed.
    fn mirror(
        store: &mut Store,
        all: &BTreeMap<String, Self>,
        unclear: &BTreeSet<String>,
        context: &Context,
    ) -> Result<usize, StoreError>;
    /// Whether it says nothing: then it is none.
    fn is_void(&self) -> bool;
}

impl Shared for Flavor {
    const PLURAL: &'static str = "flavors";
    const READ: &'static str = "read the fleet's flavors";
    const CHANGE: &'static str = "change the fleet's flavors";

    fn all(store: &Store) -> Result<BTreeMap<String, Self>, StoreError> {
        Ok(store.flavors()?.into_iter().map(|stored| (stored.name, stored.flavor)).collect())
    }

    fn set(&self, store: &mut Store, name: &str, context: &Context) -> Result<bool, StoreError> {
        store.set_flavor(name, self, context)
    }

    fn remove(store: &mut Store, name: &str, context: &Context) -> Result<bool, StoreError> {
        store.remove_flavor(name, context)
    }

    fn mirror(
        store: &mut Store,
        all: &BTreeMap<String, Self>,
        unclear: &BTreeSet<String>,
        context: &Context,
    ) -> Result<usize, StoreError> {
        store.mirror_flavors(all, unclear, context)
    }

    fn is_void(&self) -> bool {
        self.is_empty()
    }
}

impl Shared for Grant {
    const PLURAL: &'static str = "grants";
    const READ: &'static str = "read the fleet's grants";
    const CHANGE: &'static str = "change the fleet's grants";

    fn all(store: &Store) -> Result<BTreeMap<String, Self>, StoreError> {
        Ok(store.grants()?.into_iter().map(|stored| (stored.name, stored.grant)).collect())
    }

    fn set(&self, store: &mut Store, name: &str, context: &Context) -> Result<bool, StoreError> {
        store.set_grant(name, self, context)
    }

    fn remove(store: &mut Store, name: &str, context: &Context) -> Result<bool, StoreError> {
        store.remove_grant(name, context)
    }

    fn mirror(
        store: &mut Store,
        all: &BTreeMap<String, Self>,
        unclear: &BTreeSet<String>,
        context: &Context,
    ) -> Result<usize, StoreError> {
        store.mirror_grants(all, unclear, context)
    }

    fn is_void(&self) -> bool {
        false
    }
}

/// It is not changed.
#[derive(Debug, thiserror::Error)]
pub enum ChangeError {
    /// etcd.
    #[error("the {0} of this host are the fleet's, and are changed in etcd alone: {1}")]
    Fleet(&'static str, Error),
    /// The inventory.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Sets one, or removes it; where this host is in a fleet, for all its hosts. Says whether that
/// changed anything.
///
/// # Errors
/// When the inventory cannot be written; or when etcd cannot, where there is a fleet.
pub fn change<T: Shared>(
    config: &Config,
    store: &mut Store,
    name: &str,
    wanted: Option<&T>,
    context: &Context,
) -> Result<bool, ChangeError> {
    let in_fleet = match &config.fleet {
        None => None,
        Some(fleet) => match wait(edit(fleet, name, wanted)) {
            Ok(edited) => edited,
            // It has never joined: what it has is its own.
            Err(Error::Unreachable(_)) if store.node()? == LONE_NODE => None,
            Err(e) => return Err(ChangeError::Fleet(T::PLURAL, e)),
        },
    };
    store.restart_lock_timeout();
    // The mirror would do the same in a moment; whoever looks now sees it.
    let here = match wanted {
        Some(wanted) => wanted.set(store, name, context)?,
        None => T::remove(store, name, context)?,
    };
    Ok(in_fleet.unwrap_or(here))
}

/// In etcd; none: this host is in no fleet there.
async fn edit<T: Shared>(
    fleet: &Fleet,
    name: &str,
    wanted: Option<&T>,
) -> Result<Option<bool>, Error> {
    let machine = this_machine(fleet)?;
    let mut etcd = Etcd::new(fleet.clone());
    let mut connection = etcd.connect().await?;
    let keys = etcd.keys();
    if !is_member(&etcd, &mut connection, &keys, &machine).await? {
        return Ok(None);
    }
    let key = keys.shared_one(T::PLURAL, name);
    let known = etcd.within(T::READ, connection.client.get(key.clone(), None)).await?;
    let known = known.kvs().first().map(|kv| String::from_utf8_lossy(kv.value()).into_owned());
    match wanted {
        Some(wanted) => {
            if known.and_then(|text| text.parse::<T>().ok()).as_ref() == Some(wanted) {
                return Ok(Some(false));
            }
            etcd.within(T::CHANGE, connection.client.put(key, wanted.to_string(), None)).await?;
            Ok(Some(true))
        }
        None => {
            etcd.within(T::CHANGE, connection.client.delete(key, None)).await?;
            Ok(Some(known.is_some()))
        }
    }
}

/// Gives the fleet those of these that it does not have; returns the names of those that it has
/// otherwise.
///
/// # Errors
/// When etcd cannot be asked, or refuses.
pub async fn contribute<T: Shared>(
    fleet: &Fleet,
    own: &BTreeMap<String, T>,
) -> Result<Vec<String>, Error> {
    let mut etcd = Etcd::new(fleet.clone());
    let mut connection = etcd.connect().await?;
    let keys = etcd.keys();
    let mut others = Vec::new();
    for (name, one) in own {
        let key = keys.shared_one(T::PLURAL, name);
        let txn = Txn::new()
            .when([Compare::version(key.clone(), CompareOp::Equal, 0)])
            .and_then([TxnOp::put(key.clone(), one.to_string(), None)]);
        if !etcd.within(T::CHANGE, connection.client.txn(txn)).await?.succeeded() {
            let known = etcd.within(T::READ, connection.client.get(key, None)).await?;
            let text =
                known.kvs().first().map(|kv| String::from_utf8_lossy(kv.value()).into_owned());
            if text.and_then(|text| text.parse::<T>().ok()).as_ref() != Some(one) {
                others.push(name.clone());
            }
        }
    }
    Ok(others)
}

/// Who mirrors one kind.
pub struct Mirror<T> {
    fleet: Fleet,
    config: Config,
    kind: PhantomData<T>,
}

/// What etcd holds, as text, by name; none: not all of it was told yet.
type All = Option<BTreeMap<String, String>>;

struct Subscriber {
    now: BTreeMap<String, String>,
    listed: bool,
    all: watch::Sender<All>,
}

impl Subscriber {
    fn tell(&self) {
        if self.listed {
            self.all.send_replace(Some(self.now.clone()));
        }
    }
}

impl Sink for Subscriber {
    fn put(&mut self, key: &str, value: &[u8], _: i64) {
        self.now.insert(key.to_owned(), String::from_utf8_lossy(value).into_owned());
        self.tell();
    }

    fn gone(&mut self, key: &str) {
        self.now.remove(key);
        self.tell();
    }

    fn listed(&mut self) {
        self.listed = true;
        self.tell();
    }
}

impl<T: Shared> Mirror<T> {
    /// Creates a mirror of what `fleet` shares into the inventory of `config`.
    pub fn new(fleet: &Fleet, config: &Config) -> Self {
        Self { fleet: fleet.clone(), config: config.clone(), kind: PhantomData }
    }

    /// For ever.
    pub async fn follow(self) {
        let (all, news) = watch::channel(None);
        let mut ears = Subscriber { now: BTreeMap::new(), listed: false, all };
        let mut reader =
            Reader::new(&self.fleet, Keys::new(self.fleet.prefix.clone()).shared(T::PLURAL));
        tokio::join!(reader.follow(&mut ears), self.keep(news));
    }

    async fn keep(&self, mut news: watch::Receiver<All>) {
        let mut told = String::new();
        while news.changed().await.is_ok() {
            loop {
                tokio::time::sleep(GATHER).await;
                let Some(all) = news.borrow_and_update().clone() else { break };
                match self.apply(&all).await {
                    Ok(()) => {
                        told.clear();
                        break;
                    }
                    Err(why) if why == told => {}
                    Err(why) => {
                        tracing::warn!("the fleet's {} are not mirrored: {why}", T::PLURAL);
                        told = why;
                    }
                }
                // What is newer is taken at once.
                drop(tokio::time::timeout(RETRY, news.changed()).await);
            }
        }
    }

    /// Makes those of the inventory those of the fleet, if this host is in it: an etcd that was
    /// wiped takes nothing away.
    async fn apply(&self, all: &BTreeMap<String, String>) -> Result<(), String> {
        let (mut clear, mut unclear) = (BTreeMap::new(), BTreeSet::new());
        for (name, text) in all {
            match text.parse::<T>() {
                Ok(one) if is_name(name) && !one.is_void() => {
                    drop(clear.insert(name.clone(), one));
                }
                Ok(_) => {
                    unclear.insert(name.clone());
                }
                Err(e) => {
                    tracing::warn!("{name:?} of the fleet's {} is passed over: {e}", T::PLURAL);
                    unclear.insert(name.clone());
                }
            }
        }
        if !self.is_member().await.map_err(|e| e.to_string())? {
            return Err("this host has not joined the fleet, or has left it".into());
        }
        let changed = self.write(&clear, &unclear).map_err(|e| e.to_string())?;
        if changed > 0 {
            tracing::info!("{changed} of the fleet's {} were mirrored", T::PLURAL);
        }
        Ok(())
    }

    async fn is_member(&self) -> Result<bool, Error> {
        let machine = this_machine(&self.fleet)?;
        let mut etcd = Etcd::new(self.fleet.clone());
        let mut connection = etcd.connect().await?;
        let keys = etcd.keys();
        is_member(&etcd, &mut connection, &keys, &machine).await
    }

    fn write(
        &self,
        clear: &BTreeMap<String, T>,
        unclear: &BTreeSet<String>,
    ) -> anyhow::Result<usize> {
        let context = host_env::context(&self.config, "virt-usbd fleet")?;
        let mut store = Store::open(&self.config.state_dir, ETCD_TIMEOUT, Durability::Power)?;
        Ok(T::mirror(&mut store, clear, unclear, &context)?)
    }
}
