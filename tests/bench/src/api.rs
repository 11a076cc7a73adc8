//! Measures the API of an agent: under wrk, in turn with nginx, which serves the same bytes from a
//! file; 10 000 devices in pages; idle.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use tempfile::TempDir;

use crate::daemon::{Agent, Process};
use crate::nginx::{Nginx, needs_debian};
use crate::program::Programs;
use crate::samples::{Samples, millis};
use crate::table::Table;
use crate::world::{Devices, simulation};

/// Number of devices of the host in the requests.
const FEW: usize = 64;
/// Number of listed devices.
const MANY: usize = 10_000;
/// Maximum number of devices in a page.
const PAGE: usize = 1000;
const CONNECTIONS: usize = 32;
/// File that the yardstick serves.
const BODY: &str = "host.json";
/// Number of rounds for each server; a round takes [`SECONDS`].
const ROUNDS: usize = 5;
const SECONDS: u32 = 3;
/// Number of reads of all devices to warm up. [`HALF`] reads follow twice, by [`READERS`] readers.
const WARM_UP: usize = 10;
const HALF: usize = 15;
const READERS: usize = 8;
/// Time for which the agent is idle.
const IDLE: Duration = Duration::from_secs(20);

pub(crate) fn measure(programs: &Programs, table: &mut Table) -> Result<()> {
    load(programs, table)?;
    pages(programs, table)?;
    idle(programs, table)
}

/// Path of the request: the host with its devices.
fn host() -> Result<String> {
    Ok(format!(
        "/v2.1/os-hypervisors/{}",
        std::fs::read_to_string("/proc/sys/kernel/hostname")?.trim()
    ))
}

/// Reports whether the program is there.
fn judged(reach: &str, reached: bool) -> String {
    format!("{reach}: {}", if reached { "reached" } else { "NOT REACHED" })
}

fn load(programs: &Programs, table: &mut Table) -> Result<()> {
    let plain = Setting::new(programs, None)?;
    let (admin, body) = plain.compare_own("admin", ROUNDS)?;
    let what = format!("API: a host with {FEW} devices, {CONNECTIONS} connections");
    let reached = admin.ours.rate() >= 5000.0 && admin.ratio() >= 1.0 / 3.0;
    admin.row(table, &what, &judged("≥ 5 000/s, ≥ 1 / 3", reached));
    admin.rows_of_detail(table);
    plain.compare_own("member", 3)?.0.row(table, "the same, a member asks", "");
    drop(plain);
    let folder = tempfile::tempdir()?;
    let certificate = certify(&folder)?;
    // Its devices are the same, seen some seconds later.
    let encrypted = Setting::new(programs, Some(&certificate))?;
    let encrypted = encrypted.compare(&encrypted.agent.token("admin")?, 3, &body)?;
    encrypted.row(table, "the same over TLS", "");
    Ok(())
}

/// Files of a certificate and its key.
type Certificate = (PathBuf, PathBuf);

fn certify(folder: &TempDir) -> Result<Certificate> {
    let (certificate, key) = (folder.path().join("api.crt"), folder.path().join("api.key"));
    let mut command = Command::new("openssl");
    command.args([
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:prime256v1",
        "-nodes",
    ]);
    command
        .args(["-days", "2", "-subj", "/CN=virt-usb bench", "-keyout"])
        .arg(&key)
        .arg("-out")
        .arg(&certificate);
    let said = command.output().map_err(needs_debian("openssl"))?;
    ensure!(said.status.success(), "openssl: {}", String::from_utf8_lossy(&said.stderr));
    Ok((certificate, key))
}

/// The API and the yardstick, each with a worker for each processor.
struct Setting {
    agent: Agent,
    nginx: Nginx,
    scheme: &'static str,
    /// Threads of the load generator.
    threads: usize,
}

