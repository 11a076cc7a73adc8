//! A host in a folder, for tests at process boundaries: simulated devices with their sysfs tree, a
//! procfs with a boot id, a store, and the real programs.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test's helper fails the test"
)]

mod etcd;
mod ports;

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use virt_usb::discovery::{Simulated, UsbSource};
use virt_usb::inventory;
use virt_usb_config::Config;
use virt_usb_config::host_env;
use virt_usb_model::Flavor;
use virt_usb_store::{Durability, Store};

pub use etcd::Etcd;

/// Timeout of a condition. It is long for busy machines, and only a failure takes that long.
pub const PROGRAM_TIMEOUT: Duration = Duration::from_secs(300);

/// Polls until `look` returns a value.
pub fn until<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + PROGRAM_TIMEOUT;
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(Instant::now() < deadline, "waited in vain for {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Number of cases of a property test: `PROPTEST_CASES`, or `default` if that is not set.
pub fn cases(default: u32) -> u32 {
    std::env::var("PROPTEST_CASES").ok().and_then(|cases| cases.parse().ok()).unwrap_or(default)
}

/// The repository's root.
pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(2).unwrap().to_path_buf()
}

/// Path of a program of the release build. Fails if it is missing or older than its sources.
pub fn program(name: &str) -> PathBuf {
    let path = root().join("target/release").join(name);
    let built = path
        .metadata()
        .unwrap_or_else(|_| panic!("{} is not built: run 'make build'", path.display()))
        .modified()
        .unwrap();
    let sources = std::fs::read_to_string(path.with_extension("d")).unwrap();
    for source in sources.split_whitespace().skip(1) {
        let newer = Path::new(source)
            .metadata()
            .and_then(|m| m.modified())
            .map_or(true, |changed| changed > built);
        assert!(!newer, "{} is older than {source}: run 'make build'", path.display());
    }
    path
}

/// A host in a temporary folder.
pub struct Host {
    dir: tempfile::TempDir,
}

impl Host {
    /// A host of one boot, without devices, with `keys` added to its configuration.
    pub fn new(keys: &str) -> Self {
        let host = Self { dir: tempfile::tempdir().unwrap() };
        let sysctl = host.path("proc/sys/kernel");
        std::fs::create_dir_all(sysctl.join("random")).unwrap();
        std::fs::create_dir_all(host.path("sys")).unwrap();
        std::fs::write(sysctl.join("hostname"), "host1\n").unwrap();
        host.boot("11111111-1111-4111-8111-111111111111", 1000.0);
        let base: String = [
            ("state_dir", "state"),
            ("sysfs_root", "sys"),
            ("procfs_root", "proc"),
            ("log", "log"),
        ]
        .iter()
        .map(|(key, name)| format!("{key} = {:?}\n", host.path(name)))
        .collect();
        // Where a test does not ask for it, no two agents want one port.
        let api = if keys.contains("api = ") { "" } else { "api = \"off\"\n" };
        std::fs::write(host.config_file(), base + api + keys).unwrap();
        host
    }

    /// A path in the host's folder.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Path of the host's configuration.
    pub fn config_file(&self) -> PathBuf {
        self.path("config.toml")
    }

    /// The parsed configuration. If it is invalid, only its folders are set.
    pub fn config(&self) -> Config {
        Config::load(Some(&self.config_file())).unwrap_or_else(|_| Config {
            state_dir: self.path("state"),
            sysfs_root: self.path("sys"),
            procfs_root: self.path("proc"),
            ..Config::default()
        })
    }

    /// Sets the boot id and the time since boot, in seconds.
    pub fn boot(&self, id: &str, uptime: f64) {
        std::fs::write(self.path("proc/sys/kernel/random/boot_id"), format!("{id}\n")).unwrap();
        std::fs::write(self.path("proc/uptime"), format!("{uptime:.2} 0.00\n")).unwrap();
    }

    /// Replaces the simulated devices with those of the TOML text, without a scan.
    pub fn plug(&self, devices: &str) -> Simulated {
        let simulated = Simulated::parse(devices).unwrap();
        simulated.write_sysfs(&self.path("sys")).unwrap();
        simulated
    }

    /// Replaces the devices with those of the TOML text in a tree that looks like the host's own,
    /// without a scan.
    pub fn plug_in_host(&self, devices: &str) {
        drop(std::fs::remove_dir_all(self.path("sys/bus/usb")));
        self.plug(devices);
        std::fs::remove_file(self.path("sys/bus/usb/simulated-by-virt-usb")).unwrap();
    }

    /// Plugs in the devices and scans.
    pub fn discover(&self, devices: &str) {
        self.discover_as("host1", devices);
    }

    /// The same on a host with that name.
    pub fn discover_as(&self, name: &str, devices: &str) {
        let snapshot = self.plug(devices).snapshot();
        let config = self.config();
        let mut store = Store::create(&config.state_dir, Duration::from_secs(5)).unwrap();
        let context = host_env::context(&config, "test discover").unwrap();
        let whitelist =
            inventory::located(&config.whitelist, &mut store, &snapshot, &config.sysfs_root)
                .unwrap();
        store
            .reconcile(
                name,
                &config.flapping,
                snapshot.seen(&config.aliases),
                |known| inventory::plan(&snapshot, known, &whitelist, &config.aliases),
                &context,
            )
            .unwrap();
    }

