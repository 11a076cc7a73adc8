//! The domain files of libvirt's own tests: read and rewritten without a crash, no byte changed
//! that should not be, and still valid where they were.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use virt_usb_domxml::{Edits, Hostdev};
use virt_usb_model::{BusAddress, DeviceId, UsbId};
use virt_usb_suite::root;

fn files() -> Vec<PathBuf> {
    let corpus = root().join(".cache/libvirt-domains");
    assert!(corpus.join("complete").exists(), "libvirt's test data is missing: run 'make corpus'");
    let mut files = Vec::new();
    for dir in fs::read_dir(corpus).unwrap().map(|e| e.unwrap().path()).filter(|p| p.is_dir()) {
        files.extend(
            fs::read_dir(dir)
                .unwrap()
                .map(|e| e.unwrap().path())
                .filter(|p| p.extension().is_some_and(|e| e == "xml")),
        );
    }
    files.sort();
    files
}

fn edits() -> Edits {
    let hostdev = |id: u64, device| Hostdev {
        id: DeviceId::new(id).unwrap(),
        usb: UsbId::new(0x0529, 1),
        address: BusAddress::new(1, device).unwrap(),
        guest_port: None,
    };
    Edits { hostdevs: vec![hostdev(5, 5), hostdev(7, 9)], ..Edits::default() }
}

#[test]
fn libvirts_own_domains_only_grow_and_stay_valid() {
    let (mut rewritten, mut refused) = (0, 0);
    let scratch = tempfile::tempdir().unwrap();
    let mut validate = Vec::new();
    for file in files() {
        let before = fs::read(&file).unwrap();
        let after = match virt_usb_domxml::rewrite(&before, &edits()) {
            Ok(after) => {
                after.unwrap_or_else(|| panic!("{}: nothing was injected", file.display()))
            }
            Err(_) => {
                refused += 1;
                assert!(
                    virt_usb_domxml::read(&before).is_err(),
                    "{}: read, but not rewritten",
                    file.display()
                );
                continue;
            }
        };
        rewritten += 1;
        let at = before.iter().zip(&after).take_while(|(a, b)| a == b).count();
        let grown = after.len() - before.len();
        // One run of bytes was put in, or (into an empty <devices/>) its tag was opened: all the
        // rest is there, in order.
        let inserted_once = before[at..] == after[at + grown..];
        assert!(
            inserted_once || is_subsequence(&before[at..], &after[at..]),
            "{}: bytes were changed",
            file.display()
        );
        assert_eq!(
            virt_usb_domxml::rewrite(&after, &edits()).unwrap(),
            None,
            "{}: rewritten twice",
            file.display()
        );
        let copy = scratch.path().join(format!("{rewritten}.xml"));
        fs::write(&copy, &after).unwrap();
        validate.push((file, copy));
    }
    assert!(rewritten > 500, "{rewritten} rewritten, {refused} refused");
    // The schema is slow: every seventh file is held against it.
    let mut valid = 0;
    for (before, after) in validate.iter().step_by(7).filter(|(before, _)| is_valid(before)) {
        assert!(is_valid(after), "{} was valid and its rewriting is not", before.display());
        valid += 1;
    }
    assert!(valid > 80, "{valid} files held against the schema");
}

fn is_subsequence(short: &[u8], long: &[u8]) -> bool {
    let mut long = long.iter();
    short.iter().all(|byte| long.any(|other| other == byte))
}

fn is_valid(file: &Path) -> bool {
    let run = Command::new("virt-xml-validate").arg(file).arg("domain").output();
    run.expect("virt-xml-validate is missing: run 'make test-deps'").status.success()
}
