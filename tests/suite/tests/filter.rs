//! `virt-usb filter`, as an operator asks it.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

use std::path::Path;
use std::process::Output;

use serde_json::{Value, json};
use virt_usb_suite::{Host, device, program, text};

const KEY: &str = r#"{"usb_devices":[{"vendor_id":"0529","product_id":"0001"}]}"#;

fn answer(output: &Output, code: i32) -> String {
    assert_eq!(
        output.status.code(),
        Some(code),
        "{}{}",
        text(&output.stdout),
        text(&output.stderr)
    );
    text(&output.stdout)
}

/// The error of a failed command: one line, and nothing on stdout.
fn fails(host: &Host, arguments: &[&str]) -> String {
    let output = host.virt_usb(arguments);
    assert_eq!(answer(&output, 1), "");
    let why = text(&output.stderr);
    assert!(why.starts_with("virt-usb: ") && why.lines().count() == 1, "{why}");
    why
}

fn entry(id: u64, more: &Value) -> Value {
    let mut entry = json!({
        "id": id, "compute_node_id": 2, "address": "usb_1_5",
        "vendor_id": "0529", "product_id": "0001", "status": "available",
        "port_path": "1-1.4", "serial_kind": "missing", "class": "00",
    });
    for (key, value) in more.as_object().unwrap() {
        entry[key] = value.clone();
    }
    entry
}

/// Four hosts: one has two keys, one has one, one has it for a project, one has none.
fn fleet(host: &Host) -> String {
    let document = |name: &str, devices: &[Value]| {
        json!({"version": 1, "host": name, "compute_node_id": 2, "revision": 1, "devices": devices})
            .to_string()
    };
    let documents = [
        document(
            "one",
            &[
                entry(1, &json!({"product_name": "HASP"})),
                entry(2, &json!({"status": "allocated"})),
            ],
        ),
        document("two", &[entry(1, &json!({})), entry(2, &json!({"port_path": "1-2"}))]),
        document("ours", &[entry(1, &json!({"projects": ["p1"]}))]),
        document("none", &[]),
    ];
    let file = host.path("fleet.jsonl");
    std::fs::write(&file, documents.join("\n")).unwrap();
    file.to_str().unwrap().to_owned()
}

#[test]
fn it_ranks_the_hosts_and_says_why_not_the_others() {
    let host = Host::new("");
    let fleet = fleet(&host);
    let short = answer(&host.virt_usb(&["filter", "--flavor", KEY, "--hosts", &fleet]), 0);
    let lines: Vec<&str> = short.lines().map(str::trim).collect();
    assert!(
        lines[1].starts_with("1")
            && lines[1].contains("two")
            && lines[1].ends_with("1 (0529:0001 at port 1-1.4)"),
        "{short}"
    );
    assert!(
        lines[2].contains("one") && lines[2].contains("1 (0529:0001 HASP at port 1-1.4)"),
        "{short}"
    );
    assert!(
        short.contains("2 of 4 host(s) can serve; the others: 1 no-such-device, 1 not-allowed"),
        "{short}"
    );
    let long =
        answer(&host.virt_usb(&["filter", "--flavor", KEY, "--hosts", &fleet, "--explain"]), 0);
    assert!(long.contains("usb_devices[0] wants 1: no device of the host matches"), "{long}");
    assert!(
        long.contains("usb_devices[0] wants 1: 1 match, 0 of them are for this project"),
        "{long}"
    );
    let mine =
        host.virt_usb(&["filter", "--flavor", KEY, "--hosts", &fleet, "--project", "p1", "--json"]);
    let mine: Value = serde_json::from_str(&answer(&mine, 0)).unwrap();
    assert_eq!((&mine["matched"], &mine["hosts"]), (&json!(3), &json!(4)));
    assert_eq!(mine["reasons"], json!({"no-such-device": 1}));
    assert_eq!(mine["placements"][0]["devices"][0]["id"], json!(1));
    let one = host.virt_usb(&["filter", "--flavor", KEY, "--hosts", &fleet, "--limit", "1"]);
    assert!(answer(&one, 0).contains("2 of 4 host(s) can serve, the best 1 are shown"));
}