    /// Stores a flavor.
    pub fn flavor(&self, name: &str, json: &str) {
        let config = self.config();
        let context = host_env::context(&config, "test flavor").unwrap();
        let mut store = Store::create(&config.state_dir, Duration::from_secs(5)).unwrap();
        store.set_flavor(name, &Flavor::parse(json).unwrap(), &context).unwrap();
    }

    /// The inventory, opened as the command line does.
    pub fn store(&self) -> Store {
        Store::open(&self.config().state_dir, Duration::from_secs(5), Durability::Power).unwrap()
    }

    /// The claims, one per line, without values that differ between runs.
    pub fn claims(&self) -> String {
        if !self.path("state").join(virt_usb_store::FILE_NAME).exists() {
            return String::new();
        }
        let line = |c: virt_usb_store::ClaimRow| {
            let pending = if c.pending { " pending" } else { "" };
            format!(
                "device {} {} {} {} hold={}{pending}\n",
                c.device_id, c.domain, c.instance_uuid, c.state, c.hold
            )
        };
        match Store::open(&self.path("state"), Duration::from_secs(5), Durability::Power) {
            Ok(store) => store.claims().unwrap().into_iter().map(line).collect(),
            Err(e) => {
                format!(
                    "unreadable: {}\n",
                    e.to_string().replace(self.path("").to_str().unwrap(), "DIR/")
                )
            }
        }
    }

    /// The command that calls the hook with four arguments.
    pub fn hook(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(program("virt-usb-hook"));
        command.arg("--config").arg(self.config_file()).args(arguments);
        command
    }

    /// Calls the hook.
    pub fn call(&self, arguments: &[&str], xml: &[u8]) -> Output {
        feed(self.hook(arguments), xml)
    }

    /// Runs `virt-usb`.
    pub fn virt_usb(&self, arguments: &[&str]) -> Output {
        Command::new(program("virt-usb"))
            .arg("--config")
            .arg(self.config_file())
            .args(arguments)
            .output()
            .unwrap()
    }
}

/// Writes an executable file.
///
/// Another process writes it. Otherwise a concurrent fork could inherit a descriptor that is open
/// for writing, and the kernel does not execute a file that is open for writing (ETXTBSY).
///
/// # Panics
/// If the file cannot be written.
pub fn write_program(path: &Path, contents: &[u8]) {
    let mut writer = Command::new("/bin/sh");
    writer.args(["-c", "cat > \"$1\" && chmod 755 \"$1\"", "sh"]).arg(path);
    let output = feed(writer, contents);
    assert!(output.status.success(), "{}", text(&output.stderr));
}

/// Runs a command with `input` on stdin, reading both of its outputs.
pub fn feed(mut command: Command, input: &[u8]) -> Output {
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = child.stdin.take().unwrap();
    std::thread::scope(|scope| {
        // Who does not read its input is not waited for.
        scope.spawn(move || drop(stdin.write_all(input)));
        child.wait_with_output().unwrap()
    })
}

/// `unshare`, which runs the command of its arguments in its own network namespace, as root.
///
/// Only root may create one without a user namespace, and containers and chroots refuse user
/// namespaces.
///
/// # Panics
/// If the kernel refuses the namespace.
pub fn own_network() -> Command {
    let new = || {
        let mut unshare = Command::new("unshare");
        unshare.arg("--net");
        if !rustix::process::geteuid().is_root() {
            unshare.arg("--map-root-user");
        }
        unshare
    };
    let tried = new().arg("true").output();
    let tried = tried.unwrap_or_else(|e| panic!("unshare: {e}: 'make test-deps' installs it"));
    assert!(
        tried.status.success(),
        "this test needs a network namespace, and the kernel refuses one ({}): run it as root, \
            outside of a chroot",
        text(&tried.stderr).trim()
    );
    new()
}

/// A device for [`Host::discover`].
pub fn device(product: &str, port: &str, number: u8, more: &str) -> String {
    let bus = port.split('-').next().unwrap();
    format!(
        "[[device]]\nvendor = \"0529\"\nproduct = \"{product}\"\nbus = {bus}\ndevice = \
            {number}\nport = \"{port}\"\nspeed = \"full\"\n{more}\n"
    )
}

/// A domain that requests `flavor` in its metadata.
pub fn domain(name: &str, number: u32, flavor: &str) -> String {
    format!(
        "<domain type='kvm'>
  <name>{name}</name>
  <uuid>{number:08x}-0000-4000-8000-000000000000</uuid>
  <metadata>
    <usb:flavor xmlns:usb='urn:virt-usb:flavor:1'>{flavor}</usb:flavor>
  </metadata>
  <memory unit='MiB'>64</memory>
  <os>
    <type arch='x86_64' machine='q35'>hvm</type>
  </os>
  <devices>
    <controller type='usb' index='0' model='qemu-xhci' ports='15'/>
  </devices>
</domain>
"
    )
}

/// Output of a program as text.
///
/// # Panics
/// If the output is not UTF-8.
pub fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

/// Standard output of a program, which must have succeeded.
///
/// # Panics
/// If the program failed.
pub fn ok(output: &Output) -> String {
    assert!(output.status.success(), "{}{}", text(&output.stdout), text(&output.stderr));
    text(&output.stdout)
}
