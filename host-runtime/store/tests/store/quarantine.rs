//! Devices that are set aside whatever the rules say, and what an operator says of them.

use virt_usb_model::{Descriptors, Device, DeviceId, Flavor, RuleVerdict};
use virt_usb_store::adopt::{Adoption, Holding, Stage};
use virt_usb_store::claim::Claimed;
use virt_usb_store::events::Filter;
use virt_usb_store::flaps::Limits;
use virt_usb_store::forget::Forgotten;
use virt_usb_store::quarantine::Wished;
use virt_usb_store::reconcile::Done;
use virt_usb_store::release::{Extent, Witness};
use virt_usb_store::{Record, Store};

use crate::common::*;

const KEY: DeviceId = match DeviceId::new(1) {
    Some(id) => id,
    None => panic!(),
};

fn record(store: &Store) -> Record {
    store.all_devices().unwrap().remove(0)
}

fn status(store: &Store) -> String {
    record(store).entry.state().unwrap().to_string()
}

fn told(store: &Store) -> Vec<String> {
    store.events(&Filter::default()).unwrap().into_iter().map(|e| e.event).collect()
}

/// One interface: mass storage, or a keyboard beside it.
fn descriptors(keys: bool) -> Descriptors {
    let mut bytes = vec![18, 1, 0, 2, 0, 0, 0, 64, 0x29, 5, 1, 0, 0, 1, 1, 2, 3, 1];
    bytes.extend([9, 2, 32, 0, 1, 1, 0, 0x80, 50, 9, 4, 0, 0, 2, 8, 6, 0x50, 0]);
    if keys {
        bytes.extend([9, 4, 1, 0, 1, 3, 1, 1, 0]);
    }
    Descriptors::new(bytes).unwrap()
}

/// The one device, at this number, and what the rules say of it.
fn seen(number: u8, keys: bool, once: bool) -> Vec<(Device, RuleVerdict)> {
    let device =
        Device { descriptors: Some(descriptors(keys)), ..device(1, Some("A"), "1-1", number) };
    vec![(device, RuleVerdict { one_time_use: once, ..offered() })]
}

fn claimed(store: &mut Store, n: u32, json: &str) -> Result<(), Claimed> {
    match claim(store, n, json).unwrap() {
        Claimed::Granted(_) => Ok(()),
        other => Err(other),
    }
}

fn used(store: &mut Store) {
    claimed(store, 1, ANY).unwrap();
    store.confirm(instance(1), &[KEY], Witness::Look, &boot(1)).unwrap();
}

fn given_back(store: &mut Store) {
    store.release(instance(1), Extent::Run, "ended", &boot(1)).unwrap();
}

#[test]
fn a_disabled_device_stays_with_its_instance_and_goes_to_no_other() {
    let (_dir, mut store) = inventory();
    plug(&mut store, 1);
    used(&mut store);
    assert!(matches!(store.set_disabled(KEY, Some("broken"), &boot(1)).unwrap(), Wished::Done(_)));
    assert!(matches!(
        store.set_disabled(KEY, Some("broken"), &boot(1)).unwrap(),
        Wished::Already(_)
    ));
    assert_eq!(status(&store), "allocated");
    given_back(&mut store);
    assert_eq!(status(&store), "unavailable (disabled)");
    assert!(claimed(&mut store, 2, ANY).is_err());
    // Neither a scan nor a replug changes what an operator has said.
    scan(&mut store, &[], &boot(1)).unwrap();
    plug(&mut store, 1);
    assert_eq!(status(&store), "unavailable (disabled)");
    assert_sound(&store);
    assert!(matches!(store.set_disabled(KEY, None, &boot(1)).unwrap(), Wished::Done(_)));
    assert_eq!(status(&store), "available");
    assert!(matches!(
        store.set_disabled(DeviceId::new(9).unwrap(), None, &boot(1)).unwrap(),
        Wished::Unknown
    ));
    claimed(&mut store, 2, ANY).unwrap();
}

