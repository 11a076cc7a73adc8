//! Rule 1: a domain that asks for no USB device cannot be hurt, whatever is broken, in any
//! operation. The table beside it: one that asks is refused in each of these cases, and told why.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

use std::fs;
use std::process::{Command, Output};

use virt_usb_suite::{Host, device, domain, feed};

const ASK: &str = r#"{"usb_devices":[{"vendor_id":"0529","product_id":"0001"}]}"#;
const OPERATIONS: [(&str, &str); 8] = [
    ("prepare", "begin"),
    ("start", "begin"),
    ("started", "begin"),
    ("stopped", "end"),
    ("release", "end"),
    ("reconnect", "begin"),
    ("restore", "begin"),
    ("migrate", "begin"),
];

/// A domain without a flavor, and one with the name of a Nova flavor that is not stored.
fn innocents() -> [String; 2] {
    let plain = domain("plain", 1, "");
    let start = plain.find("  <metadata>").unwrap();
    let end = plain.find("</metadata>\n").unwrap() + "</metadata>\n".len();
    let nova = "  <metadata>\n    <nova:instance \
        xmlns:nova='http://openstack.org/xmlns/libvirt/nova/1.1'>\n      \
                <nova:flavor name='m1.small'/>\n    </nova:instance>\n  </metadata>\n";
    [
        format!("{}{}", &plain[..start], &plain[end..]),
        format!("{}{nova}{}", &plain[..start], &plain[end..]),
    ]
}

fn mkfifo(path: &std::path::Path) {
    assert!(Command::new("mkfifo").arg(path).status().unwrap().success());
}

fn lose_hints(host: &Host) {
    fs::remove_dir_all(host.path("state/hints")).unwrap();
}

/// A broken part, and how it breaks.
type Breakage = (&'static str, fn(&Host));

/// Parts that can break, each on a host that was healthy and had a device.
fn breakages() -> Vec<Breakage> {
    vec![
        ("no state_dir", |h| fs::remove_dir_all(h.path("state")).unwrap()),
        ("state_dir is a file", |h| {
            fs::remove_dir_all(h.path("state")).unwrap();
            fs::write(h.path("state"), "").unwrap();
        }),
        ("state_dir is a link to itself", |h| {
            fs::remove_dir_all(h.path("state")).unwrap();
            std::os::unix::fs::symlink(h.path("state"), h.path("state")).unwrap();
        }),
        ("hints is a file", |h| {
            lose_hints(h);
            fs::write(h.path("state/hints"), "").unwrap();
        }),
        ("hints is a FIFO", |h| {
            lose_hints(h);
            mkfifo(&h.path("state/hints"));
        }),
        ("hints lost, the database is garbage", |h| {
            lose_hints(h);
            fs::write(h.path("state/inventory.sqlite"), "garbage").unwrap();
        }),
        ("hints lost, a FIFO for the database", |h| {
            lose_hints(h);
            fs::remove_file(h.path("state/inventory.sqlite")).unwrap();
            mkfifo(&h.path("state/inventory.sqlite"));
        }),
        ("hints lost, a link for the database", |h| {
            lose_hints(h);
            fs::rename(h.path("state/inventory.sqlite"), h.path("elsewhere")).unwrap();
            std::os::unix::fs::symlink(h.path("elsewhere"), h.path("state/inventory.sqlite"))
                .unwrap();
        }),
        ("hints lost, no procfs", |h| {
            lose_hints(h);
            fs::remove_dir_all(h.path("proc")).unwrap();
        }),
        ("the configuration is a FIFO", |h| {
            fs::remove_file(h.config_file()).unwrap();
            mkfifo(&h.config_file());
        }),
        ("the configuration has no end", |h| {
            fs::File::create(h.config_file()).unwrap().set_len(3 << 30).unwrap();
        }),
        ("the configuration is wrong", |h| fs::write(h.config_file(), "state_dir = 5").unwrap()),
        ("the configuration is empty", |h| fs::write(h.config_file(), "").unwrap()),
        ("the configuration is cut off", |h| {
            let text = fs::read_to_string(h.config_file()).unwrap();
            fs::write(h.config_file(), &text[..text.find("sysfs_root").unwrap() + 4]).unwrap();
        }),
        ("the configuration is gone", |h| fs::remove_file(h.config_file()).unwrap()),
        ("the configuration is no text", |h| fs::write(h.config_file(), [0xff, 0xfe]).unwrap()),
    ]
}

fn host() -> Host {
    let host = Host::new("");
    host.discover(&device("0001", "1-1", 2, "serial = \"A\""));
    host
}

fn unharmed(what: &str, operation: &str, output: &Output) {
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(0), "{what}: {operation} failed: {said}");
    assert!(output.stdout.is_empty(), "{what}: {operation} changed the domain");
}

