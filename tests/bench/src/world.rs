//! A host with devices, and domains that request them, in a temporary folder.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, Result};
use tempfile::TempDir;
use virt_usb::discovery::{Simulated, UsbSource};
use virt_usb::inventory;
use virt_usb_config::Config;
use virt_usb_config::host_env;
use virt_usb_model::{Aliases, Whitelist};
use virt_usb_store::flaps::Limits;
use virt_usb_store::{Durability, Store};

pub(crate) const STORE_LOCK_TIMEOUT: Duration = Duration::from_secs(20);

/// How the devices of a world differ.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Devices {
    /// Each device has a serial, and this is the number of kinds.
    Kinds(usize),
    /// All are of one kind, without a serial.
    Identical,
}

pub(crate) struct World {
    dir: TempDir,
}

impl World {
    /// Plugs in `count` devices and discovers them.
    pub(crate) fn new(count: usize, devices: Devices) -> Result<Self> {
        let world = Self { dir: tempfile::tempdir()? };
        let config = format!(
            "state_dir = {:?}\nsysfs_root = {:?}\nlog = {:?}\n",
            world.state_dir(),
            world.sysfs_root(),
            world.log()
        );
        fs::write(world.config(), config)?;
        let simulated = Simulated::parse(&simulation(count, devices))?;
        simulated.write_sysfs(&world.sysfs_root())?;
        let whitelist = Whitelist::parse(
            None,
            Some(&serde_json::json!([{ "vendor": "0529", "tags": ["erp"] }])),
        )?;
        let mut store = Store::create(&world.state_dir(), STORE_LOCK_TIMEOUT)?;
        let context = host_env::context(&Config::default(), "bench")?;
        let snapshot = simulated.snapshot();
        store.reconcile(
            "bench",
            &Limits::default(),
            snapshot.seen(&Aliases::default()),
            |known| inventory::plan(&snapshot, known, &whitelist, &Aliases::default()),
            &context,
        )?;
        Ok(world)
    }

    pub(crate) fn config(&self) -> PathBuf {
        self.dir.path().join("config.toml")
    }
    pub(crate) fn state_dir(&self) -> PathBuf {
        self.dir.path().join("state")
    }
    pub(crate) fn sysfs_root(&self) -> PathBuf {
        self.dir.path().join("sys")
    }
    /// One JSON object for each call of the hook.
    pub(crate) fn log(&self) -> PathBuf {
        self.dir.path().join("hook.log")
    }

    /// The inventory, opened as the hook opens it.
    pub(crate) fn store(&self) -> Result<Store> {
        Ok(Store::open(&self.state_dir(), STORE_LOCK_TIMEOUT, Durability::Boot)?)
    }

    /// Writes a file into the world.
    pub(crate) fn file(&self, name: &str, content: &str) -> Result<PathBuf> {
        let path = self.dir.path().join(name);
        fs::write(&path, content).with_context(|| format!("writing {}", path.display()))?;
        Ok(path)
    }
}

/// The kind of device number `n`, counted from 0: its product id.
pub(crate) const fn product(n: usize, kinds: usize) -> usize {
    n % kinds + 1
}

/// The serial of device number `n`.
pub(crate) fn serial(n: usize) -> String {
    format!("HL-{n:05}")
}

/// The bus, the number on it and the port path of device number `n`: behind hubs, a hundred devices
/// on a bus.
pub(crate) fn place(n: usize) -> (usize, usize, String) {
    let (bus, at) = (n / 100 + 1, n % 100);
    (bus, at + 2, format!("{bus}-{}.{}", at / 10 + 1, at % 10 + 1))
}

/// A simulation file with `count` devices.
pub(crate) fn simulation(count: usize, devices: Devices) -> String {
    let mut text = String::new();
    for n in 0..count {
        let (bus, number, port) = place(n);
        let kinds = if let Devices::Kinds(kinds) = devices { kinds } else { 1 };
        let product = product(n, kinds);
        // One kind of them is storage.
        let class = if product == 1 { "08" } else { "ff" };
        text.push_str(&format!(
            "[[device]]\nvendor = \"0529\"\nproduct = {product}\nbus = {bus}\ndevice = \
                {number}\nport = \"{port}\"\n\
             speed = \"full\"\ninterfaces = [\"{class}\"]\nproduct_name = \"HASP key\"\n"
        ));
        if devices != Devices::Identical {
            text.push_str(&format!("serial = \"{}\"\n", serial(n)));
        }
    }
    text
}

/// A domain of about `size` bytes with the `n`th UUID and this in its metadata.
pub(crate) fn domain(n: usize, size: usize, metadata: &str) -> String {
    let head = format!(
        "<domain type='kvm'>\n  <name>instance-{n:08x}</name>\n  \
            <uuid>00000000-0000-4000-8000-{n:012x}</uuid>\n  <metadata>\n    {metadata}\n  \
         </metadata>\n  <memory unit='KiB'>4194304</memory>\n  <vcpu>4</vcpu>\n  <os>\n    <type \
         arch='x86_64' machine='pc-q35-8.2'>hvm</type>\n  \
         </os>\n  <devices>\n    <emulator>/usr/bin/qemu-system-x86_64</emulator>\n"
    );
    let tail = "    <graphics type='spice' autoport='yes'/>\n  </devices>\n</domain>\n";
    let mut xml = head;
    let mut disk = 0;
    while xml.len() + tail.len() < size {
        xml.push_str(&format!(
            "    <disk type='file' device='disk'>\n      <driver name='qemu' type='qcow2' \
                cache='none'/>\n      \
             <source file='/var/lib/nova/instances/{disk:032x}/disk'/>\n      <target \
             dev='vd{disk}' bus='virtio'/>\n      \
             <address type='pci' domain='0x0000' bus='0x{disk:02x}' slot='0x00' \
             function='0x0'/>\n    </disk>\n"
        ));
        disk += 1;
    }
    xml + tail
}

/// Metadata that asks for devices.
pub(crate) fn flavor(json: &str) -> String {
    format!("<u:flavor xmlns:u='urn:virt-usb:flavor:1'>{json}</u:flavor>")
}

/// Metadata as Nova writes it for a flavor that asks for nothing.
pub(crate) const NOVA: &str = "<nova:instance \
    xmlns:nova='http://openstack.org/xmlns/libvirt/nova/1.1'><nova:flavor \
    name='m1.small'/></nova:instance>";
