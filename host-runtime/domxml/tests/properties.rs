//! Properties of every document: untouched bytes, rewrite twice = once, no panic.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test may panic")]

use proptest::prelude::*;
use virt_usb_domxml::{Edits, Hostdev, read, rewrite};
use virt_usb_model::{BusAddress, DeviceId, UsbId};

/// White space and asides that may stand between any two elements; some hold what a careless reader
/// would take for markup.
fn gap() -> impl Strategy<Value = String> {
    let pieces = prop::sample::select(vec![
        "",
        "",
        "",
        " ",
        "\n",
        "\r\n",
        "\t",
        "\n  ",
        "\r\n\t\t",
        "\n\n    ",
        "<!-- Ünïcode 鍵 -->",
        "<!--</devices>-->",
        "<!-- <hostdev type='usb'/> -->",
        "<?pi </domain> ?>",
        "<!---->",
        "\n    <!-- x -->\n    ",
    ]);
    prop::collection::vec(pieces, 0..3).prop_map(|p| p.concat())
}

/// Inside of an element there may be text as well.
fn inner_gap() -> impl Strategy<Value = String> {
    prop_oneof![
        4 => gap(),
        1 => Just("<![CDATA[</devices><x>]]>".to_owned()),
        1 => Just("text &amp; &#x20AC; > ]".to_owned()),
    ]
}

fn quoted(value: &'static str) -> impl Strategy<Value = String> {
    prop::sample::select(vec!['\'', '"']).prop_map(move |q| format!("{q}{value}{q}"))
}

/// An element that is nothing to us.
fn unknown() -> impl Strategy<Value = String> {
    let name = prop::sample::select(vec![
        "emulator",
        "x:y",
        "memballoon",
        "tpm",
        "名",
        "hostdevs",
        "_a-b.c",
    ]);
    let leaf = (name.clone(), quoted("a > b &lt; ü"), gap(), any::<bool>()).prop_map(
        |(name, value, gap, empty)| {
            let blank = if gap.contains('<') { " " } else { &gap };
            let end = if empty { "/>".to_owned() } else { format!("></{name}{blank}>") };
            format!("<{name} {blank}a{blank}={blank}{value}{blank}{end}")
        },
    );
    leaf.prop_recursive(3, 8, 3, move |inner| {
        (name.clone(), prop::collection::vec((inner_gap(), inner), 0..3), inner_gap()).prop_map(
            |(name, inside, last)| {
                let inside: String =
                    inside.into_iter().map(|(gap, element)| gap + &element).collect();
                format!("<{name}>{inside}{last}</{name}>")
            },
        )
    })
}

fn device() -> impl Strategy<Value = String> {
    prop_oneof![
        3 => unknown(),
        1 => Just("<controller type='usb' index='0' model=\"qemu-xhci\"/>".to_owned()),
        1 => gap().prop_map(|g| format!("<controller type='pci'>{g}</controller>")),
        1 => Just("<input type='tablet' bus='usb'><address type='usb' bus='0' \
            port='1'/></input>".to_owned()),
        1 => inner_gap().prop_map(|g| format!("<hostdev mode='subsystem' \
            type='usb'>{g}<source/></hostdev>")),
        1 => Just("<redirdev bus='usb' type='tcp'/>".to_owned()),
        1 => Just("<graphics type='spice'><x/></graphics>".to_owned()),
    ]
}

fn around(elements: impl Strategy<Value = String>, most: usize) -> impl Strategy<Value = String> {
    (prop::collection::vec((inner_gap(), elements), 0..most), inner_gap()).prop_map(
        |(elements, last)| {
            elements.into_iter().map(|(gap, element)| gap + &element).collect::<String>() + &last
        },
    )
}

/// A domain, and the same with `<devices/>` written as `<devices></devices>`: opening it is the one
/// change that is no insertion.
fn domain() -> impl Strategy<Value = (String, String)> {
    let devices = prop_oneof![
        6 => around(device(), 6).prop_map(|d| (format!("<devices>{d}</devices>"), None)),
        1 => Just(("<devices/>".to_owned(), Some("<devices></devices>".to_owned()))),
        1 => Just((String::new(), None)),
    ];
    let start = prop::sample::select(vec![
        "",
        "\u{feff}",
        "<?xml version='1.0' encoding=\"UTF-8\"?>\r\n",
        "\n<!-- hi -->\n",
    ]);
    (start, around(unknown(), 3), devices, around(unknown(), 3), gap()).prop_map(
        |(start, a, (devices, open), b, end)| {
            let whole = |devices: &str| {
                format!("{start}<domain type='kvm'>{a}<name>é</name>{devices}{b}</domain>{end}")
            };
            (whole(&devices), whole(open.as_ref().unwrap_or(&devices)))
        },
    )
}

