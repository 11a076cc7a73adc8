//! The peak of a process's memory.
//!
//! The kernel says it of all children that were waited for, the greatest of them (`getrusage`,
//! `RUSAGE_CHILDREN`, `ru_maxrss`). So each measurement is a process of its own with one child:
//! this program again. A child's peak begins with its parent's size at the time of its start, so
//! what is smaller than this program shows as this program; the hook's figure is therefore compared
//! with 8 MiB as it stands, and what `/bin/true` needs is not taken off it.

use std::ffi::OsString;
use std::fs::File;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, ensure};
use nix::sys::resource::{UsageWho, getrusage};

use crate::program::{Call, Programs};
use crate::table::Table;
use crate::world::{Devices, World, domain, flavor};

/// The first argument of this program as the parent of one child.
pub(crate) const HELPER: &str = "--peak-of";

/// Runs the command and says its peak resident set, in KiB.
pub(crate) fn peak_of(command: &[OsString]) -> Result<i64> {
    let (program, arguments) = command.split_first().context("a program")?;
    let ended = Command::new(program)
        .args(arguments)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()?;
    ensure!(ended.success(), "{}: {ended}", Path::new(program).display());
    Ok(getrusage(UsageWho::RUSAGE_CHILDREN)?.max_rss())
}

pub(crate) fn measure(programs: &Programs, table: &mut Table) -> Result<()> {
    let world = World::new(200, Devices::Kinds(20))?;
    let asks = world.file(
        "asks.xml",
        &domain(1, 20_000, &flavor(r#"{"usb_devices":[{"vendor_id":"0529","count":2}]}"#)),
    )?;
    let config = world.config().into_os_string();
    let words = ["instance-00000001", "prepare", "begin", "-"].map(OsString::from);
    let hook =
        Call::new(&programs.hook, ["--config".into(), config].into_iter().chain(words), &asks);
    let peak = helper(&hook)?;
    let least = helper(&Call::new(&programs.nothing, [""; 0], &asks))?;
    let mib = |kib: i64| format!("{:.1} MiB", kib as f64 / 1024.0);
    table.row(
        "peak memory of that claim, all of it",
        mib(peak),
        &format!("/bin/true: at most {}", mib(least)),
        "",
        "< 8 MiB above",
    );
    Ok(())
}

fn helper(call: &Call) -> Result<i64> {
    let mut command = Command::new(std::env::current_exe()?);
    command.arg(HELPER).arg(&call.program).args(&call.arguments).stdin(File::open(&call.stdin)?);
    let said = command.output()?;
    let text = String::from_utf8_lossy(&said.stdout);
    text.trim().parse().with_context(|| {
        format!("{}: {}", call.program.display(), String::from_utf8_lossy(&said.stderr))
    })
}
