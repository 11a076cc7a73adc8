//! Discovery through the real libusb, over device trees that umockdev shows in place of `/sys` and
//! `/dev`.
//!
//! Each test starts this program again under `umockdev-run`, for itself alone; there it looks and
//! judges. `/proc` is not redirected: the tests bring their own.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test's helpers fail the test")]

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::process::Command;

use virt_usb::discovery::{LibUsb, Snapshot, UsbSource};
use virt_usb_config::Config;
use virt_usb_config::sysfs::at_port;
use virt_usb_model::{BusAddress, Class, Device, Serial, Speed};

/// Set for the second run: the folder in which the test may write.
const UNDER: &str = "VIRT_USB_TEST_UNDER_UMOCKDEV";

/// Runs `judge` in a process that sees the described devices. `name` is the test's own name.
fn under(name: &str, description: &str, verifier: impl FnOnce(&Path)) {
    if let Some(folder) = std::env::var_os(UNDER) {
        return verifier(Path::new(&folder));
    }
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("devices.umockdev");
    fs::write(&file, description).unwrap();
    let again = Command::new("umockdev-run")
        .arg("-d")
        .arg(&file)
        .arg("--")
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", name, "--nocapture"])
        .env(UNDER, folder.path())
        .output();
    let output = match again {
        Err(e) if e.kind() == ErrorKind::NotFound => {
            panic!("umockdev-run is not installed: run `make deps`")
        }
        run => run.unwrap(),
    };
    let text = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && text.contains("1 passed"), "{text}");
}

/// A path in the file system that umockdev shows as `/`, where tests remove files.
fn shown(path: &str) -> PathBuf {
    Path::new(&std::env::var_os("UMOCKDEV_DIR").unwrap()).join(path)
}

/// Looks at `/sys`, with `mountinfo` as what is mounted.
fn look(folder: &Path, mountinfo: &str) -> Snapshot {
    fs::create_dir_all(folder.join("proc/self")).unwrap();
    fs::write(folder.join("proc/self/mountinfo"), mountinfo).unwrap();
    LibUsb::new(&Config { procfs_root: folder.join("proc"), ..Config::default() }).snapshot()
}

fn ports(devices: &[Device]) -> Vec<String> {
    devices.iter().map(|device| device.key.port.to_string()).collect()
}

fn at<'a>(snapshot: &'a Snapshot, port: &str) -> &'a Device {
    snapshot.devices.iter().find(|device| device.key.port.to_string() == port).unwrap()
}

fn unsure(snapshot: &Snapshot, port: &str) -> bool {
    snapshot.is_unsure(&port.parse().unwrap())
}

/// A device of one vendor-specific interface on bus 1. `strings` holds lines that umockdev takes.
struct Key<'a> {
    port: &'a str,
    number: u8,
    product: u16,
    serial: Option<&'a str>,
    /// Hexadecimal; in place of good ones.
    descriptors: Option<&'a str>,
    /// iManufacturer, iProduct and iSerialNumber.
    indexes: [u8; 3],
    more: &'a str,
}

impl Default for Key<'_> {
    fn default() -> Self {
        Self {
            port: "1-1",
            number: 2,
            product: 1,
            serial: None,
            descriptors: None,
            indexes: [0; 3],
            more: "",
        }
    }
}

impl Key<'_> {
    fn path(&self) -> String {
        format!("/devices/pci0000:00/0000:00:04.0/usb1/{}", self.port)
    }

    /// In umockdev's format (`umockdev_testbed_add_from_string`).
    fn describe(&self) -> String {
        let (path, number, product) = (self.path(), self.number, self.product);
        let [manufacturer, name, serial] = self.indexes;
        let good = format!(
            "1201000200000040 2905 {:02X}{:02X} 0001 {manufacturer:02X}{name:02X}{serial:02X} 01 \
             0902120001010080 32 09040000 00 FF0000 00",
            product & 255,
            product >> 8
        );
        let descriptors = self.descriptors.map_or(good, ToOwned::to_owned).replace(' ', "");
        let serial = self.serial.map(|text| format!("A: serial={text}\\n\n")).unwrap_or_default();
        format!(
            "P: {path}\nN: bus/usb/001/{number:03}={descriptors}\nE: SUBSYSTEM=usb\nE: \
                DEVTYPE=usb_device\n\
             E: DEVNAME=/dev/bus/usb/001/{number:03}\nE: BUSNUM=001\nE: DEVNUM={number:03}\n\
             E: PRODUCT=529/{product:x}/100\nA: busnum=1\\n\nA: devnum={number}\\n\nA: \
             idVendor=0529\\n\n\
             A: idProduct={product:04x}\\n\nA: bDeviceClass=00\\n\nA: bConfigurationValue=1\\n\nA: \
             speed=12\\n\n\
             {serial}{}H: descriptors={descriptors}\n\n",
            self.more
        )
    }
}