#[test]
fn a_domain_that_asks_for_nothing_passes_whatever_is_broken() {
    for (what, break_it) in breakages() {
        let host = host();
        break_it(&host);
        for xml in innocents() {
            for (operation, sub) in OPERATIONS {
                unharmed(
                    what,
                    operation,
                    &host.call(&["plain", operation, sub, "-"], xml.as_bytes()),
                );
            }
        }
        let asking = domain("erp", 2, ASK);
        let refused = host.call(&["erp", "prepare", "begin", "-"], asking.as_bytes());
        let said = String::from_utf8_lossy(&refused.stderr).into_owned();
        // Lost hints alone are no reason: the database still answers.
        assert_eq!(refused.status.code(), Some(1), "{what}: {said}");
        assert!(said.starts_with("virt-usb: erp") && said.lines().count() == 1, "{what}: {said}");
    }
}

/// The folder of another configuration decides nothing, and the operator is informed.
#[test]
fn a_wrong_configuration_is_said_in_every_call_and_hides_no_hint() {
    let nova = innocents()[1].replace("m1.small", "m1.erp");
    for (wrong, known) in [
        ("usb_white_list_swich = 'on'\n", true),
        ("hold = 5\n", true),
        ("hold = \n", true),
        ("usb_white_list = [\n", true),
        ("state_dir = 5\n", false),
        ("", false),
    ] {
        let host = host();
        host.flavor("m1.erp", ASK);
        let text = fs::read_to_string(host.config_file()).unwrap();
        let text = if known { text + wrong } else { wrong.to_owned() };
        fs::write(host.config_file(), text).unwrap();
        for (operation, sub) in OPERATIONS.into_iter().chain([("attach", "begin")]) {
            let output = host.call(&["plain", operation, sub, "-"], innocents()[0].as_bytes());
            unharmed(wrong, operation, &output);
            let said = String::from_utf8_lossy(&output.stderr);
            assert!(
                said.starts_with("virt-usb: warning: the configuration ")
                    && said.lines().count() == 1,
                "{wrong}: {operation}: {said}"
            );
        }
        // Its name is the only sign that it asks for something.
        let named = host.call(&["nova", "prepare", "begin", "-"], nova.as_bytes());
        let said = String::from_utf8_lossy(&named.stderr);
        assert_eq!(named.status.code(), Some(i32::from(known)), "{wrong}: {said}");
        assert!(
            said.contains("the configuration ") && said.lines().count() == 1,
            "{wrong}: {said}"
        );
    }
}

