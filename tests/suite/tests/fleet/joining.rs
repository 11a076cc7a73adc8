//! Hosts that join and leave, and their numbers.

use serde_json::Value;
use virt_usb_model::Flavor;
use virt_usb_store::Source;
use virt_usb_store::claim::Claimant;
use virt_usb_suite::{Etcd, Host, domain};

use crate::common::{ERP, host, key, ok, refused};

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
    assert!(refused(&two.virt_usb(&["fleet", "join"])).contains("it contains no machine id"));
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
