//! Detects whether the host itself uses a device, and describes the use.
//!
//! | use | source |
//! |---|---|
//! | mounted storage, swap | mountinfo, swaps |
//! | storage behind a loop device | `loop/backing_file` |
//! | storage of another block device (LVM, dm-crypt, md) | `holders` |
//! | a member of a ZFS pool, a volume group or a RAID, active or not | udev's database |
//! | a network interface that is up | its flags |
//! | a keyboard that the kernel's driver listens to | its driver |
//! | a device that is exported to another machine | its driver |
//! | a device node that a program has open | `/proc/*/fd` |
//! | an interface that a program has claimed | the driver `usbfs` |
//!
//! The last two are ignored while a claim holds the device ([`Ties::open`]). A device whose use
//! cannot be determined counts as in use. Wrongly detaching a mounted disk loses data; wrongly
//! refusing a device costs one whitelist rule. SECURITY.md lists the uses that cannot be detected.

mod mounts;
mod openers;
mod storage;
mod subtree;
mod udev;

use std::cell::OnceCell;
use std::path::{Path, PathBuf};

use virt_usb_config::sysfs::attribute;
use virt_usb_model::clean_text;
use virt_usb_model::device::Problem;

use super::about;
use super::sysfs::{CLAIMED, Interface, Plugged};
use super::ties::{Nodes, Ties};
use mounts::Mounts;
use openers::Openers;
use storage::Storage;
use subtree::Subtree;
use udev::Number;

/// The driver of a device that is exported to another machine.
const USBIP: &str = "usbip-host";

/// HID, boot interface, keyboard (HID 1.11, 4.2 and 4.3).
const BOOT_KEYBOARD: [u8; 3] = [0x03, 0x01, 0x01];

/// The flag of an interface that is up (`IFF_UP`, netdevice(7)).
const UP: u64 = 1;

/// Uses of devices by the host, read at most once per scan.
pub(super) struct HostUse<'a> {
    sysfs_root: &'a Path,
    procfs_root: &'a Path,
    mounts: OnceCell<Result<Mounts, String>>,
    openers: OnceCell<Openers>,
}

impl<'a> HostUse<'a> {
    pub(super) const fn new(sysfs_root: &'a Path, procfs_root: &'a Path) -> Self {
        Self { sysfs_root, procfs_root, mounts: OnceCell::new(), openers: OnceCell::new() }
    }

    /// Uses of the device by the host, joined by `; `, and its other ties. Problems name the
    /// device's port.
    pub(super) fn of(
        &self,
        plugged: &Plugged,
        problems: &mut Vec<Problem>,
    ) -> (Option<String>, Ties) {
        let subtree = Subtree::of(&plugged.dir);
        let ties = self.ties(plugged, &subtree);
        let mut wrong: Vec<String> = subtree.problems.clone();
        let mut uses = Vec::new();
        uses.extend(self.storage(&subtree.blocks, &mut wrong));
        uses.extend(subtree.nets.iter().filter_map(|net| network(net, &mut wrong)));
        uses.extend(
            subtree.hidden_net.then(|| "network interface in another namespace".to_owned()),
        );
        uses.extend(keyboard(&plugged.interfaces));
        let exported = plugged.driver.as_deref() == Some(USBIP);
        uses.extend(exported.then(|| "exported to another machine (usbip)".to_owned()));
        if !subtree.problems.is_empty() || !plugged.whole {
            uses.push("cannot tell whether the host uses it".to_owned());
        }
        problems.extend(wrong.into_iter().map(|what| about(&plugged.port, what)));
        uses.sort();
        uses.dedup();
        ((!uses.is_empty()).then(|| uses.join("; ")), ties)
    }

