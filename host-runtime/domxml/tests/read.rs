//! Reading domains of many shapes.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test may panic")]

use virt_usb_domxml::{
    AssignedPort, Domain, Fit, FlavorSource, HostPlace, TooFew, UsbBus, XmlError, read,
};
use virt_usb_model::{BusAddress, Speed, SpeedMask, UsbId};

fn domain(inside: &str) -> String {
    format!("<domain type='kvm'>\n  <name>erp</name>\n{inside}\n</domain>\n")
}

fn metadata(inside: &str) -> FlavorSource {
    read(domain(&format!("<metadata>{inside}</metadata>")).as_bytes()).unwrap().flavor
}

fn devices(inside: &str) -> Domain {
    read(domain(&format!("<devices>{inside}</devices>")).as_bytes()).unwrap()
}

#[track_caller]
fn refused(xml: impl AsRef<[u8]>, message: &str) {
    let error = read(xml.as_ref()).unwrap_err().to_string();
    assert!(error.contains(message), "{error:?} does not say {message:?}");
    assert_eq!(error.lines().count(), 1, "{error:?}");
}

const NOVA: &str = "<nova:instance xmlns:nova='http://openstack.org/xmlns/libvirt/nova/1.1'>";

#[test]
fn name_uuid_and_graphics() {
    let xml = "<?xml version='1.0'?>\n<!-- hi --><domain><!-- <name>no</name> \
        --><metadata><name>no</name></metadata>\
        <name>a&amp;<![CDATA[b<]]>&#x63;</name><uuid> 9A1F3C52-6C1B-4C6E-9B1C-2B6C3A7D8E9F\n</uuid>\
        <devices><graphics type='spice'/></devices></domain><!-- bye --><?bye?>\n";
    let read = read(xml.as_bytes()).unwrap();
    assert_eq!(read.name, "a&b<c");
    assert_eq!(read.uuid.unwrap().to_string(), "9a1f3c52-6c1b-4c6e-9b1c-2b6c3a7d8e9f");
    assert!(read.spice);
    assert_eq!(read.flavor, FlavorSource::None);
}

#[test]
fn documents_that_are_no_domain() {
    refused("", "there is no element in the document");
    refused("<!-- only this -->", "there is no element");
    refused(
        "<domainsnapshot><domain><name>x</name></domain></domainsnapshot>",
        "<domainsnapshot>, not <domain>",
    );
    refused(
        "<domstatus><domain><name>x</name></domain></domstatus>",
        "the root element is <domstatus>",
    );
    refused("<domain/>", "there is no <name>");
    refused("<domain><name></name></domain>", "there is no text in <name>");
    refused("<domain><os><name>x</name></os></domain>", "there is no <name>");
    refused("<domain><name>a</name>\n<name>b</name></domain>", "line 2: a second <name>");
    refused(domain("<uuid>12</uuid>"), "line 3: <uuid> is \"12\", not a UUID");
    let uuid = "<uuid>9a1f3c52-6c1b-4c6e-9b1c-2b6c3a7d8e9f</uuid>";
    refused(domain(&format!("{uuid}{uuid}")), "a second <uuid>");
    refused(domain("<devices/><devices/>"), "a second <devices>");
    refused(domain("<metadata/><metadata/>"), "a second <metadata>");
}

#[test]
fn documents_that_are_no_xml() {
    refused(domain("<a>"), "expected `</a>`");
    refused(domain("</a>"), "line 3: ");
    refused("<domain><name>x</name>", "the document ends inside an element");
    refused(format!("{}x", domain("")), "line 5: text outside the root element");
    refused(format!("{}<![CDATA[x]]>", domain("")), "text outside");
    refused(format!("{}&amp;", domain("")), "text outside");
    refused(format!("x{}", domain("")), "line 1: text outside the root element");
    refused(format!("{}<domain/>", domain("")), "a second root element");
    refused(format!("\n<?xml version='1.0'?>{}", domain("")), "not at the start");
    refused(domain("<a b='1' b='2'/>"), "an attribute that is there twice");
    refused(domain("<a b='1'c='2'/>"), "without a blank before it");
    refused(domain("<a b=1/>"), "without quotes");
    refused(domain("<a b/>"), "without a value");
    refused(domain("<devices b='</devices>'/>"), "a < in an attribute value");
    refused(domain("<a b='&nbsp;'/>"), "an entity that is not known");
    refused(domain("&nbsp;"), "an entity that is not known");
    refused(domain("&#0;"), "an entity that is not known");
    refused(domain("a & b"), "line 3: ");
    refused(domain("<1/>"), "whose name is not a name");
    refused(domain("<a<b/>"), "whose name is not a name");
    refused(domain("<!-- a -- b -->"), "line 3: ");
    refused(domain("\u{1}"), "line 3: the control character 0x01");
    refused("<!DOCTYPE domain><domain><name>x</name></domain>", "line 1: a DOCTYPE");
}