impl Setting {
    fn new(programs: &Programs, certificate: Option<&Certificate>) -> Result<Self> {
        let mut keys = "api = \"127.0.0.1:0\"\n".to_owned();
        if let Some((certificate, key)) = certificate {
            keys += &format!("api_certificate = {certificate:?}\napi_key = {key:?}\n");
        }
        let threads = std::thread::available_parallelism()?.get();
        Ok(Self {
            agent: Agent::start(programs, &simulation(FEW, Devices::Kinds(20)), &keys)?,
            nginx: Nginx::start(
                threads,
                certificate.map(|(certificate, key)| (certificate.as_path(), key.as_path())),
            )?,
            scheme: if certificate.is_some() { "https" } else { "http" },
            threads,
        })
    }

    /// The same for a response that the API computes; with the response.
    fn compare_own(&self, role: &str, rounds: usize) -> Result<(Compared, String)> {
        let token = self.agent.token(role)?;
        let body = Reader::open(&self.agent, &token)?.get(&host()?)?;
        ensure!(body.matches("\"compute_node_id\"").count() == FEW, "not {FEW} devices: {body}");
        Ok((self.compare(&token, rounds, &body)?, body))
    }

    /// Measures in turn, so that other load on the machine affects both.
    fn compare(&self, token: &str, rounds: usize, body: &str) -> Result<Compared> {
        self.nginx.put(BODY, body.as_bytes())?;
        let (api, workers) = ([self.agent.process()], self.nginx.workers()?);
        let (mut ours, mut nginx) = (Load::default(), Load::default());
        for _ in 0..rounds {
            ours.push(self.wrk(self.agent.address()?, &host()?, Some(token), &api)?);
            nginx.push(self.wrk(self.nginx.address(), &format!("/{BODY}"), None, &workers)?);
        }
        Ok(Compared { ours, nginx, bytes: body.len() })
    }

    fn wrk(
        &self,
        at: SocketAddr,
        path: &str,
        token: Option<&str>,
        serving: &[Process],
    ) -> Result<Round> {
        let mut command = Command::new("wrk");
        command.args(["-c", &CONNECTIONS.to_string(), "-t", &self.threads.to_string()]);
        command.args(["-d", &format!("{SECONDS}s"), "-s"]);
        command.arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("wrk.lua"));
        if let Some(token) = token {
            command.args(["-H", &format!("X-Auth-Token: {token}")]);
        }
        let ticks = || serving.iter().map(|process| process.ticks()).sum::<Result<f64>>();
        let before = ticks()?;
        let said = command
            .arg(format!("{}://{at}{path}", self.scheme))
            .output()
            .map_err(needs_debian("wrk"))?;
        let used = ticks()? - before;
        let text = String::from_utf8_lossy(&said.stdout).into_owned()
            + &String::from_utf8_lossy(&said.stderr);
        let figures = text.lines().find_map(|line| line.strip_prefix("figures "));
        let figures: Vec<f64> =
            figures.unwrap_or_default().split(' ').flat_map(str::parse).collect();
        let [requests, micros, p50, p99, errors] = figures[..] else {
            anyhow::bail!("wrk: {text}")
        };
        ensure!(errors == 0.0, "not all was answered: {text}");
        Ok(Round { rate: requests / micros * 1e6, p50, p99, each: used * 1e4 / requests })
    }
}

/// Result of wrk; times in microseconds.
struct Round {
    /// Requests per second.
    rate: f64,
    p50: f64,
    p99: f64,
    /// Processor time of the server per request.
    each: f64,
}

#[derive(Default)]
struct Load(Vec<Round>);

impl Load {
    fn push(&mut self, round: Round) {
        self.0.push(round);
    }

    fn median(&self, of: impl Fn(&Round) -> f64) -> f64 {
        let mut all: Vec<f64> = self.0.iter().map(of).collect();
        all.sort_unstable_by(f64::total_cmp);
        all.get(all.len() / 2).copied().unwrap_or_default()
    }

    fn rate(&self) -> f64 {
        self.median(|round| round.rate)
    }

    fn most(&self) -> f64 {
        self.0.iter().map(|round| round.rate).fold(0.0, f64::max)
    }

