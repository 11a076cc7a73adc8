//! Devices, instances and a world for them.

use std::path::Path;
use std::time::Duration;

use rusqlite::Connection;
use tempfile::TempDir;
use virt_usb_model::{
    Aliases, BusAddress, Class, Device, DeviceId, DeviceKey, DevicePath, DeviceRequest, Flavor,
    InstanceId, PortPath, RuleVerdict, Serial, UsbId,
};
use virt_usb_store::claim::{
    ClaimMode, ClaimRequest, ClaimVerifier, Claimant, Claimed, Granted, Verified,
};
use virt_usb_store::flaps::Limits;
use virt_usb_store::reconcile::{Change, Done, SeenKeys};
use virt_usb_store::{Context, Durability, FILE_NAME, Record, Store, StoreError};

pub(crate) const STORE_LOCK_TIMEOUT: Duration = Duration::from_secs(20);

/// A folder with an inventory in it, and the inventory.
pub(crate) fn inventory() -> (TempDir, Store) {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::create(dir.path(), STORE_LOCK_TIMEOUT).unwrap();
    (dir, store)
}

/// As the hook opens it.
pub(crate) fn hook(dir: &Path) -> Result<Store, StoreError> {
    Store::open(dir, STORE_LOCK_TIMEOUT, Durability::Boot)
}

/// A connection behind the store's back.
pub(crate) fn raw(dir: &Path) -> Connection {
    Connection::open(dir.join(FILE_NAME)).unwrap()
}

/// Removes every event, behind the store's back.
pub(crate) fn forget_the_audit(dir: &Path) {
    raw(dir).execute_batch("DROP TRIGGER IF EXISTS events_are_kept; DELETE FROM events").unwrap();
}

/// A device on the controller that has the bus's number in this boot.
pub(crate) fn device(product: u16, serial: Option<&str>, port: &str, number: u8) -> Device {
    let port: PortPath = port.parse().unwrap();
    on_controller(port.bus(), product, serial, &port, number)
}

/// A device on this controller, whatever number its bus has.
pub(crate) fn on_controller(
    controller: u8,
    product: u16,
    serial: Option<&str>,
    port: &PortPath,
    number: u8,
) -> Device {
    let path = DevicePath::new(&format!("pci-0000:0{controller}:00.0"), 2, port.ports());
    Device {
        key: DeviceKey {
            usb: UsbId::new(0x0529, product),
            serial: Serial::new(serial.map(Into::into), false),
            port: port.clone(),
            path,
        },
        address: BusAddress::new(port.bus(), number).unwrap(),
        class: Class::new(0),
        interfaces: vec![Class::HID],
        speed: None,
        manufacturer: None,
        product: Some("HASP key".into()),
        driver: None,
        host_use: None,
        descriptors: None,
        generation: None,
    }
}

pub(crate) fn offered() -> RuleVerdict {
    RuleVerdict {
        withheld: None,
        rule: None,
        projects: vec![],
        tags: vec!["erp".into()],
        one_time_use: false,
        because: "a test".into(),
    }
}

/// Records that exactly `seen` is plugged in.
pub(crate) fn scan(
    store: &mut Store,
    seen: &[(Device, RuleVerdict)],
    context: &Context,
) -> Result<Vec<Done>, StoreError> {
    scan_within(store, seen, &Limits { limit: 0, ..Limits::default() }, context)
}

/// A scan without devices.
pub(crate) fn nothing(aliases: &Aliases) -> SeenKeys<'_, std::iter::Empty<&DeviceKey>> {
    SeenKeys { keys: std::iter::empty(), aliases }
}

/// The same, with limits to how often a device may come back.
pub(crate) fn scan_within(
    store: &mut Store,
    seen: &[(Device, RuleVerdict)],
    limits: &Limits,
    context: &Context,
) -> Result<Vec<Done>, StoreError> {
    let all = store.all_devices()?;
    let keys = || seen.iter().map(|(device, _)| &device.key);
    let aliases = Aliases::default();
    let plan = |known: &[Record]| {
        // No row is kept from the planner that may be one of the devices, or makes a serial
        // worthless.
        let counts = |r: &&Record| {
            let key = r.key();
            r.present
                || keys().any(|k| {
                    key.is(k)
                        || (key.usb == k.usb
                            && key.serial.text().is_some()
                            && key.serial.text() == k.serial.text())
                })
        };
        for row in all.iter().filter(counts) {
            assert!(known.iter().any(|r| r.entry.id == row.entry.id), "{row:?}");
        }
        plan(seen, known)
    };
    store.reconcile("node-1", limits, SeenKeys { keys: keys(), aliases: &aliases }, plan, context)
}

fn plan(seen: &[(Device, RuleVerdict)], known: &[Record]) -> Vec<Change> {
    let mut changes = Vec::new();
    let mut found: Vec<DeviceId> = Vec::new();
    for (device, verdict) in seen {
        match known.iter().find(|r| r.key().is(&device.key)) {
            Some(r) => {
                found.push(r.entry.id);
                changes.push(Change::See(r.entry.id, Box::new(device.clone()), verdict.clone()));
            }
            None => changes.push(Change::Add(Box::new(device.clone()), verdict.clone())),
        }
    }
    let gone = known.iter().map(|r| r.entry.id).filter(|id| !found.contains(id));
    changes.extend(gone.map(Change::Gone));
    changes
}

/// `count` identical devices at ports of their own.
pub(crate) fn plug(store: &mut Store, count: u8) {
    let seen: Vec<_> =
        (1..=count).map(|n| (device(1, None, &format!("1-{n}"), n), offered())).collect();
    scan(store, &seen, &boot(1)).unwrap();
}

/// Seconds that a pending claim may stay unconfirmed.
pub(crate) const PENDING_GRACE: f64 = 120.0;

pub(crate) fn boot(n: u32) -> Context {
    Context {
        boot_id: format!("boot-{n}"),
        uptime: 10.0,
        pending_grace: PENDING_GRACE,
        actor: "test".into(),
    }
}

pub(crate) fn instance(n: u32) -> InstanceId {
    format!("00000000-0000-4000-8000-{n:012}").parse().unwrap()
}

pub(crate) fn claimant(n: u32) -> Claimant {
    Claimant { instance: instance(n), domain: format!("vm-{n}"), project: None }
}

pub(crate) fn request(json: &str) -> DeviceRequest {
    Flavor::parse_lists(Some(json), None).unwrap().usb_devices.remove(0)
}

pub(crate) fn want(json: &str) -> ClaimRequest {
    ClaimRequest::new(request(json), false)
}

/// Believes the inventory, and refuses nothing.
pub(crate) struct Trusting;

impl ClaimVerifier for Trusting {
    fn verify(&mut self, candidate: &Record) -> Verified {
        Verified::Here(candidate.location())
    }
    fn fits(&mut self, _: &[Granted]) -> Result<(), String> {
        Ok(())
    }
}

/// A firm claim.
pub(crate) fn claim(store: &mut Store, n: u32, json: &str) -> Result<Claimed, StoreError> {
    store.claim(&claimant(n), &[want(json)], &[], ClaimMode::Replace, &mut Trusting, &boot(1))
}

pub(crate) const ANY: &str = r#"{"vendor_id":"0529"}"#;

/// Whether the claim was granted; panics on an error.
pub(crate) fn takes(store: &mut Store, n: u32) -> bool {
    matches!(claim(store, n, ANY).unwrap(), Claimed::Granted(_))
}

/// Asserts that the inventory is sound.
pub(crate) fn assert_sound(store: &Store) {
    assert_eq!(store.check().unwrap(), Vec::<String>::new());
}
