//! Documents made to hurt: each ends in an error or an answer, within memory and time that grow with their size only.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test may panic")]

use virt_usb_domxml::{Edits, FlavorSource, Hostdev, MAX_DEPTH, MAX_USB, MAX_XML, XmlError, read, rewrite};
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
    assert_eq!(read(domain(&"<a>".repeat(1_000_000)).as_bytes()), Err(XmlError::TooDeep { line: 1 }));
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
        format!("<metadata>{}</metadata>", much("<a:b xmlns:a='urn:virt-usb:flavor:2' xmlns:b='c'/>")),
        format!("<metadata>{}</metadata>", much("<a>b</a>")),
        format!("<title>{}</title>", much("x")),
        format!("<a b='{}'/>", much("&lt;")),
        format!("<devices><disk>{}</disk></devices>", much("<alias name='x'/><source><vendor/></source>")),
        format!("<devices>{}</devices>", much("<disk><source/><target bus='sata'/></disk>")),
    ];
    for inside in fine {
        let xml = domain(&inside);
        assert!(read(xml.as_bytes()).is_ok(), "{}", &xml[..80]);
        rewrite(xml.as_bytes(), &Edits { relocate: vec![], ..edits() }).unwrap();
    }
    let name: String = (0..300_000).map(|i| format!(" a{i}=''")).collect();
    assert_eq!(read(domain(&format!("<a{name}/>")).as_bytes()), Err(XmlError::TooManyAttributes { line: 1 }));
    let some: String = (0..255).map(|i| format!(" xmlns:a{i}='urn:virt-usb:flavor:1'")).collect();
    let bound = format!("<metadata{some}>{}</metadata>", much("<a7:b><a0:c/></a7:b>"));
    assert!(read(domain(&bound).as_bytes()).is_err());
    for device in
        ["<hostdev type='usb'/>", "<controller type='usb'/>", "<hub type='usb'/>", "<redirdev bus='usb'/>"]
    {
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
