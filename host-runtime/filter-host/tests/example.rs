//! Runs the example of the crate's documentation.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

mod common;

#[test]
fn the_example_of_the_documentation_runs() {
    // cargo builds a package's examples before it runs its tests: target/PROFILE/deps/THIS and
    // target/PROFILE/examples.
    let this = std::env::current_exe().unwrap();
    let example = this.ancestors().nth(2).unwrap().join("examples/scheduler");
    let output = std::process::Command::new(&example).arg(common::built()).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(
        String::from_utf8(output.stdout).unwrap(),
        "beta scores 0\nalpha: usb_devices[0] wants 1: no device of the host matches\n"
    );
}
