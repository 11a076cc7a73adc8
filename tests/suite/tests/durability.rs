//! Writes and the events that they survive: the table "What a write survives" in
//! host-runtime/store/README.md.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

use std::process::Command;

use virt_usb_config::host_env;
use virt_usb_store::claim::Claimant;
use virt_usb_store::{Source, Store};
use virt_usb_suite::{Host, device, domain, feed, program};

const ONE: &str = r#"{"usb_devices":[{"vendor_id":"0529","product_id":"0001"}]}"#;
const NOTHING: &str = r#"{"usb_devices":[]}"#;

/// Runs a program and counts the calls that wait for the disk.
fn syncs(host: &Host, program: &Command, input: &str) -> usize {
    let trace = host.path("trace");
    let mut command = Command::new("strace");
    command
        .args(["-f", "-qq", "-e", "trace=fsync,fdatasync,msync,sync_file_range,sync,syncfs", "-o"])
        .arg(&trace);
    command.arg(program.get_program()).args(program.get_args());
    let output = feed(command, input.as_bytes());
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(
        !said.contains("strace:"),
        "strace is needed and must be allowed to trace ('make test-deps'): {said}"
    );
    assert!(output.status.success(), "{said}");
    let text = std::fs::read_to_string(trace).unwrap();
    text.lines().filter(|line| line.contains("sync")).count()
}

fn hook(host: &Host, operation: &str, xml: &str) -> usize {
    let sub = if matches!(operation, "stopped" | "release") { "end" } else { "begin" };
    syncs(host, &host.hook(&["erp", operation, sub, "-"]), xml)
}

fn cli(host: &Host, arguments: &[&str]) -> usize {
    let mut command = Command::new(program("virt-usb"));
    command.arg("--config").arg(host.config_file()).args(arguments);
    syncs(host, &command, "")
}

/// A host with two devices and, as with an agent that runs, an inventory that is open. The log has
/// begun: its first write syncs its head.
fn host(keys: &str) -> (Host, Store) {
    let host = Host::new(keys);
    let devices = [device("0001", "1-1", 2, ""), device("0002", "1-2", 3, "")].concat();
    host.discover(&devices);
    let open = host.store();
    host.discover(&[devices, device("0003", "1-3", 4, "")].concat());
    (host, open)
}

/// A run of the guest: what each of its calls costs.
fn life(host: &Host, xml: &str) -> [usize; 4] {
    let attached = xml.replace(
        "</devices>",
        "<hostdev mode='subsystem' type='usb'><source><vendor id='0x0529'/><product id='0x0001'/>\
         <address bus='1' device='2'/></source><alias name='ua-usb-1'/></hostdev></devices>",
    );
    ["prepare", "started", "stopped", "release"].map(|operation| {
        hook(host, operation, if operation == "prepare" { xml } else { &attached })
    })
}

#[test]
fn claims_that_end_with_the_boot_need_no_fsync() {
    let (host, _open) = host("");
    let asking = domain("erp", 1, ONE);
    assert_eq!(life(&host, &asking), [0; 4]);
    // A scan of the agent changes nothing of that.
    host.discover(&device("0001", "1-1", 2, ""));
    assert_eq!(life(&host, &asking), [0; 4]);
    assert_eq!(hook(&host, "prepare", &domain("other", 9, NOTHING)), 0);
}