#[test]
fn a_device_of_one_use_waits_for_an_operator_after_it() {
    let (_dir, mut store) = inventory();
    scan(&mut store, &seen(2, false, true), &boot(1)).unwrap();
    // Claimed and never in the guest: it was not used.
    claimed(&mut store, 1, ANY).unwrap();
    given_back(&mut store);
    assert_eq!(status(&store), "available");
    used(&mut store);
    // The guest has stopped, libvirt has not let go yet.
    store.out_of_guest(instance(1), &boot(1)).unwrap();
    given_back(&mut store);
    assert_eq!(status(&store), "unavailable (quarantined)");
    assert_eq!(record(&store).quarantined.unwrap(), format!("vm-1 ({}) has used it", instance(1)));
    assert_sound(&store);
    assert!(matches!(store.clear_quarantine(KEY, &boot(1)).unwrap(), Wished::Done(_)));
    assert!(matches!(store.clear_quarantine(KEY, &boot(1)).unwrap(), Wished::Already(_)));
    assert_eq!(status(&store), "available");
    // The agent was about to attach the device when it died: it may have been used.
    claimed(&mut store, 1, ANY).unwrap();
    let claim = store.claims().unwrap().remove(0);
    store.mark_used(&claim).unwrap();
    given_back(&mut store);
    assert_eq!(status(&store), "unavailable (quarantined)");
}

#[test]
fn no_rule_that_changes_while_it_is_held_makes_a_device_fresh() {
    let (_dir, mut store) = inventory();
    scan(&mut store, &seen(2, false, true), &boot(1)).unwrap();
    used(&mut store);
    // The device shows another kind, is in another port, or the rule was removed: no rule matches.
    scan(&mut store, &seen(2, false, false), &boot(1)).unwrap();
    given_back(&mut store);
    assert_eq!(status(&store), "unavailable (quarantined)");
    store.clear_quarantine(KEY, &boot(1)).unwrap();
    scan(&mut store, &seen(2, false, false), &boot(1)).unwrap();
    used(&mut store);
    given_back(&mut store);
    assert_eq!(status(&store), "available", "once it is free the rules count");
}

#[test]
fn no_guest_starts_with_a_quarantined_device_even_from_its_own_xml() {
    let (_dir, mut store) = inventory();
    scan(&mut store, &seen(2, false, true), &boot(1)).unwrap();
    let address = virt_usb_model::BusAddress::new(1, 2);
    let by_hand = [Holding {
        usb: Some(virt_usb_model::UsbId::new(0x0529, 1)),
        address,
        ..Holding::default()
    }];
    let adopt = |store: &mut Store, stage| {
        store.adopt(&claimant(7), &by_hand, stage, &mut Trusting, &boot(1)).unwrap().remove(0)
    };
    store.set_disabled(KEY, Some("no"), &boot(1)).unwrap();
    assert!(matches!(adopt(&mut store, Stage::Starting), Adoption::SetAside(_)));
    assert_eq!(store.claims().unwrap(), []);
    assert!(matches!(adopt(&mut store, Stage::Running), Adoption::New(_)), "it is in that guest");
    assert!(matches!(adopt(&mut store, Stage::Starting), Adoption::AlreadyYours(_)));
    assert_sound(&store);
}

#[test]
fn a_loose_plug_covers_no_alarm() {
    let (_dir, mut store) = inventory();
    scan(&mut store, &seen(2, false, true), &boot(1)).unwrap();
    used(&mut store);
    given_back(&mut store);
    let limits = Limits { limit: 1, window: 600, pause: 1, quarantine: 1 };
    for number in 3..60 {
        let mut one = seen(number, true, true);
        let mut bytes = one[0].0.descriptors.as_ref().unwrap().bytes().to_vec();
        bytes[13] = number;
        one[0].0.descriptors = Descriptors::new(bytes);
        scan_within(&mut store, &one, &limits, &boot(1)).unwrap();
    }
    let why = record(&store).quarantined.unwrap();
    let parts = [
        "has used it",
        "IT HAS CHANGED: interfaces 08/06/50 before, 08/06/50 03/01/01 now",
        "check its plug",
    ];
    assert!(parts.iter().all(|part| why.contains(part)) && why.len() < 700, "{why}");
}

