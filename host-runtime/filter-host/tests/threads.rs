//! Many threads call the filter while the fleet changes.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

mod common;

use std::sync::atomic::{AtomicBool, Ordering};

use common::{keys, names, ours};
use virt_usb_filter_host::{Fleet, Verdict};
use virt_usb_model::{DeviceId, Status};

#[test]
fn sessions_follow_one_fleet_and_answer_for_one_moment_of_it() {
    let (filter, fleet) = (ours(), common::fleet());
    let over = AtomicBool::new(false);
    let id = DeviceId::new(1_000_002).unwrap();
    std::thread::scope(|scope| {
        for _ in 0..6 {
            let (filter, fleet, over) = (filter.clone(), fleet.clone(), &over);
            scope.spawn(move || {
                let mut session = filter.session(&fleet);
                let mut rounds = 0;
                while !over.load(Ordering::Relaxed) || rounds < 50 {
                    rounds += 1;
                    let one =
                        session.select(&keys(1), Some(&names(&["alpha", "beta"])), 5).unwrap();
                    assert_eq!(one.matched, 1, "alpha can always serve one");
                    let two = session.select(&keys(2), None, 5).unwrap();
                    assert!(two.matched <= 1 && two.placements.len() == two.matched as usize);
                    assert!(session.problems().is_empty());
                }
            });
        }
        for round in 0..2_000u64 {
            let status = if round % 2 == 0 { Status::Available } else { Status::Claimed };
            fleet.set_status("alpha", id, status);
            fleet.touch("beta", round);
            if round % 100 == 0 {
                let text = format!(
                    r#"{{"version":1,"host":"h{round}","compute_node_id":9,"revision":1,"devices":[]}}"#
                );
                fleet.put_text(&text, round).unwrap();
                fleet.remove(&format!("h{}", round.saturating_sub(500)));
            }
        }
        over.store(true, Ordering::Relaxed);
    });
    fleet.set_status("alpha", id, Status::Available);
    let mut session = filter.session(&fleet);
    assert!(matches!(session.explain(&keys(2), "alpha").unwrap(), Verdict::Accepted { .. }));
}

#[test]
fn a_session_that_is_far_behind_gets_the_whole_fleet() {
    let (filter, fleet) = (ours(), common::fleet());
    let mut session = filter.session(&fleet);
    session.statistics().unwrap();
    let id = DeviceId::new(1_000_001).unwrap();
    // More changes than the fleet keeps, including the removal of a host.
    fleet.remove("beta");
    for round in 0..70_000 {
        fleet.set_status(
            "alpha",
            id,
            if round % 2 == 0 { Status::Claimed } else { Status::Available },
        );
    }
    assert_eq!(session.statistics().unwrap().hosts, 1);
    assert_eq!(session.select(&keys(1), None, 5).unwrap().matched, 1);
    assert_eq!(fleet.len(), 1);
    assert_eq!(Fleet::new().hosts(), Vec::<String>::new());
}
