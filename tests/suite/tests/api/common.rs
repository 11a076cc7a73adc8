//! A host with an agent whose API is served, and requests to it.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::net::UnixStream;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use virt_usb_suite::{Host, PROGRAM_TIMEOUT, device, ok, program};

pub(crate) const ERP: &str = "11111111-2222-4333-8444-555555555555";
pub(crate) const CRM: &str = "99999999-2222-4333-8444-555555555555";
pub(crate) const OFF: &str = "77777777-2222-4333-8444-555555555555";
/// A domain that names no owner.
pub(crate) const LAB: &str = "33333333-2222-4333-8444-555555555555";
/// The project of the guests `erp` and `off`; `crm` is another's.
pub(crate) const OURS: &str = "3f0c7a5e9d2b4c1f8a6e5d4c3b2a1908";
pub(crate) const THEIRS: &str = "00000000000000000000000000000002";

/// The agent of a host, and where it answers.
pub(crate) struct Served {
    pub(crate) host: Host,
    pub(crate) child: Child,
    pub(crate) at: SocketAddr,
}

/// A response of the API.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) headers: BTreeMap<String, String>,
    pub(crate) text: String,
}

impl Answer {
    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.text).unwrap_or_else(|e| panic!("{e}: {self:?}"))
    }

    /// The words of a fault, which must have this name.
    pub(crate) fn fault(&self, name: &str) -> String {
        let body = self.json();
        assert_eq!(body[name]["code"], self.status, "{self:?}");
        body[name]["message"].as_str().unwrap().to_owned()
    }
}

pub(crate) fn read(mut stream: impl Read) -> Answer {
    let mut bytes = Vec::new();
    // One that is cut off has said what it has.
    let _ = stream.read_to_end(&mut bytes);
    let text = String::from_utf8(bytes).unwrap();
    let (head, body) = text.split_once("\r\n\r\n").unwrap_or((&text, ""));
    let mut lines = head.lines();
    let status =
        lines.next().and_then(|line| line.split(' ').nth(1)).and_then(|code| code.parse().ok());
    let header = |line: &str| {
        let (name, value) = line.split_once(": ")?;
        Some((name.to_ascii_lowercase(), value.to_owned()))
    };
    Answer {
        status: status.unwrap_or(0),
        headers: lines.filter_map(header).collect(),
        text: body.to_owned(),
    }
}

pub(crate) fn guest(name: &str, uuid: &str, project: &str, more: &str) -> String {
    format!("[[domain]]\nname = '{name}'\nuuid = '{uuid}'\nproject = '{project}'\n{more}\n")
}

/// Four devices: 1 for all projects, 2 only for our project, 3 only for theirs, 4 for none.
pub(crate) const RULES: &str = r#"
usb_white_list_switch = "on"
usb_passthrough_whitelist = [
    { vendor = "0529", product = "0001" },
    { vendor = "0529", product = "0002", projects = ["3f0c7a5e9d2b4c1f8a6e5d4c3b2a1908"], tags = ["ours"] },
    { vendor = "0529", product = "0003", projects = ["00000000000000000000000000000002"] },
]
"#;

impl Served {
    pub(crate) fn new(keys: &str) -> Self {
        let devices: String = (1..=4)
            .map(|n| {
                device(&format!("000{n}"), &format!("1-{n}"), 4 + n, &format!("serial = 'S{n}'"))
            })
            .collect();
        let guests = guest("erp", ERP, OURS, "")
            + &guest("crm", CRM, THEIRS, "")
            + &guest("off", OFF, OURS, "running = false")
            + &format!("[[domain]]\nname = 'lab'\nuuid = '{LAB}'\n");
        Self::with("host1", keys, &devices, &guests)
    }

    /// A host of that name, with these devices and guests.
    pub(crate) fn with(name: &str, keys: &str, devices: &str, guests: &str) -> Self {
        let host = Host::new(&format!("api = \"127.0.0.1:0\"\n{keys}"));
        std::fs::write(host.path("proc/sys/kernel/hostname"), name).unwrap();
        std::fs::write(host.path("sim.toml"), format!("{devices}{guests}")).unwrap();
        let log = File::create(host.path("agent.log")).unwrap();
        let mut command = Command::new(program("virt-usbd"));
        command.arg("--config").arg(host.config_file()).arg("--sim").arg(host.path("sim.toml"));
        let child = command.stderr(log).spawn().unwrap();
        let mut served = Self { host, child, at: SocketAddr::from(([127, 0, 0, 1], 0)) };
        served.at = served.until("the API to be served", |served| {
            let log = served.log();
            let at = log
                .split("the API is served at ")
                .nth(1)?
                .split("://")
                .nth(1)?
                .split('/')
                .next()?;
            at.parse().ok()
        });
        served.until("the devices to be found, and the guests to run", |served| {
            served.log().contains(" ready").then_some(())
        });
        served
    }

    pub(crate) fn log(&self) -> String {
        std::fs::read_to_string(self.host.path("agent.log")).unwrap_or_default()
    }

    pub(crate) fn until<T>(&self, what: &str, mut look: impl FnMut(&Self) -> Option<T>) -> T {
        let deadline = Instant::now() + PROGRAM_TIMEOUT;
        loop {
            if let Some(found) = look(self) {
                return found;
            }
            assert!(Instant::now() < deadline, "waited in vain for {what}\n{}", self.log());
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    pub(crate) fn token(&self, name: &str, project: &str, role: &str) -> String {
        let made = self.host.virt_usb(&[
            "--json",
            "token",
            "add",
            name,
            "--project",
            project,
            "--role",
            role,
        ]);
        let made: Value = serde_json::from_str(&ok(&made)).unwrap();
        made["token"].as_str().unwrap().to_owned()
    }

    /// Bytes as they are, and what comes back until the other end closes.
    pub(crate) fn raw(&self, bytes: &[u8]) -> Answer {
        let mut stream = TcpStream::connect(self.at).unwrap();
        stream.set_read_timeout(Some(PROGRAM_TIMEOUT)).unwrap();
        // It may have heard enough before all was said.
        let _ = stream.write_all(bytes);
        read(stream)
    }

    pub(crate) fn ask(&self, token: &str, method: &str, path: &str, body: &str) -> Answer {
        self.raw(request(&format!("X-Auth-Token: {token}\r\n"), method, path, body).as_bytes())
    }

    pub(crate) fn local(&self, method: &str, path: &str, body: &str) -> Answer {
        let Ok(mut stream) = UnixStream::connect(self.host.path("state/api.sock")) else {
            return read(&b""[..]);
        };
        stream.write_all(request("", method, path, body).as_bytes()).unwrap();
        read(stream)
    }

    pub(crate) fn attach(&self, token: &str, server: &str, requests: &Value) -> Answer {
        let body = json!({ "attach_usb_devices": { "usb_devices_requests": requests } });
        self.ask(token, "POST", &format!("/v3/servers/{server}/action"), &body.to_string())
    }

    pub(crate) fn detach(&self, token: &str, server: &str, requests: &Value) -> Answer {
        let body = json!({ "detach_usb_devices": { "usb_devices_requests": requests } });
        self.ask(token, "POST", &format!("/v3/servers/{server}/action"), &body.to_string())
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

pub(crate) fn request(headers: &str, method: &str, path: &str, body: &str) -> String {
    let kind = if body.is_empty() { "" } else { "Content-Type: application/json\r\n" };
    format!(
        "{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: \
            close\r\n{headers}{kind}Content-Length: {}\r\n\r\n{body}",
        body.len()
    )
}
