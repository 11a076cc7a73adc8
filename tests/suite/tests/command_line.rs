//! `virt-usb` as an operator types it.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

use std::process::Command;

use serde_json::Value;
use virt_usb_model::EventKind;
use virt_usb_suite::{Host, device, domain, ok, text};

fn json(host: &Host, arguments: &[&str]) -> Value {
    let all: Vec<&str> = arguments.iter().copied().chain(["--json"]).collect();
    serde_json::from_str(&ok(&host.virt_usb(&all))).unwrap()
}

/// Fails, says why in one line on stderr and nothing on stdout.
fn fails(host: &Host, arguments: &[&str]) -> String {
    let output = host.virt_usb(arguments);
    assert_eq!(output.status.code(), Some(1), "{arguments:?}");
    assert_eq!(text(&output.stdout), "");
    let why = text(&output.stderr);
    assert!(why.starts_with("virt-usb: ") && why.lines().count() == 1, "{why}");
    why
}

fn two_keys() -> String {
    [
        device("0001", "1-1", 2, "serial = \"A\"\nproduct_name = \"HASP\""),
        device("0001", "1-1.4", 3, "serial = \"B\""),
    ]
    .concat()
}

#[test]
fn discover_records_and_says_what_changed() {
    let host = Host::new("");
    std::fs::write(host.path("sim.toml"), two_keys()).unwrap();
    let (file, sys) = (host.path("sim.toml"), host.path("sys"));
    let (sim, out) = (file.to_str().unwrap(), sys.to_str().unwrap());
    let shown = ok(&host.virt_usb(&["discover", "--sim", sim, "--sysfs-out", out]));
    assert!(shown.contains("0529:0001") && shown.contains("2 device(s): 2 added"), "{shown}");
    let found = json(&host, &["discover", "--sim", sim]);
    assert_eq!(
        (found["devices"].as_array().unwrap().len(), &found["changes"]),
        (2, &Value::Array(vec![]))
    );
    std::fs::write(&file, device("0001", "1-1", 9, "serial = \"A\"\nproduct_name = \"HASP\""))
        .unwrap();
    let changes = json(&host, &["discover", "--sim", sim])["changes"].clone();
    assert_eq!(
        changes,
        serde_json::json!([{"id": 2, "what": "removed"}, {"id": 1, "what": "returned"}])
    );
    assert_eq!(json(&host, &["devices"]).as_array().unwrap().len(), 1);
    assert_eq!(json(&host, &["devices", "--all"]).as_array().unwrap().len(), 2);
    let preview = ok(&host.virt_usb(&["discover", "--sim", sim, "--dry-run"]));
    assert!(preview.contains("every project"), "{preview}");
}

#[test]
fn simulated_and_real_devices_never_share_an_inventory() {
    let host = Host::new("");
    let file = host.path("sim.toml");
    let sim = file.to_str().unwrap();
    std::fs::write(&file, two_keys()).unwrap();
    // A tree that no simulation wrote is this host's own.
    std::fs::create_dir_all(host.path("sys/bus/usb/devices")).unwrap();
    let count = || json(&host, &["devices"]).as_array().unwrap().len();
    ok(&host.virt_usb(&["discover", "--sim", sim]));
    let refused = fails(&host, &["discover"]);
    for words in ["has the devices of a simulation", "add --sim FILE", "another state_dir"] {
        assert!(refused.contains(words), "{refused}");
    }
    assert_eq!(count(), 2, "no device was removed");
    let rebuild = ["store", "rebuild", "--force", "--without-guests"];
    assert!(fails(&host, &rebuild).contains("has the devices of a simulation"));
    assert_eq!(count(), 2);
    std::fs::remove_dir_all(host.path("state")).unwrap();
    // An inventory without devices can have either.
    ok(&host.virt_usb(&["discover"]));
    ok(&host.virt_usb(&["discover", "--sim", sim]));
    std::fs::remove_dir_all(host.path("state")).unwrap();
    host.plug_in_host(&device("0002", "1-2", 6, "serial = \"C\""));
    ok(&host.virt_usb(&["discover"]));
    let refused = fails(&host, &["discover", "--sim", sim]);
    assert!(refused.contains("a simulation needs its own state_dir"), "{refused}");
    assert_eq!(count(), 1, "no device was added or removed");
    assert!(ok(&host.virt_usb(&["discover", "--sim", sim, "--dry-run"])).contains("0529:0001"));
    // Of a tree that a simulation wrote, a scan finds the simulated devices.
    std::fs::remove_dir_all(host.path("state")).unwrap();
    std::fs::remove_dir_all(host.path("sys")).unwrap();
    let sys = host.path("sys");
    ok(&host.virt_usb(&["discover", "--sim", sim, "--sysfs-out", sys.to_str().unwrap()]));
    ok(&host.virt_usb(&["discover"]));
    assert_eq!(count(), 2);
}

