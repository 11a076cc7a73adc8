//! Calls and their responses: devices, attach and detach, lists, tags.

use serde_json::{Value, json};

use crate::common::{CRM, ERP, OFF, OURS, RULES, Served};

#[test]
fn the_calls_are_answered_key_by_key() {
    let served = Served::new("");
    let admin = served.token("root", OURS, "admin");
    for prefix in
        [format!("/v2/{OURS}"), "/v3".to_owned(), "/v2.1".to_owned(), format!("/v2.1/{OURS}")]
    {
        let answer = served.ask(&admin, "GET", &format!("{prefix}/os-hypervisors/host1"), "");
        assert_eq!(answer.status, 200, "{prefix}: {answer:?}");
        // The promise: these keys, in this order, of these types.
        let first = r#"{"hypervisor":{"usb_device_stats":[{"id":1,"compute_node_id":1,"address":"usb_1_5","product_id":"0001","vendor_id":"0529","bus_id":"1","device_id":"5","port_id":"1","status":"available","extra_info":"","instance_uuid":"","#;
        assert!(answer.text.starts_with(first), "{prefix}: {}", answer.text);
        assert!(answer.headers["x-openstack-request-id"].starts_with("req-"), "{answer:?}");
        assert_eq!(answer.json()["hypervisor"]["usb_device_totals"]["available"], 4);
    }
    for prefix in [format!("/v2/{OURS}"), "/v3".to_owned(), "/v2.1".to_owned()] {
        let action = format!("{prefix}/servers/{ERP}/action");
        let attach = r#"{"attach_usb_devices":{"usb_devices_requests":[{"id":1}]}}"#;
        let attached = served.ask(&admin, "POST", &action, attach);
        assert_eq!(attached.status, 202, "{attached:?}");
        let has = &attached.json()["usb_devices"][0];
        assert_eq!(
            (&has["id"], &has["status"], &has["instance_uuid"]),
            (&json!(1), &json!("allocated"), &json!(ERP))
        );
        assert_eq!(served.host.claims(), format!("device 1 erp {ERP} allocated hold=instance\n"));
        let again = served.ask(&admin, "POST", &action, attach);
        assert_eq!(
            (again.status, again.json()["live"].clone()),
            (202, json!(true)),
            "asked twice, done once"
        );
        let detach = r#"{"detach_usb_devices":{"usb_devices_requests":[{"id":1}]}}"#;
        let detached = served.ask(&admin, "POST", &action, detach);
        assert_eq!(
            (detached.status, &detached.json()["usb_devices"][0]["status"]),
            (202, &json!("available"))
        );
        assert_eq!(served.host.claims(), "");
        assert!(
            served
                .ask(&admin, "POST", &action, detach)
                .fault("itemNotFound")
                .contains(") has no such USB device and no such assignment: {")
        );
    }
    let list = served.ask(&admin, "GET", "/v2.1/os-hypervisors", "").json();
    assert_eq!(list["hypervisors"][0]["hypervisor_hostname"], "host1");
    assert_eq!(
        served.ask(&admin, "GET", "/v3/os-hypervisors/host9", "").fault("itemNotFound"),
        "Compute host host9 could not be found."
    );
}

