//! Single stories: state that is kept, messages, and records.

use std::path::Path;

use virt_usb_model::{Aliases, BusAddress, DeviceId, DevicePath, PortPath, UnavailableReason};
use virt_usb_store::adopt::{Adoption, Holding, Stage};
use virt_usb_store::claim::{
    ClaimMode, ClaimRequest, ClaimVerifier, Claimed, Granted, Verified, Why,
};
use virt_usb_store::events::Filter;
use virt_usb_store::flaps::Limits;
use virt_usb_store::hints::{HintSubject, may_know};
use virt_usb_store::reconcile::Change;
use virt_usb_store::release::{Extent, Witness};
use virt_usb_store::{Context, Location, Record, Source, Store};

use crate::common::*;

fn id(n: u64) -> DeviceId {
    DeviceId::new(n).unwrap()
}

fn at(boot_number: u32, uptime: f64) -> Context {
    Context { uptime, ..boot(boot_number) }
}

/// Claims any one device, for the instance or for its run.
fn claim_as(
    store: &mut Store,
    n: u32,
    lasting: bool,
    standing: ClaimMode,
    context: &Context,
) -> Claimed {
    let wants = [ClaimRequest::new(request(ANY), lasting)];
    store.claim(&claimant(n), &wants, &[], standing, &mut Trusting, context).unwrap()
}

fn metadata(dir: &Path, n: u32) -> Option<String> {
    let sql = "SELECT value FROM instance_system_metadata WHERE instance_uuid = ?1 AND key = \
        'usb_devices' AND deleted = 0";
    raw(dir).query_row(sql, [instance(n).to_string()], |row| row.get(0)).ok()
}

#[test]
fn what_is_held_for_the_instance_outlives_the_boot_as_a_claim() {
    let (_dir, mut store) = inventory();
    plug(&mut store, 2);
    claim_as(&mut store, 1, true, ClaimMode::Replace, &at(1, 10.0));
    claim_as(&mut store, 2, false, ClaimMode::Replace, &at(1, 10.0));
    store.confirm(instance(1), &[id(1)], Witness::Look, &at(1, 20.0)).unwrap();
    store.confirm(instance(2), &[id(2)], Witness::Look, &at(1, 20.0)).unwrap();
    // The first writer after the boot sweeps.
    scan(
        &mut store,
        &[(device(1, None, "1-1", 5), offered()), (device(1, None, "1-2", 6), offered())],
        &at(2, 9.0),
    )
    .unwrap();
    let claims = store.claims().unwrap();
    assert_eq!(claims.len(), 1);
    assert_eq!((claims[0].state.as_str(), claims[0].boot_id.as_str()), ("claimed", "boot-2"));
    assert_eq!(claims[0].instance_uuid, instance(1));
    // A confirmation does not revive a claim of an earlier boot, even before a sweep.
    claim_as(&mut store, 3, false, ClaimMode::Replace, &at(2, 10.0));
    assert_eq!(store.confirm(instance(3), &[id(2)], Witness::Look, &at(3, 5.0)).unwrap(), []);
    assert_eq!(store.claims().unwrap()[1].boot_id, "boot-2");
    assert_sound(&store);
}

