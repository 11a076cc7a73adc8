//! A fleet over a real etcd: real agents that publish, a real scheduler that follows.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test's helpers fail the test")]

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use virt_usb_model::{Flavor, HostDocument};
use virt_usb_store::Source;
use virt_usb_store::claim::Claimant;
use virt_usb_suite::{Etcd, Host, device, domain, program, root, until};

const ERP: &str = "11111111-2222-4333-8444-555555555555";

fn ok(output: &Output) -> String {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(output.status.success(), "{}{}", text(&output.stdout), text(&output.stderr));
    text(&output.stdout)
}

fn refused(output: &Output) -> String {
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && text.lines().count() == 1, "{output:?}");
    text
}

/// A program that runs until it is dropped.
struct Running(Child);

impl Running {
    fn signal(&self, signal: &str) {
        let sent = Command::new("kill").arg(signal).arg(self.0.id().to_string()).status().unwrap();
        assert!(sent.success());
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // A stopped process is killed as well.
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

/// A host of that name, a machine of its own, in the fleet's configuration.
fn host(etcd: &Etcd, name: &str, machine: char, more: &str) -> Host {
    let host = Host::new("");
    let id = host.path("machine-id");
    std::fs::write(&id, machine.to_string().repeat(32)).unwrap();
    std::fs::write(host.path("proc/sys/kernel/hostname"), name).unwrap();
    let config = std::fs::read_to_string(host.config_file()).unwrap();
    std::fs::write(host.config_file(), config + &etcd.keys(&id, more)).unwrap();
    host
}

fn agent(host: &Host) -> Running {
    let log = File::options().append(true).create(true).open(host.path("agent.log")).unwrap();
    let mut command = Command::new(program("virt-usbd"));
    command.arg("--config").arg(host.config_file()).arg("--sim").arg(host.path("sim.toml"));
    Running(command.stderr(log).spawn().unwrap())
}

fn log(host: &Host) -> String {
    std::fs::read_to_string(host.path("agent.log")).unwrap_or_default()
}

fn key(n: u8) -> String {
    device(&format!("000{n}"), &format!("1-{n}"), 4 + n, &format!("serial = 'S{n}'"))
}

/// The published document of the host; `None` if there is none.
fn document(etcd: &Etcd, name: &str) -> Option<HostDocument> {
    let text = etcd.get(&format!("/virt-usb/hosts/{name}"));
    (!text.is_empty()).then(|| HostDocument::parse(&text).unwrap_or_else(|e| panic!("{e}: {text}")))
}

fn states(document: &HostDocument) -> Vec<(u64, String)> {
    document.devices.iter().map(|d| (d.id.get(), d.status.clone())).collect()
}

#[test]
fn a_host_is_told_of_as_long_as_it_lives() {
    let mut etcd = Etcd::new();
    let one = host(&etcd, "compute1", 'a', "heartbeat = 2");
    std::fs::write(one.path("sim.toml"), key(1) + &key(2)).unwrap();
    let mut first = agent(&one);
    until("it to be said what is missing", || {
        log(&one).contains("has not joined the fleet").then_some(())
    });
    until("its devices to be found", || log(&one).contains(" ready").then_some(()));
    assert_eq!(document(&etcd, "compute1"), None);
    let joined = ok(&one.virt_usb(&["fleet", "join"]));
    assert_eq!(
        joined,
        "compute1 is in the fleet, with number 2: 1000000 was added to the id of each of its 2 \
         device(s)\n"
    );
    let seen = until("the document", || document(&etcd, "compute1"));
    let free = |id| (id, "available".to_owned());
    assert_eq!((seen.compute_node_id, states(&seen)), (2, vec![free(1_000_001), free(1_000_002)]));
    assert_eq!(seen, one.store().host_document().unwrap().unwrap());
    // Every change is published, regardless of its author.
    ok(&one.virt_usb(&["disable", "1000001"]));
    let changed = until("the change", || {
        document(&etcd, "compute1").filter(|d| d.devices[0].status == "unavailable")
    });
    assert!(changed.revision > seen.revision);
    std::fs::write(one.path("sim.new"), key(2) + &key(3)).unwrap();
    std::fs::rename(one.path("sim.new"), one.path("sim.toml")).unwrap();
    let third = |d: &HostDocument| d.devices.iter().any(|d| d.id.get() == 1_000_003);
    until("the new device", || document(&etcd, "compute1").filter(third));
    let version = || {
        let output = ok(&etcd.etcdctl(&["get", "-w", "json", "/virt-usb/hosts/compute1"]));
        let answer: Value = serde_json::from_str(&output).unwrap();
        answer["kvs"][0]["version"].as_u64().unwrap()
    };
    let before = version();
    until("the heartbeat", || (version() > before).then_some(()));
    let status = ok(&one.virt_usb(&["fleet", "status"]));
    assert!(
        status.contains("answers, leads")
            && status.contains("compute1 is number 2, and has published revision"),
        "{status}"
    );
    assert!(
        status.contains(
            "1 host(s) have joined, 1 can be reached, with 2 device(s), 2 of them available"
        ),
        "{status}"
    );
    // etcd is unreachable: the host continues, and publishes its changes afterwards.
    etcd.kill();
    until("it to be said", || log(&one).contains("no etcd answers").then_some(()));
    ok(&one.virt_usb(&["tag", "1000002", "blue"]));
    let why = refused(&one.virt_usb(&["fleet", "status"]));
    assert!(why.contains("no etcd answers: http://127.0.0.1:"), "{why}");
    etcd.start();
    let tagged =
        |d: &HostDocument| d.devices.iter().any(|d| d.tags.iter().any(|tag| tag == "blue"));
    until("what was missed", || document(&etcd, "compute1").filter(tagged));
    // An agent that dies takes its document along, in time.
    first.0.kill().unwrap();
    first.0.wait().unwrap();
    until("the document to go", || document(&etcd, "compute1").is_none().then_some(()));
    let status = ok(&one.virt_usb(&["fleet", "status"]));
    assert!(status.contains("unreachable: compute1"), "{status}");
    // An agent that restarts on a restored inventory continues above the known revision.
    let _second = agent(&one);
    until("it to be back", || document(&etcd, "compute1"));
}

#[test]
fn a_revision_never_falls() {
    let etcd = Etcd::new();
    let one = host(&etcd, "compute1", 'a', "");
    std::fs::write(one.path("sim.toml"), key(1)).unwrap();
    ok(&one.virt_usb(&["fleet", "join"]));
    let first = agent(&one);
    let seen = until("the document", || document(&etcd, "compute1"));
    // Read while the agent lives: afterwards its lease ends.
    let mut ahead: Value = serde_json::from_str(&etcd.get("/virt-usb/hosts/compute1")).unwrap();
    drop(first);
    ahead["revision"] = json!(seen.revision + 500);
    // Without a lease: it stays.
    etcd.put("/virt-usb/hosts/compute1", &ahead.to_string());
    let _second = agent(&one);
    let now = until("a higher one", || {
        document(&etcd, "compute1").filter(|d| d.revision > seen.revision + 500)
    });
    assert_eq!(one.store().host_document().unwrap().unwrap().revision, now.revision);
    assert!(
        log(&one)
            .contains(&format!("the fleet knows revision {} of this host", seen.revision + 500)),
        "{}",
        log(&one)
    );
}

#[test]
fn a_lost_lease_is_taken_again() {
    let etcd = Etcd::new();
    let one = host(&etcd, "compute1", 'a', "");
    std::fs::write(one.path("sim.toml"), key(1)).unwrap();
    ok(&one.virt_usb(&["fleet", "join"]));
    let _agent = agent(&one);
    until("the document", || document(&etcd, "compute1"));
    let created = || {
        let output = ok(&etcd.etcdctl(&["get", "-w", "json", "/virt-usb/hosts/compute1"]));
        let answer: Value = serde_json::from_str(&output).unwrap();
        answer["kvs"][0]["create_revision"].as_u64()
    };
    let before = created().unwrap();
    let leases = ok(&etcd.etcdctl(&["lease", "list"]));
    let lease = leases.lines().last().unwrap().trim();
    ok(&etcd.etcdctl(&["lease", "revoke", lease]));
    // The key goes with its lease; the agent may have made it again by now.
    until("it to be told again", || created().filter(|revision| *revision > before));
    assert!(document(&etcd, "compute1").is_some());
}

#[test]
fn a_machine_has_one_number_and_a_name_one_machine() {
    let etcd = Etcd::new();
    let (one, two) = (host(&etcd, "compute1", 'a', ""), host(&etcd, "compute2", 'b', ""));
    for host in [&one, &two] {
        host.discover(&(key(1) + &key(2)));
        host.flavor("by-id", r#"{"usb_devices":[{"id":2}]}"#);
        host.flavor("elsewhere", r#"{"usb_devices":[{"id":77}]}"#);
        host.flavor("by-kind", r#"{"usb_devices":[{"vendor_id":"0529"}]}"#);
    }
    // Not while a device is held.
    let erp = domain("erp", 7, r#"{"usb_devices":[{"id":1}]}"#);
    ok(&one.call(&["erp", "prepare", "begin", "-"], erp.as_bytes()));
    let why = refused(&one.virt_usb(&["fleet", "join"]));
    assert!(why.contains("devices are held") && why.contains("device 1 by erp"), "{why}");
    assert_eq!(etcd.get("/virt-usb/next"), "", "etcd has not heard of it");
    ok(&one.call(&["erp", "release", "end", "-"], erp.as_bytes()));
    let crm = Claimant { instance: ERP.parse().unwrap(), domain: "crm".into(), project: None };
    let wish = Flavor::parse_lists(Some(r#"[{"id":2}]"#), None).unwrap().usb_devices;
    let context = virt_usb_config::host_env::context(&one.config(), "test").unwrap();
    one.store().assign(&crm, Source::Operator, &wish, &context).unwrap();
    let joined = ok(&one.virt_usb(&["fleet", "join"]));
    assert!(
        joined.contains("with number 2") && joined.contains("'virt-usb flavor set': by-id\n"),
        "{joined}"
    );
    assert!(joined.contains("1 assignment(s) name the new ids\n"), "{joined}");
    assert_eq!(one.store().all_assignments().unwrap()[0].request.to_string(), r#"{"id":1000002}"#);
    assert_eq!(
        ok(&one.virt_usb(&["fleet", "join"])),
        "compute1 is in the fleet, with number 2 as before\n"
    );
    assert!(
        ok(&two.virt_usb(&["fleet", "join"]))
            .contains("with number 3: 2000000 was added to the id of each of its 2 device(s)")
    );
    assert!(ok(&two.virt_usb(&["devices"])).contains("2000002"));
    assert!(
        ok(&one.virt_usb(&["events"]))
            .contains("number 1 became 2: 1000000 was added to each device id")
    );
    assert!(ok(&one.virt_usb(&["store", "check"])).contains("no problems found"));
    // What comes later goes on from there.
    one.discover_as("compute1", &(key(1) + &key(2) + &key(3)));
    assert!(ok(&one.virt_usb(&["devices"])).contains("1000003"));
    // Another machine of a name that is taken.
    let three = host(&etcd, "compute1", 'c', "");
    let why = refused(&three.virt_usb(&["fleet", "join"]));
    assert!(
        why.contains("another machine is in the fleet as \"compute1\", with number 2"),
        "{why}"
    );
    // The first is called otherwise: its name is free then.
    std::fs::write(one.path("proc/sys/kernel/hostname"), "compute9").unwrap();
    assert_eq!(
        ok(&one.virt_usb(&["fleet", "join"])),
        "compute9 is in the fleet, with number 2 as before\n"
    );
    assert!(ok(&three.virt_usb(&["fleet", "join"])).contains("with number 4"));
    // The host leaves, and returns with its old number.
    assert!(ok(&one.virt_usb(&["fleet", "leave"])).starts_with("compute9 has left the fleet"));
    assert_eq!(ok(&one.virt_usb(&["fleet", "leave"])), "compute9 is not in the fleet\n");
    assert!(ok(&one.virt_usb(&["fleet", "join"])).contains("with number 2 as before"));
    // A whole inventory that was copied to another machine is renumbered.
    let copy = host(&etcd, "compute5", 'd', "");
    ok(&one.virt_usb(&["store", "backup", copy.path("copy").to_str().unwrap()]));
    std::fs::create_dir_all(copy.path("state")).unwrap();
    std::fs::rename(copy.path("copy"), copy.path("state/inventory.sqlite")).unwrap();
    let joined = ok(&copy.virt_usb(&["fleet", "join"]));
    assert!(joined.contains("with number 5") && joined.contains("3000000 was added"), "{joined}");
    assert!(ok(&copy.virt_usb(&["devices"])).contains("4000001"));
    // A name that cannot be a part of a key, a machine without an id.
    std::fs::write(copy.path("proc/sys/kernel/hostname"), "a/b").unwrap();
    assert!(refused(&copy.virt_usb(&["fleet", "join"])).contains("this host's name is \"a/b\""));
    std::fs::write(two.path("machine-id"), "uninitialized\n").unwrap();
    assert!(refused(&two.virt_usb(&["fleet", "join"])).contains("it holds no machine id"));
    let lone = Host::new("");
    assert!(
        refused(&lone.virt_usb(&["fleet", "status"]))
            .contains("the configuration has no [fleet] section")
    );
}

#[test]
fn many_join_at_once_and_no_two_get_one_number() {
    let etcd = Etcd::new();
    let hosts: Vec<Host> =
        ('0'..='9').map(|c| host(&etcd, &format!("compute{c}"), c, "")).collect();
    let numbers: Vec<u64> = std::thread::scope(|scope| {
        let join = |host| {
            let host: &Host = host;
            scope.spawn(move || {
                let answer: Value =
                    serde_json::from_str(&ok(&host.virt_usb(&["--json", "fleet", "join"])))
                        .unwrap();
                answer["number"].as_u64().unwrap()
            })
        };
        let joining: Vec<_> = hosts.iter().map(join).collect();
        joining.into_iter().map(|one| one.join().unwrap()).collect()
    });
    let mut sorted = numbers.clone();
    sorted.sort_unstable();
    assert_eq!(sorted, (2..12).collect::<Vec<u64>>(), "{numbers:?}");
}

/// Runs the script that makes etcd's roles.
fn roles(etcd: &Etcd, password: &str, arguments: &[&str]) {
    let mut script = etcd
        .client(root().join("install/etcd-roles"), "300s")
        .args(arguments)
        .stdin(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    script.stdin.take().unwrap().write_all(format!("{password}\n").as_bytes()).unwrap();
    assert!(script.wait().unwrap().success(), "{arguments:?}");
}

#[test]
fn a_host_writes_its_own_document_and_nothing_else() {
    let etcd = Etcd::new();
    roles(&etcd, "", &["roles"]);
    roles(&etcd, "secret1", &["host", "compute1"]);
    roles(&etcd, "secret9", &["user", "joiner", "virt-usb-admin"]);
    roles(&etcd, "look", &["user", "scheduler", "virt-usb-reader"]);
    // Twice is once.
    roles(&etcd, "", &["roles"]);
    roles(&etcd, "secret1", &["host", "compute1"]);
    ok(&etcd.etcdctl(&["user", "add", "root:rootpw"]));
    ok(&etcd.etcdctl(&["user", "grant-role", "root", "root"]));
    ok(&etcd.etcdctl(&["auth", "enable"]));
    let password = |text: &str| {
        let file = etcd.path().join("password");
        std::fs::write(&file, format!("{text}\n")).unwrap();
        file
    };
    let own = password("secret1");
    let own =
        std::fs::rename(&own, etcd.path().join("own")).map(|()| etcd.path().join("own")).unwrap();
    let one = host(&etcd, "compute1", 'a', &format!("user = 'compute1'\npassword_file = {own:?}"));
    std::fs::write(one.path("sim.toml"), key(1)).unwrap();
    // The host's own user may not join it to the fleet; an administrator may.
    let why = refused(&one.virt_usb(&["fleet", "join"]));
    assert!(
        why.contains("etcd does not allow it to user \"compute1\": join the fleet: /usr/share"),
        "{why}"
    );
    let admin = password("secret9");
    let wrong = refused(&one.virt_usb(&[
        "fleet",
        "join",
        "--user",
        "joiner",
        "--password-file",
        own.to_str().unwrap(),
    ]));
    assert!(wrong.contains("etcd does not know who this is"), "{wrong}");
    ok(&one.virt_usb(&[
        "fleet",
        "join",
        "--user",
        "joiner",
        "--password-file",
        admin.to_str().unwrap(),
    ]));
    let _agent = agent(&one);
    let as_user = |user: &str, rest: &[&str]| etcd.etcdctl(&[&["--user", user], rest].concat());
    until("the document", || {
        let got =
            as_user("root:rootpw", &["get", "--print-value-only", "/virt-usb/hosts/compute1"]);
        ok(&got).contains("\"compute_node_id\":2").then_some(())
    });
    for key in [
        "hosts/compute2",
        "servers/compute2",
        "answers/compute2/1",
        "hosts/compute11",
        "requests/compute1/1",
        "flavors/erp",
        "grants/erp",
        "nodes/2",
        "machines/x",
        "next",
    ] {
        let denied = as_user("compute1:secret1", &["put", &format!("/virt-usb/{key}"), "x"]);
        let text = String::from_utf8_lossy(&denied.stderr).into_owned();
        assert!(!denied.status.success() && text.contains("permission denied"), "{key}: {text}");
    }
    assert!(
        as_user("compute1:secret1", &["put", "/virt-usb/hosts/compute1", "{}"]).status.success()
    );
    assert!(
        !as_user("scheduler:look", &["put", "/virt-usb/hosts/compute1", "{}"]).status.success()
    );
    assert!(as_user("scheduler:look", &["get", "--prefix", "/virt-usb/"]).status.success());
    // Without a user at all.
    let none = host(&etcd, "compute2", 'b', "");
    assert!(
        refused(&none.virt_usb(&["fleet", "status"]))
            .contains("etcd does not know who this is: user name is empty")
    );
}

#[test]
fn etcd_is_spoken_to_with_certificates_on_both_sides() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).display().to_string();
    let script = "set -e; cd \"$0\"
        openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout ca.key -out \
        ca.crt -subj /CN=ca -days 2
        printf 'subjectAltName=IP:127.0.0.1\\nextendedKeyUsage=serverAuth,clientAuth\\n' > ext
        for who in etcd host; do
            openssl req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout $who.key -out \
            $who.csr -subj /CN=$who
            openssl x509 -req -in $who.csr -CA ca.crt -CAkey ca.key -CAcreateserial -out $who.crt \
            -days 2 -extfile ext
        done";
    let made = Command::new("bash").args(["-c", script]).arg(dir.path()).output().unwrap();
    ok(&made);
    let arguments: Vec<String> =
        [("--cert-file", "etcd.crt"), ("--key-file", "etcd.key"), ("--trusted-ca-file", "ca.crt")]
            .iter()
            .flat_map(|(name, file)| [(*name).to_owned(), path(file)])
            .chain(["--client-cert-auth".to_owned()])
            .collect();
    let etcd = Etcd::with(&arguments, "https");
    let whole = format!(
        "ca = {:?}\ncertificate = {:?}\nkey = {:?}",
        path("ca.crt"),
        path("host.crt"),
        path("host.key")
    );
    let one = host(&etcd, "compute1", 'a', &whole);
    assert!(ok(&one.virt_usb(&["fleet", "join"])).contains("with number 2"));
    let nobody = host(&etcd, "compute2", 'b', &format!("ca = {:?}", path("ca.crt")));
    let why = refused(&nobody.virt_usb(&["fleet", "join"]));
    assert!(why.contains("no etcd answers"), "{why}");
    let stranger = host(&etcd, "compute3", 'c', &whole.replace("ca.crt", "host.crt"));
    let why = refused(&stranger.virt_usb(&["fleet", "join"]));
    assert!(why.contains("no etcd answers"), "{why}");
    let lost = host(&etcd, "compute4", 'd', &format!("ca = {:?}", path("none.crt")));
    let why = refused(&lost.virt_usb(&["fleet", "join"]));
    assert!(why.contains("none.crt: No such file or directory"), "{why}");
}

/// A scheduler that follows.
struct Scheduler<'a> {
    host: &'a Host,
    running: Running,
}

impl<'a> Scheduler<'a> {
    fn start(host: &'a Host, more: &[&str]) -> Self {
        let log =
            File::options().append(true).create(true).open(host.path("scheduler.log")).unwrap();
        let mut command = Command::new(program("virt-usb"));
        command.arg("--config").arg(host.config_file()).arg("scheduler").args(more);
        command.arg("--socket").arg(host.path("scheduler.sock"));
        command.arg("--component").arg(root().join("target/release/virt-usb-filter.wasm"));
        Self { host, running: Running(command.stderr(log).spawn().unwrap()) }
    }

    fn ask(&self, method: &str, path: &str, body: &Value) -> (u16, Value) {
        let Ok(mut stream) = UnixStream::connect(self.host.path("scheduler.sock")) else {
            return (0, Value::Null);
        };
        let body = if body.is_null() { String::new() } else { body.to_string() };
        let request = format!(
            "{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: \
                application/json\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        );
        stream.write_all(request.as_bytes()).unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        let status = text.split(' ').nth(1).and_then(|code| code.parse().ok()).unwrap_or(0);
        let body = text.split_once("\r\n\r\n").map_or("", |(_, body)| body);
        (status, serde_json::from_str(body).unwrap_or_else(|_| Value::String(body.to_owned())))
    }

    fn select(&self, asked: &Value) -> Value {
        let (status, answer) = self.ask("POST", "/select", asked);
        assert_eq!(status, 200, "{answer}");
        answer
    }

    /// How many hosts have such a device free.
    fn matched(&self, vendor: &str, product: &str) -> u64 {
        let flavor = json!({"usb_devices": [{"vendor_id": vendor, "product_id": product}]});
        self.select(&json!({"flavor": flavor}))["matched"].as_u64().unwrap()
    }

    fn ready(&self, hosts: u64) {
        until("the scheduler to know the fleet", || {
            let (status, health) = self.ask("GET", "/health", &Value::Null);
            (status == 200 && health["hosts"] == hosts).then_some(())
        });
    }
}

fn entry(id: u64, product: &str, status: &str) -> Value {
    json!({"id": id, "address": "usb_1_5", "product_id": product, "vendor_id": "0529", "status": status, "port_path": "1-1", "class": "00"})
}

fn made(host: &str, node: u64, revision: u64, devices: &[Value]) -> String {
    json!({"version": 1, "host": host, "compute_node_id": node, "revision": revision, "devices": devices})
        .to_string()
}

fn publish(etcd: &Etcd, host: &str, node: u64, revision: u64, devices: &[Value]) {
    etcd.put(&format!("/virt-usb/hosts/{host}"), &made(host, node, revision, devices));
}

#[test]
fn a_scheduler_answers_what_the_fleet_has() {
    let mut etcd = Etcd::new();
    let place = host(&etcd, "scheduler", 'f', "");
    publish(
        &etcd,
        "a",
        2,
        1,
        &[entry(1_000_001, "0001", "available"), entry(1_000_002, "0001", "available")],
    );
    publish(&etcd, "b", 3, 1, &[entry(2_000_001, "0001", "available")]);
    publish(&etcd, "c", 4, 1, &[entry(3_000_001, "0001", "allocated")]);
    let mut scheduler = Scheduler::start(&place, &["--max-age", "2"]);
    scheduler.ready(3);
    let wanted = json!({"usb_devices": [{"vendor_id": "0529", "product_id": "0001"}]});
    let answer = scheduler.select(&json!({"flavor": wanted}));
    assert_eq!(
        (&answer["matched"], &answer["hosts"], &answer["age"]),
        (&json!(2), &json!(3), &json!(0))
    );
    assert_eq!(
        answer["placements"][0],
        json!({"host": "a", "score": answer["placements"][0]["score"], "devices": [1_000_001]})
    );
    // By the name of one of the fleet's.
    etcd.put("/virt-usb/flavors/erp", &wanted.to_string());
    let named = |name: &str| scheduler.ask("POST", "/select", &json!({ "flavor": name }));
    until("the flavor", || (named("erp").0 == 200).then_some(()));
    assert_eq!(named("@erp").1["placements"], answer["placements"]);
    let (status, why) = named("none");
    assert_eq!(
        (status, &why["error"]),
        (404, &json!("the fleet has no flavor of the name \"none\""))
    );
    let narrow = scheduler.select(&json!({"flavor": wanted, "hosts": ["b", "c", "x"], "limit": 5}));
    assert_eq!((&narrow["matched"], &narrow["placements"][0]["host"]), (&json!(1), &json!("b")));
    let none = scheduler.select(&json!({"flavor": {"usb_devices": [{"vendor_id": "1234"}]}}));
    assert_eq!((&none["matched"], &none["reasons"]), (&json!(0), &json!({"no-such-device": 3})));
    let (_, why) = scheduler.ask("POST", "/explain", &json!({"flavor": wanted}));
    assert_eq!(
        why["verdicts"],
        json!({"c": {"accepted": false, "request": 0, "reason": "too-few-free", "wanted": 1, "matching": 1, "allowed": 1, "free": 0, "because": "usb_devices[0] wants 1: 1 match, 0 of them are free"}})
    );
    let (_, why) = scheduler.ask("POST", "/explain", &json!({"flavor": wanted, "host": "b"}));
    assert_eq!(why["verdicts"]["b"]["devices"], json!([2_000_001]));
    // Changes come by themselves.
    publish(&etcd, "c", 4, 2, &[entry(3_000_001, "0001", "available")]);
    until("the change", || (scheduler.matched("0529", "0001") == 3).then_some(()));
    ok(&etcd.etcdctl(&["del", "/virt-usb/hosts/c"]));
    until("the host to be gone", || (scheduler.matched("0529", "0001") == 2).then_some(()));
    // A host cannot publish for another, and invalid documents remove nothing.
    etcd.put("/virt-usb/hosts/b", &made("a", 2, 9, &[]));
    etcd.put("/virt-usb/hosts/d", "no document");
    etcd.put("/virt-usb/hosts/e", &made("e", 6, 1, &[json!({"id": "?"})]));
    until("it to be said", || {
        let (_, health) = scheduler.ask("GET", "/health", &Value::Null);
        let refused = &health["refused"];
        (refused["b"].as_str()?.contains("it names another host: \"a\"")
            && refused["d"].is_string())
        .then_some(())
    });
    assert_eq!(scheduler.matched("0529", "0001"), 2);
    // What cannot be asked is said, each in its way.
    for (method, path, body, status, why) in [
        ("POST", "/select", json!({"flavour": {}}), 400, "unknown field `flavour`"),
        (
            "POST",
            "/select",
            json!({"flavor": {"usb_devices": [{"vendor_id": "xyz"}]}}),
            400,
            "flavor: usb_devices[0].vendor_id",
        ),
        (
            "POST",
            "/select",
            json!({"flavor": wanted, "assume": 0}),
            400,
            "assume: wanted 1 to 3600 seconds",
        ),
        ("POST", "/select", json!({"flavor": wanted, "project": ""}), 400, "project: "),
        ("POST", "/select", json!([]), 400, "the body cannot be read"),
        ("GET", "/select", Value::Null, 405, "this is asked otherwise"),
        ("GET", "/nowhere", Value::Null, 404, "there is /select"),
        ("DELETE", "/assumptions/none", Value::Null, 404, "there is no such token"),
    ] {
        let (got, answer) = scheduler.ask(method, path, &body);
        assert!(
            got == status && answer["error"].as_str().is_some_and(|e| e.contains(why)),
            "{method} {path} {body}: {got} {answer}"
        );
    }
    let (_, metrics) = scheduler.ask("GET", "/metrics", &Value::Null);
    let metrics = metrics.as_str().unwrap();
    assert!(
        metrics.contains("virt_usb_scheduler_hosts 3")
            && metrics.contains("path=\"/select\",status=\"200\""),
        "{metrics}"
    );
    // etcd is unreachable: the last view stays in use for the configured time, and no longer.
    etcd.kill();
    let (status, answer) = until("the age to be too great", || {
        let (status, answer) = scheduler.ask("POST", "/select", &json!({"flavor": wanted}));
        (status != 200).then_some((status, answer))
    });
    assert_eq!(status, 503);
    assert!(
        answer["error"].as_str().unwrap().contains("nothing was heard of the fleet for"),
        "{answer}"
    );
    etcd.start();
    until("it to be heard again", || {
        (scheduler.ask("POST", "/select", &json!({"flavor": wanted})).0 == 200).then_some(())
    });
    scheduler.running.signal("-TERM");
    assert_eq!(scheduler.running.0.wait().unwrap().code(), Some(0));
    assert!(!place.path("scheduler.sock").exists());
}

#[test]
fn a_burst_does_not_get_one_device_twice() {
    let etcd = Etcd::new();
    let place = host(&etcd, "scheduler", 'f', "");
    for n in 0..8u64 {
        let id = (n + 1) * 1_000_000;
        let devices = [entry(id + 1, "0001", "available"), entry(id + 2, "0001", "available")];
        publish(&etcd, &format!("h{n}"), n + 2, 1, &devices);
    }
    let scheduler = Scheduler::start(&place, &[]);
    scheduler.ready(8);
    let wanted = json!({"usb_devices": [{"vendor_id": "0529"}]});
    let assume = json!({"flavor": wanted, "assume": 600, "limit": 1});
    let answers: Vec<Value> = std::thread::scope(|scope| {
        let ask = |_| scope.spawn(|| scheduler.select(&assume));
        let asking: Vec<_> = (0..20).map(ask).collect();
        asking.into_iter().map(|one| one.join().unwrap()).collect()
    });
    let mut given: BTreeMap<u64, Value> = BTreeMap::new();
    for answer in &answers {
        if let Some(device) = answer["placements"][0]["devices"][0].as_u64() {
            assert!(given.insert(device, answer["token"].clone()).is_none(), "{device} twice");
        } else {
            assert_eq!(
                (&answer["matched"], &answer["reasons"]),
                (&json!(0), &json!({"too-few-free": 8})),
                "{answer}"
            );
        }
    }
    assert_eq!(given.len(), 16);
    assert_eq!(scheduler.matched("0529", "0001"), 0);
    // One is cancelled, and free again.
    let token = given[&1_000_001].as_str().unwrap();
    assert_eq!(scheduler.ask("DELETE", &format!("/assumptions/{token}"), &Value::Null).0, 204);
    assert_eq!(scheduler.matched("0529", "0001"), 1);
    // A document that still says "free" takes no promise back; one that says what became of it ends
    // it.
    publish(
        &etcd,
        "h1",
        3,
        2,
        &[entry(2_000_001, "0001", "allocated"), entry(2_000_002, "0001", "available")],
    );
    let assumed = |device: u64| {
        let (_, answer) = scheduler.ask("GET", "/assumptions", &Value::Null);
        answer["assumptions"].as_object().unwrap().values().any(|a| a["devices"] == json!([device]))
    };
    until("the promise to be kept", || (!assumed(2_000_001)).then_some(()));
    assert!(assumed(2_000_002));
    assert_eq!(scheduler.matched("0529", "0001"), 1, "the one that was cancelled");
    publish(
        &etcd,
        "h1",
        3,
        3,
        &[entry(2_000_001, "0001", "available"), entry(2_000_002, "0001", "available")],
    );
    until("it to be free again", || (scheduler.matched("0529", "0001") == 2).then_some(()));
    // One whose time is up.
    let short = scheduler.select(&json!({"flavor": wanted, "assume": 10, "limit": 1}));
    assert_eq!((short["matched"].as_u64(), scheduler.matched("0529", "0001")), (Some(2), 1));
    until("its time to be up", || (scheduler.matched("0529", "0001") == 2).then_some(()));
}

#[test]
fn history_that_is_compacted_under_a_watcher_leaves_no_gap() {
    let etcd = Etcd::new();
    let place = host(&etcd, "scheduler", 'f', "");
    for n in 0..20u64 {
        publish(
            &etcd,
            &format!("h{n}"),
            n + 2,
            1,
            &[entry((n + 1) * 1_000_000 + 1, "0001", "available")],
        );
    }
    let scheduler = Scheduler::start(&place, &[]);
    scheduler.ready(20);
    // It hears nothing for a while; what happens then is forgotten before it hears again.
    scheduler.running.signal("-STOP");
    for n in 0..10u64 {
        publish(
            &etcd,
            &format!("h{n}"),
            n + 2,
            2,
            &[entry((n + 1) * 1_000_000 + 1, "0002", "available")],
        );
    }
    for n in 10..15 {
        ok(&etcd.etcdctl(&["del", &format!("/virt-usb/hosts/h{n}")]));
    }
    let answer: Value =
        serde_json::from_str(&ok(&etcd.etcdctl(&["get", "x", "-w", "json"]))).unwrap();
    let revision = answer["header"]["revision"].as_u64().unwrap();
    ok(&etcd.etcdctl(&["compact", &revision.to_string()]));
    scheduler.running.signal("-CONT");
    scheduler.ready(15);
    until("what there is", || {
        (scheduler.matched("0529", "0001") == 5 && scheduler.matched("0529", "0002") == 10)
            .then_some(())
    });
}

#[test]
fn flavors_are_the_fleets_and_every_host_has_them() {
    let mut etcd = Etcd::new();
    let (one, two) = (host(&etcd, "compute1", 'a', ""), host(&etcd, "compute2", 'b', ""));
    let asks = |product: &str| {
        format!(r#"{{"usb_devices":[{{"vendor_id":"0529","product_id":"{product}"}}]}}"#)
    };
    let set = |host: &Host, name: &str, product: &str| {
        host.virt_usb(&["flavor", "set", name, &asks(product)])
    };
    let has = |host: &Host, name: &str, product: &str| {
        let shown = host.virt_usb(&["flavor", "show", name]);
        String::from_utf8_lossy(&shown.stdout).contains(product)
    };
    for host in [&one, &two] {
        std::fs::write(host.path("sim.toml"), key(1)).unwrap();
    }
    // Each has its own, while etcd knows of none.
    ok(&set(&one, "both", "0001"));
    ok(&set(&two, "both", "0002"));
    ok(&set(&two, "second/s %", "0002"));
    ok(&one.virt_usb(&["fleet", "join"]));
    let joined = ok(&two.virt_usb(&["fleet", "join"]));
    assert!(
        joined.contains(
            "the fleet has other flavors with these names, which apply from now on: both\n"
        ),
        "{joined}"
    );
    let _agents = (agent(&one), agent(&two));
    until("the fleet's flavors", || {
        (has(&two, "both", "0001") && has(&one, "second/s %", "0002")).then_some(())
    });
    // What is changed on one host is changed on all.
    assert!(ok(&set(&one, "erp", "0003")).starts_with("stored: "));
    assert!(ok(&set(&one, "erp", "0003")).starts_with("unchanged: "));
    until("the change", || has(&two, "erp", "0003").then_some(()));
    ok(&two.virt_usb(&["flavor", "remove", "both"]));
    assert!(!has(&two, "both", "0001"));
    until("it to be gone", || (!has(&one, "both", "0001")).then_some(()));
    assert!(refused(&one.virt_usb(&["flavor", "remove", "both"])).contains("no flavor named"));
    // What cannot be read takes nothing away.
    etcd.put("/virt-usb/flavors/erp", "rubbish");
    etcd.put("/virt-usb/flavors/new", &asks("0004"));
    until("the new one", || (has(&two, "new", "0004") && has(&one, "new", "0004")).then_some(()));
    assert!(has(&two, "erp", "0003"));
    // etcd is unreachable: the mirrored copies stay in use, and a change is all or nothing.
    etcd.kill();
    let why = refused(&set(&one, "erp", "0009"));
    assert!(
        why.contains(
            "the flavors of this host are the fleet's, and are changed in etcd alone: no etcd \
                answers"
        ),
        "{why}"
    );
    assert!(has(&one, "new", "0004") && has(&one, "erp", "0003"));
    etcd.start();
    ok(&set(&one, "erp", "0009"));
    until("it to be mirrored", || has(&two, "erp", "0009").then_some(()));
    // After it has left, the host has its own flavors again.
    ok(&two.virt_usb(&["fleet", "leave"]));
    ok(&set(&two, "mine", "0005"));
    assert_eq!(etcd.get("/virt-usb/flavors/mine"), "");
    // An etcd that has lost everything takes nothing away.
    etcd.kill();
    std::fs::remove_dir_all(etcd.path().join("data")).unwrap();
    std::fs::remove_file(one.path("agent.log")).unwrap();
    etcd.start();
    let lost = || ok(&one.virt_usb(&["fleet", "status"])).contains("has not joined");
    until("the fleet to be gone", || lost().then_some(()));
    std::thread::sleep(Duration::from_secs(2));
    assert!(has(&one, "erp", "0009") && has(&one, "new", "0004"));
}

/// A fleet that is made up, below a prefix of its own.
#[test]
fn grants_are_the_fleets_and_every_host_heeds_them() {
    let mut etcd = Etcd::new();
    let (one, two) = (host(&etcd, "compute1", 'a', ""), host(&etcd, "compute2", 'b', ""));
    for (host, n) in [(&one, 1), (&two, 2)] {
        std::fs::write(host.path("sim.toml"), key(n)).unwrap();
    }
    let grant = |devices: &str, project: &str| {
        format!(r#"{{"usb_devices":[{devices}],"projects":["{project}"]}}"#)
    };
    // The projects that the host's one key is available to, as published.
    let whose = |etcd: &Etcd, host: &str| -> Option<String> {
        let document = document(etcd, host)?;
        let projects = &document.devices.first()?.projects;
        Some(projects.iter().map(ToString::to_string).collect::<Vec<_>>().join("+"))
    };
    ok(&one.virt_usb(&["grant", "set", "mine", &grant(r#"{"serial":"S1"}"#, "p1")]));
    ok(&one.virt_usb(&["fleet", "join"]));
    ok(&two.virt_usb(&["grant", "set", "mine", &grant(r#"{"serial":"S2"}"#, "p2")]));
    let joined = ok(&two.virt_usb(&["fleet", "join"]));
    assert!(
        joined.contains(
            "the fleet has other grants with these names, which apply from now on: mine\n"
        ),
        "{joined}"
    );
    let _agents = (agent(&one), agent(&two));
    let published = |etcd: &Etcd, first: &str, second: &str| {
        let now = (whose(etcd, "compute1"), whose(etcd, "compute2"));
        (now == (Some(first.to_owned()), Some(second.to_owned()))).then_some(())
    };
    until("the fleet's grant", || published(&etcd, "p1", ""));
    ok(&two.virt_usb(&["grant", "set", "all", &grant(r#"{"vendor_id":"0529"}"#, "p3")]));
    until("a grant that was set on the other host", || published(&etcd, "p3+p1", "p3"));
    // An invalid grant does not make a device available to all projects.
    etcd.put("/virt-usb/grants/all", "rubbish");
    etcd.put("/virt-usb/grants/new", &grant(r#"{"serial":"S2"}"#, "p4"));
    until("the new one", || published(&etcd, "p3+p1", "p3+p4"));
    // etcd is unreachable: the grants apply, and a change is all or nothing.
    etcd.kill();
    let why = refused(&one.virt_usb(&["grant", "remove", "mine"]));
    assert!(
        why.contains("the grants of this host are the fleet's, and are changed in etcd alone"),
        "{why}"
    );
    let held = ok(&one.virt_usb(&["grant", "show", "mine"]));
    assert!(held.contains("p1"), "{held}");
    etcd.start();
    ok(&one.virt_usb(&["grant", "remove", "mine"]));
    ok(&one.virt_usb(&["grant", "remove", "all"]));
    ok(&one.virt_usb(&["grant", "remove", "new"]));
    until("all to be everybody's", || published(&etcd, "", ""));
}

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
    assert!(report["done"]["host died"].as_u64().unwrap_or_default() > 0, "{report:#}");
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
fn whatever_befalls_etcd_no_document_is_lost_and_no_device_in_two_guests() {
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

const CRM: &str = "99999999-2222-4333-8444-555555555555";
const LAB: &str = "77777777-2222-4333-8444-555555555555";
const OURS: &str = "3f0c7a5e9d2b4c1f8a6e5d4c3b2a1908";
const THEIRS: &str = "00000000000000000000000000000002";

/// A host with an API, and its guests.
fn served(
    etcd: &Etcd,
    name: &str,
    machine: char,
    devices: &str,
    guests: &[(&str, &str, &str)],
) -> Host {
    let host = host(etcd, name, machine, "");
    let config = std::fs::read_to_string(host.config_file()).unwrap();
    std::fs::write(host.config_file(), config.replace("api = \"off\"", "api = \"127.0.0.1:0\""))
        .unwrap();
    let guest = |(name, uuid, project): &(&str, &str, &str)| {
        format!("[[domain]]\nname = '{name}'\nuuid = '{uuid}'\nproject = '{project}'\n")
    };
    let guests: String = guests.iter().map(guest).collect();
    std::fs::write(host.path("sim.toml"), format!("{devices}{guests}")).unwrap();
    ok(&host.virt_usb(&["fleet", "join"]));
    host
}

/// Where the host's API is.
fn address(host: &Host) -> String {
    let log = log(host);
    let at = log.rsplit("the API is served at http://").next().and_then(|at| at.split('/').next());
    at.unwrap().to_owned()
}

/// A page of the host's portal for the owner of that token.
fn page(host: &Host, token: &str, path: &str) -> String {
    let (at, jar) = (address(host), host.path("cookies"));
    let curl = |arguments: &[&str]| {
        let mut command = Command::new("curl");
        command
            .args(["--silent", "--show-error", "--fail", "--cookie-jar"])
            .arg(&jar)
            .arg("--cookie")
            .arg(&jar);
        ok(&command.args(arguments).output().unwrap())
    };
    curl(&["--data-urlencode", &format!("token={token}"), &format!("http://{at}/portal/sign-in")]);
    curl(&[&format!("http://{at}{path}")])
}

/// Asks a host's API: with a token over the network, or else as root on its socket.
fn api(host: &Host, token: Option<&str>, method: &str, path: &str, body: &Value) -> (u16, Value) {
    let body = if body.is_null() { String::new() } else { body.to_string() };
    let token_line = token.map(|token| format!("X-Auth-Token: {token}\r\n")).unwrap_or_default();
    let request = format!(
        "{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{token_line}Content-Type: \
            application/json\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    );
    let mut text = String::new();
    if token.is_some() {
        let mut stream = std::net::TcpStream::connect(address(host)).unwrap();
        stream.write_all(request.as_bytes()).unwrap();
        stream.read_to_string(&mut text).unwrap();
    } else {
        let Ok(mut stream) = UnixStream::connect(host.path("state/api.sock")) else {
            return (0, Value::Null);
        };
        stream.write_all(request.as_bytes()).unwrap();
        stream.read_to_string(&mut text).unwrap();
    }
    let status = text.split(' ').nth(1).and_then(|code| code.parse().ok()).unwrap_or(0);
    let body = text.split_once("\r\n\r\n").map_or("", |(_, body)| body);
    (status, serde_json::from_str(body).unwrap_or_else(|_| Value::String(body.to_owned())))
}

fn act(host: &Host, token: Option<&str>, action: &str, server: &str, id: u64) -> (u16, Value) {
    let body = json!({ action: { "usb_devices_requests": [{ "id": id }] } });
    api(host, token, "POST", &format!("/v3/servers/{server}/action"), &body)
}

fn message(answer: &(u16, Value), status: u16) -> String {
    assert_eq!(answer.0, status, "{answer:?}");
    let fault = answer.1.as_object().and_then(|fault| fault.values().next()).unwrap();
    fault["message"].as_str().unwrap().to_owned()
}

fn token(host: &Host, name: &str, project: &str, role: &str) -> String {
    let made =
        host.virt_usb(&["--json", "token", "add", name, "--project", project, "--role", role]);
    let made: Value = serde_json::from_str(&ok(&made)).unwrap();
    made["token"].as_str().unwrap().to_owned()
}

#[test]
fn any_hosts_api_shows_the_fleet_and_acts_on_it() {
    let etcd = Etcd::new();
    let one = served(&etcd, "compute1", 'a', &key(1), &[("erp", ERP, OURS)]);
    let two = served(
        &etcd,
        "compute2",
        'b',
        &(key(2) + &key(3)),
        &[("crm", CRM, THEIRS), ("lab", LAB, OURS)],
    );
    let (_first, mut second) = (agent(&one), agent(&two));
    let get = |path: &str| api(&one, None, "GET", path, &Value::Null);
    let list = |path: &str, key: &str| get(path).1[key].as_array().cloned().unwrap_or_default();
    until("the fleet to be shown", || {
        (list("/v3/os-usb-devices", "usb_devices").len() == 3
            && list("/v3/servers", "servers").len() == 3)
            .then_some(())
    });
    let hosts = list("/v3/os-hypervisors", "hypervisors");
    let brief: Vec<_> = hosts
        .iter()
        .map(|h| (h["id"].as_u64(), h["hypervisor_hostname"].as_str(), h["state"].as_str()))
        .collect();
    assert_eq!(
        brief,
        [(Some(2), Some("compute1"), Some("up")), (Some(3), Some("compute2"), Some("up"))]
    );
    let (status, other) = get("/v3/os-hypervisors/compute2");
    assert_eq!(
        (status, other["hypervisor"]["usb_device_stats"].as_array().unwrap().len()),
        (200, 2)
    );
    let first = &other["hypervisor"]["usb_device_stats"][0];
    assert_eq!(
        (&first["id"], &first["hypervisor_hostname"]),
        (&json!(2_000_001), &json!("compute2"))
    );
    // The other host's guest, by that host's agent.
    let attached = act(&one, None, "attach_usb_devices", CRM, 2_000_001);
    assert_eq!(
        (attached.0, &attached.1["usb_devices"][0]["status"], &attached.1["live"]),
        (202, &json!("allocated"), &json!(true)),
        "{attached:?}"
    );
    assert!(
        two.claims().contains(&format!("device 2000001 crm {CRM} allocated")),
        "{}",
        two.claims()
    );
    until("it to be shown", || {
        let (_, server) = get(&format!("/v3/servers/{CRM}/os-usb-devices"));
        let server = &server["server"];
        (server["usb_devices"][0]["held_by"] == "crm"
            && server["usb_devices_requests"] == json!([{"id": 2_000_001}]))
        .then_some(())
    });
    // The portal too.
    let admin = token(&one, "admin", OURS, "admin");
    let devices = page(&one, &admin, "/portal/?q=compute2");
    for words in ["2 hosts: 3 devices", "<td>compute2</td>", "/portal/servers/"] {
        assert!(devices.contains(words), "{words}: {devices}");
    }
    assert!(!devices.contains("<td>compute1</td>"), "{devices}");
    let server = page(&one, &admin, &format!("/portal/servers/{CRM}"));
    for words in ["Host: compute2", "Assigned at each start", "{&quot;id&quot;:2000001}"] {
        assert!(server.contains(words), "{words}: {server}");
    }
    let taken = message(&act(&one, None, "attach_usb_devices", LAB, 2_000_001), 409);
    assert!(
        taken.contains(&format!("USB device 2000001 is held by instance {CRM} (crm)")),
        "{taken}"
    );
    let elsewhere = message(&act(&one, None, "attach_usb_devices", LAB, 1_000_001), 409);
    assert!(elsewhere.contains("No available USB device matches"), "{elsewhere}");
    // Who may what is asked on both sides.
    let (ours, theirs) =
        (token(&one, "ours", OURS, "member"), token(&one, "theirs", THEIRS, "member"));
    assert_eq!(act(&one, Some(&ours), "detach_usb_devices", CRM, 2_000_001).0, 404);
    let servers = api(&one, Some(&ours), "GET", "/v3/servers", &Value::Null).1;
    let names: Vec<&str> = servers["servers"]
        .as_array()
        .unwrap()
        .iter()
        .filter_map(|server| server["name"].as_str())
        .collect();
    assert_eq!(names, ["erp", "lab"]);
    assert_eq!(act(&one, Some(&theirs), "detach_usb_devices", CRM, 2_000_001).0, 202);
    assert_eq!(two.claims(), "");
    let audit = ok(&two.virt_usb(&["events"]));
    assert!(audit.contains("api theirs@compute1"), "{audit}");
    let device = api(
        &one,
        None,
        "POST",
        "/v3/os-usb-devices/2000001/action",
        &json!({"disable": {"reason": "x"}}),
    );
    assert!(message(&device, 409).contains("is on host compute2: use that host's API"));
    let owner = api(
        &one,
        None,
        "POST",
        &format!("/v3/servers/{LAB}/action"),
        &json!({"clear_usb_owner": null}),
    );
    assert!(message(&owner, 409).contains("is on host compute2: set its owner there"));
    // One that does not begin in time does not begin later.
    second.signal("-STOP");
    let late = act(&one, None, "attach_usb_devices", CRM, 2_000_002);
    let late = message(&late, 503);
    assert!(late.contains("did not begin in time") || late.contains("is unreachable"), "{late}");
    second.signal("-CONT");
    until("the host to be heard again", || {
        (get("/v3/os-hypervisors").1["hypervisors"][1]["state"] == "up").then_some(())
    });
    std::thread::sleep(Duration::from_secs(2));
    assert_eq!(two.claims(), "", "nothing was done afterwards");
    // A host that dies: what it has is shown, and not as free.
    second.0.kill().unwrap();
    second.0.wait().unwrap();
    let request = json!({"call": "attach", "server": CRM, "usb_devices_requests": [{"id": 2_000_001}], "caller": "root",
        "project_id": null, "role": "admin", "from": "compute1"});
    until("it to be away", || {
        (get("/v3/os-hypervisors").1["hypervisors"][1]["state"] == "down").then_some(())
    });
    let devices = list("/v3/os-usb-devices", "usb_devices");
    assert_eq!(
        (&devices[1]["status"], &devices[1]["status_reason"]),
        (&json!("unavailable"), &json!("unreachable"))
    );
    let away = message(&act(&one, None, "attach_usb_devices", CRM, 2_000_001), 503);
    assert!(away.contains("Host compute2 is unreachable: nothing was done"), "{away}");
    // An agent that finds what one before it has begun does it no second time.
    etcd.put("/virt-usb/requests/compute2/r1", &request.to_string());
    etcd.put("/virt-usb/answers/compute2/r1", "\"begun\"");
    second = agent(&two);
    let answer = until("an answer", || {
        let answer: Value =
            serde_json::from_str(&etcd.get("/virt-usb/answers/compute2/r1")).ok()?;
        answer["done"]["status"].is_u64().then_some(answer)
    });
    let said = answer["done"]["body"]["message"].as_str().unwrap();
    assert!(answer["done"]["status"] == 503 && said.contains("The result is unknown"), "{answer}");
    assert!(said.contains("The state is: the server has no device"), "{said}");
    assert_eq!(two.claims(), "");
    drop(second);
}