    fn ties(&self, plugged: &Plugged, subtree: &Subtree) -> Ties {
        let mut nodes = Nodes {
            scsi_hosts: subtree.scsi_hosts.iter().cloned().collect(),
            networks: subtree.nets.iter().filter_map(|net| file_name(net)).collect(),
            ..Nodes::default()
        };
        let partitions =
            subtree.blocks.iter().flat_map(|disk| subtree::folders(disk).unwrap_or_default());
        let blocks = subtree.blocks.iter().cloned().chain(partitions).map(|dir| (dir, true));
        let characters = subtree.characters.iter().cloned().map(|dir| (dir, false));
        let (mut numbers, mut names) = (Vec::new(), Vec::new());
        for (dir, is_block) in blocks.chain(characters) {
            let number = attribute(&dir, "dev").ok().flatten();
            let Some(number) = number.and_then(|text| Number::parse(&text, is_block)) else {
                continue;
            };
            numbers.push(number);
            let name = node_name(&dir);
            names.extend(name.clone());
            let links = udev::entry(&udev::folder(self.sysfs_root), number).links;
            nodes.paths.extend(name.into_iter().chain(links).map(|name| format!("/dev/{name}")));
        }
        let locks = self.sysfs_root.parent().unwrap_or(Path::new("/")).join("run/lock");
        let openers = self.openers.get_or_init(|| Openers::read(self.procfs_root, &locks));
        let claimed = plugged.is_bound_to(CLAIMED);
        let unknown = || claimed.then(|| "claimed by a program (usbfs)".to_owned());
        let open = openers.of(&numbers, &names).or_else(unknown).into_iter().collect();
        // QEMU claims every interface. An unauthorized one makes the device unusable for a guest.
        let interfaces = subtree::folders(&plugged.dir).unwrap_or_default();
        let prefix = format!("{}:", plugged.port);
        let own =
            interfaces.iter().filter(|dir| file_name(dir).is_some_and(|n| n.starts_with(&prefix)));
        let is_refused = |dir: &Path| {
            attribute(dir, "authorized").ok().flatten().is_some_and(|text| text.trim() == "0")
        };
        let unauthorized =
            std::iter::once(plugged.dir.as_path()).chain(own.map(PathBuf::as_path)).any(is_refused);
        Ties { nodes, open, unauthorized }
    }

    fn storage(&self, blocks: &[PathBuf], wrong: &mut Vec<String>) -> Vec<String> {
        if blocks.is_empty() {
            return Vec::new();
        }
        let mounts = self.mounts.get_or_init(|| Mounts::read(self.procfs_root));
        let uses = match mounts {
            Ok(mounts) => Storage::new(self.sysfs_root, mounts).uses(blocks),
            Err(e) => Err(e.clone()),
        };
        uses.unwrap_or_else(|e| {
            wrong.push(e);
            vec!["storage, cannot tell whether it is mounted".to_owned()]
        })
    }
}

/// Name of a device's node below `/dev`: the kernel's (`input/event5`), or, if there is none, the
/// name of its directory.
fn node_name(dir: &Path) -> Option<String> {
    let uevent = attribute(dir, "uevent").ok().flatten().unwrap_or_default();
    let named = uevent.lines().find_map(|line| line.strip_prefix("DEVNAME=").map(str::to_owned));
    named.or_else(|| file_name(dir))
}

fn file_name(path: &Path) -> Option<String> {
    Some(path.file_name()?.to_string_lossy().into_owned())
}

fn network(net: &Path, wrong: &mut Vec<String>) -> Option<String> {
    let name =
        net.file_name().and_then(|name| clean_text(&name.to_string_lossy())).unwrap_or_default();
    let flags = match attribute(net, "flags") {
        Ok(None) => return None,
        Ok(Some(text)) => number(&text)
            .ok_or_else(|| format!("{} contains {text:?}", net.join("flags").display())),
        Err(e) => Err(e.to_string()),
    };
    match flags {
        Ok(flags) => (flags & UP != 0).then(|| format!("network interface {name} is up")),
        Err(e) => {
            wrong.push(e);
            Some(format!("network interface {name}, cannot tell whether it is up"))
        }
    }
}

fn number(text: &str) -> Option<u64> {
    u64::from_str_radix(text.trim().strip_prefix("0x")?, 16).ok()
}

