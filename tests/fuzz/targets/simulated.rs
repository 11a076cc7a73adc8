//! Any text as a simulation file: refused, or a snapshot that discovery could have made.
#![no_main]

use std::collections::BTreeSet;

use libfuzzer_sys::fuzz_target;
use virt_usb::discovery::{Simulated, UsbSource};

fuzz_target!(|text: &str| {
    match Simulated::parse(text) {
        Ok(simulated) => {
            let seen = simulated.snapshot();
            let ports: BTreeSet<_> =
                seen.devices.iter().chain(&seen.hubs).map(|d| d.key.port.clone()).collect();
            assert_eq!(
                ports.len(),
                seen.devices.len() + seen.hubs.len(),
                "a port holds one device"
            );
            assert!(seen.devices.iter().all(|d| !d.is_hub()), "a hub is never offered");
            assert_eq!(simulated.snapshot(), seen);
        }
        Err(e) => assert!(!e.to_string().contains('\n'), "one line: {e}"),
    }
});
