//! The commands `doctor`, `store check` and `store backup`.

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
        true => format!("{}: no problems found", store.path().display()),
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

pub(super) fn doctor(
    session: &Session,
    all: bool,
    hooks: PathBuf,
    run: PathBuf,
) -> anyhow::Result<ExitCode> {
    let places = Places { config: session.config_file.clone(), hooks, run };
    let is_told = |finding: &Finding| all || finding.level != Level::Ok;
    // Print each finding at once: the next check may wait for libvirt or etcd.
    let mut told = Ok(());
    let findings = examine(&places, &mut |finding| {
        if is_told(finding) && told.is_ok() {
            told = session.out.line(&line(finding));
        }
    });
    told?;
    let worst = findings.iter().map(|f| f.level).max().unwrap_or(Level::Ok);
    if !findings.iter().any(is_told) {
        session.out.line(&format!("no problems found ({} checks)", findings.len()))?;
    }
    session.out.json(&findings)?;
    Ok(ExitCode::from(match worst {
        Level::Ok => 0,
        Level::Warning => 1,
        Level::Broken => 2,
    }))
}

fn line(finding: &Finding) -> String {
    let Finding { check, level, what, fix } = finding;
    let level = match level {
        Level::Ok => "ok",
        Level::Warning => "warning",
        Level::Broken => "BROKEN",
    };
    let fix = fix.as_ref().map(|fix| format!("\n         -> {fix}")).unwrap_or_default();
    format!("{level:<8} {check}: {what}{fix}")
}
