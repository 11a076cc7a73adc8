//! `virt-usb doctor`: each finding is provoked, and fixed by what it advises.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test's helpers fail the test")]

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixDatagram;
use std::sync::{Arc, Mutex};

use serde_json::{Value, json};
use virt_usb_suite::{Host, device, program, write_program};

/// A host without problems, except what only a real machine has.
struct Patient {
    host: Host,
    /// Lock of the agent, held.
    agent: fs::File,
    /// Status that the agent reports.
    health: Arc<Mutex<Value>>,
}

/// Answers as the agent does, until its socket is removed.
fn answer(socket: &UnixDatagram, health: &Mutex<Value>) {
    let mut message = [0; 64];
    while let Ok((length, from)) = socket.recv_from(&mut message) {
        if &message[..length] == b"health" {
            socket.send_to_addr(health.lock().unwrap().to_string().as_bytes(), &from).unwrap();
        }
    }
}

fn healthy() -> Value {
    json!({
        "version": env!("CARGO_PKG_VERSION"),
        "uptime": 1_000_000.0,
        "last_pass": 3.0,
        "last_scan": 4.0,
        "connected": 100_000.0,
        "connections": 1,
        "unanswered": [],
        "a key of a later version": 1
    })
}

/// libvirt's own test driver answers at this URI, in this process.
const LIBVIRT: &str = "libvirt_uri = 'test:///default'\n";

impl Patient {
    fn new() -> Self {
        let host = Host::new(LIBVIRT);
        let hooks = host.path("hooks/qemu.d");
        fs::create_dir_all(&hooks).unwrap();
        write_program(&hooks.join("50-virt-usb"), &fs::read(program("virt-usb-hook")).unwrap());
        host.discover(&device("0001", "1-1", 5, "serial = 'A'"));
        let agent = fs::File::create(host.path("state/agent.lock")).unwrap();
        agent.lock().unwrap();
        let health = Arc::new(Mutex::new(healthy()));
        let (socket, its) =
            (UnixDatagram::bind(host.path("state/hook.sock")).unwrap(), health.clone());
        std::thread::spawn(move || answer(&socket, &its));
        fs::create_dir_all(host.path("run/udev")).unwrap();
        fs::write(host.path("run/udev/control"), "").unwrap();
        Self { host, agent, health }
    }

