//! Single stories: what is kept, what is told, what is written down.

use std::path::Path;

use virt_usb_model::{BusAddress, DeviceId, Reason};
use virt_usb_store::adopt::{Adoption, Holding, Stage};
use virt_usb_store::claim::{Claimed, Granted, Judge, Standing, Verified, Want, Why};
use virt_usb_store::discover::Change;
use virt_usb_store::events::Filter;
use virt_usb_store::flaps::Limits;
use virt_usb_store::give_back::{Extent, Witness};
use virt_usb_store::hints::{Known, may_know};
use virt_usb_store::{Context, Record, Source, Store};

use crate::common::*;

fn id(n: u64) -> DeviceId {
    DeviceId::new(n).unwrap()
}

fn at(boot_number: u32, uptime: f64) -> Context {
    Context { uptime, ..boot(boot_number) }
}

/// Claims any one device, for the instance or for its run.
fn claim_as(store: &mut Store, n: u32, lasting: bool, standing: Standing, context: &Context) -> Claimed {
    let wants = [Want::new(request(ANY), lasting)];
    store.claim(&asker(n), &wants, &[], standing, &mut Trusting, context).unwrap()
}

fn metadata(dir: &Path, n: u32) -> Option<String> {
    let sql = "SELECT value FROM instance_system_metadata WHERE instance_uuid = ?1 AND key = 'usb_devices' AND deleted = 0";
    raw(dir).query_row(sql, [instance(n).to_string()], |row| row.get(0)).ok()
}

#[test]
fn what_is_held_for_the_instance_outlives_the_boot_as_a_claim() {
    let (_dir, mut store) = inventory();
    plug(&mut store, 2);
    claim_as(&mut store, 1, true, Standing::Firm, &at(1, 10.0));
    claim_as(&mut store, 2, false, Standing::Firm, &at(1, 10.0));
    store.confirm(instance(1), &[id(1)], Witness::Look, &at(1, 20.0)).unwrap();
    store.confirm(instance(2), &[id(2)], Witness::Look, &at(1, 20.0)).unwrap();
    // The first to come after the boot, whoever it is.
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
    // A claim of an earlier boot that nobody has swept is not revived by a confirmation.
    claim_as(&mut store, 3, false, Standing::Firm, &at(2, 10.0));
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
        claim_as(&mut store, 1, lasting, Standing::Pending, &at(1, 100.0));
        assert!(store.claims().unwrap()[0].pending);
        claim_as(&mut store, 9, false, Standing::Firm, &at(1, 220.0));
        assert_eq!(store.claims().unwrap().len(), 2, "120 s are not over");
        claim_as(&mut store, 9, false, Standing::Firm, &at(1, 220.1));
        let claims = store.claims().unwrap();
        assert_eq!((claims.len(), claims[0].instance_uuid), (1, instance(9)));
        store.release(instance(9), Extent::Run, "", &at(1, 221.0)).unwrap();
        // Never confirmed, and given back: gone.
        claim_as(&mut store, 1, lasting, Standing::Pending, &at(1, 300.0));
        assert_eq!(store.release(instance(1), Extent::Run, "", &at(1, 301.0)).unwrap(), [id(1)]);
        // Held before: still held when nobody confirms.
        claim_as(&mut store, 1, lasting, Standing::Firm, &at(1, 400.0));
        claim_as(&mut store, 1, lasting, Standing::Pending, &at(1, 400.0));
        assert!(!store.claims().unwrap()[0].pending);
        claim_as(&mut store, 9, false, Standing::Firm, &at(1, 900.0));
        assert_eq!(store.claims().unwrap().len(), 2);
        for n in [1, 9] {
            store.release(instance(n), Extent::Everything, "", &at(1, 901.0)).unwrap();
        }
    }
    // Late, but in time for a confirmation: nobody took it meanwhile.
    claim_as(&mut store, 1, false, Standing::Pending, &at(1, 1000.0));
    assert_eq!(store.confirm(instance(1), &[], Witness::Start, &at(1, 2000.0)).unwrap(), [id(1)]);
    claim_as(&mut store, 9, false, Standing::Firm, &at(1, 3000.0));
    assert_eq!(store.claims().unwrap().len(), 2);
}