/// An interface's folder, bound to `driver`.
fn interface(device: &str, name: &str, class: [&str; 3], driver: &str) -> String {
    let [class, subclass, protocol] = class;
    format!(
        "P: {device}/{name}\nE: SUBSYSTEM=usb\nE: DEVTYPE=usb_interface\nL: \
            driver=../../../bus/usb/drivers/{driver}\n\
         A: bInterfaceClass={class}\\n\nA: bInterfaceSubClass={subclass}\\n\nA: \
         bInterfaceProtocol={protocol}\\n\n\n"
    )
}

/// The recorded compute host; umockdev-record leaves the interfaces out, the second file has them
/// as its kernel shows them.
fn compute_host() -> String {
    let recorded = include_str!("../../fixtures/compute-host.umockdev");
    let interfaces = include_str!("../../fixtures/compute-host-interfaces.umockdev");
    format!("{recorded}\n{interfaces}")
}

#[test]
fn a_recorded_compute_host() {
    under("a_recorded_compute_host", &compute_host(), |folder| {
        let snapshot = look(folder, "22 1 8:1 / /boot rw - vfat /dev/sda1 rw\n");
        assert_eq!(snapshot.problems, []);
        assert_eq!(
            ports(&snapshot.devices),
            ["1-3", "1-4", "1-5.2", "2-1", "2-2", "3-1", "4-1", "5-1"]
        );
        assert_eq!(ports(&snapshot.hubs), ["1-5"], "the root hubs are no devices");

        let keyboard = at(&snapshot, "1-5.2");
        assert_eq!(keyboard.key.to_string(), "0627:0001 at port 1-5.2, serial KBD-5.2");
        assert_eq!(keyboard.address, BusAddress::new(1, 5).unwrap());
        assert_eq!(
            (keyboard.speed, keyboard.driver.as_deref()),
            (Some(Speed::Full), Some("usbhid"))
        );
        assert_eq!(keyboard.interfaces, [Class::HID]);
        assert_eq!(keyboard.product.as_deref(), Some("QEMU USB Keyboard"));
        assert_eq!(keyboard.host_use.as_deref(), Some("keyboard in use by the host"));

        let path = |port: &str| at(&snapshot, port).key.path.as_ref().map(ToString::to_string);
        assert_eq!(path("1-5.2").as_deref(), Some("pci-0000:00:04.0-usbv2-0:5.2"));
        assert_eq!(path("2-1").as_deref(), Some("pci-0000:00:04.0-usbv3-0:1"));
        assert_eq!(path("3-1").as_deref(), Some("platform-dummy_hcd.0-usbv2-0:1"));
        let stick = at(&snapshot, "3-1");
        assert_eq!(stick.key.serial, Serial::Unique("SN1".into()));
        assert_eq!(
            at(&snapshot, "4-1").key.serial,
            Serial::Unique("SN2".into()),
            "the same kind, another serial"
        );
        assert_eq!(
            (stick.speed, stick.driver.as_deref()),
            (Some(Speed::High), Some("usb-storage"))
        );
        assert_eq!(stick.host_use.as_deref(), Some("mounted on /boot"));

        assert_eq!(at(&snapshot, "2-1").speed, Some(Speed::Super));
        assert_eq!(at(&snapshot, "5-1").interfaces, [Class::new(0x02), Class::new(0x0a)]);
        assert_eq!(at(&snapshot, "1-4").driver.as_deref(), Some("usbfs"), "a guest has it");
        assert_eq!(at(&snapshot, "1-3").host_use, None, "a tablet is no keyboard");
        for device in snapshot.devices.iter().chain(&snapshot.hubs) {
            let seen = at_port(Path::new("/sys"), &device.key.port).unwrap().unwrap();
            assert_eq!(seen.serial.as_deref(), device.key.serial.text(), "what the hook verifies");
        }
    });
}

