//! Plans the changes of the inventory after a scan. Does no IO; the store executes the plan.

use std::path::Path;

use anyhow::Context as _;
use virt_usb_config::sysfs::path_of;
use virt_usb_model::{
    Aliases, Device, DeviceKey, DevicePath, PortPath, RuleVerdict, Serial, Whitelist,
};
use virt_usb_store::reconcile::Change;
use virt_usb_store::{Record, Store, StoreError};

use crate::discovery::Snapshot;
use crate::discovery::ties::{Recorded, Ties, Uses, uses};

/// Returns the host's name in the kernel.
///
/// # Errors
/// If procfs cannot be read.
pub fn host_name(procfs_root: &Path) -> anyhow::Result<String> {
    let path = procfs_root.join("sys/kernel/hostname");
    let name = std::fs::read_to_string(&path)
        .with_context(|| format!("cannot read {}", path.display()))?;
    Ok(virt_usb_model::clean_text(&name).unwrap_or_else(|| "localhost".into()))
}

/// Returns the whitelist with each port in its rules replaced by the socket that the port meant
/// when the rule was first read.
///
/// # Errors
/// If the inventory cannot be read or written.
pub fn located(
    whitelist: &Whitelist,
    store: &mut Store,
    snapshot: &Snapshot,
    sysfs_root: &Path,
) -> Result<Whitelist, StoreError> {
    let plugged = |port: &PortPath| {
        let all = snapshot.devices.iter().chain(&snapshot.hubs);
        all.filter(|device| device.key.port == *port).find_map(|device| device.key.path.clone())
    };
    let paths = store.rule_paths(&whitelist.ports(), |port| {
        plugged(port).or_else(|| path_of(sysfs_root, port))
    })?;
    Ok(whitelist.at(|port| paths.get(port).cloned()))
}

/// Plans the changes that update the rows to match the snapshot. `known` are the devices that are
/// plugged in or held, and those removed devices that may match a device of the snapshot
/// (`SeenKeys`).
///
/// A device is recognized by its key, and gets its id back regardless of how long it was removed. A
/// device that the snapshot could not read does not count as absent.
///
/// A device with several kinds (`aliases`) is recognized by its port or its serial.
pub fn plan(
    snapshot: &Snapshot,
    known: &[Record],
    whitelist: &Whitelist,
    aliases: &Aliases,
) -> Vec<Change> {
    let devices: Vec<Device> = snapshot
        .devices
        .iter()
        .map(|seen| Device { key: with_serial_kind(&seen.key, known), ..seen.clone() })
        .collect();
    let keys: Vec<DeviceKey> = known.iter().map(Record::key).collect();
    let rows = recognise(&devices, known, &keys, aliases);
    let mut taken = vec![false; known.len()];
    rows.iter().flatten().for_each(|at| taken[*at] = true);
    let mut changes: Vec<Change> = devices
        .into_iter()
        .zip(rows)
        .map(|(device, row)| {
            let (device, verdict) = judge(snapshot, device, row.map(|at| &known[at]), whitelist);
            match row {
                Some(at) => Change::See(known[at].entry.id, Box::new(device), verdict),
                None => Change::Add(Box::new(device), verdict),
            }
        })
        .collect();
    // A device whose port has another device now is certainly gone.
    let occupied =
        |key: &DeviceKey| snapshot.devices.iter().any(|seen| seen.key.is_at_place_of(key));
    let gone = (0..known.len()).filter(|at| known[*at].present && !taken[*at]);
    let sure = |at: &usize| occupied(&keys[*at]) || !is_unsure(snapshot, &known[*at]);
    changes.extend(gone.filter(sure).map(|at| Change::Gone(known[at].entry.id)));
    // Removals come first, so that their ports are free.
    changes.sort_by_key(|c| !matches!(c, Change::Gone(_)));
    changes
}

