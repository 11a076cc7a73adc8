//! The hook is killed with SIGKILL at every single system call of a claim and of a release. Whenever it dies: the store
//! is sound, no device is lost, none is given twice, and doing it again does it.

use std::os::unix::process::ExitStatusExt;
use std::process::Command;

use virt_usb_suite::{Host, device, domain, feed};

const ASK: &str = r#"{"usb_devices":[{"vendor_id":"0529","product_id":"0001","count":2}]}"#;

fn host() -> Host {
    let host = Host::new("");
    host.discover(&[device("0001", "1-1", 2, "serial = \"A\""), device("0001", "1-2", 3, "serial = \"B\"")].concat());
    host
}

/// Runs the hook under strace, which kills it when it makes its `nth` system call. False when it had ended before.
fn killed_at(host: &Host, nth: usize, arguments: &[&str], xml: &str) -> bool {
    let hook = host.hook(arguments);
    let mut command = Command::new("strace");
    command.args(["-f", "-qq", "-o", "/dev/null", "-e", "trace=all", "-e", &format!("inject=all:signal=SIGKILL:when={nth}")]);
    command.arg(hook.get_program()).args(hook.get_args());
    let status = feed(command, xml.as_bytes()).status;
    // strace dies as its child did.
    match (status.signal(), status.code()) {
        (Some(9), _) => true,
        (None, Some(0)) => false,
        other => panic!("strace is needed and must be allowed to trace ('make test-deps'): {other:?}"),
    }
}

/// After a crash: sound, and each device free or held by erp-1, both together.
fn sound(host: &Host, nth: usize) -> usize {
    let store = host.store();
    assert_eq!(store.check().unwrap(), Vec::<String>::new(), "killed at system call {nth}");
    let claims = store.claims().unwrap();
    assert!([0, 2].contains(&claims.len()), "all or nothing, killed at system call {nth}: {claims:?}");
    assert!(claims.iter().all(|c| c.domain == "erp-1"));
    let devices = store.devices().unwrap();
    assert_eq!(devices.len(), 2, "no device is lost");
    claims.len()
}

#[test]
fn killed_at_every_system_call_of_a_claim() {
    let host = host();
    let (mine, theirs) = (domain("erp-1", 1, ASK), domain("erp-2", 2, ASK));
    let (mut nth, mut before, mut after) = (1, 0, 0);
    while killed_at(&host, nth, &["erp-1", "prepare", "begin", "-"], &mine) {
        match sound(&host, nth) {
            0 => before += 1,
            _ => {
                after += 1;
                let refused = host.call(&["erp-2", "prepare", "begin", "-"], theirs.as_bytes());
                assert_eq!(refused.status.code(), Some(1), "given twice, killed at system call {nth}");
            }
        }
        let again = host.call(&["erp-1", "prepare", "begin", "-"], mine.as_bytes());
        assert!(again.status.success(), "{}", String::from_utf8_lossy(&again.stderr));
        assert_eq!(sound(&host, nth), 2);
        host.call(&["erp-1", "release", "end", "shutdown"], mine.as_bytes());
        assert_eq!(sound(&host, nth), 0);
        nth += 1;
    }
    assert!(before > 50 && after > 5, "died {before} times before the commit and {after} times after it");
}

#[test]
fn killed_at_every_system_call_of_a_release() {
    let host = host();
    let mine = domain("erp-1", 1, ASK);
    let (mut nth, mut before, mut after) = (1, 0, 0);
    loop {
        assert!(host.call(&["erp-1", "prepare", "begin", "-"], mine.as_bytes()).status.success());
        if !killed_at(&host, nth, &["erp-1", "release", "end", "shutdown"], &mine) {
            break;
        }
        match sound(&host, nth) {
            0 => after += 1,
            _ => before += 1,
        }
        assert!(host.call(&["erp-1", "release", "end", "shutdown"], mine.as_bytes()).status.success());
        assert_eq!(sound(&host, nth), 0, "the second release gives back what the first could not");
        nth += 1;
    }
    assert_eq!(sound(&host, nth), 0);
    assert!(before > 50 && after > 5, "died {before} times before the commit and {after} times after it");
}
