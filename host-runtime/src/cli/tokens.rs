//! The command `token`: tokens of the API.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::bail;
use serde::Serialize;

use super::Session;
use super::arguments::NewToken;
use super::output::{complain, or_dash, table};
use crate::api::tokens::{Entry, Made, TokenFile, Wanted};

const DAY: Duration = Duration::from_secs(24 * 3600);

fn file(session: &Session) -> anyhow::Result<TokenFile> {
    Ok(TokenFile::new(&session.config()?.state_dir))
}

#[derive(Serialize)]
struct Shown<'a> {
    token: &'a str,
    #[serde(flatten)]
    entry: &'a Entry,
}

pub(super) fn add(session: &Session, options: &NewToken) -> anyhow::Result<ExitCode> {
    let Made { token, entry } = file(session)?.add(&Wanted {
        name: &options.name,
        project: &options.project,
        role: options.role,
        lifetime: options.days.map(|days| DAY * days),
    })?;
    // The token alone, so that '> FILE' writes what --token-file reads.
    session.out.show(&Shown { token: &token, entry: &entry }, || token.clone())?;
    if !session.out.is_json() {
        let until = entry.expires_at.as_ref().map(|at| format!(", until {at}")).unwrap_or_default();
        complain(&format!(
            "This is the token of {}, {} of project {}{until}. It cannot be shown again: only its \
             hash is kept.",
            entry.name, entry.role, entry.project
        ));
    }
    Ok(ExitCode::SUCCESS)
}

pub(super) fn list(session: &Session) -> anyhow::Result<ExitCode> {
    let entries = file(session)?.entries()?;
    session.out.show(&entries, || {
        let row = |e: &Entry| {
            vec![
                e.name.clone(),
                e.project.clone(),
                e.role.clone(),
                e.created_at.clone(),
                or_dash(e.expires_at.clone()),
            ]
        };
        table(
            &["NAME", "PROJECT", "ROLE", "SINCE", "UNTIL"],
            entries.iter().map(row).collect(),
            "there are no tokens: 'virt-usb token add NAME --project ID' creates one",
        )
    })?;
    Ok(ExitCode::SUCCESS)
}

#[derive(Serialize)]
struct Removed<'a> {
    removed: &'a str,
}

pub(super) fn remove(session: &Session, name: &str) -> anyhow::Result<ExitCode> {
    if !file(session)?.remove(name)? {
        bail!("no token named {name:?}: 'virt-usb token list' shows the tokens");
    }
    session.out.show(&Removed { removed: name }, || format!("removed: {name}"))?;
    Ok(ExitCode::SUCCESS)
}
