//! Flavors and grants, which all hosts of a fleet share. They are stored in etcd and mirrored into
//! each host's inventory, so that they work while etcd is unreachable.
//!
//! ```text
//!  flavor set, grant set, API ─► change ─► etcd ─► mirror (each host) ─► store ◄─ hook, each start
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

/// Wait after a change, so that changes that arrive together are mirrored together.
const DEBOUNCE_INTERVAL: Duration = Duration::from_millis(20);
/// Wait before a failed mirroring is retried.
const RETRY_INTERVAL: Duration = Duration::from_secs(5);
/// Timeout for the store's lock. It is short, because the same thread publishes the host document.
const STORE_LOCK_TIMEOUT: Duration = Duration::from_secs(2);

/// A kind of shared definition. Each definition has a name and a text.
pub trait Shared:
    FromStr<Err = ParseError> + Display + Clone + PartialEq + Send + Sync + 'static
{
    /// Name of the kind in keys and messages.
    const PLURAL: &'static str;
    /// Purpose of a read request, for messages.
    const READ: &'static str;
    /// Purpose of a write request, for messages.
    const CHANGE: &'static str;

    /// Reads all definitions of the inventory.
    fn all(store: &Store) -> Result<BTreeMap<String, Self>, StoreError>;
    /// Stores a definition. Returns whether that changed anything.
    fn set(&self, store: &mut Store, name: &str, context: &Context) -> Result<bool, StoreError>;
    /// Removes a definition. Returns whether it existed.
    fn remove(store: &mut Store, name: &str, context: &Context) -> Result<bool, StoreError>;
    /// Replaces the definitions of the inventory by `all`, except those named in `unclear`, which
    /// stay as they are. Returns the number of changes.
    fn mirror(
        store: &mut Store,
        all: &BTreeMap<String, Self>,
        unclear: &BTreeSet<String>,
        context: &Context,
    ) -> Result<usize, StoreError>;
    /// Whether the definition is empty. The mirror ignores empty definitions.
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

/// Error of a change.
#[derive(Debug, thiserror::Error)]
pub enum ChangeError {
    /// Error of etcd.
    #[error("the {0} of this host belong to the fleet and can be changed only in etcd: {1}")]
    Fleet(&'static str, Error),
    /// Error of the inventory.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Stores a definition, or removes it if `wanted` is `None`. If this host is in a fleet, the change
/// applies to all its hosts. Returns whether that changed anything.
///
/// # Errors
/// If the inventory or, in a fleet, etcd cannot be written.
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
            // The host has never joined a fleet: its definitions are its own.
            Err(Error::Unreachable(_)) if store.node()? == LONE_NODE => None,
            Err(e) => return Err(ChangeError::Fleet(T::PLURAL, e)),
        },
    };
    store.restart_lock_timeout();
    // The mirror would do the same a moment later. Here the change is visible at once.
    let here = match wanted {
        Some(wanted) => wanted.set(store, name, context)?,
        None => T::remove(store, name, context)?,
    };
    Ok(in_fleet.unwrap_or(here))
}

/// Changes a definition in etcd. `None` if this host is not a member of that fleet.
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

/// Adds the definitions in `own` to the fleet, unless it has one of the same name. Returns the
/// names of those that differ in the fleet.
///
/// # Errors
/// If etcd does not respond or refuses.
pub async fn contribute<T: Shared>(
    fleet: &Fleet,
    own: &BTreeMap<String, T>,
) -> Result<Vec<String>, Error> {
    let mut etcd = Etcd::new(fleet.clone());
    let mut connection = etcd.connect().await?;
    let keys = etcd.keys();
    let mut differing = Vec::new();
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
                differing.push(name.clone());
            }
        }
    }
    Ok(differing)
}

/// Mirror of one kind of definition.
pub struct Mirror<T> {
    fleet: Fleet,
    config: Config,
    kind: PhantomData<T>,
}

/// All definitions in etcd as text, by name. `None` until the first list is complete.
type All = Option<BTreeMap<String, String>>;

struct Subscriber {
    now: BTreeMap<String, String>,
    listed: bool,
    all: watch::Sender<All>,
}

impl Subscriber {
    fn send(&self) {
        if self.listed {
            self.all.send_replace(Some(self.now.clone()));
        }
    }
}

impl Sink for Subscriber {
    fn put(&mut self, key: &str, value: &[u8], _: i64) {
        self.now.insert(key.to_owned(), String::from_utf8_lossy(value).into_owned());
        self.send();
    }

    fn removed(&mut self, key: &str) {
        self.now.remove(key);
        self.send();
    }

    fn listed(&mut self) {
        self.listed = true;
        self.send();
    }
}

impl<T: Shared> Mirror<T> {
    /// Creates a mirror from `fleet` into the inventory of `config`.
    pub fn new(fleet: &Fleet, config: &Config) -> Self {
        Self { fleet: fleet.clone(), config: config.clone(), kind: PhantomData }
    }

    /// Follows the fleet and mirrors its changes forever.
    pub async fn follow(self) {
        let (all, changes) = watch::channel(None);
        let mut subscriber = Subscriber { now: BTreeMap::new(), listed: false, all };
        let mut reader =
            Reader::new(&self.fleet, Keys::new(self.fleet.prefix.clone()).shared(T::PLURAL));
        tokio::join!(reader.follow(&mut subscriber), self.apply_changes(changes));
    }

    async fn apply_changes(&self, mut changes: watch::Receiver<All>) {
        let mut logged = String::new();
        while changes.changed().await.is_ok() {
            loop {
                tokio::time::sleep(DEBOUNCE_INTERVAL).await;
                let Some(all) = changes.borrow_and_update().clone() else { break };
                match self.apply(&all).await {
                    Ok(()) => {
                        logged.clear();
                        break;
                    }
                    Err(why) if why == logged => {}
                    Err(why) => {
                        tracing::warn!("cannot mirror the fleet's {}: {why}", T::PLURAL);
                        logged = why;
                    }
                }
                // A new change ends the wait.
                drop(tokio::time::timeout(RETRY_INTERVAL, changes.changed()).await);
            }
        }
    }

    /// Writes the fleet's definitions into the inventory. Does nothing while this host is not a
    /// member, so that a wiped etcd removes nothing.
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
                    tracing::warn!("ignoring {name:?} of the fleet's {}: {e}", T::PLURAL);
                    unclear.insert(name.clone());
                }
            }
        }
        if !self.is_member().await.map_err(|e| e.to_string())? {
            return Err("this host has not joined the fleet, or has left it".into());
        }
        let changed = self.write(&clear, &unclear).map_err(|e| e.to_string())?;
        if changed > 0 {
            tracing::info!("mirrored {changed} of the fleet's {}", T::PLURAL);
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
        let mut store = Store::open(&self.config.state_dir, STORE_LOCK_TIMEOUT, Durability::Power)?;
        Ok(T::mirror(&mut store, clear, unclear, &context)?)
    }
}
