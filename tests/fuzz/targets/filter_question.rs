//! Any text as a question to the filter, and any names as candidates: the filter answers, or
//! refuses in one line, and it accepts each selected host when asked about it alone.
#![no_main]

use std::cell::RefCell;

use libfuzzer_sys::fuzz_target;
use virt_usb_filter_core::{Inventory, Verdict, text};

thread_local! {
    static FLEET: RefCell<Inventory> = RefCell::new(fleet());
}

/// Forty hosts with different devices. One host has more devices than fit into a row.
fn fleet() -> Inventory {
    let mut fleet = Inventory::new();
    for host in 0..40u64 {
        let device = |n: u64| {
            let (vendor, product) = (1 + (n + host) % 3, 1 + n % 2);
            let projects = if (n + host) % 5 == 0 { "[\"p1\"]" } else { "[]" };
            let status = if (n * host) % 4 == 1 { "allocated" } else { "available" };
            format!(
                r#"{{"id":{},"compute_node_id":2,"address":"usb_1_1","vendor_id":"{vendor:04x}","product_id":"{product:04x}","status":"{status}",
                "port_path":"1-{}","serial":"S{}","serial_kind":"unique","class":"{:02x}","tags":["t{}"],"projects":{projects}}}"#,
                host * 1_000_000 + n + 1, 1 + n % 200, n % 4, n % 9, n % 3
            )
            .replace('\n', "")
        };
        let count = if host == 7 { 150 } else { host % 6 };
        let devices: Vec<String> = (0..count).map(device).collect();
        let document = format!(
            r#"{{"version":1,"host":"h{host}","compute_node_id":2,"revision":1,"devices":[{}]}}"#,
            devices.join(",")
        );
        assert_eq!(fleet.load(&document, host).refused, 0);
    }
    fleet
}

fuzz_target!(|text: &str| {
    let (question, candidates) = match text.split_once('\n') {
        Some((question, candidates)) => (question, Some(candidates)),
        None => (text, None),
    };
    FLEET.with_borrow(|fleet| {
        let parsed = match text::question(question) {
            Ok(parsed) => parsed,
            Err(e) => return assert!(!e.to_string().contains('\n'), "one line: {e}"),
        };
        let selected = match candidates {
            None => fleet.select(&parsed, None, 50),
            Some(names) => fleet.select(&parsed, Some(&mut text::names(names)), 50),
        };
        let Ok(selected) = selected else { return };
        for placement in &selected.placements {
            match fleet.explain(&parsed, &placement.host).expect("it was taken before") {
                Verdict::Accepted { score, devices } => {
                    assert_eq!(score, placement.score);
                    assert_eq!(devices.len(), parsed.devices());
                }
                Verdict::Rejected(why) => {
                    panic!("{} is selected, and rejected: {why}", placement.host)
                }
            }
        }
    });
});
