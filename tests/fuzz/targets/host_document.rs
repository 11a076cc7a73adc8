//! Any text as a host document: an accepted document is written in a form that is accepted with the
//! same meaning.
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
                "a written document can be read: {written}"
            );
            let published = document.published(usize::MAX).text;
            let read = HostDocument::parse(&published);
            let mut same = document.clone();
            for device in &mut same.devices {
                device.compute_node_id = document.compute_node_id;
            }
            assert_eq!(read, Ok(same), "a published document can be read: {published}");
            assert!(document.devices.iter().all(|d| d.state().is_ok()), "every state has a name");
        }
        Err(e) => assert!(!e.to_string().contains('\n'), "one line: {e}"),
    }
});
