//! Faulty filters: each fault is reported as what it is, and neither the process nor the next call
//! is affected.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

mod common;

use common::{built, component, faulty, file, fleet, keys, made, names, ours, small};
use virt_usb_filter_host::{
    Error, Fault, Filter, Fleet, LoadError, Options, RejectionReason, Session, Verdict,
};

fn load(bytes: &[u8]) -> Result<Filter, LoadError> {
    let (_dir, path) = file(bytes);
    Filter::load(path, &Options::default())
}

fn says(bytes: &[u8], wanted: &str) {
    let error = load(bytes).map(drop).unwrap_err().to_string();
    assert!(error.contains(wanted), "{error}");
}

fn fault(answer: Result<impl std::fmt::Debug, Error>) -> Fault {
    match answer {
        Err(Error::Broken { fault, .. }) => fault,
        other => panic!("{other:?} is not a fault"),
    }
}

fn asked(session: &mut Session) -> Result<virt_usb_filter_host::Selection, Error> {
    session.select(&keys(1), Some(&names(&["alpha", "beta"])), 5)
}

#[test]
fn another_filter_can_replace_ours() {
    let (_dir, path) = file(&made("select", ""));
    let filter = Filter::load(path, &Options { limits: small(), ..Options::default() }).unwrap();
    let mut session = filter.session(&fleet());
    let selection = session.select(&keys(1), Some(&names(&["beta", "alpha"])), 1).unwrap();
    assert_eq!((selection.matched, selection.placements[0].host.as_str()), (2, "beta"));
    assert_eq!(session.statistics().unwrap().hosts, 2, "it was fed the fleet");
    let Verdict::Rejected(why) = session.explain(&keys(1), "alpha").unwrap() else {
        panic!("accepted")
    };
    assert_eq!(why.reason, RejectionReason::Other("it knows no devices".into()));
    let prepared = session.prepare(keys(1)).unwrap();
    assert!(matches!(session.check(&prepared, "alpha", 0).unwrap(), Verdict::Rejected(_)));
}

#[test]
fn a_loop_is_stopped_within_two_epochs_and_the_next_call_works() {
    // The filter loops only if the limit is 3, and answers the next question.
    let looping =
        "(if (i32.eq (local.get $limit) (i32.const 3)) (then (loop $for_ever (br $for_ever))))";
    let filter = faulty("select", looping);
    let mut session = filter.session(&fleet());
    asked(&mut session).unwrap();
    let fault = fault(session.select(&keys(1), None, 3));
    assert!(matches!(fault, Fault::Time(epoch) if epoch == small().epoch), "{fault}");
    assert_eq!(asked(&mut session).unwrap().matched, 2);
    assert_eq!(session.statistics().unwrap().hosts, 2, "the new instance was fed again");
}

#[test]
fn a_loop_during_construction_or_loading_is_stopped() {
    for mark in ["new", "load"] {
        let filter = faulty(mark, "(loop $for_ever (br $for_ever))");
        assert!(matches!(fault(asked(&mut filter.session(&fleet()))), Fault::Time(_)), "{mark}");
    }
}

#[test]
fn unlimited_allocation_is_stopped() {
    let grows = "(loop $more (drop (memory.grow (i32.const 16))) (br $more))";
    let filter = faulty("select", grows);
    let mut session = filter.session(&fleet());
    assert!(session.statistics().is_ok());
    let fault = fault(asked(&mut session));
    assert!(matches!(fault, Fault::Memory(most) if most == small().memory), "{fault}");
    assert_eq!(session.memory(), 0, "the memory of the instance was freed");
    assert!(session.statistics().is_ok());
}

#[test]
fn our_filter_is_stopped_at_its_memory_limit() {
    let options = Options {
        limits: virt_usb_filter_host::Limits { memory: 2 << 20, ..small() },
        ..Options::default()
    };
    let filter = Filter::load(built(), &options).unwrap();
    let many = Fleet::new();
    for host in 0..20_000 {
        let document = format!(
            r#"{{"version":1,"host":"{host:0250}","compute_node_id":2,"revision":1,"devices":[]}}"#
        );
        many.put_text(&document, 1).unwrap();
    }
    let error = filter.session(&many).statistics().unwrap_err().to_string();
    assert!(error.contains("more than 2097152 bytes of memory"), "{error}");
}

