//! Owners of the files, and the messages for users without permission. Each case runs in a process
//! of its own, as another user or under mounts of its own, which needs root.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::Path;
use std::process::Command;

use tempfile::TempDir;
use virt_usb_store::{FILE_NAME, Store, StoreError};

use crate::common::*;

const STATE: &str = "VIRT_USB_TEST_STATE";
const UNPRIVILEGED: u32 = 65534;

/// False where the tests do not run as root: then these cannot be made, and it is said.
fn is_root() -> bool {
    let root = fs::metadata("/proc/self").unwrap().uid() == 0;
    if !root {
        eprintln!("not root: cases that need another user or a mount are not run");
    }
    root
}

/// Not a test: what the processes below do. Says how it went.
#[test]
#[ignore = "started by the others, in another process"]
fn child() {
    let Some(state) = std::env::var_os(STATE) else { return };
    let tried = hook(Path::new(&state)).and_then(|mut store| claim(&mut store, 7, ANY));
    println!("HOOK: {}", tried.map_or_else(|e| format!("{e:?}"), |_| "fine".into()));
    let made = Store::create(Path::new(&state), STORE_LOCK_TIMEOUT)
        .and_then(|mut store| scan(&mut store, &[], &boot(1)));
    println!("MADE: {}", made.map_or_else(|e| format!("{e:?}"), |_| "fine".into()));
}

/// Runs [`child`] by way of `wrapper`; returns what hook and agent met.
fn run(wrapper: &[&str], state: &Path) -> (String, String) {
    // The build directory need not be accessible to all users.
    let folder = tempfile::tempdir().unwrap();
    open(folder.path());
    let program = folder.path().join("child");
    // By another process: a test that forks meanwhile would inherit a descriptor of ours that is
    // open for writing, and the kernel executes no file that is open for writing.
    let copied =
        Command::new("cp").arg(std::env::current_exe().unwrap()).arg(&program).status().unwrap();
    assert!(copied.success());
    let output = Command::new(wrapper[0])
        .args(&wrapper[1..])
        .arg(&program)
        .args(["--exact", "files::child", "--ignored", "--nocapture"])
        .env(STATE, state)
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let line = |name: &str| {
        let found = text.lines().find_map(|l| l.split_once(name).map(|(_, rest)| rest.to_owned()));
        found.unwrap_or_else(|| panic!("{text}{}", String::from_utf8_lossy(&output.stderr)))
    };
    (line("HOOK: "), line("MADE: "))
}

const AS_UNPRIVILEGED: [&str; 6] =
    ["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups"];

fn open(folder: &Path) {
    fs::set_permissions(folder, fs::Permissions::from_mode(0o755)).unwrap();
}

fn with_devices() -> TempDir {
    let (dir, mut store) = inventory();
    plug(&mut store, 3);
    drop(store);
    dir
}

#[test]
fn another_user_is_told_who_owns_the_inventory() {
    if !is_root() {
        return;
    }
    let dir = with_devices();
    let file = dir.path().join(FILE_NAME);
    // The folder is closed.
    let (hook, made) = run(&AS_UNPRIVILEGED, dir.path());
    assert!(hook.starts_with("Permission") && made.starts_with("Permission"), "{hook} {made}");
    // The folder above is closed.
    let (hook, _) = run(&AS_UNPRIVILEGED, &dir.path().join("."));
    assert!(hook.starts_with("Permission"), "{hook}");
    // The folder is open, the file is closed.
    open(dir.path());
    let (hook, made) = run(&AS_UNPRIVILEGED, dir.path());
    assert!(hook.starts_with("Permission") && made.starts_with("Permission"), "{hook} {made}");
    // The file may be read, but not written.
    fs::set_permissions(&file, fs::Permissions::from_mode(0o644)).unwrap();
    let (hook, made) = run(&AS_UNPRIVILEGED, dir.path());
    assert!(hook.starts_with("Permission") && made.starts_with("Permission"), "{hook} {made}");
    // Also while another process has the file open.
    let mut store = crate::common::hook(dir.path()).unwrap();
    assert!(takes(&mut store, 1));
    let (hook, made) = run(&AS_UNPRIVILEGED, dir.path());
    assert!(hook.starts_with("Permission") && made.starts_with("Permission"), "{hook} {made}");
    // The program cannot create files in a folder of another user.
    let empty = tempfile::tempdir().unwrap();
    open(empty.path());
    let (hook, made) = run(&AS_UNPRIVILEGED, empty.path());
    assert!(hook.starts_with("Missing") && made.starts_with("Permission"), "{hook} {made}");
    assert_sound(&store);
}