#[test]
fn our_own_metadata_wins() {
    let json = r#"{"usb_devices":[{"id":5}]}"#;
    for element in [
        format!("<u:flavor xmlns:u='urn:virt-usb:flavor:1'>\n {json}\n</u:flavor>"),
        format!("<flavor xmlns=\"urn:virt-usb:flavor:1\">{}</flavor>", json.replace('"', "&quot;")),
        format!("<f:x xmlns:f='urn:virt-usb:flavor:&#49;'><![CDATA[{json}]]><!-- c --></f:x>"),
        format!(
            "{NOVA}<nova:flavor name='m1'/></nova:instance><f \
                xmlns='urn:virt-usb:flavor:1'>{json}</f>"
        ),
    ] {
        assert_eq!(metadata(&element), FlavorSource::Metadata(json.to_owned()), "{element}");
    }
    let inherited = format!(
        "<domain xmlns:u='urn:virt-usb:flavor:1'><metadata><a \
            xmlns:u='urn:x'/><u:flavor>{json}</u:flavor></metadata>\
         <name>x</name></domain>"
    );
    assert_eq!(read(inherited.as_bytes()).unwrap().flavor, FlavorSource::Metadata(json.to_owned()));
}

#[test]
fn our_own_metadata_may_name_a_flavor() {
    let ours = |rest: &str| format!("<u:flavor xmlns:u='urn:virt-usb:flavor:1' {rest}");
    assert_eq!(metadata(&ours("name='erp'/>")), FlavorSource::Metadata("@erp".into()));
    assert_eq!(metadata(&ours("name='erp'>\n</u:flavor>")), FlavorSource::Metadata("@erp".into()));
    assert_eq!(metadata(&ours("/>")), FlavorSource::None);
    refused(domain(&format!("<metadata>{}</metadata>", ours("name=''/>"))), "not a name");
    refused(
        domain(&format!("<metadata>{}</metadata>", ours("name='a'>{}</u:flavor>"))),
        "keep one of them",
    );
    refused(
        domain(&format!("<metadata>{}</metadata>", ours("><b/></u:flavor>"))),
        "<b> in the flavor's metadata",
    );
    refused(domain(&format!("<metadata>{0}{0}</metadata>", ours("/>"))), "a second flavor element");
}

#[test]
fn metadata_that_only_looks_like_ours() {
    for element in [
        "<u:flavor>{}</u:flavor>",
        "<u:flavor xmlns:u='urn:virt-usb:flavor:2'>{}</u:flavor>",
        "<a xmlns:u='urn:virt-usb:flavor:1'><u:flavor>{}</u:flavor></a>",
        "<a xmlns:u='urn:virt-usb:flavor:1'/><u:flavor>{}</u:flavor>",
        "<u:a xmlns:u='urn:x'><u:b/></u:a>",
        "<nova:instance><nova:flavor name='x'/></nova:instance>",
        "<nova:flavor xmlns:nova='http://openstack.org/xmlns/libvirt/nova/1.1' name='x'/>",
    ] {
        assert_eq!(metadata(element), FlavorSource::None, "{element}");
    }
    let elsewhere = domain("<u:flavor xmlns:u='urn:virt-usb:flavor:1'>{}</u:flavor>");
    assert_eq!(read(elsewhere.as_bytes()).unwrap().flavor, FlavorSource::None);
}

fn specs(inside: &str) -> String {
    format!(
        "{NOVA}<nova:flavor name='m1' \
            id='4'><nova:extraSpecs>{inside}</nova:extraSpecs></nova:flavor></nova:instance>"
    )
}

fn spec(key: &str, value: &str) -> String {
    format!("<nova:extraSpec name='{key}'>{value}</nova:extraSpec>")
}

#[test]
fn nova_extra_specs_in_both_spellings() {
    let some = |devices: Option<&str>, redirection: Option<&str>| FlavorSource::ExtraSpecs {
        devices: devices.map(str::to_owned),
        redirection: redirection.map(str::to_owned),
    };
    assert_eq!(metadata(&specs(&spec("usb:devices", "[1]"))), some(Some("[1]"), None));
    assert_eq!(metadata(&specs(&spec("usb_devices", " @erp\n"))), some(Some("@erp"), None));
    let two = spec("usb:redirection_devices", "[{&quot;bus&quot;:1}]")
        + &spec("hw:x", "1")
        + &spec("usb_devices", "[]");
    assert_eq!(metadata(&specs(&two)), some(Some("[]"), Some("[{\"bus\":1}]")));
    let same = spec("usb:devices", "[1]") + &spec("usb_devices", "[1]");
    assert_eq!(metadata(&specs(&same)), some(Some("[1]"), None));
    let differ = specs(&(spec("usb:devices", "[1]") + &spec("usb_devices", "[2]")));
    refused(
        domain(&format!("<metadata>{differ}</metadata>")),
        "usb:devices and the extra spec usb_devices are both",
    );
}