#[test]
fn all_or_nothing_and_a_conflict_names_the_holder() {
    let served = Served::new("");
    let admin = served.token("root", OURS, "admin");
    assert_eq!(served.attach(&admin, CRM, &json!([{ "id": 2 }])).status, 202);
    let refused = served.attach(&admin, ERP, &json!([{ "id": 1 }, { "id": 2 }]));
    let why = refused.fault("conflictingRequest");
    assert!(why.contains(&format!("USB device 2 is held by instance {CRM} (crm) since ")), "{why}");
    assert_eq!(
        served.host.claims(),
        format!("device 2 crm {CRM} allocated hold=instance\n"),
        "nothing is left of it"
    );
    // Two that are there, by what they are.
    let two = served.attach(
        &admin,
        ERP,
        &json!([{ "vendor_id": "0529", "product_id": "0001" }, { "serial": "S3" }]),
    );
    let ids: Vec<Value> =
        two.json()["usb_devices"].as_array().unwrap().iter().map(|d| d["id"].clone()).collect();
    assert_eq!((two.status, ids), (202, vec![json!(1), json!(3)]));
    // A wrong one among those that are to go: none goes.
    assert_eq!(served.detach(&admin, ERP, &json!([{ "id": 1 }, { "id": 2 }])).status, 404);
    assert_eq!(served.host.claims().matches(ERP).count(), 2);
    assert_eq!(served.detach(&admin, ERP, &json!([{ "id": 1 }, { "id": 3 }])).status, 202);
    // It does not run: at its next start.
    let later = served.attach(&admin, OFF, &json!([{ "id": 3 }]));
    assert_eq!(
        (later.status, later.json()),
        (202, json!({ "usb_devices": [], "live": false, "already": [] }))
    );
    // What no device could ever serve is not promised.
    let never = served
        .attach(&admin, OFF, &json!([{ "vendor_id": "0529", "count": 5 }]))
        .fault("conflictingRequest");
    assert!(never.starts_with("No available USB device matches"), "{never}");
    assert_eq!(served.attach(&admin, OFF, &json!([{ "id": 3 }])).status, 202);
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                assert_eq!(served.attach(&admin, OFF, &json!([{ "id": 3 }])).status, 202);
            });
        }
    });
    let off = served.ask(&admin, "GET", &format!("/v3/servers/{OFF}/os-usb-devices"), "").json();
    assert_eq!(off["server"]["usb_devices_requests"], json!([{ "id": 3 }]), "once");
    assert_eq!(
        (&off["server"]["status"], &off["server"]["name"]),
        (&json!("SHUTOFF"), &json!("off"))
    );
    assert_eq!(served.detach(&admin, OFF, &json!([{ "id": 3 }])).status, 202);
    let off = served.ask(&admin, "GET", &format!("/v3/servers/{OFF}/os-usb-devices"), "").json();
    assert_eq!(off["server"]["usb_devices_requests"], json!([]));
}

#[test]
fn a_hundred_ask_and_one_gets_it() {
    let served = Served::new("");
    let admin = served.token("root", OURS, "admin");
    let served = &served;
    let statuses: Vec<u16> = std::thread::scope(|scope| {
        let ask = |n: usize| {
            let (admin, server) = (&admin, if n.is_multiple_of(2) { ERP } else { CRM });
            // A selector, not an id: what one has already is no conflict.
            scope.spawn(move || served.attach(admin, server, &json!([{ "serial": "S1" }])).status)
        };
        (0..100)
            .map(ask)
            .collect::<Vec<_>>()
            .into_iter()
            .map(|asked| asked.join().unwrap())
            .collect()
    });
    let count = |status: u16| statuses.iter().filter(|s| **s == status).count();
    assert_eq!((count(202), count(409)), (1, 99), "{statuses:?}");
    assert_eq!(served.host.claims().lines().count(), 1);
}

#[test]
fn tags_are_limited_and_names_must_be_printable() {
    let served = Served::new("");
    let admin = served.token("root", OURS, "admin");
    let tag = |numbers: std::ops::Range<u32>, action: &str| {
        let tags: Vec<String> = numbers.map(|n| format!("t{n}")).collect();
        let body = json!({ action: { "tags": tags } }).to_string();
        served.ask(&admin, "POST", "/v3/os-usb-devices/1/action", &body)
    };
    assert_eq!(tag(0..127, "add_tags").status, 200);
    assert_eq!(tag(0..127, "add_tags").status, 200, "those that it has");
    let told = tag(127..128, "add_tags").fault("conflictingRequest");
    assert_eq!(told, "USB device 1 would have more than 127 tags.");
    assert_eq!(tag(0..1, "remove_tags").status, 200);
    assert_eq!(tag(127..128, "add_tags").status, 200);
    let one_more = served.host.virt_usb(&["tag", "1", "more"]);
    let told = String::from_utf8(one_more.stderr).unwrap();
    assert!(told.contains("more than 127 tags: 'virt-usb untag' removes tags"), "{told}");
    // Overriding the direction of writing, and of no width.
    for name in ["a%E2%80%AEb", "a%E2%80%8Bb"] {
        let flavor = r#"{"usb_devices":[{"vendor_id":"0529"}]}"#;
        let answer = served.ask(&admin, "PUT", &format!("/v3/os-usb-flavors/{name}"), flavor);
        assert_eq!(answer.status, 400, "{name}: {answer:?}");
    }
}