#[test]
fn a_machine_without_usb() {
    under("a_machine_without_usb", "P: /devices/virtual/mem/null\nE: SUBSYSTEM=mem\n", |folder| {
        let snapshot = look(folder, "");
        assert_eq!(snapshot, Snapshot::default());
        assert!(!snapshot.failed());
    });
}

#[test]
fn identical_devices_and_odd_serials() {
    let key = |port, number, serial| Key { port, number, serial, ..Key::default() }.describe();
    let description = [
        key("1-1", 2, None),
        key("1-2", 3, None),
        key("1-3", 4, Some("SAME")),
        key("1-4", 5, Some("SAME")),
        key("1-5", 6, Some("\u{1b}[31mred\u{202e}  ")),
        Key { port: "1-6", number: 7, product: 2, serial: Some("SAME"), ..Key::default() }
            .describe(),
        Key { port: "1-7", number: 8, serial: Some("   "), ..Key::default() }.describe(),
    ];
    under("identical_devices_and_odd_serials", &description.concat(), |folder| {
        let snapshot = look(folder, "");
        assert_eq!(snapshot.problems, []);
        let serials: Vec<_> =
            snapshot.devices.iter().map(|device| device.key.serial.clone()).collect();
        let twin = || Serial::Duplicate("SAME".into());
        let odd = Serial::Unique("\u{fffd}[31mred\u{fffd}".into());
        let other_kind = Serial::Unique("SAME".into());
        assert_eq!(
            serials,
            [Serial::Missing, Serial::Missing, twin(), twin(), odd, other_kind, Serial::Missing]
        );
        assert_eq!(
            at(&snapshot, "1-1").manufacturer.as_deref(),
            Some("Aladdin Knowledge Systems"),
            "from usb.ids"
        );
        for device in &snapshot.devices {
            let seen = at_port(Path::new("/sys"), &device.key.port).unwrap().unwrap();
            assert_eq!(seen.serial.as_deref(), device.key.serial.text(), "what the hook verifies");
        }
    });
}

#[test]
fn garbage_descriptors_hide_no_device() {
    let bad = |port, number, descriptors| {
        Key { port, number, descriptors: Some(descriptors), ..Key::default() }.describe()
    };
    let description = [
        bad("1-1", 2, "00"),
        bad("1-2", 3, "FFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFF"),
        bad("1-3", 4, "12010002000000402905010000010000000109021200FF0100803209040000FFFF000000"),
        bad(
            "1-4",
            5,
            "120100020000004029050100000100000001 0902FFFF01010080 32 0904000000FF000000",
        ),
        bad("1-5", 6, "120100020000004029050100000100000001 090200"),
        bad("1-6", 7, "120100020000004029050100000100000001 0902090000010080 32"),
        Key { port: "1-7", number: 8, ..Key::default() }.describe(),
    ];
    under("garbage_descriptors_hide_no_device", &description.concat(), |folder| {
        let snapshot = look(folder, "");
        assert_eq!(ports(&snapshot.devices), ["1-1", "1-2", "1-3", "1-4", "1-5", "1-6", "1-7"]);
        assert!(
            snapshot.devices.iter().all(|device| device.key.usb.to_string() == "0529:0001"),
            "as sysfs tells"
        );
        assert!(unsure(&snapshot, "1-1") && unsure(&snapshot, "1-5"), "{:#?}", snapshot.problems);
        assert!(!snapshot.failed() && !unsure(&snapshot, "1-7"));
    });
}

