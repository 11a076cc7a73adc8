//! Contention: identical sticks, many instances at once, other programs' view of the same store.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

use std::process::Stdio;

use virt_usb_suite::{Host, PROGRAM_TIMEOUT, device, domain, program};

const ASK: &str = r#"{"usb_devices":[{"vendor_id":"0529","product_id":"0001"}]}"#;

fn prepare(host: &Host, name: &str, xml: &str) -> std::process::Output {
    host.call(&[name, "prepare", "begin", "-"], xml.as_bytes())
}

/// Two sticks that cannot be told apart but by their port, with the numbers that they have at this
/// moment.
fn sticks(first: u8, second: u8) -> String {
    [device("0001", "1-1", first, ""), device("0001", "1-2", second, "")].concat()
}

/// The address that the rewritten XML names.
fn given(output: &std::process::Output) -> (u8, u8) {
    let domain = virt_usb_domxml::read(&output.stdout).unwrap();
    let address = domain.hostdevs[0].address.unwrap();
    (address.bus(), address.device())
}

#[test]
fn identical_sticks_that_swap_numbers_stay_with_their_guests() {
    let host = Host::new("");
    host.discover(&sticks(2, 3));
    let at = |port: &str| format!(r#"{{"usb_devices":[{{"port":"{port}"}}]}}"#);
    let (left, right) = (domain("left", 1, &at("1-1")), domain("right", 2, &at("1-2")));
    // Between scan and start the bus was reset: each has the other's number now.
    host.plug(&sticks(3, 2));
    assert_eq!(
        given(&prepare(&host, "left", &left)),
        (1, 3),
        "the stick at port 1-1, whatever its number"
    );
    assert_eq!(given(&prepare(&host, "right", &right)), (1, 2));
    // And again, while both are held: the same claims, the addresses of this moment.
    host.plug(&sticks(2, 3));
    assert_eq!(given(&prepare(&host, "left", &left)), (1, 2));
    assert_eq!(given(&prepare(&host, "right", &right)), (1, 3));
    assert_eq!(host.claims().lines().count(), 2);
    // One goes: its guest is refused, and not given the other one.
    host.plug(&device("0001", "1-2", 2, ""));
    let refused = prepare(&host, "left", &left);
    assert_eq!(refused.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&refused.stderr).contains("nothing is plugged in at port 1-1"));
}

#[test]
fn sticks_with_serials_that_swap_ports_are_not_mixed_up() {
    let host = Host::new("");
    let plugged = |a: &str, b: &str| {
        [device("0001", a, 2, "serial = \"A\""), device("0001", b, 3, "serial = \"B\"")].concat()
    };
    host.discover(&plugged("1-1", "1-2"));
    let ask = r#"{"usb_devices":[{"serial":"A"}]}"#;
    let xml = domain("erp-1", 1, ask);
    host.plug(&plugged("1-2", "1-1"));
    let refused = prepare(&host, "erp-1", &xml);
    assert_eq!(refused.status.code(), Some(1), "the inventory has it at the other port");
    assert!(String::from_utf8_lossy(&refused.stderr).contains("virt-usb discover"));
    host.discover(&plugged("1-2", "1-1"));
    assert_eq!(given(&prepare(&host, "erp-1", &xml)), (1, 2), "A, at its new port");
}