#[test]
fn nova_that_has_extra_specs_has_said_everything() {
    assert_eq!(metadata(&specs("")), FlavorSource::None);
    assert_eq!(metadata(&specs(&spec("hw:cpu_policy", "shared"))), FlavorSource::None);
    let empty = "<nova:flavor name='m1'><nova:extraSpecs/></nova:flavor></nova:instance>";
    assert_eq!(metadata(&format!("{NOVA}{empty}")), FlavorSource::None);
    let old = "<n:instance xmlns:n='http://openstack.org/xmlns/libvirt/nova/1.0'><n:flavor \
        name='m1'/></n:instance>";
    assert_eq!(metadata(old), FlavorSource::Named("m1".into()));
}

#[test]
fn nova_names_the_project() {
    let owner = "<nova:owner><nova:user uuid='u'>x</nova:user><nova:project \
        uuid='9a1f'>p</nova:project></nova:owner>";
    let xml = domain(&format!("<metadata>{NOVA}{owner}</nova:instance></metadata>"));
    assert_eq!(read(xml.as_bytes()).unwrap().project.unwrap().as_str(), "9a1f");
    let xml = xml.replace("'9a1f'", "'a b'");
    refused(xml, "the project of nova:owner is \"a b\"");
}

#[test]
fn hostdevs_and_redirdevs() {
    let read = devices(
        "<hostdev mode='subsystem' type='usb' managed='yes'>
          <source startupPolicy='optional'><vendor id='0x0529'/><product id='1'/><address \
          bus='010' device='0x1f'/></source>
          <alias name='ua-usb-5'/>
         </hostdev>
         <hostdev mode='subsystem' type='pci'><source><address bus='1' \
         device='2'/></source></hostdev>
         <hostdev type='usb'><alias name='ua-usb-05'/></hostdev>
         <hostdev mode='subsystem' type='usb'><source><address bus='0' \
         device='0'/></source></hostdev>
         <redirdev bus='usb' type='spicevmc'><alias name='ua-usb-redir-0'/></redirdev>
         <redirdev bus='usb' type='tcp'><source mode='connect'/><source mode='bind'/><alias \
         name='redir1'/></redirdev>",
    );
    let [ours, other, unresolved] = &read.hostdevs[..] else { panic!("{:?}", read.hostdevs) };
    assert_eq!(ours.usb, Some(UsbId::new(0x0529, 1)));
    assert_eq!(ours.address, BusAddress::new(8, 31));
    assert_eq!(ours.injected().unwrap().get(), 5);
    assert!(ours.has_startup_policy);
    assert_eq!((other.usb, other.address, other.injected()), (None, None, None));
    assert_eq!(unresolved.address, None);
    let [spice, tcp] = &read.redirdevs[..] else { panic!("{:?}", read.redirdevs) };
    assert_eq!((spice.kind.as_str(), spice.injected()), ("spicevmc", Some(0)));
    assert_eq!((tcp.kind.as_str(), tcp.injected()), ("tcp", None));
    let twice = "<hostdev type='usb'><source/>\n<source/></hostdev>";
    refused(
        domain(&format!("<devices>{twice}</devices>")),
        "line 4: a second <source> in a USB hostdev",
    );
}

#[test]
fn only_the_domains_own_devices_count() {
    let usb = "<hostdev mode='subsystem' type='usb'/>";
    let read = read(
        domain(&format!(
            "<metadata><devices>{usb}</devices></metadata><x><devices>{usb}</devices></x>
             <devices><!-- {usb} --><![CDATA[{usb}]]><backup>{usb}</backup><q:hostdev type='usb' \
             xmlns:q='q'/>
             <disk name='&lt;/devices>' type=\">/devices>\"><source>{usb}</source></disk></devices>"
        ))
        .as_bytes(),
    )
    .unwrap();
    assert_eq!(read.hostdevs, []);
}

