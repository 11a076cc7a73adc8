//! Compares the component with brute force, on random fleets that change.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

mod common;
#[path = "../../../filter-wasm/core/tests/common/mod.rs"]
mod oracle;

use std::sync::OnceLock;

use oracle::{Fleet as Right, Step, name, question, step};
use proptest::prelude::*;
use virt_usb_filter_core::{Draft, Inventory};
use virt_usb_filter_host::{Filter, Fleet, Verdict};

fn filter() -> &'static Filter {
    static FILTER: OnceLock<Filter> = OnceLock::new();
    FILTER.get_or_init(common::ours)
}

fn apply(fleet: &Fleet, right: &mut Right, step: &Step) {
    match step {
        Step::Put(document, at) => fleet.put(document, *at).unwrap(),
        Step::Remove(host) => assert_eq!(fleet.remove(host), right.hosts.contains_key(host)),
        Step::Touch(host, at) => assert_eq!(fleet.touch(host, *at), right.hosts.contains_key(host)),
        Step::Status(_, _, status) => {
            if let Some((host, place)) = right.target(step) {
                assert!(fleet.set_status(&host, right.hosts[&host].0.devices[place].id, *status));
            }
        }
    }
    right.step(step);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, ..ProptestConfig::default() })]

    #[test]
    fn the_component_the_engine_and_brute_force_agree_also_after_changes(
        before in prop::collection::vec(step(), 1..15),
        after in prop::collection::vec(step(), 1..15),
        questions in prop::collection::vec(question(), 1..6),
        limit in 0u32..4,
    ) {
        let (fleet, mut right) = (Fleet::new(), Right::default());
        let mut session = filter().session(&fleet);
        before.iter().for_each(|step| apply(&fleet, &mut right, step));
        session.statistics().unwrap();
        after.iter().for_each(|step| apply(&fleet, &mut right, step));
        let mut native = Inventory::new();
        for (document, at) in right.hosts.values() {
            let mut draft = Draft::default();
            draft.read(document);
            native.put(&mut draft, *at).unwrap();
        }
        for question in &questions {
            let mut fresh = filter().session(&fleet);
            let selection = session.select(question, None, limit).unwrap();
            let again = fresh.select(question, None, limit).unwrap();
            prop_assert_eq!(&selection, &again, "a new session");
            prop_assert_eq!(&selection, &native.select(question, None, limit as usize).unwrap());
            let prepared = session.prepare(question.clone()).unwrap();
            for host in (0..11).map(name) {
                let verdict = session.explain(question, &host).unwrap();
                prop_assert_eq!(&verdict, &native.explain(question, &host).unwrap());
                let now = question.moment.map_or(0, |m| m.now);
                prop_assert_eq!(&verdict, &session.check(&prepared, &host, now).unwrap());
                match (right.judge(question, &host), verdict) {
                    (Ok(score), Verdict::Accepted { score: said, devices }) => {
                        prop_assert_eq!(score, said);
                        prop_assert!(right.may_be_used(question, &host, &devices));
                    }
                    (Err((_, reason)), Verdict::Rejected(said)) => {
                        prop_assert_eq!(reason, said.reason);
                    }
                    (right, said) => {
                        prop_assert!(false, "{:?}, but brute force says {:?}", said, right);
                    }
                }
            }
        }
        prop_assert!(session.problems().is_empty());
    }
}
