//! Restore and rebuild on files that are really damaged, by processes that are really killed, while
//! others claim.

use std::collections::BTreeMap;
use std::fs::{self, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use proptest::prelude::*;
use tempfile::TempDir;
use virt_usb_model::{Device, DeviceKey, Flavor, RuleVerdict};
use virt_usb_store::claim::Claimed;
use virt_usb_store::events::Filter;
use virt_usb_store::recover::{Health, RebuildRequest, Recovered, health, replace};
use virt_usb_store::release::Extent;
use virt_usb_store::{FILE_NAME, Source, Store, StoreError};

use crate::common::*;

const DEVICES: u8 = 60;

fn plugged() -> Vec<(Device, RuleVerdict)> {
    let serial = |n: u8| (!n.is_multiple_of(3)).then(|| format!("SERIAL-{n:04}"));
    (1..=DEVICES)
        .map(|n| {
            let port = format!("1-{}.{}", n / 10 + 1, n % 10 + 1);
            (device(u16::from(n % 4), serial(n).as_deref(), &port, n), offered())
        })
        .collect()
}

/// An inventory with something in every table, made once and closed.
fn original() -> &'static Path {
    static ORIGINAL: OnceLock<TempDir> = OnceLock::new();
    let make = || {
        let (dir, mut store) = inventory();
        scan(&mut store, &plugged(), &boot(1)).unwrap();
        for n in 0..20 {
            let flavor =
                Flavor::parse(&format!(r#"{{"usb_devices":[{{"id":{}}}]}}"#, n + 1)).unwrap();
            store.set_flavor(&format!("flavor-{n}"), &flavor, &boot(1)).unwrap();
        }
        for n in 1..=5 {
            let wanted = [request(&format!(r#"{{"id":{n}}}"#))];
            store.assign(&claimant(n), Source::Operator, &wanted, &boot(1)).unwrap();
            let granted = claim(&mut store, n, &format!(r#"{{"id":{n}}}"#)).unwrap();
            assert!(matches!(granted, Claimed::Granted(_)));
        }
        drop(store);
        assert!(!dir.path().join("inventory.sqlite-wal").exists());
        dir
    };
    ORIGINAL.get_or_init(make).path()
}

/// A copy of it; with `log` and a claim in that alone, as a hook leaves it.
fn lived(log: bool) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir(dir.path().join("hints")).unwrap();
    for folder in ["", "hints"] {
        for entry in fs::read_dir(original().join(folder)).unwrap().map(Result::unwrap) {
            if entry.file_type().unwrap().is_file() {
                fs::copy(entry.path(), dir.path().join(folder).join(entry.file_name())).unwrap();
            }
        }
    }
    if log {
        let mut late = hook(dir.path()).unwrap();
        assert!(matches!(claim(&mut late, 6, r#"{"id":6}"#).unwrap(), Claimed::Granted(_)));
    }
    dir
}

fn rebuild_request(backup: Option<&Path>) -> RebuildRequest<'_> {
    RebuildRequest {
        what: if backup.is_some() { "restore" } else { "rebuild" },
        backup,
        guests_known: true,
        ids: &[],
    }
}

/// Restores or rebuilds, unless another program does it.
fn once(
    dir: &Path,
    backup: Option<&Path>,
    seen: &[(Device, RuleVerdict)],
) -> Result<Recovered, StoreError> {
    let mut fill = |store: &mut Store| scan(store, seen, &boot(1)).map(drop);
    replace(dir, STORE_LOCK_TIMEOUT, &rebuild_request(backup), &boot(1), &mut fill)
}

/// The same. A child that another test has just forked keeps our lock until it becomes its program:
/// that is waited for.
fn with(
    dir: &Path,
    backup: Option<&Path>,
    seen: &[(Device, RuleVerdict)],
) -> Result<Recovered, StoreError> {
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(60);
    loop {
        match once(dir, backup, seen) {
            Err(StoreError::Recovering { .. }) if std::time::Instant::now() < deadline => {
                std::thread::sleep(std::time::Duration::from_millis(20));
            }
            done => return done,
        }
    }
}

fn rebuild(dir: &Path) -> Recovered {
    with(dir, None, &plugged()).unwrap()
}

fn keys(store: &Store) -> BTreeMap<u64, DeviceKey> {
    store.all_devices().unwrap().iter().map(|r| (r.entry.id.get(), r.key())).collect()
}

fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

fn asides(dir: &Path) -> Vec<String> {
    names(dir).into_iter().filter(|n| n.contains(".before-")).collect()
}

fn harm(path: &Path, from: u64, bytes: &[u8]) {
    let mut file = OpenOptions::new().write(true).open(path).unwrap();
    file.seek(SeekFrom::Start(from)).unwrap();
    file.write_all(bytes).unwrap();
}

fn page(dir: &Path, sql: &str) -> u64 {
    raw(dir).query_row(sql, [], |row| row.get::<_, u64>(0)).unwrap()
}

fn root(dir: &Path, name: &str) -> u64 {
    (page(dir, &format!("SELECT rootpage FROM sqlite_schema WHERE name = '{name}'")) - 1) * 4096
}

/// Checks every rebuild: the inventory is sound, every plugged-in device is in it, every kept id
/// names its device, and no new id names an old device.
fn kept(was: &BTreeMap<u64, DeviceKey>, dir: &Path, recovered: &Recovered) -> usize {
    assert_sound(&recovered.store);
    assert_eq!(health(dir, STORE_LOCK_TIMEOUT).unwrap(), Health::Sound);
    assert!(!dir.join("inventory.sqlite.new").exists());
    let present = recovered.store.devices().unwrap();
    assert_eq!(present.len(), usize::from(DEVICES));
    let mut same = 0;
    for record in &present {
        let id = record.entry.id.get();
        match was.get(&id) {
            Some(key) => {
                assert_eq!(*key, record.key(), "device {id} is another one now");
                same += 1;
            }
            None => assert!(id > u64::from(DEVICES), "{id} was never given"),
        }
    }
    same
}

#[test]
fn readable_rows_of_a_damaged_file_are_kept() {
    type Harm = fn(&Path, &Path);
    let cases: [(&str, Harm, usize); 10] = [
        ("the header", |_, f| harm(f, 0, &[0x5a; 100]), 60),
        ("the first page", |_, f| harm(f, 0, &[0; 4096]), 60),
        ("the schema's cells", |_, f| harm(f, 100, &[0x5a; 3900]), 60),
        ("an index", |d, f| harm(f, root(d, "usb_devices_port"), &[0; 4096]), 60),
        ("the events", |d, f| harm(f, root(d, "events"), &[0xff; 4096]), 60),
        ("the claims", |d, f| harm(f, root(d, "claims"), &[0xff; 4096]), 60),
        ("the root of the devices", |d, f| harm(f, root(d, "usb_devices"), &[0; 4096]), 0),
        (
            "the last quarter cut off",
            |_, f| {
                let length = fs::metadata(f).unwrap().len();
                OpenOptions::new().write(true).open(f).unwrap().set_len(length * 3 / 4).unwrap();
            },
            0,
        ),
        ("everything", |_, f| harm(f, 0, &vec![0x5a; fs::metadata(f).unwrap().len() as usize]), 0),
        ("emptied", |_, f| drop(OpenOptions::new().write(true).truncate(true).open(f).unwrap()), 0),
    ];
    for (what, harm, least) in cases {
        let dir = lived(false);
        let file = dir.path().join(FILE_NAME);
        let was = keys(&hook(dir.path()).unwrap());
        hook(dir.path()).unwrap().fold_wal().unwrap();
        harm(dir.path(), &file);
        let bytes = fs::read(&file).unwrap();
        let sick = health(dir.path(), STORE_LOCK_TIMEOUT);
        assert!(!matches!(sick, Ok(Health::Sound)), "{what}: {sick:?}");
        let recovered = rebuild(dir.path());
        let same = kept(&was, dir.path(), &recovered);
        println!("{what}: {same} of {DEVICES} ids, {:?}", recovered.kept);
        assert!(same >= least, "{what}: {same}");
        let aside = recovered.aside.as_ref().unwrap();
        assert!(fs::read(aside).unwrap() == bytes, "{what}: what was there is kept as it was");
        let mut store = hook(dir.path()).unwrap();
        if least == 60 {
            assert_eq!(
                (store.flavors().unwrap().len(), store.all_assignments().unwrap().len()),
                (20, 5),
                "{what}"
            );
            let claims = store.claims().unwrap().len();
            assert_eq!(claims, if what == "the claims" { 0 } else { 5 }, "{what}");
        }
        assert!(takes(&mut store, 77), "{what}: devices are given again");
        let told = store.events(&Filter::default()).unwrap();
        assert!(told.iter().any(|e| e.event == "rebuilt"), "{what}");
    }
}

#[test]
fn rows_that_are_in_the_log_alone_are_kept_with_it() {
    for header in [false, true] {
        let dir = lived(true);
        let file = dir.path().join(FILE_NAME);
        let log = dir.path().join("inventory.sqlite-wal");
        assert!(fs::metadata(&log).unwrap().len() > 0);
        let offset = root(lived(false).path(), "usb_devices_compute_node");
        harm(&file, offset, &[0; 4096]);
        if header {
            harm(&file, 0, &[0x5a; 4096]);
        }
        let recovered = rebuild(dir.path());
        let claims = recovered.store.claims().unwrap();
        assert!(claims.iter().any(|c| c.device_id.get() == 6), "{header}: {claims:?}");
        assert_sound(&recovered.store);
        let left = asides(dir.path());
        assert!(left.iter().any(|n| n.ends_with("-wal")), "{left:?}");
    }
}

#[test]
fn a_log_that_is_gone_takes_only_what_was_in_it() {
    let dir = lived(true);
    let was = keys(&hook(original()).unwrap());
    for suffix in ["-wal", "-shm"] {
        fs::remove_file(dir.path().join(format!("{FILE_NAME}{suffix}"))).unwrap();
    }
    let recovered = rebuild(dir.path());
    assert_eq!(kept(&was, dir.path(), &recovered), 60);
}

#[test]
fn a_new_device_never_gets_an_id_that_was_given() {
    let dir = lived(false);
    let file = dir.path().join(FILE_NAME);
    let root = root(dir.path(), "usb_devices");
    harm(&file, root, &[0; 4096]);
    let recovered = rebuild(dir.path());
    assert_eq!(recovered.lost_devices, 60);
    assert!(recovered.store.devices().unwrap().iter().all(|r| r.entry.id.get() > 60));
    // Nothing at all can be read: who knows how many there were.
    drop(recovered);
    assert!(!dir.path().join("inventory.sqlite-wal").exists());
    fs::write(&file, vec![0x5a; 50_000]).unwrap();
    let ids = rebuild(dir.path()).store.devices().unwrap();
    assert!(ids.iter().all(|r| r.entry.id.get() > 1000), "{}", ids[0].entry.id);
    // One that a guest has in its alias.
    let dir = tempfile::tempdir().unwrap();
    let mut fill = |store: &mut Store| scan(store, &plugged(), &boot(1)).map(drop);
    let ids = [virt_usb_model::DeviceId::new(40).unwrap()];
    let request = RebuildRequest { ids: &ids, ..rebuild_request(None) };
    let made = replace(dir.path(), STORE_LOCK_TIMEOUT, &request, &boot(1), &mut fill).unwrap();
    assert!(made.aside.is_none());
    assert!(made.store.devices().unwrap().iter().all(|r| r.entry.id.get() > 40));
}

#[test]
fn columns_and_tables_of_a_later_schema_are_kept() {
    let dir = lived(false);
    // As a migration to come would: every program of that version has the column, in the old file
    // and in the new one.
    raw(dir.path())
        .execute_batch(
            "UPDATE usb_devices SET extra_info = 'of the operator' WHERE id \
        = 3; UPDATE usb_devices SET status = 'x' WHERE id = 4",
        )
        .unwrap();
    let recovered = rebuild(dir.path());
    let devices = recovered.store.devices().unwrap();
    let third = devices.iter().find(|r| r.entry.id.get() == 3).unwrap();
    assert_eq!(third.entry.extra_info.as_deref(), Some("of the operator"));
    assert!(
        devices.iter().all(|r| r.entry.id.get() != 4),
        "a row that no program wrote is refused"
    );
    assert_sound(&recovered.store);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn whatever_is_damaged_an_id_names_its_device_or_none(
        places in prop::collection::vec(
            (0.0..1.0f64, 16..3000usize, any::<bool>(), any::<u64>()),
            1..6,
        ),
        log in any::<bool>(),
    ) {
        let dir = lived(log);
        let file = dir.path().join(FILE_NAME);
        let was = keys(&hook(dir.path()).unwrap());
        for (at, length, zero, seed) in places {
            let size = fs::metadata(&file).unwrap().len();
            let mut dice = seed | 1;
            let mut roll = || {
                dice = dice.wrapping_mul(6_364_136_223_846_793_005);
                dice = dice.wrapping_add(1_442_695_040_888_963_407);
                if zero { 0 } else { (dice >> 40) as u8 }
            };
            let bytes: Vec<u8> = (0..length).map(|_| roll()).collect();
            harm(&file, (at * size as f64) as u64, &bytes);
        }
        let recovered = rebuild(dir.path());
        kept(&was, dir.path(), &recovered);
        let claims = recovered.store.claims().unwrap();
        let mut held: Vec<u64> = claims.iter().map(|claim| claim.device_id.get()).collect();
        held.sort_unstable();
        let claims = held.len();
        held.dedup();
        prop_assert_eq!(held.len(), claims);
    }
}

#[test]
fn a_backup_comes_back_and_what_was_seen_since_keeps_its_id() {
    let dir = lived(false);
    let place = tempfile::tempdir().unwrap();
    let copy = place.path().join("copy");
    let mut store = hook(dir.path()).unwrap();
    store.backup(&copy).unwrap();
    // Since then: a new device, another flavor, a claim that ended and one that began.
    let mut seen = plugged();
    seen.push((device(9, Some("NEW"), "2-1", 9), offered()));
    scan(&mut store, &seen, &boot(1)).unwrap();
    store
        .set_flavor("later", &Flavor::parse(r#"{"usb_devices":[{"id":1}]}"#).unwrap(), &boot(1))
        .unwrap();
    store.release(instance(1), Extent::Everything, "a test", &boot(1)).unwrap();
    assert!(matches!(claim(&mut store, 50, r#"{"serial":"NEW"}"#).unwrap(), Claimed::Granted(_)));
    // Another process has the file open all the time: the file is kept.
    let inode = |p: &Path| std::os::unix::fs::MetadataExt::ino(&fs::metadata(p).unwrap());
    let before = inode(&dir.path().join(FILE_NAME));
    let recovered = with(dir.path(), Some(&copy), &seen).unwrap();
    assert!(recovered.in_place);
    assert_eq!(inode(&dir.path().join(FILE_NAME)), before);
    for store in [&store, &recovered.store] {
        assert_eq!(store.flavors().unwrap().len(), 20, "those of the backup");
        assert_eq!(store.all_assignments().unwrap().len(), 5);
        let held: Vec<u64> = store.claims().unwrap().iter().map(|c| c.device_id.get()).collect();
        assert_eq!(held, [2, 3, 4, 5, 61], "those of now");
        assert_eq!(store.devices().unwrap().last().unwrap().entry.serial.as_deref(), Some("NEW"));
        assert_sound(store);
    }
    let events: Vec<String> =
        store.events(&Filter::default()).unwrap().into_iter().map(|e| e.event).collect();
    assert!(
        events.contains(&"restored".to_owned()) && events.contains(&"forced".to_owned()),
        "the audit goes on"
    );
    // What was there is whole, and can be had back.
    let aside = recovered.aside.unwrap();
    assert!(
        aside
            .file_name()
            .unwrap()
            .to_str()
            .unwrap()
            .starts_with("inventory.sqlite.before-restore-")
    );
    let back = with(dir.path(), Some(&aside), &seen).unwrap();
    assert_eq!(back.store.flavors().unwrap().len(), 21);
    assert_eq!(asides(dir.path()).len(), 2, "{:?}", asides(dir.path()));
}

#[test]
fn a_restore_keeps_devices_quarantined() {
    let dir = lived(false);
    let place = tempfile::tempdir().unwrap();
    let copy = place.path().join("copy");
    let mut store = hook(dir.path()).unwrap();
    let id = |n| virt_usb_model::DeviceId::new(n).unwrap();
    store.set_disabled(id(10), Some("before"), &boot(1)).unwrap();
    store.set_tags(id(11), &["blue".into()], &[], &boot(1)).unwrap();
    store.backup(&copy).unwrap();
    store.set_disabled(id(12), Some("since"), &boot(1)).unwrap();
    let recovered = with(dir.path(), Some(&copy), &plugged()).unwrap();
    let rebuilt = |store: &Store| {
        let of = |n| store.devices().unwrap().into_iter().find(|r| r.entry.id == id(n)).unwrap();
        assert_eq!(of(10).disabled.as_deref(), Some("before"));
        assert_eq!(
            (of(12).disabled.as_deref(), of(12).entry.status.as_str()),
            (Some("since"), "unavailable")
        );
        assert_eq!(of(11).own_tags, ["blue"]);
        assert_sound(store);
    };
    rebuilt(&recovered.store);
    drop((store, recovered));
    rebuilt(&rebuild(dir.path()).store);
}

#[test]
fn a_backup_serves_a_damaged_inventory_and_a_missing_one() {
    let healthy = lived(false);
    let place = tempfile::tempdir().unwrap();
    let copy = place.path().join("copy");
    hook(healthy.path()).unwrap().backup(&copy).unwrap();
    for what in ["header", "page", "missing"] {
        let dir = lived(false);
        let file = dir.path().join(FILE_NAME);
        match what {
            "header" => harm(&file, 0, &[0x5a; 4096]),
            "page" => {
                let root = root(dir.path(), "usb_devices_kind");
                harm(&file, root, &[0xee; 4096]);
            }
            _ => {
                for suffix in ["", "-wal", "-shm"] {
                    drop(fs::remove_file(dir.path().join(format!("{FILE_NAME}{suffix}"))));
                }
            }
        }
        let recovered = with(dir.path(), Some(&copy), &plugged()).unwrap();
        assert_eq!(recovered.in_place, what == "page", "{what}");
        assert_eq!(recovered.aside.is_some(), what != "missing", "{what}");
        assert_eq!(recovered.store.devices().unwrap().len(), 60);
        assert_sound(&recovered.store);
    }
}

#[test]
fn an_unsound_backup_changes_nothing() {
    let dir = lived(false);
    let place = tempfile::tempdir().unwrap();
    let good = place.path().join("good");
    hook(dir.path()).unwrap().backup(&good).unwrap();
    let before = fs::read(dir.path().join(FILE_NAME)).unwrap();
    let check = |file: &Path, words: &str| {
        let said = with(dir.path(), Some(file), &plugged()).unwrap_err().to_string();
        assert!(said.contains(words) && said.contains(file.to_str().unwrap()), "{words}: {said}");
        assert!(!said.contains(".new/"), "{said}");
        assert_eq!(said.lines().count(), 1, "{said}");
    };
    let changed = |name: &str, change: &dyn Fn(&Path)| {
        let file = place.path().join(name);
        fs::copy(&good, &file).unwrap();
        change(&file);
        file
    };
    check(&place.path().join("nowhere"), "No such file");
    check(&changed("empty", &|f| fs::write(f, "").unwrap()), "it is empty");
    check(&changed("text", &|f| fs::write(f, "hello").unwrap()), "is not a sound inventory");
    check(&changed("torn", &|f| harm(f, 40_000, &[0x5a; 4096])), "is not a sound inventory");
    let sql =
        |f: &Path, sql: &str| rusqlite::Connection::open(f).unwrap().execute_batch(sql).unwrap();
    check(&changed("newer", &|f| sql(f, "PRAGMA user_version = 99")), "has schema 99");
    check(
        &changed("theirs", &|f| sql(f, "PRAGMA application_id = 7")),
        "is not an inventory of virt-usb",
    );
    check(
        &changed("odd", &|f| sql(f, "UPDATE usb_devices SET port_path = 'here'")),
        "is not a sound inventory",
    );
    check(&dir.path().join(FILE_NAME), "it is the inventory itself");
    assert!(fs::read(dir.path().join(FILE_NAME)).unwrap() == before);
    assert!(asides(dir.path()).is_empty(), "{:?}", asides(dir.path()));
    assert_sound(&hook(dir.path()).unwrap());
}

#[test]
fn hooks_claim_all_the_while() {
    let dir = lived(false);
    let place = tempfile::tempdir().unwrap();
    let (done, claimed) = (AtomicBool::new(false), AtomicU32::new(0));
    /// Whatever fails, the others end.
    struct End<'a>(&'a AtomicBool);
    impl Drop for End<'_> {
        fn drop(&mut self) {
            self.0.store(true, Ordering::Relaxed);
        }
    }
    thread::scope(|scope| {
        let _end = End(&done);
        for n in 0..3 {
            let (dir, done, claimed) = (dir.path(), &done, &claimed);
            scope.spawn(move || {
                let me = 100 + n;
                while !done.load(Ordering::Relaxed) {
                    let mut store = hook(dir).unwrap();
                    assert!(takes(&mut store, me));
                    claimed.fetch_add(1, Ordering::Relaxed);
                    // Whatever replaced the file in the meantime: a granted claim exists, for the
                    // right instance.
                    let held = store.claims_of(instance(me)).unwrap();
                    assert_eq!(held.len(), 1);
                    store.release(instance(me), Extent::Run, "a test", &boot(1)).unwrap();
                }
            });
        }
        for round in 0..6 {
            let copy = place.path().join(format!("{round}"));
            hook(dir.path()).unwrap().backup(&copy).unwrap();
            let backup = (round % 2 == 0).then_some(copy.as_path());
            let recovered = with(dir.path(), backup, &plugged()).unwrap();
            assert!(recovered.in_place);
            assert_eq!(health(dir.path(), STORE_LOCK_TIMEOUT).unwrap(), Health::Sound);
            assert_eq!(recovered.store.devices().unwrap().len(), 60);
        }
    });
    assert!(claimed.load(Ordering::Relaxed) > 10);
    let store = hook(dir.path()).unwrap();
    assert_eq!(store.claims().unwrap().len(), 5);
    assert_sound(&store);
}

#[test]
fn a_connection_to_the_old_file_writes_nothing_into_the_new_one() {
    let dir = lived(false);
    let mut old = hook(dir.path()).unwrap();
    assert_eq!(old.devices().unwrap().len(), 60);
    let other = lived(false);
    hook(other.path()).unwrap().fold_wal().unwrap();
    fs::rename(other.path().join(FILE_NAME), dir.path().join(FILE_NAME)).unwrap();
    let refused = claim(&mut old, 9, ANY).unwrap_err();
    assert!(matches!(refused, StoreError::Replaced { .. }), "{refused:?}");
    assert!(refused.to_string().contains("nothing was written"), "{refused}");
    fs::remove_file(dir.path().join(FILE_NAME)).unwrap();
    assert!(matches!(claim(&mut old, 9, ANY), Err(StoreError::Replaced { .. })));
}

#[test]
fn one_at_a_time() {
    let dir = lived(false);
    let folder = fs::File::open(dir.path()).unwrap();
    folder.lock().unwrap();
    let refused = once(dir.path(), None, &plugged()).unwrap_err();
    assert!(matches!(refused, StoreError::Recovering { .. }), "{refused:?}");
}

const STATE: &str = "VIRT_USB_TEST_RECOVER";
const BACKUP: &str = "VIRT_USB_TEST_BACKUP";

/// Not a test: what is killed below.
#[test]
#[ignore = "started by the others, in another process"]
fn recover_child() {
    let Some(state) = std::env::var_os(STATE).map(PathBuf::from) else { return };
    let backup = std::env::var_os(BACKUP).map(PathBuf::from);
    println!("BEGUN");
    std::io::stdout().flush().unwrap();
    let done = with(&state, backup.as_deref(), &plugged());
    println!("DONE: {}", done.map_or_else(|e| format!("{e:?}"), |_| "fine".into()));
}

fn start(state: &Path, backup: Option<&Path>) -> std::process::Child {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command
        .args(["--exact", "recover::recover_child", "--ignored", "--nocapture"])
        .env(STATE, state);
    if let Some(backup) = backup {
        command.env(BACKUP, backup);
    }
    command
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::null())
        .spawn()
        .unwrap()
}

/// Waits until it works.
fn begun(child: &mut std::process::Child) -> std::process::ChildStdout {
    let mut out = child.stdout.take().unwrap();
    let mut said = Vec::new();
    while !String::from_utf8_lossy(&said).contains("BEGUN") {
        let mut byte = [0];
        assert_eq!(out.read(&mut byte).unwrap(), 1);
        said.push(byte[0]);
    }
    out
}

#[test]
fn killed_at_any_moment_the_old_or_the_new_is_in_place() {
    let source = lived(false);
    let place = tempfile::tempdir().unwrap();
    let copy = place.path().join("copy");
    hook(source.path()).unwrap().backup(&copy).unwrap();
    // Sound, with a page lost, without a first page: overwritten, overwritten, renamed.
    for (what, backup) in
        [("sound", Some(copy.as_path())), ("page", None), ("header", None), ("header", Some(&copy))]
    {
        let damaged = || {
            let dir = lived(true);
            let file = dir.path().join(FILE_NAME);
            match what {
                "page" => {
                    let root = root(dir.path(), "usb_devices_kind");
                    harm(&file, root, &[0xee; 4096]);
                }
                "header" => harm(&file, 0, &[0x5a; 4096]),
                _ => {}
            }
            dir
        };
        let dir = damaged();
        let mut child = start(dir.path(), backup);
        let mut out = begun(&mut child);
        let began = Instant::now();
        let mut rest = String::new();
        out.read_to_string(&mut rest).unwrap();
        child.wait().unwrap();
        assert!(rest.contains("fine"), "{rest}");
        let whole = began.elapsed();
        let rounds = 12;
        let (mut old, mut new) = (0, 0);
        for round in 0..=rounds {
            let dir = damaged();
            let was = keys(&hook(source.path()).unwrap());
            let mut child = start(dir.path(), backup);
            let _out = begun(&mut child);
            thread::sleep(whole * round / rounds + Duration::from_micros(u64::from(round) * 37));
            drop(child.kill());
            child.wait().unwrap();
            match health(dir.path(), STORE_LOCK_TIMEOUT) {
                Ok(Health::Sound) => {
                    let store = hook(dir.path()).unwrap();
                    assert_sound(&store);
                    assert!(
                        keys(&store).iter().all(|(id, key)| was.get(id).is_none_or(|k| k == key))
                    );
                    let held: Vec<u64> =
                        store.claims().unwrap().iter().map(|c| c.device_id.get()).collect();
                    assert_eq!(held, [1, 2, 3, 4, 5, 6], "{what}, round {round}");
                    let events = store.events(&Filter::default()).unwrap();
                    let done =
                        events.iter().any(|e| ["rebuilt", "restored"].contains(&e.event.as_str()));
                    *(if done { &mut new } else { &mut old }) += 1;
                }
                Ok(Health::Damaged(_)) => old += 1,
                other => panic!("{what}, round {round}: {other:?}, {:?}", names(dir.path())),
            }
            let recovered = with(dir.path(), backup, &plugged()).unwrap();
            assert_eq!(
                kept(&was, dir.path(), &recovered),
                60,
                "{what}, round {round}: {:?}",
                names(dir.path())
            );
            let held: Vec<u64> =
                recovered.store.claims().unwrap().iter().map(|c| c.device_id.get()).collect();
            assert_eq!(held, [1, 2, 3, 4, 5, 6], "{what}, round {round}: {:?}", names(dir.path()));
        }
        println!("{what}: {old} times the old, {new} times the new, {whole:?}");
        assert!(old > 0, "{what}: it was killed too late");
    }
}

#[test]
fn without_space_the_old_one_stays() {
    let root = std::os::unix::fs::MetadataExt::uid(&fs::metadata("/proc/self").unwrap()) == 0;
    let mounts = Command::new("unshare").args(["-m", "true"]).status().is_ok_and(|s| s.success());
    if !root || !mounts {
        eprintln!("no mounts of one's own: cases that need a full file system are not run");
        return;
    }
    let place = tempfile::tempdir().unwrap();
    for (what, free) in [("page", 8), ("page", 100), ("page", 300), ("header", 8), ("header", 200)]
    {
        let dir = lived(false);
        let file = dir.path().join(FILE_NAME);
        hook(dir.path()).unwrap().fold_wal().unwrap();
        if what == "page" {
            let root = self::root(dir.path(), "usb_devices_kind");
            harm(&file, root, &[0xee; 4096]);
        } else {
            harm(&file, 0, &[0x5a; 4096]);
        }
        let script = format!(
            "set -e; mount -t tmpfs -o size=2m none {place}; cp -r {state}/. {place}; \
                before=$(sha256sum < {place}/{FILE_NAME}); \
             avail=$(df -k --output=avail {place} | tail -1); fill=$((avail - {free})); \
             dd if=/dev/zero of={place}/fill bs=1024 count=$fill status=none; \"$@\"; \
             test \"$before\" = \"$(sha256sum < {place}/{FILE_NAME})\" && echo SAME; ls {place}",
            place = place.path().display(),
            state = dir.path().display(),
        );
        let output = Command::new("unshare")
            .args(["-m", "sh", "-c", &script, "sh"])
            .arg(std::env::current_exe().unwrap())
            .args(["--exact", "recover::recover_child", "--ignored", "--nocapture"])
            .env(STATE, place.path())
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stdout);
        assert!(
            said.contains("DONE: Full"),
            "{what} {free}: {said}{}",
            String::from_utf8_lossy(&output.stderr)
        );
        assert!(said.contains("SAME") && !said.contains(".new"), "{what} {free}: {said}");
    }
}
