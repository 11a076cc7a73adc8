//! An etcd in its own folder, on the loopback address.

use std::ffi::OsStr;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use crate::ports::Port;

/// One etcd, alone or a member of a cluster.
pub struct Etcd {
    dir: tempfile::TempDir,
    name: String,
    port: Port,
    peer: Port,
    /// All members, in the format of `--initial-cluster`.
    cluster: String,
    arguments: Vec<String>,
    scheme: &'static str,
    child: Option<Child>,
}

impl Etcd {
    /// Starts a fresh etcd, and waits until it responds.
    pub fn new() -> Self {
        Self::with(&[], "http")
    }

    /// The same with more arguments and this scheme.
    pub fn with(arguments: &[String], scheme: &'static str) -> Self {
        let mut etcd = Self::member("one", arguments, scheme);
        etcd.cluster = etcd.peer_url();
        etcd.start();
        etcd
    }

    /// A cluster with this number of members, ready for requests.
    pub fn cluster(members: usize, arguments: &[String]) -> Vec<Self> {
        let mut all: Vec<Self> =
            (0..members).map(|n| Self::member(&format!("m{n}"), arguments, "http")).collect();
        let cluster = all.iter().map(Self::peer_url).collect::<Vec<_>>().join(",");
        for member in &mut all {
            member.cluster.clone_from(&cluster);
            member.spawn();
        }
        all.iter().for_each(Self::wait);
        all
    }

    fn member(name: &str, arguments: &[String], scheme: &'static str) -> Self {
        Self {
            dir: tempfile::tempdir().unwrap(),
            name: name.to_owned(),
            port: Port::reserve(),
            peer: Port::reserve(),
            cluster: String::new(),
            arguments: arguments.to_vec(),
            scheme,
            child: None,
        }
    }

    fn peer_url(&self) -> String {
        format!("{}=http://127.0.0.1:{}", self.name, self.peer.number)
    }

    /// Path of the member's folder.
    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    /// URL of the member.
    pub fn endpoint(&self) -> String {
        format!("{}://127.0.0.1:{}", self.scheme, self.port.number)
    }

    /// Lines of a configuration with this etcd, and a machine id file with that text.
    pub fn keys(&self, machine: &Path, more: &str) -> String {
        format!(
            "[fleet]\nendpoints = [{:?}]\nmachine_id = {:?}\nlease = 5\n{more}\n",
            self.endpoint(),
            machine.display().to_string()
        )
    }

    /// Starts it again with its data.
    pub fn start(&mut self) {
        self.spawn();
        self.wait();
    }

    fn spawn(&mut self) {
        let peer = format!("http://127.0.0.1:{}", self.peer.number);
        let log = std::fs::File::options()
            .append(true)
            .create(true)
            .open(self.dir.path().join("log"))
            .unwrap();
        let child = Command::new("etcd")
            .arg("--data-dir")
            .arg(self.dir.path().join("data"))
            .args([
                "--listen-client-urls",
                &self.endpoint(),
                "--advertise-client-urls",
                &self.endpoint(),
            ])
            .args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer])
            .args(["--name", &self.name, "--initial-cluster", &self.cluster])
            .args(&self.arguments)
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap_or_else(|e| panic!("etcd: {e}: 'make test-deps' installs it"));
        self.child = Some(child);
    }

    /// Waits until it serves requests: it listens before it has read its log and elected a leader.
    fn wait(&self) {
        let deadline = Instant::now() + crate::PROGRAM_TIMEOUT;
        // A client with a wrong certificate or without a password is refused, and so answered.
        let up = || {
            std::net::TcpStream::connect(("127.0.0.1", self.port.number)).is_ok()
                && (self.scheme == "https"
                    || self.etcdctl(&["endpoint", "health"]).status.success())
        };
        while !up() {
            let log = || std::fs::read_to_string(self.dir.path().join("log")).unwrap_or_default();
            assert!(Instant::now() < deadline, "etcd does not answer: {}", log());
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Sends a signal to the member.
    pub fn signal(&self, signal: &str) {
        let pid = self.child.as_ref().map(|child| child.id().to_string()).unwrap_or_default();
        assert!(Command::new("kill").arg(signal).arg(pid).status().unwrap().success());
    }

    /// Kills the member, as a power cut would.
    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            child.kill().unwrap();
            child.wait().unwrap();
        }
    }

    /// Runs etcdctl, with a timeout of five minutes.
    ///
    /// Runs etcdctl. On a busy machine etcd gives up a request after some seconds, so the command
    /// is retried. If the first try succeeded after all, etcd refuses to repeat it.
    pub fn etcdctl(&self, arguments: &[&str]) -> Output {
        let says =
            |output: &Output, words: &str| String::from_utf8_lossy(&output.stderr).contains(words);
        let mut output = self.etcdctl_within("300s", arguments);
        for _ in 0..5 {
            if output.status.success() || !says(&output, "code = DeadlineExceeded") {
                return output;
            }
            let again = self.etcdctl_within("300s", arguments);
            if says(&again, "already exists") {
                output.status = std::process::ExitStatus::default();
                return output;
            }
            output = again;
        }
        output
    }

    /// The same with another timeout, in the format of etcdctl.
    pub fn etcdctl_within(&self, timeout: &str, arguments: &[&str]) -> Output {
        let ctl = self.client("etcdctl", timeout).args(arguments).stdin(Stdio::null()).output();
        ctl.unwrap_or_else(|e| panic!("etcdctl: {e}: 'make test-deps' installs it"))
    }

    /// A program that calls etcdctl. By default, etcdctl closes a connection after two seconds. If
    /// etcd requires a password, its check is a part of the connection, and takes longer on a busy
    /// machine.
    pub fn client(&self, program: impl AsRef<OsStr>, timeout: &str) -> Command {
        let mut client = Command::new(program);
        client
            .env("ETCDCTL_API", "3")
            .env("ETCDCTL_ENDPOINTS", self.endpoint())
            .env("ETCDCTL_DIAL_TIMEOUT", timeout)
            .env("ETCDCTL_COMMAND_TIMEOUT", timeout);
        client
    }

    /// Value of a key; empty if the key does not exist.
    pub fn get(&self, key: &str) -> String {
        let output = self.etcdctl(&["get", "--print-value-only", key]);
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).unwrap().trim_end().to_owned()
    }

    /// Puts a key.
    pub fn put(&self, key: &str, value: &str) {
        let output = self.etcdctl(&["put", key, value]);
        assert!(output.status.success(), "{output:?}");
    }
}

impl Default for Etcd {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        self.kill();
    }
}