#[test]
fn its_owner_needs_no_root() {
    if !is_root() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    chown(dir.path(), Some(UNPRIVILEGED), Some(UNPRIVILEGED)).unwrap();
    let mut store = Store::create(dir.path(), STORE_LOCK_TIMEOUT).unwrap();
    plug(&mut store, 3);
    assert!(takes(&mut store, 1));
    let owners = |root: &Path| {
        let files = fs::read_dir(root).unwrap().map(|e| e.unwrap().path());
        files.map(|p| (fs::symlink_metadata(&p).unwrap().uid(), p)).collect::<Vec<_>>()
    };
    let mut all = owners(dir.path());
    all.extend(owners(&dir.path().join("hints")));
    assert!(all.len() >= 5, "{all:?}");
    assert!(all.iter().all(|(uid, _)| *uid == UNPRIVILEGED), "{all:?}");
    drop(store);
    let mode = |name: &str| fs::metadata(dir.path().join(name)).unwrap().mode() & 0o7777;
    assert_eq!((mode(FILE_NAME), mode("hints")), (0o640, 0o750));
    assert_eq!(run(&AS_UNPRIVILEGED, dir.path()), ("fine".into(), "fine".into()));

    // A backup that root put back is handed over by root's next tool.
    chown(dir.path().join(FILE_NAME), Some(0), Some(0)).unwrap();
    drop(Store::create(dir.path(), STORE_LOCK_TIMEOUT).unwrap());
    assert_eq!(fs::metadata(dir.path().join(FILE_NAME)).unwrap().uid(), UNPRIVILEGED);
    // But not under a second name, which may be root's own, and not what is no inventory.
    let file = dir.path().join(FILE_NAME);
    let kept = |own: &Path| {
        let error = Store::create(dir.path(), STORE_LOCK_TIMEOUT).unwrap_err();
        assert!(matches!(error, StoreError::NotTheirs { user: UNPRIVILEGED, .. }), "{error:?}");
        let says = format!("'chown {UNPRIVILEGED}: {}'", file.display());
        assert!(error.to_string().contains(&says), "{error}");
        assert_eq!(fs::metadata(own).unwrap().uid(), 0);
    };
    let own = dir.path().join("own");
    fs::rename(&file, &own).unwrap();
    chown(&own, Some(0), Some(0)).unwrap();
    fs::hard_link(&own, &file).unwrap();
    kept(&own);
    fs::remove_file(&file).unwrap();
    fs::write(&file, "root's own secret, longer than what is looked at: ".repeat(9)).unwrap();
    fs::set_permissions(&file, fs::Permissions::from_mode(0o600)).unwrap();
    kept(&file);
}

