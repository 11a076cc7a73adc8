//! Hosts of a fleet, and their agents.

use std::fs::File;
use std::process::{Child, Command, Output};

use virt_usb_model::HostDocument;
use virt_usb_suite::{Etcd, Host, device, program};

pub(crate) const ERP: &str = "11111111-2222-4333-8444-555555555555";

pub(crate) fn ok(output: &Output) -> String {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(output.status.success(), "{}{}", text(&output.stdout), text(&output.stderr));
    text(&output.stdout)
}

pub(crate) fn refused(output: &Output) -> String {
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && text.lines().count() == 1, "{output:?}");
    text
}

/// A program that runs until it is dropped.
pub(crate) struct Running(pub(crate) Child);

impl Running {
    pub(crate) fn signal(&self, signal: &str) {
        let sent = Command::new("kill").arg(signal).arg(self.0.id().to_string()).status().unwrap();
        assert!(sent.success());
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // A stopped process is killed as well.
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

/// A host of that name, a machine of its own, in the fleet's configuration.
pub(crate) fn host(etcd: &Etcd, name: &str, machine: char, more: &str) -> Host {
    let host = Host::new("");
    let id = host.path("machine-id");
    std::fs::write(&id, machine.to_string().repeat(32)).unwrap();
    std::fs::write(host.path("proc/sys/kernel/hostname"), name).unwrap();
    let config = std::fs::read_to_string(host.config_file()).unwrap();
    std::fs::write(host.config_file(), config + &etcd.keys(&id, more)).unwrap();
    host
}

pub(crate) fn agent(host: &Host) -> Running {
    let log = File::options().append(true).create(true).open(host.path("agent.log")).unwrap();
    let mut command = Command::new(program("virt-usbd"));
    command.arg("--config").arg(host.config_file()).arg("--sim").arg(host.path("sim.toml"));
    Running(command.stderr(log).spawn().unwrap())
}

pub(crate) fn log(host: &Host) -> String {
    std::fs::read_to_string(host.path("agent.log")).unwrap_or_default()
}

pub(crate) fn key(n: u8) -> String {
    device(&format!("000{n}"), &format!("1-{n}"), 4 + n, &format!("serial = 'S{n}'"))
}

/// The published document of the host; `None` if there is none.
pub(crate) fn document(etcd: &Etcd, name: &str) -> Option<HostDocument> {
    let text = etcd.get(&format!("/virt-usb/hosts/{name}"));
    (!text.is_empty()).then(|| HostDocument::parse(&text).unwrap_or_else(|e| panic!("{e}: {text}")))
}

pub(crate) fn states(document: &HostDocument) -> Vec<(u64, String)> {
    document.devices.iter().map(|d| (d.id.get(), d.status.clone())).collect()
}
