//! Guests about which libvirt does not answer: they do not delay other guests, and they are
//! reported.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test's helpers fail the test")]

use std::fmt::Write as _;
use std::fs::File;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use virt_usb_suite::{Host, PROGRAM_TIMEOUT, device, ok, program};

struct Agent(Child);

impl Agent {
    fn start(host: &Host) -> Self {
        let log = File::options().append(true).create(true).open(host.path("agent.log")).unwrap();
        let mut command = Command::new(program("virt-usbd"));
        command.arg("--config").arg(host.config_file()).arg("--sim").arg(host.path("sim.toml"));
        Self(command.stderr(log).spawn().unwrap())
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

fn show(host: &Host, text: &str) {
    std::fs::write(host.path("sim.new"), text).unwrap();
    std::fs::rename(host.path("sim.new"), host.path("sim.toml")).unwrap();
}

fn uuid(n: usize) -> String {
    format!("{n:08}-2222-4333-8444-555555555555")
}

/// A guest that asks for the device of its number.
fn guest(n: usize, more: &str) -> String {
    let flavor = format!(r#"{{"usb_devices":[{{"serial":"S{n}"}}]}}"#);
    format!("[[domain]]\nname = 'guest{n}'\nuuid = '{}'\nflavor = '{flavor}'\n{more}\n", uuid(n))
}

fn key(n: usize) -> String {
    device(
        "0001",
        &format!("1-{}", n + 1),
        u8::try_from(n + 1).unwrap(),
        &format!("serial = 'S{n}'"),
    )
}

fn log(host: &Host) -> String {
    std::fs::read_to_string(host.path("agent.log")).unwrap_or_default()
}

fn is_allocated(host: &Host, n: usize) -> bool {
    let line = format!("guest{n} {} allocated", uuid(n));
    host.claims().lines().any(|claim| claim.contains(&line))
}

fn wait(host: &Host, what: &str, look: impl Fn() -> bool) {
    let deadline = Instant::now() + PROGRAM_TIMEOUT;
    while !look() {
        assert!(Instant::now() < deadline, "never: {what}\n{}\n{}", host.claims(), log(host));
        std::thread::sleep(Duration::from_millis(10));
    }
}

const PATIENT: &str = "libvirt_timeout = 6\nmetrics = 'METRICS'\n";

fn host() -> Host {
    let host = Host::new("");
    let metrics = PATIENT.replace("METRICS", host.path("metrics.sock").to_str().unwrap());
    let config = std::fs::read_to_string(host.config_file()).unwrap();
    std::fs::write(host.config_file(), config + &metrics).unwrap();
    host
}

#[test]
fn guests_that_hang_block_no_other_guest() {
    // One more, and libvirt would be asked nothing: see `MAX_SILENT_GUESTS` in supervised.rs.
    const HUNG: usize = 11;
    let host = host();
    let keys: String = (0..=HUNG).map(key).collect();
    let hung = |more: &str| {
        (1..=HUNG).fold(String::new(), |mut all, n| {
            let _ = write!(all, "{}", guest(n, more));
            all
        })
    };
    show(&host, &(keys.clone() + &hung("hangs = true")));
    let agent = Agent::start(&host);
    wait(&host, "calls are unanswered", || {
        log(&host).contains("libvirt has not answered about guest")
    });
    // A healthy one among them has its device while they hang.
    show(&host, &(keys.clone() + &hung("hangs = true") + &guest(0, "")));
    wait(&host, "the healthy one is served", || is_allocated(&host, 0));
    assert!((1..=HUNG).all(|n| !is_allocated(&host, n)));
    // It is said of a guest that is waited for.
    wait(&host, "a problem is noted", || {
        let claims = ok(&host.virt_usb(&["claims"]));
        claims.contains("libvirt has not answered about guest")
            && claims.contains("virsh domcontrol guest")
    });
    let doctor = host.virt_usb(&["doctor", "--json"]);
    let doctor = String::from_utf8(doctor.stdout).unwrap();
    assert!(doctor.contains("libvirt has not answered about guest"), "{doctor}");
    // They go on, all of them, by themselves.
    show(&host, &(keys + &hung("") + &guest(0, "")));
    wait(&host, "all are served", || (0..=HUNG).all(|n| is_allocated(&host, n)));
    wait(&host, "no problem is left", || host.store().problems().unwrap().is_empty());
    drop(agent);
}

#[test]
fn a_locked_domain_blocks_no_other_guest() {
    let host = host();
    let keys: String = (1..=3).map(key).collect();
    let locked = guest(1, "locked = true");
    show(&host, &(keys.clone() + &guest(1, "") + &guest(2, "")));
    let agent = Agent::start(&host);
    wait(&host, "both are served", || is_allocated(&host, 1) && is_allocated(&host, 2));
    let servers = || ok(&host.virt_usb(&["claims", "--json"]));
    assert!(servers().contains("guest1"));
    // What is asked about the first waits, and so do lists.
    show(&host, &(keys.clone() + &locked + &guest(2, "")));
    wait(&host, "it is seen", || log(&host).contains("not answered about"));
    show(&host, &(keys.clone() + &locked + &guest(2, "") + &guest(3, "")));
    wait(&host, "the third is served", || is_allocated(&host, 3));
    // The key of the second is unplugged and comes back.
    show(&host, &(key(1) + &key(3) + &locked + &guest(2, "") + &guest(3, "")));
    wait(&host, "it is removed", || !is_allocated(&host, 2));
    show(&host, &(keys + &locked + &guest(2, "") + &guest(3, "")));
    wait(&host, "it is back", || is_allocated(&host, 2));
    assert!(is_allocated(&host, 1), "what is not known has not changed");
    drop(agent);
}

#[test]
fn an_agent_ends_though_libvirt_does_not_answer() {
    let host = host();
    show(&host, &(key(1) + &guest(1, "hangs = true")));
    let mut agent = Agent::start(&host);
    wait(&host, "a call is unanswered", || {
        log(&host).contains("libvirt has not answered about guest1")
    });
    assert!(
        Command::new("kill").args(["-TERM", &agent.0.id().to_string()]).status().unwrap().success()
    );
    assert_eq!(agent.0.wait().unwrap().code(), Some(0));
    assert!(log(&host).contains("stopped"), "{}", log(&host));
}

/// Nova's hard reboot undefines a domain and defines it again, and libvirt may be unreachable in
/// between.
#[test]
fn a_domain_that_is_defined_again_keeps_what_is_assigned_to_it() {
    let host = host();
    let config = std::fs::read_to_string(host.config_file()).unwrap();
    std::fs::write(host.config_file(), config + "undefined_grace = 15\nabsent_grace = 1\n")
        .unwrap();
    let off = || guest(1, "running = false");
    show(&host, &(key(1) + &key(2) + &off()));
    let agent = Agent::start(&host);
    wait(&host, "the agent is ready", || log(&host).contains("ready"));
    let assigned = || host.store().assignments(uuid(1).parse().unwrap()).unwrap().len();
    let context = virt_usb_config::host_env::context(&host.config(), "test").unwrap();
    let claimant = host.store().claimant(uuid(1).parse().unwrap(), "guest1", None).unwrap();
    let request =
        virt_usb_model::Flavor::parse(r#"{"usb_devices":[{"serial":"S2"}]}"#).unwrap().usb_devices;
    host.store().assign_more(&claimant, &request, &context).unwrap().unwrap();
    for _ in 0..3 {
        show(&host, &(key(1) + &key(2)));
        std::thread::sleep(Duration::from_millis(1500));
        show(&host, &(key(1) + &key(2) + &off()));
        std::thread::sleep(Duration::from_millis(1500));
    }
    assert_eq!(assigned(), 1, "{}", log(&host));
    show(&host, &(key(1) + &key(2)));
    wait(&host, "it ends with the domain", || assigned() == 0);
    drop(agent);
}
