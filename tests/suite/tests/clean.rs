//! Names come from devices, guests and tenants: no program writes a character of theirs that a
//! terminal obeys, or that turns a line around, whether to a terminal or to a log.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use virt_usb_model::printable;
use virt_usb_suite::{Host, PROGRAM_TIMEOUT, device, domain, feed, program, root};

/// Characters that XML and TOML allow: C1's CSI, the overrides and isolates, a mark at the start of
/// a file.
const HOSTILE: &str = "e\u{9b}2J\u{85}\u{202e}\u{2066}\u{200f}\u{feff}\u{7f}rp";
const ONE: &str = r#"{"usb_devices":[{"vendor_id":"0529","product_id":"0001"}]}"#;

#[track_caller]
fn harmless(what: &str, text: &[u8]) {
    let text = std::str::from_utf8(text).expect(what);
    let bad = text.chars().find(|c| *c != '\n' && printable(*c) != *c);
    assert_eq!(bad, None, "{what}: {text:?}");
}

/// Runs it; both of its outputs must be harmless. Returns stdout.
#[track_caller]
fn run(what: &str, command: Command, input: &str) -> Vec<u8> {
    let output = feed(command, input.as_bytes());
    harmless(what, &output.stderr);
    harmless(what, &output.stdout);
    output.stdout
}

fn host() -> Host {
    let host = Host::new("");
    host.discover(
        &[device("0001", "1-1", 2, "serial = \"A\""), device("0001", "1-2", 3, "")].concat(),
    );
    host
}

#[test]
fn the_hook() {
    let host = host();
    let names = [HOSTILE.to_owned(), format!("{HOSTILE}\x1b[2J\r\nvirt-usb: forged")];
    for (number, name) in names.iter().enumerate() {
        let number = u32::try_from(number).unwrap();
        let mine = domain(HOSTILE, 1 + number, ONE);
        for (what, xml) in [
            ("refused", mine.replace("0001\"", "9999\"")),
            ("a wrong flavor", mine.replace("\"product_id\"", &format!("\"{HOSTILE}\""))),
            ("a flavor that is not there", mine.replace(ONE, &format!("@{HOSTILE}"))),
            ("XML that is none", mine.replace("<memory", &format!("<{HOSTILE} x={HOSTILE}"))),
        ] {
            run(what, host.hook(&[name, "prepare", "begin", HOSTILE]), &xml);
        }
        for operation in ["prepare", "started", "reconnect", "migrate", "release"] {
            let sub = if operation == "release" { "end" } else { "begin" };
            let output = feed(host.hook(&[name, operation, sub, HOSTILE]), mine.as_bytes());
            // What it prints is the domain's own XML, for libvirt.
            harmless(operation, &output.stderr);
        }
        run("another call", host.hook(&[name, HOSTILE, HOSTILE, HOSTILE]), &mine);
        run("no call at all", host.hook(&[HOSTILE]), "");
    }
    let log = std::fs::read(host.path("log")).unwrap();
    harmless("the record", &log);
    assert!(log.iter().filter(|b| **b == b'\n').count() > 15);
}

#[test]
fn the_command_line() {
    let host = host();
    let mine = domain(HOSTILE, 1, ONE);
    assert!(host.call(&["x", "prepare", "begin", "-"], mine.as_bytes()).status.success());
    let refused = domain(HOSTILE, 2, &ONE.replace("}]", ",\"count\":9}]"));
    assert!(!host.call(&["x", "prepare", "begin", "-"], refused.as_bytes()).status.success());
    let sim = host.path("sim.toml");
    let hostile = HOSTILE.replace('\u{7f}', "");
    std::fs::write(&sim, device("0001", "1-1", 2, &format!("product_name = \"{hostile}\"")))
        .unwrap();
    let sim = sim.to_str().unwrap();
    let wrong = format!("{{\"{HOSTILE}\":1}}");
    for arguments in [
        &["claims"][..],
        &["events"],
        &["devices"],
        &["doctor"],
        &["hosts", "--documents"],
        &["store", "check"],
        &["discover", "--sim", sim, "--dry-run"],
        &["discover", "--sim", sim],
        &["flavor", "set", "x", &wrong],
        &["flavor", "set", HOSTILE, ONE],
        &["flavor", "show", HOSTILE],
        &["grant", "set", "x", &wrong],
        &["store", "backup", HOSTILE],
        &["claims", "release", HOSTILE],
        &["start", HOSTILE],
        &["enable", HOSTILE],
        &["tag", "1", "--", HOSTILE],
        &["attach", "test", "--vendor", HOSTILE],
        &["watch", "--last", HOSTILE],
        &[HOSTILE],
    ] {
        for json in [&[][..], &["--json"]] {
            let mut command = Command::new(program("virt-usb"));
            command
                .current_dir(host.path(""))
                .arg("--config")
                .arg(host.config_file())
                .args(arguments)
                .args(json);
            let shown = run(&arguments.join(" "), command, "");
            if *arguments == ["claims"] && !json.is_empty() {
                let claims: serde_json::Value = serde_json::from_slice(&shown).unwrap();
                assert_eq!(claims[0]["domain"], HOSTILE, "programs read what it is");
            }
        }
    }
    // Lines as they arrive, until the reader is dropped.
    for json in [&[][..], &["--json"]] {
        let mut command = Command::new(program("virt-usb"));
        command.arg("--config").arg(host.config_file()).args(["watch", "--last", "9"]).args(json);
        let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
        let mut lines = Vec::new();
        let mut reader = std::io::BufReader::new(child.stdout.take().unwrap());
        for _ in 0..3 {
            std::io::BufRead::read_until(&mut reader, b'\n', &mut lines).unwrap();
        }
        drop(reader);
        child.wait().unwrap();
        assert!(String::from_utf8_lossy(&lines).contains("claimed"), "{lines:?}");
        harmless("watch", &lines);
    }
}

