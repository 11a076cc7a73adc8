//! `store check` and `store backup`.

use std::path::Path;
use std::process::ExitCode;

use serde::Serialize;

use super::Session;

#[derive(Serialize)]
struct Checked {
    ok: bool,
    findings: Vec<String>,
}

pub(super) fn check(session: &Session) -> anyhow::Result<ExitCode> {
    let store = session.store()?;
    let findings = store.check()?;
    let checked = Checked { ok: findings.is_empty(), findings };
    session.out.show(&checked, || match checked.ok {
        true => format!("{}: all is well", store.path().display()),
        false => checked.findings.join("\n"),
    })?;
    Ok(if checked.ok { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

#[derive(Serialize)]
struct Copied<'a> {
    file: &'a Path,
}

pub(super) fn backup(session: &Session, file: &Path) -> anyhow::Result<ExitCode> {
    session.store()?.backup(file)?;
    session.out.show(&Copied { file }, || format!("copied to {}", file.display()))?;
    Ok(ExitCode::SUCCESS)
}
