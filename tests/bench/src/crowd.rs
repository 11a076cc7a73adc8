//! 200 hooks at once for 50 identical devices.
//!
//! All processes are started first and wait for their XML; then each is given it. The time to a
//! grant is counted from the first XML given to the moment that the winner's record was written, so
//! it holds more than the wait for the lock: reading, claiming, rewriting and the queue for the
//! processor.

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result};
use serde_json::Value;
use virt_usb_harness::environment;

use crate::program::Programs;
use crate::samples::millis;
use crate::table::Table;
use crate::world::{Devices, World, domain, flavor};

const HOOKS: usize = 200;
const DEVICES: usize = 50;
const ONE: &str = r#"{"usb_devices":[{"vendor_id":"0529","product_id":"0001"}]}"#;

pub(crate) fn measure(programs: &Programs, table: &mut Table) -> Result<()> {
    let world = World::new(DEVICES, Devices::Identical)?;
    let mut children = Vec::new();
    for n in 0..HOOKS {
        children.push((start(programs, &world, n)?, domain(n, 4_000, &flavor(ONE))));
    }
    let (began, at) = (Instant::now(), SystemTime::now().duration_since(UNIX_EPOCH)?);
    for (child, xml) in &mut children {
        child.stdin.take().context("a pipe")?.write_all(xml.as_bytes())?;
    }
    let (mut winners, mut told) = (0, 0);
    for (mut child, _) in children {
        let mut message = String::new();
        child.stderr.take().context("a pipe")?.read_to_string(&mut message)?;
        let won = child.wait()?.success();
        winners += usize::from(won);
        told += usize::from(
            !won && message.contains("usb_devices[0]") && message.contains("is held by"),
        );
    }
    let all = began.elapsed();
    let claims = world.store()?.claims()?;
    let distinct: BTreeSet<_> = claims.iter().map(|c| c.device_id).collect();
    let slowest = slowest_grant(&std::fs::read_to_string(world.log())?, at);
    let outcome =
        format!("{winners} win, {told} get the reason, {} devices claimed", distinct.len());
    table.row(
        "200 hooks at once for 50 identical devices",
        outcome,
        "",
        "",
        "50 win, 150 get the reason",
    );
    let (slowest, per_second) = (slowest.context("a grant in the log")?, Duration::from_secs(1));
    let share = crate::table::ratio(slowest, per_second);
    table.row(
        "from the first attempt to the last grant, at most",
        millis(slowest),
        "1 s",
        &format!("{share:.2} ×"),
        "≤ 1 s",
    );
    table.row("until all 200 have ended", millis(all), "", "", "");
    Ok(())
}

fn start(programs: &Programs, world: &World, n: usize) -> Result<Child> {
    let mut command = Command::new(&programs.hook);
    command.arg("--config").arg(world.config()).args([
        &format!("instance-{n:08x}"),
        "prepare",
        "begin",
        "-",
    ]);
    command.env_clear().envs(environment(&[]));
    Ok(command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn()?)
}

/// The latest record of a claim that was granted, from `began` on.
fn slowest_grant(log: &str, began: Duration) -> Option<Duration> {
    let records = log.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let granted =
        records.filter(|r| r["outcome"].as_str().is_some_and(|did| did.starts_with("claimed")));
    granted.filter_map(|r| Duration::from_secs_f64(r["at"].as_f64()?).checked_sub(began)).max()
}
