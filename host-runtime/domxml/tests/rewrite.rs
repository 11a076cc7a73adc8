//! Rewriting: exact text for the layouts that occur.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test may panic")]

use virt_usb_domxml::{Edits, Hostdev, XmlError, read, rewrite};
use virt_usb_model::{BusAddress, DeviceId, UsbId};

fn hostdev(id: u64) -> Hostdev {
    let address = BusAddress::new(1, u8::try_from(id % 127).unwrap()).unwrap();
    let usb = UsbId::new(0x0529, 1);
    Hostdev { id: DeviceId::new(id).unwrap(), usb, address, guest_port: None }
}

fn inject() -> Edits {
    Edits { hostdevs: vec![hostdev(5)], redirdevs: vec![0], ..Edits::default() }
}

fn relocate(to: Hostdev) -> Edits {
    Edits { relocate: vec![(0, to)], ..Edits::default() }
}

#[track_caller]
fn check(before: &str, edits: &Edits, after: &str) {
    let written = rewrite(before.as_bytes(), edits).unwrap().expect("something to change");
    assert_eq!(String::from_utf8(written.clone()).unwrap(), after);
    assert_eq!(rewrite(&written, edits).unwrap(), None, "rewriting again changes nothing");
    read(&written).unwrap();
}

const HOSTDEV: &str = "<hostdev mode='subsystem' type='usb'><source><vendor id='0x0529'/><product \
    id='0x0001'/>\
    <address bus='1' device='5'/></source><alias name='ua-usb-5'/></hostdev>";
const REDIRDEV: &str =
    "<redirdev bus='usb' type='spicevmc'><alias name='ua-usb-redir-0'/></redirdev>";
const CONTROLLER: &str = "<controller type='usb' model='qemu-xhci' ports='15'/>";

#[test]
fn at_the_end_of_the_devices_in_libvirts_own_style() {
    let before = "<domain type='kvm'>
  <name>erp</name>
  <devices>
    <emulator>/usr/bin/qemu-system-x86_64</emulator>
    <memballoon model='none'/>
  </devices>
</domain>
";
    let after = "<domain type='kvm'>
  <name>erp</name>
  <devices>
    <emulator>/usr/bin/qemu-system-x86_64</emulator>
    <memballoon model='none'/>
    <hostdev mode='subsystem' type='usb'>
      <source>
        <vendor id='0x0529'/>
        <product id='0x0001'/>
        <address bus='1' device='5'/>
      </source>
      <alias name='ua-usb-5'/>
    </hostdev>
    <redirdev bus='usb' type='spicevmc'>
      <alias name='ua-usb-redir-0'/>
    </redirdev>
  </devices>
</domain>
";
    check(before, &inject(), after);
    let crlf = |text: &str| text.replace('\n', "\r\n");
    check(&crlf(before), &inject(), &crlf(after));
    let tabs = |text: &str| text.replace("  ", "\t");
    check(&tabs(before), &inject(), &tabs(after));
    let four = |text: &str| text.replace("  ", "    ");
    check(&four(before), &inject(), &four(after));
}

#[test]
fn one_line_stays_one_line() {
    let before = "<domain><name>x</name><devices><emulator>q</emulator></devices></domain>";
    let after = format!(
        "<domain><name>x</name><devices><emulator>q</emulator>{HOSTDEV}{REDIRDEV}</devices>\
            </domain>"
    );
    check(before, &inject(), &after);
    let edits = Edits { controller: true, ..Edits::default() };
    check(
        "<domain><name>x</name></domain>",
        &edits,
        &format!("<domain><name>x</name><devices>{CONTROLLER}</devices></domain>"),
    );
    check(
        "<domain><name>x</name><devices/></domain>",
        &edits,
        &format!("<domain><name>x</name><devices>{CONTROLLER}</devices></domain>"),
    );
    check(
        "<domain><name>x</name><devices></devices></domain>",
        &edits,
        &format!("<domain><name>x</name><devices>{CONTROLLER}</devices></domain>"),
    );
}

#[test]
fn devices_that_are_missing_or_empty() {
    let edits = Edits { controller: true, ..Edits::default() };
    let after = "<domain>\n  <name>x</name>\n  <devices>\n    <controller type='usb' \
        model='qemu-xhci' ports='15'/>\n  </devices>\n</domain>\n";
    check("<domain>\n  <name>x</name>\n</domain>\n", &edits, after);
    check("<domain>\n  <name>x</name>\n  <devices/>\n</domain>\n", &edits, after);
    check("<domain>\n  <name>x</name>\n  <devices></devices>\n</domain>\n", &edits, after);
    check("<domain>\n  <name>x</name>\n  <devices>\n  </devices>\n</domain>\n", &edits, after);
    let after_space = after.replace("<devices>", "<devices >");
    check("<domain>\n  <name>x</name>\n  <devices />\n</domain>\n", &edits, &after_space);
}

