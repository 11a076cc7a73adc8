//! The hook at its process boundary: a folder a case under `goldens/`, see its README. `BLESS=1`
//! writes what is found.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use virt_usb_suite::Host;

fn cases() -> Vec<PathBuf> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("goldens");
    let mut cases: Vec<PathBuf> =
        fs::read_dir(dir).unwrap().map(|e| e.unwrap().path()).filter(|p| p.is_dir()).collect();
    cases.sort();
    cases
}

fn optional(path: &Path) -> Option<String> {
    path.exists().then(|| fs::read_to_string(path).unwrap())
}

/// Result of a case.
struct CaseResult {
    stdout: Vec<u8>,
    stderr: String,
    exit: String,
    claims: String,
    prepare: String,
}

fn play(case: &Path) -> CaseResult {
    let host = Host::new(&optional(&case.join("config.toml")).unwrap_or_default());
    if let Some(devices) = optional(&case.join("devices.toml")) {
        host.discover(&devices);
    }
    if let Some(flavors) = optional(&case.join("flavors.json")) {
        let flavors: serde_json::Map<String, serde_json::Value> =
            serde_json::from_str(&flavors).unwrap();
        flavors.iter().for_each(|(name, flavor)| host.flavor(name, &flavor.to_string()));
    }
    let mut before: Vec<PathBuf> = fs::read_dir(case.join("before"))
        .into_iter()
        .flatten()
        .map(|e| e.unwrap().path())
        .collect();
    before.sort();
    for step in before {
        prior(&host, &step);
    }
    let args = fs::read_to_string(case.join("args")).unwrap();
    let args: Vec<&str> = args.split_whitespace().collect();
    let output = host.call(&args, &fs::read(case.join("stdin.xml")).unwrap());
    let claims = host.claims();
    // A restore is refused by the prepare that follows it.
    let prepare = match args.as_slice() {
        [name, "restore", ..]
            if String::from_utf8_lossy(&output.stdout).contains("urn:virt-usb:refusal:1") =>
        {
            let next = host.call(&[name, "prepare", "begin", "-"], &output.stdout);
            assert_eq!(
                (next.status.code(), next.stdout.as_slice()),
                (Some(1), &b""[..]),
                "{}",
                case.display()
            );
            assert_eq!(host.claims(), claims, "{}", case.display());
            settle(&String::from_utf8(next.stderr).unwrap(), &host)
        }
        _ => String::new(),
    };
    let stdout = match String::from_utf8(output.stdout) {
        Ok(text) => settle(&text, &host).into_bytes(),
        Err(other) => other.into_bytes(),
    };
    CaseResult {
        stdout,
        stderr: settle(&String::from_utf8(output.stderr).unwrap(), &host),
        exit: format!("{}\n", output.status.code().unwrap()),
        claims,
        prepare,
    }
}

/// Events before the call: `N.OPERATION.xml` an earlier call, `N.plug.toml` changed devices that
/// were not recorded, `N.discover.toml` changed devices that were recorded, `N.boot` a reboot,
/// `N.wait` seconds that passed, `N.state` a broken store.
fn prior(host: &Host, step: &Path) {
    let name = step.file_name().unwrap().to_str().unwrap();
    let text = fs::read_to_string(step).unwrap();
    match name.split('.').collect::<Vec<_>>()[..] {
        [_, "plug", "toml"] => drop(host.plug(&text)),
        [_, "discover", "toml"] => host.discover(&text),
        [_, "boot"] => host.boot(text.trim(), 30.0),
        [_, "wait"] => {
            host.boot(
                "11111111-1111-4111-8111-111111111111",
                1000.0 + text.trim().parse::<f64>().unwrap(),
            );
        }
        [_, "state"] => {
            for suffix in ["-wal", "-shm"] {
                drop(fs::remove_file(
                    host.path(&format!("state/{}{suffix}", virt_usb_store::FILE_NAME)),
                ));
            }
            fs::write(host.path("state").join(virt_usb_store::FILE_NAME), text).unwrap();
        }
        [_, operation, "xml"] => {
            let domain = virt_usb_domxml::read(text.as_bytes()).unwrap().name;
            let sub = if ["stopped", "release"].contains(&operation) { "end" } else { "begin" };
            host.call(&[&domain, operation, sub, "-"], text.as_bytes());
        }
        _ => panic!("{}: no such step", step.display()),
    }
}

/// Paths and moments differ between runs.
fn settle(text: &str, host: &Host) -> String {
    let text = text.replace(host.path("").to_str().unwrap(), "DIR/");
    let mut settled = String::new();
    let mut rest = text.as_str();
    while let Some(at) = rest.find("since 20") {
        settled += &rest[..at];
        settled += "since TIME";
        let tail = &rest[at + 8..];
        rest = &tail[tail.find('Z').unwrap() + 1..];
    }
    settled + rest
}

#[test]
fn every_case_answers_as_written() {
    let bless = std::env::var_os("BLESS").is_some();
    let cases = cases();
    assert!(cases.len() >= 40, "{} cases", cases.len());
    let mut wrong = Vec::new();
    for case in &cases {
        let found = play(case);
        let name = case.file_name().unwrap().to_str().unwrap();
        for (file, bytes) in [
            ("stdout.xml", found.stdout.as_slice()),
            ("stderr", found.stderr.as_bytes()),
            ("exit", found.exit.as_bytes()),
            ("claims", found.claims.as_bytes()),
            ("prepare", found.prepare.as_bytes()),
        ] {
            let path = case.join(file);
            let wanted = fs::read(&path).unwrap_or_default();
            if wanted == bytes {
                continue;
            }
            if bless {
                if bytes.is_empty() {
                    drop(fs::remove_file(&path));
                } else {
                    fs::write(&path, bytes).unwrap();
                }
                continue;
            }
            let (wanted, bytes) =
                (String::from_utf8_lossy(&wanted), String::from_utf8_lossy(bytes));
            let diff = similar::TextDiff::from_lines(wanted.as_ref(), bytes.as_ref());
            wrong.push(format!(
                "{name}/{file}:\n{}",
                diff.unified_diff().header("written", "found")
            ));
        }
    }
    assert!(wrong.is_empty(), "{}\n(BLESS=1 writes what was found)", wrong.join("\n"));
}

#[test]
fn refusals_are_one_line_and_say_who_speaks() {
    for case in cases() {
        let exit = fs::read_to_string(case.join("exit")).unwrap();
        let stderr = optional(&case.join("stderr")).unwrap_or_default();
        if exit.trim() == "1" {
            assert!(stderr.len() < 800, "{}: libvirt would cut it", case.display());
            assert_eq!(stderr.lines().count(), 1, "{}", case.display());
            assert!(
                stderr.starts_with("virt-usb: ") && !case.join("stdout.xml").exists(),
                "{}",
                case.display()
            );
        }
    }
}

#[test]
fn rewritten_xml_is_valid_by_libvirts_schema() {
    let mut checked = 0;
    for case in cases() {
        let output = case.join("stdout.xml");
        // What was not valid before need not be valid after.
        if !output.exists() || !valid(&case.join("stdin.xml")) {
            continue;
        }
        assert!(valid(&output), "virt-xml-validate {} domain", output.display());
        checked += 1;
    }
    assert!(checked >= 15, "{checked} cases were checked");
}

fn valid(file: &Path) -> bool {
    let run = Command::new("virt-xml-validate").arg(file).arg("domain").output();
    run.expect("virt-xml-validate is missing: run 'make test-deps'").status.success()
}
