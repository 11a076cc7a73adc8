//! `store restore` and `store rebuild` as an operator types them: libvirt's own test driver runs
//! the guests.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

use std::fs::{self, File};
use std::io::{Seek, SeekFrom, Write};
use std::path::PathBuf;
use std::process::{Child, Command, Output};
use std::time::Duration;

use serde_json::Value;
use virt_usb_suite::{Host, device, domain, ok, program, text, until};

fn fails(output: &Output) -> String {
    assert_eq!((output.status.code(), text(&output.stdout).as_str()), (Some(1), ""));
    let why = text(&output.stderr);
    assert!(why.starts_with("virt-usb: ") && why.lines().count() == 1, "{why}");
    why
}

fn keys() -> String {
    [
        device("0001", "1-1", 2, "serial = \"A\""),
        device("0001", "1-2", 3, "serial = \"B\""),
        device("0002", "1-3", 4, ""),
    ]
    .concat()
}

/// A guest that runs, with the device of this number and alias.
fn guest(name: &str, number: u32, usb: &str, at: u8, alias: &str) -> String {
    format!(
        "<domain type='test'><name>{name}</name>\
            <uuid>{number:08x}-0000-4000-8000-000000000000</uuid>\
            <memory>8192</memory><os><type>hvm</type></os>
         <devices><controller type='usb' index='0' model='qemu-xhci' ports='15'/><hostdev \
         mode='subsystem' type='usb'><source><vendor id='0x0529'/>
         <product id='0x{usb}'/><address bus='1' device='{at}'/></source><alias \
         name='{alias}'/></hostdev></devices></domain>\n"
    )
}

/// A host with three devices, and guests that run on it.
fn host(guests: &str) -> Host {
    let host = Host::new("");
    let keys_of = fs::read_to_string(host.config_file()).unwrap();
    let node = host.path("node.xml");
    fs::write(&node, format!("<node>\n{guests}</node>\n")).unwrap();
    fs::write(host.config_file(), format!("{keys_of}libvirt_uri = 'test://{}'\n", node.display()))
        .unwrap();
    fs::write(host.path("sim.toml"), keys()).unwrap();
    host.discover(&keys());
    host
}

fn inventory(host: &Host) -> PathBuf {
    host.path("state/inventory.sqlite")
}

fn store(host: &Host, arguments: &[&str]) -> Output {
    let sim = host.path("sim.toml");
    let all: Vec<&str> = ["store"]
        .iter()
        .chain(arguments)
        .copied()
        .chain(["--sim", sim.to_str().unwrap()])
        .collect();
    host.virt_usb(&all)
}

fn spoil(host: &Host, from: u64, length: usize) {
    let mut file = File::options().write(true).open(inventory(host)).unwrap();
    file.seek(SeekFrom::Start(from)).unwrap();
    file.write_all(&vec![0x5a; length]).unwrap();
}

fn aside(host: &Host) -> Vec<String> {
    let names = fs::read_dir(host.path("state"))
        .unwrap()
        .map(|e| e.unwrap().file_name().into_string().unwrap());
    names
        .filter(|name| {
            name.contains(".before-") && !name.ends_with("-wal") && !name.ends_with("-shm")
        })
        .collect()
}