#[test]
fn a_restore_that_fails_costs_nothing_that_was_held_before() {
    let (_dir, mut store) = inventory();
    plug(&mut store, 3);
    for lasting in [true, false] {
        // New, and never confirmed: gone, held for the instance or not.
        claim_as(&mut store, 1, lasting, ClaimMode::Provisional, &at(1, 100.0));
        assert!(store.claims().unwrap()[0].pending);
        claim_as(&mut store, 9, false, ClaimMode::Replace, &at(1, 220.0));
        assert_eq!(store.claims().unwrap().len(), 2, "120 s are not over");
        claim_as(&mut store, 9, false, ClaimMode::Replace, &at(1, 220.1));
        let claims = store.claims().unwrap();
        assert_eq!((claims.len(), claims[0].instance_uuid), (1, instance(9)));
        store.release(instance(9), Extent::Run, "", &at(1, 221.0)).unwrap();
        // Never confirmed, and given back: gone.
        claim_as(&mut store, 1, lasting, ClaimMode::Provisional, &at(1, 300.0));
        assert_eq!(store.release(instance(1), Extent::Run, "", &at(1, 301.0)).unwrap(), [id(1)]);
        // The claim existed before: it stays without a confirmation.
        claim_as(&mut store, 1, lasting, ClaimMode::Replace, &at(1, 400.0));
        claim_as(&mut store, 1, lasting, ClaimMode::Provisional, &at(1, 400.0));
        assert!(!store.claims().unwrap()[0].pending);
        claim_as(&mut store, 9, false, ClaimMode::Replace, &at(1, 900.0));
        assert_eq!(store.claims().unwrap().len(), 2);
        for n in [1, 9] {
            store.release(instance(n), Extent::Everything, "", &at(1, 901.0)).unwrap();
        }
    }
    // Late, but in time for a confirmation: no other instance took the device.
    claim_as(&mut store, 1, false, ClaimMode::Provisional, &at(1, 1000.0));
    assert_eq!(store.confirm(instance(1), &[], Witness::Start, &at(1, 2000.0)).unwrap(), [id(1)]);
    claim_as(&mut store, 9, false, ClaimMode::Replace, &at(1, 3000.0));
    assert_eq!(store.claims().unwrap().len(), 2);
}

#[test]
fn a_forced_release_ends_the_intent_too_and_is_written_down() {
    let (dir, mut store) = inventory();
    plug(&mut store, 2);
    store.assign(&claimant(1), Source::Operator, &[request(ANY)], &boot(1)).unwrap();
    claim_as(&mut store, 1, true, ClaimMode::Replace, &boot(1));
    assert_eq!(store.release(instance(1), Extent::Run, "shutdown", &boot(1)).unwrap(), []);
    assert_eq!(
        store.release(instance(2), Extent::Everything, "nothing held", &boot(1)).unwrap(),
        []
    );
    assert!(
        may_know(dir.path(), HintSubject::Instance(instance(1)))
            && may_know(dir.path(), HintSubject::Assigned(instance(1)))
    );
    assert_eq!(
        store.release(instance(1), Extent::Everything, "host is lost", &boot(1)).unwrap(),
        [id(1)]
    );
    assert_eq!(store.assignments(instance(1)).unwrap(), []);
    assert!(
        !may_know(dir.path(), HintSubject::Instance(instance(1)))
            && !may_know(dir.path(), HintSubject::Assigned(instance(1)))
    );
    let events =
        store.events(&Filter { instance: Some(instance(1)), ..Filter::default() }).unwrap();
    let told: Vec<_> = events
        .iter()
        .map(|e| (e.event.as_str(), e.detail.as_deref().unwrap_or_default()))
        .collect();
    assert_eq!(
        told,
        [
            ("assigned", "operator: [{\"vendor_id\":\"0529\"}]"),
            ("claimed", "usb_devices[0]"),
            ("forced", "host is lost"),
            ("unassigned", "1 request(s): host is lost")
        ]
    );
    // Hints that were lost do not make an operator's word void.
    claim_as(&mut store, 1, true, ClaimMode::Replace, &boot(1));
    std::fs::remove_file(dir.path().join(format!("hints/instance-{}", instance(1)))).unwrap();
    assert_eq!(store.release(instance(1), Extent::Everything, "", &boot(1)).unwrap(), [id(1)]);
}

