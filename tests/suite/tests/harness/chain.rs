//! Several hooks, against libvirt's virHookCall.
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use super::common::{folder, script};
use virt_usb_harness::{Chained, Hooks, Request, Script, Settings};

fn call(dir: &Path, op: &str, filter: bool) -> Chained {
    let request =
        Request { name: "vm".into(), op: op.into(), subop: "begin".into(), extra: String::new() };
    let hooks = Hooks::find(None, Some(dir)).unwrap();
    hooks.call(&request, b"0", filter, &Settings::default()).unwrap()
}

fn inputs(chained: &Chained) -> Vec<String> {
    chained.links.iter().map(|link| String::from_utf8(link.input.clone()).unwrap()).collect()
}

fn output(chained: &Chained) -> Option<String> {
    chained.output.clone().map(|xml| String::from_utf8(xml).unwrap())
}

/// Appends its own file name to what it reads.
const APPEND: &str = "printf '%s+%s' \"$(cat)\" \"${0##*/}\"";

#[test]
fn the_main_script_first_then_strcmp_order() {
    let dir = folder();
    for name in
        ["qemu", "qemu.d/b", "qemu.d/a", "qemu.d/Z", "qemu.d/10", "qemu.d/9", "qemu.d/.hidden"]
    {
        script(&dir.path().join(name), "true");
    }
    let plain = script(&dir.path().join("qemu.d/c"), "true");
    fs::set_permissions(&plain, fs::Permissions::from_mode(0o644)).unwrap();
    fs::create_dir(dir.path().join("qemu.d/d")).unwrap();
    let chained = call(dir.path(), "prepare", false);
    let names: Vec<_> =
        chained.links.iter().map(|l| l.path.file_name().unwrap().to_str().unwrap()).collect();
    assert_eq!(names, ["qemu", ".hidden", "10", "9", "Z", "a", "b"]);
}

#[test]
fn all_are_called_and_one_failure_fails_the_whole() {
    let dir = folder();
    script(&dir.path().join("qemu"), "echo first >&2; exit 1");
    script(&dir.path().join("qemu.d/a"), "echo second >&2; exit 9");
    script(&dir.path().join("qemu.d/b"), "exit 0");
    let chained = call(dir.path(), "prepare", false);
    assert_eq!(chained.links.len(), 3);
    let failure = chained.failure.unwrap();
    assert!(
        failure.ends_with("exit status 9: second"),
        "the last failure is the one that is shown: {failure}"
    );
}

#[test]
fn a_filters_output_is_the_next_ones_input() {
    let dir = folder();
    script(&dir.path().join("qemu"), APPEND);
    script(&dir.path().join("qemu.d/a"), "printf ' \\n\\t'");
    script(&dir.path().join("qemu.d/b"), APPEND);
    let chained = call(dir.path(), "migrate", true);
    assert_eq!(inputs(&chained), ["0", "0+qemu", "0+qemu"]);
    assert_eq!(output(&chained).as_deref(), Some("0+qemu+b"));
    assert_eq!(chained.failure, None);
}

#[test]
fn after_a_failure_the_original_goes_on() {
    let dir = folder();
    script(&dir.path().join("qemu"), APPEND);
    script(&dir.path().join("qemu.d/a"), "printf ignored; exit 1");
    script(&dir.path().join("qemu.d/b"), APPEND);
    let chained = call(dir.path(), "restore", true);
    assert_eq!(inputs(&chained), ["0", "0+qemu", "0"]);
    assert!(chained.failure.is_some());
}

#[test]
fn what_is_no_filter_gets_the_original_always() {
    let dir = folder();
    script(&dir.path().join("qemu"), APPEND);
    script(&dir.path().join("qemu.d/a"), APPEND);
    let chained = call(dir.path(), "prepare", false);
    assert_eq!(inputs(&chained), ["0", "0"]);
    assert_eq!(output(&chained), None);
}

#[test]
fn a_filter_that_prints_nothing_changes_nothing() {
    let dir = folder();
    script(&dir.path().join("qemu.d/a"), "true");
    assert_eq!(output(&call(dir.path(), "migrate", true)), None);
}

#[test]
fn a_hook_to_try_takes_the_place_of_its_name() {
    let (dir, other) = (folder(), folder());
    for name in ["qemu", "qemu.d/a", "qemu.d/k", "qemu.d/z"] {
        script(&dir.path().join(name), "true");
    }
    let path = script(&other.path().join("k"), "true");
    let hook = Script { path: path.clone(), before: vec!["--config".into(), "/c".into()] };
    let hooks = Hooks::find(Some(hook), Some(dir.path())).unwrap();
    let paths: Vec<_> = hooks.scripts().iter().map(|script| script.path.clone()).collect();
    assert_eq!(
        paths,
        [dir.path().join("qemu"), dir.path().join("qemu.d/a"), path, dir.path().join("qemu.d/z")]
    );
    assert_eq!(hooks.scripts().iter().filter(|script| !script.before.is_empty()).count(), 1);
}

#[test]
fn no_hook_is_an_error() {
    let dir = folder();
    let error = Hooks::find(None, Some(dir.path())).unwrap_err().to_string();
    assert!(error.starts_with("no executable hook: "), "{error}");
    assert!(error.contains("qemu.d/*"), "{error}");
}