/// Whether a device that is missing in the snapshot may still be plugged in. The recorded port may
/// have the bus number of an earlier boot, so with a known path, a problem at the same chain of
/// ports on any bus counts.
fn is_unsure(snapshot: &Snapshot, record: &Record) -> bool {
    let anywhere = |path: &DevicePath| {
        let at =
            |place: &str| place.parse::<PortPath>().is_ok_and(|port| port.ports() == path.ports());
        snapshot.problems.iter().any(|problem| at(&problem.place))
    };
    snapshot.is_unsure(&record.entry.port_path) || record.entry.path.as_ref().is_some_and(anywhere)
}

/// Combines all known uses of the device, and decides whether it is offered.
pub fn judge(
    snapshot: &Snapshot,
    device: Device,
    row: Option<&Record>,
    whitelist: &Whitelist,
) -> (Device, RuleVerdict) {
    let recorded = row.map_or_else(Recorded::default, |r| Recorded {
        holder: r.entry.instance_uuid,
        host_use: r.entry.host_use.as_deref(),
    });
    let none = Ties::default();
    let ties = snapshot.ties.get(&device.key.port).unwrap_or(&none);
    let Uses { words, fixed } = uses(&device, ties, &snapshot.guests, recorded);
    let device = Device { host_use: words, ..device };
    let verdict = whitelist.judge(&device);
    match fixed {
        Some(why) => (device, verdict.withheld_for(&why)),
        None => (device, verdict),
    }
}

/// Marks a serial as duplicate if it was ever seen on two devices of a kind, even if one of them is
/// unplugged now.
fn with_serial_kind(key: &DeviceKey, known: &[Record]) -> DeviceKey {
    let seen_twice = |text: &str| {
        known.iter().any(|r| {
            r.usb() == key.usb
                && r.entry.serial.as_deref() == Some(text)
                && r.entry.serial_kind == "duplicate"
        })
    };
    let serial = match &key.serial {
        Serial::Unique(text) if seen_twice(text) => Serial::Duplicate(text.clone()),
        other => other.clone(),
    };
    DeviceKey { serial, ..key.clone() }
}

/// Whether a device that is not identified by a serial or a path has other names than the one
/// recorded at its port. It is then another device, which was plugged in there, or is there because
/// its bus has another number now.
fn is_renamed(record: &Record, device: &Device) -> bool {
    let identified =
        record.entry.path.is_some() || device.key.path.is_some() || device.key.serial_decides();
    let entry = &record.entry;
    !identified
        && (&entry.manufacturer, &entry.product_name) != (&device.manufacturer, &device.product)
}

