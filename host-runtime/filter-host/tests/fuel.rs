//! The amount of computation of the filter for five fixed questions, in wasmtime's fuel. The count
//! does not depend on the machine or its load, so a review shows changes that make the filter
//! slower.
//!
//! `fuel.txt` has a line for each toolchain. After an intended change, run
//! `BLESS=1 tests/suite/run fuel`, and review the difference.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

mod common;
#[path = "../../src/filter/fleet.rs"]
#[allow(dead_code, unreachable_pub, reason = "the fleet of 'virt-usb filter bench'")]
mod fleet;

use std::path::Path;

use wasmtime::component::{Component, Linker, Val};
use wasmtime::{Config, Engine, Store};

/// Tolerance of a count in percent.
const TOLERANCE_PERCENT: f64 = 2.0;

const QUESTIONS: [(&str, &str); 5] = [
    ("rare kind", r#"[{"vendor_id":"1a6e","product_id":"089a"}]"#),
    ("common kind × 2", r#"[{"vendor_id":"0529","product_id":"0001","count":2}]"#),
    (
        "overlapping",
        r#"[{"vendor_id":"0529"},{"vendor_id":"0529","product_id":"0001"},{"class":"ff"}]"#,
    ),
    ("class and tag", r#"[{"class":"hid","tags":["erp"]}]"#),
    (
        "eight requests",
        r#"[{"class":"03"},{"class":"08"},{"class":"0b"},{"class":"ff"},{"vendor_id":"2001"},
        {"vendor_id":"2002"},{"tags":["erp"]},{"port":"1-1.2"}]"#,
    ),
];

/// The fuel of loading 500 hosts with 20 devices, and of each question.
fn counts() -> Vec<(String, u64)> {
    let engine = Engine::new(Config::new().consume_fuel(true)).unwrap();
    let component = Component::new(&engine, std::fs::read(common::built()).unwrap()).unwrap();
    let mut store = Store::new(&engine, ());
    store.set_fuel(u64::MAX).unwrap();
    let instance = Linker::new(&engine).instantiate(&mut store, &component).unwrap();
    let func = |store: &mut Store<()>, interface: &str, name: &str| {
        let interface = format!("virt-usb:scheduler/{interface}@0.1.0");
        let parent = instance.get_export_index(&mut *store, None, &interface).unwrap();
        let index = instance.get_export_index(&mut *store, Some(&parent), name).unwrap();
        instance.get_func(&mut *store, index).unwrap()
    };
    let call = |store: &mut Store<()>, (interface, name): (&str, &str), arguments: &[Val]| {
        let func = func(store, interface, name);
        let mut results = [Val::Bool(false)];
        let before = store.get_fuel().unwrap();
        func.call(&mut *store, arguments, &mut results).unwrap();
        let [result] = results;
        (before - store.get_fuel().unwrap(), result)
    };
    let (_, inventory) = call(&mut store, ("inventory", "[constructor]inventory"), &[]);
    let Val::Resource(inventory) = inventory else { panic!("no inventory") };
    let made = fleet::Fleet { hosts: 500, devices: 20 };
    let lines: Vec<String> =
        (0..500).map(|host| serde_json::to_string(&made.document(host)).unwrap()).collect();
    let load = [Val::Resource(inventory), Val::String(lines.join("\n")), Val::U64(1)];
    let (fuel, report) = call(&mut store, ("text", "load"), &load);
    let Val::String(report) = report else { panic!("no report") };
    assert!(report.contains(r#""hosts":500,"#), "{report}");
    let mut counts = vec![("load 500 hosts".to_owned(), fuel)];
    for (name, devices) in QUESTIONS {
        let question = format!(r#"{{"flavor":{{"usb_devices":{devices}}}}}"#);
        let select =
            [Val::Resource(inventory), Val::String(question), Val::Option(None), Val::U32(100)];
        let (fuel, answer) = call(&mut store, ("text", "select"), &select);
        assert!(matches!(answer, Val::Result(Ok(_))), "{name}: {answer:?}");
        counts.push((name.to_owned(), fuel));
    }
    counts
}

#[test]
fn the_filter_computes_no_more_than_before() {
    let toolchain = std::fs::read_to_string(common::built().with_extension("toolchain")).unwrap();
    let toolchain = toolchain.trim();
    let counts = counts();
    assert_eq!(counts, self::counts(), "fuel is exact");
    let shown = |counts: &[(String, u64)]| {
        counts.iter().map(|(name, fuel)| format!("{name} {fuel}")).collect::<Vec<_>>().join(", ")
    };
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fuel.txt");
    let recorded = std::fs::read_to_string(&path).unwrap();
    let mut lines: Vec<(String, String)> = recorded
        .lines()
        .filter_map(|line| line.split_once(": "))
        .map(|(toolchain, counts)| (toolchain.to_owned(), counts.to_owned()))
        .collect();
    if std::env::var_os("BLESS").is_some() {
        lines.retain(|(known, _)| known != toolchain);
        lines.push((toolchain.to_owned(), shown(&counts)));
        lines.sort();
        let text: String =
            lines.iter().map(|(toolchain, counts)| format!("{toolchain}: {counts}\n")).collect();
        std::fs::write(&path, text).unwrap();
        return;
    }
    let Some((_, known)) = lines.iter().find(|(known, _)| known == toolchain) else {
        eprintln!("no counts are recorded for {toolchain}; they are: {}", shown(&counts));
        return;
    };
    for (part, (name, fuel)) in known.split(", ").zip(&counts) {
        let (known_name, known_fuel) = part.rsplit_once(' ').unwrap();
        assert_eq!(known_name, name, "a question was changed: BLESS=1 records the new ones");
        let percent = (*fuel as f64 / known_fuel.parse::<f64>().unwrap() - 1.0) * 100.0;
        assert!(
            percent.abs() <= TOLERANCE_PERCENT,
            "{name}: {fuel} units of fuel, {percent:+.1} % compared with the recorded \
                {known_fuel} for {toolchain}; if this is intended, run \
             BLESS=1 tests/suite/run fuel"
        );
    }
    assert_eq!(known.split(", ").count(), counts.len());
}
