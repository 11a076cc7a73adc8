//! Any bytes as domain XML: what is read, what is rewritten, and that nothing else changes.
#![no_main]

use libfuzzer_sys::fuzz_target;
use virt_usb_domxml::{Domain, Edits, Hostdev, read, rewrite};
use virt_usb_model::{BusAddress, DeviceId, Speed, SpeedMask, UsbId};

fuzz_target!(|xml: &[u8]| {
    let domain = match read(xml) {
        Ok(domain) => domain,
        Err(e) => {
            assert_eq!(
                rewrite(xml, &additions()),
                Err(e.clone()),
                "read and rewrite accept the same domains"
            );
            let message = e.to_string();
            assert!(
                message.len() < 1000 && !message.contains(['\n', '\r']),
                "a message is one short line: {message:?}"
            );
            return;
        }
    };
    for speed in [None, Some(Speed::Low), Some(Speed::High), Some(Speed::Super)] {
        let full = SpeedMask::of(Some(Speed::Full), None);
        let wants = [SpeedMask::of(speed, None), SpeedMask::ANY, full];
        domain.bus.fit(&wants);
        assert!(domain.bus.place(&wants).len() <= wants.len(), "a place for each, or fewer");
    }
    assert_eq!(rewrite(xml, &Edits::default()), Ok(None), "no edit, no change");
    adds(xml, &domain);
    relocates(xml, &domain);
});

fn hostdev(id: u64, product: u16) -> Hostdev {
    let (id, address) = (DeviceId::new(id), BusAddress::new(3, 17));
    Hostdev {
        id: id.expect("an id"),
        usb: UsbId::new(0x0529, product),
        address: address.expect("an address"),
        guest_port: None,
    }
}

fn additions() -> Edits {
    Edits {
        hostdevs: vec![hostdev(5, 1), hostdev(7, 0x3e9)],
        redirdevs: vec![0, 1],
        controller: true,
        ..Edits::default()
    }
}

/// Rewrites, and checks that the result can be read and that rewriting it again changes nothing.
fn rewritten(xml: &[u8], edits: &Edits) -> Option<(Vec<u8>, Domain)> {
    let after = rewrite(xml, edits).expect("what can be read can be rewritten")?;
    assert_ne!(after, xml, "a change is a change");
    assert_eq!(rewrite(&after, edits), Ok(None), "rewriting twice is rewriting once");
    let domain = read(&after).expect("what was rewritten can be read");
    Some((after, domain))
}

fn adds(xml: &[u8], before: &Domain) {
    let edits = additions();
    let Some((after, mut domain)) = rewritten(xml, &edits) else { return };
    assert!(is_within(xml, &after), "bytes are added, none is taken away");
    assert!(domain.bus.has_controller());
    let ids: Vec<_> = domain.hostdevs.iter().filter_map(|h| h.injected()).collect();
    assert!(edits.hostdevs.iter().all(|h| ids.contains(&h.id)), "each device is in the guest");
    domain.hostdevs.truncate(before.hostdevs.len());
    domain.redirdevs.truncate(before.redirdevs.len());
    domain.bus.clone_from(&before.bus);
    assert_eq!(&domain, before, "nothing else that is read has changed");
    // Without the controller there is one place of change.
    let devices = Edits { controller: false, ..edits };
    if let Some((after, _)) = rewritten(xml, &devices) {
        let same = |a: &[u8], b: &[u8]| a.iter().zip(b).take_while(|(a, b)| a == b).count();
        let reversed = |bytes: &[u8]| bytes.iter().rev().copied().collect::<Vec<_>>();
        let kept = same(xml, &after) + same(&reversed(xml), &reversed(&after));
        // `<devices/>` is opened: its `/>`, in UTF-32 eight bytes, stands apart then.
        assert!(kept + 8 >= xml.len(), "all that is new stands together");
    }
}

fn relocates(xml: &[u8], before: &Domain) {
    let to = |at: usize| hostdev(100 + at as u64, at as u16);
    let edits = Edits {
        relocate: (0..before.hostdevs.len()).map(|at| (at, to(at))).collect(),
        refusal: Some("'no' <é>".into()),
        ..Edits::default()
    };
    let Some((_, domain)) = rewritten(xml, &edits) else { return };
    assert_eq!(domain.refusal.as_ref(), before.refusal.as_ref().or(edits.refusal.as_ref()));
    assert_eq!(
        domain.hostdevs.len(),
        before.hostdevs.len(),
        "a filter may not change the number of devices"
    );
    for (at, hostdev) in domain.hostdevs.iter().enumerate() {
        let to = to(at);
        assert_eq!(
            (hostdev.usb, hostdev.address, hostdev.injected()),
            (Some(to.usb), Some(to.address), Some(to.id))
        );
        assert!(!hostdev.has_startup_policy);
    }
    assert_eq!(
        (&domain.name, domain.uuid, &domain.flavor),
        (&before.name, before.uuid, &before.flavor)
    );
}

/// Whether removing some bytes of `long` gives `short`.
fn is_within(short: &[u8], long: &[u8]) -> bool {
    let mut long = long.iter();
    short.iter().all(|byte| long.any(|other| other == byte))
}