#[test]
fn the_agent() {
    let host = Host::new("");
    let sim = host.path("sim.toml");
    // TOML has no delete character.
    let hostile = HOSTILE.replace('\u{7f}', "");
    let guest = format!(
        "[[domain]]\nname = \"{hostile}\"\nuuid = '11111111-2222-4333-8444-555555555555'\nrunning \
            = true\nflavor = '{ONE}'\n"
    );
    let named = device("0001", "1-1", 2, &format!("product_name = \"{hostile}\""));
    std::fs::write(&sim, named + &guest).unwrap();
    let log = host.path("agent.log");
    let mut command = Command::new(program("virt-usbd"));
    command.arg("--verbose").arg("--config").arg(host.config_file()).arg("--sim").arg(&sim);
    let mut agent = command.stderr(std::fs::File::create(&log).unwrap()).spawn().unwrap();
    let deadline = Instant::now() + PROGRAM_TIMEOUT;
    while !host.claims().contains("allocated") {
        assert!(Instant::now() < deadline, "{}", std::fs::read_to_string(&log).unwrap());
        std::thread::sleep(Duration::from_millis(20));
    }
    agent.kill().unwrap();
    agent.wait().unwrap();
    let text = std::fs::read(&log).unwrap();
    harmless("the agent's log", &text);
    let text = String::from_utf8(text).unwrap();
    assert!(text.contains("rp: device 1 attached"), "{text}");
}

fn sources(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            sources(&path, found);
        } else if path.extension().is_some_and(|e| e == "rs") {
            found.push(path);
        }
    }
}

/// Only known functions write to a terminal or a log, and all use the same function to clean text.
#[test]
fn one_function_cleans_text_and_few_places_write() {
    const WRITERS: [(&str, &str); 9] = [
        ("hook/src/run.rs", "delivers the answer, which is made of clean lines"),
        ("host-runtime/src/cli/output.rs", "cleans"),
        ("host-runtime/fleet/src/log.rs", "cleans"),
        ("host-runtime/src/daemon/mod.rs", "shows the first token, which it has made"),
        ("host-runtime/src/cli/watch/mod.rs", "asks whether it is a terminal"),
        ("host-runtime/src/cli/watch/terminal.rs", "draws cells, which are cleaned in view.rs"),
        ("filter-wasm/pack/src/main.rs", "is run by the build alone"),
        ("host-runtime/src/api/request_schemas.rs", "describes to clients which names are taken"),
        ("host-runtime/model/src/text.rs", "is the function"),
    ];
    let mut found = Vec::new();
    for folder in ["hook/src", "host-runtime", "filter-wasm"] {
        sources(&root().join(folder), &mut found);
    }
    assert!(found.len() > 150);
    for path in found {
        let name = path.strip_prefix(root()).unwrap().to_str().unwrap().to_owned();
        let text = std::fs::read_to_string(&path).unwrap();
        let text = text.split("#[cfg(test)]").next().unwrap();
        if name.contains("/tests/")
            || name.contains("/examples/")
            || WRITERS.iter().any(|(writer, _)| *writer == name)
        {
            continue;
        }
        for own in [
            "is_control() {",
            "stderr()",
            "stdout()",
            "eprint",
            "println",
            "202e",
            ".map(printable)",
        ] {
            assert!(!text.contains(own), "{name} holds {own:?}");
        }
    }
}
