//! The agent: from an event to a row (real libusb over umockdev), and a big host that is left alone (simulated).

use std::fmt::Write as _;
use std::io::{Read, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};

use crate::program::Programs;
use crate::table::Table;

const DEVICES: u32 = 1000;
const DOMAINS: u32 = 200;
/// How long the idle agent is watched.
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

/// What the hotplug test measures: it has the testbed.
fn events() -> Result<(String, String)> {
    let mut command = Command::new(env!("CARGO"));
    command.args(["test", "--quiet", "-p", "virt-usb", "--test", "hotplug", "--"]);
    command.args(["latency", "storm", "--include-ignored", "--nocapture"]).stderr(Stdio::null());
    let said = command.output().context("the hotplug test")?;
    let text = String::from_utf8_lossy(&said.stdout).into_owned();
    let figure = |name: &str| {
        let line = text.lines().find_map(|l| l.split_once("figure ")?.1.strip_prefix(name));
        line.map(|l| l.trim().to_owned()).with_context(|| format!("no figure {name} in: {text}"))
    };
    Ok((figure("latency")?, figure("storm")?))
}

struct Agent {
    child: Child,
    folder: tempfile::TempDir,
}

impl Drop for Agent {
    fn drop(&mut self) {
        // It may have ended by itself.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

impl Agent {
    fn start(program: &Path, sim: &str, interval: u32) -> Result<Self> {
        let folder = tempfile::tempdir()?;
        let at = |name: &str| folder.path().join(name);
        let keys = format!(
            "state_dir = {:?}\nmetrics = {:?}\nlog = \"off\"\nscan_interval = {interval}\n",
            at("state"),
            at("metrics")
        );
        std::fs::write(at("config.toml"), keys)?;
        std::fs::write(at("sim.toml"), sim)?;
        let mut command = Command::new(program);
        command.arg("--config").arg(at("config.toml")).arg("--sim").arg(at("sim.toml"));
        let child = command.stderr(std::fs::File::create(at("log"))?).spawn()?;
        let agent = Self { child, folder };
        let deadline = Instant::now() + Duration::from_secs(120);
        while !agent.log()?.contains(" ready") {
            ensure!(Instant::now() < deadline, "the agent is not ready: {}", agent.log()?);
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(agent)
    }

    fn log(&self) -> Result<String> {
        Ok(std::fs::read_to_string(self.folder.path().join("log"))?)
    }

    fn metric(&self, name: &str) -> Result<f64> {
        let mut socket = UnixStream::connect(self.folder.path().join("metrics"))?;
        socket.write_all(b"GET /metrics HTTP/1.0\r\n\r\n")?;
        let mut text = String::new();
        socket.read_to_string(&mut text)?;
        let line = text.lines().find_map(|l| l.strip_prefix(name)?.trim().parse().ok());
        line.with_context(|| format!("no metric {name}"))
    }

    /// Processor time so far, in clock ticks of 1/100 s (proc(5), stat, fields 14 and 15).
    fn ticks(&self) -> Result<f64> {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.child.id()))?;
        let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
        match fields.get(11..13) {
            Some([user, system]) => Ok(user.parse::<f64>()? + system.parse::<f64>()?),
            _ => bail!("{stat}"),
        }
    }

    fn resident(&self) -> Result<f64> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id()))?;
        let kib = status
            .lines()
            .find_map(|l| l.strip_prefix("VmRSS:")?.trim().strip_suffix(" kB")?.trim().parse::<f64>().ok());
        kib.map(|kib| kib / 1024.0).context("VmRSS")
    }
}

/// 1 000 devices, 200 domains that have one each.
fn host() -> String {
    let mut text = String::new();
    for n in 0..DEVICES {
        let (bus, port) = (1 + n / 100, 1 + n % 100);
        // Writing to a String cannot fail.
        let _ = writeln!(
            text,
            "[[device]]\nvendor = '0529'\nproduct = '{:04x}'\nbus = {bus}\ndevice = {port}\nport = '{bus}-{port}'\nspeed = 'full'\nserial = 'S{n}'",
            n % 50
        );
    }
    for n in 0..DOMAINS {
        let _ = writeln!(
            text,
            "[[domain]]\nname = 'vm{n}'\nuuid = '{n:08x}-0000-4000-8000-000000000000'\nflavor = '{{\"usb_devices\":[{{\"serial\":\"S{n}\"}}]}}'"
        );
    }
    text
}

fn big_host(programs: &Programs, table: &mut Table) -> Result<()> {
    let program = programs.hook.with_file_name("virt-usbd");
    let agent = Agent::start(&program, &host(), 2)?;
    let deadline = Instant::now() + Duration::from_secs(120);
    while agent.metric("virt_usb_attaches_total{result=\"done\"}").unwrap_or(0.0) < f64::from(DOMAINS) {
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
    let what =
        format!("agent: a full reconcile pass, {DEVICES} devices and {DOMAINS} running domains (simulated)");
    table.row(&what, format!("{mean:.1} ms, mean of {passes:.0}"), "", "", "≤ 100 ms");
    drop(agent);
    let agent = Agent::start(&program, &host(), 60)?;
    std::thread::sleep(Duration::from_secs(5));
    let before = agent.ticks()?;
    std::thread::sleep(IDLE);
    let share = (agent.ticks()? - before) / IDLE.as_secs_f64();
    table.row(
        "agent: processor while nothing happens, the same host",
        format!("{share:.2} %"),
        "",
        "",
        "< 0.5 %",
    );
    table.row(
        "agent: resident memory, the same host",
        format!("{:.1} MiB", agent.resident()?),
        "",
        "",
        "< 40 MiB",
    );
    Ok(())
}