#[test]
fn behind_a_comment_and_in_odd_layouts() {
    let redirdev = Edits { redirdevs: vec![0], ..Edits::default() };
    let comment = "<domain><name>x</name>\n<devices>\n   <a/> <b/> <!-- </devices> -->\n\n  \
        </devices></domain>";
    let after = "<domain><name>x</name>\n<devices>\n   <a/> <b/> <!-- </devices> -->\n   <redirdev \
        bus='usb' type='spicevmc'>\n      \
        <alias name='ua-usb-redir-0'/>\n   </redirdev>\n\n  </devices></domain>";
    check(comment, &redirdev, after);
    let cdata = "<domain><name>x</name><devices><a/><![CDATA[ </devices> ]]></devices></domain>";
    check(cdata, &redirdev, &cdata.replace("]]>", &format!("]]>{REDIRDEV}")));
}

#[test]
fn the_controller_stands_with_the_controllers() {
    let before = "<domain>\n  <name>x</name>\n  <devices>\n    <controller type='pci'>\n    \
        </controller>\n    <a/>\n  </devices>\n</domain>";
    let edits = Edits { controller: true, redirdevs: vec![3], ..Edits::default() };
    let after = "<domain>\n  <name>x</name>\n  <devices>\n    <controller type='pci'>\n    \
        </controller>\n    \
        <controller type='usb' model='qemu-xhci' ports='15'/>\n    <a/>\n    <redirdev bus='usb' \
        type='spicevmc'>\n      \
        <alias name='ua-usb-redir-3'/>\n    </redirdev>\n  </devices>\n</domain>";
    check(before, &edits, after);
    let last = "<domain><name>x</name><devices><controller type='pci'/></devices></domain>";
    let edits = Edits { controller: true, redirdevs: vec![0], ..Edits::default() };
    check(last, &edits, &last.replace("</devices>", &format!("{CONTROLLER}{REDIRDEV}</devices>")));
}

#[test]
fn what_is_there_is_not_added_again() {
    let there = format!(
        "<domain><name>x</name><devices><controller \
            type='usb'/>{HOSTDEV}{REDIRDEV}</devices></domain>"
    );
    let edits = Edits {
        hostdevs: vec![hostdev(5)],
        redirdevs: vec![0],
        controller: true,
        ..Edits::default()
    };
    assert_eq!(rewrite(there.as_bytes(), &edits).unwrap(), None);
    assert_eq!(rewrite(there.as_bytes(), &Edits::default()).unwrap(), None);
    let twice = Edits {
        hostdevs: vec![hostdev(6), hostdev(6)],
        redirdevs: vec![1, 1, 0],
        ..Edits::default()
    };
    let written = read(&rewrite(there.as_bytes(), &twice).unwrap().unwrap()).unwrap();
    assert_eq!((written.hostdevs.len(), written.redirdevs.len()), (2, 2));
}

/// Element that [`refused`] writes.
const REFUSAL: &str = "<refusal xmlns='urn:virt-usb:refusal:1' why='HASP &#39;1&#39; &#60;&#38;> \
    &#233;&#128477; ??, gone'/>";

fn refused() -> Edits {
    let why = "HASP '1' <&> é🗝 \u{fffe}\u{1}, gone".to_owned();
    Edits { refusal: Some(why), ..Edits::default() }
}

#[test]
fn a_refusal_stands_in_the_metadata_wherever_that_is() {
    let line = |metadata: &str| format!("<domain><name>x</name>{metadata}<devices/></domain>");
    for (before, after) in [
        (line("<metadata/>"), line(&format!("<metadata>{REFUSAL}</metadata>"))),
        (line("<metadata></metadata>"), line(&format!("<metadata>{REFUSAL}</metadata>"))),
        (
            line("<metadata><a xmlns='urn:a'><b/></a></metadata>"),
            line(&format!("<metadata><a xmlns='urn:a'><b/></a>{REFUSAL}</metadata>")),
        ),
        (
            line(""),
            format!("<domain><name>x</name><devices/><metadata>{REFUSAL}</metadata></domain>"),
        ),
    ] {
        check(&before, &refused(), &after);
    }
    let before = "<domain>\n  <name>x</name>\n  <metadata>\n    <a xmlns='urn:a'/>\n  \
        </metadata>\n</domain>\n";
    let after = before.replace("\n  </metadata>", &format!("\n    {REFUSAL}\n  </metadata>"));
    check(before, &refused(), &after);
}

