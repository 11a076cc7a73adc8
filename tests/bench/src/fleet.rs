//! The scheduler over a real etcd: 5 000 hosts × 20 devices. From its start to its first answer;
//! its memory; and, while hosts publish and schedulers ask, how late a change is seen and how long
//! an answer takes.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpListener;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use etcd_client::Client;
use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;
use serde_json::{Value, json};
use tempfile::TempDir;
use virt_usb::filter::fleet::{COMMON, Fleet};
use virt_usb_model::{HostDocument, Status};

use crate::daemon::Process;
use crate::nginx::needs_debian;
use crate::program::Programs;
use crate::samples::millis;
use crate::table::Table;

const MADE: Fleet = Fleet { hosts: 5000, devices: 20 };
const PREFIX: &str = "/virt-usb/hosts/";
/// Changes and questions a second, each.
const RATE: u32 = 200;
const TIME: Duration = Duration::from_secs(20);
/// One change in this number is measured.
const WATCHED: u32 = 8;
/// Interval at which a measured change is looked up.
const LOOK: Duration = Duration::from_micros(500);
/// How often a scheduler is started.
const STARTS: usize = 5;

struct Etcd {
    child: Child,
    folder: TempDir,
    endpoint: String,
}

impl Drop for Etcd {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

impl Etcd {
    fn start() -> Result<Self> {
        let folder = tempfile::tempdir()?;
        let port =
            || Ok::<_, anyhow::Error>(TcpListener::bind("127.0.0.1:0")?.local_addr()?.port());
        let (endpoint, peer) =
            (format!("http://127.0.0.1:{}", port()?), format!("http://127.0.0.1:{}", port()?));
        let child = Command::new("etcd")
            .arg("--data-dir")
            .arg(folder.path().join("data"))
            .args(["--listen-client-urls", &endpoint, "--advertise-client-urls", &endpoint])
            .args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer])
            .args(["--name", "one", "--initial-cluster", &format!("one={peer}")])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .map_err(needs_debian("etcd-server"))?;
        Ok(Self { child, folder, endpoint })
    }
}

/// The programs under load run wherever the kernel puts them, the load on the last processor.
fn pin() -> Result<()> {
    let mut last = CpuSet::new();
    last.set(std::thread::available_parallelism()?.get() - 1)?;
    Ok(sched_setaffinity(Pid::from_raw(0), &last)?)
}

struct Scheduler {
    child: Child,
    socket: PathBuf,
    /// From its start to its first answer.
    took: Duration,
}