    /// Sets keys of the configuration, a line each.
    fn configure(&self, keys: &str) {
        let key = |line: &str| line.split(' ').next().unwrap().to_owned();
        let before = fs::read_to_string(self.host.config_file()).unwrap();
        let others = before.lines().filter(|line| keys.lines().all(|new| key(new) != key(line)));
        let all: Vec<&str> = others.chain(keys.lines()).collect();
        fs::write(self.host.config_file(), all.join("\n")).unwrap();
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
        let told = findings
            .as_array()
            .unwrap()
            .iter()
            .filter(|f| f["check"] == check && f["level"] != "ok");
        let line = |f: &Value| {
            format!(
                "{} {} -> {}",
                f["level"].as_str().unwrap(),
                f["what"].as_str().unwrap(),
                f["fix"].as_str().unwrap_or("the finding names it")
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
    patient.finds("hook", &["users other than root may write"]);
    fs::set_permissions(&hook, fs::Permissions::from_mode(0o755)).unwrap();
    patient.is_well("hook");
    write_program(&hook, b"#!/bin/sh\necho virt-usb-hook 0.0.1\n");
    patient.finds("hook", &["warning", "is version 0.0.1, this program is"]);
    write_program(&hook, b"#!/bin/sh\n");
    patient.finds("hook", &["broken", "it is not virt-usb's hook"]);
    fs::remove_file(&hook).unwrap();
    patient.finds("hook", &["broken", "there is none at", "apt install", "make install-hook"]);
}

#[test]
fn an_inventory_that_cannot_be_opened_is_reported_with_one_fix() {
    let patient = Patient::new();
    let file = patient.host.path("state/inventory.sqlite");
    let fix_of = |what: &str| {
        let output = patient.host.virt_usb(&["doctor", "--json"]);
        let found: Vec<Value> = serde_json::from_slice(&output.stdout).unwrap();
        let is_meant =
            |f: &&Value| f["check"] == "inventory" && f["what"].as_str().unwrap().contains(what);
        found.iter().find(is_meant).unwrap_or_else(|| panic!("{what}: {found:#?}"))["fix"].clone()
    };
    fs::write(&file, [b'x'; 8192]).unwrap();
    assert_eq!(
        fix_of("is damaged (file is not a database): 'virt-usb store rebuild'"),
        Value::Null
    );
    fs::remove_file(&file).unwrap();
    assert_eq!(fix_of("start the agent ('systemctl start virt-usbd')"), Value::Null);
}

#[test]
fn a_daemon_that_is_older_than_the_hooks() {
    let patient = Patient::new();
    // The first process of this machine is older than the test; its id is one that libvirtd might
    // have.
    fs::write(patient.host.path("run/libvirtd.pid"), "1\n").unwrap();
    patient.finds("hook", &["warning", "libvirtd was started before", "systemctl reload libvirtd"]);
    fs::remove_file(patient.host.path("run/libvirtd.pid")).unwrap();
    fs::write(patient.host.path("run/virtqemud.pid"), format!("{}\n", u32::MAX)).unwrap();
    patient.is_well("hook");
}

#[test]
fn an_agent_that_is_not_there() {
    let patient = Patient::new();
    patient.is_well("agent");
    fs::remove_file(patient.host.path("state/hook.sock")).unwrap();
    patient.finds("agent", &["warning", "does not answer at its socket hook.sock", "No such file"]);
    let _deaf = UnixDatagram::bind(patient.host.path("state/hook.sock")).unwrap();
    patient.finds("agent", &["broken", "has not answered for 5 s: it hangs, or it is older"]);
    patient.agent.unlock().unwrap();
    patient.finds("agent", &["broken", "not running", "systemctl start virt-usbd"]);
    fs::remove_file(patient.host.path("state/agent.lock")).unwrap();
    let words = ["warning", "none is installed", "apt install virt-usb", "make install-agent"];
    patient.finds("agent", &words);
}

#[test]
fn an_agent_that_is_not_healthy() {
    let patient = Patient::new();
    let says = |keys: Value| {
        let mut health = healthy();
        health.as_object_mut().unwrap().extend(keys.as_object().unwrap().clone());
        *patient.health.lock().unwrap() = health;
    };
    patient.is_well("agent");
    says(json!({ "connected": null, "lost": 61.4 }));
    patient.finds("agent", &["broken", "no connection to libvirt for 61 s", "test:///default"]);
    says(json!({ "connected": null, "lost": null }));
    patient.finds("agent", &["broken", "no connection to libvirt for 1000000 s"]);
    says(json!({ "last_pass": 100_000.0 }));
    patient.finds("agent", &["broken", "has not completed a pass over all guests for 100000 s"]);
    says(json!({ "last_pass": null }));
    patient.finds("agent", &["broken", "has not completed a pass over all guests for 100000 s"]);
    says(json!({ "last_scan": 90_000.0 }));
    patient.finds(
        "agent",
        &["broken", "has not completed a scan of the devices without an error for 90000 s"],
    );
    says(json!({ "last_scan": null }));
    patient.finds(
        "agent",
        &["broken", "has not completed a scan of the devices without an error for 1000000 s"],
    );
    // An agent that has just started, or connected again, has not looked yet.
    says(json!({ "connected": null, "lost": 3.0, "last_pass": 100_000.0 }));
    patient.is_well("agent");
    says(json!({ "connected": 1.0, "last_pass": 100_000.0 }));
    patient.is_well("agent");
    says(json!({ "connected": null, "last_pass": null, "last_scan": null, "uptime": 1.0 }));
    patient.is_well("agent");
    says(json!({ "unanswered": [{ "about": "erp\n\u{1b}[2J", "what": "attach", "age": 61.4 }] }));
    patient.finds(
        "agent",
        &["warning", "libvirt has not answered about erp \u{fffd}[2J for 61 s (attach)"],
    );
    says(json!({ "blocked": true }));
    patient.finds("agent", &["broken", "makes no more calls, and no guest gets a device"]);
    says(json!({ "certificate_error": "/etc/api.key: Permission denied" }));
    patient.finds("agent", &["warning", "cannot use the API's certificate: /etc/api.key"]);
    says(json!({ "version": "0.0.1" }));
    patient.finds("agent", &["warning", "it is version 0.0.1, this program is"]);
    says(json!({ "connections": "many" }));
    patient.finds("agent", &["warning", "does not answer"]);
}

#[test]
fn a_certificate_that_ends_and_an_address_that_is_taken() {
    let patient = Patient::new();
    let (certificate, key) = (patient.host.path("api.crt"), patient.host.path("api.key"));
    let make = |days: &str| {
        let mut openssl = std::process::Command::new("openssl");
        openssl.args(["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"]);
        openssl.args(["-nodes", "-subj", "/CN=host1", "-days", days, "-keyout"]).arg(&key);
        assert!(openssl.arg("-out").arg(&certificate).output().unwrap().status.success());
        fs::set_permissions(&key, fs::Permissions::from_mode(0o600)).unwrap();
    };
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    patient.configure(&format!(
        "api = '{address}'\napi_certificate = {certificate:?}\napi_key = {key:?}\n"
    ));
    patient.finds("api", &["warning", "its certificate cannot be used", "api.crt"]);
    make("100");
    patient.is_well("api");
    make("3");
    patient.finds("api", &["warning", "expires in 2 day(s)", "without a restart"]);
    make("100");
    fs::set_permissions(&key, fs::Permissions::from_mode(0o644)).unwrap();
    patient.finds("api", &["warning", "every user of this host may read it", "chmod o="]);
    fs::set_permissions(&key, fs::Permissions::from_mode(0o600)).unwrap();
    let other = fs::read(&key).unwrap();
    make("100");
    fs::write(&key, other).unwrap();
    patient.finds("api", &["warning", "its certificate cannot be used"]);
    // An authority's own certificate may have expired: clients have theirs.
    make("1");
    let authority = fs::read_to_string(&certificate).unwrap();
    make("100");
    fs::write(&certificate, fs::read_to_string(&certificate).unwrap() + &authority).unwrap();
    patient.is_well("api");
    make("100");
    drop(listener);
    patient.finds("api", &["warning", "nothing listens at"]);
    let _other = std::net::TcpListener::bind(address).unwrap();
    patient.is_well("api");
    patient.health.lock().unwrap()["api_served"] = json!(false);
    patient.finds("api", &["warning", "another program listens at", "restart the agent"]);
    patient.agent.unlock().unwrap();
    patient.finds("api", &["warning", "another program listens at", "set api to another address"]);
}

#[test]
fn a_user_without_read_permission() {
    let patient = Patient::new();
    for folder in ["", "hooks", "run"] {
        fs::set_permissions(patient.host.path(folder), fs::Permissions::from_mode(0o755)).unwrap();
    }
    let mut doctor = std::process::Command::new("setpriv");
    doctor.args(["--reuid=4711", "--regid=4711", "--clear-groups"]).arg(program("virt-usb"));
    doctor.arg("--config").arg(patient.host.config_file()).args(["doctor", "--hooks"]);
    doctor.arg(patient.host.path("hooks")).arg("--run").arg(patient.host.path("run"));
    fs::set_permissions(patient.host.path("state"), fs::Permissions::from_mode(0o750)).unwrap();
    let said = String::from_utf8(doctor.output().unwrap().stdout).unwrap();
    assert!(said.contains("warning  inventory: this user may not read"), "{said}");
    assert!(said.contains("'sudo virt-usb doctor'") && !said.contains(" agent: "), "{said}");
}

#[test]
fn records_that_go_nowhere_and_a_missing_udevd() {
    let patient = Patient::new();
    patient.is_well("udev");
    fs::remove_file(patient.host.path("run/udev/control")).unwrap();
    patient.finds("udev", &["warning", "udevd does not run", "up to 10 s late"]);
    let journal = patient.host.path("run/systemd/journal");
    patient.configure("log = 'journal'");
    patient.finds("log", &["warning", "run/systemd/journal/socket is missing", "systemd-journald"]);
    fs::create_dir_all(&journal).unwrap();
    let _journal = UnixDatagram::bind(journal.join("socket")).unwrap();
    patient.is_well("log");
    let folder = patient.host.path("logs");
    patient.configure(&format!("log = {:?}", folder.join("virt-usb.log")));
    patient.finds("log", &["warning", "cannot be read", "mkdir -p"]);
    fs::create_dir(&folder).unwrap();
    patient.is_well("log");
    fs::set_permissions(&folder, fs::Permissions::from_mode(0o777)).unwrap();
    patient.finds("log", &["warning", "every user may replace files", "chmod o-w"]);
    fs::set_permissions(&folder, fs::Permissions::from_mode(0o1777)).unwrap();
    patient.is_well("log");
}

#[test]
fn an_agent_that_runs_as_the_wrong_user_or_may_not_talk_to_libvirt() {
    let patient = Patient::new();
    let (state, lock) = (patient.host.path("state"), patient.host.path("state/agent.lock"));
    patient.agent.unlock().unwrap();
    fs::set_permissions(&lock, fs::Permissions::from_mode(0o666)).unwrap();
    let open = |path: &std::path::Path| {
        fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
    };
    open(&patient.host.path(""));
    open(&state);
    let mut agent = std::process::Command::new("setpriv")
        .args(["--reuid=4711", "--regid=4711", "--groups=4711,4713", "flock", "--no-fork"])
        .arg(&lock)
        .args(["sleep", "60"])
        .spawn()
        .unwrap();
    while patient.agent.try_lock_shared().is_ok() {
        assert!(agent.try_wait().unwrap().is_none(), "flock of another user cannot take the lock");
        patient.agent.unlock().unwrap();
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    patient.finds(
        "agent",
        &["warning", "it runs as user 4711", "belongs to user 0", "systemctl restart virt-usbd"],
    );
    std::os::unix::fs::chown(&state, Some(4711), None).unwrap();
    patient.is_well("agent");
    let socket = patient.host.path("run/libvirt/libvirt-sock");
    fs::create_dir(socket.parent().unwrap()).unwrap();
    fs::write(&socket, "").unwrap();
    fs::set_permissions(&socket, fs::Permissions::from_mode(0o660)).unwrap();
    std::os::unix::fs::chown(&socket, Some(0), Some(4712)).unwrap();
    patient.is_well("agent");
    let mut lost = healthy();
    (lost["connected"], lost["lost"]) = (Value::Null, json!(1.0));
    *patient.health.lock().unwrap() = lost;
    patient.finds(
        "agent",
        &[
            "broken",
            "may not write",
            "(group 4712)",
            "getent group 4712",
            "usermod --append --groups GROUP",
        ],
    );
    std::os::unix::fs::chown(&socket, Some(0), Some(4713)).unwrap();
    patient.is_well("agent");
    agent.kill().unwrap();
    agent.wait().unwrap();
}

#[test]
fn a_hook_that_apparmor_or_selinux_keeps_from_running() {
    let patient = Patient::new();
    fs::write(patient.host.path("run/libvirtd.pid"), "777\n").unwrap();
    let attributes = patient.host.path("proc/777/attr");
    fs::create_dir_all(&attributes).unwrap();
    fs::write(attributes.join("current"), "libvirtd (enforce)\n").unwrap();
    patient.is_well("hook");
    let hook = patient.host.path("hooks/qemu.d/50-virt-usb");
    let elsewhere = patient.host.path("opt-virt-usb-hook");
    fs::rename(&hook, &elsewhere).unwrap();
    std::os::unix::fs::symlink(&elsewhere, &hook).unwrap();
    patient.finds(
        "hook",
        &["broken", "AppArmor confines libvirtd", "opt-virt-usb-hook", "a link into /usr/sbin"],
    );
    fs::write(attributes.join("current"), "libvirtd (complain)\n").unwrap();
    patient.is_well("hook");
    let selinux = patient.host.path("sys/fs/selinux");
    fs::create_dir_all(&selinux).unwrap();
    fs::write(selinux.join("enforce"), "1").unwrap();
    patient.finds("hook", &["warning", "SELinux enforces", "ausearch -m avc"]);
    fs::write(selinux.join("enforce"), "0").unwrap();
    patient.is_well("hook");
}

#[test]
fn a_device_that_waits_for_somebody_and_a_whitelist_without_rules() {
    let patient = Patient::new();
    let run = |words: &[&str]| assert!(patient.host.virt_usb(words).status.success(), "{words:?}");
    let descriptors = |keyboard: &str| {
        format!(
            "120100020000004029050100000101020301090220000101008032090400000208065000{keyboard}"
        )
    };
    let seen = |number: u8, keyboard: &str| {
        patient.host.discover(&device(
            "0001",
            "1-1",
            number,
            &format!("serial = 'A'\ndescriptors = '{}'", descriptors(keyboard)),
        ));
    };
    let keys = fs::read_to_string(patient.host.config_file()).unwrap();
    let rule = "usb_passthrough_whitelist = [{ vendor = '0529', one_time_use = true }]\n";
    fs::write(patient.host.config_file(), format!("{keys}{rule}flap_limit = 2\nflap_pause = 1\n"))
        .unwrap();
    seen(5, "");
    seen(6, "");
    patient.is_well("device");
    seen(7, "");
    patient.finds(
        "device",
        &["warning", "device 1 (port 1-1) connects and disconnects", "check its plug"],
    );
    run(&["quarantine", "clear", "1"]);
    patient.is_well("device");
    let hostdev = "<hostdev mode='subsystem' type='usb'><source><vendor id='0x0529'/><product \
        id='0x0001'/>\
                   <address bus='1' device='7'/></source><alias name='ua-usb-1'/></hostdev>";
    let guest = virt_usb_suite::domain("g", 1, r#"{"usb_devices":[{"vendor_id":"0529"}]}"#);
    for (operation, xml) in [
        ("prepare", guest.clone()),
        ("started", guest.replace("</devices>", &format!("{hostdev}</devices>"))),
        ("release", guest.clone()),
    ] {
        let sub = if operation == "release" { "end" } else { "begin" };
        assert!(
            patient.host.call(&["g", operation, sub, "-"], xml.as_bytes()).status.success(),
            "{operation}"
        );
    }
    patient.finds("device", &["warning", "is quarantined: g (", "virt-usb quarantine clear 1"]);
    seen(7, "090401000103010100");
    patient.finds(
        "device",
        &["broken", "IT HAS CHANGED: interfaces 08/06/50 before, 08/06/50 03/01/01 now"],
    );
    run(&["quarantine", "clear", "1"]);
    patient.is_well("device");
    patient.is_well("configuration");
    fs::write(patient.host.config_file(), format!("{keys}usb_white_list_switch = 'on'\n")).unwrap();
    patient.finds("configuration", &["warning", "no device is available", "turn the switch off"]);
}

#[test]
fn a_configuration_and_an_inventory_that_cannot_be_read() {
    let patient = Patient::new();
    patient.is_well("configuration");
    patient.is_well("inventory");
    patient.is_well("machine");
    let keys = fs::read_to_string(patient.host.config_file()).unwrap();
    fs::write(patient.host.config_file(), format!("{keys}hold = 'tight'\n")).unwrap();
    patient.finds("configuration", &["broken", "line 7", "tight"]);
    fs::write(
        patient.host.config_file(),
        keys.replace("procfs_root", "procfs_root = '/nowhere' #"),
    )
    .unwrap();
    patient.finds("machine", &["broken", "/nowhere/sys/kernel/random/boot_id"]);
    fs::write(patient.host.config_file(), &keys).unwrap();
    let database = patient.host.path("state/inventory.sqlite");
    let run = |sql: &str| {
        assert!(
            std::process::Command::new("python3")
                .args([
                    "-c",
                    "import sqlite3, sys; c = sqlite3.connect(sys.argv[1]); \
            c.executescript(sys.argv[2]); c.commit()"
                ])
                .arg(&database)
                .arg(sql)
                .status()
                .unwrap()
                .success()
        );
    };
    run("UPDATE usb_devices SET status = 'allocated' WHERE id = 1");
    patient.finds("inventory", &["broken", "virt-usb store rebuild"]);
    run("UPDATE usb_devices SET status = 'available' WHERE id = 1");
    patient.is_well("inventory");
    run("INSERT INTO events (at, event, actor) VALUES ('2999-01-01T00:00:00.000Z', 'added', 'a \
            test')");
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
    patient.finds(
        "device",
        &["warning", "device 1 (port 1-1)", "1-1:1.0 has no driver", "drivers_probe"],
    );
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

#[test]
fn open_problems_and_metrics_that_are_not_served_are_found() {
    let patient = Patient::new();
    patient.is_well("problems");
    let context = virt_usb_config::host_env::context(&patient.host.config(), "test").unwrap();
    let instance = "11111111-2222-4333-8444-555555555555".parse().unwrap();
    let claimant = patient.host.store().claimant(instance, "erp", None).unwrap();
    let what = "libvirt has not answered about erp for 30 s (attach)";
    assert!(patient.host.store().note_problem(&claimant, "libvirt", Some(what), &context).unwrap());
    patient.finds("problems", &["warning", what]);
    let keys = fs::read_to_string(patient.host.config_file()).unwrap();
    let socket = patient.host.path("metrics.sock");
    fs::write(patient.host.config_file(), format!("{keys}metrics = {socket:?}\n")).unwrap();
    patient.finds("metrics", &["warning", "nothing listens at"]);
    let served = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    patient.is_well("metrics");
    drop(patient.agent);
    drop(served);
}

#[test]
fn findings_are_printed_line_by_line_as_they_are_made() {
    let patient = Patient::new();
    fs::remove_file(patient.host.path("hooks/qemu.d/50-virt-usb")).unwrap();
    let (hooks, run) = (patient.host.path("hooks"), patient.host.path("run"));
    let places = ["--hooks", hooks.to_str().unwrap(), "--run", run.to_str().unwrap()];
    let told = patient.host.virt_usb(&[&["doctor", "--all"], &places[..]].concat());
    let told = String::from_utf8(told.stdout).unwrap();
    assert!(told.starts_with("BROKEN   hook: there is none at "), "{told}");
    assert!(
        told.contains("\n         -> 'apt install")
            && told.contains("\nok       configuration: it can be read\n")
    );
}
