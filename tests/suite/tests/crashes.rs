//! The hook is killed with SIGKILL at every single system call of a claim and of a release.
//! Whenever it dies: the store is sound, no device is lost, none is given twice, and doing it again
//! does it.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

use std::collections::BTreeMap;
use std::os::unix::process::ExitStatusExt;
use std::process::Command;

use virt_usb_suite::{Host, device, domain, feed};

const ASK: &str = r#"{"usb_devices":[{"vendor_id":"0529","product_id":"0001","count":2}]}"#;

fn host() -> Host {
    let host = Host::new("");
    host.discover(
        &[device("0001", "1-1", 2, "serial = \"A\""), device("0001", "1-2", 3, "serial = \"B\"")]
            .concat(),
    );
    host
}

/// The system calls that the hook makes, in order: each by its name and how many of that name came
/// before it, itself included.
fn steps(host: &Host, arguments: &[&str], xml: &str) -> Vec<(String, usize)> {
    let trace = host.path("trace");
    assert!(strace(host, &["-o", trace.to_str().unwrap()], arguments, xml).success());
    let mut seen = BTreeMap::new();
    let text = std::fs::read_to_string(trace).unwrap();
    let names =
        text.lines().filter_map(|line| line.split_once('(')).map(|(name, _)| name.to_owned());
    let calls = names.filter(|name| name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_'));
    calls
        .map(|name| {
            let count = seen.entry(name.clone()).and_modify(|n| *n += 1).or_insert(1);
            (name, *count)
        })
        .collect()
}

/// Runs the hook and kills it when it enters the given system call. False when it ended by itself.
fn killed_at(host: &Host, (name, nth): &(String, usize), arguments: &[&str], xml: &str) -> bool {
    let inject = format!("inject={name}:signal=SIGKILL:when={nth}");
    let status = strace(host, &["-o", "/dev/null", "-e", &inject], arguments, xml);
    // strace dies as its child did.
    assert!(status.signal() == Some(9) || status.success(), "{status:?}");
    !status.success()
}

fn strace(
    host: &Host,
    options: &[&str],
    arguments: &[&str],
    xml: &str,
) -> std::process::ExitStatus {
    let hook = host.hook(arguments);
    let mut command = Command::new("strace");
    command.arg("-qq").args(options).arg(hook.get_program()).args(hook.get_args());
    let output = feed(command, xml.as_bytes());
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(
        !said.contains("strace:"),
        "strace is needed and must be allowed to trace ('make test-deps'): {said}"
    );
    output.status
}

/// After a crash: sound, and each device free or held by erp-1, both together. Folds the log, so
/// that each round begins alike.
fn sound(host: &Host, step: &(String, usize)) -> usize {
    let store = host.store();
    assert_eq!(store.check().unwrap(), Vec::<String>::new(), "killed at {step:?}");
    let claims = store.claims().unwrap();
    assert!([0, 2].contains(&claims.len()), "all or nothing, killed at {step:?}: {claims:?}");
    assert!(claims.iter().all(|c| c.domain == "erp-1"));
    assert_eq!(store.devices().unwrap().len(), 2, "no device is lost");
    store.fold_wal().unwrap();
    claims.len()
}

/// Asserts that the hook was killed before and after the commit, and in nearly all of its calls.
fn died_everywhere(before: usize, after: usize, calls: usize) {
    assert!(
        before > 50 && after > 5,
        "of {calls} calls it died in {before} before the commit and in {after} after it"
    );
    assert!(
        before + after > calls * 9 / 10,
        "it was killed in {} of {calls} calls",
        before + after
    );
}

fn release(host: &Host, xml: &str) {
    assert!(host.call(&["erp-1", "release", "end", "shutdown"], xml.as_bytes()).status.success());
}

#[test]
fn killed_at_every_system_call_of_a_claim() {
    const PREPARE: [&str; 4] = ["erp-1", "prepare", "begin", "-"];
    let host = host();
    let (mine, theirs) = (domain("erp-1", 1, ASK), domain("erp-2", 2, ASK));
    let steps = steps(&host, &PREPARE, &mine);
    release(&host, &mine);
    let (mut before, mut after) = (0, 0);
    for step in &steps {
        if !killed_at(&host, step, &PREPARE, &mine) {
            continue;
        }
        match sound(&host, step) {
            0 => before += 1,
            _ => {
                after += 1;
                let refused = host.call(&["erp-2", "prepare", "begin", "-"], theirs.as_bytes());
                assert_eq!(refused.status.code(), Some(1), "given twice, killed at {step:?}");
            }
        }
        let again = host.call(&PREPARE, mine.as_bytes());
        assert!(again.status.success(), "{}", String::from_utf8_lossy(&again.stderr));
        assert_eq!(sound(&host, step), 2);
        release(&host, &mine);
        assert_eq!(sound(&host, step), 0);
    }
    died_everywhere(before, after, steps.len());
}

#[test]
fn killed_at_every_system_call_of_a_release() {
    const RELEASE: [&str; 4] = ["erp-1", "release", "end", "shutdown"];
    let host = host();
    let mine = domain("erp-1", 1, ASK);
    let claim = || {
        assert!(host.call(&["erp-1", "prepare", "begin", "-"], mine.as_bytes()).status.success());
        host.store().fold_wal().unwrap();
    };
    claim();
    let steps = steps(&host, &RELEASE, &mine);
    let (mut before, mut after) = (0, 0);
    for step in &steps {
        claim();
        let killed = killed_at(&host, step, &RELEASE, &mine);
        match (sound(&host, step), killed) {
            (0, true) => after += 1,
            (_, true) => before += 1,
            (left, false) => assert_eq!(left, 0),
        }
        release(&host, &mine);
        assert_eq!(sound(&host, step), 0, "the second release gives back what the first could not");
    }
    died_everywhere(before, after, steps.len());
}
