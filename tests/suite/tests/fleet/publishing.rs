//! Documents that agents publish: current, with growing revisions, under a lease.

use serde_json::{Value, json};
use virt_usb_model::HostDocument;
use virt_usb_suite::{Etcd, until};

use crate::common::{agent, document, host, key, log, ok, refused, states};

#[test]
fn a_document_lives_as_long_as_its_agent() {
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
    until("it to be said", || log(&one).contains("no etcd endpoint responds").then_some(()));
    ok(&one.virt_usb(&["tag", "1000002", "blue"]));
    let why = refused(&one.virt_usb(&["fleet", "status"]));
    assert!(why.contains("no etcd endpoint responds: http://127.0.0.1:"), "{why}");
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
        log(&one).contains(&format!("the fleet has revision {} of this host", seen.revision + 500)),
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
    until("it to be published again", || created().filter(|revision| *revision > before));
    assert!(document(&etcd, "compute1").is_some());
}
