//! The commands `flavor` and `grant`. All hosts of a fleet share flavors and grants.

use std::io::Read;
use std::process::ExitCode;

use anyhow::{Context as _, bail};
use serde::Serialize;
use serde::de::DeserializeOwned;
use virt_usb_model::flavor::{MAX_NAME, is_name};
use virt_usb_model::{Flavor, Grant};
use virt_usb_store::{Store, StoreError, StoredFlavor, StoredGrant};

use super::Session;
use super::output::table;
use crate::api::responses::{UsbFlavorShown, UsbFlavors, UsbGrantShown, UsbGrants};
use virt_usb_fleet::replicated::{Shared, change};

/// A kind of resource that has a name.
pub(super) trait Named: Shared {
    /// Noun for the resource.
    const NOUN: &'static str;
    /// Column heading of the definition.
    const HEADING: &'static str;
    /// Type of a stored resource.
    type Stored: Serialize;
    /// Response of the API with all of them.
    type List: DeserializeOwned + Into<Vec<Self::Stored>>;
    /// Response of the API with one of them.
    type Shown: DeserializeOwned + Into<Self::Stored>;

    fn list(store: &Store) -> Result<Vec<Self::Stored>, StoreError>;
    fn find(store: &Store, name: &str) -> Result<Option<Self::Stored>, StoreError>;
    /// Name, definition and time of the last change.
    fn parts(stored: &Self::Stored) -> (&str, &Self, &str);
    /// Readable description of the definition.
    fn words(&self) -> String;
}

impl Named for Flavor {
    const NOUN: &'static str = "flavor";
    const HEADING: &'static str = "ASKS FOR";
    type Stored = StoredFlavor;
    type List = UsbFlavors;
    type Shown = UsbFlavorShown;

    fn list(store: &Store) -> Result<Vec<StoredFlavor>, StoreError> {
        store.flavors()
    }

    fn find(store: &Store, name: &str) -> Result<Option<StoredFlavor>, StoreError> {
        store.flavor(name)
    }

    fn parts(stored: &StoredFlavor) -> (&str, &Self, &str) {
        (&stored.name, &stored.flavor, &stored.updated_at)
    }

    fn words(&self) -> String {
        format!("asks for {self}")
    }
}

impl Named for Grant {
    const NOUN: &'static str = "grant";
    const HEADING: &'static str = "GIVES";
    type Stored = StoredGrant;
    type List = UsbGrants;
    type Shown = UsbGrantShown;

    fn list(store: &Store) -> Result<Vec<StoredGrant>, StoreError> {
        store.grants()
    }

    fn find(store: &Store, name: &str) -> Result<Option<StoredGrant>, StoreError> {
        store.grant(name)
    }

    fn parts(stored: &StoredGrant) -> (&str, &Self, &str) {
        (&stored.name, &stored.grant, &stored.updated_at)
    }

    fn words(&self) -> String {
        format!("gives {self}")
    }
}

pub(super) fn list<T: Named>(session: &Session) -> anyhow::Result<ExitCode> {
    let all = match session.remote()? {
        Some(api) => api.named::<T>()?,
        None => T::list(&session.store()?)?,
    };
    session.out.show(&all, || {
        let rows = all.iter().map(T::parts);
        let rows =
            rows.map(|(name, one, set)| vec![name.to_owned(), one.to_string(), set.to_owned()]);
        let noun = T::NOUN;
        let none = format!("no {noun} is stored: 'virt-usb {noun} set NAME JSON' stores one");
        table(&["NAME", T::HEADING, "SET"], rows.collect(), &none)
    })?;
    Ok(ExitCode::SUCCESS)
}

pub(super) fn show<T: Named>(session: &Session, name: &str) -> anyhow::Result<ExitCode> {
    let found = match session.remote()? {
        Some(api) => api.one_named::<T>(name)?,
        None => T::find(&session.store()?, name)?,
    };
    let Some(stored) = found else { bail!("{}", unknown::<T>(name)) };
    session.out.show(&stored, || T::parts(&stored).1.to_string())?;
    Ok(ExitCode::SUCCESS)
}

#[derive(Serialize)]
struct Changed<'a> {
    name: &'a str,
    changed: bool,
}

pub(super) fn set<T: Named>(
    session: &Session,
    name: &str,
    definition: &str,
) -> anyhow::Result<ExitCode> {
    let noun = T::NOUN;
    if !is_name(name) {
        bail!(
            "{name:?} is not a valid name for a {noun}: wanted 1 to {MAX_NAME} printable \
             characters, not beginning with @"
        );
    }
    let text = if definition == "-" { stdin()? } else { definition.to_owned() };
    if definition != "-" && !text.trim_start().starts_with(['{', '[']) {
        bail!(
            "the {noun} {name} is not stored: {definition:?} is no JSON; to read a file: 'virt-usb \
             {noun} set {name} - < {definition}'"
        );
    }
    let wanted: T = text.parse().with_context(|| format!("the {noun} {name} is not stored"))?;
    if wanted.is_void() {
        bail!("the {noun} {name} is not stored: it asks for nothing");
    }
    let (changed, stored) = match session.remote()? {
        Some(api) => (api.set_named(name, &wanted)?, api.one_named::<T>(name)?),
        None => {
            let config = session.config()?;
            let context = session.context(&config, &format!("{noun} set"))?;
            let mut store = session.make_store(&config)?;
            let changed = change(&config, &mut store, name, Some(&wanted), &context)?;
            (changed, T::find(&store, name)?)
        }
    };
    session.out.show(&Changed { name, changed }, || {
        let verb = if changed { "stored" } else { "unchanged" };
        // The store replaces a port by its device path.
        let words =
            stored.as_ref().map_or_else(|| wanted.words(), |stored| T::parts(stored).1.words());
        format!("{verb}: {name} {words}")
    })?;
    Ok(ExitCode::SUCCESS)
}

fn stdin() -> anyhow::Result<String> {
    let mut text = String::new();
    std::io::stdin()
        .lock()
        .take(virt_usb_model::flavor::MAX_TEXT as u64 + 1)
        .read_to_string(&mut text)
        .context("cannot read stdin")?;
    Ok(text)
}

pub(super) fn remove<T: Named>(session: &Session, name: &str) -> anyhow::Result<ExitCode> {
    let changed = match session.remote()? {
        Some(api) => api.remove_named::<T>(name)?,
        None => {
            let config = session.config()?;
            let context = session.context(&config, &format!("{} remove", T::NOUN))?;
            change::<T>(&config, &mut session.store()?, name, None, &context)?
        }
    };
    if !changed {
        bail!("{}", unknown::<T>(name));
    }
    session.out.show(&Changed { name, changed }, || format!("removed: {name}"))?;
    Ok(ExitCode::SUCCESS)
}

pub(super) fn unknown<T: Named>(name: &str) -> String {
    let noun = T::NOUN;
    format!("no {noun} named {name:?} is stored: 'virt-usb {noun} list' shows the stored ones")
}
