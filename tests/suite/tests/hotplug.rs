//! The agent and the real libusb under umockdev: devices come, go, change their numbers, swarm. No
//! scan at an interval helps.
//!
//! Each test starts this program again under `umockdev-wrapper`: a program that sends uevents must
//! be preloaded itself, and a process has one testbed.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "a test fails by panicking, and tells figures"
)]

use std::ffi::{CString, c_char, c_int, c_void};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use virt_usb_store::{Durability, Record, Store};
use virt_usb_suite::{PROGRAM_TIMEOUT, until};

/// umockdev's C library (its reference: <https://martinpitt.github.io/umockdev/>).
#[allow(unsafe_code, reason = "the C library has no Rust crate")]
mod testbed {
    use super::{CString, c_char, c_int, c_void};

    #[link(name = "umockdev")]
    unsafe extern "C" {
        fn umockdev_testbed_new() -> *mut c_void;
        fn umockdev_testbed_add_from_string(
            bed: *mut c_void,
            text: *const c_char,
            e: *mut *mut c_void,
        ) -> c_int;
        fn umockdev_testbed_uevent(bed: *mut c_void, devpath: *const c_char, action: *const c_char);
        fn umockdev_testbed_remove_device(bed: *mut c_void, syspath: *const c_char);
    }

    /// A machine without devices, for this process and its children.
    pub(crate) struct Testbed(*mut c_void);

    impl Testbed {
        pub(crate) fn new() -> Self {
            // SAFETY: makes an object; this process is preloaded.
            Self(unsafe { umockdev_testbed_new() })
        }
        /// Adds devices, and sends `add` for each.
        pub(crate) fn add(&self, text: &str) {
            let (text, mut e) = (CString::new(text).unwrap(), std::ptr::null_mut());
            // SAFETY: the object lives for ever, the text is a C string, the error is looked at by
            // the result alone.
            let added =
                unsafe { umockdev_testbed_add_from_string(self.0, text.as_ptr(), &raw mut e) };
            assert!(added != 0, "umockdev does not take the device");
        }
        pub(crate) fn uevent(&self, path: &str, action: &str) {
            let (path, action) = (CString::new(path).unwrap(), CString::new(action).unwrap());
            // SAFETY: as above.
            unsafe { umockdev_testbed_uevent(self.0, path.as_ptr(), action.as_ptr()) };
        }
        /// Removes a device, without an event.
        pub(crate) fn remove(&self, path: &str) {
            let path = CString::new(path).unwrap();
            // SAFETY: as above.
            unsafe { umockdev_testbed_remove_device(self.0, path.as_ptr()) };
        }
    }
}

use testbed::Testbed;

/// Set for the second run: the folder in which the test may write.
const UNDER: &str = "VIRT_USB_TEST_UNDER_UMOCKDEV";
/// How often a test is run until umockdev does not abort.
const ATTEMPTS: usize = 5;

/// Runs the test in a process that is preloaded. `name` is the test's own name.
fn under(name: &str, test: impl FnOnce(&Path)) {
    if let Some(folder) = std::env::var_os(UNDER) {
        return test(Path::new(&folder));
    }
    if let Err(e) = Command::new("umockdev-wrapper").arg("true").output()
        && e.kind() == ErrorKind::NotFound
    {
        panic!("umockdev-wrapper is not installed: run 'make test-deps'");
    }
    // A socket holds ten messages, and umockdev ends where there is no room: in a network namespace
    // of its own it may hold more.
    let room =
        r#"echo 4096 > /proc/sys/net/unix/max_dgram_qlen && exec umockdev-wrapper "$0" "$@""#;
    // umockdev's library aborts when one thread opens a file while another closes one
    // (fd_map_remove). The test says nothing then, and is run again.
    let text = (0..ATTEMPTS)
        .map(|_| {
            let folder = tempfile::tempdir().unwrap();
            let output = virt_usb_suite::own_network()
                .args(["sh", "-c", room])
                .arg(std::env::current_exe().unwrap())
                .args(["--exact", name, "--nocapture", "--include-ignored"])
                .env(UNDER, folder.path())
                .output()
                .unwrap();
            let text =
                String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
            text.into_owned()
        })
        .find(|text| !text.contains("libumockdev-preload fd_map_"))
        .unwrap_or_else(|| panic!("umockdev aborted {ATTEMPTS} times"));
    assert!(text.contains("1 passed"), "{text}");
    // Output for the benchmarks.
    print!(
        "{}",
        text.lines()
            .filter(|l| l.starts_with("figure "))
            .map(|l| format!("{l}\n"))
            .collect::<String>()
    );
}

/// An agent that looks at everything once an hour, and so knows what events tell it.
struct Agent {
    child: Child,
    folder: PathBuf,
    store: Store,
}

