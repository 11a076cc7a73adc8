//! Fleets large enough for the chunks that count: the answers against brute force, and against the
//! same fleet grown by changes.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

mod common;

use common::{Fleet, Step, document, question};
use proptest::prelude::*;
use virt_usb_filter_core::{Inventory, Question};
use virt_usb_model::{Flavor, Status};

/// The hosts that brute force accepts, with their scores.
fn right(fleet: &Fleet, question: &Question) -> Vec<(i32, String)> {
    let score = |host: &String| fleet.judge(question, host).ok().map(|score| (score, host.clone()));
    let mut accepted: Vec<_> = fleet.hosts.keys().filter_map(score).collect();
    accepted.sort();
    accepted
}

fn agrees(inventory: &Inventory, fleet: &Fleet, question: &Question) {
    let right = right(fleet, question);
    let all = inventory.select(question, None, usize::MAX).unwrap();
    assert_eq!(all.matched as usize, right.len());
    let mut got: Vec<_> = all.placements.iter().map(|p| (p.score, p.host.clone())).collect();
    got.sort();
    assert_eq!(got, right, "{question:?}");
    for limit in [1, 2, 7, right.len() / 2] {
        let best = inventory.select(question, None, limit).unwrap().placements;
        assert_eq!(
            best,
            all.placements[..limit.min(all.placements.len())],
            "the best {limit} of {}",
            right.len()
        );
    }
    // Every third, so that few and many candidates are asked about.
    let third: Vec<&str> = fleet.hosts.keys().map(String::as_str).step_by(3).collect();
    let among = inventory.select(question, Some(&mut third.iter().copied()), usize::MAX).unwrap();
    let wanted: Vec<_> =
        all.placements.iter().filter(|p| third.contains(&p.host.as_str())).cloned().collect();
    assert_eq!(among.placements, wanted);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 25, ..ProptestConfig::default() })]

    #[test]
    fn many_hosts_are_brute_force_too(
        documents in prop::collection::vec((document(), 0u64..20), 60..200),
        changes in prop::collection::vec(
            (any::<prop::sample::Index>(), 0usize..8, any::<bool>()),
            0..200,
        ),
        gone in prop::collection::vec(any::<prop::sample::Index>(), 0..60),
        questions in prop::collection::vec(question(), 1..4),
        kind in (1u16..4, 1u16..3, 1u32..4),
    ) {
        let (mut inventory, mut fleet) = (Inventory::new(), Fleet::default());
        for (number, (mut document, at)) in documents.into_iter().enumerate() {
            document.host = format!("h{number:03}");
            inventory.load(&serde_json::to_string(&document).unwrap(), at);
            fleet.step(&Step::Put(document, at));
        }
        let names: Vec<String> = fleet.hosts.keys().cloned().collect();
        // The usual flavor, one kind and a count: the counts of the chunks decide it.
        let usual = format!(r#"[{{"vendor_id":"{:x}","product_id":"{:x}","count":{}}}]"#, kind.0, kind.1, kind.2);
        let usual = Question::new(Flavor::parse_lists(Some(&usual), None).unwrap());
        agrees(&inventory, &fleet, &usual);
        for (host, place, free) in changes {
            let status = if free { Status::Available } else { Status::Claimed };
            let step = Step::Status(host.get(&names).clone(), place, status);
            if let Some((host, place)) = fleet.target(&step) {
                let id = fleet.hosts[&host].0.devices[place].id;
                inventory.set_status(&host, id, status).unwrap();
                fleet.step(&step);
            }
        }
        for host in gone {
            let host = host.get(&names);
            prop_assert_eq!(inventory.remove(host), fleet.step(&Step::Remove(host.clone())));
        }
        agrees(&inventory, &fleet, &usual);
        for question in &questions {
            if !question.requests.is_empty() {
                agrees(&inventory, &fleet, question);
            }
        }
    }
}