/// A hook that was left behind meets the inventory of a newer virt-usb.
#[test]
fn of_a_newer_inventory_the_hook_takes_nothing_and_says_what_to_do() {
    let host = host();
    let file = host.path("state/inventory.sqlite");
    drop(host.store());
    let _ = fs::remove_file(host.path("state/inventory.sqlite-wal"));
    let mut bytes = fs::read(&file).unwrap();
    // user_version, in the file's head.
    bytes[60..64].copy_from_slice(&99_u32.to_be_bytes());
    fs::write(&file, &bytes).unwrap();
    for hints in [true, false] {
        if !hints {
            lose_hints(&host);
        }
        for xml in innocents() {
            for (operation, sub) in OPERATIONS {
                unharmed(
                    "a newer inventory",
                    operation,
                    &host.call(&["plain", operation, sub, "-"], xml.as_bytes()),
                );
            }
        }
        let asking = domain("erp", 2, ASK);
        let refused = host.call(&["erp", "prepare", "begin", "-"], asking.as_bytes());
        let said = String::from_utf8_lossy(&refused.stderr).into_owned();
        assert_eq!(refused.status.code(), Some(1), "{said}");
        for words in
            ["virt-usb: erp", "has schema 99", "install the virt-usb that wrote it, or newer"]
        {
            assert!(said.contains(words), "{said}");
        }
        // No notice fails, whatever the guest asks for: a stop is never blocked.
        for (operation, sub) in
            [("started", "begin"), ("stopped", "end"), ("release", "end"), ("reconnect", "begin")]
        {
            let passed = host.call(&["erp", operation, sub, "-"], asking.as_bytes());
            assert_eq!(passed.status.code(), Some(0), "{operation}");
        }
    }
    assert!(fs::read(&file).unwrap() == bytes, "nothing was changed");
}

#[test]
fn guests_of_a_user_without_access_to_the_state_pass() {
    let host = host();
    // libvirt's session daemons call the same hooks as users. This needs another user's rights, so
    // root's to take them.
    if fs::metadata("/proc/self").map(|m| std::os::unix::fs::MetadataExt::uid(&m)).unwrap() != 0 {
        eprintln!("not root: skipped, because it needs the rights of another user");
        return;
    }
    let open = |path| {
        fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    };
    open(host.path(""));
    let hook = host.path("hook");
    virt_usb_suite::write_program(
        &hook,
        &fs::read(virt_usb_suite::program("virt-usb-hook")).unwrap(),
    );
    for xml in innocents() {
        for (operation, sub) in OPERATIONS {
            let mut command = Command::new("setpriv");
            command.args(["--reuid", "65534", "--regid", "65534", "--clear-groups"]).arg(&hook);
            command.arg("--config").arg(host.config_file()).args(["plain", operation, sub, "-"]);
            unharmed("another user", operation, &feed(command, xml.as_bytes()));
        }
    }
}

#[test]
fn a_guest_whose_disk_another_guest_holds_starts_with_a_warning() {
    let host = Host::new("");
    host.discover(&device("0001", "1-1", 5, "serial = 'HL-1'"));
    let args = ["erp", "prepare", "begin", "-"];
    assert!(host.call(&args, domain("erp", 2, ASK).as_bytes()).status.success());
    // The kernel's link from a device node to its device; /dev/zero exists for all users.
    let node = host.path("sys/bus/usb/devices/1-1/1-1:1.0/tty/ttyUSB0");
    fs::create_dir_all(&node).unwrap();
    fs::create_dir_all(host.path("sys/dev/char")).unwrap();
    std::os::unix::fs::symlink(&node, host.path("sys/dev/char/1:5")).unwrap();
    let serial = |path: &str| {
        let device =
            format!("<serial type='dev'><source path='{path}'/><target port='0'/></serial>");
        innocents()[0].replace("</devices>", &format!("{device}</devices>"))
    };
    let start = |xml: String| host.call(&["plain", "prepare", "begin", "-"], xml.as_bytes());
    let warned = start(serial("/dev/zero"));
    assert!(warned.status.success() && warned.stdout.is_empty(), "{warned:?}");
    let said = String::from_utf8_lossy(&warned.stderr).into_owned();
    assert!(said.contains("plain has /dev/zero as its serial 0, which is on device 1"), "{said}");
    assert!(said.contains("and erp (") && said.lines().count() == 1, "{said}");
    for other in ["/dev/null", "/dev/gone"] {
        let quiet = start(serial(other));
        assert!(quiet.status.success() && quiet.stderr.is_empty(), "{other}: {quiet:?}");
    }
    fs::remove_dir_all(host.path("state")).unwrap();
    let quiet = start(serial("/dev/zero"));
    assert!(quiet.status.success() && quiet.stderr.is_empty(), "without an inventory: {quiet:?}");
}