#[test]
fn of_many_takers_at_once_as_many_win_as_there_are_devices() {
    const DEVICES: usize = 50;
    const TAKERS: u32 = 200;
    let host = Host::new("");
    let plugged: String = (0..DEVICES)
        .map(|i| {
            device(
                "0001",
                &format!("1-{}.{}", i / 10 + 1, i % 10 + 1),
                u8::try_from(i + 2).unwrap(),
                &format!("serial = \"S{i}\""),
            )
        })
        .collect();
    host.discover(&plugged);
    let hook = program("virt-usb-hook");
    let children: Vec<_> = (1..=TAKERS)
        .map(|n| {
            let file = host.path(&format!("{n}.xml"));
            std::fs::write(&file, domain(&format!("vm-{n}"), n, ASK)).unwrap();
            std::process::Command::new(&hook)
                .arg("--config")
                .arg(host.config_file())
                .args([&format!("vm-{n}"), "prepare", "begin", "-"])
                .stdin(std::fs::File::open(file).unwrap())
                .stdout(Stdio::piped())
                .stderr(Stdio::piped())
                .spawn()
                .unwrap()
        })
        .collect();
    let mut outputs: Vec<_> =
        children.into_iter().map(|child| child.wait_with_output().unwrap()).collect();
    // A hook waits two seconds for the lock. On a slow machine some time out and are retried.
    let deadline = std::time::Instant::now() + PROGRAM_TIMEOUT;
    for (output, n) in outputs.iter_mut().zip(1..) {
        while output.status.code() != Some(0)
            && String::from_utf8_lossy(&output.stderr).contains("lock")
        {
            assert!(std::time::Instant::now() < deadline, "the lock is never free");
            *output = prepare(&host, &format!("vm-{n}"), &domain(&format!("vm-{n}"), n, ASK));
        }
    }
    let won = outputs.iter().filter(|o| o.status.code() == Some(0)).map(given);
    let mut addresses: Vec<_> = won.collect();
    addresses.sort_unstable();
    addresses.dedup();
    assert_eq!(addresses.len(), DEVICES, "each winner has a device of its own");
    let lost: Vec<_> = outputs.iter().filter(|o| o.status.code() == Some(1)).collect();
    assert_eq!(lost.len(), TAKERS as usize - DEVICES);
    for output in lost {
        let why = String::from_utf8_lossy(&output.stderr);
        assert!(why.contains("is held by vm-"), "told why: {why}");
    }
    assert_eq!(host.store().check().unwrap(), Vec::<String>::new());
}

#[test]
fn a_release_that_cannot_get_the_lock_says_so_and_lets_the_guest_stop() {
    let host = Host::new("");
    host.discover(&device("0001", "1-1", 2, "serial = \"A\""));
    let xml = domain("erp-1", 1, ASK);
    assert!(prepare(&host, "erp-1", &xml).status.success());
    let locker = rusqlite_lock(&host);
    let release = host.call(&["erp-1", "release", "end", "shutdown"], xml.as_bytes());
    assert_eq!(release.status.code(), Some(0));
    let said = String::from_utf8_lossy(&release.stderr).into_owned();
    assert!(said.contains("lock") && said.contains("claims of erp-1 stay"), "{said}");
    let refused = prepare(&host, "erp-2", &domain("erp-2", 2, ASK));
    assert_eq!(refused.status.code(), Some(1));
    drop(locker);
    assert_eq!(
        host.claims().lines().count(),
        1,
        "the claim is still there, for the agent or the next release"
    );
    assert!(host.call(&["erp-1", "release", "end", "shutdown"], xml.as_bytes()).status.success());
    assert_eq!(host.claims(), "");
}

/// Holds the store's write lock until it is dropped: sqlite's own lock, taken by another process.
fn rusqlite_lock(host: &Host) -> Locker {
    let script = "import \
        sqlite3,sys\nc=sqlite3.connect(sys.argv[1],isolation_level=None)\nc.execute('BEGIN \
        IMMEDIATE')\nprint('locked',flush=True)\nsys.stdin.read()\n";
    let mut child = std::process::Command::new("python3")
        .args(["-c", script])
        .arg(host.path("state").join(virt_usb_store::FILE_NAME))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("python3 is missing: run 'make test-deps'");
    let mut line = String::new();
    std::io::BufRead::read_line(
        &mut std::io::BufReader::new(child.stdout.take().unwrap()),
        &mut line,
    )
    .unwrap();
    assert_eq!(line, "locked\n");
    Locker(child)
}

struct Locker(std::process::Child);

impl Drop for Locker {
    fn drop(&mut self) {
        drop(self.0.stdin.take());
        self.0.wait().unwrap();
    }
}