#[test]
fn a_device_that_has_changed_is_reported() {
    let difference = "interfaces 08/06/50 before, 08/06/50 03/01/01 now";
    let altered = |done: &[Done]| done.iter().find_map(|d| d.altered.clone()).unwrap_or_default();
    for once in [false, true] {
        let (_dir, mut store) = inventory();
        scan(&mut store, &seen(2, false, once), &boot(1)).unwrap();
        used(&mut store);
        // While the guest has it.
        let done = scan(&mut store, &seen(3, true, once), &boot(1)).unwrap();
        assert_eq!(altered(&done), format!("it has changed since vm-1 claimed it: {difference}"));
        assert_eq!(scan(&mut store, &seen(3, true, once), &boot(1)).unwrap(), [], "told once");
        given_back(&mut store);
        match once {
            false => assert_eq!(status(&store), "available"),
            true => {
                let why = record(&store).quarantined.unwrap();
                assert!(why.ends_with(&format!("AND IT HAS CHANGED: {difference}")), "{why}");
            }
        }
        assert_eq!(told(&store).iter().filter(|e| *e == "altered").count(), 1);
    }
    // It waits until it is free.
    let (_dir, mut store) = inventory();
    scan(&mut store, &seen(2, false, true), &boot(1)).unwrap();
    used(&mut store);
    given_back(&mut store);
    let done = scan(&mut store, &seen(3, true, true), &boot(1)).unwrap();
    assert_eq!(altered(&done), format!("it has changed since its last use: {difference}"));
    assert!(record(&store).quarantined.unwrap().contains(difference));
    assert_sound(&store);
}

