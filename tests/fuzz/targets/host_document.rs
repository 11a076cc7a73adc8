//! Any text as a host document: what is accepted is written in a form that is accepted again, and
//! means the same.
#![no_main]

use libfuzzer_sys::fuzz_target;
use virt_usb_model::HostDocument;

fuzz_target!(|text: &str| {
    match HostDocument::parse(text) {
        Ok(document) => {
            let written = serde_json::to_string(&document).expect("a document can be written");
            assert_eq!(
                HostDocument::parse(&written).as_ref(),
                Ok(&document),
                "what it writes, it reads: {written}"
            );
            let published = document.published(usize::MAX).text;
            let read = HostDocument::parse(&published);
            let mut same = document.clone();
            same.devices.iter_mut().for_each(|device| device.compute_node_id = document.compute_node_id);
            assert_eq!(read, Ok(same), "what it publishes, others read: {published}");
            assert!(document.devices.iter().all(|d| d.state().is_ok()), "every state has a name");
        }
        Err(e) => assert!(!e.to_string().contains('\n'), "one line: {e}"),
    }
});
