//! Programs that run while they are measured: the agent with simulated devices, and what any
//! process has used so far.

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::SocketAddr;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::Value;
use tempfile::TempDir;

use crate::program::Programs;

/// A process, as /proc tells of it.
#[derive(Clone, Copy)]
pub(crate) struct Process(pub(crate) u32);

impl Process {
    /// Processor time so far, in clock ticks of 1/100 s (proc(5), stat, fields 14 and 15).
    pub(crate) fn ticks(self) -> Result<f64> {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.0))?;
        let fields: Vec<&str> =
            stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
        match fields.get(11..13) {
            Some([user, system]) => Ok(user.parse::<f64>()? + system.parse::<f64>()?),
            _ => bail!("{stat}"),
        }
    }

    /// Resident memory, in MiB.
    pub(crate) fn resident(self) -> Result<f64> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.0))?;
        let kib = status.lines().find_map(|l| {
            l.strip_prefix("VmRSS:")?.trim().strip_suffix(" kB")?.trim().parse::<f64>().ok()
        });
        kib.map(|kib| kib / 1024.0).context("VmRSS")
    }

    /// Processor time so far of its threads of that name (schedstat, the first field).
    pub(crate) fn used(self, name: &str) -> Result<Duration> {
        let mut used = Duration::ZERO;
        for thread in fs::read_dir(format!("/proc/{}/task", self.0))? {
            let thread = thread?.path();
            if fs::read_to_string(thread.join("comm"))?.trim() == name {
                let stat = fs::read_to_string(thread.join("schedstat"))?;
                let nanoseconds = stat.split_whitespace().next().context("schedstat")?;
                used += Duration::from_nanos(nanoseconds.parse()?);
            }
        }
        Ok(used)
    }

    /// Child processes that it has started.
    pub(crate) fn children(self) -> Result<Vec<Self>> {
        let children = fs::read_to_string(format!("/proc/{0}/task/{0}/children", self.0))?;
        children.split_whitespace().map(|pid| Ok(Self(pid.parse()?))).collect()
    }
}

/// `virt-usbd --sim` in a temporary folder.
pub(crate) struct Agent {
    child: Child,
    folder: TempDir,
    /// Path of the `virt-usb` program.
    command: PathBuf,
}

impl Drop for Agent {
    fn drop(&mut self) {
        // It may have ended by itself.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

impl Agent {
    /// Once it is ready: with these devices and guests, and these keys in its configuration.
    pub(crate) fn start(programs: &Programs, sim: &str, keys: &str) -> Result<Self> {
        let folder = tempfile::tempdir()?;
        let at = |name: &str| folder.path().join(name);
        let base = format!(
            "state_dir = {:?}\nmetrics = {:?}\nlog = \"off\"\n",
            at("state"),
            at("metrics")
        );
        fs::write(at("config.toml"), base + keys)?;
        fs::write(at("sim.toml"), sim)?;
        let mut command = Command::new(programs.hook.with_file_name("virt-usbd"));
        command.arg("--config").arg(at("config.toml")).arg("--sim").arg(at("sim.toml"));
        let child = command.stderr(fs::File::create(at("log"))?).spawn()?;
        let agent = Self { child, folder, command: programs.hook.with_file_name("virt-usb") };
        let deadline = Instant::now() + Duration::from_secs(120);
        while !agent.log()?.contains(" ready") {
            ensure!(Instant::now() < deadline, "the agent is not ready: {}", agent.log()?);
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(agent)
    }

    pub(crate) fn process(&self) -> Process {
        Process(self.child.id())
    }

    pub(crate) fn log(&self) -> Result<String> {
        Ok(fs::read_to_string(self.folder.path().join("log"))?)
    }

    pub(crate) fn metric(&self, name: &str) -> Result<f64> {
        let mut socket = UnixStream::connect(self.folder.path().join("metrics"))?;
        socket.write_all(b"GET /metrics HTTP/1.0\r\n\r\n")?;
        let mut text = String::new();
        socket.read_to_string(&mut text)?;
        let line = text.lines().find_map(|l| l.strip_prefix(name)?.trim().parse().ok());
        line.with_context(|| format!("no metric {name}"))
    }

    /// Where its API is served.
    pub(crate) fn address(&self) -> Result<SocketAddr> {
        let deadline = Instant::now() + Duration::from_secs(10);
        loop {
            let log = self.log()?;
            let at = log
                .split_once("the API is served at ")
                .and_then(|(_, rest)| rest.split('/').nth(2));
            if let Some(at) = at.and_then(|at| at.parse().ok()) {
                return Ok(at);
            }
            ensure!(Instant::now() < deadline, "no API: {log}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// A new token for its API.
    pub(crate) fn token(&self, role: &str) -> Result<String> {
        let mut command = Command::new(&self.command);
        command.arg("--config").arg(self.folder.path().join("config.toml"));
        command.args(["--json", "token", "add", role, "--project", "bench", "--role", role]);
        let said = command.output().context("virt-usb token")?;
        ensure!(said.status.success(), "virt-usb token: {}", String::from_utf8_lossy(&said.stderr));
        let made: Value = serde_json::from_slice(&said.stdout)?;
        Ok(made["token"].as_str().context("a token")?.to_owned())
    }
}
