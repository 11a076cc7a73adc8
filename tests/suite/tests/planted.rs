//! Root's tools, used on a folder of another user who works against them: while a command runs as
//! root, its owner swaps names in `state_dir` for links, hundreds of times a second.
//!
//! Outside of `state_dir` are files that only root may read or write, under the names that a link
//! leads to. After each command they are unchanged and unread. The command itself may fail: a user
//! who swaps the inventory's files harms only the inventory.
//!
//! `VIRT_USB_ROUNDS=20` repeats each command 20 times as often.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

use std::collections::BTreeMap;
use std::fs::{self, Permissions};
use std::io::Read;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use virt_usb_suite::{Host, device, domain, feed, program, root, text};

const NOBODY: u32 = 65534;
/// Stands in every file that only root may read.
const SECRET: &str = "root's own secret";
/// A command that has not ended by then hangs, in seconds.
const PROGRAM_TIMEOUT: &str = "300";

/// Names that stand in `state_dir`, or come there while a command runs.
const NAMES: [&str; 21] = [
    "hints/other",
    "hints.new/other",
    "inventory.sqlite-wal",
    "inventory.sqlite-shm",
    "inventory.sqlite-journal",
    "inventory.sqlite.new/inventory.sqlite",
    "inventory.sqlite.new/inventory.sqlite-wal",
    "inventory.sqlite.new/inventory.sqlite-journal",
    "inventory.sqlite.new/template.sqlite",
    "inventory.sqlite.new/template.sqlite-journal",
    "inventory.sqlite.new/both",
    "inventory.sqlite.new/damaged/inventory.sqlite",
    "inventory.sqlite.new/present/inventory.sqlite",
    "out/copy.sqlite",
    "out/hook.log",
    "out/sys/bus/usb/devices/other",
    "out/sys/bus/usb/simulated-by-virt-usb",
    "tokens.toml",
    "tokens.new",
    "tokens.lock",
    "agent.lock",
];

/// The owner of the folder. The names of the first list change places with links, as fast as that
/// goes. Those of the second are links that come and go. In the folders of the third, links are
/// made as soon as the folder is there, and it is noted if the secret can be read in one of its
/// files.
const ATTACKER: &str = r#"
import ctypes, os, sys, time
user, state, victim, *lists = sys.argv[1:]
swapped, planted, flooded = ([name for name in names.split(",") if name] for names in lists)
aside = f"{state}/.aside"
rename = ctypes.CDLL(None).renameat2
EXCHANGE, HERE = 2, -100
parent = os.getppid()
# Once all is loaded: the user may not be allowed to read the folder of python.
os.setgroups([])
os.setgid(int(user))
os.setuid(int(user))

def quietly(what, *arguments):
    try:
        return what(*arguments)
    except OSError:
        return None

def steal(path):
    with open(path, "rb") as file:
        if b"root's own secret" in file.read(1 << 20):
            os.mkdir(f"{aside}/stolen")

os.mkdir(aside)
for number, name in enumerate(swapped):
    os.symlink(f"{victim}/{name}", f"{aside}/{number}")
print("ready", flush=True)
while os.getppid() == parent:
    for number, name in enumerate(swapped):
        rename(HERE, f"{state}/{name}".encode(), HERE, f"{aside}/{number}".encode(), EXCHANGE)
    for name in planted:
        # A second name of a file of root's where the kernel allows one, or else a link.
        quietly(os.link, f"{victim}/{name}", f"{state}/{name}")
        quietly(os.symlink, f"{victim}/{name}", f"{state}/{name}")
    for folder in flooded:
        for name in quietly(os.listdir, f"{victim}/{folder}") or []:
            quietly(os.symlink, f"{victim}/{folder}/{name}", f"{state}/{folder}/{name}")
        for name in quietly(os.listdir, f"{state}/{folder}") or []:
            quietly(steal, f"{state}/{folder}/{name}")
    for name in planted:
        if os.path.islink(f"{state}/{name}"):
            quietly(os.unlink, f"{state}/{name}")
    # Often enough, and the command under attack has the processor too. One folder alone is swapped without a pause.
    if len(swapped) + len(planted) > 1:
        time.sleep(0.0001)
"#;

/// How the attacker works: the three lists of names.
#[derive(Clone, Copy)]
struct Attack {
    swapped: &'static str,
    planted: &'static str,
    flooded: &'static str,
}

const HINTS: Attack = Attack { swapped: "hints", planted: "", flooded: "" };
const BESIDE: Attack = Attack {
    swapped: "hints,inventory.sqlite-wal,inventory.sqlite-shm",
    planted: "hints.new,inventory.sqlite-journal,inventory.sqlite-wal,inventory.sqlite-shm",
    flooded: "",
};
const INVENTORY: Attack = Attack { swapped: "inventory.sqlite", planted: "", flooded: "" };
const SCRATCH: Attack =
    Attack { swapped: "inventory.sqlite.new", planted: "", flooded: "inventory.sqlite.new" };
