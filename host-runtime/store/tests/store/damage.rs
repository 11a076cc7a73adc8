//! Everything that can be wrong with the file, provoked for real: which error, what it says, and
//! that nothing is lost.

use std::fs::{self, OpenOptions};
use std::io::{Seek, SeekFrom, Write};
use std::os::unix::fs::symlink;
use std::path::Path;
use std::time::Duration;

use tempfile::TempDir;
use virt_usb_model::Aliases;
use virt_usb_store::claim::Claimed;
use virt_usb_store::flaps::Limits;
use virt_usb_store::{Durability, FILE_NAME, SCHEMA, Store, StoreError};

use crate::common::*;

/// Opens as the hook does, and wants this error with these words in it.
macro_rules! check {
    ($result:expr, $error:pat, $($words:expr),+) => {
        match $result.map(drop) {
            Err(e @ $error) => {
                let text = e.to_string();
                $(assert!(text.contains($words), "{text:?} says {:?}", $words);)+
            }
            other => panic!("wanted {}, got {other:?}", stringify!($error)),
        }
    };
}

/// An inventory of 40 devices with one claim, in one closed file without a log.
fn closed() -> TempDir {
    let (dir, mut store) = inventory();
    plug(&mut store, 40);
    assert!(takes(&mut store, 1));
    drop(store);
    assert!(
        !dir.path().join("inventory.sqlite-wal").exists(),
        "the process that creates the file checkpoints the log"
    );
    dir
}

#[test]
fn nothing_there() {
    let dir = tempfile::tempdir().unwrap();
    check!(
        hook(&dir.path().join("no/folder")),
        StoreError::Missing { .. },
        "no/folder/inventory.sqlite",
        "virt-usb discover"
    );
    check!(
        hook(dir.path()),
        StoreError::Missing { .. },
        "there is no inventory at",
        "virt-usb discover"
    );
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0, "the hook makes nothing");
    fs::write(dir.path().join(FILE_NAME), "").unwrap();
    check!(hook(dir.path()), StoreError::Missing { .. }, "there is no inventory at");
    assert_sound(&Store::create(dir.path(), STORE_LOCK_TIMEOUT).unwrap());
    assert_sound(&hook(dir.path()).unwrap());
}

#[test]
fn a_link_in_the_file_s_place_is_not_followed_one_on_the_way_is() {
    let real = closed();
    let dir = tempfile::tempdir().unwrap();
    symlink(real.path().join(FILE_NAME), dir.path().join(FILE_NAME)).unwrap();
    check!(hook(dir.path()), StoreError::Link { .. }, "symbolic link");
    check!(Store::create(dir.path(), STORE_LOCK_TIMEOUT), StoreError::Link { .. }, "symbolic link");
    fs::remove_file(dir.path().join(FILE_NAME)).unwrap();
    symlink("/nowhere/at/all", dir.path().join(FILE_NAME)).unwrap();
    check!(hook(dir.path()), StoreError::Link { .. }, "symbolic link");
    fs::remove_file(dir.path().join(FILE_NAME)).unwrap();
    fs::create_dir(dir.path().join(FILE_NAME)).unwrap();
    check!(hook(dir.path()), StoreError::Link { .. }, "not a regular file");

    symlink(real.path(), dir.path().join("state")).unwrap();
    assert_sound(&hook(&dir.path().join("state")).unwrap());
    assert_sound(&Store::create(&dir.path().join("state"), STORE_LOCK_TIMEOUT).unwrap());
}

#[test]
fn locked() {
    let dir = closed();
    let other = raw(dir.path());
    other.execute_batch("BEGIN IMMEDIATE").unwrap();
    let mut store = Store::open(dir.path(), Duration::from_millis(30), Durability::Boot).unwrap();
    check!(
        claim(&mut store, 2, ANY),
        StoreError::Locked { waited_ms: 30, .. },
        "more than 30 ms",
        "fuser -v"
    );
    check!(claim(&mut store, 2, ANY), StoreError::Locked { .. }, "another program");
    store.restart_lock_timeout();
    check!(claim(&mut store, 2, ANY), StoreError::Locked { .. }, "another program");
    assert_eq!(store.claims().unwrap().len(), 1, "readers are not stopped");
    other.execute_batch("COMMIT").unwrap();
    assert!(
        takes(&mut store, 2),
        "a deadline that has passed stops no claim while the lock is free"
    );
}

#[test]
fn the_wait_ends_when_the_other_is_done() {
    let dir = closed();
    let other = raw(dir.path());
    other.execute_batch("BEGIN IMMEDIATE").unwrap();
    let path = dir.path().to_owned();
    // A store may move to another thread, and waits there too.
    let store = hook(&path).unwrap();
    let waiting = std::thread::spawn(move || {
        let mut store = store;
        takes(&mut store, 2)
    });
    std::thread::sleep(Duration::from_millis(30));
    other.execute_batch("COMMIT").unwrap();
    assert!(waiting.join().unwrap());
}

fn overwrite(path: &Path, from: u64, length: usize) {
    let mut file = OpenOptions::new().write(true).open(path).unwrap();
    file.seek(SeekFrom::Start(from)).unwrap();
    file.write_all(&vec![0xa5; length]).unwrap();
}

