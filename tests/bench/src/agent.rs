//! Measures the agent: the time from an event to a row (libusb over umockdev), and an idle agent of
//! a large, simulated host.

use std::fmt::Write as _;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};

use crate::daemon::Agent;
use crate::program::Programs;
use crate::table::Table;

const DEVICES: u32 = 1000;
const DOMAINS: u32 = 200;
/// Time for which the idle agent is watched.
const IDLE: Duration = Duration::from_secs(20);

pub(crate) fn measure(programs: &Programs, table: &mut Table) -> Result<()> {
    let (latency, storm) = events()?;
    table.row(
        "agent: USB event → row in the inventory (libusb over umockdev)",
        latency,
        "",
        "",
        "p50 ≤ 50 ms",
    );
    table.row("agent: a storm of events", storm, "", "", "one pass");
    big_host(programs, table)
}

/// Figures of the hotplug test, which has the test bed.
fn events() -> Result<(String, String)> {
    let mut command = Command::new(env!("CARGO"));
    command.args([
        "test",
        "--quiet",
        "--profile",
        "bench",
        "--workspace",
        "--test",
        "hotplug",
        "--",
    ]);
    command.args(["latency", "storm", "--include-ignored", "--nocapture"]).stderr(Stdio::null());
    let said = command.output().context("the hotplug test")?;
    let text = String::from_utf8_lossy(&said.stdout).into_owned();
    let figure = |name: &str| {
        let line = text.lines().find_map(|l| l.split_once("figure ")?.1.strip_prefix(name));
        line.map(|l| l.trim().to_owned()).with_context(|| format!("no figure {name} in: {text}"))
    };
    Ok((figure("latency")?, figure("storm")?))
}

/// Measures a host with 1 000 devices and 200 domains with one device each.
fn host() -> String {
    let mut text = String::new();
    for n in 0..DEVICES {
        let (bus, port) = (1 + n / 100, 1 + n % 100);
        // Writing to a String cannot fail.
        let _ = writeln!(
            text,
            "[[device]]\nvendor = '0529'\nproduct = '{:04x}'\nbus = {bus}\ndevice = {port}\nport = \
                '{bus}-{port}'\nspeed = 'full'\nserial = 'S{n}'",
            n % 50
        );
    }
    for n in 0..DOMAINS {
        let _ = writeln!(
            text,
            "[[domain]]\nname = 'vm{n}'\nuuid = '{n:08x}-0000-4000-8000-000000000000'\nflavor = \
                '{{\"usb_devices\":[{{\"serial\":\"S{n}\"}}]}}'"
        );
    }
    text
}

fn big_host(programs: &Programs, table: &mut Table) -> Result<()> {
    let agent = Agent::start(programs, &host(), "api = \"127.0.0.1:0\"\nscan_interval = 2\n")?;
    let deadline = Instant::now() + Duration::from_secs(120);
    while agent.metric("virt_usb_attaches_total{result=\"done\"}").unwrap_or(0.0)
        < f64::from(DOMAINS)
    {
        ensure!(Instant::now() < deadline, "not all are attached: {}", agent.log()?);
        std::thread::sleep(Duration::from_millis(100));
    }
    std::thread::sleep(Duration::from_secs(3));
    let pass = || {
        Ok::<_, anyhow::Error>((
            agent.metric("virt_usb_pass_seconds_sum")?,
            agent.metric("virt_usb_pass_seconds_count")?,
        ))
    };
    let (sum, count) = pass()?;
    std::thread::sleep(IDLE);
    let (sum_after, count_after) = pass()?;
    let passes = count_after - count;
    let mean = (sum_after - sum) / passes * 1e3;
    let what = format!(
        "agent: a full reconcile pass, {DEVICES} devices and {DOMAINS} running domains (simulated)"
    );
    table.row(&what, format!("{mean:.1} ms, mean of {passes:.0}"), "", "", "≤ 100 ms");
    drop(agent);
    let agent = Agent::start(programs, &host(), "api = \"127.0.0.1:0\"\nscan_interval = 60\n")?;
    std::thread::sleep(Duration::from_secs(5));
    let before = agent.process().ticks()?;
    std::thread::sleep(IDLE);
    let share = (agent.process().ticks()? - before) / IDLE.as_secs_f64();
    table.row(
        "agent: processor while nothing happens, the same host",
        format!("{share:.2} %"),
        "",
        "",
        "< 0.5 %",
    );
    table.row(
        "agent: resident memory, the same host",
        format!("{:.1} MiB", agent.process().resident()?),
        "",
        "",
        "< 40 MiB",
    );
    Ok(())
}