#[test]
fn a_device_that_cannot_be_opened_is_listed() {
    let description = [
        Key { indexes: [1, 2, 0], ..Key::default() }.describe(),
        Key { port: "1-2", number: 3, indexes: [0, 0, 3], ..Key::default() }.describe(),
        Key { port: "1-3", number: 4, indexes: [1, 2, 3], serial: Some("A"), ..Key::default() }
            .describe(),
        interface(
            "/devices/pci0000:00/0000:00:04.0/usb1/1-3",
            "1-3:1.0",
            ["ff", "00", "00"],
            "usbfs",
        ),
    ];
    under("a_device_that_cannot_be_opened_is_listed", &description.concat(), |folder| {
        fs::remove_file(shown("dev/bus/usb/001/002")).unwrap();
        let snapshot = look(folder, "");
        assert_eq!(ports(&snapshot.devices), ["1-1", "1-2", "1-3"]);
        let of = |port: &str| {
            snapshot
                .problems
                .iter()
                .filter(|p| p.place == port)
                .map(|p| p.what.as_str())
                .collect::<String>()
        };
        assert!(
            of("1-1").starts_with("libusb cannot read its strings: "),
            "{:?}",
            snapshot.problems
        );
        assert_eq!(
            of("1-2"),
            "has a serial number that the kernel could not read: treated as missing"
        );
        assert_eq!(of("1-3"), "", "a guest has it: it is not asked");
        assert_eq!(at(&snapshot, "1-1").key.serial, Serial::Missing);
        assert_eq!(at(&snapshot, "1-1").manufacturer.as_deref(), Some("Aladdin Knowledge Systems"));
    });
}

#[test]
fn what_sysfs_cannot_read_is_a_problem_and_no_device() {
    let description =
        [Key::default().describe(), Key { port: "1-2", number: 3, ..Key::default() }.describe()];
    under("what_sysfs_cannot_read_is_a_problem_and_no_device", &description.concat(), |folder| {
        let serial = shown("sys/devices/pci0000:00/0000:00:04.0/usb1/1-1/serial");
        fs::create_dir(serial).unwrap(); // reading a folder fails, for root too
        let snapshot = look(folder, "");
        assert_eq!(ports(&snapshot.devices), ["1-2"]);
        assert!(unsure(&snapshot, "1-1") && !unsure(&snapshot, "1-2"));
        assert_eq!(snapshot.problems.len(), 1, "{:?}", snapshot.problems);
    });
}

#[test]
fn libusb_and_sysfs_disagree() {
    let description = [
        Key { port: "1-1", number: 2, ..Key::default() }.describe(),
        Key { port: "1-2", number: 3, indexes: [0, 0, 3], serial: Some("A"), ..Key::default() }
            .describe(),
    ];
    under("libusb_and_sysfs_disagree", &description.concat(), |folder| {
        // Another sysfs than libusb's, which shows one other device.
        let other = folder.join("bus/usb/devices/2-1");
        fs::create_dir_all(&other).unwrap();
        for (name, value) in [
            ("idVendor", "0951"),
            ("idProduct", "1666"),
            ("busnum", "2"),
            ("devnum", "9"),
            ("serial", "S"),
        ] {
            fs::write(other.join(name), value).unwrap();
        }
        let config = Config { sysfs_root: folder.into(), ..Config::default() };
        let snapshot = LibUsb::new(&config).snapshot();
        assert_eq!(ports(&snapshot.devices), ["1-1", "2-1"]);
        for port in ["1-1", "1-2", "2-1"] {
            assert!(unsure(&snapshot, port), "{port}: {:#?}", snapshot.problems);
        }
        assert_eq!(at(&snapshot, "2-1").key.to_string(), "0951:1666 at port 2-1, serial S");
        assert!(
            at(&snapshot, "1-1").host_use.is_some(),
            "the use by the host is unknown, not absent"
        );
        assert!(!snapshot.failed());

        let nowhere = Config { sysfs_root: folder.join("nowhere"), ..Config::default() };
        assert!(LibUsb::new(&nowhere).snapshot().failed());
    });
}

/// Without the system's library, a copy is compiled that listens to the kernel and not to udev: it
/// reports devices that cannot be opened yet.
#[test]
fn libusb_is_the_systems() {
    let installed =
        Command::new("pkg-config").args(["--modversion", "libusb-1.0"]).output().unwrap();
    let installed = String::from_utf8_lossy(&installed.stdout).trim().to_owned();
    let linked = rusb::version();
    let linked = format!("{}.{}.{}", linked.major(), linked.minor(), linked.micro());
    assert_eq!(linked, installed, "run 'make deps', then 'cargo clean -p libusb1-sys'");
}