#[test]
fn no_host_is_an_answer_with_a_status_of_its_own() {
    let host = Host::new("");
    let fleet = fleet(&host);
    let three = r#"[{"vendor_id":"0529","count":3}]"#;
    let none = answer(&host.virt_usb(&["filter", "--flavor", three, "--hosts", &fleet]), 3);
    assert!(none.contains("none of 4 host(s) can serve"), "{none}");
    assert!(none.contains("usb_devices[0] wants 3: 2 match, 1 of them are free"), "{none}");
    let both = r#"[{"vendor_id":"0529","count":2},{"port":"1-2"}]"#;
    let contended =
        answer(&host.virt_usb(&["filter", "--flavor", both, "--hosts", &fleet, "--json"]), 3);
    let contended: Value = serde_json::from_str(&contended).unwrap();
    assert_eq!(contended["reasons"]["contention"], json!(1), "{contended}");
}

#[test]
fn without_a_file_it_asks_about_this_host_and_its_flavors() {
    let host = Host::new("");
    assert!(fails(&host, &["filter", "--flavor", KEY]).contains("virt-usb discover"));
    host.discover(&device("0001", "1-1", 2, "serial = \"A\""));
    host.flavor("erp", KEY);
    let mine = answer(&host.virt_usb(&["filter", "--flavor", "erp"]), 0);
    assert!(mine.contains("host1") && mine.contains("1 of 1 host(s) can serve"), "{mine}");
    assert!(fails(&host, &["filter", "--flavor", "crm"]).contains("no flavor named \"crm\""));
    let documents = answer(&host.virt_usb(&["hosts", "--documents"]), 0);
    assert_eq!(documents.lines().count(), 1);
    std::fs::write(host.path("mine.jsonl"), documents).unwrap();
    let file = host.path("mine.jsonl");
    let again = host.virt_usb(&["filter", "--flavor", "erp", "--hosts", file.to_str().unwrap()]);
    assert_eq!(answer(&again, 0), mine);
    // Who asks for nothing of the host is refused nowhere.
    host.flavor("redirected", r#"{"usb_redirection_devices":[{"bus":"usb","type":"spicevmc"}]}"#);
    assert!(answer(&host.virt_usb(&["filter", "--flavor", "redirected"]), 0).contains("host1"));
}

#[test]
fn an_error_is_one_line() {
    let host = Host::new("");
    let fleet = fleet(&host);
    let with = |more: &[&str]| {
        let all: Vec<&str> =
            ["filter", "--hosts", &fleet].into_iter().chain(more.iter().copied()).collect();
        fails(&host, &all)
    };
    assert!(with(&["--flavor", "{"]).contains("not JSON"));
    assert!(
        with(&["--flavor", KEY, "--component", "/etc/passwd"])
            .contains("/etc/passwd is not a filter: it is not WebAssembly")
    );
    assert!(
        with(&["--flavor", KEY, "--component", "/nowhere"])
            .contains("cannot read the filter /nowhere: No such file")
    );
    let module = program("virt-usb").with_file_name("virt-usb-filter-module.wasm");
    assert!(
        with(&["--flavor", KEY, "--component", module.to_str().unwrap()])
            .contains("is a core module, wanted a component")
    );
    assert!(
        with(&["--flavor", KEY, "--sha256", &"0".repeat(64)]).contains("is not the pinned one")
    );
    assert!(
        fails(&host, &["filter", "--flavor", KEY, "--hosts", "/nowhere"])
            .contains("cannot read the host documents of /nowhere")
    );
    std::fs::write(
        host.path("bad.jsonl"),
        r#"{"version":1,"host":"a","compute_node_id":2,"revision":1,"devices":[{"id":0}]}"#,
    )
    .unwrap();
    let bad = host.path("bad.jsonl");
    let why = fails(&host, &["filter", "--flavor", KEY, "--hosts", bad.to_str().unwrap()]);
    assert!(why.contains("document 1: devices[0]"), "{why}");
    let empty = host.path("empty");
    std::fs::write(&empty, "").unwrap();
    let why = fails(&host, &["filter", "--flavor", KEY, "--hosts", empty.to_str().unwrap()]);
    assert!(why.contains("found none: wanted JSON documents"), "{why}");
    // What is wrong with the arguments themselves.
    let wrong: [(&[&str], &str); 3] = [
        (&[], "--flavor"),
        (&["--flavor", KEY, "--project", "a b"], "a b"),
        (&["--flavor", KEY, "--sha256", "12"], "wanted 64 hexadecimal digits"),
    ];
    for (arguments, why) in wrong {
        let all: Vec<&str> = ["filter"].into_iter().chain(arguments.iter().copied()).collect();
        let output = host.virt_usb(&all);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}");
        assert!(text(&output.stderr).contains(why), "{}", text(&output.stderr));
    }
}

