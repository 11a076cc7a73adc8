//! Flavors of the whole fleet: in etcd, and mirrored into each host's inventory, so that they work while etcd is away.
//!
//! ```text
//!  flavor set, API ─► change ─► etcd ─► mirror (each host) ─► store ◄── hook, on each start
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::time::Duration;

use etcd_client::{Compare, CompareOp, Txn, TxnOp};
use tokio::sync::watch;
use virt_usb_hook::config::{Config, Fleet};
use virt_usb_hook::machine;
use virt_usb_model::Flavor;
use virt_usb_model::flavor::is_name;
use virt_usb_store::{Context, Durability, LONE_NODE, Store, StoreError, StoredFlavor};

use super::etcd::Etcd;
use super::join::{is_member, this_machine};
use super::keys::Keys;
use super::reader::{Reader, Sink};
use super::{Error, wait};

/// Changes that come together are mirrored together.
const GATHER: Duration = Duration::from_millis(20);
/// Until what could not be mirrored is tried again.
const RETRY: Duration = Duration::from_secs(5);
/// How long the mirror waits for the store's lock: the document is published by the same thread.
const PATIENCE: Duration = Duration::from_secs(2);

/// A flavor is not changed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ChangeError {
    /// etcd.
    #[error("the flavors of this host are the fleet's, and are changed in etcd alone: {0}")]
    Fleet(#[from] Error),
    /// The inventory.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Sets a flavor, or removes it; where this host is in a fleet, for all its hosts. Says whether that changed anything.
///
/// # Errors
/// When the inventory cannot be written; or when etcd cannot, where there is a fleet.
pub(crate) fn change(
    config: &Config,
    store: &mut Store,
    name: &str,
    flavor: Option<&Flavor>,
    context: &Context,
) -> Result<bool, ChangeError> {
    let in_fleet = match &config.fleet {
        None => None,
        Some(fleet) => match wait(edit(fleet, name, flavor)) {
            Ok(edited) => edited,
            // It has never joined: its flavors are its own.
            Err(Error::Unreachable(_)) if store.node()? == LONE_NODE => None,
            Err(e) => return Err(e.into()),
        },
    };
    store.restart_patience();
    // The mirror would do the same in a moment; whoever looks now sees it.
    let here = match flavor {
        Some(flavor) => store.set_flavor(name, flavor, context)?,
        None => store.remove_flavor(name, context)?,
    };
    Ok(in_fleet.unwrap_or(here))
}

/// In etcd; none: this host is in no fleet there.
async fn edit(fleet: &Fleet, name: &str, flavor: Option<&Flavor>) -> Result<Option<bool>, Error> {
    let machine = this_machine(fleet)?;
    let mut etcd = Etcd::new(fleet.clone());
    let mut connection = etcd.connect().await?;
    let keys = etcd.keys();
    if !is_member(&etcd, &mut connection, &keys, &machine).await? {
        return Ok(None);
    }
    let key = keys.flavor(name);
    let known = etcd.within("read the fleet's flavors", connection.client.get(key.clone(), None)).await?;
    let known = known.kvs().first().map(|kv| String::from_utf8_lossy(kv.value()).into_owned());
    match flavor {
        Some(flavor) => {
            if known.and_then(|text| Flavor::parse(&text).ok()).as_ref() == Some(flavor) {
                return Ok(Some(false));
            }
            let put = connection.client.put(key, flavor.to_string(), None);
            etcd.within("change the fleet's flavors", put).await?;
            Ok(Some(true))
        }
        None => {
            etcd.within("change the fleet's flavors", connection.client.delete(key, None)).await?;
            Ok(Some(known.is_some()))
        }
    }
}

/// Gives the fleet those of these flavors that it does not have; returns the names of those that it has otherwise.
///
/// # Errors
/// When etcd cannot be asked, or refuses.
pub(crate) async fn contribute(fleet: &Fleet, own: &[StoredFlavor]) -> Result<Vec<String>, Error> {
    let mut etcd = Etcd::new(fleet.clone());
    let mut connection = etcd.connect().await?;
    let keys = etcd.keys();
    let mut others = Vec::new();
    for stored in own {
        let key = keys.flavor(&stored.name);
        let txn = Txn::new()
            .when([Compare::version(key.clone(), CompareOp::Equal, 0)])
            .and_then([TxnOp::put(key.clone(), stored.flavor.to_string(), None)]);
        if !etcd.within("change the fleet's flavors", connection.client.txn(txn)).await?.succeeded() {
            let known = etcd.within("read the fleet's flavors", connection.client.get(key, None)).await?;
            let known =
                known.kvs().first().and_then(|kv| Flavor::parse(&String::from_utf8_lossy(kv.value())).ok());
            if known.as_ref() != Some(&stored.flavor) {
                others.push(stored.name.clone());
            }
        }
    }
    Ok(others)
}

/// Who mirrors.
pub(super) struct Mirror {
    pub(super) fleet: Fleet,
    pub(super) state_dir: PathBuf,
    pub(super) procfs_root: PathBuf,
}

/// What etcd holds, as text, by name; none: not all of it was told yet.
type All = Option<BTreeMap<String, String>>;

struct Ears {
    now: BTreeMap<String, String>,
    listed: bool,
    all: watch::Sender<All>,
}

impl Ears {
    fn tell(&self) {
        if self.listed {
            self.all.send_replace(Some(self.now.clone()));
        }
    }
}

impl Sink for Ears {
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

impl Mirror {
    /// For ever.
    pub(super) async fn follow(self) {
        let (all, news) = watch::channel(None);
        let mut ears = Ears { now: BTreeMap::new(), listed: false, all };
        let reader = Reader::new(&self.fleet, Keys::new(self.fleet.prefix.clone()).flavors());
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
                        tracing::warn!("the fleet's flavors are not mirrored: {why}");
                        told = why;
                    }
                }
                // What is newer is taken at once.
                drop(tokio::time::timeout(RETRY, news.changed()).await);
            }
        }
    }

    /// Makes the inventory's flavors those of the fleet, if this host is in it: an etcd that was wiped takes nothing away.
    async fn apply(&self, all: &BTreeMap<String, String>) -> Result<(), String> {
        let (mut flavors, mut unclear) = (BTreeMap::new(), BTreeSet::new());
        for (name, text) in all {
            match Flavor::parse(text) {
                Ok(flavor) if is_name(name) && !flavor.is_empty() => {
                    drop(flavors.insert(name.clone(), flavor));
                }
                Ok(_) => {
                    unclear.insert(name.clone());
                }
                Err(e) => {
                    tracing::warn!("the fleet's flavor {name:?} is passed over: {e}");
                    unclear.insert(name.clone());
                }
            }
        }
        if !self.is_member().await.map_err(|e| e.to_string())? {
            return Err("this host has not joined the fleet, or has left it".into());
        }
        let changed = self.write(&flavors, &unclear).map_err(|e| e.to_string())?;
        if changed > 0 {
            tracing::info!("{changed} flavor(s) of the fleet were mirrored");
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

    fn write(&self, flavors: &BTreeMap<String, Flavor>, unclear: &BTreeSet<String>) -> anyhow::Result<usize> {
        let context = machine::context(&self.procfs_root, "virt-usbd fleet")?;
        let mut store = Store::open(&self.state_dir, PATIENCE, Durability::Power)?;
        Ok(store.mirror_flavors(flavors, unclear, &context)?)
    }
}