/// Root works on the inventory of another user with the rights of that user: root owns no file
/// afterwards.
#[test]
fn root_s_inventory_stays_its_owner_s() {
    if !is_root() {
        return;
    }
    let (place, copies) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    open(place.path());
    let state = place.path().join("state");
    fs::create_dir(&state).unwrap();
    chown(&state, Some(UNPRIVILEGED), Some(UNPRIVILEGED)).unwrap();
    let mut store = Store::create(&state, STORE_LOCK_TIMEOUT).unwrap();
    plug(&mut store, 3);
    // Neither that root opened it nor that a thread of root's closes it makes a file of root's.
    let copy = copies.path().join("copy");
    store.backup(&copy).unwrap();
    std::thread::spawn(move || drop(store)).join().unwrap();
    drop(crate::common::hook(&state).unwrap());
    let made = fs::metadata(&copy).unwrap();
    assert_eq!((made.uid(), made.mode() & 0o777), (0, 0o600), "a copy elsewhere is root's");
    assert_eq!(fs::read_dir(copies.path()).unwrap().count(), 1, "and nothing beside it");
    for entry in fs::read_dir(&state).unwrap() {
        let entry = entry.unwrap();
        assert_eq!(entry.metadata().unwrap().uid(), UNPRIVILEGED, "{:?}", entry.file_name());
    }
    assert_eq!(run(&AS_UNPRIVILEGED, &state), ("fine".into(), "fine".into()));
    // One in a folder of theirs is theirs.
    let store = crate::common::hook(&state).unwrap();
    store.backup(&state.join("copy")).unwrap();
    assert_eq!(fs::metadata(state.join("copy")).unwrap().uid(), UNPRIVILEGED);
}

/// A wrapper that runs `setup` under mounts of its own; none where that is not allowed.
fn under(setup: &str) -> Option<[String; 6]> {
    let allowed = Command::new("unshare").args(["-m", "true"]).status().is_ok_and(|s| s.success());
    if !allowed {
        eprintln!(
            "no mounts of one's own: cases that need a full or read-only file system are not run"
        );
        return None;
    }
    let script = format!("set -e; {setup}; exec \"$@\"");
    Some(["unshare", "-m", "sh", "-c", &script, "sh"].map(Into::into))
}

fn run_under(setup: &str, state: &Path) -> Option<(String, String)> {
    let wrapper = under(setup)?;
    Some(run(&wrapper.each_ref().map(String::as_str), state))
}

#[test]
fn read_only() {
    if !is_root() {
        return;
    }
    let dir = with_devices();
    let state = dir.path().display();
    let remount = format!("mount --bind {state} {state}; mount -o remount,bind,ro {state}");
    if let Some((hook, made)) = run_under(&remount, dir.path()) {
        assert!(hook.starts_with("ReadOnly") && made.starts_with("ReadOnly"), "{hook} {made}");
    }
    let mut store = crate::common::hook(dir.path()).unwrap();
    assert!(takes(&mut store, 1), "and writable again, it goes on");
    if let Some((hook, made)) = run_under(&remount, dir.path()) {
        assert!(hook.starts_with("ReadOnly") && made.starts_with("ReadOnly"), "{hook} {made}");
    }
    assert_sound(&store);
    let empty = tempfile::tempdir().unwrap();
    let state = empty.path().display();
    let remount = format!("mount --bind {state} {state}; mount -o remount,bind,ro {state}");
    if let Some((hook, made)) = run_under(&remount, empty.path()) {
        assert!(hook.starts_with("Missing") && made.starts_with("ReadOnly"), "{hook} {made}");
    }
}

#[test]
fn no_space_left() {
    if !is_root() {
        return;
    }
    let dir = with_devices();
    let place = tempfile::tempdir().unwrap();
    // All that is left free on a small file system, in KiB: not enough to open, to log, to name a
    // hint.
    for free in [0, 8, 24, 36, 44] {
        let setup = format!(
            "mount -t tmpfs -o size=1m none {place}; cp -r {state}/. {place}; \
             avail=$(df -k --output=avail {place} | tail -1); fill=$((avail - {free})); \
             dd if=/dev/zero of={place}/fill bs=1024 count=$fill status=none",
            place = place.path().display(),
            state = dir.path().display(),
        );
        if let Some((hook, made)) = run_under(&setup, place.path()) {
            assert!(hook.starts_with("Full"), "{free} KiB: {hook}");
            assert!(made.starts_with("Full") || made == "fine", "{free} KiB: {made}");
        }
    }
}