#[test]
fn after_a_trap_the_next_call_uses_a_new_instance() {
    let filter =
        faulty("select", "(if (i32.eq (local.get $limit) (i32.const 3)) (then (unreachable)))");
    let mut session = filter.session(&fleet());
    let prepared = session.prepare(keys(1)).unwrap();
    assert!(matches!(fault(session.select(&keys(1), None, 3)), Fault::Trap(_)));
    assert_eq!(asked(&mut session).unwrap().matched, 2);
    assert!(session.check(&prepared, "alpha", 0).is_ok(), "a prepared question outlives the fault");
}

#[test]
fn a_stack_overflow_is_a_trap() {
    let filter = faulty(
        "select",
        &format!(
            "(return (call $select {}))",
            (0..15).map(|n| format!("(local.get {n})")).collect::<String>()
        ),
    );
    assert!(matches!(fault(asked(&mut filter.session(&fleet()))), Fault::Trap(_)));
}

#[test]
fn an_invalid_answer_is_a_fault() {
    let one = |host: &str, len: u32| {
        format!(
            "(i32.store offset=8 (local.get $answer) (i32.const 1))
             (local.set $placement (call $zeroed (i32.const 12)))
             (i32.store (local.get $placement) {host}) (i32.store offset=4 (local.get $placement) \
             (i32.const {len}))
             (i32.store offset=12 (local.get $answer) (local.get $placement))
             (i32.store offset=16 (local.get $answer) (i32.const 1))
             (return (local.get $answer))"
        )
    };
    let list = |count: i64| {
        format!(
            "(i32.store offset=12 (local.get $answer) (i32.const 0))
             (i32.store offset=16 (local.get $answer) (i32.const {count})) (return (local.get \
             $answer))"
        )
    };
    let cases = [
        (
            "an unknown host",
            one("(i32.const 48)", 8),
            r#""stranger", which is not one of the candidates"#,
        ),
        (
            "invalid UTF-8",
            format!(
                "(i32.store (i32.const 64) (i32.const 0xfffefdfc)) {}",
                one("(i32.const 64)", 4)
            ),
            "utf-8",
        ),
        ("beyond its memory", one("(i32.const 0x7fffff00)", 8), "out of bounds"),
        ("a list that is too long", list(0x0fff_ffff), "out of bounds"),
        (
            "an unknown variant",
            "(i32.store8 (local.get $answer) (i32.const 9)) (return (local.get $answer))".into(),
            "discriminant",
        ),
        ("an unaligned pointer", "(return (i32.const 13))".into(), "aligned"),
        (
            "more placements than matches",
            "(local.set $count (i32.const 1)) (local.set $names (i32.const 40)) (local.set \
                $limit (i32.const 1))
            (i32.store offset=16 (local.get $answer) (i32.const 1)) (i32.store offset=12 \
            (local.get $answer) (call $zeroed (i32.const 12)))
            (return (local.get $answer))"
                .into(),
            "it names 1 hosts, but reports 0 matches",
        ),
        (
            "more matches than hosts",
            "(i32.store offset=8 (local.get $answer) (i32.const 3)) (return (local.get $answer))"
                .into(),
            "it reports 3 matches in 2 hosts",
        ),
        (
            "one host twice",
            "(i64.store offset=8 align=4 (local.get $names) (i64.load align=4 (local.get \
                $names)))"
                .into(),
            "twice",
        ),
    ];
    for (what, instructions, wanted) in cases {
        let filter = faulty("select", &instructions);
        let mut session = filter.session(&fleet());
        let fault = fault(asked(&mut session));
        assert!(matches!(fault, Fault::InvalidAnswer(_)), "{what}: {fault}");
        assert!(fault.to_string().contains(wanted), "{what}: {fault}");
        assert!(session.statistics().is_ok(), "{what}: the next call works");
    }
}