#[test]
fn encodings() {
    let utf8 = domain("<title>Ümläut</title>").replace("<name>erp", "<name>Ü");
    let units: Vec<u16> = "\u{feff}".encode_utf16().chain(utf8.encode_utf16()).collect();
    let little: Vec<u8> = units.iter().flat_map(|u| u.to_le_bytes()).collect();
    let big: Vec<u8> = units.iter().flat_map(|u| u.to_be_bytes()).collect();
    let latin = |name: &str| {
        let declared = format!("<?xml version='1.0' encoding='{name}'?>{utf8}");
        declared.chars().map(|c| u8::try_from(u32::from(c)).unwrap()).collect::<Vec<u8>>()
    };
    let bom = format!("\u{feff}<?xml version='1.0' encoding='utf-8'?>{utf8}").into_bytes();
    for xml in [
        utf8.clone().into_bytes(),
        bom,
        little,
        big,
        latin("ISO-8859-1"),
        latin("windows-1252"),
        latin("ISO-8859-15"),
    ] {
        assert_eq!(read(&xml).unwrap().name, "Ü");
    }
    refused(latin("UTF-8"), "invalid UTF-8 at byte 66");
    refused(latin("us-ascii"), "invalid US-ASCII at byte 69");
    refused(latin("EUC-JP"), "the encoding \"EUC-JP\" is not supported");
    refused(latin("UTF-16"), "UTF-16 without a byte order mark");
    refused(latin("iso-8859-12"), "not supported");
    refused(
        format!("\u{feff}<?xml version='1.0' encoding='latin1'?>{utf8}"),
        "the byte order mark says UTF-8",
    );
    refused(format!("\u{feff}\u{feff}{utf8}"), "a second byte order mark");
    refused(b"\xff\xfe<\0a", "invalid UTF-16 at byte 4");
    refused(b"\xff\xfe<\0\x00\xd8", "invalid UTF-16 at byte 4");
    refused(b"<\0d\0", "UTF-16 without");
    refused(b"\xff\xfe\0\0<\0\0\0", "UTF-32");
}

/// The fit of one domain, as a line of text.
fn bus(machine: &str, devices: &str) -> UsbBus {
    let os = format!("<os><type {machine}>hvm</type></os>");
    read(domain(&format!("{os}<devices>{devices}</devices>")).as_bytes()).unwrap().bus
}

fn fit(machine: &str, devices: &str, wants: &[SpeedMask]) -> Fit {
    bus(machine, devices).fit(wants)
}

const Q35: &str = "arch='x86_64' machine='pc-q35-9.0'";
const PC: &str = "arch='x86_64' machine='pc-i440fx-9.0'";
const ANY: SpeedMask = SpeedMask::ANY;
const LOW: SpeedMask = SpeedMask::new(&[Speed::Low]);
const FULL: SpeedMask = SpeedMask::new(&[Speed::Full]);
/// A device that QEMU does not slow down: a camera.
const HIGH: SpeedMask = SpeedMask::new(&[Speed::High]);
/// A device that QEMU slows down: a licence key.
const SLOWED: SpeedMask = SpeedMask::new(&[Speed::High, Speed::Full]);
const SUPER: SpeedMask = SpeedMask::new(&[Speed::Super]);

fn few(needed: usize, free: usize, wants: SpeedMask) -> Fit {
    let speed = wants.slowest().filter(|_| wants != ANY);
    Fit::TooFew(TooFew { needed, free, speed })
}

#[test]
fn the_default_controller_follows_the_machine() {
    assert_eq!(fit(Q35, "", &[SUPER; 4]), Fit::Fits);
    assert_eq!(fit(Q35, "", &[FULL; 5]), Fit::NeedsController);
    assert_eq!(fit(Q35, "", &[ANY; 16]), few(16, 15, ANY));
    assert_eq!(fit(PC, "", &[FULL, LOW]), Fit::Fits);
    assert_eq!(fit(PC, "", &[HIGH]), Fit::NeedsController);
    assert_eq!(fit(PC, "", &[SLOWED, SLOWED]), Fit::Fits);
    assert_eq!(fit("", "", &[FULL]), Fit::Fits);
    assert_eq!(fit(PC, "<input type='tablet' bus='usb'/>", &[ANY, ANY]), Fit::NeedsController);
    let bare = |arch: &str, machine: &str| {
        let os = format!("arch='{arch}' machine='{machine}'");
        (fit(&os, "", &[FULL]), fit(&os, "<controller type='usb' model='qemu-xhci'/>", &[FULL]))
    };
    for (arch, machine) in [
        ("aarch64", "virt"),
        ("aarch64", "virt-9.0"),
        ("aarch64", ""),
        ("armv7l", "virt-7.2"),
        ("riscv64", "virt"),
        ("riscv32", "virt"),
        ("loongarch64", "virt"),
        ("ppc64", "pseries"),
        ("ppc64le", "pseries-7.2"),
        ("s390x", "s390-ccw-virtio"),
        ("sparc64", "sun4u"),
        ("alpha", ""),
    ] {
        assert_eq!(bare(arch, machine), (Fit::NoController, Fit::Fits), "{arch} {machine}");
    }
    for (arch, machine) in [
        ("x86_64", "isapc"),
        ("i686", "isapc"),
        ("x86_64", "microvm"),
        ("aarch64", "raspi3b"),
        ("armv7l", "vexpress-a9"),
        ("riscv64", "sifive_u"),
    ] {
        assert_eq!(bare(arch, machine).0, Fit::NoPci, "{arch} {machine}");
    }
    assert_eq!(bare("armv6l", "versatilepb").0, Fit::Fits);
    assert_eq!(fit("arch='aarch64' machine='virt'", "", &[ANY; 16]), few(16, 15, ANY));
    assert_eq!(fit("arch='s390x' machine='s390-ccw-virtio'", "", &[]), Fit::Fits);
    assert_eq!(fit("arch='s390x'", "<controller type='usb'/>", &[FULL]), Fit::NoUsb);
    assert_eq!(
        fit("arch='ppc64'", "<controller type='usb'/>", &[FULL, FULL, HIGH]),
        few(1, 0, HIGH)
    );
}