#[test]
fn a_forced_release_ends_the_intent_too_and_is_written_down() {
    let (dir, mut store) = inventory();
    plug(&mut store, 2);
    store.assign(&asker(1), Source::Operator, &[request(ANY)], &boot(1)).unwrap();
    claim_as(&mut store, 1, true, Standing::Firm, &boot(1));
    assert_eq!(store.release(instance(1), Extent::Run, "shutdown", &boot(1)).unwrap(), []);
    assert_eq!(store.release(instance(2), Extent::Everything, "nothing held", &boot(1)).unwrap(), []);
    assert!(
        may_know(dir.path(), Known::Instance(instance(1)))
            && may_know(dir.path(), Known::Assigned(instance(1)))
    );
    assert_eq!(store.release(instance(1), Extent::Everything, "host is lost", &boot(1)).unwrap(), [id(1)]);
    assert_eq!(store.assignments(instance(1)).unwrap(), []);
    assert!(
        !may_know(dir.path(), Known::Instance(instance(1)))
            && !may_know(dir.path(), Known::Assigned(instance(1)))
    );
    let events = store.events(&Filter { instance: Some(instance(1)), ..Filter::default() }).unwrap();
    let told: Vec<_> =
        events.iter().map(|e| (e.event.as_str(), e.detail.as_deref().unwrap_or_default())).collect();
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
    claim_as(&mut store, 1, true, Standing::Firm, &boot(1));
    std::fs::remove_file(dir.path().join(format!("hints/instance-{}", instance(1)))).unwrap();
    assert_eq!(store.release(instance(1), Extent::Everything, "", &boot(1)).unwrap(), [id(1)]);
}

