//! Bus numbers are assigned at boot. Whatever they are, a device stays who it is, and so does what
//! is stored about it.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test's helpers fail the test")]

use virt_usb_model::Serial;
use virt_usb_suite::{Host, device, domain, ok, text};

const FIRST: &str = "pci-0000:00:14.0";
const SECOND: &str = "pci-0000:0a:00.0";
const BOOTS: [&str; 2] =
    ["11111111-1111-4111-8111-111111111111", "22222222-2222-4222-8222-222222222222"];

/// A key without a serial in port 4 of a controller, whose bus has this number.
fn key(controller: &str, bus: u8, number: u8, more: &str) -> String {
    let path = format!("path = \"{controller}-usbv2-0:4\"\n{more}");
    device("0001", &format!("{bus}-4"), number, &path)
}

/// Both keys, and the buses in one or the other order.
fn keys(swapped: bool) -> String {
    let (one, two) = if swapped { (3, 1) } else { (1, 3) };
    key(FIRST, one, 5, "") + &key(SECOND, two, 6, "")
}

fn reboot(host: &Host) {
    host.boot(BOOTS[1], 30.0);
}

/// Where the device of an id is: its port path and its address.
fn place(host: &Host, id: u64) -> (String, String) {
    let devices = host.store().devices().unwrap();
    let entry = &devices.iter().find(|r| r.entry.id.get() == id).unwrap().entry;
    (entry.port_path.to_string(), entry.address.to_string())
}

