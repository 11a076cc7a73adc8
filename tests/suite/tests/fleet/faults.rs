//! Simulated fleets: two hundred hosts, and faults of etcd.

use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use virt_usb_suite::{Etcd, program, root};

use crate::common::ok;

fn simulate(folder: &Path, endpoints: &[String], seed: u64, arguments: &[&str]) -> Command {
    let config = folder.join("config.toml");
    let state = folder.join("state");
    let text = format!("state_dir = {state:?}\n[fleet]\nendpoints = {endpoints:?}\nlease = 15\n");
    std::fs::write(&config, text).unwrap();
    let mut command = Command::new(program("virt-usb"));
    command.arg("--json").arg("--config").arg(&config);
    command.args(["fleet", "simulate", "--seed", &seed.to_string()]);
    command
        .arg("--component")
        .arg(root().join("target/release/virt-usb-filter.wasm"))
        .args(arguments);
    command
}

/// Asserts that all invariants held and that something happened.
fn held_all(output: &Output) -> Value {
    let report: Value =
        serde_json::from_slice(&output.stdout).unwrap_or_else(|e| panic!("{e}: {output:?}"));
    assert!(output.status.success() && report["broken"] == json!([]), "{report:#}");
    for what in ["started", "stopped", "plugged in", "unplugged"] {
        assert!(
            report["done"][what].as_u64().unwrap_or_default() > 0,
            "nothing was {what}: {report:#}"
        );
    }
    report
}

#[test]
fn two_hundred_hosts_and_what_must_hold() {
    let etcd = Etcd::new();
    let arguments = ["--hosts", "200", "--devices", "20", "--churn", "100", "--time", "15"];
    let output = simulate(etcd.path(), &[etcd.endpoint()], 1, &arguments).output().unwrap();
    let report = held_all(&output);
    assert!(report["done"]["host stopped"].as_u64().unwrap_or_default() > 0, "{report:#}");
    let left = ok(&etcd.etcdctl(&["get", "--prefix", "--keys-only", "/"]));
    assert_eq!(left.trim(), "", "nothing is left of it");
}

/// Faults of a cluster, one after another, from a seed.
struct Faults {
    members: Vec<Etcd>,
    dice: u64,
}

impl Faults {
    fn roll(&mut self, sides: u64) -> usize {
        self.dice = self
            .dice
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        usize::try_from((self.dice >> 33) % sides).unwrap()
    }

    /// Asks any member that answers.
    fn etcdctl(&self, arguments: &[&str]) -> String {
        let mut last = String::new();
        for member in self.members.iter().cycle().take(30) {
            let output = member.etcdctl_within("3s", arguments);
            if output.status.success() {
                return String::from_utf8(output.stdout).unwrap();
            }
            last = format!("{output:?}");
            std::thread::sleep(Duration::from_millis(100));
        }
        panic!("{arguments:?}: {last}");
    }

    fn leader(&self) -> usize {
        for (n, member) in self.members.iter().enumerate() {
            let output = member.etcdctl(&["endpoint", "status", "-w", "json"]);
            let Ok(answer) = serde_json::from_slice::<Value>(&output.stdout) else { continue };
            let status = &answer[0]["Status"];
            if status["leader"].is_u64() && status["leader"] == status["header"]["member_id"] {
                return n;
            }
        }
        0
    }

    /// Does the fault of that number; returns what it was.
    fn fault(&mut self, number: usize) -> &'static str {
        let pause = |ms| std::thread::sleep(Duration::from_millis(ms));
        match number {
            0 => {
                let leader = self.leader();
                self.members[leader].kill();
                pause(1500);
                self.members[leader].start();
                "the leader was killed"
            }
            1 => {
                let which = self.roll(3);
                self.members[which].signal("-STOP");
                pause(3000);
                self.members[which].signal("-CONT");
                "a member was paused"
            }
            2 => {
                self.compact();
                "the history was compacted"
            }
            _ => {
                self.fill();
                pause(1500);
                self.etcdctl(&["del", "--prefix", "junk/"]);
                self.compact();
                for member in &self.members {
                    ok(&member.etcdctl(&["defrag"]));
                }
                self.etcdctl(&["alarm", "disarm"]);
                "the quota was exceeded"
            }
        }
    }

    /// Until etcd takes nothing more.
    fn fill(&self) {
        let junk = "x".repeat(100_000);
        for n in 0..400 {
            let put = self.members[n % 3].etcdctl(&["put", &format!("junk/{n}"), &junk]);
            if String::from_utf8_lossy(&put.stderr).contains("database space exceeded") {
                return;
            }
        }
        panic!("the quota is too large");
    }

    fn compact(&self) {
        let answer: Value =
            serde_json::from_str(&self.etcdctl(&["get", "x", "-w", "json"])).unwrap();
        let revision = answer["header"]["revision"].as_u64().unwrap();
        self.etcdctl(&["compact", &revision.to_string()]);
    }
}

/// `FLEET_ROUNDS` rounds (1), each of another seed from `FLEET_SEED` (1) on.
#[test]
fn faults_of_etcd_lose_no_document_and_put_no_device_in_two_guests() {
    let number =
        |name: &str| std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(1u64);
    for seed in number("FLEET_SEED")..number("FLEET_SEED") + number("FLEET_ROUNDS") {
        let members = Etcd::cluster(3, &["--quota-backend-bytes=16777216".to_owned()]);
        let endpoints: Vec<String> = members.iter().map(Etcd::endpoint).collect();
        let folder = tempfile::tempdir().unwrap();
        let arguments = ["--hosts", "30", "--devices", "12", "--churn", "40", "--time", "45"];
        let mut command = simulate(folder.path(), &endpoints, seed, &arguments);
        let simulation = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        std::thread::sleep(Duration::from_secs(5));
        let mut faults = Faults { members, dice: seed };
        let (began, first, mut seen) = (Instant::now(), faults.roll(4), Vec::new());
        // Each once, beginning with another one each time; then by the dice.
        for round in 0.. {
            let number = if round < 4 { (round + first) % 4 } else { faults.roll(4) };
            seen.push(faults.fault(number));
            std::thread::sleep(Duration::from_millis(500));
            if round >= 3 && began.elapsed() > Duration::from_secs(20) {
                break;
            }
        }
        let output = simulation.wait_with_output().unwrap();
        let report = held_all(&output);
        println!("seed {seed}: {}; {} documents", seen.join(", "), report["documents"]);
    }
}