impl Agent {
    fn start(folder: &Path) -> Self {
        let keys = format!(
            "state_dir = {0:?}\nscan_interval = 3600\nlibvirt_uri = \"test:///default\"\nmetrics = \
                {1:?}\n",
            folder.join("state"),
            folder.join("metrics")
        );
        std::fs::write(folder.join("config.toml"), keys).unwrap();
        let child = Command::new(virt_usb_suite::program("virt-usbd"))
            .arg("--config")
            .arg(folder.join("config.toml"))
            // The output must be closed.
            .stdout(std::process::Stdio::null())
            .stderr(std::fs::File::create(folder.join("log")).unwrap())
            .spawn()
            .unwrap();
        let log = folder.join("log");
        until("the agent is ready", || {
            std::fs::read_to_string(&log).unwrap().contains(" ready").then_some(())
        });
        // Hotplug is on by then or soon after; whatever came in between is scanned for.
        let store =
            Store::open(&folder.join("state"), Duration::from_secs(5), Durability::Power).unwrap();
        Self { child, folder: folder.to_owned(), store }
    }

    /// Waits until the inventory's devices that are there are these, `port serial address` each.
    fn shows(&self, wanted: &[&str]) -> Duration {
        let began = Instant::now();
        let now = || {
            let mut devices: Vec<String> = self
                .devices()
                .iter()
                .filter(|r| r.present)
                .map(|r| {
                    format!(
                        "{} {} {}",
                        r.entry.port_path,
                        r.entry.serial.as_deref().unwrap_or("-"),
                        r.entry.address
                    )
                })
                .collect();
            devices.sort();
            devices
        };
        let deadline = began + PROGRAM_TIMEOUT;
        loop {
            let found = now();
            if found == wanted {
                return began.elapsed();
            }
            let log = || std::fs::read_to_string(self.folder.join("log")).unwrap();
            assert!(!self.has_ended(), "the agent has ended\n{}", log());
            assert!(Instant::now() < deadline, "{found:?} and not {wanted:?}\n{}", log());
            std::thread::sleep(Duration::from_micros(500));
        }
    }

    fn open_files(&self) -> usize {
        std::fs::read_dir(format!("/proc/{}/fd", self.child.id())).unwrap().count()
    }

    /// Waits until the agent has at most one libusb context and one client more than `before`.
    fn closes_its_files(&self, before: usize) {
        until("the agent closes its files", || (self.open_files() <= before + 4).then_some(()));
    }

    fn has_ended(&self) -> bool {
        // "virt-usbd) Z": it waits for its parent to ask.
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.child.id())).unwrap();
        stat.rsplit(')').next().unwrap().starts_with(" Z")
    }

    fn devices(&self) -> Vec<Record> {
        self.store.restart_lock_timeout();
        self.store.devices().unwrap()
    }

    /// Number of scans so far; none while the metrics are not served yet.
    fn scans(&self) -> Option<u64> {
        use std::io::{Read, Write};
        let mut socket =
            std::os::unix::net::UnixStream::connect(self.folder.join("metrics")).ok()?;
        socket.write_all(b"GET /metrics HTTP/1.0\r\n\r\n").unwrap();
        let mut text = String::new();
        socket.read_to_string(&mut text).unwrap();
        let scans = text.lines().filter_map(|l| {
            l.strip_prefix("virt_usb_scans_total{")?.split(' ').nth(1)?.parse::<u64>().ok()
        });
        Some(scans.sum())
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        self.child.kill().and_then(|()| self.child.wait()).map(drop).unwrap();
    }
}

/// Where a port's device is; "" is the root hub.
fn path(port: &str) -> String {
    format!("/devices/pci0000:00/0000:00:04.0/usb1/{port}").trim_end_matches('/').to_owned()
}

fn sys(port: &str) -> String {
    format!("/sys{}", path(port))
}

/// A device as the kernel shows it; the vendor's own class.
fn device(port: &str, number: u8, serial: Option<&str>) -> String {
    let descriptors = "120100020000004051096616000101020301090212000101008032090400000\
                       0FF000000";
    let serial = serial.map(|s| format!("A: serial={s}\\n\n")).unwrap_or_default();
    format!(
        "P: {path}\nN: bus/usb/001/{number:03}={descriptors}\nE: SUBSYSTEM=usb\nE: \
            DEVTYPE=usb_device\nE: DEVNAME=/dev/bus/usb/001/{number:03}\n\
         E: BUSNUM=001\nE: DEVNUM={number:03}\nE: PRODUCT=951/1666/100\nA: busnum=1\\n\nA: \
         devnum={number}\\n\nA: idVendor=0951\\n\nA: idProduct=1666\\n\n\
         A: bDeviceClass=00\\n\nA: bConfigurationValue=1\\n\nA: speed=480\\n\n{serial}H: \
         descriptors={descriptors}\n\n",
        path = path(port)
    )
}

