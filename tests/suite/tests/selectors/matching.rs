//! Everything that selects devices selects the same ones.

use std::collections::BTreeSet;

use proptest::prelude::*;
use serde_json::{Value, json};
use tempfile::TempDir;
use virt_usb_filter_core::{Inventory, Question, Verdict};
use virt_usb_model::{
    Aliases, BusAddress, Class, Device, DeviceId, DeviceKey, DevicePath, DeviceRequest, PortPath,
    ProductId, RuleVerdict, Selector, Serial, UsbId, VendorId,
};
use virt_usb_store::claim::{
    ClaimMode, ClaimRequest, ClaimVerifier, Claimant, Claimed, Granted, Verified,
};
use virt_usb_store::flaps::Limits;
use virt_usb_store::reconcile::{Change, SeenKeys};
use virt_usb_store::release::Extent;
use virt_usb_store::{Context, Record, Store};
use virt_usb_suite::{PROGRAM_TIMEOUT, cases};

/// Devices that differ in what selectors name; the position gives each a port of its own.
fn device() -> impl Strategy<Value = (Device, Vec<String>)> {
    let class = || prop::sample::select(vec![0u8, 3, 8, 0xff]);
    (
        (1u16..4, 1u16..3),
        prop::option::of(0u8..3),
        any::<bool>(),
        class(),
        prop::collection::btree_set(class(), 0..3),
        prop::collection::btree_set(prop::sample::select(vec!["erp", "blue", "crm"]), 0..3),
    )
        .prop_map(|((vendor, product), serial, has_path, class, interfaces, tags)| {
            let port: PortPath = "1-1".parse().unwrap();
            let device = Device {
                key: DeviceKey {
                    usb: UsbId::new(vendor, product),
                    serial: Serial::new(serial.map(|s| format!("S{s}")), false),
                    path: DevicePath::new("pci-0000:00:14.0", 2, port.ports()).filter(|_| has_path),
                    port,
                },
                address: BusAddress::new(1, 1).unwrap(),
                class: Class::new(class),
                interfaces: interfaces.into_iter().map(Class::new).collect(),
                speed: None,
                manufacturer: None,
                product: None,
                driver: None,
                host_use: None,
                descriptors: None,
                generation: None,
            };
            (device, tags.into_iter().map(Into::into).collect())
        })
}

/// Up to twelve devices, each at its own port. No two have the same identity.
fn devices() -> impl Strategy<Value = Vec<(Device, Vec<String>)>> {
    prop::collection::vec(device(), 0..12).prop_map(|mut devices| {
        let mut serials = BTreeSet::new();
        devices.retain(|(d, _)| {
            let serial = d.key.serial.text().map(str::to_owned);
            serial.is_none() || serials.insert((d.key.usb, serial))
        });
        for (number, (device, _)) in (1u8..).zip(&mut devices) {
            let (bus, ports) = (1 + number % 2, [1 + number % 3, number]);
            let path = DevicePath::new(&format!("pci-0000:0{bus}:00.0"), 2, &ports);
            device.key.port = PortPath::new(bus, &ports).unwrap();
            device.key.path = device.key.path.take().and(path);
            device.address = BusAddress::new(bus, number).unwrap();
        }
        devices
    })
}

/// Selectors with values that some of the devices have.
fn selector() -> impl Strategy<Value = Selector> {
    let some = prop::bool::weighted;
    (
        (some(0.1), 1u64..13),
        (some(0.5), 1u16..5, some(0.5), 1u16..3),
        (some(0.2), 0u8..4),
        (some(0.15), some(0.15), 1u8..13),
        (some(0.3), prop::sample::select(vec![0u8, 3, 8, 0xff, 7])),
        prop::collection::vec(prop::sample::select(vec!["erp", "blue", "none"]), 0..3),
    )
        .prop_map(|(id, usb, serial, place, class, tags)| {
            let (has_port, has_path, number) = place;
            let (bus, ports) = (1 + number % 2, [1 + number % 3, number]);
            // All fields are named: a new one is chosen here before this compiles.
            Selector {
                id: DeviceId::new(id.1).filter(|_| id.0),
                vendor_id: usb.0.then_some(VendorId::new(usb.1)),
                product_id: (usb.0 && usb.2).then_some(ProductId::new(usb.3)),
                serial: serial.0.then(|| format!("S{}", serial.1)),
                port: PortPath::new(bus, &ports).filter(|_| has_port),
                path: DevicePath::new(&format!("pci-0000:0{bus}:00.0"), 2, &ports)
                    .filter(|_| has_path),
                class: class.0.then_some(Class::new(class.1)),
                tags: tags.into_iter().map(Into::into).collect(),
            }
        })
        .prop_filter("a selector names something", |s| s.named().contains(&true))
}

/// Facts of a device that a selector can name, as JSON.
fn facts(id: DeviceId, (device, tags): &(Device, Vec<String>)) -> Value {
    let classes = [device.class].into_iter().chain(device.interfaces.iter().copied());
    json!({
        "id": id,
        "vendor_id": device.key.usb.vendor.to_string(),
        "product_id": device.key.usb.product.to_string(),
        "serial": device.key.serial.text(),
        "port": device.key.port.to_string(),
        "path": device.key.path.as_ref().map(ToString::to_string),
        "class": classes.map(|class| class.to_string()).collect::<Vec<_>>(),
        "tags": tags,
    })
}