#[test]
fn placements_out_of_order_are_an_invalid_answer() {
    let falling = include_str!("first-come.wat");
    let text = falling.replace(
        "$placement) (i32.const 7))",
        "$placement) (i32.sub (i32.const 9) (local.get $count)))",
    );
    assert_ne!(text, falling);
    let (_dir, path) = file(&component(&text, "filter"));
    let filter = Filter::load(path, &Options::default()).unwrap();
    let fault = fault(asked(&mut filter.session(&fleet())));
    assert!(fault.to_string().contains("has a higher score"), "{fault}");
}

#[test]
fn a_wrong_number_of_devices_is_an_invalid_answer() {
    // The filter accepts without a device, although one was requested.
    let filter = faulty("explain", "(return (local.get $answer))");
    let fault = fault(filter.session(&fleet()).explain(&keys(1), "alpha"));
    assert!(fault.to_string().contains("it would use 0 devices, but 1 were requested"), "{fault}");
}

#[test]
fn a_wrong_load_report_is_an_invalid_answer() {
    let filter = faulty(
        "load",
        "(i32.store (local.get $report) (i32.const 77)) (return (local.get $report))",
    );
    let fault = fault(asked(&mut filter.session(&fleet())));
    assert!(fault.to_string().contains("it was fed 2 hosts, but reports 77 accepted"), "{fault}");
}

#[test]
fn a_refused_question_is_neither_a_fault_nor_a_verdict() {
    let filter = ours();
    let mut session = filter.session(&fleet());
    let mut question = keys(1);
    question.weights.spare = 101;
    let Err(Error::Refused(why)) = session.select(&question, None, 5) else {
        panic!("not refused")
    };
    assert!(why.contains("weights: found 101"), "{why}");
    question = keys(100);
    question.requests.extend(keys(100).requests);
    let Err(Error::Refused(why)) = session.explain(&question, "alpha") else {
        panic!("not refused")
    };
    assert!(why.contains("200 devices in all"), "{why}");
    assert_eq!(
        asked(&mut session).unwrap().placements[0].host,
        "alpha",
        "the instance still works"
    );
}

