//! Any text as host documents for the filter: the filter accepts what the model accepts, with the
//! same meaning. Anything else that it accepts is invalid only in keys that it does not use.
#![no_main]

use libfuzzer_sys::fuzz_target;
use virt_usb_filter_core::{Draft, Inventory};
use virt_usb_model::HostDocument;

/// Keys with values that the fast reader ignores.
const UNUSED: [&str; 11] = [
    "address",
    "serial_kind",
    "speed",
    "instance_uuid",
    "extra_info",
    "manufacturer",
    "product_name",
    "driver",
    "host_use",
    "compute_node_id",
    "status_reason",
];

fuzz_target!(|text: &str| {
    let mut all = Inventory::new();
    let loaded = all.load(text, 1);
    assert!(loaded.problems.iter().all(|p| !p.why.contains('\n')), "one line each");
    let lines = text.split('\n').filter(|line| !line.trim_ascii().is_empty()).count();
    assert_eq!((loaded.hosts + loaded.refused) as usize, lines, "every line is taken or refused");
    for line in text.split('\n').filter(|line| !line.trim_ascii().is_empty()) {
        let mut quick = Inventory::new();
        let taken = quick.load(line, 1);
        match HostDocument::parse(line) {
            Ok(document) => {
                let mut draft = Draft::default();
                draft.read(&document);
                let mut slow = Inventory::new();
                assert_eq!(slow.put(&mut draft, 1).is_ok(), taken.hosts == 1, "{line}");
                assert_eq!(quick.statistics().devices, slow.statistics().devices);
                assert_eq!(quick.statistics().available, slow.statistics().available);
                assert_eq!(quick.statistics().keys, slow.statistics().keys);
            }
            Err(e) if taken.hosts == 1 => {
                let place = e.place();
                assert!(UNUSED.iter().any(|key| place.ends_with(key)), "taken, though {e}: {line}");
            }
            Err(_) => {}
        }
    }
    // Whatever was loaded can be taken out again.
    for line in text.split('\n') {
        if let Ok(document) = HostDocument::parse(line) {
            all.remove(&document.host);
        }
    }
});
