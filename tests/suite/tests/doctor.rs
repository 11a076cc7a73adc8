//! `virt-usb doctor`: each finding is provoked, and mended by what it advises.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test's helpers fail the test")]

use std::fs;
use std::os::unix::fs::PermissionsExt;

use serde_json::Value;
use virt_usb_suite::{Host, device, program};

/// A host on which all is well, but for what only a real machine has.
struct Patient {
    host: Host,
    /// Its lock, held.
    agent: fs::File,
}

/// libvirt's own test driver answers at this URI, in this process.
const LIBVIRT: &str = "libvirt_uri = 'test:///default'\n";

impl Patient {
    fn new() -> Self {
        let host = Host::new(LIBVIRT);
        let hooks = host.path("hooks/qemu.d");
        fs::create_dir_all(&hooks).unwrap();
        fs::copy(program("virt-usb-hook"), hooks.join("50-virt-usb")).unwrap();
        host.discover(&device("0001", "1-1", 5, "serial = 'A'"));
        let agent = fs::File::create(host.path("state/agent.lock")).unwrap();
        agent.lock().unwrap();
        fs::write(host.path("state/hook.sock"), "").unwrap();
        fs::create_dir(host.path("run")).unwrap();
        Self { host, agent }
    }

    /// The findings of this check that are not well, with the exit status.
    fn says(&self, check: &str) -> (Vec<String>, i32) {
        let (hooks, run) = (self.host.path("hooks"), self.host.path("run"));
        let output = self.host.virt_usb(&[
            "doctor",
            "--json",
            "--hooks",
            hooks.to_str().unwrap(),
            "--run",
            run.to_str().unwrap(),
        ]);
        let findings: Value = serde_json::from_slice(&output.stdout).unwrap();
        let told =
            findings.as_array().unwrap().iter().filter(|f| f["check"] == check && f["level"] != "well");
        let line = |f: &Value| {
            format!(
                "{} {} -> {}",
                f["level"].as_str().unwrap(),
                f["what"].as_str().unwrap(),
                f["mend"].as_str().unwrap()
            )
        };
        (told.map(line).collect(), output.status.code().unwrap())
    }

    fn is_well(&self, check: &str) {
        assert_eq!(self.says(check).0, Vec::<String>::new());
    }

    #[track_caller]
    fn finds(&self, check: &str, words: &[&str]) {
        let (told, exit) = self.says(check);
        let found = told.iter().any(|line| words.iter().all(|word| line.contains(word)));
        assert!(found, "{words:?} in {told:#?}");
        assert!(exit > 0);
    }
}

#[test]
fn a_hook_that_libvirt_would_not_call() {
    let patient = Patient::new();
    let hook = patient.host.path("hooks/qemu.d/50-virt-usb");
    patient.is_well("hook");
    fs::set_permissions(&hook, fs::Permissions::from_mode(0o644)).unwrap();
    patient.finds("hook", &["broken", "is not executable", "chmod 0755"]);
    fs::set_permissions(&hook, fs::Permissions::from_mode(0o777)).unwrap();
    patient.finds("hook", &["others than root may write"]);
    fs::set_permissions(&hook, fs::Permissions::from_mode(0o755)).unwrap();
    patient.is_well("hook");
    fs::write(&hook, "#!/bin/sh\necho virt-usb-hook 0.0.1\n").unwrap();
    patient.finds("hook", &["warning", "is version 0.0.1, this program is"]);
    fs::write(&hook, "#!/bin/sh\n").unwrap();
    patient.finds("hook", &["broken", "it is not ours"]);
    fs::remove_file(&hook).unwrap();
    patient.finds("hook", &["broken", "there is none at", "make install-hook"]);
}

#[test]
fn a_daemon_that_is_older_than_the_hooks() {
    let patient = Patient::new();
    // The first process of this machine is older than the test; its id is one that libvirtd might have.
    fs::write(patient.host.path("run/libvirtd.pid"), "1\n").unwrap();
    patient.finds("hook", &["warning", "libvirtd runs for longer than", "systemctl reload libvirtd"]);
    fs::remove_file(patient.host.path("run/libvirtd.pid")).unwrap();
    fs::write(patient.host.path("run/virtqemud.pid"), format!("{}\n", u32::MAX)).unwrap();
    patient.is_well("hook");
}

