//! Grants: devices for certain projects, in addition to the rules.

use std::collections::{BTreeMap, BTreeSet};

use virt_usb_model::{DeviceId, Grant, ProjectId};
use virt_usb_store::claim::{ClaimMode, Claimant, Claimed, Why};
use virt_usb_store::quarantine::Wished;
use virt_usb_store::renumber::Numbered;
use virt_usb_store::{Store, StoreError};

use crate::common::*;

fn grant(devices: &str, projects: &str) -> Grant {
    Grant::parse(&format!(r#"{{"usb_devices":[{devices}],"projects":[{projects}]}}"#)).unwrap()
}

fn set(store: &mut Store, name: &str, devices: &str, projects: &str) -> bool {
    store.set_grant(name, &grant(devices, projects), &boot(1)).unwrap()
}

/// Projects that each device is available to, by id.
fn whose(store: &Store) -> Vec<String> {
    let list = |projects: &[ProjectId]| {
        projects.iter().map(ProjectId::as_str).collect::<Vec<_>>().join("+")
    };
    store.devices().unwrap().iter().map(|record| list(&record.entry.projects)).collect()
}

fn revision(store: &Store) -> u64 {
    store.host_document().unwrap().unwrap().revision
}

/// Four keys: the second with a serial, the third for red by its rule, the fourth of another
/// product.
fn four(store: &mut Store) {
    let mut seen: Vec<_> =
        (1..=4).map(|n| (device(1, None, &format!("1-{n}"), n), offered())).collect();
    seen[1].0 = device(1, Some("S2"), "1-2", 2);
    seen[2].1.projects = vec!["red".parse().unwrap()];
    seen[3].0 = device(2, None, "1-4", 4);
    scan(store, &seen, &boot(1)).unwrap();
}

fn claim_for(store: &mut Store, project: &str, request: &str) -> Claimed {
    let claimant = Claimant { project: Some(project.parse().unwrap()), ..claimant(1) };
    store
        .claim(&claimant, &[want(request)], &[], ClaimMode::Replace, &mut Trusting, &boot(1))
        .unwrap()
}

#[test]
fn what_is_granted_is_for_those_and_for_those_of_its_rule() {
    let (_dir, mut store) = inventory();
    four(&mut store);
    assert_eq!(whose(&store), ["", "", "red", ""]);
    let before = revision(&store);
    assert!(set(&mut store, "keys", r#"{"vendor_id":"0529","product_id":"0001"}"#, r#""blue""#));
    assert_eq!(whose(&store), ["blue", "blue", "red+blue", ""]);
    assert_eq!(revision(&store), before + 1);
    assert!(!set(&mut store, "keys", r#"{"vendor_id":"0529","product_id":"0001"}"#, r#""blue""#));
    assert_eq!(revision(&store), before + 1, "nothing was changed");
    assert!(set(&mut store, "one", r#"{"serial":"S2"}, {"id":4}"#, r#""green","blue""#));
    assert_eq!(whose(&store), ["blue", "blue+green", "red+blue", "green+blue"]);
    // A claim heeds it, and who has a device keeps it.
    let Claimed::Short(short) = claim_for(&mut store, "red", r#"{"serial":"S2"}"#) else {
        panic!()
    };
    assert_eq!(short[0].matching[0].why, Why::Project);
    assert!(matches!(claim_for(&mut store, "green", r#"{"serial":"S2"}"#), Claimed::Granted(_)));
    assert!(store.remove_grant("one", &boot(1)).unwrap());
    assert!(!store.remove_grant("one", &boot(1)).unwrap());
    assert_eq!(whose(&store), ["blue", "blue", "red+blue", ""]);
    assert_eq!(store.claims().unwrap().len(), 1);
    let named: Vec<String> =
        store.grants().unwrap().into_iter().map(|stored| stored.name).collect();
    assert_eq!((named.as_slice(), store.grant("one").unwrap()), (&["keys".to_owned()][..], None));
    assert_eq!(store.check().unwrap(), Vec::<String>::new());
}

#[test]
fn what_changes_or_comes_later_is_given_as_it_is_then() {
    let (_dir, mut store) = inventory();
    set(&mut store, "tagged", r#"{"tags":["lab"]}"#, r#""blue""#);
    set(&mut store, "port", r#"{"port":"1-2"}"#, r#""green""#);
    plug(&mut store, 2);
    assert_eq!(whose(&store), ["", "green"]);
    let first = DeviceId::new(1).unwrap();
    assert!(matches!(
        store.set_tags(first, &["lab".into()], &[], &boot(1)).unwrap(),
        Wished::Done(_)
    ));
    assert_eq!(whose(&store), ["blue", "green"]);
    // Away while the grants change, and back.
    scan(&mut store, &[], &boot(1)).unwrap();
    store.remove_grant("port", &boot(1)).unwrap();
    plug(&mut store, 2);
    assert_eq!(whose(&store), ["blue", ""]);
    store.set_tags(first, &[], &["lab".into()], &boot(1)).unwrap();
    assert_eq!(whose(&store), ["", ""]);
}

#[test]
fn a_mirror_makes_them_all_at_once_and_leaves_what_is_unclear() {
    let (_dir, mut store) = inventory();
    four(&mut store);
    set(&mut store, "a", r#"{"id":1}"#, r#""blue""#);
    set(&mut store, "b", r#"{"id":2}"#, r#""blue""#);
    set(&mut store, "c", r#"{"id":4}"#, r#""blue""#);
    let before = revision(&store);
    let all = BTreeMap::from([
        ("a".to_owned(), grant(r#"{"id":1}"#, r#""blue""#)),
        ("d".to_owned(), grant(r#"{"id":2}"#, r#""blue""#)),
    ]);
    let unclear = BTreeSet::from(["c".to_owned()]);
    assert_eq!(store.mirror_grants(&all, &unclear, &boot(1)).unwrap(), 2);
    assert_eq!(whose(&store), ["blue", "blue", "red", "blue"]);
    assert_eq!(revision(&store), before, "no device was anybody else's in between");
    assert_eq!(store.mirror_grants(&all, &unclear, &boot(1)).unwrap(), 0);
}

#[test]
fn requests_by_id_are_listed_when_the_ids_change() {
    let (_dir, mut store) = inventory();
    four(&mut store);
    set(&mut store, "by-id", r#"{"id":2},{"id":1}"#, r#""blue""#);
    set(&mut store, "elsewhere", r#"{"id":77}"#, r#""blue""#);
    set(&mut store, "by-kind", r#"{"vendor_id":"0529","product_id":"0002"}"#, r#""blue""#);
    let Numbered::Renumbered(done) = store.renumber("node-1", 2, &boot(1)).unwrap() else {
        panic!()
    };
    assert_eq!((done.grants.as_slice(), done.flavors.len()), (&["by-id".to_owned()][..], 0));
    assert_eq!(whose(&store), ["", "", "red", "blue"]);
}

#[test]
fn a_grant_that_cannot_be_read_is_no_grant_to_everybody() {
    let (dir, mut store) = inventory();
    four(&mut store);
    set(&mut store, "keys", r#"{"vendor_id":"0529"}"#, r#""blue""#);
    raw(dir.path()).execute("UPDATE grants SET document = 'x'", []).unwrap();
    let failed = store.set_grant("more", &grant(r#"{"id":1}"#, r#""red""#), &boot(1));
    assert!(matches!(failed, Err(StoreError::Row { .. })), "{failed:?}");
    assert_eq!(whose(&store), ["blue", "blue", "red+blue", "blue"]);
}