#[test]
fn controllers_have_ports_of_their_speed() {
    let controller =
        |model: &str, rest: &str| format!("<controller type='usb' {rest} model='{model}'/>");
    let declared = |devices: &str, wants: &[SpeedMask]| fit(Q35, devices, wants);
    let none = controller("none", "");
    assert_eq!(declared(&none, &[FULL]), Fit::NoUsb);
    assert_eq!(declared(&none, &[]), Fit::Fits);
    assert_eq!(declared(&controller("qemu-xhci", ""), &[SUPER; 5]), few(5, 4, SUPER));
    assert_eq!(declared(&controller("qemu-xhci", "ports='15'"), &[SUPER; 15]), Fit::Fits);
    assert_eq!(declared(&controller("nec-xhci", "ports='99'"), &[SUPER; 16]), few(16, 15, SUPER));
    assert_eq!(declared(&controller("piix3-uhci", ""), &[FULL; 3]), few(3, 2, FULL));
    assert_eq!(declared(&controller("piix3-uhci", ""), &[FULL, HIGH]), few(1, 0, HIGH));
    assert_eq!(declared("<controller type='usb' index='0'/>", &[HIGH]), few(1, 0, HIGH));
    assert_eq!(declared(&controller("pci-ohci", ""), &[LOW, FULL, ANY]), Fit::Fits);
    assert_eq!(declared(&controller("ehci", ""), &[HIGH; 6]), Fit::Fits);
    assert_eq!(declared(&controller("ehci", ""), &[FULL]), few(1, 0, FULL));
    assert_eq!(declared(&controller("ehci", ""), &[SUPER]), few(1, 0, SUPER));
    assert_eq!(declared(&controller("qusb2", "ports='3'"), &[HIGH, FULL, LOW]), Fit::Fits);
    assert_eq!(declared(&controller("from-the-future", ""), &[SUPER; 4]), Fit::Fits);
}

#[test]
fn companions_serve_the_ports_of_their_ehci() {
    let ich9 = |uhcis: &[&str]| {
        let uhci = |u: &&str| format!("<controller type='usb' index='0' model='ich9-uhci{u}'/>");
        format!(
            "<controller type='usb' index='0' model='ich9-ehci1'/>{}",
            uhcis.iter().map(uhci).collect::<String>()
        )
    };
    assert_eq!(fit(PC, &ich9(&["1", "2", "3"]), &[HIGH, FULL, LOW, FULL, HIGH, ANY]), Fit::Fits);
    assert_eq!(fit(PC, &ich9(&["1", "2", "3"]), &[FULL; 7]), few(7, 6, FULL));
    assert_eq!(fit(PC, &ich9(&["2"]), &[FULL, FULL, HIGH, HIGH, HIGH, HIGH]), Fit::Fits);
    assert_eq!(fit(PC, &ich9(&["2"]), &[FULL; 3]), few(3, 2, FULL));
    let placed = ich9(&[])
        + "<controller type='usb' index='0' model='ich9-uhci1'><master startport='4'/></controller>\
           <input type='tablet' bus='usb'><address type='usb' bus='0' port='5'/></input>";
    assert_eq!(fit(PC, &placed, &[FULL, FULL]), few(2, 1, FULL));
    assert_eq!(
        fit(PC, "<controller type='usb' index='0' model='ich9-uhci1'/>", &[FULL]),
        few(1, 0, FULL)
    );
}