fn keyboard(interfaces: &[Interface]) -> Option<String> {
    let listens = |i: &Interface| i.class == BOOT_KEYBOARD && i.driver.as_deref() == Some("usbhid");
    interfaces.iter().any(listens).then(|| "keyboard in use by the host".to_owned())
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use super::*;
    use crate::discovery::sysfs::scan;

    const BLOCK: &str = "1-1:1.0/host6/target6:0:0/6:0:0:0/block";

    /// A machine with one USB device at port 1-1, in a temporary directory.
    struct Machine(tempfile::TempDir);

    impl Machine {
        fn new() -> Self {
            let machine = Self(tempfile::tempdir().unwrap());
            for (name, value) in
                [("idVendor", "0951"), ("idProduct", "1666"), ("busnum", "1"), ("devnum", "2")]
            {
                machine.device(name, value);
            }
            machine.file("proc/self/mountinfo", "22 1 8:1 / / rw - ext4 /dev/sda1 rw");
            machine
        }
        fn file(&self, path: &str, text: &str) {
            let path = self.0.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, format!("{text}\n")).unwrap();
        }
        fn device(&self, path: &str, text: &str) {
            self.file(&format!("sys/bus/usb/devices/1-1/{path}"), text);
        }
        /// Adds a disk with one partition: sdb and sdb1, 8:16 and 8:17.
        fn disk(&self) {
            self.device(&format!("{BLOCK}/sdb/dev"), "8:16");
            self.device(&format!("{BLOCK}/sdb/sdb1/dev"), "8:17");
        }
        fn mount(&self, mountinfo: &str) {
            self.file("proc/1/mountinfo", mountinfo);
        }
        fn dm(&self, n: u32, held: &str) {
            self.file(&format!("sys/class/block/dm-{n}/dev"), &format!("253:{n}"));
            self.file(&format!("sys/{held}/holders/dm-{n}"), "");
        }
        fn look(&self) -> (Option<String>, Vec<Problem>) {
            let (sysfs, procfs) = (self.0.path().join("sys"), self.0.path().join("proc"));
            let scan = scan(&sysfs);
            assert_eq!(scan.problems, []);
            let mut problems = Vec::new();
            let (told, _) = HostUse::new(&sysfs, &procfs).of(&scan.plugged[0], &mut problems);
            (told, problems)
        }
        fn ties(&self) -> Ties {
            let (sysfs, procfs) = (self.0.path().join("sys"), self.0.path().join("proc"));
            HostUse::new(&sysfs, &procfs).of(&scan(&sysfs).plugged[0], &mut Vec::new()).1
        }
        fn told(&self) -> String {
            let (told, problems) = self.look();
            assert_eq!(problems, []);
            told.unwrap_or_default()
        }
    }

    #[test]
    fn an_idle_disk_is_not_in_use() {
        let machine = Machine::new();
        assert_eq!(machine.told(), "");
        machine.disk();
        assert_eq!(machine.told(), "");
    }

    #[test]
    fn partitions_are_mounted_or_swapped_to() {
        let machine = Machine::new();
        machine.disk();
        machine.mount(
            "22 1 8:17 / /boot rw - ext4 /dev/sdb1 rw\n23 1 8:17 /x /boot\\040x rw - ext4 \
                /dev/sdb1 rw",
        );
        assert_eq!(machine.told(), "mounted on /boot, /boot x");
        machine.file("proc/swaps", "Filename Type Size Used Priority\n/dev/sdb partition 4 0 -2");
        assert_eq!(machine.told(), "mounted on /boot, /boot x; swap");
        let many: Vec<String> =
            (0..9).map(|i| format!("22 1 8:17 / /m{i} rw - ext4 /dev/sdb1 rw")).collect();
        machine.mount(&many.join("\n"));
        assert_eq!(machine.told(), "mounted on /m0, /m1, /m2, /m3 and 5 more; swap");
    }

    #[test]
    fn holders_are_followed() {
        let machine = Machine::new();
        machine.disk();
        machine.dm(0, &format!("bus/usb/devices/1-1/{BLOCK}/sdb/sdb1"));
        assert_eq!(machine.told(), "held by dm-0");
        machine.dm(1, "class/block/dm-0");
        machine.file("sys/class/block/dm-1/dm/name", "vg-root");
        machine.mount("22 1 0:30 / / rw - btrfs /dev/mapper/vg-root rw");
        assert_eq!(machine.told(), "held by dm-0 held by dm-1 mounted on /");
        // No kernel creates such a loop, but it must not be followed forever.
        machine.file("sys/class/block/dm-1/holders/dm-0", "");
        assert_eq!(machine.told(), "held by dm-0 held by dm-1 mounted on /");
    }

    #[test]
    fn a_btrfs_over_several_devices_names_only_one_of_them() {
        let machine = Machine::new();
        machine.disk();
        machine.mount("22 1 0:30 / /data rw - btrfs /dev/sda rw");
        machine.file("sys/fs/btrfs/6e0c/devices/sdb1", "");
        assert_eq!(machine.told(), "part of a mounted btrfs");
    }

    #[test]
    fn an_unknown_use_counts_as_in_use() {
        let machine = Machine::new();
        fs::remove_dir_all(machine.0.path().join("proc")).unwrap();
        assert_eq!(machine.told(), "", "a device without storage");
        machine.disk();
        let (told, problems) = machine.look();
        assert_eq!(told.unwrap(), "storage, cannot tell whether it is mounted");
        assert_eq!(problems[0].place, "1-1");
        assert!(problems[0].what.contains("self/mountinfo"), "{}", problems[0].what);

        machine.device("1-1:1.2/net/enx0/flags", "what");
        assert!(machine.look().0.unwrap().starts_with("network interface enx0, cannot tell"));
        machine.device(&format!("{}x/dev", "a/".repeat(20)), "8:1");
        let (told, problems) = machine.look();
        assert!(told.unwrap().starts_with("cannot tell whether the host uses it; "));
        assert_eq!(problems.len(), 3, "{problems:?}");
    }

    #[test]
    fn a_network_interface_is_in_use_while_it_is_up() {
        let machine = Machine::new();
        machine.device("1-1:1.0/net/enx0/flags", "0x1002");
        assert_eq!(machine.told(), "");
        machine.device("1-1:1.0/net/enx0/flags", "0x1003");
        assert_eq!(machine.told(), "network interface enx0 is up");
        fs::remove_dir_all(machine.0.path().join("sys/bus/usb/devices/1-1/1-1:1.0/net/enx0"))
            .unwrap();
        assert_eq!(machine.told(), "network interface in another namespace");
    }

    #[test]
    fn a_keyboard_is_in_use_while_the_kernel_listens() {
        let machine = Machine::new();
        for (name, value) in [("Class", "03"), ("SubClass", "01"), ("Protocol", "01")] {
            machine.device(&format!("1-1:1.0/bInterface{name}"), value);
        }
        assert_eq!(machine.told(), "");
        let link = machine.0.path().join("sys/bus/usb/devices/1-1/1-1:1.0/driver");
        symlink("../../../../drivers/usbfs", &link).unwrap();
        assert_eq!(machine.told(), "", "a guest has it");
        fs::remove_file(&link).unwrap();
        symlink("../../../../drivers/usbhid", &link).unwrap();
        assert_eq!(machine.told(), "keyboard in use by the host");
        machine.device("1-1:1.0/bInterfaceProtocol", "02");
        assert_eq!(machine.told(), "", "a mouse");
    }

    #[test]
    fn members_and_loops_are_in_use() {
        let machine = Machine::new();
        machine.disk();
        let zfs = "S:disk/by-id/usb-K-part1\nE:ID_FS_TYPE=zfs_member\nE:ID_FS_USAGE=raid";
        machine.file("run/udev/data/b8:17", zfs);
        assert_eq!(machine.told(), "member of a ZFS pool");
        machine.file("run/udev/data/b8:17", "E:ID_FS_TYPE=LVM2_member\nE:ID_FS_USAGE=raid");
        assert_eq!(machine.told(), "member of a volume group (LVM)");
        machine.file("run/udev/data/b8:17", "E:ID_FS_TYPE=linux_raid_member\nE:ID_FS_USAGE=raid");
        assert_eq!(machine.told(), "member of a RAID (linux_raid_member)");
        machine.dm(0, &format!("bus/usb/devices/1-1/{BLOCK}/sdb/sdb1"));
        assert_eq!(machine.told(), "held by dm-0; member of a RAID (linux_raid_member)");
        fs::remove_dir_all(machine.0.path().join("sys/class/block/dm-0")).unwrap();
        let holders = format!("sys/bus/usb/devices/1-1/{BLOCK}/sdb/sdb1/holders");
        fs::remove_dir_all(machine.0.path().join(holders)).unwrap();
        machine.file("run/udev/data/b8:17", "E:ID_FS_TYPE=ext4\nE:ID_FS_USAGE=filesystem");
        assert_eq!(machine.told(), "");
        machine.file("sys/class/block/loop3/loop/backing_file", "/dev/sdb1");
        assert_eq!(machine.told(), "behind loop3");
        machine.file("sys/class/block/loop3/loop/backing_file", "/srv/image");
        assert_eq!(machine.told(), "");
    }

    #[test]
    fn nodes_that_a_guest_may_name_are_collected() {
        let machine = Machine::new();
        machine.disk();
        machine.device("dev", "189:1");
        machine.device("uevent", "MAJOR=189\nMINOR=1\nDEVNAME=bus/usb/001/002");
        machine.device("1-1:1.1/ttyUSB0/tty/ttyUSB0/dev", "188:0");
        machine.device("1-1:1.2/input/input7/event5/dev", "13:69");
        machine.device("1-1:1.2/input/input7/event5/uevent", "DEVNAME=input/event5");
        machine.device("1-1:1.3/net/enx0/flags", "0x1002");
        machine.device("1-1.2/1-1.2:1.0/ttyUSB9/tty/ttyUSB9/dev", "188:9");
        machine.file("run/udev/data/b8:17", "S:disk/by-id/usb-K-part1");
        machine.file("run/udev/data/c188:0", "S:serial/by-id/usb-FTDI");
        let nodes = machine.ties().nodes;
        let paths: Vec<&str> = nodes.paths.iter().map(String::as_str).collect();
        let wanted = [
            "/dev/bus/usb/001/002",
            "/dev/disk/by-id/usb-K-part1",
            "/dev/input/event5",
            "/dev/sdb",
            "/dev/sdb1",
            "/dev/serial/by-id/usb-FTDI",
            "/dev/ttyUSB0",
        ];
        assert_eq!(paths, wanted);
        assert_eq!(nodes.networks.iter().collect::<Vec<_>>(), ["enx0"]);
        assert_eq!(nodes.scsi_hosts.iter().collect::<Vec<_>>(), ["host6"]);
    }

    #[test]
    fn programs_that_have_a_node_open_are_named() {
        let machine = Machine::new();
        // Device number of /dev/zero, which every user may open.
        machine.device("1-1:1.0/ttyUSB0/tty/ttyUSB0/dev", "1:5");
        assert_eq!(machine.ties(), Ties { nodes: machine.ties().nodes, ..Ties::default() });
        machine.file("proc/812/comm", "picocom");
        fs::create_dir_all(machine.0.path().join("proc/812/fd")).unwrap();
        symlink("/dev/zero", machine.0.path().join("proc/812/fd/3")).unwrap();
        assert_eq!(machine.ties().open, ["open in picocom (812)"]);
        machine.device("1-1:1.1/bInterfaceClass", "ff");
        symlink(
            "../../../../drivers/usbfs",
            machine.0.path().join("sys/bus/usb/devices/1-1/1-1:1.1/driver"),
        )
        .unwrap();
        assert_eq!(machine.ties().open, ["open in picocom (812)"]);
        fs::remove_dir_all(machine.0.path().join("proc/812")).unwrap();
        assert_eq!(machine.ties().open, ["claimed by a program (usbfs)"]);
        assert_eq!(machine.told(), "", "an open node is a tie, not a use");
    }

    #[test]
    fn authorization_and_export_are_seen() {
        let machine = Machine::new();
        machine.device("authorized", "1");
        assert!(!machine.ties().unauthorized);
        machine.device("authorized", "0");
        assert!(machine.ties().unauthorized);
        machine.device("authorized", "1");
        machine.device("1-1:1.0/authorized", "1");
        assert!(!machine.ties().unauthorized);
        machine.device("1-1:1.1/authorized", "0");
        assert!(machine.ties().unauthorized, "one of its interfaces");
        symlink(
            "../../../drivers/usbip-host",
            machine.0.path().join("sys/bus/usb/devices/1-1/driver"),
        )
        .unwrap();
        assert_eq!(machine.told(), "exported to another machine (usbip)");
    }

    #[test]
    fn devices_behind_a_hub_and_links_are_not_followed() {
        let machine = Machine::new();
        machine.mount("22 1 8:17 / /boot rw - ext4 /dev/sdb1 rw");
        machine.device("1-1.2/1-1.2:1.0/host6/block/sdb/dev", "8:17");
        machine.file("sys/elsewhere/block/sdb/dev", "8:17");
        symlink("../../../../elsewhere", machine.0.path().join("sys/bus/usb/devices/1-1/link"))
            .unwrap();
        assert_eq!(machine.told(), "");
    }
}
