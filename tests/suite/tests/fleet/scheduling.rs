//! The scheduler: what it answers, devices that it assumes, compacted history.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::process::Command;

use serde_json::{Value, json};
use virt_usb_suite::{Etcd, Host, program, root, until};

use crate::common::{Running, host, ok};

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
    json!({
        "id": id, "address": "usb_1_5", "product_id": product, "vendor_id": "0529",
        "status": status, "port_path": "1-1", "class": "00",
    })
}

pub(crate) fn made(host: &str, node: u64, revision: u64, devices: &[Value]) -> String {
    let document = json!({
        "version": 1, "host": host, "compute_node_id": node, "revision": revision,
        "devices": devices,
    });
    document.to_string()
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
    assert_eq!((status, &why["error"]), (404, &json!("the fleet has no flavor named \"none\"")));
    let narrow = scheduler.select(&json!({"flavor": wanted, "hosts": ["b", "c", "x"], "limit": 5}));
    assert_eq!((&narrow["matched"], &narrow["placements"][0]["host"]), (&json!(1), &json!("b")));
    let none = scheduler.select(&json!({"flavor": {"usb_devices": [{"vendor_id": "1234"}]}}));
    assert_eq!((&none["matched"], &none["reasons"]), (&json!(0), &json!({"no-such-device": 3})));
    let (_, why) = scheduler.ask("POST", "/explain", &json!({"flavor": wanted}));
    assert_eq!(
        why["verdicts"],
        json!({"c": {
            "accepted": false, "request": 0, "reason": "too-few-free",
            "wanted": 1, "matching": 1, "allowed": 1, "free": 0,
            "because": "usb_devices[0] wants 1: 1 match, 0 of them are free",
        }})
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
        ("GET", "/select", Value::Null, 405, "the method is not allowed here"),
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
        answer["error"].as_str().unwrap().contains("no connection to the fleet for"),
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
