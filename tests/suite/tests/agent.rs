//! The agent as a process: `--sim` is all of it but libusb and libvirt.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test's helpers fail the test")]

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use virt_usb_suite::{Host, PROGRAM_TIMEOUT, device, domain, ok, program, text};

const ERP: &str = "11111111-2222-4333-8444-555555555555";
const CRM: &str = "99999999-2222-4333-8444-555555555555";

struct Agent<'a> {
    host: &'a Host,
    child: Child,
}

fn guest(name: &str, uuid: &str, more: &str) -> String {
    let flavor = r#"{"usb_devices":[{"vendor_id":"0529"}]}"#;
    format!("[[domain]]\nname = '{name}'\nuuid = '{uuid}'\nflavor = '{flavor}'\n{more}\n")
}

fn show(host: &Host, text: &str) {
    // A reader sees the old file or the new one.
    std::fs::write(host.path("sim.new"), text).unwrap();
    std::fs::rename(host.path("sim.new"), host.path("sim.toml")).unwrap();
}

fn command(host: &Host) -> Command {
    let mut command = Command::new(program("virt-usbd"));
    command.arg("--config").arg(host.config_file()).arg("--sim").arg(host.path("sim.toml"));
    command
}

impl<'a> Agent<'a> {
    fn start(host: &'a Host) -> Self {
        let log = File::options().append(true).create(true).open(host.path("agent.log")).unwrap();
        Self { host, child: command(host).stderr(log).spawn().unwrap() }
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.host.path("agent.log")).unwrap_or_default()
    }

    fn signal(&self, signal: &str) {
        let sent =
            Command::new("kill").arg(signal).arg(self.child.id().to_string()).status().unwrap();
        assert!(sent.success());
    }

    fn until(&self, what: &str, mut look: impl FnMut() -> bool) {
        let deadline = Instant::now() + PROGRAM_TIMEOUT;
        while !look() {
            assert!(
                Instant::now() < deadline,
                "never: {what}\n{}\n{}",
                self.host.claims(),
                self.log()
            );
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    fn claims(&self, wanted: &str) {
        self.until(wanted, || self.host.claims() == wanted);
    }
}

impl Drop for Agent<'_> {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

fn held(device: u32, name: &str, uuid: &str, state: &str) -> String {
    format!("device {device} {name} {uuid} {state} hold=running\n")
}

#[test]
fn a_key_goes_from_guest_to_guest() {
    let host = Host::new("");
    let key = device("0001", "1-1", 5, "serial = 'HL-1'");
    show(&host, &(key.clone() + &guest("erp", ERP, "")));
    let agent = Agent::start(&host);
    agent.claims(&held(1, "erp", ERP, "allocated"));
    // A second taker does not start, and the first keeps it.
    show(&host, &(key.clone() + &guest("erp", ERP, "") + &guest("crm", CRM, "")));
    agent.until("crm is refused", || {
        agent.log().contains("does not start: crm: crm asks for usb_devices[0]")
    });
    assert_eq!(host.claims(), held(1, "erp", ERP, "allocated"));
    // Unplugged: the claim outlives the device. Back in another port: attached again, the same id.
    show(&host, &guest("erp", ERP, ""));
    agent.until("it is removed", || host.store().devices().unwrap()[0].entry.status == "removed");
    show(&host, &(device("0001", "1-4", 9, "serial = 'HL-1'") + &guest("erp", ERP, "")));
    agent.until("it is back", || {
        let devices = host.store().devices().unwrap();
        devices[0].entry.status == "allocated" && devices[0].entry.address.to_string() == "usb_1_9"
    });
    // The first stops, the second starts.
    show(&host, &(key.clone() + &guest("erp", ERP, "running = false")));
    agent.claims("");
    show(&host, &(key + &guest("erp", ERP, "running = false") + &guest("crm", CRM, "")));
    agent.claims(&held(1, "crm", CRM, "allocated"));
    let shown = host.virt_usb(&["claims"]);
    assert!(String::from_utf8_lossy(&shown.stdout).contains("allocated"), "{shown:?}");
    agent.signal("-TERM");
    let mut agent = agent;
    assert_eq!(agent.child.wait().unwrap().code(), Some(0));
    assert_eq!(host.claims(), held(1, "crm", CRM, "allocated"), "guests keep what they have");
}

#[test]
fn a_device_that_returns_under_its_address_is_reattached() {
    let host = Host::new("");
    let key = |generation: u32| {
        device("0001", "1-1", 5, &format!("serial = 'HL-1'\ngeneration = {generation}"))
            + &guest("erp", ERP, "")
    };
    show(&host, &key(1));
    let agent = Agent::start(&host);
    agent.claims(&held(1, "erp", ERP, "allocated"));
    let times = |what: &str| agent.log().matches(what).count();
    assert_eq!((times("device 1 attached"), times("device 1 detached")), (1, 0));
    // Its controller was unbound and bound again.
    show(&host, &key(2));
    agent.until("it is attached again", || times("device 1 attached") == 2);
    agent.claims(&held(1, "erp", ERP, "allocated"));
    assert_eq!(times("device 1 detached"), 1);
    // Once: whatever happens then is no reason to pull it.
    show(&host, &(key(2) + &device("0002", "1-2", 6, "")));
    agent.until("another one is seen", || host.store().devices().unwrap().len() == 2);
    show(&host, &key(2));
    agent.until("and gone", || host.store().devices().unwrap().len() == 1);
    assert_eq!((times("device 1 attached"), times("device 1 detached")), (2, 1), "{}", agent.log());
}

#[test]
fn a_device_that_a_guest_uses_in_another_way_is_not_offered() {
    let host = Host::new("");
    let stick = device("0001", "1-1", 5, "nodes = ['/dev/disk/by-id/usb-HASP']");
    let disk = "flavor = '{}'\ndevices = \"<disk type='block'><source \
        dev='/dev/disk/by-id/usb-HASP'/><target dev='vda'/></disk>\"";
    let domain =
        |more: &str| format!("[[domain]]\nname = 'files'\nuuid = '{CRM}'\n{disk}\n{more}\n");
    show(&host, &(stick.clone() + &domain("")));
    let agent = Agent::start(&host);
    agent.until("there is an inventory", || agent.log().contains("ready"));
    let used = || host.store().devices().unwrap().first().and_then(|d| d.entry.host_use.clone());
    let waits_for =
        |wanted: Option<&str>| agent.until(&format!("{wanted:?}"), || used().as_deref() == wanted);
    waits_for(Some("used by guest files as disk vda"));
    assert_eq!(host.store().devices().unwrap()[0].entry.status_reason.as_deref(), Some("host-use"));
    show(&host, &(stick.clone() + &domain("") + &guest("erp", ERP, "")));
    agent.until("erp is refused", || agent.log().contains("used by guest files as disk vda"));
    assert_eq!(host.claims(), "");
    // Defined, it is still that guest's; undefined, it is free.
    show(&host, &(stick.clone() + &domain("running = false")));
    waits_for(Some("used by guest files, which does not run, as disk vda"));
    // An agent that has not asked libvirt yet, and `discover` beside it, leave what is recorded.
    let discovered = host.virt_usb(&["discover", "--sim", host.path("sim.toml").to_str().unwrap()]);
    assert!(discovered.status.success(), "{discovered:?}");
    waits_for(Some("used by guest files, which does not run, as disk vda"));
    show(&host, &stick);
    waits_for(None);
    show(&host, &(stick + &guest("erp", ERP, "")));
    agent.claims(&held(1, "erp", ERP, "allocated"));
}

#[test]
fn a_missing_device_is_reported_with_advice() {
    let host = Host::new("");
    // The guest has two ports; its flavor's devices fill them, and the operator's request comes
    // too late.
    let keys = device("0001", "1-1", 5, "") + &device("0002", "1-2", 6, "");
    show(&host, &(keys + &guest("erp", ERP, "ports = 1\nspice = true")));
    let agent = Agent::start(&host);
    agent.claims(&held(1, "erp", ERP, "allocated"));
    let redirected = guest("crm", CRM, "").replace(
        r#""usb_devices":[{"vendor_id":"0529"}]"#,
        r#""usb_redirection_devices":[{"bus":"usb","type":"spicevmc"}]"#,
    );
    let text = std::fs::read_to_string(host.path("sim.toml")).unwrap();
    show(&host, &(text + &redirected));
    // The hook sees it first, and says it where the user still reads.
    agent.until("crm is refused", || agent.log().contains("but has no SPICE graphics to carry it"));
}

#[test]
fn it_may_be_killed_at_any_moment() {
    // Its key is plugged in more often here than any should be.
    let host = Host::new("flap_limit = 0\nabsent_grace = 1\n");
    let mut dice = 12_345u64;
    let mut roll = |sides: u64| {
        dice = dice.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (dice >> 33) % sides
    };
    let both = |key: bool, erp: bool, crm: bool, number: u64| {
        let key = if key {
            device("0001", "1-1", 5 + number as u8 % 100, "serial = 'HL-1'")
        } else {
            String::new()
        };
        key + &guest("erp", ERP, &format!("running = {erp}"))
            + &guest("crm", CRM, &format!("running = {crm}"))
    };
    // On a busy machine the first agent is killed before it has made the inventory.
    host.flavor("unused", r#"{"usb_devices":[{"vendor_id":"ffff"}]}"#);
    for round in 0..12 {
        show(&host, &both(roll(4) > 0, roll(2) > 0, roll(2) > 0, round));
        let agent = Agent::start(&host);
        std::thread::sleep(Duration::from_millis(roll(120)));
        show(&host, &both(roll(4) > 0, roll(2) > 0, roll(2) > 0, round + 50));
        std::thread::sleep(Duration::from_millis(roll(300)));
        drop(agent);
        assert_eq!(host.store().check().unwrap(), Vec::<String>::new());
    }
    show(&host, &both(true, false, false, 98));
    let agent = Agent::start(&host);
    // Neither guest runs now, so the agent releases every claim that the last one left.
    agent.claims("");
    show(&host, &both(true, true, false, 99));
    agent.claims(&held(1, "erp", ERP, "allocated"));
    assert_eq!(host.store().check().unwrap(), Vec::<String>::new());
}

#[test]
fn rules_are_read_again_and_a_bad_edit_is_refused() {
    let host = Host::new("");
    let before = std::fs::read_to_string(host.config_file()).unwrap();
    show(&host, &device("0001", "1-1", 5, ""));
    let agent = Agent::start(&host);
    let status = || {
        host.store().devices().unwrap().first().map(|r| r.entry.status.clone()).unwrap_or_default()
    };
    agent.until("it is ready", || agent.log().contains(" ready"));
    agent.until("it is offered", || status() == "available");
    let write = |text: &str| std::fs::write(host.config_file(), text).unwrap();
    write(&format!("{before}usb_white_list_switch = 'perhaps'\n"));
    agent.signal("-HUP");
    agent.until("it is refused", || agent.log().contains("the previous rules stay in effect"));
    assert_eq!(status(), "available");
    write(&format!("{before}usb_white_list_switch = 'on'\n"));
    agent.signal("-HUP");
    agent.until("it is withdrawn", || status() == "unavailable");
    // A file that has lost its end must not offer everything.
    for lost in [before.as_str(), "", "\n"] {
        let refusals = || agent.log().matches("the previous rules stay in effect").count();
        let told = refusals();
        write(lost);
        agent.until("it is refused", || refusals() > told);
        assert_eq!(status(), "unavailable", "{lost:?}");
    }
    assert!(
        agent.log().contains("which was \"on\": every device would be offered"),
        "{}",
        agent.log()
    );
    // The file's change alone is enough.
    write(&format!("{before}usb_white_list_switch = 'off'\n"));
    agent.until("it is available again", || status() == "available");
}

#[test]
fn it_does_not_start_with_a_file_that_has_lost_the_whitelist() {
    let host = Host::new("");
    let before = std::fs::read_to_string(host.config_file()).unwrap();
    let write = |text: &str| std::fs::write(host.config_file(), format!("{before}{text}")).unwrap();
    show(&host, &device("0001", "1-1", 5, ""));
    let rules = "usb_passthrough_whitelist = [{ vendor = '0403' }]\n";
    write(&format!("{rules}usb_white_list_switch = 'on'\n"));
    let status = || host.store().devices().unwrap()[0].entry.status.clone();
    {
        let agent = Agent::start(&host);
        agent.until("it is ready", || agent.log().contains(" ready"));
    }
    assert_eq!(status(), "unavailable");
    for lost in ["", rules] {
        write(lost);
        let output = command(&host).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(
            !output.status.success() && said.contains("does not contain usb_white_list_switch"),
            "{said}"
        );
        let discovered =
            host.virt_usb(&["discover", "--sim", host.path("sim.toml").to_str().unwrap()]);
        let said = String::from_utf8_lossy(&discovered.stderr);
        assert!(
            !discovered.status.success() && said.contains("write usb_white_list_switch = \"off\""),
            "{said}"
        );
        assert_eq!(status(), "unavailable");
        let asks = domain("erp", 7, r#"{"usb_devices":[{"id":1}]}"#);
        let refused = host.call(&["erp", "prepare", "begin", "-"], asks.as_bytes());
        let said = String::from_utf8_lossy(&refused.stderr);
        assert!(
            !refused.status.success() && said.contains("does not contain usb_white_list_switch"),
            "{said}"
        );
        let innocent = domain("crm", 8, r#"{"usb_devices":[]}"#);
        assert!(host.call(&["crm", "prepare", "begin", "-"], innocent.as_bytes()).status.success());
        let doctor = host.virt_usb(&["doctor"]);
        let said = String::from_utf8_lossy(&doctor.stdout);
        assert!(said.contains("does not contain usb_white_list_switch"), "{said}");
        let checked = host.virt_usb(&[
            "whitelist",
            "check",
            "--sim",
            host.path("sim.toml").to_str().unwrap(),
        ]);
        assert!(!checked.status.success());
    }
    // Rules that have no effect are reported too.
    write(&format!("{rules}usb_white_list_switch = 'off'\n"));
    let discover =
        || host.virt_usb(&["discover", "--sim", host.path("sim.toml").to_str().unwrap()]);
    virt_usb_suite::ok(&discover());
    assert_eq!(status(), "available");
    write("");
    assert!(!discover().status.success());
    write("usb_white_list = []\n");
    virt_usb_suite::ok(&discover());
    write("");
    virt_usb_suite::ok(&discover());
}

#[test]
fn there_is_one_a_host_and_the_hook_knows_whether_it_lives() {
    let host = Host::new("");
    show(&host, &device("0001", "1-1", 5, ""));
    let prepare = |xml: &str| host.call(&["vm", "prepare", "begin", "-"], xml.as_bytes());
    let asks = domain("vm", 1, r#"{"usb_devices":[{"vendor_id":"0529"}]}"#);
    let said = |output: &std::process::Output| String::from_utf8_lossy(&output.stderr).into_owned();
    {
        let _agent = Agent::start(&host);
        _agent.until("it is ready", || _agent.log().contains(" ready"));
        let second = command(&host).output().unwrap();
        assert_eq!(second.status.code(), Some(1));
        let words = said(&second);
        assert!(words.contains("another agent runs on"), "{words}");
        assert!(words.contains("systemctl stop virt-usbd"), "{words}");
    }
    // The simulated sysfs is the agent's own: the hook of this test looks at another.
    host.discover(&device("0001", "1-1", 5, ""));
    let refused = prepare(&asks);
    assert_eq!(refused.status.code(), Some(1));
    assert!(
        said(&refused).contains(
            "the agent that attaches them is not running: run 'systemctl start virt-usbd'"
        ),
        "{}",
        said(&refused)
    );
    assert_eq!(host.claims(), "", "nothing is held for a guest that does not start");
    // A guest without a request starts. A configuration can allow the others to start as well.
    assert_eq!(prepare(&domain("vm", 1, "")).status.code(), Some(0));
    let keys = std::fs::read_to_string(host.config_file()).unwrap();
    std::fs::write(host.config_file(), format!("{keys}require_agent = false\n")).unwrap();
    assert_eq!(prepare(&asks).status.code(), Some(0));
    std::fs::write(host.config_file(), format!("{keys}require_agent = true\n")).unwrap();
    std::fs::remove_file(host.path("state/agent.lock")).unwrap();
    let refused = prepare(&asks);
    assert!(said(&refused).contains("but none is installed"), "{}", said(&refused));
}

#[test]
fn it_counts() {
    let host = Host::new("");
    let keys = std::fs::read_to_string(host.config_file()).unwrap();
    let socket = host.path("metrics");
    std::fs::write(host.config_file(), format!("{keys}metrics = {socket:?}\n")).unwrap();
    show(&host, &(device("0001", "1-1", 5, "") + &guest("erp", ERP, "")));
    let agent = Agent::start(&host);
    agent.claims(&held(1, "erp", ERP, "allocated"));
    let call = host.call(&["vm", "reconnect", "begin", "-"], domain("vm", 1, "").as_bytes());
    assert_eq!(call.status.code(), Some(0));
    // A thread of its own serves them, as soon as it can.
    agent.until("the metrics are served", || UnixStream::connect(&socket).is_ok());
    let get = |path: &str| {
        let mut stream = UnixStream::connect(&socket).unwrap();
        stream.write_all(format!("GET {path} HTTP/1.0\r\n\r\n").as_bytes()).unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        text
    };
    for line in [
        "virt_usb_attaches_total{result=\"done\"} 1",
        "virt_usb_libvirt_connected 1",
        "virt_usb_hook_seconds_count{operation=\"reconnect\",exit=\"0\"} 1",
        // Long before the next look at all guests.
        "virt_usb_claims{state=\"allocated\",hold=\"running\"} 1",
    ] {
        agent.until(line, || get("/metrics").contains(line));
    }
    assert!(get("/").starts_with("HTTP/1.0 404"));
    let all = get("/metrics");
    let version = format!("virt_usb_build_info{{version=\"{}\"}} 1", env!("CARGO_PKG_VERSION"));
    for line in
        [version.as_str(), "virt_usb_process_open_fds ", "virt_usb_last_pass_timestamp_seconds "]
    {
        assert!(all.contains(line), "{line}: {all}");
    }
}

/// Message of an agent that does not start.
fn refusal(mut command: Command) -> String {
    let output = command.output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn reasons_that_prevent_a_start_are_reported() {
    let host = Host::new("");
    let keys = std::fs::read_to_string(host.config_file()).unwrap();
    show(&host, &device("0001", "1-1", 5, ""));
    // A simulation never works on the real inventory.
    std::fs::write(host.config_file(), keys.replace("state_dir", "# state_dir")).unwrap();
    let said = refusal(command(&host));
    assert!(said.contains("a simulation needs its own state_dir"), "{said}");
    std::fs::write(host.config_file(), &keys).unwrap();
    show(&host, &guest("erp", ERP, "colour = 'red'"));
    let said = refusal(command(&host));
    assert!(said.contains("sim.toml is wrong: ") && said.contains("colour"), "{said}");
    assert!(!said.contains(" ready"), "{said}");
    show(&host, &device("0001", "1-1", 5, ""));
    host.plug_in_host(&device("0002", "1-2", 6, ""));
    let sim = host.path("sim.toml");
    virt_usb_suite::ok(&host.virt_usb(&["discover", "--sim", sim.to_str().unwrap()]));
    let mut real = Command::new(virt_usb_suite::program("virt-usbd"));
    real.arg("--config").arg(host.config_file());
    let said = refusal(real);
    assert!(said.contains("has the devices of a simulation"), "{said}");
    std::fs::remove_dir_all(host.path("state")).unwrap();
    virt_usb_suite::ok(&host.virt_usb(&["discover"]));
    let said = refusal(command(&host));
    assert!(said.contains("has the devices of this host"), "{said}");
    std::fs::write(host.config_file(), keys.replace("state_dir", "# state_dir")).unwrap();
    // A variable that was inherited does not silence it.
    let mut inherited = command(&host);
    inherited.env("JOURNAL_STREAM", "9:12345");
    assert!(refusal(inherited).contains("its own state_dir"));
}

#[test]
fn an_inventory_that_is_taken_away_ends_it() {
    let host = Host::new("");
    show(&host, &(device("0001", "1-1", 5, "") + &guest("erp", ERP, "")));
    let mut agent = Agent::start(&host);
    agent.claims(&held(1, "erp", ERP, "allocated"));
    for file in ["inventory.sqlite", "inventory.sqlite-wal", "inventory.sqlite-shm"] {
        std::fs::remove_file(host.path("state").join(file)).unwrap();
    }
    assert_eq!(agent.child.wait().unwrap().code(), Some(1));
    assert!(
        agent.log().contains("inventory.sqlite was removed or replaced while the agent ran"),
        "{}",
        agent.log()
    );
}

/// Believes the inventory.
struct Trusting;

impl virt_usb_store::claim::ClaimVerifier for Trusting {
    fn verify(&mut self, candidate: &virt_usb_store::Record) -> virt_usb_store::claim::Verified {
        virt_usb_store::claim::Verified::Here(candidate.location())
    }
    fn fits(&mut self, _: &[virt_usb_store::claim::Granted]) -> Result<(), String> {
        Ok(())
    }
}

/// A guest that has lost its device and cannot be given it again has not failed to start, whether
/// or not the audit knows it.
#[test]
fn a_guest_that_had_its_device_is_not_stopped_though_the_audit_is_gone() {
    let host = Host::new("on_attach_failure = 'stop'\nscan_interval = 1\n");
    let (key, other) = (device("0001", "1-1", 5, ""), device("0002", "1-2", 6, ""));
    let flavor = r#"{"usb_devices":[{"vendor_id":"0529","product_id":"0001"}]}"#;
    let erp = format!(
        "[[domain]]\nname = 'erp'\nuuid = '{ERP}'\nrunning = true\nports = 1\nflavor = '{flavor}'\n"
    );
    show(&host, &format!("{key}{other}{erp}"));
    let agent = Agent::start(&host);
    agent.until("it has the key", || host.claims().contains("device 1 erp"));
    agent.until("it is in the guest", || host.claims().contains("allocated"));
    show(&host, &format!("{other}{erp}"));
    agent.until("it is out of the guest", || !host.claims().contains("allocated"));
    // The guest's only port gets another device.
    let whom = virt_usb_store::claim::Claimant {
        instance: ERP.parse().unwrap(),
        domain: "erp".into(),
        project: None,
    };
    let context = virt_usb_config::host_env::context(&host.config(), "test").unwrap();
    let requests =
        virt_usb_model::Flavor::parse(r#"{"usb_devices":[{"id":2}]}"#).unwrap().usb_devices;
    host.store().give(&whom, &requests, &mut Trusting, &context).unwrap();
    agent.until("the other one is in the guest", || host.claims().contains("device 2 erp"));
    agent.until("the port is taken", || host.claims().contains("allocated"));
    let prune = "import sqlite3, sys; c = sqlite3.connect(sys.argv[1], timeout=20); \
        c.execute('DROP TRIGGER events_are_kept'); \
                 c.execute('DELETE FROM events'); c.commit()";
    let pruned = Command::new("python3")
        .args(["-c", prune])
        .arg(host.path("state/inventory.sqlite"))
        .status();
    assert!(pruned.unwrap().success());
    show(&host, &format!("{}{other}{erp}", device("0001", "1-1", 9, "")));
    agent.until("it says why", || agent.log().contains("is needed, 0 are free"));
    assert!(!agent.log().contains("the guest was stopped"), "{}", agent.log());
    assert!(
        host.claims().contains("device 2 erp") && host.claims().contains("allocated"),
        "{}",
        host.claims()
    );
}

#[test]
fn guests_get_their_devices_though_the_metrics_cannot_be_served() {
    let host = Host::new("");
    let keys = std::fs::read_to_string(host.config_file()).unwrap();
    show(&host, &(device("0001", "1-1", 5, "") + &guest("erp", ERP, "")));
    // A program that listens at the address of the metrics is left alone.
    let socket = host.path("theirs");
    let theirs = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    std::fs::write(host.config_file(), format!("{keys}metrics = {socket:?}\n")).unwrap();
    let agent = Agent::start(&host);
    agent.claims(&held(1, "erp", ERP, "allocated"));
    agent.until("it is said", || agent.log().contains("theirs: another program listens there"));
    // Once he is gone they are served.
    drop(theirs);
    agent.until("they are served", || {
        let Ok(mut stream) = UnixStream::connect(&socket) else { return false };
        stream.write_all(b"HEAD /metrics HTTP/1.0\r\n\r\n").unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        text.starts_with("HTTP/1.0 200") && !text.contains("virt_usb_")
    });
    drop(agent);
    std::fs::write(host.config_file(), format!("{keys}metrics = '/nowhere/at/all'\n")).unwrap();
    let agent = Agent::start(&host);
    agent.until("it is said", || {
        agent.log().contains("the metrics cannot be served at /nowhere/at/all")
    });
}

/// libvirt knows no simulated guest: the commands ask the agent that simulates it.
#[test]
fn commands_change_the_guests_of_a_simulation() {
    let host = Host::new("api = \"127.0.0.1:0\"\n");
    let bare = |name: &str, uuid: &str| format!("[[domain]]\nname = '{name}'\nuuid = '{uuid}'\n");
    show(&host, &(device("0001", "1-1", 5, "serial = 'HL-1'") + &bare("erp", ERP)));
    let agent = Agent::start(&host);
    agent.until("its socket", || host.path("state/api.sock").exists());
    agent.until("the device", || host.store().devices().is_ok_and(|found| found.len() == 1));
    let said = |arguments: &[&str]| ok(&host.virt_usb(arguments));
    let key = "device 1 (0529:0001 \"HASP copy protection dongle\", port 1-1)";
    assert_eq!(said(&["attach", "erp", "1"]), format!("erp has {key} now\n"));
    let held = held(1, "erp", ERP, "allocated");
    agent.claims(&held.replace("hold=running", "hold=instance"));
    assert_eq!(said(&["owner", "set", "erp", "p1"]), "erp now belongs to project p1\n");
    assert!(said(&["owner"]).contains("p1"));
    assert!(said(&["owner", "clear", "erp"]).starts_with("erp now has the owner that its domain"));
    assert_eq!(said(&["detach", ERP, "1"]), format!("{key} is free\n"));
    assert_eq!(host.claims(), "");
    let started = host.virt_usb(&["start", "erp"]);
    let why = text(&started.stderr);
    assert!(!started.status.success() && why.contains("the agent simulates its guests"), "{why}");
}

#[test]
fn without_an_api_the_guests_of_a_simulation_are_not_changed() {
    let host = Host::new("");
    show(&host, &guest("erp", ERP, "running = false"));
    let agent = Agent::start(&host);
    agent.until("it is ready", || agent.log().contains("ready"));
    for arguments in [&["attach", "erp", "1"][..], &["owner", "set", "erp", "p1"]] {
        let why = text(&host.virt_usb(arguments).stderr);
        assert!(why.contains("changed through its API only"), "{why}");
    }
}
