//! The engine against brute force, on random fleets that change.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

mod common;

use common::{Fleet, Step, document, name, question, step};
use proptest::prelude::*;
use virt_usb_filter_core::{Draft, Inventory, Prepared, Question, Verdict};
use virt_usb_model::HostDocument;

fn apply(inventory: &mut Inventory, fleet: &mut Fleet, step: &Step) {
    match step {
        Step::Put(document, at) => {
            let loaded = inventory.load(&serde_json::to_string(document).unwrap(), *at);
            assert_eq!((loaded.hosts, loaded.refused), (1, 0), "{:?}", loaded.problems);
        }
        Step::Remove(host) => assert_eq!(inventory.remove(host), fleet.hosts.contains_key(host)),
        Step::Touch(host, at) => {
            assert_eq!(inventory.touch(host, *at), fleet.hosts.contains_key(host));
        }
        Step::Status(_, _, status) => {
            if let Some((host, place)) = fleet.target(step) {
                let id = fleet.hosts[&host].0.devices[place].id;
                inventory.set_status(&host, id, *status).unwrap();
            }
        }
    }
    fleet.step(step);
}

/// Compares the engine's verdict about every host with brute force, and the selection with the
/// accepted hosts in order.
fn agrees(inventory: &Inventory, fleet: &Fleet, question: &Question, limit: usize) {
    let mut expected = Vec::new();
    for host in (0..11).map(name) {
        let verdict = inventory.explain(question, &host).unwrap();
        match (fleet.judge(question, &host), &verdict) {
            (Ok(score), Verdict::Accepted { score: said, devices }) => {
                assert_eq!(score, *said, "{host} {question:?}");
                assert!(
                    fleet.may_be_used(question, &host, devices),
                    "{host} {question:?} {devices:?}"
                );
                if fleet.hosts.contains_key(&host) {
                    expected.push((host, score));
                }
            }
            (Err((request, reason)), Verdict::Rejected(said)) => {
                assert_eq!(reason, said.reason, "{host} {question:?}");
                assert!(
                    request.is_none() || request == said.request,
                    "{host} {question:?} {said:?}"
                );
            }
            (right, said) => {
                panic!("{host}: {said:?}, but brute force says {right:?}; {question:?}")
            }
        }
    }
    let selection = inventory.select(question, None, 1000).unwrap();
    assert_eq!(selection.matched as usize, expected.len(), "{question:?}");
    assert!(selection.placements.is_sorted_by(|a, b| a.score >= b.score));
    let mut got: Vec<_> = selection.placements.iter().map(|p| (p.host.clone(), p.score)).collect();
    got.sort();
    expected.sort();
    assert_eq!(got, expected, "{question:?}");
    let best = inventory.select(question, None, limit).unwrap();
    assert_eq!(best.matched, selection.matched);
    assert_eq!(best.placements, selection.placements[..limit.min(selection.placements.len())]);
    // Every second host, some of them unknown, one twice.
    let some: Vec<String> = (0..12).step_by(2).chain([2]).map(name).collect();
    let among =
        inventory.select(question, Some(&mut some.iter().map(String::as_str)), 1000).unwrap();
    let kept: Vec<_> =
        selection.placements.iter().filter(|p| some.contains(&p.host)).cloned().collect();
    if question.requests.is_empty() {
        assert_eq!(among.matched, 6, "who asks for nothing is refused nowhere");
    } else {
        assert_eq!(among.placements, kept);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    #[test]
    fn native_is_brute_force_also_after_changes(
        steps in prop::collection::vec(step(), 1..25),
        questions in prop::collection::vec(question(), 1..6),
        limit in 0usize..4,
    ) {
        let (mut inventory, mut fleet) = (Inventory::new(), Fleet::default());
        for step in &steps {
            apply(&mut inventory, &mut fleet, step);
        }
        let mut fresh = Inventory::new();
        for (document, at) in fleet.hosts.values() {
            let mut draft = Draft::default();
            draft.read(document);
            fresh.put(&mut draft, *at).unwrap();
        }
        for question in &questions {
            agrees(&inventory, &fleet, question, limit);
            prop_assert_eq!(
                inventory.select(question, None, 5).unwrap(),
                fresh.select(question, None, 5).unwrap(),
                "an inventory that grew by changes equals one that was loaded at once"
            );
        }
        let (a, b) = (inventory.statistics(), fresh.statistics());
        prop_assert_eq!(
            (a.hosts, a.devices, a.available, a.keys),
            (b.hosts, b.devices, b.available, b.keys)
        );
    }

    #[test]
    fn a_prepared_question_stays_right(
        first in prop::collection::vec(step(), 1..8),
        then in prop::collection::vec(step(), 1..8),
        question in question(),
    ) {
        let (mut inventory, mut fleet) = (Inventory::new(), Fleet::default());
        first.iter().for_each(|step| apply(&mut inventory, &mut fleet, step));
        let mut prepared = Prepared::new(&inventory, question.clone()).unwrap();
        for step in &then {
            apply(&mut inventory, &mut fleet, step);
            for host in (0..11).map(name) {
                let now = question.moment.map(|m| m.now);
                prop_assert_eq!(
                    inventory.check(&mut prepared, &host, now).unwrap(),
                    inventory.explain(&question, &host).unwrap()
                );
            }
        }
    }

    /// The quick reader and the model's: a document in any other spelling is the same host.
    #[test]
    fn any_spelling_of_a_document_is_the_same_host(document in document(), question in question()) {
        let quick = serde_json::to_string(&document).unwrap();
        let slow = serde_json::to_string_pretty(&document).unwrap().replace('\n', " ");
        prop_assert_eq!(&HostDocument::parse(&slow).unwrap(), &document);
        // As it is published: without what follows from the rest.
        let lean = document.published(usize::MAX).text;
        let mut a = Inventory::new();
        a.load(&quick, 1);
        for other in [slow, lean.clone(), lean.replace("\"address\":", "\"address\": ")] {
            let mut b = Inventory::new();
            prop_assert_eq!(b.load(&other, 1).hosts, 1);
            prop_assert_eq!(a.statistics(), b.statistics());
            let host = &document.host;
            prop_assert_eq!(a.explain(&question, host), b.explain(&question, host));
        }
    }
}