#[test]
fn damaged() {
    let advice = "virt-usb store rebuild";
    for (what, harm) in [
        ("random bytes", (|p| fs::write(p, vec![0x5a; 20_000]).unwrap()) as fn(&Path)),
        ("a few bytes", |p| fs::write(p, "hello").unwrap()),
        ("the header", |p| overwrite(p, 0, 100)),
        ("all pages but the first", |p| {
            overwrite(p, 4096, fs::metadata(p).unwrap().len() as usize - 4096);
        }),
        ("cut to one page", |p| {
            OpenOptions::new().write(true).open(p).unwrap().set_len(4096).unwrap();
        }),
    ] {
        let dir = closed();
        let path = dir.path().join(FILE_NAME);
        harm(&path);
        let bytes = fs::read(&path).unwrap();
        let tried = hook(dir.path()).and_then(|mut store| claim(&mut store, 2, ANY).map(drop));
        check!(tried, StoreError::Corrupt { .. }, "is damaged", advice);
        let created = Store::create(dir.path(), STORE_LOCK_TIMEOUT).and_then(|mut store| {
            store
                .reconcile(
                    "node-1",
                    &Limits::default(),
                    nothing(&Aliases::default()),
                    |_| vec![],
                    &boot(1),
                )
                .map(drop)
        });
        check!(created, StoreError::Corrupt { .. }, "is damaged", advice);
        let now = fs::read(&path).unwrap();
        assert!(now == bytes, "{what}: the damaged file is kept as it is");
    }
}

#[test]
fn check_finds_what_opening_does_not() {
    let dir = closed();
    let conn = raw(dir.path());
    conn.execute_batch(
        "UPDATE usb_devices SET status = 'available', instance_uuid = NULL WHERE id = 1;
         UPDATE usb_devices SET vendor_id = 'xyz' WHERE id = 2;
         PRAGMA foreign_keys = OFF;
         INSERT INTO claims (created_at, device_id, instance_uuid, domain, state, hold, boot_id, \
         revision)
         VALUES ('', 999, '00000000-0000-4000-8000-000000000009', 'vm', 'claimed', 'running', \
         'boot-1', 1)",
    )
    .unwrap();
    let findings = hook(dir.path()).unwrap().check().unwrap().join("\n");
    for words in [
        "device 1: its row says available, its claim and presence say claimed",
        "device 2: virt-usb never writes such a row",
        "table claims points to a row of usb_devices that is not there",
        "the hint for instance 00000000-0000-4000-8000-000000000009 is missing",
    ] {
        assert!(findings.contains(words), "{findings}");
    }
    let mut store = hook(dir.path()).unwrap();
    check!(
        claim(&mut store, 3, r#"{"id":2}"#),
        StoreError::Row { .. },
        "vendor_id",
        "virt-usb store check"
    );
    store.mend_hints().unwrap();
    assert!(!store.check().unwrap().join("\n").contains("hint"));
}

#[test]
fn of_another_version_or_another_program() {
    let dir = closed();
    raw(dir.path()).execute_batch("PRAGMA user_version = 99").unwrap();
    let before = fs::read(dir.path().join(FILE_NAME)).unwrap();
    check!(
        hook(dir.path()),
        StoreError::Newer { found: 99, .. },
        &format!("has schema 99, this program knows {SCHEMA}"),
        "or newer"
    );
    check!(
        Store::create(dir.path(), STORE_LOCK_TIMEOUT),
        StoreError::Newer { .. },
        "has schema 99"
    );
    assert!(fs::read(dir.path().join(FILE_NAME)).unwrap() == before);
    raw(dir.path()).execute_batch("PRAGMA user_version = 0").unwrap();
    check!(
        hook(dir.path()),
        StoreError::Older { found: 0, .. },
        &format!("has schema 0, this program needs {SCHEMA}"),
        "virt-usb discover"
    );

    for pragma in ["PRAGMA user_version = 1", "PRAGMA application_id = 7", ""] {
        let dir = tempfile::tempdir().unwrap();
        raw(dir.path()).execute_batch(&format!("CREATE TABLE theirs (a); {pragma}")).unwrap();
        let before = fs::read(dir.path().join(FILE_NAME)).unwrap();
        check!(hook(dir.path()), StoreError::Foreign { .. }, "another program's database");
        check!(
            Store::create(dir.path(), STORE_LOCK_TIMEOUT),
            StoreError::Foreign { .. },
            "another program's database"
        );
        assert!(fs::read(dir.path().join(FILE_NAME)).unwrap() == before, "left exactly as it is");
    }
}

#[test]
fn a_crash_while_it_was_made_is_made_good() {
    let (dir, store) = inventory();
    drop(store);
    fs::remove_dir_all(dir.path().join("hints")).unwrap();
    fs::create_dir(dir.path().join("hints.new")).unwrap();
    fs::write(dir.path().join("hints.new/instance-x"), "").unwrap();
    let mut store = Store::create(dir.path(), STORE_LOCK_TIMEOUT).unwrap();
    plug(&mut store, 1);
    assert!(matches!(claim(&mut store, 1, ANY).unwrap(), Claimed::Granted(_)));
    assert_sound(&store);
    assert!(
        !dir.path().join("hints.new").exists() && !dir.path().join("hints/instance-x").exists()
    );
}