const NAMED: Attack = Attack { swapped: "out,out/sys", planted: "", flooded: "out" };
const TOKENS: Attack =
    Attack { swapped: "tokens.toml", planted: "tokens.new,tokens.lock", flooded: "" };

/// Commands that read the inventory or write to it.
const COMMANDS: [&[&str]; 22] = [
    &["discover", "--sim", "HOST/sim.toml"],
    &["devices", "--all"],
    &["hosts", "--documents"],
    &["claims"],
    &["claims", "release", "00000007-0000-4000-8000-000000000000", "--force"],
    &["events"],
    &["flavor", "set", "ROUND", r#"{"usb_devices":[{"vendor_id":"0529"}]}"#],
    &["flavor", "list"],
    &["flavor", "remove", "erp"],
    &["grant", "set", "ROUND", r#"{"usb_devices":[{"vendor_id":"0529"}],"projects":["p1"]}"#],
    &["grant", "list"],
    &["grant", "remove", "0"],
    &["disable", "1", "--reason", "ROUND"],
    &["enable", "1"],
    &["quarantine", "clear", "1"],
    &["tag", "1", "erp"],
    &["untag", "1", "erp"],
    &["owner", "set", "test", "p1"],
    &["attach", "test", "1"],
    &["store", "check"],
    &["store", "backup", "HOST/copy-ROUND.sqlite"],
    &["doctor"],
];

/// False if the tests do not run as root, which is reported: then there is no other user to attack.
fn is_root(test: &str) -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        eprintln!(
            "{test}: not root: no process of another user can be started, this is not tested"
        );
    }
    root
}

fn copy(from: &Path, to: &Path) {
    assert!(Command::new("cp").arg("-a").arg(from).arg(to).status().unwrap().success());
}

/// Contents of a folder: owner, group, mode and data of each file.
type Belongings = BTreeMap<PathBuf, (u32, u32, u32, Vec<u8>)>;

fn belongings(folder: &Path) -> Belongings {
    let mut found = BTreeMap::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let meta = fs::symlink_metadata(&path).unwrap();
        if meta.is_dir() {
            found.extend(belongings(&path));
        }
        let contents = if meta.is_file() { fs::read(&path).unwrap() } else { Vec::new() };
        found.insert(path, (meta.uid(), meta.gid(), meta.mode(), contents));
    }
    found
}

struct Attacker(Child);