#[test]
fn each_guest_keeps_its_key_when_the_buses_swap_their_numbers() {
    let host = Host::new("");
    host.discover(&keys(false));
    let paths = || -> Vec<String> {
        let devices = host.store().devices().unwrap();
        devices.iter().map(|r| r.entry.path.as_ref().unwrap().to_string()).collect()
    };
    assert_eq!(paths(), [format!("{FIRST}-usbv2-0:4"), format!("{SECOND}-usbv2-0:4")]);
    ok(&host.virt_usb(&["tag", "1", "blue"]));
    ok(&host.virt_usb(&["disable", "2"]));
    reboot(&host);
    // The hook comes before the first scan: what the inventory remembers of bus numbers is wrong.
    host.plug(&keys(true));
    let erp = domain("erp", 7, r#"{"usb_devices":[{"id":1}]}"#);
    let answer = host.call(&["erp", "prepare", "begin", "-"], erp.as_bytes());
    let xml = ok(&answer);
    assert!(xml.contains("<address bus='3' device='5'/>"), "{xml}");
    assert_eq!(
        place(&host, 1),
        ("3-4".into(), "usb_3_5".into()),
        "the claim corrects what is stored"
    );
    assert!(ok(&host.virt_usb(&["store", "check"])).contains("no problems found"));
    // A scan recognises both devices.
    host.discover(&keys(true));
    assert_eq!(place(&host, 1), ("3-4".into(), "usb_3_5".into()));
    assert_eq!(place(&host, 2), ("1-4".into(), "usb_1_6".into()));
    assert_eq!(paths(), [format!("{FIRST}-usbv2-0:4"), format!("{SECOND}-usbv2-0:4")]);
    let devices = host.store().all_devices().unwrap();
    assert_eq!(devices.len(), 2, "no device is new");
    assert_eq!(
        (devices[0].entry.tags.as_slice(), devices[1].disabled.is_some()),
        (&["blue".to_owned()][..], true)
    );
}

#[test]
fn a_port_that_was_stored_means_the_socket_that_it_meant_then() {
    let rules = "usb_white_list_switch = 'on'\nusb_passthrough_whitelist = [{ port = '1-4', tags = \
        ['erp'] }, { port = '1-9' }]\n";
    let host = Host::new(rules);
    host.discover(&keys(false));
    let offered = || -> Vec<String> {
        host.store()
            .devices()
            .unwrap()
            .iter()
            .map(|r| format!("{} {:?}", r.entry.status, r.entry.tags))
            .collect()
    };
    assert_eq!(offered(), [r#"available ["erp"]"#, "unavailable []"]);
    ok(&host.virt_usb(&["flavor", "set", "m1.erp", r#"{"usb_devices":[{"port":"1-4"}]}"#]));
    ok(&host.virt_usb(&[
        "grant",
        "set",
        "g",
        r#"{"usb_devices":[{"port":"3-4"}],"projects":["p1"]}"#,
    ]));
    let stored =
        || (ok(&host.virt_usb(&["flavor", "list"])), ok(&host.virt_usb(&["grant", "list"])));
    let before = stored();
    assert!(before.0.contains(&format!("{FIRST}-usbv2-0:4")), "{before:?}");
    assert!(before.1.contains(&format!("{SECOND}-usbv2-0:4")), "{before:?}");
    reboot(&host);
    host.discover(&keys(true));
    assert_eq!(offered(), [r#"available ["erp"]"#, "unavailable []"]);
    assert_eq!(stored(), before);
    let nova = "<nova:instance \
        xmlns:nova='http://openstack.org/xmlns/libvirt/nova/1.1'><nova:flavor \
        name='m1.erp'/></nova:instance>";
    let xml = domain("erp", 7, "{}");
    let start = xml.find("<usb:flavor").unwrap();
    let end = xml.find("</metadata>").unwrap();
    let xml = format!("{}{nova}{}", &xml[..start], &xml[end..]);
    let printed = ok(&host.call(&["erp", "prepare", "begin", "-"], xml.as_bytes()));
    assert!(printed.contains("<address bus='3' device='5'/>"), "{printed}");
    // The same rule in a new configuration is a new rule: it means the current port.
    ok(&host.call(&["erp", "release", "end", "-"], xml.as_bytes()));
    let config = std::fs::read_to_string(host.config_file()).unwrap();
    std::fs::write(host.config_file(), config.replace("port = '1-4'", "port = '3-4'")).unwrap();
    host.discover(&keys(true));
    std::fs::write(host.config_file(), &config).unwrap();
    host.discover(&keys(true));
    assert_eq!(offered(), ["unavailable []", r#"available ["erp"]"#]);
}

#[test]
fn without_a_path_twins_are_set_aside_after_a_restart() {
    let without = |bus: u8, number, more: &str| device("0001", &format!("{bus}-4"), number, more);
    let other = device("0002", "1-7", 9, "");
    let marked = device("0001", "1-8", 10, "serial = 'S1'");
    let host = Host::new("");
    let all = without(1, 5, "") + &without(3, 6, "") + &other + &marked;
    host.discover(&all);
    let status = || -> Vec<String> {
        let reason = |r: &virt_usb_store::Record| r.entry.status_reason.clone().unwrap_or_default();
        host.store()
            .devices()
            .unwrap()
            .iter()
            .map(|r| format!("{} {}", r.entry.status, reason(r)))
            .collect()
    };
    assert_eq!(status(), ["available ", "available ", "available ", "available "]);
    // Another agent, the same boot.
    host.discover(&all);
    assert_eq!(status(), ["available ", "available ", "available ", "available "]);
    reboot(&host);
    let erp = domain("erp", 7, r#"{"usb_devices":[{"id":1}]}"#);
    let refused = host.call(&["erp", "prepare", "begin", "-"], erp.as_bytes());
    let why = text(&refused.stderr);
    assert!(!refused.status.success() && why.contains("quarantine"), "{why}");
    host.discover(&all);
    assert_eq!(
        status(),
        ["unavailable quarantined", "available ", "available ", "unavailable quarantined"]
    );
    let shown = ok(&host.virt_usb(&["quarantine"]));
    assert!(shown.contains("the host was restarted") && shown.contains("devices 1, 4"), "{shown}");
    ok(&host.virt_usb(&["quarantine", "clear", "1"]));
    host.discover(&all);
    assert_eq!(status()[0], "available ", "an operator has looked: the same restart counts once");
}

/// One of the two was recorded before the restart, and which of them it was cannot be known.
#[test]
fn without_a_path_a_device_is_set_aside_with_a_twin_that_came_with_the_restart() {
    let key = |bus: u8, number| device("0001", &format!("{bus}-4"), number, "");
    let marked = device("0001", "1-8", 10, "serial = 'S1'");
    let recorded = [&key(1, 5), marked.as_str()].concat();
    let all = recorded.clone() + &key(3, 6);
    let status = |host: &Host| -> Vec<String> {
        let reason = |r: &virt_usb_store::Record| r.entry.status_reason.clone().unwrap_or_default();
        host.store()
            .devices()
            .unwrap()
            .iter()
            .map(|r| format!("{} {}", r.entry.status, reason(r)))
            .collect()
    };
    let free = |count: usize| vec!["available ".to_owned(); count];

    let host = Host::new("");
    host.discover(&recorded);
    host.discover(&all);
    assert_eq!(status(&host), free(3), "no restart");

    let host = Host::new("hold = 'instance'");
    host.discover(&recorded);
    let erp = domain("erp", 7, r#"{"usb_devices":[{"id":1}]}"#);
    ok(&host.call(&["erp", "prepare", "begin", "-"], erp.as_bytes()));
    reboot(&host);
    host.discover(&all);
    let after = status(&host);
    assert_eq!(after[1..], ["available ", "unavailable quarantined"], "{after:?}");
    let refused = host.call(&["erp", "prepare", "begin", "-"], erp.as_bytes());
    let why = text(&refused.stderr);
    assert!(!refused.status.success() && why.contains("quarantine"), "{why}");
    let shown = ok(&host.virt_usb(&["quarantine"]));
    assert!(shown.contains("the host was restarted") && shown.contains("devices 1, 3"), "{shown}");
    for id in ["1", "3"] {
        ok(&host.virt_usb(&["quarantine", "clear", id]));
    }
    host.discover(&all);
    ok(&host.call(&["erp", "prepare", "begin", "-"], erp.as_bytes()));

    // In a later scan of the same boot it is a device that was plugged in.
    let host = Host::new("");
    host.discover(&recorded);
    reboot(&host);
    host.discover(&recorded);
    host.discover(&all);
    assert_eq!(status(&host), free(3));
}

#[test]
fn other_names_at_a_port_without_a_path_are_another_device() {
    let named = |bus: u8, name: &str| {
        device("0001", &format!("{bus}-4"), 5, &format!("product_name = '{name}'"))
    };
    let host = Host::new("");
    host.discover(&(named(1, "key A") + &named(3, "key B")));
    host.discover(&(named(3, "key A") + &named(1, "key B")));
    let ids: Vec<u64> = host.store().devices().unwrap().iter().map(|r| r.entry.id.get()).collect();
    assert_eq!(ids, [3, 4]);
}

#[test]
fn a_placeholder_is_no_serial() {
    let clone = |port: &str, number| device("0001", port, number, "serial = '0001'");
    let host = Host::new("");
    host.discover(&clone("1-1", 5));
    let record = host.store().devices().unwrap().remove(0);
    assert_eq!(
        (record.entry.serial_kind.as_str(), record.key().serial),
        ("worthless", Serial::Worthless("0001".into()))
    );
    let erp = domain("erp", 7, r#"{"usb_devices":[{"id":1}]}"#);
    ok(&host.call(&["erp", "prepare", "begin", "-"], erp.as_bytes()));
    // The key is pulled, and a clone of it is plugged in elsewhere.
    host.discover(&clone("1-2", 6));
    let devices = host.store().devices().unwrap();
    let seen: Vec<_> =
        devices.iter().map(|r| (r.entry.id.get(), r.entry.status.as_str())).collect();
    assert_eq!(seen, [(1, "removed"), (2, "available")]);
    assert!(ok(&host.virt_usb(&["devices"])).contains("0001 (placeholder)"));
    let claims = ok(&host.virt_usb(&["claims"]));
    assert!(
        claims.contains("device 1 is unplugged, and device 2 at port 1-2 of the same kind is free"),
        "{claims}"
    );
    assert!(claims.contains("'virt-usb attach erp 2', then 'virt-usb detach erp 1'"), "{claims}");
    let shown: serde_json::Value =
        serde_json::from_str(&ok(&host.virt_usb(&["--json", "claims"]))).unwrap();
    assert_eq!(shown[0]["moved_to"], serde_json::json!([2]));
}

#[test]
fn only_a_device_that_came_later_may_be_the_one_that_was_moved() {
    let key = |port: &str, number| device("0001", port, number, "");
    let host = Host::new("");
    host.discover(&(key("1-1", 5) + &key("1-2", 6)));
    let erp = domain("erp", 7, r#"{"usb_devices":[{"id":1}]}"#);
    ok(&host.call(&["erp", "prepare", "begin", "-"], erp.as_bytes()));
    host.discover(&key("1-2", 6));
    assert!(
        !ok(&host.virt_usb(&["claims"])).contains("is unplugged, and"),
        "device 2 was there all the time"
    );
    host.discover(&(key("1-2", 6) + &key("1-3", 7)));
    let claims = ok(&host.virt_usb(&["claims"]));
    assert!(claims.contains("device 3 at port 1-3 of the same kind is free"), "{claims}");
    host.discover(&(key("1-2", 6) + &key("1-3", 7) + &key("1-4", 8)));
    let claims = ok(&host.virt_usb(&["claims"]));
    assert!(
        claims.contains("device 3 at port 1-3, device 4 at port 1-4 of the same kind are free"),
        "{claims}"
    );
    assert!(claims.contains("'virt-usb attach erp DEVICE'"), "{claims}");
}

#[test]
fn a_held_device_whose_serial_is_seen_twice_is_reported() {
    let twin = |port: &str, number| device("0001", port, number, "serial = 'HL-1'");
    let host = Host::new("");
    host.discover(&twin("1-1", 5));
    let erp = domain("erp", 7, r#"{"usb_devices":[{"id":1}]}"#);
    ok(&host.call(&["erp", "prepare", "begin", "-"], erp.as_bytes()));
    host.discover(&(twin("1-1", 5) + &twin("1-2", 6)));
    assert!(host.store().claims().unwrap()[0].serial_shared);
    let events = ok(&host.virt_usb(&["events"]));
    assert_eq!(events.matches("serial-shared").count(), 1, "{events}");
    host.discover(&(twin("1-1", 5) + &twin("1-2", 6)));
    assert_eq!(ok(&host.virt_usb(&["events"])).matches("serial-shared").count(), 1, "once");
    // From now on only the port identifies it.
    host.discover(&twin("1-3", 7));
    let held: Vec<u64> = host.store().claims().unwrap().iter().map(|c| c.device_id.get()).collect();
    assert_eq!(held, [1]);
    assert_eq!(place(&host, 1).0, "1-1");
}

/// Makes the inventory one of a release that knew no paths.
fn forget_paths(host: &Host) {
    let script = "import sqlite3, sys; c = sqlite3.connect(sys.argv[1]); c.execute('UPDATE \
        usb_devices SET path = NULL'); c.commit()";
    let file = host.path("state/inventory.sqlite");
    let done =
        std::process::Command::new("python3").args(["-c", script]).arg(file).status().unwrap();
    assert!(done.success());
}

#[test]
fn an_older_inventory_learns_paths_while_its_bus_numbers_hold() {
    let host = Host::new("");
    host.discover(&keys(false));
    forget_paths(&host);
    host.discover(&keys(false));
    let known = |host: &Host| -> Vec<(u64, Option<String>, bool)> {
        let row = |r: virt_usb_store::Record| {
            (r.entry.id.get(), r.entry.path.map(|p| p.to_string()), r.quarantined.is_some())
        };
        host.store().devices().unwrap().into_iter().map(row).collect()
    };
    let path = |controller| Some(format!("{controller}-usbv2-0:4"));
    assert_eq!(known(&host), [(1, path(FIRST), false), (2, path(SECOND), false)]);
    // With a restart in between, no device is taken for its twin unseen. The holder of one is
    // refused too.
    let host = Host::new("hold = 'instance'");
    host.discover(&keys(false));
    let erp = domain("erp", 7, r#"{"usb_devices":[{"id":1}]}"#);
    ok(&host.call(&["erp", "prepare", "begin", "-"], erp.as_bytes()));
    ok(&host.call(&["erp", "release", "end", "-"], erp.as_bytes()));
    forget_paths(&host);
    reboot(&host);
    host.discover(&keys(true));
    assert!(known(&host).iter().all(|(.., quarantined)| *quarantined), "{:?}", known(&host));
    let refused = host.call(&["erp", "prepare", "begin", "-"], erp.as_bytes());
    assert!(
        !refused.status.success() && text(&refused.stderr).contains("quarantine"),
        "{refused:?}"
    );
    assert_eq!(text(&refused.stdout), "");
    assert!(host.claims().contains("device 1 erp"), "the claim waits for the operator");
}

#[test]
fn a_twin_that_was_unplugged_before_the_restart_counts() {
    let without = |bus: u8, number| device("0001", &format!("{bus}-4"), number, "");
    let quarantined = |host: &Host| -> Vec<(u64, bool)> {
        let row = |r: virt_usb_store::Record| (r.entry.id.get(), r.quarantined.is_some());
        host.store().devices().unwrap().into_iter().map(row).collect()
    };
    let host = Host::new("");
    host.discover(&(without(1, 5) + &without(3, 6)));
    host.discover(&without(1, 5));
    reboot(&host);
    host.discover(&without(1, 7));
    assert_eq!(quarantined(&host), [(1, true)]);
    // The only device of its kind may have been swapped for another while it was unplugged.
    let host = Host::new("hold = 'instance'");
    host.discover(&without(1, 5));
    let erp = domain("erp", 7, r#"{"usb_devices":[{"id":1}]}"#);
    ok(&host.call(&["erp", "prepare", "begin", "-"], erp.as_bytes()));
    ok(&host.call(&["erp", "release", "end", "-"], erp.as_bytes()));
    reboot(&host);
    host.discover(&without(1, 7));
    assert_eq!(quarantined(&host), [(1, false)], "it was there when the host went down");
    host.discover("");
    host.boot("33333333-3333-4333-8333-333333333333", 30.0);
    host.discover(&without(1, 5));
    assert_eq!(quarantined(&host), [(1, true)]);
}
