//! Documents made to hurt: each ends in an error or an answer, within memory and time that grow
//! with their size only.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test may panic")]

use virt_usb_domxml::{
    Edits, FlavorSource, Hostdev, MAX_DEPTH, MAX_USB, MAX_XML, XmlError, read, rewrite,
};
use virt_usb_model::{BusAddress, DeviceId, SpeedMask, UsbId};

fn domain(inside: &str) -> String {
    format!("<domain><name>x</name>{inside}</domain>")
}

fn edits() -> Edits {
    let device = |id| Hostdev {
        id: DeviceId::new(id).unwrap(),
        usb: UsbId::new(1, 2),
        address: BusAddress::new(3, 4).unwrap(),
        guest_port: None,
    };
    Edits {
        hostdevs: vec![device(1)],
        redirdevs: vec![0],
        readdress: Vec::new(),
        controller: true,
        relocate: vec![(0, device(2))],
        refusal: Some("no".into()),
    }
}

/// Half a mebibyte of a repeated text: what is quadratic takes minutes on it.
fn much(text: &str) -> String {
    text.repeat((1 << 19) / text.len())
}

#[test]
fn nesting() {
    let nested = |n: usize| domain(&("<a>".repeat(n) + &"</a>".repeat(n)));
    assert!(read(nested(MAX_DEPTH - 1).as_bytes()).is_ok());
    assert_eq!(read(nested(MAX_DEPTH).as_bytes()), Err(XmlError::TooDeep { line: 1 }));
    assert_eq!(read(nested(100_000).as_bytes()), Err(XmlError::TooDeep { line: 1 }));
    assert_eq!(
        read(domain(&"<a>".repeat(1_000_000)).as_bytes()),
        Err(XmlError::TooDeep { line: 1 })
    );
}

#[test]
fn entity_tricks() {
    let mut laughs = "<?xml version='1.0'?>\n<!DOCTYPE lolz [<!ENTITY lol0 'lol'>".to_owned();
    for n in 1..10 {
        laughs += &format!("<!ENTITY lol{n} '{}'>", format!("&lol{};", n - 1).repeat(10));
    }
    laughs += "]><domain><name>&lol9;</name></domain>";
    assert_eq!(read(laughs.as_bytes()), Err(XmlError::Doctype { line: 2 }));
    let external = "<!DOCTYPE d SYSTEM 'file:///etc/passwd'><domain><name>x</name></domain>";
    assert_eq!(read(external.as_bytes()), Err(XmlError::Doctype { line: 1 }));
    assert!(read(b"<domain><name>&lol9;</name></domain>").is_err());
    assert_eq!(read(domain(&much("&amp;")).as_bytes()).unwrap().name, "x");
}

/// As in libvirt's parser, wherever a reference may stand.
#[test]
fn references_to_what_is_no_character() {
    let places: [fn(&str) -> String; 4] = [
        |reference| format!("<domain type='kvm'><name>x{reference}</name></domain>"),
        |reference| format!("<domain type='kvm' id='{reference}'><name>x</name></domain>"),
        |reference| {
            format!(
                "<domain type='kvm'><name>x</name><description>a{reference}b</description></domain>"
            )
        },
        |reference| {
            format!(
                "<domain type='kvm'><name>x</name><devices><hostdev \
                    mode=\"{reference}\"/></devices></domain>"
            )
        },
    ];
    let illegal = [
        0,
        1,
        8,
        0xb,
        0xc,
        0xe,
        0x1b,
        0x1f,
        0xd800,
        0xdbff,
        0xdc00,
        0xdfff,
        0xfffe,
        0xffff,
        0x11_0000,
        u32::MAX,
    ];
    let legal =
        [9, 0xa, 0xd, 0x20, 0x7f, 0x9b, 0xd7ff, 0xe000, 0xfffd, 0x1_0000, 0x1_fffe, 0x10_ffff];
    let spellings =
        |code: u32| [format!("&#{code};"), format!("&#x{code:x};"), format!("&#x000{code:X};")];
    for place in places {
        for reference in illegal.into_iter().flat_map(spellings).chain(
            [
                "&#;",
                "&#x;",
                "&#X41;",
                "&#-1;",
                "&#+65;",
                "&# 65;",
                "&#x110000000041;",
                "&nbsp;",
                "&#xg;",
            ]
            .map(Into::into),
        ) {
            let error = read(place(&reference).as_bytes()).expect_err(&reference).to_string();
            assert!(error.starts_with("line 1: "), "{reference}: {error}");
        }
        for reference in legal.into_iter().flat_map(spellings) {
            read(place(&reference).as_bytes()).expect(&reference);
        }
    }
    for raw in ["\u{fffe}", "\u{ffff}", "\u{1}"] {
        assert!(read(places[0](raw).as_bytes()).is_err(), "{raw:?}");
    }
    read(places[0]("\u{fffd}\u{ff21}").as_bytes()).unwrap();
}

#[test]
fn size() {
    let size = 100 << 20;
    assert_eq!(read(&vec![b'<'; size]), Err(XmlError::TooLarge { size }));
    let padding = MAX_XML - domain("").len();
    assert!(read(domain(&" ".repeat(padding)).as_bytes()).is_ok());
    assert_eq!(
        read(domain(&" ".repeat(padding + 1)).as_bytes()),
        Err(XmlError::TooLarge { size: MAX_XML + 1 })
    );
}