impl Drop for Attacker {
    fn drop(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

/// A host whose `state_dir` belongs to the user `nobody`, beside files of root.
struct Target {
    host: Host,
    victim: PathBuf,
    pristine: PathBuf,
}

impl Target {
    fn new() -> Self {
        let host = Host::new("libvirt_uri = \"test:///default\"\n");
        let target = Self { victim: host.path("victim"), pristine: host.path("pristine"), host };
        let host = &target.host;
        fs::set_permissions(host.path(""), Permissions::from_mode(0o755)).unwrap();
        let config = fs::read_to_string(host.config_file()).unwrap();
        fs::write(host.path("hook.toml"), config.replace("/log\"", "/state/out/hook.log\""))
            .unwrap();
        let key = device("0001", "1-1", 2, "serial = \"A\"");
        fs::write(host.path("sim.toml"), &key).unwrap();
        let theirs = |name: &str| {
            fs::create_dir(host.path(name)).unwrap();
            chown(host.path(name), Some(NOBODY), Some(NOBODY)).unwrap();
        };
        theirs("state");
        host.discover(&key);
        host.flavor("erp", r#"{"usb_devices":[{"vendor_id":"0529"}]}"#);
        ["state/out", "state/out/sys"].iter().for_each(|name| theirs(name));
        for words in [
            &["token", "add", "me", "--project", "p1"][..],
            &["store", "backup", "HOST/state/out/copy.sqlite"],
            &["store", "backup", "HOST/backup.sqlite"],
        ] {
            assert!(target.run(&target.virt_usb(words, 0), "").status.success(), "{words:?}");
        }
        for name in NAMES {
            let path = target.victim.join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(&path, SECRET).unwrap();
            fs::set_permissions(&path, Permissions::from_mode(0o600)).unwrap();
        }
        // An inventory of root's own, which would be opened, locked and written.
        fs::copy(host.path("state/inventory.sqlite"), target.victim.join("inventory.sqlite"))
            .unwrap();
        // And hints of the same names as theirs, which would be removed.
        for hint in fs::read_dir(host.path("state/hints")).unwrap() {
            fs::write(target.victim.join("hints").join(hint.unwrap().file_name()), "").unwrap();
        }
        copy(&host.path("state"), &target.pristine);
        target
    }

    /// Puts the folder back as it was at first.
    fn reset(&self) {
        fs::remove_dir_all(self.host.path("state")).unwrap();
        copy(&self.pristine, &self.host.path("state"));
    }

    fn attack(&self, how: Attack) -> Attacker {
        let mut command = Command::new("python3");
        command.args(["-c", ATTACKER, &NOBODY.to_string()]);
        command.arg(self.host.path("state")).arg(&self.victim);
        command.args([how.swapped, how.planted, how.flooded]);
        let mut attacker = Attacker(command.stdout(Stdio::piped()).spawn().unwrap());
        let mut ready = [0; 6];
        attacker.0.stdout.as_mut().unwrap().read_exact(&mut ready).unwrap();
        attacker
    }

    fn virt_usb(&self, words: &[&str], round: usize) -> Command {
        let mut command = Command::new(program("virt-usb"));
        command.arg("--config").arg(self.host.config_file());
        let host = self.host.path("");
        let put = |word: &&str| {
            word.replace("HOST", host.to_str().unwrap()).replace("ROUND", &round.to_string())
        };
        command.args(words.iter().map(put));
        command
    }

    /// Runs a command as root; it ends by itself.
    fn run(&self, command: &Command, input: &str) -> Output {
        let mut bounded = Command::new("timeout");
        bounded.arg(PROGRAM_TIMEOUT).arg(command.get_program()).args(command.get_args());
        let output = feed(bounded, input.as_bytes());
        assert_ne!(output.status.code(), Some(124), "it hangs: {command:?}");
        output
    }

    /// Where the secret stands below `state_dir`.
    fn given_away(&self) -> Vec<PathBuf> {
        let holds =
            |bytes: &[u8]| bytes.windows(SECRET.len()).any(|part| part == SECRET.as_bytes());
        let all = belongings(&self.host.path("state"));
        let told = all.into_iter().filter(|(path, (owner, _, _, contents))| {
            path.ends_with(".aside/stolen") || (*owner != 0 && holds(contents))
        });
        told.map(|(path, _)| path).collect()
    }
}

/// Runs root's commands in turn, each again and again, against one who works in this way.
fn check(test: &str, how: Attack, rounds: usize, commands: &[&[&str]]) {
    let call =
        |target: &Target, words: &[&str], round| (target.virt_usb(words, round), String::new());
    check_calls(test, how, rounds, commands, call);
}

fn check_calls(
    test: &str,
    how: Attack,
    rounds: usize,
    commands: &[&[&str]],
    call: impl Fn(&Target, &[&str], usize) -> (Command, String),
) {
    if !is_root(test) {
        return;
    }
    let longer =
        std::env::var("VIRT_USB_ROUNDS").ok().and_then(|times| times.parse::<usize>().ok());
    let rounds = rounds * longer.unwrap_or(1);
    let target = Target::new();
    let before = belongings(&target.victim);
    for words in commands {
        target.reset();
        let attacker = target.attack(how);
        for round in 0..rounds {
            let (command, input) = call(&target, words, round);
            let said = text(&target.run(&command, &input).stderr);
            let now = belongings(&target.victim);
            let differs = |path: &&PathBuf| before.get(*path) != now.get(*path);
            let harmed: Vec<_> = before.keys().chain(now.keys()).filter(differs).collect();
            assert!(
                harmed.is_empty(),
                "{test}: round {round} of {words:?} changed {harmed:?}: {said}"
            );
        }
        drop(attacker);
        let told = target.given_away();
        assert!(told.is_empty(), "{test}: {words:?} gave away what is root's: {told:?}");
    }
}

#[test]
fn no_command_goes_through_links_beside_the_inventory() {
    check("beside", BESIDE, 3, &COMMANDS);
    // Those that make or remove hints.
    let hinted = [COMMANDS[0], COMMANDS[6], COMMANDS[8]];
    check("hints", HINTS, 15, &hinted);
}

#[test]
fn no_command_goes_through_a_link_in_place_of_the_inventory() {
    check("inventory", INVENTORY, 1, &COMMANDS);
}

#[test]
fn no_inventory_is_recreated_through_links() {
    let commands: [&[&str]; 2] = [
        &["store", "rebuild", "--force", "--without-guests", "--sim", "HOST/sim.toml"],
        &["store", "restore", "HOST/backup.sqlite", "--without-guests", "--sim", "HOST/sim.toml"],
    ];
    check("recreated", SCRATCH, 15, &commands);
    check("recreated", BESIDE, 5, &commands);
    check("recreated", INVENTORY, 2, &commands);
}

#[test]
fn what_an_operator_names_in_the_folder_is_not_reached_through_links() {
    let commands: [&[&str]; 3] = [
        &["store", "backup", "HOST/state/out/ROUND.sqlite"],
        &[
            "store",
            "restore",
            "HOST/state/out/copy.sqlite",
            "--without-guests",
            "--sim",
            "HOST/sim.toml",
        ],
        &["discover", "--sim", "HOST/sim.toml", "--sysfs-out", "HOST/state/out/sys"],
    ];
    check("named", NAMED, 10, &commands);
}

#[test]
fn tokens_are_not_kept_through_links() {
    let commands: [&[&str]; 4] = [
        &["token", "add", "ROUND", "--project", "p1"],
        &["token", "list"],
        &["token", "remove", "me"],
        &["doctor"],
    ];
    check("tokens", TOKENS, 5, &commands);
}

#[test]
fn the_hook_goes_through_no_link() {
    let operations: [&[&str]; 7] = [
        &["prepare", "begin"],
        &["started", "begin"],
        &["restore", "begin"],
        &["migrate", "begin"],
        &["reconnect", "begin"],
        &["stopped", "end"],
        &["release", "end"],
    ];
    let call = |target: &Target, words: &[&str], _| {
        let mut hook = Command::new(program("virt-usb-hook"));
        hook.arg("--config").arg(target.host.path("hook.toml")).arg("erp").args(words).arg("-");
        (hook, domain("erp", 7, r#"{"usb_devices":[{"vendor_id":"0529"}]}"#))
    };
    for how in [BESIDE, INVENTORY, NAMED] {
        check_calls("hook", how, 6, &operations, call);
    }
}

/// The package's script, as it is installed, for this host's configuration and an older schema.
fn preinst(host: &Host) -> PathBuf {
    let read = |name: &str| fs::read_to_string(root().join(name)).unwrap();
    let script = read("debian/preinst").replace("#STATE_DIR#", &read("install/state-dir"));
    let script = script.replace("#SCHEMA#", "1").replace("/etc/virt-usb/config.toml", "$CONFIG");
    let path = host.path("preinst");
    fs::write(&path, script.replace("$CONFIG", host.config_file().to_str().unwrap())).unwrap();
    path
}

#[test]
fn the_installation_goes_through_no_link() {
    let scripts: [&[&str]; 2] = [&["give"], &["preinst"]];
    let call = |target: &Target, words: &[&str], _| {
        let mut script = Command::new("sh");
        match words {
            ["preinst"] => script.arg(preinst(&target.host)).arg("upgrade"),
            _ => {
                let give = "config=$2; . \"$1\"; give_state_dir 65534:65534";
                script.args(["-ec", give, "sh"]).arg(root().join("install/state-dir"));
                script.arg(target.host.config_file())
            }
        };
        (script, String::new())
    };
    for how in [BESIDE, INVENTORY] {
        check_calls("install", how, 8, &scripts, call);
    }
}

#[test]
fn an_older_package_is_refused_by_reading_as_the_owner() {
    if !is_root("preinst") {
        return;
    }
    let target = Target::new();
    let refused = Command::new("sh").arg(preinst(&target.host)).arg("upgrade").output().unwrap();
    let why = text(&refused.stderr);
    assert!(refused.status.code() == Some(1) && why.contains("this package knows 1"), "{why}");
}

#[test]
fn a_pipe_in_place_of_a_file_stops_no_command() {
    if !is_root("pipe") {
        return;
    }
    let target = Target::new();
    for suffix in ["", "-wal", "-shm", "-journal"] {
        // One that its owner may write to, and one that may be read alone.
        for mode in ["0666", "0444"] {
            target.reset();
            let pipe = target.host.path(&format!("state/inventory.sqlite{suffix}"));
            drop(fs::remove_file(&pipe));
            assert!(
                Command::new("mkfifo").args(["-m", mode]).arg(&pipe).status().unwrap().success()
            );
            chown(&pipe, Some(NOBODY), Some(NOBODY)).unwrap();
            let asks = domain("erp", 7, r#"{"usb_devices":[{"vendor_id":"0529"}]}"#);
            for command in [
                target.host.hook(&["erp", "prepare", "begin", "-"]),
                target.virt_usb(&["devices"], 0),
                target.virt_usb(&["discover", "--sim", "HOST/sim.toml"], 0),
            ] {
                let said = target.run(&command, &asks);
                let why = text(&said.stderr);
                assert!(
                    said.status.code() == Some(1) && why.contains("not a regular file"),
                    "{suffix}: {why}"
                );
            }
            let rebuild =
                ["store", "rebuild", "--force", "--without-guests", "--sim", "HOST/sim.toml"];
            target.run(&target.virt_usb(&rebuild, 0), "");
        }
    }
}