#[test]
fn precompile_writes_over_nothing_that_is_no_plain_file_and_not_over_the_filter() {
    let host = Host::new("");
    let says = |file: &Path, more: &[&str]| {
        let all = ["filter", "precompile", file.to_str().unwrap()];
        fails(&host, &all.into_iter().chain(more.iter().copied()).collect::<Vec<_>>())
    };
    let (folder, link, own) = (host.path("folder"), host.path("link"), host.path("own.wasm"));
    std::fs::create_dir(&folder).unwrap();
    std::os::unix::fs::symlink("/nowhere", &link).unwrap();
    assert!(says(&folder, &[]).contains("exists and is not a regular file"));
    assert!(says(&link, &[]).contains("exists and is not a regular file"));
    assert!(says(&host.path("no/such/folder"), &[]).contains("cannot write"));
    let built = program("virt-usb").with_file_name("virt-usb-filter.wasm");
    std::fs::copy(&built, &own).unwrap();
    assert!(says(&own, &["--component", own.to_str().unwrap()]).contains("is the filter itself"));
    assert_eq!(std::fs::read(&own).unwrap(), std::fs::read(&built).unwrap());
    let beside: Vec<_> =
        std::fs::read_dir(host.path("")).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert!(!beside.iter().any(|name| name.to_string_lossy().ends_with(".part")), "{beside:?}");
}

#[test]
fn the_best_none_are_only_counted() {
    let host = Host::new("");
    let fleet = fleet(&host);
    let said =
        answer(&host.virt_usb(&["filter", "--flavor", KEY, "--hosts", &fleet, "--limit", "0"]), 0);
    assert!(said.contains("host(s) can serve, the best 0 are shown"), "{said}");
}

#[test]
fn a_precompiled_filter_answers_the_same() {
    let host = Host::new("");
    let fleet = fleet(&host);
    let file = host.path("filter.cwasm");
    let file = file.to_str().unwrap();
    let written: Value =
        serde_json::from_str(&answer(&host.virt_usb(&["filter", "precompile", file, "--json"]), 0))
            .unwrap();
    let asked = ["filter", "--flavor", KEY, "--hosts", &fleet, "--explain"];
    let with: Vec<&str> = asked.iter().copied().chain(["--component", file]).collect();
    let pinned: Vec<&str> =
        with.iter().copied().chain(["--sha256", written["sha256"].as_str().unwrap()]).collect();
    let right = answer(&host.virt_usb(&asked), 0);
    assert_eq!(answer(&host.virt_usb(&with), 0), right);
    assert_eq!(answer(&host.virt_usb(&pinned), 0), right);
}

#[test]
fn the_bench_measures_a_small_fleet() {
    let host = Host::new("");
    let measured =
        host.virt_usb(&["filter", "bench", "--hosts", "300", "--devices", "7", "--json"]);
    let measured: Value = serde_json::from_str(&answer(&measured, 0)).unwrap();
    let figures = measured["figures"].as_array().unwrap();
    assert!(
        figures.len() >= 10 && figures.iter().all(|f| f["least_us"].as_f64().unwrap() > 0.0),
        "{measured}"
    );
    let rare = figures.iter().find(|f| f["what"] == "select, rare kind").unwrap();
    assert_eq!(rare["matched"], json!(1), "the first host has it");
}