#[test]
fn a_damaged_inventory_is_rebuilt_and_guests_keep_their_devices() {
    let host = host(&guest("erp", 1, "0001", 2, "ua-usb-1"));
    host.flavor("hasp", r#"{"usb_devices":[{"id":2}]}"#);
    assert!(fails(&store(&host, &["rebuild"])).contains("it is sound: "));
    spoil(&host, 0, 100);
    let advice = fails(&host.virt_usb(&["devices"]));
    assert!(
        advice.contains("'virt-usb store rebuild'")
            && advice.contains("'virt-usb store restore FILE'"),
        "{advice}"
    );
    let told = ok(&store(&host, &["rebuild"]));
    assert!(told.contains("rebuilt ") && told.contains("3 device(s), 1 claim(s)"), "{told}");
    assert!(
        told.contains("the previous inventory is kept: ") && told.contains(".before-rebuild-"),
        "{told}"
    );
    assert_eq!(
        host.claims(),
        "device 1 erp 00000001-0000-4000-8000-000000000000 allocated hold=running\n"
    );
    assert!(ok(&host.virt_usb(&["store", "check"])).contains("no problems found"));
    assert_eq!(host.store().flavors().unwrap().len(), 1);
    assert_eq!(aside(&host).len(), 1);
    // The flavor names the same device as before, and no other guest gets erp's device.
    let xml = domain("crm", 2, r#"{"usb_devices":[{"serial":"A"}]}"#);
    assert_eq!(host.call(&["crm", "prepare", "begin", "-"], xml.as_bytes()).status.code(), Some(1));
    let again: Value =
        serde_json::from_str(&ok(&store(&host, &["rebuild", "--force", "--json"]))).unwrap();
    assert_eq!(
        (&again["devices"], &again["claims"], &again["lost_devices"]),
        (&3.into(), &1.into(), &0.into())
    );
    assert!(again["aside"].as_str().unwrap().contains("inventory.sqlite.before-rebuild-"));
    assert_eq!(aside(&host).len(), 2);
}

#[test]
fn where_nothing_can_be_read_old_aliases_name_no_other_device() {
    let host =
        host(&(guest("erp", 1, "0001", 3, "ua-usb-2") + &guest("crm", 2, "0002", 4, "hostdev0")));
    let length = fs::metadata(inventory(&host)).unwrap().len();
    spoil(&host, 0, length as usize);
    drop(ok(&store(&host, &["rebuild"])));
    let store = host.store();
    let claims = store.claims().unwrap();
    let devices = store.devices().unwrap();
    assert!(devices.iter().all(|d| d.entry.id.get() > 1000), "{devices:?}");
    let of = |name: &str| {
        let claim = claims.iter().find(|c| c.domain == name).unwrap();
        devices.iter().find(|d| d.entry.id == claim.device_id).unwrap().entry.port_path.to_string()
    };
    assert_eq!((of("erp"), of("crm")), ("1-2".into(), "1-3".into()));
    assert_eq!(store.check().unwrap(), Vec::<String>::new());
}

#[test]
fn what_the_guests_have_counts_more_than_what_a_backup_says() {
    let host = host(&guest("erp", 1, "0001", 2, "ua-usb-1"));
    // Of the time of the backup: another guest had it.
    let xml = domain("old", 7, r#"{"usb_devices":[{"serial":"A"}]}"#);
    assert!(host.call(&["old", "prepare", "begin", "-"], xml.as_bytes()).status.success());
    let copy = host.path("copy");
    ok(&host.virt_usb(&["store", "backup", copy.to_str().unwrap()]));
    spoil(&host, 0, 4096);
    let told = ok(&store(&host, &["restore", copy.to_str().unwrap()]));
    assert!(told.starts_with("restored ") && told.contains(".before-restore-"), "{told}");
    assert_eq!(
        host.claims(),
        "device 1 erp 00000001-0000-4000-8000-000000000000 allocated hold=running\n"
    );
    assert_eq!(host.store().check().unwrap(), Vec::<String>::new());
    let again = fails(&store(&host, &["restore", host.path("nowhere").to_str().unwrap()]));
    assert!(again.contains("nowhere: No such file"), "{again}");
    assert!(
        fails(&store(&host, &["restore", host.config_file().to_str().unwrap()]))
            .contains("is not a sound inventory")
    );
}

#[test]
fn without_libvirt_nothing_is_done_unless_that_is_wanted() {
    let host = host("");
    let text = fs::read_to_string(host.config_file()).unwrap();
    let nowhere = "qemu+unix:///system?socket=/nowhere";
    let text: String =
        text.lines().filter(|l| !l.starts_with("libvirt_uri")).map(|l| format!("{l}\n")).collect();
    fs::write(host.config_file(), format!("{text}libvirt_uri = '{nowhere}'\n")).unwrap();
    spoil(&host, 0, 100);
    let before = fs::read(inventory(&host)).unwrap();
    let why = fails(&store(&host, &["rebuild"]));
    assert!(why.contains("libvirt cannot be reached") && why.contains("--without-guests"), "{why}");
    assert!(fs::read(inventory(&host)).unwrap() == before && aside(&host).is_empty());
    let told = ok(&store(&host, &["rebuild", "--without-guests"]));
    assert!(told.contains("warning: libvirt was not queried"), "{told}");
    assert_eq!(host.store().devices().unwrap().len(), 3);
}

struct Agent(Child);

impl Drop for Agent {
    fn drop(&mut self) {
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

#[test]
fn an_agent_goes_on_with_a_restored_file_and_ends_with_a_replaced_one() {
    let host = host("");
    let vm = "[[domain]]\nname = 'erp'\nuuid = '11111111-2222-4333-8444-555555555555'\nflavor = \
        '{\"usb_devices\":[{\"serial\":\"A\"}]}'\n";
    fs::write(host.path("agent.toml"), keys() + vm).unwrap();
    let log = File::create(host.path("agent.log")).unwrap();
    let child = Command::new(program("virt-usbd"))
        .arg("--config")
        .arg(host.config_file())
        .arg("--sim")
        .arg(host.path("agent.toml"))
        .stderr(log)
        .spawn()
        .unwrap();
    let mut agent = Agent(child);
    let held = "device 1 erp 11111111-2222-4333-8444-555555555555 allocated hold=running\n";
    until("erp has it", || (host.claims() == held).then_some(()));
    let copy = host.path("copy");
    ok(&host.virt_usb(&["store", "backup", copy.to_str().unwrap()]));
    host.flavor("since", r#"{"usb_devices":[{"id":1}]}"#);
    let told = ok(&store(&host, &["restore", copy.to_str().unwrap(), "--without-guests"]));
    assert!(!told.contains("the running agent"), "{told}");
    assert_eq!(host.store().flavors().unwrap().len(), 0);
    assert_eq!(host.claims(), held);
    std::thread::sleep(Duration::from_secs(3));
    assert!(agent.0.try_wait().unwrap().is_none(), "it goes on");
    host.store().fold_wal().unwrap();
    spoil(&host, 0, 4096);
    let told = ok(&store(&host, &["rebuild", "--without-guests"]));
    assert!(
        told.contains("the running agent has the old file open: it exits within seconds"),
        "{told}"
    );
    assert_eq!(host.claims(), held);
    assert_eq!(agent.0.wait().unwrap().code(), Some(1));
    let said = fs::read_to_string(host.path("agent.log")).unwrap();
    assert!(
        said.contains("inventory.sqlite was removed or replaced while the agent ran"),
        "{said}"
    );
    assert_eq!(host.store().check().unwrap(), Vec::<String>::new());
}