#[test]
fn a_refusal_is_read_as_it_was_written_but_for_what_xml_has_no_way_to_write() {
    let xml = "<domain><name>x</name></domain>";
    let written = rewrite(xml.as_bytes(), &refused()).unwrap().unwrap();
    assert_eq!(read(&written).unwrap().refusal.as_deref(), Some("HASP '1' <&> é🗝 ??, gone"));
    // libvirt writes the element with its own quotes; another element of that name is not a
    // refusal.
    let other = "<domain><name>x</name><metadata><refusal why='a'/><r:refusal xmlns:r='urn:r' \
        why='b'/></metadata></domain>";
    assert_eq!(read(other.as_bytes()).unwrap().refusal, None);
    let libvirts = "<domain><name>x</name><metadata>\n <u:refusal \
        xmlns:u=\"urn:virt-usb:refusal:1\" why=\"it&apos;s held\"/></metadata></domain>";
    assert_eq!(read(libvirts.as_bytes()).unwrap().refusal.as_deref(), Some("it's held"));
}

const OLD: &str = "<domain>
  <name>x</name>
  <devices>
    <hostdev mode=\"subsystem\" type='usb' managed='no'>
      <source startupPolicy='optional' guestReset=\"off\">
        <!-- the key -->
        <vendor id=\"0x0529\"/>
        <product id='0x1'/>
        <address bus='2'   device = \"7\"/>
      </source>
      <boot order='1'/>
      <alias name='hostdev0'/>
      <address type='usb' bus='0' port='2'/>
    </hostdev>
  </devices>
</domain>
";

#[test]
fn relocation_changes_what_differs_and_nothing_else() {
    let after = OLD
        .replace(" startupPolicy='optional'", "")
        .replace("bus='2'   device = \"7\"", "bus='1'   device = \"5\"")
        .replace("hostdev0", "ua-usb-5");
    check(OLD, &relocate(hostdev(5)), &after);
    let port = OLD.replace("device = \"7\"", "port='1.2'");
    let after = after.replace("bus='1'   device = \"5\"", "device='5' bus='1'");
    check(&port, &relocate(hostdev(5)), &after);
}

#[test]
fn relocation_adds_what_is_missing() {
    let line = |inside: &str| format!("<domain><name>x</name><devices>{inside}</devices></domain>");
    let whole = HOSTDEV.replace(" mode='subsystem'", "");
    let after = line(&whole);
    for before in [
        "<hostdev type='usb'/>",
        "<hostdev type='usb'></hostdev>",
        "<hostdev type='usb'><source/></hostdev>",
        "<hostdev type='usb'><source></source></hostdev>",
        "<hostdev type='usb'><source startupPolicy='requisite'/></hostdev>",
        "<hostdev type='usb'><source><vendor/></source></hostdev>",
        "<hostdev type='usb'><source><vendor id='0x0529'></vendor></source><alias/></hostdev>",
        "<hostdev type='usb'><source><product id='1'/><address device='7' \
            bus='9'/></source></hostdev>",
        "<hostdev type='usb'><source><address bus='1' port='2'/></source></hostdev>",
        "<hostdev type='usb'><source><vendor id='0x0529'/><address bus='1' \
            device='5'/></source></hostdev>",
    ] {
        let written = rewrite(line(before).as_bytes(), &relocate(hostdev(5))).unwrap().unwrap();
        let written = String::from_utf8(written).unwrap();
        let plain = |text: &str| {
            let text = text.replace("></vendor>", "/>").replace("id='1'/>", "id='0x0001'/>");
            text.replace("device='5' bus='1'", "bus='1' device='5'")
        };
        assert_eq!(plain(&written), after, "{before}");
        assert_eq!(rewrite(written.as_bytes(), &relocate(hostdev(5))).unwrap(), None, "{before}");
    }
    let before = "<domain>\n <name>x</name>\n <devices>\n  <hostdev type='usb'>\n   <source>\n    \
        <address bus='1' device='5'/>\n   </source>\n  </hostdev>\n </devices>\n</domain>";
    let after = "<domain>\n <name>x</name>\n <devices>\n  <hostdev type='usb'>\n   <source>\n    \
        <vendor id='0x0529'/>\n    <product id='0x0001'/>\n    <address bus='1' device='5'/>\n   \
        </source>\n   <alias name='ua-usb-5'/>\n  </hostdev>\n </devices>\n</domain>";
    check(before, &relocate(hostdev(5)), after);
    let before =
        "<domain>\n <name>x</name>\n <devices>\n  <hostdev type='usb'/>\n </devices>\n</domain>";
    check(before, &relocate(hostdev(5)), after);
}

#[test]
fn relocation_frees_the_old_alias() {
    let before = format!("<domain><name>x</name><devices>{HOSTDEV}</devices></domain>");
    let edits =
        Edits { hostdevs: vec![hostdev(5)], relocate: vec![(0, hostdev(7))], ..Edits::default() };
    let written = rewrite(before.as_bytes(), &edits).unwrap().unwrap();
    let ids: Vec<u64> =
        read(&written).unwrap().hostdevs.iter().map(|h| h.injected().unwrap().get()).collect();
    assert_eq!(ids, [7, 5]);
    assert_eq!(rewrite(&written, &edits).unwrap(), None);
}