#[test]
fn a_refused_document_is_a_problem_of_its_host_only() {
    let (filter, fleet) = (ours(), fleet());
    fleet.put_text(r#"{"version":9,"host":"gamma"}"#, 5).unwrap();
    assert!(fleet.put_text("{", 5).is_err());
    let mut session = filter.session(&fleet);
    assert_eq!(asked(&mut session).unwrap().matched, 1);
    assert!(session.problems()["gamma"].contains("another version needs another virt-usb"));
    fleet
        .put_text(
            r#"{"version":1,"host":"gamma","compute_node_id":4,"revision":1,"devices":[]}"#,
            6,
        )
        .unwrap();
    assert!(session.statistics().is_ok_and(|s| s.hosts == 3));
    assert!(session.problems().is_empty());
}

#[test]
fn every_refused_document_is_reported_and_later_changes_apply() {
    let (filter, fleet) = (ours(), fleet());
    let mut session = filter.session(&fleet);
    assert_eq!(session.statistics().unwrap().available, 1);
    for host in 0..250 {
        fleet.put_text(&format!(r#"{{"version":9,"host":"refused-{host}"}}"#), 5).unwrap();
    }
    fleet.put_text(r#"{"version":9,"host":"alpha"}"#, 6).unwrap();
    assert_eq!(session.statistics().unwrap().hosts, 2, "alpha keeps its previous document");
    assert_eq!(session.problems().len(), 251);
    let Verdict::Accepted { devices, .. } = session.explain(&keys(1), "alpha").unwrap() else {
        panic!("alpha has a key to spare")
    };
    assert!(fleet.set_status("alpha", devices[0], virt_usb_model::Status::Claimed));
    assert_eq!(session.statistics().unwrap().available, 0);
}

#[test]
fn a_dropped_question_is_freed() {
    let mut session = ours().session(&fleet());
    let mut thousand = || {
        let prepared: Vec<_> = (0..1000).map(|_| session.prepare(keys(1)).unwrap()).collect();
        drop(prepared);
        session.statistics().unwrap();
        session.memory()
    };
    let first = thousand();
    for _ in 0..20 {
        assert_eq!(thousand(), first, "each thousand reuses the memory of the previous one");
    }
}

#[test]
fn each_invalid_file_has_its_own_message() {
    let good = made("select", "");
    says(&good[..good.len() / 2], "is not a filter");
    says(&good[..good.len() - 1], "is not a filter");
    says(b"", "it is not WebAssembly");
    says(b"#!/bin/sh", "it is not WebAssembly");
    says(&wat::parse_str("(module)").unwrap(), "it is a core module, wanted a component");
    says(
        &wat::parse_str("(component)").unwrap(),
        "not of the world virt-usb:scheduler/filter@0.1.0",
    );
    says(
        &wat::parse_str(r#"(component (import "wasi:filesystem/types@0.2.0" (instance)))"#)
            .unwrap(),
        "imports wasi:filesystem/types@0.2.0: a filter must import nothing",
    );
    let error = Filter::load("/nowhere/filter.wasm", &Options::default()).map(drop).unwrap_err();
    assert!(matches!(error, LoadError::Read { .. }), "{error}");
}

#[test]
fn relaxed_instructions_are_refused() {
    let text = include_str!("first-come.wat").replace(
        ";; @select\n",
        "(v128.store (i32.const 64) (i8x16.relaxed_swizzle (v128.load (i32.const 64)) (v128.load \
            (i32.const 64))))\n",
    );
    says(&component(&text, "filter"), "is not a filter");
}

#[test]
fn a_pinned_filter_must_have_the_digest() {
    let (_dir, path) = file(&made("select", ""));
    let right = Filter::load(&path, &Options::default()).unwrap().sha256();
    assert!(right.is_some());
    assert!(Filter::load(&path, &Options { sha256: right, ..Options::default() }).is_ok());
    let wrong = Options { sha256: Some([7; 32]), ..Options::default() };
    let error = Filter::load(&path, &wrong).map(drop).unwrap_err().to_string();
    assert!(error.contains("is not the pinned one: its SHA-256 is"), "{error}");
    assert!(error.ends_with(&format!("wanted {}", "07".repeat(32))), "{error}");
}

#[test]
fn a_precompiled_filter_is_the_same_filter_and_must_be_trustworthy() {
    use std::os::unix::fs::PermissionsExt;
    let machine_code = ours().precompile().unwrap();
    let (dir, path) = file(&machine_code);
    let filter = Filter::load(&path, &Options::default()).unwrap();
    assert_eq!(asked(&mut filter.session(&fleet())).unwrap().placements[0].host, "alpha");
    // Truncated, or from another version.
    for bytes in [&machine_code[..machine_code.len() / 2], &machine_code[..100]] {
        std::fs::write(&path, bytes).unwrap();
        let error = Filter::load(&path, &Options::default()).map(drop).unwrap_err();
        assert!(matches!(error, LoadError::Foreign { .. } | LoadError::Invalid { .. }), "{error}");
    }
    std::fs::write(&path, &machine_code).unwrap();
    std::fs::set_permissions(&path, PermissionsExt::from_mode(0o666)).unwrap();
    let error = Filter::load(&path, &Options::default()).map(drop).unwrap_err().to_string();
    assert!(error.contains("can be written to by others (mode 666)"), "{error}");
    assert_eq!(filter.sha256(), None, "it was mapped, not read");
    let pinned = |sha256: [u8; 32]| {
        Filter::load(&path, &Options { sha256: Some(sha256), ..Options::default() })
    };
    assert!(
        pinned(virt_usb_filter_host::sha256(&machine_code)).is_ok(),
        "a pinned file may be in any directory"
    );
    assert!(matches!(pinned([7; 32]).map(drop), Err(LoadError::Digest { .. })));
    std::fs::set_permissions(&path, PermissionsExt::from_mode(0o644)).unwrap();
    std::fs::set_permissions(dir.path(), PermissionsExt::from_mode(0o777)).unwrap();
    assert!(matches!(
        Filter::load(&path, &Options::default()).map(drop),
        Err(LoadError::Untrusted { .. })
    ));
}