/// Returns the row of each device; no row is used twice. `keys` are those of `known`, built once
/// because every device is compared with every row.
///
/// Rows are assigned in four rounds: a present row with the device's own key; a present row of
/// another kind (alias); a removed row with its own key; a removed row of another kind. So an alias
/// never takes the row of a device that is plugged in. A disabled or quarantined row counts as
/// present for its own key, so that an alias cannot hide it.
fn recognise(
    devices: &[Device],
    known: &[Record],
    keys: &[DeviceKey],
    aliases: &Aliases,
) -> Vec<Option<usize>> {
    type Fits<'a> = &'a dyn Fn(usize, &Device) -> bool;
    let own = |at: usize, d: &Device| keys[at].is(&d.key) && !is_renamed(&known[at], d);
    let other = |at: usize, d: &Device| aliases.is(&keys[at], &d.key);
    let gone = |at: usize| known[at].deleted != 0;
    let rounds: [Fits<'_>; 4] = [
        &|at, device| (!gone(at) || known[at].is_set_aside()) && own(at, device),
        &|at, device| !gone(at) && other(at, device),
        &own,
        &other,
    ];
    let mut rows = vec![None; devices.len()];
    let mut taken = vec![false; known.len()];
    for fits in rounds {
        for (device, row) in devices.iter().zip(&mut rows).filter(|(_, row)| row.is_none()) {
            // Prefer held rows, then present rows, then the device's own port, then older ids.
            let rank = |at: &usize| {
                let elsewhere = !keys[*at].is_at_place_of(&device.key);
                let entry = &known[*at].entry;
                (entry.instance_uuid.is_none(), gone(*at), elsewhere, entry.id)
            };
            let free = (0..known.len()).filter(|at| !taken[*at] && fits(*at, device));
            *row = free.min_by_key(rank);
            if let Some(at) = *row {
                taken[at] = true;
            }
        }
    }
    rows
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::discovery::ties::{GuestUse, GuestUses};
    use crate::discovery::{Simulated, UsbSource};
    use virt_usb_model::device::Problem;
    use virt_usb_model::{BusAddress, Class, DeviceId, UnavailableReason, UsbId};
    use virt_usb_store::Context;
    use virt_usb_store::flaps::Limits;

    fn device(product: u16, serial: Serial, port: &str, number: u8) -> Device {
        Device {
            key: DeviceKey {
                usb: UsbId::new(0x0529, product),
                serial,
                port: port.parse().unwrap(),
                path: None,
            },
            address: BusAddress::new(1, number).unwrap(),
            class: Class::new(0),
            interfaces: vec![],
            speed: None,
            manufacturer: None,
            product: None,
            driver: None,
            host_use: None,
            descriptors: None,
            generation: None,
        }
    }

    fn unique(text: &str) -> Serial {
        Serial::Unique(text.into())
    }

    struct Bench {
        _dir: tempfile::TempDir,
        store: Store,
        aliases: Aliases,
    }

    impl Bench {
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            let store = Store::create(dir.path(), std::time::Duration::from_secs(2)).unwrap();
            Self { _dir: dir, store, aliases: Aliases::default() }
        }
        /// Scans, and returns the ids with their ports.
        fn scan(&mut self, devices: &[Device], unsure: &[&str]) -> Vec<(u64, String)> {
            let problems = unsure
                .iter()
                .map(|p| Problem { place: (*p).to_owned(), what: "?".into() })
                .collect();
            let snapshot = Snapshot { devices: devices.to_vec(), problems, ..Snapshot::default() };
            let context = Context {
                boot_id: "b".into(),
                uptime: 1.0,
                pending_grace: 120.0,
                actor: "test".into(),
            };
            self.store
                .reconcile(
                    "h",
                    &Limits::default(),
                    snapshot.seen(&self.aliases),
                    |known| plan(&snapshot, known, &Whitelist::default(), &self.aliases),
                    &context,
                )
                .unwrap();
            self.store
                .devices()
                .unwrap()
                .iter()
                .map(|r| (r.entry.id.get(), r.entry.port_path.to_string()))
                .collect()
        }
    }

    fn at(id: u64, port: &str) -> (u64, String) {
        assert!(DeviceId::new(id).is_some());
        (id, port.to_owned())
    }

    #[test]
    fn the_same_key_gets_its_id_back() {
        let mut bench = Bench::new();
        let key = device(1, unique("A"), "1-1", 2);
        assert_eq!(bench.scan(std::slice::from_ref(&key), &[]), [at(1, "1-1")]);
        assert_eq!(bench.scan(&[], &[]), []);
        let moved = device(1, unique("A"), "1-4.2", 9);
        assert_eq!(
            bench.scan(&[device(2, Serial::Missing, "1-1", 3), moved], &[]),
            [at(1, "1-4.2"), at(2, "1-1")]
        );
    }

    #[test]
    fn an_alias_makes_a_device_with_two_kinds_one_device() {
        let mut bench = Bench::new();
        let (one, other) = (device(1, Serial::Missing, "1-1", 2), device(2, unique("A"), "1-1", 3));
        bench.aliases = Aliases::parse(&[vec!["0529:0001".into(), "0529:0002".into()]]).unwrap();
        assert_eq!(bench.scan(std::slice::from_ref(&one), &[]), [at(1, "1-1")]);
        assert_eq!(bench.scan(std::slice::from_ref(&other), &[]), [at(1, "1-1")], "its other kind");
        assert_eq!(bench.store.devices().unwrap()[0].usb().to_string(), "0529:0002");
        assert_eq!(bench.scan(std::slice::from_ref(&one), &[]), [at(1, "1-1")], "and back");
        assert_eq!(
            bench.scan(&[one.clone(), device(2, unique("B"), "1-2", 4)], &[]),
            [at(1, "1-1"), at(2, "1-2")]
        );
        bench.aliases = Aliases::default();
        assert_eq!(
            bench.scan(std::slice::from_ref(&other), &[]),
            [at(3, "1-1")],
            "undeclared it is another device"
        );
    }

    #[test]
    fn no_alias_takes_the_row_of_a_device_that_is_there() {
        let mut bench = Bench::new();
        bench.aliases = Aliases::parse(&[vec!["0529:0001".into(), "0529:0002".into()]]).unwrap();
        let one = |port, n| device(1, unique("A"), port, n);
        bench.scan(&[one("1-2", 2)], &[]);
        // The device moves, and one of the other kind with another serial is plugged in there.
        let stranger = device(2, unique("B"), "1-2", 6);
        assert_eq!(
            bench.scan(&[stranger.clone(), one("1-3", 5)], &[]),
            [at(1, "1-3"), at(2, "1-2")]
        );
        // They change places.
        let moved = device(2, unique("B"), "1-3", 8);
        assert_eq!(bench.scan(&[one("1-2", 7), moved], &[]), [at(1, "1-2"), at(2, "1-3")]);
        // Another of the other kind with the same serial, while the first is there.
        let like = device(2, unique("A"), "1-1", 9);
        assert_eq!(bench.scan(&[like, one("1-2", 7)], &[]), [at(1, "1-2"), at(3, "1-1")]);
        // The device is removed, another one takes its port, and it returns at another port.
        let mut bench = Bench { aliases: bench.aliases, ..Bench::new() };
        bench.scan(&[one("1-2", 2)], &[]);
        assert_eq!(bench.scan(std::slice::from_ref(&stranger), &[]), [at(2, "1-2")]);
        assert_eq!(bench.scan(&[stranger, one("1-4", 9)], &[]), [at(1, "1-4"), at(2, "1-2")]);
    }

    #[test]
    fn both_kinds_may_have_been_recorded_before_the_alias() {
        let mut bench = Bench::new();
        let (one, other) =
            (device(1, Serial::Missing, "1-1", 2), device(2, Serial::Missing, "1-1", 3));
        bench.scan(std::slice::from_ref(&one), &[]);
        bench.scan(std::slice::from_ref(&other), &[]);
        bench.scan(std::slice::from_ref(&one), &[]);
        bench.aliases = Aliases::parse(&[vec!["0529:0001".into(), "0529:0002".into()]]).unwrap();
        assert_eq!(
            bench.scan(std::slice::from_ref(&other), &[]),
            [at(1, "1-1")],
            "the row that was present stays in use"
        );
        assert_eq!(bench.scan(std::slice::from_ref(&one), &[]), [at(1, "1-1")]);
        // The row of the other kind is disabled. This applies when the device shows that kind.
        let context = Context {
            boot_id: "b".into(),
            uptime: 1.0,
            pending_grace: 120.0,
            actor: "test".into(),
        };
        bench.store.set_disabled(DeviceId::new(2).unwrap(), Some("no"), &context).unwrap();
        assert_eq!(bench.scan(std::slice::from_ref(&other), &[]), [at(2, "1-1")]);
    }

    #[test]
    fn another_device_at_the_same_port_is_another_device() {
        let mut bench = Bench::new();
        bench.scan(&[device(1, unique("A"), "1-1", 2)], &[]);
        assert_eq!(bench.scan(&[device(1, unique("B"), "1-1", 3)], &[]), [at(2, "1-1")]);
        assert_eq!(bench.scan(&[device(7, unique("A"), "1-1", 4)], &[]), [at(3, "1-1")]);
    }

    #[test]
    fn twins_are_told_apart_by_port_and_stay_twins() {
        let mut bench = Bench::new();
        let twin = |port: &str, n| device(1, Serial::Duplicate("A".into()), port, n);
        assert_eq!(
            bench.scan(&[twin("1-1", 2), twin("1-2", 3)], &[]),
            [at(1, "1-1"), at(2, "1-2")]
        );
        // Their numbers swap, their ports do not.
        assert_eq!(
            bench.scan(&[twin("1-2", 2), twin("1-1", 3)], &[]),
            [at(1, "1-1"), at(2, "1-2")]
        );
        // A single twin looks unique, but its serial still does not identify it.
        assert_eq!(bench.scan(&[device(1, unique("A"), "1-3", 4)], &[]), [at(3, "1-3")]);
        assert_eq!(bench.scan(&[device(1, unique("A"), "1-2", 5)], &[]), [at(2, "1-2")]);
    }

    #[test]
    fn unreadable_is_not_absent() {
        let mut bench = Bench::new();
        bench.scan(&[device(1, unique("A"), "1-1", 2), device(2, unique("B"), "1-2", 3)], &[]);
        assert_eq!(bench.scan(&[], &["1-1"]), [at(1, "1-1")], "a problem at its port");
        assert_eq!(bench.scan(&[], &[""]), [at(1, "1-1")], "a scan that failed");
        assert_eq!(bench.scan(&[], &[]), []);
    }

    #[test]
    fn open_devices_and_running_guests_withhold_a_device() {
        let simulated = |more: &str| {
            let key = "[[device]]\nvendor = '0529'\nproduct = '0001'\nbus = 1\ndevice = 5\nport = \
                '1-1'\n";
            Simulated::parse(&format!("{key}{more}")).unwrap().snapshot()
        };
        let names = serde_json::json!([{"vendor": "0529", "product": "0001"}]);
        let names = Whitelist::parse(Some(&true.into()), Some(&names)).unwrap();
        let told = |snapshot: &Snapshot, whitelist: &Whitelist| {
            let (device, verdict) = judge(snapshot, snapshot.devices[0].clone(), None, whitelist);
            (device.host_use.unwrap_or_default(), verdict.withheld)
        };
        let off = Whitelist::default();
        let open = simulated("driver = 'usbfs'");
        assert_eq!(
            told(&open, &off),
            ("claimed by a program (usbfs)".into(), Some(UnavailableReason::HostUse))
        );
        assert_eq!(told(&open, &names).1, None, "the rule names it");
        let unauthorized = simulated("authorized = false");
        let words = "not authorized (authorized = 0)";
        assert_eq!(told(&unauthorized, &names), (words.into(), Some(UnavailableReason::HostUse)));
        let used = |running| {
            let used = GuestUse::new(
                "11111111-2222-4333-8444-555555555555".parse().unwrap(),
                "g",
                running,
                "disk vda",
            );
            let guests = GuestUses::Known([("1-1".parse().unwrap(), vec![used])].into());
            Snapshot { guests, ..simulated("") }
        };
        assert_eq!(
            told(&used(true), &names),
            ("used by guest g as disk vda".into(), Some(UnavailableReason::HostUse))
        );
        assert_eq!(told(&used(false), &names).1, None);
        assert_eq!(told(&used(false), &off).1, Some(UnavailableReason::HostUse));
    }

    #[test]
    fn a_port_has_one_device_even_if_it_could_not_be_read() {
        let mut bench = Bench::new();
        // The device was read while the kernel was still adding it; later it is complete except for
        // its strings.
        bench.scan(&[device(1, Serial::Missing, "1-1", 2)], &["1-1"]);
        assert_eq!(bench.scan(&[device(1, unique("A"), "1-1", 2)], &["1-1"]), [at(2, "1-1")]);
    }
}
