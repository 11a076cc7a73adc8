//! Flavors and grants of the fleet, which each host has.

use std::time::Duration;

use virt_usb_suite::{Etcd, Host, until};

use crate::common::{agent, document, host, key, ok, refused};

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
            "the flavors of this host belong to the fleet and can be changed only in etcd: no \
                etcd endpoint responds"
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
        why.contains("the grants of this host belong to the fleet and can be changed only in etcd"),
        "{why}"
    );
    let held = ok(&one.virt_usb(&["grant", "show", "mine"]));
    assert!(held.contains("p1"), "{held}");
    etcd.start();
    ok(&one.virt_usb(&["grant", "remove", "mine"]));
    ok(&one.virt_usb(&["grant", "remove", "all"]));
    ok(&one.virt_usb(&["grant", "remove", "new"]));
    until("all devices to be for all projects", || published(&etcd, "", ""));
}