#[test]
fn the_metadata_says_what_the_instance_has() {
    let (dir, mut store) = inventory();
    let key = device(1, Some("A1"), "1-4", 7);
    scan(&mut store, &[(key, offered()), (device(2, None, "1-2", 9), offered())], &boot(1)).unwrap();
    let wants = [Want::new(request(r#"{"vendor_id":"0529","count":2}"#), false)];
    store.claim(&asker(1), &wants, &[], Standing::Firm, &mut Trusting, &boot(1)).unwrap();
    let first = r#"{"id":1,"vendor_id":"0529","product_id":"0001","serial":"A1","address":"usb_1_7"}"#;
    let second = r#"{"id":2,"vendor_id":"0529","product_id":"0002","address":"usb_1_9"}"#;
    assert_eq!(metadata(dir.path(), 1).unwrap(), format!("[{first},{second}]"));
    // A smaller flavor, and a replug.
    store
        .claim(&asker(1), &[want(r#"{"serial":"A1"}"#)], &[], Standing::Firm, &mut Trusting, &boot(1))
        .unwrap();
    assert_eq!(metadata(dir.path(), 1).unwrap(), format!("[{first}]"));
    let moved = device(1, Some("A1"), "1-4", 8);
    scan(&mut store, &[(moved, offered())], &boot(1)).unwrap();
    assert_eq!(metadata(dir.path(), 1).unwrap(), format!("[{}]", first.replace("usb_1_7", "usb_1_8")));
    store.release(instance(1), Extent::Run, "shutdown", &boot(1)).unwrap();
    assert_eq!(metadata(dir.path(), 1), None);
    let kept = "SELECT count(*) FROM instance_system_metadata WHERE deleted = id AND deleted_at IS NOT NULL";
    assert_eq!(raw(dir.path()).query_row(kept, [], |row| row.get::<_, i64>(0)).unwrap(), 1, "soft delete");
}

#[test]
fn what_was_adopted_stays_beside_what_is_asked_for() {
    let (_dir, mut store) = inventory();
    plug(&mut store, 3);
    let holding = Holding { address: BusAddress::new(1, 2), ..Holding::default() };
    let adopt = |store: &mut Store| {
        store
            .adopt(&asker(1), std::slice::from_ref(&holding), Stage::Starting, &mut Trusting, &boot(1))
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
    assert_eq!(store.release(instance(1), Extent::Run, "shutdown", &boot(1)).unwrap(), [id(2), id(3)]);
}

/// Sees the devices of `here` under other numbers than the inventory, and nothing else.
struct Sees {
    here: Vec<(DeviceId, BusAddress)>,
    asked: usize,
}

impl Judge for Sees {
    fn verify(&mut self, candidate: &Record) -> Verified {
        self.asked += 1;
        match self.here.iter().find(|(id, _)| *id == candidate.entry.id) {
            Some((_, address)) => Verified::Here(*address),
            None => Verified::Not("port 1-1 is empty".into()),
        }
    }
    fn fits(&mut self, chosen: &[Granted]) -> Result<(), String> {
        if chosen.len() > 2 { Err("the guest has 2 ports".into()) } else { Ok(()) }
    }
}

#[test]
fn the_port_is_asked_not_the_memory() {
    let (dir, mut store) = inventory();
    plug(&mut store, 4);
    let address = BusAddress::new(1, 99).unwrap();
    let mut judge = Sees { here: vec![(id(3), address)], asked: 0 };
    let one = [want(ANY)];
    let two = [want(r#"{"vendor_id":"0529","count":2}"#)];
    let mut try_claim =
        |wants: &[Want]| store.claim(&asker(1), wants, &[], Standing::Firm, &mut judge, &boot(1)).unwrap();
    let Claimed::Short(short) = try_claim(&two) else { panic!() };
    assert_eq!((short[0].number, short[0].got, short[0].total), (0, 1, 4));
    let others: Vec<_> = short[0].matching.iter().map(|o| (o.device.entry.id, o.why.clone())).collect();
    let empty = Why::NotThere("port 1-1 is empty".into());
    assert_eq!(others, [1, 2, 4].map(|n| (id(n), empty.clone())), "what it got is no obstacle");
    let Claimed::Granted(granted) = try_claim(&one) else { panic!() };
    assert_eq!((granted[0].device.entry.id, granted[0].device.entry.address), (id(3), address));
    assert!(metadata(dir.path(), 1).unwrap().contains("usb_1_99"));
    assert_eq!(store.devices().unwrap()[2].entry.device_id, 99);
    assert!(judge.asked >= 5);
    judge.here = (1..=4).map(|n| (id(n), BusAddress::new(1, u8::try_from(n).unwrap()).unwrap())).collect();
    let many = [want(r#"{"vendor_id":"0529","count":3}"#)];
    let unfit = store.claim(&asker(2), &many, &[], Standing::Firm, &mut judge, &boot(1)).unwrap();
    assert_eq!(unfit, Claimed::Unfit("the guest has 2 ports".into()));
    assert_eq!(store.claims().unwrap().len(), 1);
    let refused = store.events(&Filter::default()).unwrap();
    assert_eq!(refused.iter().filter(|e| e.event == "refused").count(), 2);
}

#[test]
fn each_obstacle_is_named() {
    let (_dir, mut store) = inventory();
    let mut seen: Vec<_> = (1..=4).map(|n| (device(1, None, &format!("1-{n}"), n), offered())).collect();
    seen[1].1.withheld = Some(Reason::HostUse);
    seen[2].1.projects = vec!["red".parse().unwrap()];
    scan(&mut store, &seen, &boot(1)).unwrap();
    claim(&mut store, 1, r#"{"id":1}"#).unwrap();
    let wants = [want(r#"{"id":4}"#), want(r#"{"vendor_id":"0529","count":2}"#)];
    let outcome = store.claim(&asker(2), &wants, &[], Standing::Firm, &mut Trusting, &boot(1)).unwrap();
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
    let gone =
        store.reconcile("node-1", &Limits::default(), |_| vec![Change::Gone(id(1))], &boot(1)).unwrap();
    assert_eq!(gone, [], "gone already");
    let events: Vec<_> = store.events(&Filter::default()).unwrap().into_iter().map(|e| e.event).collect();
    assert_eq!(events, ["added", "removed"]);
    assert_eq!(store.host_document().unwrap().unwrap().revision, revision + 1);
}

#[test]
fn the_audit_is_only_added_to() {
    let (dir, mut store) = inventory();
    plug(&mut store, 1);
    let conn = raw(dir.path());
    let changed = conn.execute("UPDATE events SET actor = 'nobody'", []).unwrap_err().to_string();
    assert!(changed.contains("append-only"), "{changed}");
    let deleted = conn.execute("DELETE FROM events", []).unwrap_err().to_string();
    assert!(deleted.contains("kept for a day"), "{deleted}");
    for days in [2, 29, 31, 400] {
        let sql = "INSERT INTO events (at, event, actor) VALUES (strftime('%Y-%m-%dT%H:%M:%fZ', 'now', ?1), ?2, 'x')";
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