#[test]
fn relocations_that_do_not_fit() {
    let refused = |edits: &Edits| match rewrite(OLD.as_bytes(), edits) {
        Err(XmlError::Relocate { index, .. }) => index,
        other => panic!("{other:?}"),
    };
    assert_eq!(refused(&Edits { relocate: vec![(1, hostdev(5))], ..Edits::default() }), 1);
    assert_eq!(
        refused(&Edits { relocate: vec![(0, hostdev(5)), (0, hostdev(6))], ..Edits::default() }),
        0
    );
    let both =
        format!("<domain><name>x</name><devices>{HOSTDEV}<hostdev type='usb'/></devices></domain>");
    let same = Edits { relocate: vec![(1, hostdev(5))], ..Edits::default() };
    assert!(matches!(rewrite(both.as_bytes(), &same), Err(XmlError::Relocate { index: 1, .. })));
    let swapped = Edits { relocate: vec![(1, hostdev(5)), (0, hostdev(6))], ..Edits::default() };
    assert!(rewrite(both.as_bytes(), &swapped).unwrap().is_some());
}

#[test]
fn other_encodings_keep_their_bytes() {
    let text = "<domain><title>Ümläut</title><name>x</name><devices></devices></domain>";
    let after = text.replace("</devices>", &format!("{CONTROLLER}</devices>"));
    let edits = Edits { controller: true, ..Edits::default() };
    let latin = |t: &str| {
        let t = format!("<?xml version='1.0' encoding='windows-1252'?>{t}");
        t.chars().map(|c| u8::try_from(u32::from(c)).unwrap()).chain([0x80]).collect::<Vec<u8>>()
    };
    let comment = |t: &str| t.replace("Ümläut", "Ümläut<!-- \u{80}\u{9f}\u{ff} -->");
    let strip = |mut bytes: Vec<u8>| {
        bytes.pop();
        bytes
    };
    let before = strip(latin(&comment(text)));
    assert_eq!(rewrite(&before, &edits).unwrap().unwrap(), strip(latin(&comment(&after))));
    let utf16 = |t: &str, little: bool| -> Vec<u8> {
        let units = "\u{feff}".encode_utf16().chain(t.encode_utf16().collect::<Vec<_>>());
        units.flat_map(|u| if little { u.to_le_bytes() } else { u.to_be_bytes() }).collect()
    };
    for little in [true, false] {
        assert_eq!(rewrite(&utf16(text, little), &edits).unwrap().unwrap(), utf16(&after, little));
    }
    let bom = format!("\u{feff}{text}");
    assert_eq!(
        rewrite(bom.as_bytes(), &edits).unwrap().unwrap(),
        format!("\u{feff}{after}").into_bytes()
    );
}

/// In a handwritten hostdev, only two numbers change, and only if the hostdev has them.
#[test]
fn a_new_address_is_all_that_changes() {
    let to = BusAddress::new(2, 17).unwrap();
    let edits = Edits { readdress: vec![(0, to)], ..Edits::default() };
    let domain = |source: &str| {
        format!(
            "<domain><name>x</name><devices><hostdev mode='subsystem' type='usb'>{source}<alias \
                name='ua-usb-9'/></hostdev></devices></domain>"
        )
    };
    let cases = [
        (
            "<source startupPolicy='optional'><vendor id='0x529'/><product id='1'/><address \
                bus='1'  device=\"5\"/></source>",
            Some(
                "<source startupPolicy='optional'><vendor id='0x529'/><product id='1'/><address \
                    bus='2'  device=\"17\"/></source>",
            ),
        ),
        (
            "<source><address bus='2' port='1.4' device='0x5'/></source>",
            Some("<source><address bus='2' port='1.4' device='17'/></source>"),
        ),
        ("<source><address device='021' bus='0x2'/></source>", None),
        ("<source><address bus='1' port='1.4'/></source>", None),
        ("<source><vendor id='0x529'/><product id='1'/></source>", None),
        ("<source/>", None),
        ("", None),
    ];
    for (before, after) in cases {
        let written = rewrite(domain(before).as_bytes(), &edits).unwrap();
        assert_eq!(written.map(|w| String::from_utf8(w).unwrap()), after.map(domain), "{before}");
    }
    let twice = Edits { readdress: vec![(0, to), (0, to)], ..Edits::default() };
    assert!(rewrite(domain("").as_bytes(), &twice).is_err());
    let nowhere = Edits { readdress: vec![(1, to)], ..Edits::default() };
    assert!(rewrite(domain("").as_bytes(), &nowhere).is_err());
}