/// The hub that a bus begins with.
fn plug_root_hub(bed: &Testbed) {
    let descriptors =
        "12010002090001406B1D020006060302010109021900010100E0000904000001090000000705810304000C";
    bed.add(&format!(
        "P: {path}\nN: bus/usb/001/001={descriptors}\nE: SUBSYSTEM=usb\nE: DEVTYPE=usb_device\n\
         E: DEVNAME=/dev/bus/usb/001/001\nE: BUSNUM=001\nE: DEVNUM=001\nE: PRODUCT=1d6b/2/606\n\
         A: busnum=1\\n\nA: devnum=1\\n\nA: idVendor=1d6b\\n\nA: idProduct=0002\\n\nA: \
         bDeviceClass=09\\n\n\
         A: bConfigurationValue=1\\n\nA: speed=480\\n\nH: descriptors={descriptors}\n\n",
        path = path("")
    ));
    bed.uevent(&sys(""), "add");
}

fn plug(bed: &Testbed, port: &str, number: u8, serial: Option<&str>) {
    bed.add(&device(port, number, serial));
    bed.uevent(&sys(port), "add");
}

fn unplug(bed: &Testbed, port: &str) {
    bed.uevent(&sys(port), "remove");
    bed.remove(&sys(port));
}

/// A machine with a USB bus: libusb starts on no other.
fn machine() -> Testbed {
    let bed = Testbed::new();
    plug(&bed, "1-1", 1, None);
    unplug(&bed, "1-1");
    bed
}

#[test]
fn events_become_rows() {
    under("events_become_rows", |folder| {
        let bed = machine();
        let agent = Agent::start(folder);
        agent.shows(&[]);
        plug(&bed, "1-1", 2, Some("SN1"));
        agent.shows(&["1-1 SN1 usb_1_2"]);
        plug(&bed, "1-2", 3, Some("SN2"));
        agent.shows(&["1-1 SN1 usb_1_2", "1-2 SN2 usb_1_3"]);
        let ids: Vec<_> = agent.devices().iter().map(|r| r.entry.id).collect();
        // The same stick in another port, under another number, is the same device.
        unplug(&bed, "1-1");
        plug(&bed, "1-3", 7, Some("SN1"));
        agent.shows(&["1-2 SN2 usb_1_3", "1-3 SN1 usb_1_7"]);
        assert_eq!(agent.devices().iter().map(|r| r.entry.id).collect::<Vec<_>>(), ids);
        unplug(&bed, "1-2");
        unplug(&bed, "1-3");
        agent.shows(&[]);
    });
}

#[test]
fn twins_that_change_places_are_distinguished_by_their_ports() {
    under("twins_that_change_places_are_distinguished_by_their_ports", |folder| {
        let bed = machine();
        let agent = Agent::start(folder);
        plug(&bed, "1-1", 2, None);
        plug(&bed, "1-2", 3, None);
        agent.shows(&["1-1 - usb_1_2", "1-2 - usb_1_3"]);
        let before: Vec<_> =
            agent.devices().iter().map(|r| (r.entry.id, r.entry.port_path.clone())).collect();
        unplug(&bed, "1-1");
        unplug(&bed, "1-2");
        plug(&bed, "1-2", 2, None);
        plug(&bed, "1-1", 3, None);
        agent.shows(&["1-1 - usb_1_3", "1-2 - usb_1_2"]);
        let after: Vec<_> =
            agent.devices().iter().map(|r| (r.entry.id, r.entry.port_path.clone())).collect();
        assert_eq!(after, before);
    });
}

#[test]
fn a_storm_is_looked_at_as_one() {
    under("a_storm_is_looked_at_as_one", |folder| {
        let bed = machine();
        let agent = Agent::start(folder);
        plug(&bed, "1-1", 2, Some("SN1"));
        agent.shows(&["1-1 SN1 usb_1_2"]);
        let before = until("the metrics are served", || agent.scans());
        let began = Instant::now();
        for _ in 0..500 {
            bed.uevent(&sys("1-1"), "remove");
            bed.uevent(&sys("1-1"), "add");
        }
        plug(&bed, "1-2", 3, Some("SN2"));
        let storm = began.elapsed();
        agent.shows(&["1-1 SN1 usb_1_2", "1-2 SN2 usb_1_3"]);
        // How many bursts the scheduler makes of it is not ours to say; that one burst is one scan
        // is the unit test of `devices.rs`. A sender that is held up for 15 ms ends a burst.
        let most = (1001 / 20).max(u64::try_from(storm.as_millis()).unwrap() / 15 + 2);
        let scans = until("it is counted", || agent.scans().map(|n| n - before).filter(|n| *n > 0));
        assert!((1..=most).contains(&scans), "{scans} scans in a storm of {storm:?}");
        println!("figure storm 1001 events in {} ms, {scans} scans", storm.as_millis());
    });
}