    fn rates(&self) -> String {
        format!("{:.0}/s (most {:.0})", self.rate(), self.most())
    }

    fn latencies(&self) -> String {
        format!(
            "p50 {:.2} ms, p99 {:.2} ms",
            self.median(|r| r.p50) / 1e3,
            self.median(|r| r.p99) / 1e3
        )
    }
}

struct Compared {
    ours: Load,
    nginx: Load,
    /// Size of the body, in bytes.
    bytes: usize,
}

impl Compared {
    /// The API's value as a multiple of nginx's.
    fn times(&self, what: impl Fn(&Round) -> f64) -> f64 {
        self.ours.median(&what) / self.nginx.median(&what)
    }

    fn ratio(&self) -> f64 {
        self.times(|round| round.rate)
    }

    fn row(&self, table: &mut Table, what: &str, reach: &str) {
        let Self { ours, nginx, bytes } = self;
        let what = format!("{what}: {:.1} kB", *bytes as f64 / 1e3);
        let ratio = format!("{:.2} × (most {:.2} ×)", self.ratio(), ours.most() / nginx.most());
        table.row(&what, ours.rates(), &format!("nginx, a file: {}", nginx.rates()), &ratio, reach);
    }

    fn rows_of_detail(&self, table: &mut Table) {
        let Self { ours, nginx, .. } = self;
        let ratio = format!("{:.2} ×, {:.2} ×", self.times(|r| r.p50), self.times(|r| r.p99));
        table.row("until the answer", ours.latencies(), &nginx.latencies(), &ratio, "");
        let each = |load: &Load| format!("{:.1} µs", load.median(|round| round.each));
        let ratio = format!("{:.2} ×", self.times(|r| r.each));
        table.row("the server's processor time for one", each(ours), &each(nginx), &ratio, "");
    }
}

/// A persistent connection.
struct Reader {
    stream: BufReader<TcpStream>,
    token: String,
}

impl Reader {
    fn open(agent: &Agent, token: &str) -> Result<Self> {
        let stream = TcpStream::connect(agent.address()?)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(Duration::from_secs(30)))?;
        Ok(Self { stream: BufReader::with_capacity(1 << 16, stream), token: token.to_owned() })
    }

    fn get(&mut self, path: &str) -> Result<String> {
        let head =
            format!("GET {path} HTTP/1.1\r\nHost: bench\r\nX-Auth-Token: {}\r\n\r\n", self.token);
        self.stream.get_mut().write_all(head.as_bytes())?;
        let (mut line, mut length) = (String::new(), 0);
        self.stream.read_line(&mut line)?;
        ensure!(line.starts_with("HTTP/1.1 200 "), "GET {path}: {line}");
        while line != "\r\n" {
            line.clear();
            ensure!(
                self.stream.read_line(&mut line)? > 0,
                "GET {path}: the answer ends in its head"
            );
            if let Some((name, value)) =
                line.split_once(':').filter(|(name, _)| name.eq_ignore_ascii_case("content-length"))
            {
                length = value.trim().parse().with_context(|| name.to_owned())?;
            }
        }
        let mut body = vec![0; length];
        self.stream.read_exact(&mut body)?;
        Ok(String::from_utf8(body)?)
    }

    /// Reads all devices page by page, and returns the time of each full page.
    fn walk(&mut self, samples: &mut Samples) -> Result<()> {
        let (mut next, mut found) = (Some(format!("/v2.1/os-usb-devices?limit={PAGE}")), 0);
        while let Some(path) = next {
            let began = Instant::now();
            let body = self.get(&path)?;
            samples.push(began.elapsed());
            found += body.matches("\"compute_node_id\"").count();
            next = body
                .rsplit_once("\"href\":\"")
                .and_then(|(_, link)| Some(link.split_once('"')?.0.to_owned()));
        }
        ensure!(found == MANY, "{found} devices were listed");
        Ok(())
    }
}