fn some_hostdev() -> impl Strategy<Value = Hostdev> {
    (1u64..6, any::<u16>(), any::<u16>(), 1u8..=255, 1u8..=127).prop_map(
        |(id, vendor, product, bus, device)| Hostdev {
            id: DeviceId::new(id).unwrap(),
            usb: UsbId::new(vendor, product),
            address: BusAddress::new(bus, device).unwrap(),
            guest_port: None,
        },
    )
}

fn additions() -> impl Strategy<Value = Edits> {
    (prop::collection::vec(some_hostdev(), 0..3), prop::collection::vec(0usize..4, 0..3))
        .prop_map(|(hostdevs, redirdevs)| Edits { hostdevs, redirdevs, ..Edits::default() })
}

/// Checks that `after` is `before` with one block more.
fn is_one_insertion(before: &str, after: &str) -> Result<(), TestCaseError> {
    let (before, after) = (before.as_bytes(), after.as_bytes());
    let same = before.iter().zip(after).take_while(|(a, b)| a == b).count();
    let tail = before.len() - same;
    prop_assert_eq!(&before[same..], &after[after.len() - tail..]);
    Ok(())
}

fn rewritten(xml: &str, edits: &Edits) -> Option<String> {
    rewrite(xml.as_bytes(), edits).unwrap().map(|xml| String::from_utf8(xml).unwrap())
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 512,
        failure_persistence: None,
        max_global_rejects: 100_000,
        ..ProptestConfig::default()
    })]

    #[test]
    fn additions_only_insert((xml, open) in domain(), edits in additions()) {
        let before = read(xml.as_bytes()).unwrap();
        let Some(after) = rewritten(&xml, &edits) else {
            prop_assert!(edits.hostdevs.is_empty() && edits.redirdevs.is_empty());
            return Ok(());
        };
        is_one_insertion(&open, &after)?;
        prop_assert_eq!(rewritten(&after, &edits), None);
        let mut read = read(after.as_bytes()).unwrap();
        for added in read.hostdevs.drain(before.hostdevs.len()..) {
            let wanted = edits.hostdevs.iter().find(|h| Some(h.id) == added.injected()).unwrap();
            prop_assert_eq!((added.usb, added.address), (Some(wanted.usb), Some(wanted.address)));
        }
        let mut added = read.redirdevs.drain(before.redirdevs.len()..);
        prop_assert!(added.all(|r| edits.redirdevs.contains(&r.injected().unwrap())));
        drop(added);
        read.bus.clone_from(&before.bus);
        prop_assert_eq!(read, before);
    }

    #[test]
    fn a_controller_is_one_insertion_and_independent_of_the_devices(
        (xml, open) in domain(),
        devices in additions(),
    ) {
        let controller = Edits { controller: true, ..Edits::default() };
        let both = Edits { controller: true, ..devices.clone() };
        let with_controller = rewritten(&xml, &controller);
        if let Some(after) = &with_controller {
            is_one_insertion(&open, after)?;
            prop_assert!(read(after.as_bytes()).unwrap().bus.has_controller());
            prop_assert_eq!(rewritten(after, &controller), None);
        }
        let step_by_step = rewritten(with_controller.as_ref().unwrap_or(&xml), &devices);
        let step_by_step = step_by_step.or(with_controller);
        // Where the document has no indentation to speak of, what was inserted first is the only
        // model.
        let squeezed = |xml: String| xml.split_ascii_whitespace().collect::<String>();
        let bare = |xml: Option<String>| xml.map(squeezed);
        prop_assert_eq!(bare(rewritten(&xml, &both)), bare(step_by_step));
    }

    #[test]
    fn relocation_changes_values_only(
        old in some_hostdev(), new in some_hostdev(),
        gaps in prop::collection::vec(gap(), 8), q in prop::sample::select(vec!['\'', '"']),
        (xml, _) in domain(), hex in any::<bool>(),
    ) {
        let [g0, g1, g2, g3, g4, g5, g6, g7] = &gaps[..] else { panic!("eight gaps") };
        let hostdev = |vendor: &str, product: &str, bus: &str, device: &str, alias: &str| format!(
            "<hostdev type={q}usb{q} mode='subsystem'>{g0}<boot order='1'/>{g1}<source \
                guestReset='off' >{g2}\
             <vendor id={q}{vendor}{q}/>{g3}<product\n id='{product}' ></product>{g4}\
             <address  bus={q}{bus}{q} device = '{device}' />{g5}</source>{g6}<alias \
             name={q}{alias}{q}/>\
             <address type='usb' bus='0' port='3'/>{g7}</hostdev>"
        );
        let number = |n: u16| if hex { format!("{n:#x}") } else { n.to_string() };
        let [vendor, product] = [old.usb.vendor.get(), old.usb.product.get()].map(number);
        let [bus, device] = [old.address.bus(), old.address.device()].map(|n| number(n.into()));
        let before = hostdev(&vendor, &product, &bus, &device, "hostdev0");
        let choose = |same: bool, old: &str, new: String| if same { old.to_owned() } else { new };
        let after = hostdev(
            &choose(old.usb.vendor == new.usb.vendor, &vendor, format!("0x{}", new.usb.vendor)),
            &choose(old.usb.product == new.usb.product, &product, format!("0x{}", new.usb.product)),
            &choose(old.address.bus() == new.address.bus(), &bus, new.address.bus().to_string()),
            &choose(
                old.address.device() == new.address.device(),
                &device,
                new.address.device().to_string(),
            ),
            &format!("ua-usb-{}", new.id),
        );
        prop_assume!(xml.contains("<devices>"));
        let place = |hostdev: &str| xml.replacen("<devices>", &format!("<devices>{hostdev}"), 1);
        let edits = Edits { relocate: vec![(0, new)], ..Edits::default() };
        let written = rewritten(&place(&before), &edits).unwrap();
        prop_assert_eq!(&written, &place(&after));
        prop_assert_eq!(rewritten(&written, &edits), None);
    }

    #[test]
    fn relocation_of_anything_is_complete(
        parts in prop::collection::vec(prop::sample::select(vec![
            "<vendor/>", "<vendor \
                id='0x1'/>", "<product></product>", "<product id=\"2\"/>", "<address/>",
            "<address bus='1' port='1.2'/>", "<address device='3'/>", "<!-- c -->", "\n   ",
        ]), 0..5),
        source in prop::sample::select(vec!["<source>", "<source \
            startupPolicy='optional'>", "\n  <source  startupPolicy=\"x\" a='b' >"]),
        rest in prop::sample::select(vec!["", "<alias/>", "\n  <alias \
            name='hostdev0'/>\n", "<boot order='1'/>"]),
        new in some_hostdev(),
    ) {
        let xml = format!("<domain><name>x</name>\n<devices>\n <hostdev \
            type='usb'>{source}{}</source>{rest}</hostdev></devices></domain>", parts.concat());
        prop_assume!(read(xml.as_bytes()).is_ok());
        let edits = Edits { relocate: vec![(0, new)], ..Edits::default() };
        if let Some(written) = rewritten(&xml, &edits) {
            let read = read(written.as_bytes()).unwrap();
            let hostdev = &read.hostdevs[0];
            prop_assert_eq!(
                (hostdev.usb, hostdev.address, hostdev.injected()),
                (Some(new.usb), Some(new.address), Some(new.id))
            );
            prop_assert!(!hostdev.has_startup_policy && !written.contains("port="));
            prop_assert_eq!(rewritten(&written, &edits), None);
        }
    }

    #[test]
    fn a_refusal_is_one_insertion_and_is_read_back(
        (xml, _) in domain(),
        why in "[^\\x00-\\x1f\\u{fffe}\\u{ffff}]{0,40}",
    ) {
        let edits = Edits { refusal: Some(why.clone()), ..Edits::default() };
        let written = rewritten(&xml, &edits).unwrap();
        is_one_insertion(&xml, &written)?;
        prop_assert_eq!(read(written.as_bytes()).unwrap().refusal, Some(why));
        prop_assert_eq!(rewritten(&written, &edits), None);
    }

    #[test]
    fn arbitrary_bytes_do_not_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let _ = read(&bytes);
    }

    #[test]
    fn damaged_documents_do_not_panic(
        (xml, _) in domain(),
        damage in prop::collection::vec(
            (any::<prop::sample::Index>(), any::<u8>(), 0u8..4),
            1..4,
        ),
        edits in additions(),
        new in some_hostdev(),
    ) {
        let mut bytes = xml.into_bytes();
        for (at, byte, kind) in damage {
            let at = at.index(bytes.len().max(1));
            if bytes.is_empty() {
                break;
            }
            match kind {
                0 => bytes[at] = byte,
                1 => bytes.insert(at, b"<>&'\"/!-]?=;"[usize::from(byte) % 12]),
                2 => { bytes.remove(at); }
                _ => bytes.truncate(at + 1),
            }
        }
        let relocate = vec![(0, new)];
        let edits = Edits { controller: true, relocate, refusal: Some("'<é".into()), ..edits };
        if let Ok(Some(written)) = rewrite(&bytes, &edits) {
            read(&written).unwrap();
            prop_assert_eq!(rewrite(&written, &edits).unwrap(), None);
        }
    }
}