#[test]
fn everything_on_usb_occupies_a_port() {
    let xhci = "<controller type='usb' index='0' model='qemu-xhci' ports='1'/>";
    for device in [
        "<input type='tablet' bus='usb'/>",
        "<input type='tablet'/>",
        "<disk type='file'><target dev='sda' bus='usb'/></disk>",
        "<hostdev mode='subsystem' type='usb'/>",
        "<redirdev bus='usb' type='tcp'/>",
        "<hub type='usb'/><input type='tablet' bus='usb'><address type='usb' bus='0' \
            port='1.1'/></input>",
        "<smartcard mode='host'/>",
        "<controller type='ccid' index='0'/><smartcard mode='host'/>",
        "<serial type='pty'><target type='usb-serial'><model name='usb-serial'/></target></serial>",
        "<serial type='pty'><target type='usb'/></serial>",
        "<console type='pty'><target type='usb'/></console>",
        "<sound model='usb'/>",
        "<interface type='user'><model type='usb-net'/></interface>",
    ] {
        assert_eq!(fit(Q35, &format!("{xhci}{device}"), &[HIGH]), few(1, 0, HIGH), "{device}");
    }
    for device in [
        "<input type='mouse' bus='ps2'/>",
        "<input type='mouse'/>",
        "<disk type='file'><target dev='sda' bus='scsi'/></disk>",
        "<hostdev mode='subsystem' type='pci'/>",
        "<serial type='pty'><target type='isa-serial'/></serial>",
        "<sound model='ich9'/>",
        "<interface type='user'><model type='virtio'/></interface>",
        "<input type='tablet' bus='usb'><address type='usb' bus='7' port='1'/></input>",
        "<input type='tablet' bus='usb'><address type='usb' bus='0' port='9'/></input>",
    ] {
        assert_eq!(fit(Q35, &format!("{xhci}{device}"), &[HIGH]), Fit::Fits, "{device}");
    }
}

#[test]
fn hubs_take_a_port_and_give_eight_slow_ones() {
    let hub = "<controller type='usb' index='0' model='qemu-xhci' ports='1'/><hub type='usb'/>";
    assert_eq!(fit(Q35, hub, &[FULL; 8]), Fit::Fits);
    assert_eq!(fit(Q35, hub, &[FULL; 9]), few(9, 8, FULL));
    assert_eq!(fit(Q35, hub, &[HIGH]), few(1, 0, HIGH));
    let behind = "<controller type='usb' index='0' model='qemu-xhci' ports='2'/>\
        <hub type='usb'><address type='usb' bus='0' port='1.2'/></hub>\
        <hub type='usb'><address type='usb' bus='0' port='1'/></hub>\
        <input type='tablet' bus='usb'><address type='usb' bus='0' port='1.2.3'/></input>";
    // Port 2, seven on the outer hub, seven on the inner one.
    assert_eq!(fit(Q35, behind, &[FULL; 15]), Fit::Fits);
    assert_eq!(fit(Q35, behind, &[FULL; 16]), few(16, 15, FULL));
    assert_eq!(fit(Q35, behind, &[HIGH, HIGH]), few(2, 1, HIGH));
}

#[test]
fn two_controllers() {
    let two = "<controller type='usb' index='1' model='qemu-xhci'/><controller type='usb' \
        index='0' model='piix3-uhci'/>\
        <input type='tablet' bus='usb'><address type='usb' bus='1' port='1'/></input>\
        <input type='keyboard' bus='usb'/>";
    assert_eq!(fit(PC, two, &[HIGH, HIGH, HIGH, FULL]), Fit::Fits);
    assert_eq!(fit(PC, two, &[HIGH, HIGH, HIGH, HIGH]), few(4, 3, HIGH));
    assert_eq!(fit(PC, two, &[HIGH, HIGH, FULL, FULL, ANY]), few(5, 4, ANY));
    assert_eq!(fit(PC, two, &[SLOWED, SLOWED, HIGH, SLOWED]), Fit::Fits);
}