#[test]
fn a_claim_for_an_assignment_survives_a_power_cut_with_the_default_configuration() {
    let (host, mut open) = host("");
    let assigned = Claimant {
        instance: "00000001-0000-4000-8000-000000000000".parse().unwrap(),
        domain: "erp".into(),
        project: None,
    };
    let requests = virt_usb_model::Flavor::parse(ONE).unwrap().usb_devices;
    let context = host_env::context(&host.config(), "test").unwrap();
    open.assign(&assigned, Source::Operator, &requests, &context).unwrap();
    let mine = domain("erp", 1, NOTHING);
    let [prepare, started, stopped, release] = life(&host, &mine);
    assert!(prepare >= 2, "the claim and its hint: {prepare}");
    // The claim stays unchanged: the guest's state belongs to this boot.
    assert_eq!([started, stopped, release], [0; 3]);
    assert!(host.claims().contains("hold=instance"), "{}", host.claims());
    assert_eq!(life(&host, &mine), [0; 4], "nothing new is written");
    // It is no longer asked for: that lasts too. And beside it what ends with the boot costs what
    // it writes.
    open.assign(&assigned, Source::Operator, &[], &context).unwrap();
    assert!(hook(&host, "prepare", &domain("erp", 1, &ONE.replace("0001", "0002"))) >= 1);
    assert!(!host.claims().contains("hold=instance"), "{}", host.claims());
}

#[test]
fn hold_instance_makes_claims_and_assignments_that_survive() {
    let (host, _open) = host("hold = \"instance\"\n");
    let asking = domain("erp", 1, ONE);
    let [prepare, started, stopped, release] = life(&host, &asking);
    assert!(prepare >= 4, "claim and assignment, each with its hint: {prepare}");
    assert_eq!([started, stopped, release], [0; 3]);
    assert_eq!(life(&host, &asking), [0; 4], "nothing new is written");
    // The configuration changes while it is claimed.
    let running =
        std::fs::read_to_string(host.config_file()).unwrap().replace("\"instance\"", "\"running\"");
    std::fs::write(host.config_file(), running).unwrap();
    assert!(
        hook(&host, "prepare", &asking) >= 1,
        "that it ends with the run now, and that nothing is assigned"
    );
}

#[test]
fn a_restore_waits_until_it_is_confirmed() {
    let (host, _open) = host("hold = \"instance\"\n");
    let saved = domain("erp", 1, ONE).replace(
        "</devices>",
        "<hostdev mode='subsystem' type='usb'><source><vendor id='0x0529'/><product id='0x0001'/>\
         <address bus='1' device='2'/></source><alias name='ua-usb-1'/></hostdev></devices>",
    );
    assert_eq!(hook(&host, "restore", &saved), 0, "void after a boot");
    assert!(hook(&host, "prepare", &saved) >= 1, "{}", host.claims());
    assert!(host.claims().contains("hold=instance\n"), "{}", host.claims());
}

#[test]
fn the_use_of_a_one_time_device_survives_a_power_cut() {
    let rule = "usb_passthrough_whitelist = [{ vendor = '0529', one_time_use = true }]\n";
    let (host, _open) = host(rule);
    let [prepare, started, stopped, release] = life(&host, &domain("erp", 1, ONE));
    assert_eq!((prepare, stopped), (0, 0), "claimed, and not used yet; out of the guest");
    assert!(started >= 1, "used");
    assert!(release >= 1, "quarantined");
    assert_eq!(
        host.store().devices().unwrap()[0].entry.status_reason.as_deref(),
        Some("quarantined")
    );
}

#[test]
fn what_an_operator_does_and_what_is_discovered_survives_a_power_cut() {
    let (host, _open) = host("");
    let sim = host.path("sim.toml");
    std::fs::write(&sim, device("0004", "1-4", 7, "")).unwrap();
    let grant = r#"{"usb_devices":[{"vendor_id":"0529"}],"projects":["p"]}"#;
    for arguments in [
        &["flavor", "set", "erp", ONE][..],
        &["grant", "set", "erp", grant],
        &["grant", "remove", "erp"],
        &["flavor", "remove", "erp"],
        &["disable", "2"],
        &["enable", "2"],
        &["tag", "2", "red"],
        &["discover", "--sim", sim.to_str().unwrap()],
    ] {
        assert!(cli(&host, arguments) >= 1, "{arguments:?}");
    }
    assert_eq!(cli(&host, &["devices"]), 0, "who only looks waits for nothing");
}
