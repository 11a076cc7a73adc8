//! `doctor`, `store check` and `store backup`.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use serde::Serialize;

use super::Session;
use crate::doctor::{Finding, Level, Places, examine};

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

pub(super) fn doctor(session: &Session, all: bool, hooks: PathBuf, run: PathBuf) -> anyhow::Result<ExitCode> {
    let findings = examine(&Places { config: session.config_file.clone(), hooks, run });
    let worst = findings.iter().map(|f| f.level).max().unwrap_or(Level::Well);
    session.out.show(&findings, || {
        let told = findings.iter().filter(|f| all || f.level != Level::Well).map(line);
        let told: Vec<String> = told.collect();
        if told.is_empty() { format!("all is well ({} checks)", findings.len()) } else { told.join("\n") }
    })?;
    Ok(ExitCode::from(match worst {
        Level::Well => 0,
        Level::Warning => 1,
        Level::Broken => 2,
    }))
}

fn line(finding: &Finding) -> String {
    let Finding { check, level, what, mend } = finding;
    let level = match level {
        Level::Well => "well",
        Level::Warning => "warning",
        Level::Broken => "BROKEN",
    };
    let mend = mend.as_ref().map(|mend| format!("\n         -> {mend}")).unwrap_or_default();
    format!("{level:<8} {check}: {what}{mend}")
}