#[test]
fn a_port_is_named_where_the_first_free_one_does_not_serve() {
    let places = |machine, devices: &str, wants: &[SpeedMask]| -> Vec<String> {
        let shown = |place: AssignedPort| {
            let speed = place.speeds.fastest().unwrap();
            place.port.map_or_else(|| speed.to_string(), |port| format!("{speed} at {port}"))
        };
        bus(machine, devices).place(wants).into_iter().map(shown).collect()
    };
    assert_eq!(places(PC, "", &[SLOWED, FULL, FULL]), ["full", "full"], "the default controller");
    assert_eq!(places(Q35, "", &[SUPER]), ["super"]);
    assert_eq!(places("arch='aarch64' machine='virt'", "", &[FULL]), [""; 0]);
    let two = "<controller type='usb' index='0' model='piix3-uhci'/>\
        <controller type='usb' index='1' model='qemu-xhci'/>\
        <input type='tablet' bus='usb'><address type='usb' bus='1' port='1'/></input>";
    assert_eq!(
        places(PC, two, &[HIGH, FULL, SUPER]),
        ["super at bus='1' port='2'", "full", "super at bus='1' port='3'"]
    );
    assert_eq!(places(PC, two, &[SLOWED; 3]), ["full", "full", "super"]);
    let hub = "<controller type='usb' index='0' model='ehci'/><hub type='usb'/>";
    assert_eq!(places(PC, hub, &[FULL, HIGH, LOW])[..1], ["full at bus='0' port='1.1'"]);
}

#[test]
fn advice_knows_the_controllers_that_are_there() {
    let facts = |devices| {
        let bus = bus(PC, devices);
        (bus.has_xhci(), bus.spare_xhci_ports(), bus.next_index())
    };
    assert_eq!(
        facts("<controller type='usb' index='0' model='qemu-xhci' ports='15'/>"),
        (true, 0, 1)
    );
    assert_eq!(facts("<controller type='usb' model='nec-xhci'/>"), (true, 11, 1));
    assert_eq!(facts("<controller type='usb' index='0' model='piix3-uhci'/>"), (false, 0, 1));
    assert_eq!(
        facts("<controller type='usb' index='1' model='qemu-xhci' ports='8'/>"),
        (true, 7, 0)
    );
    let ich9 = "<controller type='usb' index='0' model='ich9-ehci1'/>\
        <controller type='usb' index='0' model='ich9-uhci1'/>";
    assert_eq!(facts(ich9), (false, 0, 1));
    assert_eq!(facts(""), (false, 0, 0));
    assert_eq!(bus("arch='aarch64' machine='virt'", "").machine(), "aarch64 virt");
}

#[test]
fn errors_are_typed() {
    assert!(matches!(read(b"<domain"), Err(XmlError::Syntax { line: 1, .. })));
    assert!(matches!(
        read(&vec![b' '; virt_usb_domxml::MAX_XML + 1]),
        Err(XmlError::TooLarge { .. })
    ));
}

#[test]
fn a_hostdev_may_name_a_port_of_the_host_or_nothing() {
    let source = |inside: &str| {
        let xml = format!(
            "<domain><name>x</name><devices><hostdev mode='subsystem' \
                type='usb'><source>{inside}</source></hostdev></devices></domain>"
        );
        let hostdev = read(xml.as_bytes()).unwrap().hostdevs.remove(0);
        let port = hostdev.port.as_ref().map(ToString::to_string);
        assert_eq!(
            hostdev.names_a_device(),
            hostdev.usb.is_some() || hostdev.address.is_some() || port.is_some()
        );
        (hostdev.address.map(|a| a.to_string()), port)
    };
    let some = |text: &str| Some(text.to_owned());
    assert_eq!(source("<address bus='1' port='1.2.5'/>"), (None, some("1-1.2.5")));
    assert_eq!(source("<address bus='2' port='3' device='9'/>"), (some("usb_2_9"), some("2-3")));
    for nothing in [
        "",
        "<address bus='1'/>",
        "<address port='1'/>",
        "<address bus='1' port='1.'/>",
        "<address bus='1' port='x'/>",
        "<address bus='1' port='0'/>",
        "<vendor id='0x529'/>",
    ] {
        assert_eq!(source(nothing), (None, None), "{nothing}");
    }
}

#[test]
fn devices_on_the_command_line_of_qemu_are_read() {
    let domain = |space: &str, arguments: &str| {
        let xml = format!(
            "<domain xmlns:q='{space}'><name>x</name><devices/>\
                <q:commandline>{arguments}</q:commandline></domain>"
        );
        read(xml.as_bytes()).unwrap()
    };
    const QEMU: &str = "http://libvirt.org/schemas/domain/qemu/1.0";
    let key = "<q:arg value='-device'/><q:arg value='usb-host,hostbus=1,hostport=1.4'/>";
    let two = format!(
        "<q:arg value='-usb'/>{key}<q:env name='A' value='-device'/><q:arg \
            value='--device'/><q:arg \
            value='{{&quot;driver&quot;:&quot;usb-host&quot;,&quot;vendorid&quot;:1321,\
            &quot;productid&quot;:1}}'/>"
    );
    let found = domain(QEMU, &two);
    assert_eq!(found.hostdevs, []);
    let [port, kind] = &found.commandline[..] else { panic!("{found:?}") };
    assert_eq!(port.port.as_ref().unwrap().to_string(), "1-1.4");
    assert_eq!((kind.usb.unwrap().to_string().as_str(), &kind.alias), ("0529:0001", &None));
    assert!(found.has_host_devices());
    // Another namespace, another element, an argument of another option.
    assert_eq!(domain("urn:other", key).commandline, []);
    assert_eq!(domain(QEMU, &key.replace("q:arg", "arg")).commandline, []);
    assert_eq!(domain(QEMU, &key.replace("-device", "-drive")).commandline, []);
    assert_eq!(
        domain(QEMU, "<q:arg value='usb-host,hostbus=1,hostport=1.4'/><q:arg/>").commandline,
        []
    );
}