#[test]
fn what_comes_and_goes_too_often_is_offered_again_once_it_has_stayed() {
    let (_dir, mut store) = inventory();
    let limits = Limits { limit: 3, window: 600, pause: 1, quarantine: 1 };
    let mut number = 1;
    let mut replug = |store: &mut Store| {
        number += 1;
        scan_within(store, &seen(number, false, false), &limits, &boot(1)).unwrap();
    };
    replug(&mut store);
    for _ in 0..2 {
        replug(&mut store);
        assert_eq!(status(&store), "available");
    }
    replug(&mut store);
    assert_eq!(status(&store), "unavailable (flapping)");
    assert!(claimed(&mut store, 1, ANY).is_err());
    assert_sound(&store);
    while status(&store) != "available" {
        scan_within(&mut store, &seen(4, false, false), &limits, &boot(1)).unwrap();
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
    for _ in 0..3 {
        replug(&mut store);
    }
    assert_eq!(status(&store), "unavailable (quarantined)");
    let why = "it reconnected 3 times within 600 s, as it did 2 times in a day: check its plug, \
               cable and hub";
    assert_eq!(record(&store).quarantined.unwrap(), why);
    store.clear_quarantine(KEY, &boot(1)).unwrap();
    assert_eq!(status(&store), "available");
    let expected = ["flapping", "steady", "quarantined", "cleared"];
    let told: Vec<String> =
        told(&store).into_iter().filter(|e| expected.contains(&e.as_str())).collect();
    assert_eq!(told, expected);
}

#[test]
fn an_operators_tags_stand_beside_those_of_the_rules() {
    let (_dir, mut store) = inventory();
    plug(&mut store, 1);
    store.set_tags(KEY, &["blue".into(), "erp".into()], &[], &boot(1)).unwrap();
    assert_eq!(record(&store).entry.tags, ["erp", "blue"]);
    plug(&mut store, 1);
    scan(&mut store, &[(device(1, None, "1-1", 7), offered())], &boot(1)).unwrap();
    assert_eq!(record(&store).entry.tags, ["erp", "blue"], "whatever is scanned");
    claimed(&mut store, 1, r#"{"tags":["blue","erp"]}"#).unwrap();
    given_back(&mut store);
    store.set_tags(KEY, &[], &["blue".into(), "erp".into()], &boot(1)).unwrap();
    assert_eq!(record(&store).entry.tags, ["erp"]);
    assert!(claimed(&mut store, 1, r#"{"tags":["blue"]}"#).is_err());
    claimed(&mut store, 1, r#"{"tags":["erp"]}"#).unwrap();
    assert_sound(&store);
}

#[test]
fn devices_that_are_gone_for_good_are_forgotten() {
    let (dir, mut store) = inventory();
    let keys: Vec<_> = (1..=6)
        .map(|n| (device(n, Some(&format!("S{n}")), &format!("1-{n}"), 10), offered()))
        .collect();
    scan(&mut store, &keys, &boot(1)).unwrap();
    let id = |n| DeviceId::new(n).unwrap();
    claim(&mut store, 1, r#"{"id":1}"#).unwrap();
    store.release(instance(1), Extent::Gone, "over", &boot(1)).unwrap();
    store.set_disabled(id(2), Some("no"), &boot(1)).unwrap();
    store
        .set_flavor("erp", &Flavor::parse(r#"{"usb_devices":[{"id":3}]}"#).unwrap(), &boot(1))
        .unwrap();
    // It is still there.
    assert!(matches!(store.forget(id(4), &boot(1)).unwrap(), Forgotten::Here(_)));
    scan(&mut store, &keys[5..], &boot(1)).unwrap();
    assert_eq!(store.forget_old(30, &boot(1)).unwrap(), 0, "none has been unplugged for long");
    raw(dir.path())
        .execute_batch(
            "UPDATE usb_devices SET deleted_at = '2020-01-01T00:00:00.000Z' WHERE deleted <> 0",
        )
        .unwrap();
    assert_eq!(store.forget_old(30, &boot(1)).unwrap(), 2);
    let left = |store: &Store| -> Vec<u64> {
        store.all_devices().unwrap().iter().map(|r| r.entry.id.get()).collect()
    };
    assert_eq!(left(&store), [1, 2, 3, 6], "held once, disabled, named by a flavor, plugged in");
    let Forgotten::Named(_, what) = store.forget(id(3), &boot(1)).unwrap() else { panic!() };
    assert_eq!(what, "the flavor erp");
    for known in [1, 2] {
        assert!(matches!(store.forget(id(known), &boot(1)).unwrap(), Forgotten::Done(_)));
    }
    assert_eq!(store.forget(id(1), &boot(1)).unwrap(), Forgotten::Unknown);
    assert_eq!(left(&store), [3, 6]);
    // Back again it is another one.
    scan(&mut store, &[keys[0].clone(), keys[5].clone()], &boot(1)).unwrap();
    assert_eq!(left(&store), [3, 6, 7]);
    assert_sound(&store);
}

#[test]
fn a_device_with_another_serial_at_each_plug_does_not_fill_the_inventory() {
    let (_dir, mut store) = inventory();
    for n in 0..100 {
        scan(&mut store, &[(device(1, Some(&format!("R{n}")), "1-1", 10), offered())], &boot(1))
            .unwrap();
    }
    assert_eq!(store.all_devices().unwrap().len(), 100);
    assert_eq!(store.forget_old(90, &boot(1)).unwrap(), 67);
    let kept = store.all_devices().unwrap();
    assert_eq!(
        (kept.len(), kept[0].entry.id.get()),
        (33, 68),
        "the newest, and the one that is there"
    );
}