fn pages(programs: &Programs, table: &mut Table) -> Result<()> {
    let agent =
        Agent::start(programs, &simulation(MANY, Devices::Kinds(20)), "api = \"127.0.0.1:0\"\n")?;
    let token = agent.token("admin")?;
    let mut memory = vec![agent.process().resident()?];
    let (mut full, mut single) = (Samples::default(), Samples::default());
    let mut reader = Reader::open(&agent, &token)?;
    for _ in 0..WARM_UP {
        reader.walk(&mut full)?;
    }
    for marker in (1..=MANY).step_by(10) {
        let path = format!("/v2.1/os-usb-devices?limit=1&marker={marker}");
        let began = Instant::now();
        reader.get(&path)?;
        single.push(began.elapsed());
    }
    // Once by all readers at once, so that each of their connections has had its memory.
    for walks in [1, HALF, HALF] {
        std::thread::scope(|scope| {
            let readers: Vec<_> = (0..READERS)
                .map(|_| {
                    scope.spawn(|| {
                        let mut reader = Reader::open(&agent, &token)?;
                        (0..walks).try_for_each(|_| reader.walk(&mut Samples::default()))
                    })
                })
                .collect();
            readers
                .into_iter()
                .try_for_each(|reader| reader.join().unwrap_or_else(|_| anyhow::bail!("a reader")))
        })?;
        memory.push(agent.process().resident()?);
    }
    let [ready, before, half, after] = memory[..] else { anyhow::bail!("{memory:?}") };
    let listed = 2 * HALF * READERS;
    table.row(
        &format!(
            "API: {MANY} devices listed {listed} times in pages of {PAGE}, {READERS} at once: \
                resident memory"
        ),
        format!("before {before:.1} MiB, half way {half:.1} MiB, after {after:.1} MiB"),
        &format!("before the first page: {ready:.1} MiB"),
        &format!("{:.2} ×", after / before),
        &judged("no growth (≤ 1.05 ×)", after <= before * 1.05),
    );
    let ratio = format!("1 / {:.0}", crate::table::ratio(full.median(), single.median()));
    table.row("a page of 1000 of them, one reader", &full, "", "", "");
    table.row(
        "a page of 1 of them, wherever it begins",
        &single,
        &format!("a page of 1000: {}", millis(full.median())),
        &ratio,
        "",
    );
    Ok(())
}

fn idle(programs: &Programs, table: &mut Table) -> Result<()> {
    let start = |api: &str| {
        let keys = format!("api = {api:?}\nscan_interval = 60\n");
        Agent::start(programs, &simulation(FEW, Devices::Kinds(20)), &keys)
    };
    let (with, without) = (start("127.0.0.1:0")?, start("off")?);
    let token = with.token("admin")?;
    let ask = |reader: &mut Reader| reader.get("/v2.1/os-hypervisors").map(drop);
    let mut readers =
        (0..CONNECTIONS).map(|_| Reader::open(&with, &token)).collect::<Result<Vec<_>>>()?;
    readers.iter_mut().try_for_each(ask)?;
    std::thread::sleep(Duration::from_secs(5));
    let ticks = || Ok::<_, anyhow::Error>((with.process().ticks()?, without.process().ticks()?));
    let (threads, all) = (with.process().used("api")?, ticks()?);
    std::thread::sleep(IDLE);
    let (threads_after, all_after) = (with.process().used("api")?, ticks()?);
    // They were open all the while.
    readers.iter_mut().try_for_each(ask)?;
    let threads = threads_after.saturating_sub(threads);
    let (all, off) = ((all_after.0 - all.0) * 10.0, (all_after.1 - all.1) * 10.0);
    table.row(
        &format!(
            "API: processor in {} s, {CONNECTIONS} connections open and nothing asked",
            IDLE.as_secs()
        ),
        format!("{} by its threads, {all:.0} ms by the whole agent", millis(threads)),
        &format!("an agent without the API: {off:.0} ms"),
        "",
        &judged("none (< 1 ms)", threads < Duration::from_millis(1)),
    );
    Ok(())
}