/// After a reset, a controller has a bus of the same number. libusb finds the new hub and the new
/// device before udev reports the removal of the old hub.
#[test]
fn events_of_an_earlier_hub_do_not_end_the_agent() {
    under("events_of_an_earlier_hub_do_not_end_the_agent", |folder| {
        let bed = Testbed::new();
        plug_root_hub(&bed);
        plug(&bed, "1-1", 2, Some("SN1"));
        let agent = Agent::start(folder);
        agent.shows(&["1-1 SN1 usb_1_2"]);
        for round in 0..5u8 {
            // It looks at least once a second, also where events do not end.
            let begin = Instant::now();
            while begin.elapsed() < Duration::from_millis(1500) {
                bed.uevent(&sys(""), "remove");
                bed.uevent(&sys(""), "add");
                std::thread::sleep(Duration::from_micros(200));
            }
            // The agent continues with later events.
            plug(&bed, "1-2", round + 3, Some("SN2"));
            agent.shows(&["1-1 SN1 usb_1_2", &format!("1-2 SN2 usb_1_{}", round + 3)]);
            unplug(&bed, "1-2");
            agent.shows(&["1-1 SN1 usb_1_2"]);
        }
    });
}

/// libusb still lists the device. The agent replaces libusb's context, and exits the replaced one.
#[test]
fn a_device_that_leaves_without_an_event_is_removed_at_the_next_look() {
    under("a_device_that_leaves_without_an_event_is_removed_at_the_next_look", |folder| {
        let bed = machine();
        let agent = Agent::start(folder);
        plug(&bed, "1-1", 2, Some("SN1"));
        agent.shows(&["1-1 SN1 usb_1_2"]);
        let open_files = agent.open_files();
        for round in 0..10u8 {
            let (second, third) = (2 * round + 3, 2 * round + 4);
            plug(&bed, "1-2", second, Some("SN2"));
            agent.shows(&["1-1 SN1 usb_1_2", &format!("1-2 SN2 usb_1_{second}")]);
            bed.remove(&sys("1-2"));
            plug(&bed, "1-3", third, Some("SN3"));
            agent.shows(&["1-1 SN1 usb_1_2", &format!("1-3 SN3 usb_1_{third}")]);
            unplug(&bed, "1-3");
            agent.shows(&["1-1 SN1 usb_1_2"]);
        }
        agent.closes_its_files(open_files);
    });
}

#[test]
fn a_device_that_cannot_be_read_is_not_taken_for_gone() {
    under("a_device_that_cannot_be_read_is_not_taken_for_gone", |folder| {
        let bed = machine();
        let agent = Agent::start(folder);
        plug(&bed, "1-1", 2, Some("SN1"));
        plug(&bed, "1-2", 3, Some("SN2"));
        agent.shows(&["1-1 SN1 usb_1_2", "1-2 SN2 usb_1_3"]);
        // The vendor can no longer be read: a folder is in its place, which root cannot read
        // either.
        let attribute = Path::new(&std::env::var_os("UMOCKDEV_DIR").unwrap())
            .join(sys("1-1").trim_start_matches('/'))
            .join("idVendor");
        std::fs::remove_file(&attribute).unwrap();
        std::fs::create_dir(&attribute).unwrap();
        unplug(&bed, "1-2");
        agent.shows(&["1-1 SN1 usb_1_2"]);
        // libusb and sysfs disagree at each look, and each look replaces libusb's context.
        let open_files = agent.open_files();
        for number in 4..14 {
            plug(&bed, "1-2", number, Some("SN2"));
            agent.shows(&["1-1 SN1 usb_1_2", &format!("1-2 SN2 usb_1_{number}")]);
            unplug(&bed, "1-2");
            agent.shows(&["1-1 SN1 usb_1_2"]);
        }
        agent.closes_its_files(open_files);
    });
}

#[test]
#[ignore = "measures, for 'make bench'"]
fn latency() {
    under("latency", |folder| {
        let bed = machine();
        let agent = Agent::start(folder);
        let mut times = Vec::new();
        for round in 0..60u8 {
            bed.add(&device("1-1", round + 2, Some("SN1")));
            bed.uevent(&sys("1-1"), "add");
            times.push(agent.shows(&[&format!("1-1 SN1 usb_1_{}", round + 2)]));
            unplug(&bed, "1-1");
            agent.shows(&[]);
        }
        times.sort_unstable();
        let at = |share: usize| times[times.len() * share / 100].as_secs_f64() * 1e3;
        println!("figure latency p50 {:.1} ms, p95 {:.1} ms", at(50), at(95));
    });
}