#[test]
fn an_agent_that_is_not_there() {
    let patient = Patient::new();
    patient.is_well("agent");
    fs::remove_file(patient.host.path("state/hook.sock")).unwrap();
    patient.finds("agent", &["warning", "does not hear hooks"]);
    patient.agent.unlock().unwrap();
    patient.finds("agent", &["broken", "does not run", "systemctl start virt-usbd"]);
    fs::remove_file(patient.host.path("state/agent.lock")).unwrap();
    patient.finds("agent", &["warning", "none is installed", "make install-agent"]);
}

#[test]
fn a_configuration_and_an_inventory_that_cannot_be_read() {
    let patient = Patient::new();
    patient.is_well("configuration");
    patient.is_well("inventory");
    patient.is_well("machine");
    let keys = fs::read_to_string(patient.host.config_file()).unwrap();
    fs::write(patient.host.config_file(), format!("{keys}hold = 'tight'\n")).unwrap();
    patient.finds("configuration", &["broken", "line 6", "tight"]);
    fs::write(patient.host.config_file(), keys.replace("procfs_root", "procfs_root = '/nowhere' #")).unwrap();
    patient.finds("machine", &["broken", "/nowhere/sys/kernel/random/boot_id"]);
    fs::write(patient.host.config_file(), &keys).unwrap();
    let database = patient.host.path("state/inventory.sqlite");
    let run = |sql: &str| {
        assert!(std::process::Command::new("python3")
        .args(["-c", "import sqlite3, sys; c = sqlite3.connect(sys.argv[1]); c.executescript(sys.argv[2]); c.commit()"])
        .arg(&database).arg(sql).status().unwrap().success());
    };
    run("UPDATE usb_devices SET status = 'allocated' WHERE id = 1");
    patient.finds("inventory", &["broken", "virt-usb store rebuild"]);
    run("UPDATE usb_devices SET status = 'available' WHERE id = 1");
    patient.is_well("inventory");
    run("INSERT INTO events (at, event, actor) VALUES ('2999-01-01T00:00:00.000Z', 'added', 'a test')");
    patient.finds("machine", &["warning", "2999-01-01", "the clock was set back"]);
    fs::remove_file(&database).unwrap();
    patient.finds("inventory", &["broken", "virt-usb discover"]);
}

#[test]
fn a_device_that_was_left_without_a_driver() {
    let patient = Patient::new();
    patient.is_well("device");
    let interface = patient.host.path("sys/bus/usb/devices/1-1/1-1:1.0");
    fs::create_dir_all(&interface).unwrap();
    fs::write(interface.join("bInterfaceClass"), "08\n").unwrap();
    patient.finds("device", &["warning", "device 1 (port 1-1)", "1-1:1.0 has no driver", "drivers_probe"]);
    std::os::unix::fs::symlink("/", interface.join("driver")).unwrap();
    patient.is_well("device");
    // A licence key of a class that the kernel has no driver for is as it should be.
    fs::remove_file(interface.join("driver")).unwrap();
    fs::write(interface.join("bInterfaceClass"), "ff\n").unwrap();
    patient.is_well("device");
}

#[test]
fn a_libvirt_that_does_not_answer() {
    let patient = Patient::new();
    let keys = fs::read_to_string(patient.host.config_file()).unwrap();
    fs::write(
        patient.host.config_file(),
        keys.replace("test:///default", "qemu+unix:///system?socket=/nowhere"),
    )
    .unwrap();
    patient.finds("libvirt", &["broken", "/nowhere", "systemctl status libvirtd"]);
    let plain = patient.host.virt_usb(&["doctor"]);
    let text = String::from_utf8(plain.stdout).unwrap();
    assert_eq!(plain.status.code(), Some(2));
    assert!(text.contains("BROKEN   libvirt: ") && text.contains("\n         -> "), "{text}");
}