impl Drop for Scheduler {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

impl Scheduler {
    fn start(programs: &Programs, etcd: &Etcd) -> Result<Self> {
        let at = |name: &str| etcd.folder.path().join(name);
        let socket = at("scheduler.sock");
        drop(std::fs::remove_file(&socket));
        std::fs::write(at("config.toml"), format!("[fleet]\nendpoints = [{:?}]\n", etcd.endpoint))?;
        let began = Instant::now();
        let child = Command::new(programs.hook.with_file_name("virt-usb"))
            .arg("--config")
            .arg(at("config.toml"))
            .arg("scheduler")
            .arg("--socket")
            .arg(&socket)
            .stderr(std::fs::File::create(at("log"))?)
            .spawn()?;
        let mut scheduler = Self { child, socket, took: Duration::ZERO };
        let deadline = began + Duration::from_secs(60);
        loop {
            let known = scheduler.asker().and_then(|mut asker| asker.select()).unwrap_or_default();
            if known["hosts"] == json!(MADE.hosts) {
                scheduler.took = began.elapsed();
                return Ok(scheduler);
            }
            ensure!(
                Instant::now() < deadline,
                "no answer: {}",
                std::fs::read_to_string(at("log"))?
            );
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn asker(&self) -> Result<Asker> {
        Ok(Asker(BufReader::new(UnixStream::connect(&self.socket)?)))
    }

    fn process(&self) -> Process {
        Process(self.child.id())
    }
}

/// A connection that is kept.
struct Asker(BufReader<UnixStream>);

impl Asker {
    fn ask(&mut self, path: &str, body: &Value) -> Result<Value> {
        let body = body.to_string();
        let head = format!(
            "POST {path} HTTP/1.1\r\nHost: bench\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        );
        self.0.get_mut().write_all(head.as_bytes())?;
        let (mut line, mut length) = (String::new(), 0);
        self.0.read_line(&mut line)?;
        ensure!(line.starts_with("HTTP/1.1 200 "), "{path}: {line}");
        while line != "\r\n" {
            line.clear();
            ensure!(self.0.read_line(&mut line)? > 0, "{path}: the answer ends in its head");
            if let Some((name, value)) =
                line.split_once(':').filter(|(n, _)| n.eq_ignore_ascii_case("content-length"))
            {
                length = value.trim().parse().with_context(|| name.to_owned())?;
            }
        }
        let mut body = vec![0; length];
        self.0.read_exact(&mut body)?;
        Ok(serde_json::from_slice(&body)?)
    }

    fn select(&mut self) -> Result<Value> {
        let flavor =
            json!({"usb_devices": [{"vendor_id": COMMON.vendor, "product_id": COMMON.product}]});
        self.ask("/select", &json!({ "flavor": flavor }))
    }

    /// Whether this device of the host is free, as the scheduler knows it.
    fn is_free(&mut self, host: &str, id: u64) -> Result<bool> {
        let flavor = json!({"usb_devices": [{ "id": id }]});
        let said = self.ask("/explain", &json!({ "flavor": flavor, "host": host }))?;
        Ok(said["verdicts"][host]["accepted"] == json!(true))
    }
}

fn at(sorted: &[Duration], share: f64) -> Duration {
    let last = sorted.len().saturating_sub(1);
    sorted.get((last as f64 * share).round() as usize).copied().unwrap_or_default()
}

fn shown(mut all: Vec<Duration>) -> (String, Duration, Duration) {
    all.sort_unstable();
    let (p50, p99) = (at(&all, 0.5), at(&all, 0.99));
    (format!("p50 {}, p99 {} (of {})", millis(p50), millis(p99), all.len()), p50, p99)
}

fn judged(reach: &str, reached: bool) -> String {
    format!("{reach}: {}", if reached { "reached" } else { "NOT REACHED" })
}

pub(crate) fn measure(programs: &Programs, table: &mut Table) -> Result<()> {
    let etcd = Etcd::start()?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let (client, bytes) = runtime.block_on(fill(&etcd))?;
    let mut took = Vec::new();
    for _ in 1..STARTS {
        took.push(Scheduler::start(programs, &etcd)?.took);
    }
    let scheduler = Scheduler::start(programs, &etcd)?;
    took.push(scheduler.took);
    took.sort_unstable();
    let what = format!(
        "scheduler: {} hosts × {} devices, {:.1} MB: from its start to its first answer",
        MADE.hosts,
        MADE.devices,
        bytes as f64 / 1e6
    );
    let cold = at(&took, 0.5);
    table.row(
        &what,
        format!("{} (most {})", millis(cold), millis(at(&took, 1.0))),
        "",
        "",
        &judged("≤ 5 s", at(&took, 1.0) <= Duration::from_secs(5)),
    );
    let (before, used) = (
        scheduler.process().resident()?,
        (scheduler.process().ticks()?, Process(etcd.child.id()).ticks()?),
    );
    let own = Process(std::process::id());
    let own_before = own.ticks()?;
    let (lags, puts, answers) = load(&runtime, client, &scheduler)?;
    let seconds = TIME.as_secs_f64();
    let share = |after: f64, before: f64| (after - before) / seconds;
    let (ours, theirs, load) = (
        share(scheduler.process().ticks()?, used.0),
        share(Process(etcd.child.id()).ticks()?, used.1),
        share(own.ticks()?, own_before),
    );
    let after = scheduler.process().resident()?;
    let (text, p50, p99) = shown(lags);
    let (put, put50, _) = shown(puts);
    let reached = p50 <= Duration::from_millis(10) && p99 <= Duration::from_millis(100);
    let ratio = format!("{:.2} × (p50)", crate::table::ratio(p50, put50));
    table.row(
        &format!("from a host's word to etcd until the scheduler counts with it, {RATE} changes/s"),
        text,
        &format!("until etcd has confirmed it: {put}"),
        &ratio,
        &judged("p50 ≤ 10 ms, p99 ≤ 100 ms", reached),
    );
    let (text, _, p99) = shown(answers);
    table.row(
        &format!("/select over the unix socket, {RATE}/s meanwhile"),
        text,
        "",
        "",
        &judged("p99 ≤ 5 ms", p99 <= Duration::from_millis(5)),
    );
    table.row(
        "its resident memory: ready, and after that",
        format!("{before:.0} MiB, {after:.0} MiB"),
        "",
        "",
        &judged("≤ 400 MiB", after <= 400.0),
    );
    table.row(
        "processors in use meanwhile",
        format!("the scheduler {ours:.1} %"),
        &format!(
            "etcd {theirs:.1} %, the load itself {load:.1} % (on one processor of its own choice)"
        ),
        "",
        "",
    );
    Ok(())
}

/// Puts all documents, as agents publish them; returns how many bytes those are.
async fn fill(etcd: &Etcd) -> Result<(Client, usize)> {
    let deadline = Instant::now() + Duration::from_secs(30);
    let mut client = Client::connect([&etcd.endpoint], None).await?;
    while client.get("x", None).await.is_err() {
        ensure!(Instant::now() < deadline, "etcd does not answer");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let mut bytes = 0;
    for first in (0..MADE.hosts).step_by(100) {
        let puts: Vec<_> = (first..MADE.hosts.min(first + 100))
            .map(|host| {
                let text = MADE.document(host).published(1 << 20).text;
                bytes += text.len();
                etcd_client::TxnOp::put(format!("{PREFIX}{}", Fleet::name(host)), text, None)
            })
            .collect();
        client.txn(etcd_client::Txn::new().and_then(puts)).await?;
    }
    Ok((client, bytes))
}

type Times = Vec<Duration>;

/// Hosts publish, and schedulers ask. Returns how late changes were seen, how late etcd confirmed
/// them, and how long answers took.
fn load(
    runtime: &tokio::runtime::Runtime,
    mut client: Client,
    scheduler: &Scheduler,
) -> Result<(Times, Times, Times)> {
    let ended = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let asking = scope.spawn(|| {
            pin()?;
            let mut asker = scheduler.asker()?;
            let (mut took, began) = (Times::new(), Instant::now());
            while !ended.load(Ordering::Relaxed) {
                let due = began + Duration::from_secs(1) / RATE * u32::try_from(took.len())?;
                std::thread::sleep(due.saturating_duration_since(Instant::now()));
                // From when it should have been asked: a slow answer delays the questions after it.
                asker.select()?;
                took.push(due.elapsed());
            }
            Ok::<_, anyhow::Error>(took)
        });
        let (tell, told) = std::sync::mpsc::channel::<(String, u64, bool, Instant)>();
        let watching = scope.spawn(move || {
            pin()?;
            let mut asker = scheduler.asker()?;
            let mut lags = Times::new();
            for (host, id, free, put) in told {
                while asker.is_free(&host, id)? != free {
                    ensure!(put.elapsed() < Duration::from_secs(10), "{host} is not seen");
                    std::thread::sleep(LOOK);
                }
                lags.push(put.elapsed());
            }
            Ok::<_, anyhow::Error>(lags)
        });
        let publishing = || {
            pin()?;
            let (mut puts, began) = (Times::new(), Instant::now());
            let mut number = 0u32;
            while began.elapsed() < TIME {
                let due = began + Duration::from_secs(1) / RATE * number;
                std::thread::sleep(due.saturating_duration_since(Instant::now()));
                // All in turn, far apart from each other.
                let host = number * 7919 % MADE.hosts;
                let (name, document, id, free) = changed(host, number / MADE.hosts)?;
                let put = Instant::now();
                if number.is_multiple_of(WATCHED) {
                    tell.send((name.clone(), id, free, put))?;
                }
                runtime.block_on(client.put(format!("{PREFIX}{name}"), document, None))?;
                puts.push(put.elapsed());
                number += 1;
            }
            drop(tell);
            Ok::<_, anyhow::Error>(puts)
        };
        let puts = publishing();
        ended.store(true, Ordering::Relaxed);
        let fault = |_| anyhow::anyhow!("a thread of the load");
        let lags = watching.join().map_err(fault)??;
        let answers = asking.join().map_err(fault)??;
        Ok((lags, puts?, answers))
    })
}

/// The host's document with its first device in the other state: its name, its text, the device,
/// whether that is free now.
fn changed(host: u32, round: u32) -> Result<(String, String, u64, bool)> {
    let document = MADE.document(host);
    let mut devices = document.devices;
    let first = devices.first_mut().context("a device")?;
    let was = first.status == Status::Available.name();
    let free = was != round.is_multiple_of(2);
    first.status = if free { Status::Available } else { Status::Allocated }.name().to_owned();
    let id = first.id.get();
    let document = HostDocument::new(
        document.host.clone(),
        document.compute_node_id,
        u64::from(round) + 2,
        devices,
    );
    Ok((document.host.clone(), document.published(1 << 20).text, id, free))
}