#[test]
fn lists_are_filtered_sorted_and_paged() {
    let served = Served::new(RULES);
    let admin = served.token("root", OURS, "admin");
    let list = |query: &str| served.ask(&admin, "GET", &format!("/v3/os-usb-devices?{query}"), "");
    let ids = |query: &str| -> Vec<u64> {
        let answer = list(query);
        let devices = answer.json()["usb_devices"]
            .as_array()
            .cloned()
            .unwrap_or_else(|| panic!("{answer:?}"));
        devices.iter().filter_map(|d| d["id"].as_u64()).collect()
    };
    served.until("the rules", |_| (ids("status=unavailable") == [4]).then_some(()));
    assert_eq!(ids("vendor_id=0x529&product_id=2"), [2]);
    assert_eq!(ids("serial=S3"), [3]);
    assert_eq!(ids("tag=ours"), [2]);
    assert_eq!(ids("sort_key=product_id&sort_dir=desc"), [4, 3, 2, 1]);
    assert_eq!(ids("vendor_id=1234"), [0_u64; 0]);
    let mut seen = Vec::new();
    let mut next = "/v3/os-usb-devices?limit=3&sort_key=id&sort_dir=desc".to_owned();
    loop {
        let page = served.ask(&admin, "GET", &next, "").json();
        seen.extend(
            page["usb_devices"].as_array().unwrap().iter().map(|d| d["id"].as_u64().unwrap()),
        );
        let Some(href) = page["usb_devices_links"][0]["href"].as_str() else { break };
        next = href.to_owned();
    }
    assert_eq!(seen, [4, 3, 2, 1], "each once");
    for (query, why) in [
        ("limit=0", "limit: found 0"),
        ("marker=77", "Marker 77 could not be found"),
        ("colour=red", "unknown field `colour`"),
        ("sort_key=colour", "unknown variant `colour`"),
        ("vendor_id=zz", "vendor_id: found"),
        ("status=free", "status: found \"free\", wanted one of available, "),
        ("instance_uuid=7", "instance_uuid"),
    ] {
        assert!(list(query).fault("badRequest").contains(why), "{query}: {:?}", list(query));
    }
    let reason = list("limit=x").fault("badRequest");
    assert!(
        reason.starts_with("limit: invalid"),
        "the key first, and nothing of our innards: {reason}"
    );
    let events = |query: &str| {
        served.ask(&admin, "GET", &format!("/v3/os-usb-devices/2/events{query}"), "").json()
    };
    for _ in 0..3 {
        assert_eq!(served.attach(&admin, ERP, &json!([{ "id": 2 }])).status, 202);
        assert_eq!(served.detach(&admin, ERP, &json!([{ "id": 2 }])).status, 202);
    }
    let all = events("")["events"].as_array().unwrap().len();
    let first = events("?limit=2");
    assert_eq!(first["events"].as_array().unwrap().len(), 2);
    let href = first["events_links"][0]["href"].as_str().unwrap();
    let rest = served.ask(&admin, "GET", &href.replace("limit=2", "limit=1000"), "").json();
    assert_eq!(rest["events"].as_array().unwrap().len(), all - 2);
}
