//! `virt-usb watch`: on a terminal, as a terminal's user sees it (a terminal in memory stands at
//! the other end of a real pty), and elsewhere, as a program reads it.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test")]

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, Signal, kill_process};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{Termios, Winsize, tcgetattr, tcsetwinsize};
use virt_usb_suite::{Host, PROGRAM_TIMEOUT, program, text, until};

const KEY: &str = "[[device]]\nvendor = \"0529\"\nproduct = \"0001\"\nbus = 1\ndevice = 5\nport \
    = \"1-1.4\"\nserial = \"A\"\nproduct_name = \"HASP HL\"\n";
const STICK: &str = "[[device]]\nvendor = \"0951\"\nproduct = \"1666\"\nbus = 2\ndevice = 3\nport \
    = \"2-1\"\nserial = \"B\"\nproduct_name = \"Stick\"\n";

/// A user at a terminal.
struct Seat {
    child: Child,
    keys: Option<File>,
    reader: Option<JoinHandle<()>>,
    closed: Arc<AtomicBool>,
    /// Held open, so that its settings can be looked at when the program has ended.
    line: File,
    before: Termios,
    screen: Arc<Mutex<vt100::Parser>>,
    written: Arc<Mutex<Vec<Vec<u8>>>>,
}

impl Seat {
    fn new(host: &Host, rows: u16, columns: u16) -> Self {
        let terminal =
            openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).unwrap();
        grantpt(&terminal).unwrap();
        unlockpt(&terminal).unwrap();
        let name = ptsname(&terminal, Vec::new()).unwrap().into_string().unwrap();
        let line = File::options().read(true).write(true).open(name).unwrap();
        tcsetwinsize(&line, size(rows, columns)).unwrap();
        let before = tcgetattr(&line).unwrap();
        let child = Command::new("setsid")
            .arg("--ctty")
            .arg(program("virt-usb"))
            .arg("--config")
            .arg(host.config_file())
            .arg("watch")
            .env("TERM", "xterm-256color")
            .stdin(line.try_clone().unwrap())
            .stdout(line.try_clone().unwrap())
            .stderr(line.try_clone().unwrap())
            .spawn()
            .unwrap();
        let keys = File::from(terminal);
        let screen = Arc::new(Mutex::new(vt100::Parser::new(rows, columns, 0)));
        let written = Arc::new(Mutex::new(Vec::new()));
        let closed = Arc::new(AtomicBool::new(false));
        let mut end = keys.try_clone().unwrap();
        let (is_closed, to_screen, to_written) =
            (Arc::clone(&closed), Arc::clone(&screen), Arc::clone(&written));
        let reader = std::thread::spawn(move || {
            let mut bytes = [0; 65536];
            let beat = Timespec { tv_sec: 0, tv_nsec: 20_000_000 };
            while !is_closed.load(Ordering::Relaxed) {
                if poll(&mut [PollFd::new(&end, PollFlags::IN)], Some(&beat)).unwrap() == 0 {
                    continue;
                }
                let Ok(read @ 1..) = end.read(&mut bytes) else { return };
                to_written.lock().unwrap().push(bytes[..read].to_vec());
                to_screen.lock().unwrap().process(&bytes[..read]);
            }
        });
        Self {
            child,
            keys: Some(keys),
            reader: Some(reader),
            closed,
            line,
            before,
            screen,
            written,
        }
    }

    fn press(&mut self, keys: &str) {
        self.keys.as_mut().unwrap().write_all(keys.as_bytes()).unwrap();
    }

    /// As when the window is closed: the kernel hangs up.
    fn close(&mut self) {
        self.closed.store(true, Ordering::Relaxed);
        self.reader.take().unwrap().join().unwrap();
        self.keys = None;
    }

    fn resize(&self, rows: u16, columns: u16) {
        self.screen.lock().unwrap().screen_mut().set_size(rows, columns);
        tcsetwinsize(self.keys.as_ref().unwrap(), size(rows, columns)).unwrap();
    }

    fn rows(&self) -> Vec<String> {
        let screen = self.screen.lock().unwrap();
        let columns = screen.screen().size().1;
        screen.screen().rows(0, columns).collect()
    }

    fn sees(&self, what: &str) {
        let end = Instant::now() + PROGRAM_TIMEOUT;
        while !self.rows().iter().any(|row| row.contains(what)) {
            assert!(
                Instant::now() < end,
                "{what:?} is not on the screen:\n{}",
                self.rows().join("\n")
            );
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn is_taken(&self) -> bool {
        let screen = self.screen.lock().unwrap();
        screen.screen().alternate_screen() && screen.screen().hide_cursor()
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_raw(self.child.id().try_into().unwrap()).unwrap(), signal).unwrap();
    }

    /// The program has ended, and the terminal is as it was.
    fn ends_and_gives_back(mut self) -> ExitStatus {
        let status = until("its end", || self.child.try_wait().unwrap());
        until("the screen to be given back", || (!self.is_taken()).then_some(()));
        assert!(!self.screen.lock().unwrap().screen().hide_cursor());
        assert!(!self.screen.lock().unwrap().screen().alternate_screen());
        let now = tcgetattr(&self.line).unwrap();
        assert_eq!(
            (now.local_modes, now.input_modes, now.output_modes),
            (self.before.local_modes, self.before.input_modes, self.before.output_modes)
        );
        status
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

fn size(rows: u16, columns: u16) -> Winsize {
    Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 }
}

fn host() -> Host {
    let host = Host::new("");
    host.discover(KEY);
    host
}

#[test]
fn what_changes_is_seen_and_nothing_else_is_written() {
    let host = host();
    let mut seat = Seat::new(&host, 24, 100);
    seat.sees("virt-usb watch  host1  1 device: 1 available");
    seat.sees("q quit");
    assert!(seat.is_taken());
    // The rest of the first frame.
    let deadline = Instant::now() + PROGRAM_TIMEOUT;
    while !std::mem::take(&mut *seat.written.lock().unwrap()).is_empty() {
        assert!(Instant::now() < deadline, "it writes although nothing is new");
        std::thread::sleep(Duration::from_millis(300));
    }
    // It looks four times a second; where nothing is new it writes nothing.
    std::thread::sleep(Duration::from_millis(800));
    assert_eq!(seat.written.lock().unwrap().len(), 0);

    host.discover(&format!("{KEY}{STICK}"));
    seat.sees("2 devices: 2 available");
    seat.sees("0951:1666");
    seat.sees("added           2");
    let frames: Vec<String> = seat
        .written
        .lock()
        .unwrap()
        .iter()
        .map(|b| String::from_utf8_lossy(b).into_owned())
        .collect();
    let all = frames.concat();
    assert_eq!(all.matches("\x1b[?2026h").count(), 1, "one frame: {all:?}");
    assert!(!all.contains("HASP"), "the key's line has not changed: {all:?}");
    assert!(!all.contains("\x1b[2J"), "nothing was cleared: {all:?}");

    host.flavor("erp", r#"{"usb_devices":[{"vendor_id":"0529"}]}"#);
    seat.sees("flavor-set");
    seat.press("q");
    assert!(seat.ends_and_gives_back().success());
}

#[test]
fn it_fits_whatever_size_the_terminal_gets() {
    let host = Host::new("");
    let many: String = (1..=40)
        .map(|n| {
            format!(
                "[[device]]\nvendor = \"0529\"\nproduct = \"{n:04x}\"\nbus = 1\ndevice = \
            {n}\nport = \"1-{n}\"\nserial = \"S{n}\"\n"
            )
        })
        .collect();
    host.discover(&many);
    let mut seat = Seat::new(&host, 24, 100);
    seat.sees("of 40");
    seat.press("\x1b[F");
    seat.sees("-40 of 40");
    seat.press("\x1b[H");
    seat.sees("devices 1-");
    for (rows, columns) in [(50, 160), (10, 40), (3, 12), (2, 5), (24, 80)] {
        seat.resize(rows, columns);
        if rows > 5 {
            seat.sees("q quit");
            seat.sees("ID");
        }
    }
    seat.sees("virt-usb watch  host1  40 devices");
    seat.press("\x1b");
    assert!(seat.ends_and_gives_back().success());
}

#[test]
fn however_it_is_ended_the_terminal_is_as_it_was() {
    let host = host();
    for key in ["q", "\x03", "Q"] {
        let mut seat = Seat::new(&host, 24, 80);
        seat.sees("0529:0001");
        seat.press(key);
        if key == "Q" {
            // No key of ours: it stays.
            std::thread::sleep(Duration::from_millis(300));
            assert!(seat.is_taken() && seat.child.try_wait().unwrap().is_none());
            continue;
        }
        assert!(seat.ends_and_gives_back().success(), "{key:?}");
    }
    for signal in [Signal::TERM, Signal::HUP, Signal::INT, Signal::QUIT] {
        let seat = Seat::new(&host, 24, 80);
        seat.sees("0529:0001");
        seat.signal(signal);
        assert!(seat.ends_and_gives_back().success(), "{signal:?}");
    }
}

#[test]
fn it_stops_for_the_shell_and_goes_on() {
    let host = host();
    let mut seat = Seat::new(&host, 24, 80);
    seat.sees("0529:0001");
    seat.press("\x1a");
    let stat = format!("/proc/{}/stat", seat.child.id());
    let state =
        || std::fs::read_to_string(&stat).unwrap().rsplit(") ").next().unwrap().chars().next();
    until("it to stop", || (state() == Some('T')).then_some(()));
    until("the screen to be given back", || (!seat.is_taken()).then_some(()));
    host.discover(&format!("{KEY}{STICK}"));
    seat.signal(Signal::CONT);
    seat.sees("2 devices");
    assert!(seat.is_taken());
    seat.press("q");
    assert!(seat.ends_and_gives_back().success());
}

#[test]
fn a_terminal_that_goes_takes_it_along() {
    let host = host();
    let mut seat = Seat::new(&host, 24, 80);
    seat.sees("0529:0001");
    seat.close();
    until("its end", || seat.child.try_wait().unwrap());
}

#[test]
fn an_inventory_that_is_replaced_is_followed() {
    let (host, other) = (host(), Host::new(""));
    other.discover(STICK);
    drop(other.store());
    let mut seat = Seat::new(&host, 24, 80);
    seat.sees("0529:0001");
    let (from, to) = (other.path("state"), host.path("state"));
    for (suffix, bytes) in
        ["-wal", "-shm", ""].map(|s| (s, std::fs::read(from.join(format!("inventory.sqlite{s}")))))
    {
        let target = to.join(format!("inventory.sqlite{suffix}"));
        drop(std::fs::remove_file(&target));
        if let Ok(bytes) = bytes {
            std::fs::write(target, bytes).unwrap();
        }
    }
    seat.sees("0951:1666");
    std::fs::remove_file(to.join("inventory.sqlite")).unwrap();
    seat.sees("NOT UP TO DATE");
    seat.sees("0951:1666");
    seat.press("q");
    assert!(seat.ends_and_gives_back().success());
}

fn lines(host: &Host, options: &[&str]) -> (Child, BufReader<std::process::ChildStdout>) {
    let mut child = Command::new(program("virt-usb"))
        .arg("--config")
        .arg(host.config_file())
        .arg("watch")
        .args(options)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let out = BufReader::new(child.stdout.take().unwrap());
    (child, out)
}

fn next(out: &mut impl BufRead) -> String {
    let mut line = String::new();
    out.read_line(&mut line).unwrap();
    line
}

#[test]
fn elsewhere_an_event_is_a_line() {
    let host = host();
    let (mut child, mut out) = lines(&host, &[]);
    let first = next(&mut out);
    assert!(first.contains(" added device 1 by test discover: 0529:0001 "), "{first:?}");
    host.flavor("erp", r#"{"usb_devices":[{"vendor_id":"0529"}]}"#);
    assert!(
        next(&mut out).contains(" flavor-set by test flavor: erp"),
        "a line for what has happened since"
    );
    drop(out);
    assert!(
        until("its end", || child.try_wait().unwrap()).success(),
        "a reader that goes ends it, though nothing happens"
    );

    let (mut child, mut out) = lines(&host, &["--json", "--last", "1"]);
    let event = |line: String| serde_json::from_str::<serde_json::Value>(&line).unwrap();
    assert!(event(next(&mut out))["detail"].as_str().unwrap().starts_with("erp"));
    host.flavor("crm", r#"{"usb_devices":[{"vendor_id":"0951"}]}"#);
    let set = event(next(&mut out));
    assert_eq!(set["event"], "flavor-set");
    assert!(set["detail"].as_str().unwrap().starts_with("crm"), "{set}");
    drop(out);
    assert!(until("its end", || child.try_wait().unwrap()).success());
}

#[test]
fn lines_go_on_when_the_inventory_comes_back() {
    let host = host();
    let mut child = Command::new(program("virt-usb"))
        .arg("--config")
        .arg(host.config_file())
        .args(["watch", "--lines", "--last", "1"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut out = BufReader::new(child.stdout.take().unwrap());
    let mut said = BufReader::new(child.stderr.take().unwrap());
    assert!(next(&mut out).contains(" added device 1 "));
    let (file, away) = (host.path("state/inventory.sqlite"), host.path("state/away"));
    std::fs::rename(&file, &away).unwrap();
    let trouble = next(&mut said);
    assert!(trouble.starts_with("virt-usb: watch: there is no inventory"), "{trouble:?}");
    std::fs::rename(&away, &file).unwrap();
    assert_eq!(next(&mut said), "virt-usb: watch: the inventory can be read again\n");
    host.flavor("erp", r#"{"usb_devices":[{"vendor_id":"0529"}]}"#);
    assert!(next(&mut out).contains(" flavor-set by test flavor: erp"));
    drop(out);
    assert!(until("its end", || child.try_wait().unwrap()).success());
}

#[test]
fn without_an_inventory_it_says_so() {
    let output = Host::new("").virt_usb(&["watch"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).contains("virt-usb discover"), "{output:?}");
}