#[test]
fn the_metadata_says_what_the_instance_has() {
    let (dir, mut store) = inventory();
    let key = device(1, Some("A1"), "1-4", 7);
    scan(&mut store, &[(key, offered()), (device(2, None, "1-2", 9), offered())], &boot(1))
        .unwrap();
    let wants = [ClaimRequest::new(request(r#"{"vendor_id":"0529","count":2}"#), false)];
    store.claim(&claimant(1), &wants, &[], ClaimMode::Replace, &mut Trusting, &boot(1)).unwrap();
    let first =
        r#"{"id":1,"vendor_id":"0529","product_id":"0001","serial":"A1","address":"usb_1_7"}"#;
    let second = r#"{"id":2,"vendor_id":"0529","product_id":"0002","address":"usb_1_9"}"#;
    assert_eq!(metadata(dir.path(), 1).unwrap(), format!("[{first},{second}]"));
    // A smaller flavor, and a replug.
    store
        .claim(
            &claimant(1),
            &[want(r#"{"serial":"A1"}"#)],
            &[],
            ClaimMode::Replace,
            &mut Trusting,
            &boot(1),
        )
        .unwrap();
    assert_eq!(metadata(dir.path(), 1).unwrap(), format!("[{first}]"));
    let moved = device(1, Some("A1"), "1-4", 8);
    scan(&mut store, &[(moved, offered())], &boot(1)).unwrap();
    assert_eq!(
        metadata(dir.path(), 1).unwrap(),
        format!("[{}]", first.replace("usb_1_7", "usb_1_8"))
    );
    store.release(instance(1), Extent::Run, "shutdown", &boot(1)).unwrap();
    assert_eq!(metadata(dir.path(), 1), None);
    let kept = "SELECT count(*) FROM instance_system_metadata WHERE deleted = id AND deleted_at IS \
        NOT NULL";
    assert_eq!(
        raw(dir.path()).query_row(kept, [], |row| row.get::<_, i64>(0)).unwrap(),
        1,
        "soft delete"
    );
}

#[test]
fn what_was_adopted_stays_beside_what_is_asked_for() {
    let (_dir, mut store) = inventory();
    plug(&mut store, 3);
    let holding = Holding { address: BusAddress::new(1, 2), ..Holding::default() };
    let adopt = |store: &mut Store| {
        store
            .adopt(
                &claimant(1),
                std::slice::from_ref(&holding),
                Stage::Starting,
                &mut Trusting,
                &boot(1),
            )
            .unwrap()
    };
    assert_eq!(adopt(&mut store), [Adoption::New(id(2))]);
    claim(&mut store, 1, r#"{"id":3}"#).unwrap();
    let (claims, revision) = (store.claims().unwrap(), store.hosts().unwrap()[0].revision);
    assert_eq!(
        claims.iter().map(|c| (c.device_id, c.request)).collect::<Vec<_>>(),
        [(id(2), None), (id(3), Some(0))]
    );
    // All of it again, as after a crash of the hook: nothing to write.
    assert_eq!(adopt(&mut store), [Adoption::AlreadyYours(id(2))]);
    claim(&mut store, 1, r#"{"id":3}"#).unwrap();
    assert_eq!((store.claims().unwrap(), store.hosts().unwrap()[0].revision), (claims, revision));
    assert_eq!(
        store.release(instance(1), Extent::Run, "shutdown", &boot(1)).unwrap(),
        [id(2), id(3)]
    );
}

/// Sees the devices of `here` under other numbers than the inventory, and nothing else.
struct Sees {
    here: Vec<(DeviceId, Location)>,
    asked: usize,
}

impl ClaimVerifier for Sees {
    fn verify(&mut self, candidate: &Record) -> Verified {
        self.asked += 1;
        match self.here.iter().find(|(id, _)| *id == candidate.entry.id) {
            Some((_, seen)) => Verified::Here(seen.clone()),
            None => Verified::Not("port 1-1 is empty".into()),
        }
    }
    fn fits(&mut self, chosen: &[Granted]) -> Result<(), String> {
        if chosen.len() > 2 { Err("the guest has 2 ports".into()) } else { Ok(()) }
    }
}

fn seen_at(port: &str, number: u8) -> Location {
    let port: PortPath = port.parse().unwrap();
    Location { address: BusAddress::new(port.bus(), number).unwrap(), port }
}

#[test]
fn a_claim_and_an_adoption_record_the_port_and_the_address_that_were_seen() {
    let (dir, mut store) = inventory();
    // At the USB 3 hub of the socket; later at its USB 2 hub, where the socket has another number.
    let key = |n: u8| device(1, None, &format!("2-{n}"), n);
    let mut seen = [(key(2), offered()), (key(3), offered())];
    for (n, (device, _)) in seen.iter_mut().enumerate() {
        device.key.path = DevicePath::new("pci-0000:00:14.0", 2, &[u8::try_from(n).unwrap() + 4]);
    }
    scan(&mut store, &seen, &boot(1)).unwrap();
    let mut verifier =
        Sees { here: vec![(id(1), seen_at("1-4", 7)), (id(2), seen_at("1-5", 8))], asked: 0 };
    let wants = [want(r#"{"id":1}"#)];
    let claimed = store
        .claim(&claimant(1), &wants, &[], ClaimMode::Replace, &mut verifier, &boot(1))
        .unwrap();
    let Claimed::Granted(granted) = claimed else { panic!("{claimed:?}") };
    assert_eq!(granted[0].device.location(), seen_at("1-4", 7));
    let holding =
        Holding { address: BusAddress::new(1, 8), usb: Some(key(3).key.usb), ..Holding::default() };
    let adopted =
        store.adopt(&claimant(2), &[holding], Stage::Starting, &mut verifier, &boot(1)).unwrap();
    assert_eq!(adopted, [Adoption::New(id(2))]);
    let holding = Holding { port: Some("1-4".parse().unwrap()), ..Holding::default() };
    let adopted =
        store.adopt(&claimant(1), &[holding], Stage::Starting, &mut verifier, &boot(1)).unwrap();
    assert_eq!(
        adopted,
        [Adoption::AlreadyYours(id(1))],
        "by the port where it is, not where it was"
    );
    let rows = store.devices().unwrap();
    assert_eq!(
        rows.iter().map(Record::location).collect::<Vec<_>>(),
        [seen_at("1-4", 7), seen_at("1-5", 8)]
    );
    let ports =
        "SELECT group_concat(port_path || ' ' || bus_id || ' ' || port_id) FROM usb_devices";
    let ports: String = raw(dir.path()).query_row(ports, [], |row| row.get(0)).unwrap();
    assert_eq!(ports, "1-4 1 4,1-5 1 5");
}

#[test]
fn the_port_is_asked_not_the_memory() {
    let (dir, mut store) = inventory();
    plug(&mut store, 4);
    let seen = seen_at("1-3", 99);
    let address = seen.address;
    let mut verifier = Sees { here: vec![(id(3), seen)], asked: 0 };
    let one = [want(ANY)];
    let two = [want(r#"{"vendor_id":"0529","count":2}"#)];
    let mut try_claim = |wants: &[ClaimRequest]| {
        store.claim(&claimant(1), wants, &[], ClaimMode::Replace, &mut verifier, &boot(1)).unwrap()
    };
    let Claimed::Short(short) = try_claim(&two) else { panic!() };
    assert_eq!((short[0].number, short[0].got, short[0].total), (0, 1, 4));
    let others: Vec<_> =
        short[0].matching.iter().map(|o| (o.device.entry.id, o.why.clone())).collect();
    let empty = Why::NotThere("port 1-1 is empty".into());
    assert_eq!(others, [1, 2, 4].map(|n| (id(n), empty.clone())), "what it got is no obstacle");
    let Claimed::Granted(granted) = try_claim(&one) else { panic!() };
    assert_eq!((granted[0].device.entry.id, granted[0].device.entry.address), (id(3), address));
    assert!(metadata(dir.path(), 1).unwrap().contains("usb_1_99"));
    assert_eq!(store.devices().unwrap()[2].entry.device_id, 99);
    assert!(verifier.asked >= 5);
    verifier.here = (1..=4).map(|n| (id(u64::from(n)), seen_at(&format!("1-{n}"), n))).collect();
    let many = [want(r#"{"vendor_id":"0529","count":3}"#)];
    let unfit =
        store.claim(&claimant(2), &many, &[], ClaimMode::Replace, &mut verifier, &boot(1)).unwrap();
    assert_eq!(unfit, Claimed::Unfit("the guest has 2 ports".into()));
    assert_eq!(store.claims().unwrap().len(), 1);
    let refused = store.events(&Filter::default()).unwrap();
    assert_eq!(refused.iter().filter(|e| e.event == "refused").count(), 2);
}

#[test]
fn each_obstacle_is_named() {
    let (_dir, mut store) = inventory();
    let mut seen: Vec<_> =
        (1..=4).map(|n| (device(1, None, &format!("1-{n}"), n), offered())).collect();
    seen[1].1.withheld = Some(UnavailableReason::HostUse);
    seen[2].1.projects = vec!["red".parse().unwrap()];
    scan(&mut store, &seen, &boot(1)).unwrap();
    claim(&mut store, 1, r#"{"id":1}"#).unwrap();
    let wants = [want(r#"{"id":4}"#), want(r#"{"vendor_id":"0529","count":2}"#)];
    let outcome = store
        .claim(&claimant(2), &wants, &[], ClaimMode::Replace, &mut Trusting, &boot(1))
        .unwrap();
    let Claimed::Short(short) = outcome else { panic!("{outcome:?}") };
    assert_eq!((short.len(), short[0].number, short[0].got, short[0].total), (1, 1, 0, 4));
    let mut why: Vec<_> = short[0].matching.iter().collect();
    why.sort_by_key(|o| o.device.entry.id);
    assert!(matches!(&why[0].why, Why::HeldBy(claim) if claim.domain == "vm-1"));
    assert_eq!(
        [&why[1].why, &why[2].why, &why[3].why],
        [&Why::Unavailable, &Why::Project, &Why::OtherRequest]
    );
}

#[test]
fn looking_again_without_news_is_no_change() {
    let (_dir, mut store) = inventory();
    let seen = [(device(1, None, "1-1", 3), offered())];
    scan(&mut store, &seen, &boot(1)).unwrap();
    let revision = store.hosts().unwrap()[0].revision;
    assert_eq!(scan(&mut store, &seen, &boot(1)).unwrap(), []);
    assert_eq!(store.hosts().unwrap()[0].revision, revision);
    scan(&mut store, &[], &boot(1)).unwrap();
    let gone = store
        .reconcile(
            "node-1",
            &Limits::default(),
            nothing(&Aliases::default()),
            |_| vec![Change::Gone(id(1))],
            &boot(1),
        )
        .unwrap();
    assert_eq!(gone, [], "gone already");
    let events: Vec<_> =
        store.events(&Filter::default()).unwrap().into_iter().map(|e| e.event).collect();
    assert_eq!(events, ["added", "removed"]);
    assert_eq!(store.host_document().unwrap().unwrap().revision, revision + 1);
}

#[test]
fn the_audit_is_only_added_to() {
    let (dir, mut store) = inventory();
    plug(&mut store, 1);
    let conn = raw(dir.path());
    let changed = conn.execute("UPDATE events SET actor = 'other'", []).unwrap_err().to_string();
    assert!(changed.contains("append-only"), "{changed}");
    let deleted = conn.execute("DELETE FROM events", []).unwrap_err().to_string();
    assert!(deleted.contains("kept for a day"), "{deleted}");
    for days in [2, 29, 31, 400] {
        let sql = "INSERT INTO events (at, event, actor) VALUES (strftime('%Y-%m-%dT%H:%M:%fZ', \
            'now', ?1), ?2, 'x')";
        conn.execute(sql, [format!("-{days} days"), format!("{days}")]).unwrap();
    }
    let left = |store: &Store| -> Vec<String> {
        store.events(&Filter::default()).unwrap().into_iter().map(|e| e.event).collect()
    };
    assert_eq!(store.prune_events(30).unwrap(), 2);
    assert_eq!(left(&store), ["added", "2", "29"]);
    assert_eq!(store.prune_events(0).unwrap(), 2, "a day is kept whatever is asked");
    assert_eq!(left(&store), ["added"]);
    let newest = Filter { limit: 1, device: Some(id(1)), ..Filter::default() };
    assert_eq!(store.events(&newest).unwrap().len(), 1);
}

/// Whether each claim of the instance records that its device was in the guest.
fn seen(store: &Store, n: u32) -> Vec<bool> {
    store.claims_of(instance(n)).unwrap().iter().map(|c| c.seen_in_guest).collect()
}

#[test]
fn a_claim_knows_whether_its_device_was_in_the_guest_during_this_run() {
    let (dir, mut store) = inventory();
    plug(&mut store, 1);
    let here = at(1, 10.0);
    claim_as(&mut store, 1, true, ClaimMode::Replace, &here);
    assert_eq!(seen(&store, 1), [false]);
    store.confirm(instance(1), &[id(1)], Witness::Look, &here).unwrap();
    forget_the_audit(dir.path());
    assert_eq!(seen(&store, 1), [true]);
    store.confirm(instance(1), &[], Witness::Look, &here).unwrap();
    assert_eq!(seen(&store, 1), [true], "unplugged: it was there");
    store.out_of_guest(instance(1), &here).unwrap();
    assert_eq!(seen(&store, 1), [false], "the guest has ended");
    for end in [Extent::Run, Extent::Everything] {
        store.confirm(instance(1), &[id(1)], Witness::Look, &here).unwrap();
        store.release(instance(1), end, "a test", &here).unwrap();
        assert_eq!(seen(&store, 1), [false].repeat(usize::from(end == Extent::Run)));
    }
    claim_as(&mut store, 1, true, ClaimMode::Replace, &here);
    store.confirm(instance(1), &[id(1)], Witness::Look, &here).unwrap();
    store.sweep(&at(2, 5.0)).unwrap();
    assert_eq!(seen(&store, 1), [false], "no guest outlives a boot");
    store.release(instance(1), Extent::Everything, "a test", &at(2, 6.0)).unwrap();
    // By hand: in the XML of a guest that starts it is not in the guest yet.
    let usb = Some(virt_usb_model::UsbId::new(0x0529, 1));
    let holding = [Holding { usb, ..Holding::default() }];
    for (stage, was) in [(Stage::Starting, false), (Stage::Running, true), (Stage::Starting, false)]
    {
        store.adopt(&claimant(2), &holding, stage, &mut Trusting, &at(2, 7.0)).unwrap();
        assert_eq!(seen(&store, 2), [was], "{stage:?}");
    }
    store.release(instance(2), Extent::Run, "a test", &at(2, 8.0)).unwrap();
    store.adopt(&claimant(2), &holding, Stage::Running, &mut Trusting, &at(2, 9.0)).unwrap();
    assert_eq!(seen(&store, 2), [true]);
}

#[test]
fn a_migration_learns_from_the_audit_what_was_in_a_guest() {
    let (dir, mut store) = inventory();
    plug(&mut store, 4);
    for n in 1..=4 {
        claim_as(&mut store, n, true, ClaimMode::Replace, &at(1, 10.0));
    }
    store.confirm(instance(1), &[id(1)], Witness::Look, &at(1, 20.0)).unwrap();
    store.confirm(instance(2), &[id(2)], Witness::Look, &at(1, 20.0)).unwrap();
    store.confirm(instance(2), &[], Witness::Look, &at(1, 30.0)).unwrap();
    drop(store);
    let old = raw(dir.path());
    // An event of a claim before this one.
    let sql = "INSERT INTO events (at, event, instance_uuid, device_id, actor) VALUES \
        ('2020-01-01T00:00:00.000Z', 'allocated', ?1, 3, 'x')";
    old.execute(sql, [instance(3).to_string()]).unwrap();
    old.execute_batch(
        "DROP INDEX usb_devices_gone_serial; DROP INDEX usb_devices_gone_kind;
         ALTER TABLE claims DROP COLUMN seen_in_guest; ALTER TABLE claims DROP COLUMN by_hand;
         ALTER TABLE claims DROP COLUMN incoming_since; ALTER TABLE claims DROP COLUMN unsure;
         ALTER TABLE claims DROP COLUMN generation; ALTER TABLE usb_devices DROP COLUMN \
         generation; ALTER TABLE usb_devices DROP COLUMN was_held; ALTER TABLE compute_nodes DROP \
         COLUMN audit_time;
         ALTER TABLE compute_nodes DROP COLUMN scanned_uptime; ALTER TABLE compute_nodes DROP \
         COLUMN whitelist;
         ALTER TABLE compute_nodes DROP COLUMN scanned_boot; ALTER TABLE compute_nodes DROP COLUMN \
         libvirt; ALTER TABLE compute_nodes DROP COLUMN simulated; PRAGMA user_version = 7",
    )
    .unwrap();
    drop(old);
    let store = Store::create(dir.path(), STORE_LOCK_TIMEOUT).unwrap();
    let seen: Vec<bool> = store.claims().unwrap().iter().map(|c| c.seen_in_guest).collect();
    assert_eq!(seen, [true, true, false, false]);
    assert_sound(&store);
}

/// Moves the past: events seem to be `days` days old, as after a clock change.
fn leap(dir: &Path, days: u32) {
    let moved = |column: &str| format!("strftime('%Y-%m-%dT%H:%M:%fZ', {column}, '-{days} days')");
    raw(dir)
        .execute_batch(&format!(
            "DROP TRIGGER IF EXISTS events_are_not_changed; UPDATE events SET at = {}; UPDATE \
                compute_nodes SET audit_time = {}",
            moved("at"),
            moved("audit_time")
        ))
        .unwrap();
}

/// By how many days the time of the audit is behind the clock, to an hour.
fn behind(dir: &Path) -> f64 {
    let sql = "SELECT julianday('now') - julianday(audit_time) FROM compute_nodes";
    (raw(dir).query_row(sql, [], |row| row.get::<_, f64>(0)).unwrap() * 24.0).round() / 24.0
}

#[test]
fn a_clock_that_leaps_does_not_erase_the_audit() {
    let (dir, mut store) = inventory();
    let see = |store: &mut Store, context: &Context| {
        drop(scan(store, &[(device(1, None, "1-1", 1), offered())], context).unwrap());
    };
    see(&mut store, &at(1, 1000.0));
    let count = |store: &Store| store.events(&Filter::default()).unwrap().len();
    let all = count(&store);
    // The clock says that ten years have passed.
    leap(dir.path(), 3650);
    for _ in 0..3 {
        see(&mut store, &at(1, 1000.0));
        assert_eq!((store.prune_events(1).unwrap(), count(&store)), (0, all), "however often");
    }
    see(&mut store, &at(1, 1000.0 + 3600.0));
    assert!((behind(dir.path()) - 3650.0 + 7.0 / 24.0).abs() < 0.05, "an hour moves it by seven");
    assert_eq!(store.prune_events(1).unwrap(), 0);
    // A boot: no more has passed than since then.
    see(&mut store, &at(2, 600.0));
    assert!(behind(dir.path()) > 3649.0);
    // New events come, dated by the wrong clock; and the clock is put right.
    claim_as(&mut store, 1, false, ClaimMode::Replace, &at(2, 700.0));
    raw(dir.path())
        .execute_batch(
            "UPDATE events SET at = strftime('%Y-%m-%dT%H:%M:%fZ', at, '+3650 days');
             UPDATE compute_nodes SET audit_time = strftime('%Y-%m-%dT%H:%M:%fZ', audit_time, \
             '+3650 days')",
        )
        .unwrap();
    see(&mut store, &at(2, 800.0));
    assert!(
        (-0.5..0.1).contains(&behind(dir.path())),
        "it is ahead by hours, and the clock counts"
    );
    assert_eq!(store.prune_events(1).unwrap(), 0);
    // Set back by years: nothing is old.
    let sql = "UPDATE compute_nodes SET audit_time = '2999-01-01T00:00:00.000Z'";
    raw(dir.path()).execute(sql, []).unwrap();
    see(&mut store, &at(2, 900.0));
    assert_eq!(store.prune_events(1).unwrap(), 0, "what is older is older than now");
    assert_eq!(count(&store), all + 1);
}

#[test]
fn a_host_that_was_off_prunes_again_after_a_while() {
    let (dir, mut store) = inventory();
    let seen = [(device(1, None, "1-1", 1), offered())];
    scan(&mut store, &seen, &at(1, 1000.0)).unwrap();
    leap(dir.path(), 70);
    let mut uptime = 100.0;
    let mut days = 0;
    while store.prune_events(30).unwrap() == 0 {
        uptime += 24.0 * 3600.0;
        days += 1;
        scan(&mut store, &seen, &at(2, uptime)).unwrap();
        assert!(days < 20);
    }
    assert_eq!(days, 5, "after five days it has caught up with 30 of 70");
}

#[test]
fn much_is_pruned_bit_by_bit() {
    let (dir, mut store) = inventory();
    plug(&mut store, 1);
    let sql = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 25000)
               INSERT INTO events (at, event, actor) SELECT '2020-01-01T00:00:00.000Z', 'added', \
               'x' FROM n";
    raw(dir.path()).execute(sql, []).unwrap();
    assert_eq!(store.prune_events(30).unwrap(), 25_000);
    assert_eq!(store.events(&Filter::default()).unwrap().len(), 1);
}

/// Believes the inventory, and counts what it is asked.
#[derive(Default)]
struct Counting {
    verified: usize,
    away: Vec<DeviceId>,
}

impl ClaimVerifier for Counting {
    fn verify(&mut self, candidate: &Record) -> Verified {
        self.verified += 1;
        match self.away.contains(&candidate.entry.id) {
            true => Verified::Not("it is unplugged".into()),
            false => Verified::Here(candidate.location()),
        }
    }
    fn fits(&mut self, _: &[Granted]) -> Result<(), String> {
        Ok(())
    }
}

/// Adds `count` devices of one kind, on as many buses as they need.
fn crowd(store: &mut Store, count: u16) {
    let place = |n: u16| (u8::try_from(n / 100 + 1).unwrap(), u8::try_from(n % 100 + 1).unwrap());
    let seen: Vec<_> = (0..count)
        .map(|n| {
            let (bus, number) = place(n);
            (device(1, None, &format!("{bus}-{number}"), number), offered())
        })
        .collect();
    scan(store, &seen, &boot(1)).unwrap();
}

#[test]
fn each_device_is_looked_at_once_however_many_hostdevs_there_are() {
    let (_dir, mut store) = inventory();
    crowd(&mut store, 1000);
    let kind = Holding { usb: Some(virt_usb_model::UsbId::new(0x0529, 1)), ..Holding::default() };
    let by_address = |n: u8| Holding { address: BusAddress::new(3, n), ..kind.clone() };
    let mut verifier = Counting::default();
    let mut holdings = vec![kind.clone(); 100];
    holdings.extend((1..=100).map(by_address));
    holdings.extend((1..=100).map(|n| Holding { usb: None, ..by_address(n) }));
    let adopted =
        store.adopt(&claimant(1), &holdings, Stage::Starting, &mut verifier, &boot(1)).unwrap();
    assert!(
        adopted[..100].iter().all(|a| *a == Adoption::Unknown),
        "it is unknown which of the thousand is meant"
    );
    assert!(adopted[100..200].iter().all(|a| matches!(a, Adoption::New(_))));
    assert!(adopted[200..].iter().all(|a| matches!(a, Adoption::AlreadyYours(_))));
    assert!(verifier.verified <= 1000, "{} looks", verifier.verified);
    // Hostdevs beyond a guest's capacity are not checked.
    let many = vec![by_address(1); virt_usb_store::adopt::MAX_HOLDINGS + 1];
    let adopted =
        store.adopt(&claimant(1), &many, Stage::Starting, &mut Trusting, &boot(1)).unwrap();
    let known = adopted.iter().filter(|a| **a != Adoption::Unknown).count();
    assert_eq!((known, adopted.len()), (many.len() - 1, many.len()));
}

#[test]
fn devices_that_are_not_there_are_passed_over_one_by_one() {
    let (_dir, mut store) = inventory();
    crowd(&mut store, 400);
    let mut verifier = Counting { verified: 0, away: (1..=200).map(|n| id(2 * n)).collect() };
    let wants = vec![want(ANY); 127];
    let claimed = store
        .claim(&claimant(1), &wants, &[], ClaimMode::Replace, &mut verifier, &boot(1))
        .unwrap();
    let Claimed::Granted(granted) = claimed else { panic!("{claimed:?}") };
    assert!(granted.iter().all(|g| g.device.entry.id.get() % 2 == 1));
    assert_eq!(granted.len(), 127);
    assert!(verifier.verified <= 400, "{}", verifier.verified);
}