#[test]
fn an_error_says_what_to_do() {
    let host = Host::new("");
    let add = ["token", "add", "anna", "--project", "p1"];
    let said = fails(&host, &add);
    assert!(said.contains("its folder does not exist; the agent ('systemctl start"), "{said}");
    let said = fails(&host, &["devices"]);
    for words in ["make it with 'virt-usb discover'", "('systemctl start virt-usbd')"] {
        assert!(said.contains(words), "{said}");
    }
    let backup = host.path("nosuch.sqlite");
    let said = fails(&host, &["store", "restore", backup.to_str().unwrap()]);
    assert!(said.contains("nosuch.sqlite: No such file"), "{said}");
    assert!(!said.contains("libvirt"), "{said}");
    host.discover(&two_keys());
    let said = fails(&host, &["events", "--device", "7"]);
    assert!(said.contains("there is no device 7: 'virt-usb devices --all'"), "{said}");
    let said = fails(&host, &["flavor", "set", "x", "nosuch.json"]);
    assert!(said.contains("to read a file: 'virt-usb flavor set x - < nosuch.json'"), "{said}");
    host.flavor("m1.erp", r#"{"usb_devices":[{"serial":"A"}]}"#);
    for name in ["m1.erp", "@m1.erp"] {
        ok(&host.virt_usb(&["filter", "--flavor", name]));
    }
    let guest = domain("erp", 1, r#"{"usb_devices":[{"serial":"A"}]}"#);
    let call = host.call(&["erp", "prepare", "begin", "-"], guest.as_bytes());
    assert!(call.status.success(), "{call:?}");
    let said = fails(&host, &["forget", "1"]);
    assert!(said.contains("is plugged in, and "), "{said}");
    host.discover("");
    let said = fails(&host, &["forget", "1"]);
    assert!(said.contains("is unplugged, but ") && said.contains("'virt-usb detach "), "{said}");
}

#[test]
fn devices_as_json_have_the_columns_of_the_table() {
    let host = Host::new("");
    host.discover(&two_keys());
    let devices = json(&host, &["devices"]);
    let device = devices[1].as_object().unwrap();
    for key in [
        "created_at",
        "updated_at",
        "deleted_at",
        "deleted",
        "id",
        "compute_node_id",
        "address",
        "product_id",
        "vendor_id",
        "bus_id",
        "device_id",
        "port_id",
        "status",
        "extra_info",
        "instance_uuid",
        "port_path",
        "serial",
        "status_reason",
    ] {
        assert!(device.contains_key(key), "{key}");
    }
    assert_eq!(device["address"], "usb_1_3");
    assert_eq!((&device["vendor_id"], &device["product_id"]), (&"0529".into(), &"0001".into()));
    assert_eq!(
        (device["bus_id"].as_u64(), device["device_id"].as_u64(), device["port_id"].as_u64()),
        (Some(1), Some(3), Some(4))
    );
    assert_eq!(
        (device["status"].as_str(), device["deleted"].as_u64()),
        (Some("available"), Some(0))
    );
}

#[test]
fn flavors_are_checked_normalised_and_forgotten() {
    let host = Host::new("");
    assert!(
        ok(&host.virt_usb(&["flavor", "set", "erp", r#"{"usb_devices":[{"vendor_id":"0x529"}]}"#]))
            .starts_with("stored: erp")
    );
    assert!(
        ok(&host.virt_usb(&["flavor", "set", "erp", r#"{"usb_devices":[{"vendor_id":"0529"}]}"#]))
            .starts_with("unchanged: erp")
    );
    assert_eq!(
        ok(&host.virt_usb(&["flavor", "show", "erp"])),
        "{\"usb_devices\":[{\"vendor_id\":\"0529\"}]}\n"
    );
    assert_eq!(json(&host, &["flavor", "list"])[0]["usb_devices"][0]["vendor_id"], "0529");
    let why = fails(
        &host,
        &[
            "flavor",
            "set",
            "bad",
            r#"{"usb_redirection_devices":{["bus": usb, "type": "spicevmc"]}}"#,
        ],
    );
    assert!(
        why.contains(r#"{"usb_redirection_devices":[{"bus":"usb","type":"spicevmc"}]}"#),
        "{why}"
    );
    assert!(fails(&host, &["flavor", "set", "empty", "{}"]).contains("asks for nothing"));
    assert!(fails(&host, &["flavor", "set", "", "{}"]).contains("not a valid name for a flavor"));
    assert!(fails(&host, &["flavor", "show", "nope"]).contains("flavor list"));
    assert_eq!(ok(&host.virt_usb(&["flavor", "remove", "erp"])), "removed: erp\n");
    assert!(fails(&host, &["flavor", "remove", "erp"]).contains("no flavor named"));
    assert_eq!(json(&host, &["flavor", "list"]), Value::Array(vec![]));
}

#[test]
fn a_claim_is_shown_and_freed_by_force_only() {
    let host = Host::new("");
    host.discover(&two_keys());
    let xml = domain("erp-1", 1, r#"{"usb_devices":[{"serial":"A"}]}"#);
    ok(&host.call(&["erp-1", "prepare", "begin", "-"], xml.as_bytes()));
    let claims = json(&host, &["claims"]);
    assert_eq!(
        (&claims[0]["device_id"], &claims[0]["domain"], &claims[0]["state"]),
        (&1.into(), &"erp-1".into(), &"claimed".into())
    );
    assert!(fails(&host, &["claims", "release", "erp-1"]).contains("--force"));
    assert!(fails(&host, &["claims", "release", "erp-9", "--force"]).contains("no domain named"));
    assert_eq!(ok(&host.virt_usb(&["claims", "release", "erp-1", "--force"])), "freed device 1\n");
    assert_eq!(json(&host, &["claims"]), Value::Array(vec![]));
    let events = json(&host, &["events", "--instance", "00000001-0000-4000-8000-000000000000"]);
    let kinds: Vec<_> =
        events.as_array().unwrap().iter().map(|e| e["event"].as_str().unwrap()).collect();
    assert_eq!(kinds, ["claimed", "forced"]);
    assert_eq!(events[1]["actor"], "virt-usb claims release");
    let newest = json(&host, &["events", "--limit", "1"]);
    assert_eq!((newest.as_array().unwrap().len(), &newest[0]["event"]), (1, &"forced".into()));
}

#[test]
fn whitelist_check_names_the_rule_for_each_device() {
    let host = Host::new(
        "usb_white_list_switch = 'on'\nusb_passthrough_whitelist = [{ serial = 'A', projects = \
            ['p1'] }, { class = '08' }]\n",
    );
    let disk = device("1666", "1-3", 7, "interfaces = [\"08\"]\nhost_use = \"mounted on /\"");
    let hub = device("aaaa", "1-4", 8, "class = \"09\"");
    std::fs::write(host.path("sim.toml"), two_keys() + &disk + &hub).unwrap();
    let verdicts =
        json(&host, &["whitelist", "check", "--sim", host.path("sim.toml").to_str().unwrap()]);
    let of = |port: &str| {
        verdicts.as_array().unwrap().iter().find(|v| v["port_path"] == port).unwrap().clone()
    };
    assert_eq!(
        (&of("1-1")["offered"], &of("1-1")["rule"], &of("1-1")["projects"][0]),
        (&true.into(), &0.into(), &"p1".into())
    );
    assert_eq!(
        (&of("1-1.4")["offered"], &of("1-1.4")["withheld"]),
        (&false.into(), &"whitelist".into())
    );
    assert_eq!(
        (&of("1-3")["offered"], &of("1-3")["withheld"]),
        (&false.into(), &"host-use".into())
    );
    assert!(of("1-3")["because"].as_str().unwrap().contains("mounted on /"));
    assert_eq!(of("1-4")["offered"], false);
    assert!(of("1-4")["because"].as_str().unwrap().contains("hub"));
    assert!(!host.path("state").exists(), "it only looks");
}

#[test]
fn a_device_that_is_gone_is_forgotten() {
    let host = Host::new("");
    host.discover(&two_keys());
    let refused = fails(&host, &["forget", "1"]);
    assert!(refused.contains("device 1") && refused.contains("is plugged in: "), "{refused}");
    host.discover("");
    ok(&host.virt_usb(&["flavor", "set", "erp", r#"{"usb_devices":[{"id":2}]}"#]));
    let named = fails(&host, &["forget", "2"]);
    assert!(named.contains("is named by its id in the flavor erp: change that first"), "{named}");
    assert!(
        ok(&host.virt_usb(&["forget", "1"]))
            .contains("was forgotten: if it returns, it gets a new id")
    );
    assert!(fails(&host, &["forget", "1"]).contains("there is no device 1"));
    let events = json(&host, &["events", "--device", "1"]);
    assert!(events.as_array().unwrap().iter().any(|e| e["event"] == "forgotten"), "{events}");
}

#[test]
fn an_operator_sets_devices_aside_and_gives_them_tags() {
    let host = Host::new("usb_passthrough_whitelist = [{ serial = 'A', tags = ['erp'] }]\n");
    host.discover(&two_keys());
    let status = || json(&host, &["devices"])[0]["status_reason"].clone();
    let said = ok(&host.virt_usb(&["disable", "1", "--reason", "lent"]));
    assert_eq!(
        said.trim(),
        "device 1 (0529:0001 \"HASP\", port 1-1) is disabled (lent); it is unavailable (disabled)"
    );
    assert_eq!(status(), "disabled");
    assert_eq!(json(&host, &["disable", "1", "--reason", "lent"])["changed"], false);
    assert_eq!(json(&host, &["enable", "1"])["changed"], true);
    assert_eq!(status(), Value::Null);
    assert!(ok(&host.virt_usb(&["enable", "1"])).contains("is already enabled"));
    assert!(
        fails(&host, &["enable", "9"]).contains("there is no device 9: 'virt-usb devices --all'")
    );
    assert!(ok(&host.virt_usb(&["quarantine"])).contains("no device is quarantined"));
    assert!(
        ok(&host.virt_usb(&["quarantine", "clear", "1"])).contains("is already out of quarantine")
    );
    let tags = || json(&host, &["devices"])[0]["tags"].clone();
    assert!(ok(&host.virt_usb(&["tag", "1", "blue", "a"])).ends_with("is tagged erp, a, blue\n"));
    assert_eq!(tags(), serde_json::json!(["erp", "a", "blue"]));
    assert!(
        fails(&host, &["untag", "1", "erp"]).contains("has the tag \"erp\" from a whitelist rule")
    );
    let name = "device 1 (0529:0001 \"HASP\", port 1-1)";
    assert_eq!(
        ok(&host.virt_usb(&["untag", "1", "nosuch"])).trim(),
        format!("{name} has no tag \"nosuch\"; its tags: erp, a, blue")
    );
    assert_eq!(json(&host, &["untag", "1", "nosuch"])["changed"], false);
    ok(&host.virt_usb(&["tag", "1", "erp"]));
    assert_eq!(
        ok(&host.virt_usb(&["untag", "1", "erp"])).trim(),
        format!("{name}: removed; a whitelist rule still gives it \"erp\"; its tags: erp, a, blue")
    );
    assert_eq!(
        ok(&host.virt_usb(&["untag", "1", "blue", "none"])).trim(),
        format!("{name}: removed; its tags: erp, a")
    );
    host.discover(&two_keys());
    assert_eq!(tags(), serde_json::json!(["erp", "a"]), "a scan changes nothing");
    for wrong in
        [&["tag", "1"][..], &["tag", "x", "a"], &["tag", "1", "white space"], &["disable", "0"]]
    {
        assert_eq!(host.virt_usb(wrong).status.code(), Some(2), "{wrong:?}");
    }
    let events = json(&host, &["events", "--device", "1"]);
    let told: Vec<&str> =
        events.as_array().unwrap().iter().map(|e| e["event"].as_str().unwrap()).collect();
    let expected = ["disabled", "enabled", "tagged", "tagged"];
    assert!(
        expected.iter().all(|e| told.contains(e))
            && events[2]["actor"].as_str().unwrap().starts_with("virt-usb "),
        "{told:?}"
    );
}

#[test]
fn the_store_is_checked_and_copied() {
    let host = Host::new("");
    assert!(fails(&host, &["store", "check"]).contains("virt-usb discover"));
    host.discover(&two_keys());
    assert!(ok(&host.virt_usb(&["store", "check"])).contains("no problems found"));
    let copy = host.path("copy.sqlite");
    ok(&host.virt_usb(&["store", "backup", copy.to_str().unwrap()]));
    assert!(fails(&host, &["store", "backup", copy.to_str().unwrap()]).contains("exists"));
    std::fs::create_dir(host.path("restored")).unwrap();
    std::fs::copy(&copy, host.path("restored/inventory.sqlite")).unwrap();
    let config =
        std::fs::read_to_string(host.config_file()).unwrap().replace("/state\"", "/restored\"");
    std::fs::write(host.config_file(), config).unwrap();
    assert_eq!(json(&host, &["devices"]).as_array().unwrap().len(), 2);
    assert_eq!(json(&host, &["hosts"])[0]["host"], "host1");
}

#[test]
fn wrong_input_is_said_where_it_stands() {
    let host = Host::new("usb_whitelist_switch = 'on'\n");
    assert!(fails(&host, &["devices"]).contains("did you mean \"usb_white_list_switch\"?"));
    assert_eq!(host.virt_usb(&["devices", "--colour"]).status.code(), Some(2));
    let missing = std::process::Command::new(virt_usb_suite::program("virt-usb"))
        .args(["--config", "/nowhere/c.toml", "devices"])
        .output()
        .unwrap();
    assert!(text(&missing.stderr).contains("cannot read the configuration /nowhere/c.toml"));
    for shell in ["bash", "zsh", "fish"] {
        assert!(ok(&host.virt_usb(&["completions", shell])).contains("virt-usb"));
    }
}

#[test]
fn a_reader_that_goes_away_is_no_error() {
    let host = Host::new("");
    host.discover(&two_keys());
    let mut child = std::process::Command::new(virt_usb_suite::program("virt-usb"))
        .arg("--config")
        .arg(host.config_file())
        .args(["devices", "--json"])
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success() && output.stderr.is_empty(), "{}", text(&output.stderr));
}

#[test]
fn a_device_is_named_by_its_id_or_by_what_it_shows() {
    let host = Host::new("");
    host.discover(&(device("0001", "1-1", 5, "") + &device("0002", "1-2", 6, "serial = 'A'")));
    assert!(ok(&host.virt_usb(&["disable", "0529:0002"])).starts_with("device 2 "));
    assert!(ok(&host.virt_usb(&["enable", r#"{"serial":"A"}"#])).starts_with("device 2 "));
    assert!(ok(&host.virt_usb(&["tag", "0529:0001", "blue"])).starts_with("device 1 "));
    assert!(ok(&host.virt_usb(&["untag", r#"{"tags":["blue"]}"#, "blue"])).starts_with("device 1"));
    let events = json(&host, &["events", "--device", "0529:0002", "--limit", "0"]);
    let ids: Vec<_> = events.as_array().unwrap().iter().map(|e| e["device_id"].clone()).collect();
    assert!(ids.len() >= 3 && ids.iter().all(|id| *id == 2), "{events}");
    let both = fails(&host, &["disable", r#"{"vendor_id":"0529"}"#]);
    assert!(both.contains("2 devices match") && both.contains("device 1 (0529:0001"), "{both}");
    assert!(fails(&host, &["forget", "1234:0001"]).contains("no device matches"));
}

#[test]
fn events_of_an_instance_are_found_by_its_name() {
    let host = Host::new("");
    host.discover(&two_keys());
    let flavor = r#"{"usb_devices":[{"vendor_id":"0529","product_id":"0001"}]}"#;
    let xml = domain("erp", 7, flavor);
    ok(&host.call(&["erp", "prepare", "begin", "-"], xml.as_bytes()));
    let events = |name: &str| json(&host, &["events", "--instance", name]);
    let claimed = events("erp");
    let id = claimed[0]["instance_uuid"].as_str().unwrap().to_owned();
    assert_eq!(events(&id), claimed);
    ok(&host.call(&["erp", "release", "end", "shutdown"], xml.as_bytes()));
    assert!(events("erp").as_array().unwrap().len() > claimed.as_array().unwrap().len());
    assert!(fails(&host, &["events", "--instance", "crm"]).contains("no instance named"));
}

#[test]
fn a_new_token_is_alone_on_stdout() {
    let host = Host::new("");
    host.discover(&two_keys());
    let output = host.virt_usb(&["token", "add", "anna", "--project", "p1", "--days", "9"]);
    let token = ok(&output);
    let token = token.strip_suffix('\n').unwrap();
    assert!(token.starts_with("vusb_") && token.bytes().all(|b| b.is_ascii_graphic()), "{token}");
    let words = text(&output.stderr);
    assert!(
        words.starts_with("This is the token of anna, member of project p1, until "),
        "{words}"
    );
    assert!(!words.contains(token));
    let output = host.virt_usb(&["--json", "token", "add", "bert", "--project", "p1"]);
    let shown: Value = serde_json::from_str(&ok(&output)).unwrap();
    assert_eq!(shown["name"], "bert");
    assert_eq!(text(&output.stderr), "");
}

/// The command line and the portal tell events apart by their kind, the store writes them as text.
#[test]
fn each_event_of_the_store_has_a_kind() {
    let folder = virt_usb_suite::root().join("host-runtime/store/src");
    let listed = Command::new("find").arg(folder).args(["-name", "*.rs"]).output().unwrap();
    let files = text(&listed.stdout);
    let source: String = files.lines().map(|file| std::fs::read_to_string(file).unwrap()).collect();
    for kind in EventKind::ALL {
        assert!(source.contains(&format!("\"{kind}\"")), "the store records no {kind}");
    }
    let (mut seen, mut unknown) = (0, Vec::new());
    for call in ["Event::new(", "Event::of(", "Event::about_claim(", "Event::about_instance("] {
        for rest in source.split(call).skip(1) {
            let Some(text) = rest.trim_start().strip_prefix('"') else { continue };
            let name = text.split('"').next().unwrap();
            seen += 1;
            unknown.extend(name.parse::<EventKind>().is_err().then(|| name.to_owned()));
        }
    }
    assert!(seen > 10 && unknown.is_empty(), "{seen} events, without a kind: {unknown:?}");
}
