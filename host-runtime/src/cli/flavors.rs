//! `flavor`.

use std::io::Read;
use std::process::ExitCode;

use anyhow::{Context as _, bail};
use serde::Serialize;
use virt_usb_model::Flavor;
use virt_usb_model::flavor::{MAX_NAME, is_name};

use super::Session;
use super::output::table;
use crate::fleet::flavors::change;

pub(super) fn list(session: &Session) -> anyhow::Result<ExitCode> {
    let flavors = match session.remote()? {
        Some(api) => api.flavors()?,
        None => session.store()?.flavors()?,
    };
    session.out.show(&flavors, || {
        let rows = flavors.iter().map(|f| vec![f.name.clone(), f.flavor.to_string(), f.updated_at.clone()]);
        table(
            &["NAME", "ASKS FOR", "SET"],
            rows.collect(),
            "no flavor is stored: 'virt-usb flavor set NAME JSON' stores one",
        )
    })?;
    Ok(ExitCode::SUCCESS)
}

pub(super) fn show(session: &Session, name: &str) -> anyhow::Result<ExitCode> {
    let found = match session.remote()? {
        Some(api) => api.flavor(name)?,
        None => session.store()?.flavor(name)?,
    };
    let Some(flavor) = found else { bail!("{}", unknown(name)) };
    session.out.show(&flavor, || flavor.flavor.to_string())?;
    Ok(ExitCode::SUCCESS)
}

#[derive(Serialize)]
struct Changed<'a> {
    name: &'a str,
    changed: bool,
}

pub(super) fn set(session: &Session, name: &str, definition: &str) -> anyhow::Result<ExitCode> {
    if !is_name(name) {
        bail!("{name:?} is no name for a flavor: 1 to {MAX_NAME} printable characters, the first no @");
    }
    let text = if definition == "-" { stdin()? } else { definition.to_owned() };
    let flavor = Flavor::parse(&text).with_context(|| format!("the flavor {name} is not stored"))?;
    if flavor.is_empty() {
        bail!("the flavor {name} is not stored: it asks for nothing");
    }
    let changed = match session.remote()? {
        Some(api) => api.set_flavor(name, &flavor)?,
        None => {
            let config = session.config()?;
            let context = session.context(&config, "flavor set")?;
            change(&config, &mut session.make_store(&config)?, name, Some(&flavor), &context)?
        }
    };
    session.out.show(&Changed { name, changed }, || {
        let verb = if changed { "stored" } else { "unchanged" };
        format!("{verb}: {name} asks for {flavor}")
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

pub(super) fn remove(session: &Session, name: &str) -> anyhow::Result<ExitCode> {
    let changed = match session.remote()? {
        Some(api) => api.remove_flavor(name)?,
        None => {
            let config = session.config()?;
            let context = session.context(&config, "flavor remove")?;
            change(&config, &mut session.store()?, name, None, &context)?
        }
    };
    if !changed {
        bail!("{}", unknown(name));
    }
    session.out.show(&Changed { name, changed }, || format!("removed: {name}"))?;
    Ok(ExitCode::SUCCESS)
}

pub(super) fn unknown(name: &str) -> String {
    format!("no flavor of the name {name:?} is stored: 'virt-usb flavor list' shows those that are")
}