#[test]
fn what_of_the_host_is_used_is_read() {
    let used = |devices: &str| {
        let domain = read(domain(&format!("<devices>{devices}</devices>")).as_bytes()).unwrap();
        let shown = |place: &HostPlace| match place {
            HostPlace::Path(path) => path.clone(),
            HostPlace::Network(name) => format!("net {name}"),
            HostPlace::ScsiHost(name) => format!("scsi {name}"),
        };
        let all = domain.host_sources.iter().map(|s| format!("{}: {}", s.what, shown(&s.place)));
        all.collect::<Vec<_>>().join("; ")
    };
    for (devices, shown) in [
        (
            "<disk type='block'><source dev='/dev/sdb'/><target dev='vda'/></disk>",
            "disk vda: /dev/sdb",
        ),
        (
            "<disk type='block' device='lun'><target dev='sda' bus='scsi'/><source \
                dev='/dev/disk/by-id/usb-K'/></disk>",
            "disk sda: /dev/disk/by-id/usb-K",
        ),
        (
            "<disk type='file'><source file='/dev/sdb1'/><target dev='vda'/></disk>",
            "disk vda: /dev/sdb1",
        ),
        ("<disk type='file'><source file='/var/lib/a.qcow2'/><target dev='vda'/></disk>", ""),
        ("<disk type='network'><source protocol='rbd' name='a/b'/><target dev='vda'/></disk>", ""),
        ("<disk type='block' device='cdrom'><target dev='sda'/></disk>", ""),
        (
            "<serial type='dev'><source path='/dev/ttyUSB0'/><target type='isa-serial' \
                port='0'/></serial>",
            "serial 0: /dev/ttyUSB0",
        ),
        ("<serial type='pty'><source path='/dev/pts/3'/><target port='0'/></serial>", ""),
        ("<parallel type='dev'><source path='/dev/usb/lp0'/></parallel>", "parallel: /dev/usb/lp0"),
        ("<console type='dev'><source path='/dev/ttyACM0'/></console>", "console: /dev/ttyACM0"),
        ("<channel type='dev'><source path='/dev/ttyACM0'/></channel>", "channel: /dev/ttyACM0"),
        (
            "<smartcard mode='passthrough' type='dev'><source path='/srv/reader'/></smartcard>",
            "smartcard: /srv/reader",
        ),
        (
            "<input type='evdev'><source dev='/dev/input/event5'/></input>",
            "input: /dev/input/event5",
        ),
        (
            "<input type='passthrough' bus='virtio'><source evdev='/dev/input/event5'/></input>",
            "input: /dev/input/event5",
        ),
        ("<input type='tablet' bus='usb'/>", ""),
        (
            "<rng model='virtio'><backend model='random'> /dev/ttyACM1 </backend></rng>",
            "rng: /dev/ttyACM1",
        ),
        (
            "<rng model='virtio'><backend model='egd' type='udp'><source \
                mode='bind'/></backend></rng>",
            "",
        ),
        (
            "<interface type='direct'><source dev='enx0' mode='bridge'/></interface>",
            "interface: net enx0",
        ),
        ("<interface type='bridge'><source bridge='br0'/></interface>", ""),
        (
            "<hostdev mode='subsystem' type='scsi'><source><adapter name='scsi_host6'/><address \
                bus='0' target='0' unit='0'/></source></hostdev>",
            "hostdev: scsi host6",
        ),
        (
            "<hostdev mode='subsystem' type='scsi'><source protocol='iscsi' name='iqn'/></hostdev>",
            "",
        ),
        (
            "<hostdev mode='subsystem' type='usb'><source><address bus='1' \
                device='2'/></source></hostdev>",
            "",
        ),
    ] {
        assert_eq!(used(devices), shown, "{devices}");
    }
}
