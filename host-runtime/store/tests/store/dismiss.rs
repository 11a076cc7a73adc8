//! Ending an operator's devices: the claims that stay keep the assignments that serve them.

use proptest::prelude::*;
use virt_usb_model::{DeviceId, DeviceRequest};
use virt_usb_store::{Assignment, Given, Store};

use crate::common::{
    ANY, Trusting, boot, claimant, device, instance, inventory, offered, request, scan,
};

const DEVICES: u8 = 5;

/// Requests that overlap: any device of the vendor, one kind, one serial.
fn requests() -> impl Strategy<Value = Vec<DeviceRequest>> {
    let any = (1..=2_u32).prop_map(|count| format!(r#"{{"vendor_id":"0529","count":{count}}}"#));
    let kind = (0..2_u16).prop_map(|n| format!(r#"{{"vendor_id":"0529","product_id":"000{n}"}}"#));
    let serial = (1..=DEVICES).prop_map(|n| format!(r#"{{"serial":"KEY-{n}"}}"#));
    let id = (1..=DEVICES).prop_map(|n| format!(r#"{{"id":{n}}}"#));
    let one = prop_oneof![any, kind, serial, id].prop_map(|text| request(&format!("[{text}]")));
    proptest::collection::vec(one, 1..5)
}

fn plugged(store: &mut Store) {
    let key = |n: u8| {
        let serial = format!("KEY-{n}");
        (device(u16::from(n % 2), Some(&serial), &format!("1-{n}"), n), offered())
    };
    scan(store, &(1..=DEVICES).map(key).collect::<Vec<_>>(), &boot(1)).unwrap();
}

fn serves(store: &Store) -> impl Fn(&DeviceRequest, DeviceId) -> bool + use<> {
    let devices = store.devices().unwrap();
    move |request, device| {
        devices.iter().any(|r| r.entry.id == device && r.is_selected_by(&request.selector))
    }
}

/// The slow oracle: tries every order in which the devices may serve the requests, one each.
fn each_has_one(
    requests: &[DeviceRequest],
    devices: &[DeviceId],
    serves: &dyn Fn(&DeviceRequest, DeviceId) -> bool,
) -> bool {
    let Some((device, others)) = devices.split_first() else { return true };
    (0..requests.len()).filter(|at| serves(&requests[*at], *device)).any(|at| {
        let mut left = requests.to_vec();
        left[at].count -= 1;
        left.retain(|request| request.count > 0);
        each_has_one(&left, others, serves)
    })
}

fn wanted(assignments: &[Assignment]) -> (Vec<DeviceRequest>, u32) {
    let requests: Vec<DeviceRequest> = assignments.iter().map(|a| a.request.clone()).collect();
    let devices = requests.iter().map(|request| request.count).sum();
    (requests, devices)
}

fn held(store: &Store) -> Vec<DeviceId> {
    let mut claims = store.claims_of(instance(1)).unwrap();
    claims.retain(|claim| !claim.ending);
    claims.iter().map(|claim| claim.device_id).collect()
}

fn end(store: &mut Store, serial: &str) {
    let claims = store.claims_of(instance(1)).unwrap();
    let devices = store.devices().unwrap();
    let is_meant = |device: DeviceId| {
        devices.iter().any(|r| r.entry.id == device && r.entry.serial.as_deref() == Some(serial))
    };
    let leaving: Vec<_> = claims.iter().filter(|c| is_meant(c.device_id)).cloned().collect();
    let serves = serves(store);
    assert!(store.dismiss(&claimant(1), None, &[], &leaving, serves, &boot(1)).unwrap());
}

#[test]
fn detaching_a_device_ends_the_assignment_that_no_other_device_needs() {
    let serial = r#"[{"serial":"KEY-1"}]"#;
    for order in [[ANY, serial], [serial, ANY]] {
        let (dir, mut store) = inventory();
        plugged(&mut store);
        // The device of the serial first: the other request gets another one.
        for text in [serial, ANY] {
            let text = if text == ANY { format!("[{ANY}]") } else { text.to_owned() };
            let given =
                store.give(&claimant(1), &[request(&text)], &mut Trusting, &boot(1)).unwrap();
            assert!(matches!(given, Given::Granted { .. }), "{given:?}");
        }
        if order[0] == ANY {
            // The same assignments in the other order.
            let (mut requests, _) = wanted(&store.assignments(instance(1)).unwrap());
            requests.reverse();
            let raw = crate::common::raw(dir.path());
            for (id, request) in (1..).zip(&requests) {
                let sql = "UPDATE assignments SET request = ?2 WHERE id = ?1";
                assert_eq!(raw.execute(sql, (id, request.to_string())).unwrap(), 1);
            }
        }
        end(&mut store, "KEY-1");
        let (left, _) = wanted(&store.assignments(instance(1)).unwrap());
        assert_eq!(left.len(), 1);
        assert_eq!(left[0].selector.serial, None, "the other device is left without an assignment");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    #[test]
    fn each_device_that_stays_has_an_assignment(
        requests in requests(),
        order in Just((1..=DEVICES).collect::<Vec<u8>>()).prop_shuffle(),
    ) {
        let (_dir, mut store) = inventory();
        plugged(&mut store);
        for request in &requests {
            // One that cannot be served is refused, and changes nothing.
            store
                .give(&claimant(1), std::slice::from_ref(request), &mut Trusting, &boot(1))
                .unwrap();
        }
        for serial in order {
            let before = held(&store).len();
            end(&mut store, &format!("KEY-{serial}"));
            let now = held(&store);
            let (left, devices) = wanted(&store.assignments(instance(1)).unwrap());
            prop_assert!(before - now.len() <= 1);
            prop_assert_eq!(devices as usize, now.len(), "{:?}", left);
            prop_assert!(each_has_one(&left, &now, &serves(&store)), "{:?} for {:?}", left, now);
        }
    }
}
