//! Many at once. What is asserted is who wins and what stays, never how long it took.

use std::fs;
use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread;

use virt_usb_store::claim::{Claimed, Why};
use virt_usb_store::hints::{HintSubject, may_know};
use virt_usb_store::release::Extent;
use virt_usb_store::{FILE_NAME, Store};

use crate::common::*;

#[test]
fn of_sixteen_claims_for_ten_devices_ten_win_and_six_learn_why() {
    let (dir, mut store) = inventory();
    plug(&mut store, 10);
    let start = Barrier::new(16);
    let outcomes: Vec<Claimed> = thread::scope(|scope| {
        let take = |n| {
            let (dir, start) = (dir.path(), &start);
            scope.spawn(move || {
                start.wait();
                claim(&mut hook(dir).unwrap(), n, ANY).unwrap()
            })
        };
        let takers: Vec<_> = (1..=16).map(take).collect();
        takers.into_iter().map(|t| t.join().unwrap()).collect()
    });
    let won = outcomes.iter().filter(|o| matches!(o, Claimed::Granted(_))).count();
    assert_eq!(won, 10);
    for outcome in outcomes {
        if let Claimed::Short(short) = outcome {
            assert_eq!((short[0].got, short[0].total, short[0].matching.len()), (0, 10, 8));
            assert!(short[0].matching.iter().all(|o| matches!(o.why, Why::HeldBy(_))));
        }
    }
    assert_eq!(store.claims().unwrap().len(), 10);
    assert_sound(&store);
}

#[test]
fn many_may_make_it_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let start = Barrier::new(8);
    thread::scope(|scope| {
        for n in 1..=8 {
            let (dir, start) = (dir.path(), &start);
            scope.spawn(move || {
                start.wait();
                let mut store = Store::create(dir, STORE_LOCK_TIMEOUT).unwrap();
                scan(&mut store, &[(device(1, Some("A"), "1-1", n), offered())], &boot(1)).unwrap();
            });
        }
    });
    let store = hook(dir.path()).unwrap();
    assert_eq!(store.devices().unwrap().len(), 1);
    assert_sound(&store);
}

#[test]
fn a_hint_survives_concurrent_removals() {
    let (dir, mut store) = inventory();
    plug(&mut store, 2);
    let (done, missed) = (AtomicBool::new(false), AtomicU32::new(0));
    thread::scope(|scope| {
        scope.spawn(|| {
            // Releases whatever the others have claimed for the same instance.
            let mut store = hook(dir.path()).unwrap();
            while !done.load(Ordering::Relaxed) {
                store.restart_lock_timeout();
                store.release(instance(1), Extent::Run, "a test", &boot(1)).unwrap();
            }
        });
        let mut store = hook(dir.path()).unwrap();
        for _ in 0..150 {
            store.restart_lock_timeout();
            assert!(takes(&mut store, 1));
            // Without the hint the claim must be gone.
            if !may_know(dir.path(), HintSubject::Instance(instance(1)))
                && !store.claims().unwrap().is_empty()
            {
                missed.fetch_add(1, Ordering::Relaxed);
            }
        }
        done.store(true, Ordering::Relaxed);
    });
    assert_eq!(missed.into_inner(), 0);
    assert_sound(&store);
}

#[test]
fn the_log_stays_small_without_an_agent() {
    let (dir, mut store) = inventory();
    plug(&mut store, 20);
    drop(store);
    let log = dir.path().join(format!("{FILE_NAME}-wal"));
    let (mut largest, mut cut) = (0, false);
    for round in 0..1000 {
        let mut store = hook(dir.path()).unwrap();
        assert!(takes(&mut store, 1));
        store.release(instance(1), Extent::Run, "a test", &boot(1)).unwrap();
        drop(store);
        let size = fs::metadata(&log).map(|m| m.len());
        let last = size.unwrap_or_else(|_| panic!("round {round}: closing has folded the log"));
        cut |= last < largest;
        largest = largest.max(last);
    }
    assert!(largest > 1 << 18, "{largest}: it grew");
    assert!(largest < 1 << 20, "{largest}");
    assert!(cut, "beyond the limit the log is truncated");
    assert_sound(&hook(dir.path()).unwrap());
    hook(dir.path()).unwrap().fold_wal().unwrap();
    assert_eq!(fs::metadata(&log).unwrap().len(), 0);
}

#[test]
fn a_backup_is_whole_while_others_write() {
    let (dir, mut store) = inventory();
    plug(&mut store, 50);
    let done = AtomicBool::new(false);
    let place = tempfile::tempdir().unwrap();
    thread::scope(|scope| {
        scope.spawn(|| {
            let mut store = hook(dir.path()).unwrap();
            while !done.load(Ordering::Relaxed) {
                for n in 1..=9 {
                    store.restart_lock_timeout();
                    assert!(takes(&mut store, n));
                }
                store.release(instance(1), Extent::Run, "a test", &boot(1)).unwrap();
            }
        });
        for n in 0..5 {
            let target = place.path().join(format!("{n}"));
            fs::create_dir(&target).unwrap();
            store.backup(&target.join(FILE_NAME)).unwrap();
            assert_eq!(fs::read_dir(&target).unwrap().count(), 1, "one file, whole by itself");
            let copy = Store::create(&target, STORE_LOCK_TIMEOUT).unwrap();
            assert_sound(&copy);
            assert_eq!(copy.devices().unwrap().len(), 50);
        }
        done.store(true, Ordering::Relaxed);
    });

    let target = place.path().join("0").join(FILE_NAME);
    let before = fs::read(&target).unwrap();
    let refused = store.backup(&target).unwrap_err().to_string();
    assert!(refused.contains("cannot write") && refused.contains("exists"), "{refused}");
    assert!(fs::read(&target).unwrap() == before);
    assert!(store.backup(&place.path().join("no/folder")).is_err());
    let left: Vec<_> =
        fs::read_dir(place.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(left.len(), 5, "{left:?}");
}