/// The oracle: compares key by key what the selector's JSON says with what the device has.
fn is_selected(selector: &Selector, facts: &Value) -> bool {
    let selector = serde_json::to_value(selector).unwrap();
    selector.as_object().unwrap().iter().all(|(key, wanted)| match key.as_str() {
        "id" | "vendor_id" | "product_id" | "serial" | "port" | "path" => facts[key] == *wanted,
        "class" => facts[key].as_array().unwrap().contains(wanted),
        "tags" => {
            let has = facts[key].as_array().unwrap();
            wanted.as_array().unwrap().iter().all(|tag| has.contains(tag))
        }
        other => panic!("the oracle does not know the key {other}"),
    })
}

/// Believes the inventory, and refuses nothing.
struct Trusting;

impl ClaimVerifier for Trusting {
    fn verify(&mut self, candidate: &Record) -> Verified {
        Verified::Here(candidate.location())
    }
    fn fits(&mut self, _: &[Granted]) -> Result<(), String> {
        Ok(())
    }
}

fn context() -> Context {
    Context { boot_id: "boot".into(), uptime: 10.0, pending_grace: 120.0, actor: "test".into() }
}

/// An inventory in which all of the devices are available.
fn store_of(devices: &[(Device, Vec<String>)]) -> (TempDir, Store) {
    let folder = tempfile::tempdir().unwrap();
    let mut store = Store::create(folder.path(), PROGRAM_TIMEOUT).unwrap();
    let add = |(device, tags): &(Device, Vec<String>)| {
        let verdict = RuleVerdict {
            withheld: None,
            rule: None,
            projects: Vec::new(),
            tags: tags.clone(),
            one_time_use: false,
            because: "a test".into(),
        };
        Change::Add(Box::new(device.clone()), verdict)
    };
    let changes = devices.iter().map(add).collect();
    let aliases = Aliases::default();
    let seen = SeenKeys { keys: devices.iter().map(|(device, _)| &device.key), aliases: &aliases };
    store.reconcile("host1", &Limits::default(), seen, |_| changes, &context()).unwrap();
    (folder, store)
}

/// Devices that the store claims for a request of `count` devices; `None` if it has too few.
fn claimed(store: &mut Store, selector: &Selector, count: u32) -> Option<BTreeSet<DeviceId>> {
    let instance = "00000000-0000-4000-8000-000000000001".parse().unwrap();
    let claimant = Claimant { instance, domain: "erp".into(), project: None };
    let request = DeviceRequest { selector: selector.clone(), count };
    let requests = [ClaimRequest::new(request, false)];
    let done = store
        .claim(&claimant, &requests, &[], ClaimMode::Replace, &mut Trusting, &context())
        .unwrap();
    let ids = match done {
        Claimed::Granted(devices) => Some(devices.iter().map(|d| d.device.entry.id).collect()),
        Claimed::Short(_) => None,
        Claimed::Unfit(why) => panic!("{why}"),
    };
    store.release(instance, Extent::Everything, "a test", &context()).unwrap();
    ids
}

/// Devices that the filter chooses for a request of `count` devices; `None` if it has too few.
fn filtered(inventory: &Inventory, selector: &Selector, count: u32) -> Option<BTreeSet<DeviceId>> {
    let request = DeviceRequest { selector: selector.clone(), count };
    let question = Question { requests: vec![request], ..Question::default() };
    match inventory.explain(&question, "host1").unwrap() {
        Verdict::Accepted { devices, .. } => Some(devices.into_iter().collect()),
        Verdict::Rejected(_) => None,
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: cases(64), ..ProptestConfig::default() })]

    #[test]
    fn everything_that_selects_devices_selects_the_same_ones(
        devices in devices(),
        selectors in prop::collection::vec(selector(), 1..12),
    ) {
        let (_folder, mut store) = store_of(&devices);
        let records = store.devices().unwrap();
        prop_assert_eq!(records.len(), devices.len());
        let mut inventory = Inventory::new();
        let document = store.host_document().unwrap().unwrap();
        inventory.load(&serde_json::to_string(&document).unwrap(), 1);
        for selector in selectors {
            let mut expected = BTreeSet::new();
            for record in &records {
                let id = record.entry.id;
                let at = |d: &&(Device, Vec<String>)| d.0.address == record.entry.address;
                let seen = devices.iter().find(at).unwrap();
                let is_expected = is_selected(&selector, &facts(id, seen));
                prop_assert_eq!(selector.matches(id, &seen.0, &seen.1), is_expected);
                prop_assert_eq!(record.is_selected_by(&selector), is_expected);
                expected.extend(is_expected.then_some(id));
            }
            // All of them, and not one more. An id names one device, and no count.
            let all = u32::try_from(expected.len()).unwrap();
            let more = (all + 1).min(if selector.id.is_some() { 1 } else { u32::MAX });
            for count in [all, more] {
                if count > 0 {
                    let wanted = Some(&expected).filter(|_| count == all);
                    let by_store = claimed(&mut store, &selector, count);
                    prop_assert_eq!(by_store.as_ref(), wanted, "store: {:?}", selector);
                    let by_filter = filtered(&inventory, &selector, count);
                    prop_assert_eq!(by_filter.as_ref(), wanted, "filter: {:?}", selector);
                }
            }
        }
    }
}
