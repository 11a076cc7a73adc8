//! Any text as a flavor: an accepted flavor is written in a form that is accepted with the same
//! meaning.
#![no_main]

use libfuzzer_sys::fuzz_target;
use virt_usb_model::{Flavor, ParseError};

fuzz_target!(|text: &str| {
    if let Some(flavor) = checked(Flavor::parse(text)) {
        // The whole object serves as either list.
        let devices = Flavor::parse_lists(Some(text), None);
        if flavor.usb_redirection_devices.is_empty() && !flavor.usb_devices.is_empty() {
            assert_eq!(devices, Ok(flavor));
        }
    }
    checked(Flavor::parse_lists(Some(text), None));
    checked(Flavor::parse_lists(None, Some(text)));
    if let Some((devices, redirection)) = text.split_once('\n') {
        let both = checked(Flavor::parse_lists(Some(devices), Some(redirection)));
        let apart = (
            Flavor::parse_lists(Some(devices), None),
            Flavor::parse_lists(None, Some(redirection)),
        );
        match (both, apart) {
            (Some(both), (Ok(d), Ok(r))) => {
                assert_eq!(both.usb_devices, d.usb_devices);
                assert_eq!(both.usb_redirection_devices, r.usb_redirection_devices);
            }
            (None, (Ok(_), Ok(_))) | (Some(_), _) => {
                panic!("the two lists do not depend on each other")
            }
            (None, _) => {}
        }
    }
});

fn checked(read: Result<Flavor, ParseError>) -> Option<Flavor> {
    match read {
        Ok(flavor) => {
            let written = flavor.to_string();
            assert_eq!(
                Flavor::parse(&written).as_ref(),
                Ok(&flavor),
                "what it writes, it reads: {written}"
            );
            for (n, request) in flavor.usb_devices.iter().enumerate() {
                let alone = Flavor::parse_lists(Some(&request.to_string()), None);
                let alone = alone.map(|f| f.usb_devices);
                assert_eq!(
                    alone.as_deref(),
                    Ok(std::slice::from_ref(request)),
                    "request {n} alone"
                );
            }
            Some(flavor)
        }
        Err(e) => {
            let message = e.to_string();
            assert!(
                message.len() < 2000 && !message.contains(char::is_control),
                "one short line: {message:?}"
            );
            None
        }
    }
}