#[test]
fn many_of_everything() {
    let fine = [
        much("<a/>"),
        much("<!-- - - -->"),
        much("<?a b?>"),
        much("<![CDATA[]]>"),
        format!(
            "<metadata>{}</metadata>",
            much("<a:b xmlns:a='urn:virt-usb:flavor:2' xmlns:b='c'/>")
        ),
        format!("<metadata>{}</metadata>", much("<a>b</a>")),
        format!("<title>{}</title>", much("x")),
        format!("<a b='{}'/>", much("&lt;")),
        format!(
            "<devices><disk>{}</disk></devices>",
            much("<alias name='x'/><source><vendor/></source>")
        ),
        format!("<devices>{}</devices>", much("<disk><source/><target bus='sata'/></disk>")),
    ];
    for inside in fine {
        let xml = domain(&inside);
        assert!(read(xml.as_bytes()).is_ok(), "{}", &xml[..80]);
        rewrite(xml.as_bytes(), &Edits { relocate: vec![], ..edits() }).unwrap();
    }
    let name: String = (0..300_000).map(|i| format!(" a{i}=''")).collect();
    assert_eq!(
        read(domain(&format!("<a{name}/>")).as_bytes()),
        Err(XmlError::TooManyAttributes { line: 1 })
    );
    let some: String = (0..255).map(|i| format!(" xmlns:a{i}='urn:virt-usb:flavor:1'")).collect();
    let bound = format!("<metadata{some}>{}</metadata>", much("<a7:b><a0:c/></a7:b>"));
    assert!(read(domain(&bound).as_bytes()).is_err());
    for device in [
        "<hostdev type='usb'/>",
        "<controller type='usb'/>",
        "<hub type='usb'/>",
        "<redirdev bus='usb'/>",
    ] {
        let many = |n: usize| domain(&format!("<devices>{}</devices>", device.repeat(n)));
        assert!(read(many(MAX_USB).as_bytes()).is_ok());
        assert_eq!(read(many(MAX_USB + 1).as_bytes()), Err(XmlError::TooManyDevices { line: 1 }));
        read(many(MAX_USB).as_bytes()).unwrap().bus.fit(&[SpeedMask::ANY; 20]);
    }
}

#[test]
fn bytes_that_are_no_text() {
    let invalid = [&b"<domain><name>x</name><!-- "[..], &b"\xff --></domain>"[..]].concat();
    assert_eq!(read(&invalid), Err(XmlError::Malformed { encoding: "UTF-8", offset: 27 }));
    let nul = domain("\0");
    assert!(matches!(read(nul.as_bytes()), Err(XmlError::Syntax { line: 1, .. })));
    assert!(read(&[0; 64]).is_err());
    assert!(read(&[0xff; 64]).is_err());
}

const SAMPLE: &str = "\u{feff}<?xml version='1.0' encoding='UTF-8'?>
<domain type='kvm'>
  <name>erp&amp;co</name>
  <metadata>
    <u:flavor xmlns:u='urn:virt-usb:flavor:1'><![CDATA[{\"usb_devices\":[{\"id\":5}]}]]></u:flavor>
  </metadata>
  <devices>
    <!-- </devices> -->
    <hostdev mode='subsystem' type=\"usb\"><source><vendor id='0x1'/></source></hostdev>
    <disk><target bus='usb'/></disk>
  </devices>
</domain>";

#[test]
fn truncated_at_every_byte() {
    for end in 0..SAMPLE.len() {
        let part = SAMPLE.as_bytes().get(..end).unwrap();
        assert!(read(part).is_err(), "{end}");
        assert!(rewrite(part, &edits()).is_err(), "{end}");
    }
    let whole = read(SAMPLE.as_bytes()).unwrap();
    assert_eq!(whole.flavor, FlavorSource::Metadata("{\"usb_devices\":[{\"id\":5}]}".into()));
    assert!(rewrite(SAMPLE.as_bytes(), &edits()).unwrap().is_some());
}

#[test]
fn one_byte_changed_everywhere() {
    for at in 0..SAMPLE.len() {
        for byte in b"<>&'\"/!-]?=; \0\xff" {
            let mut bytes = SAMPLE.as_bytes().to_vec();
            bytes[at] = *byte;
            if let Ok(Some(written)) = rewrite(&bytes, &edits()) {
                assert_eq!(rewrite(&written, &edits()).unwrap(), None, "{at} {byte}");
            }
        }
    }
}

#[test]
fn messages_do_not_quote_at_length() {
    let long = "x".repeat(1 << 20);
    for xml in [
        format!("<{long}/>"),
        domain(&format!("<uuid>{long}</uuid>")),
        domain(&format!("<a></{long}>")),
        format!("<?xml version='1.0' encoding='{}'?><domain/>", "x".repeat(100)),
        domain("<uuid>\n\u{1b}[31m</uuid>").replace('\u{1b}', "&#x9b;"),
    ] {
        let message = read(xml.as_bytes()).unwrap_err().to_string();
        assert!(message.len() < 300 && message.lines().count() == 1, "{message:?}");
        assert!(!message.contains(char::is_control), "{message:?}");
    }
}
