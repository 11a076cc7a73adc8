//! Tokens, roles and owners: who may call what.

use std::time::Duration;

use serde_json::{Value, json};
use virt_usb_suite::ok;

use crate::common::{CRM, ERP, LAB, OFF, OURS, RULES, Served, THEIRS};

#[test]
fn roles_permit_the_documented_calls() {
    let served = Served::new(RULES);
    let theirs = served.token("theirs", THEIRS, "member");
    let rules_hold = served.until("the rules", |served| {
        let seen = served.ask(&theirs, "GET", "/v3/os-usb-devices", "").json();
        let ids: Vec<u64> =
            seen["usb_devices"].as_array()?.iter().filter_map(|d| d["id"].as_u64()).collect();
        (ids == [1, 3]).then_some(ids)
    });
    assert_eq!(rules_hold, [1, 3]);
    let callers = [
        ("reader", served.token("reader", OURS, "reader")),
        ("member", served.token("member", OURS, "member")),
        ("admin", served.token("admin", OURS, "admin")),
        ("nobody", "vusb_nobody".to_owned()),
    ];
    let attach = |id: u32| {
        json!({ "attach_usb_devices": { "usb_devices_requests": [{ "id": id }] } }).to_string()
    };
    let detach = |id: u32| {
        json!({ "detach_usb_devices": { "usb_devices_requests": [{ "id": id }] } }).to_string()
    };
    let flavor = r#"{"usb_devices":[{"vendor_id":"0529"}]}"#.to_owned();
    let grant = format!(r#"{{"usb_devices":[{{"id":1}}],"projects":["{THEIRS}"]}}"#);
    let nothing = String::new;
    let server = |id: &str, what: &str| format!("/v3/servers/{id}/{what}");
    let absent = "55555555-2222-4333-8444-555555555555";
    let item = |id: u32, what: &str| format!("/v3/os-usb-devices/{id}{what}");
    // Method, path, body: status for reader, member, admin, and without a token. The order matters:
    // each call finds what the one before has done.
    let table: Vec<(&str, String, String, [u16; 4])> = vec![
        ("GET", "/v3/os-hypervisors".into(), nothing(), [200, 200, 200, 401]),
        ("GET", "/v3/os-hypervisors/host1".into(), nothing(), [200, 200, 200, 401]),
        ("GET", "/v3/os-hypervisors/host2".into(), nothing(), [404, 404, 404, 401]),
        ("GET", "/v3/os-usb-flavors".into(), nothing(), [200, 200, 200, 401]),
        ("GET", item(1, ""), nothing(), [200, 200, 200, 401]),
        ("GET", item(2, ""), nothing(), [200, 200, 200, 401]),
        ("GET", item(3, ""), nothing(), [404, 404, 200, 401]),
        ("GET", item(4, ""), nothing(), [404, 404, 200, 401]),
        ("GET", item(9, ""), nothing(), [404, 404, 404, 401]),
        ("GET", item(2, "/events"), nothing(), [200, 200, 200, 401]),
        ("GET", item(3, "/events"), nothing(), [404, 404, 200, 401]),
        ("GET", server(ERP, "os-usb-devices"), nothing(), [200, 200, 200, 401]),
        ("GET", server(OFF, "os-usb-devices"), nothing(), [200, 200, 200, 401]),
        ("GET", server(CRM, "os-usb-devices"), nothing(), [404, 404, 200, 401]),
        ("GET", server(ERP, "os-usb-events"), nothing(), [200, 200, 200, 401]),
        ("GET", server(CRM, "os-usb-events"), nothing(), [404, 404, 200, 401]),
        ("POST", server(ERP, "action"), attach(1), [403, 202, 202, 401]),
        ("POST", server(ERP, "action"), attach(2), [403, 202, 202, 401]),
        ("POST", server(ERP, "action"), attach(3), [403, 404, 409, 401]),
        ("POST", server(ERP, "action"), attach(4), [403, 404, 409, 401]),
        ("POST", server(CRM, "action"), attach(1), [403, 404, 409, 401]),
        ("POST", server(ERP, "action"), "{}".into(), [400, 400, 400, 401]),
        ("POST", server(CRM, "action"), r#"{"attach_usb_devices":3}"#.into(), [403, 404, 400, 401]),
        ("POST", server(CRM, "action"), detach(1), [403, 404, 404, 401]),
        ("POST", server(ERP, "action"), detach(1), [403, 202, 404, 401]),
        (
            "POST",
            item(1, "/action"),
            r#"{"disable":{"reason":"lent"}}"#.into(),
            [403, 403, 200, 401],
        ),
        ("POST", item(1, "/action"), r#"{"enable":null}"#.into(), [403, 403, 200, 401]),
        ("POST", item(9, "/action"), r#"{"enable":null}"#.into(), [403, 403, 404, 401]),
        ("POST", item(1, "/action"), r#"{"clear_quarantine":null}"#.into(), [403, 403, 200, 401]),
        (
            "POST",
            item(1, "/action"),
            r#"{"add_tags":{"tags":["blue"]}}"#.into(),
            [403, 403, 200, 401],
        ),
        (
            "POST",
            item(1, "/action"),
            r#"{"remove_tags":{"tags":["blue"]}}"#.into(),
            [403, 403, 200, 401],
        ),
        ("PUT", "/v3/os-usb-flavors/erp".into(), flavor, [403, 403, 200, 401]),
        ("GET", "/v3/os-usb-flavors/erp".into(), nothing(), [200, 200, 200, 401]),
        ("DELETE", "/v3/os-usb-flavors/erp".into(), nothing(), [403, 403, 204, 401]),
        ("DELETE", "/v3/os-usb-flavors/erp".into(), nothing(), [403, 403, 404, 401]),
        ("PUT", "/v3/os-usb-grants/erp".into(), grant, [403, 403, 200, 401]),
        ("GET", "/v3/os-usb-grants".into(), nothing(), [403, 403, 200, 401]),
        ("GET", "/v3/os-usb-grants/erp".into(), nothing(), [403, 403, 200, 401]),
        ("GET", item(1, ""), nothing(), [404, 404, 200, 401]),
        ("DELETE", "/v3/os-usb-grants/erp".into(), nothing(), [403, 403, 204, 401]),
        ("DELETE", "/v3/os-usb-grants/erp".into(), nothing(), [403, 403, 404, 401]),
        ("GET", item(1, ""), nothing(), [200, 200, 200, 401]),
        ("GET", "/v3/servers".into(), nothing(), [200, 200, 200, 401]),
        ("GET", "/v3/os-usb-claims".into(), nothing(), [200, 200, 200, 401]),
        ("GET", "/v3/os-usb-events".into(), nothing(), [200, 200, 200, 401]),
        ("GET", "/v3/os-usb-owners".into(), nothing(), [403, 403, 200, 401]),
        ("GET", "/v3/os-usb-devices?deleted=true".into(), nothing(), [403, 403, 200, 401]),
        ("GET", server(LAB, "os-usb-devices"), nothing(), [404, 404, 200, 401]),
        ("POST", server(LAB, "action"), r#"{"clear_usb_owner":null}"#.into(), [403, 403, 200, 401]),
        (
            "POST",
            server(ERP, "action"),
            r#"{"set_usb_owner":{"project_id":"x"}}"#.into(),
            [403, 403, 409, 401],
        ),
        (
            "POST",
            server(absent, "action"),
            r#"{"clear_usb_owner":null}"#.into(),
            [403, 403, 404, 401],
        ),
        ("GET", format!("/v2/{OURS}/os-hypervisors"), nothing(), [200, 200, 200, 401]),
        ("GET", format!("/v2/{THEIRS}/os-hypervisors"), nothing(), [400, 400, 400, 401]),
        ("GET", format!("/v2.1/{THEIRS}/os-usb-devices"), nothing(), [400, 400, 400, 401]),
    ];
    for (method, path, body, wanted) in &table {
        for ((role, token), wanted) in callers.iter().zip(wanted) {
            let mut answer = served.ask(token, method, path, body);
            // The number of requests without a token is limited.
            while *role == "nobody" && answer.status == 429 {
                std::thread::sleep(Duration::from_secs(1));
                answer = served.ask(token, method, path, body);
            }
            assert_eq!(answer.status, *wanted, "{role}: {method} {path} {body}\n{answer:?}");
        }
    }
    // Not yours and not there: one text.
    let member = &callers[1].1;
    let text = |path: &str, id: &str| served.ask(member, "GET", path, "").text.replace(id, "X");
    assert_eq!(text(&item(3, ""), "3"), text(&item(9, ""), "9"));
    assert_eq!(
        text(&server(CRM, "os-usb-devices"), CRM),
        text(&server(absent, "os-usb-devices"), absent)
    );
    assert_eq!(
        text(&server("x", "os-usb-devices"), "x"),
        text(&server(absent, "os-usb-devices"), absent)
    );
    // A device of another project is reported as in use, without details, also in a request by
    // kind.
    served.until("device 1 to be free", |served| {
        (!served.host.claims().contains("device 1")).then_some(())
    });
    assert_eq!(served.attach(&callers[2].1, CRM, &json!([{ "id": 1 }])).status, 202);
    let seen = served.ask(member, "GET", &item(1, ""), "").json();
    assert_eq!(
        (
            &seen["usb_device"]["status"],
            &seen["usb_device"]["instance_uuid"],
            &seen["usb_device"]["held_by"]
        ),
        (&json!("allocated"), &json!(""), &json!(null))
    );
    let why = served
        .attach(member, ERP, &json!([{ "vendor_id": "0529", "product_id": "0001" }]))
        .fault("conflictingRequest");
    assert!(
        why.contains("USB device 1 is in use. Request another device")
            && !why.contains("crm")
            && !why.contains(CRM),
        "{why}"
    );
    let why = served.attach(member, ERP, &json!([{ "serial": "S3" }])).fault("conflictingRequest");
    let advice = "plug it in, or request a device from the list of USB devices (GET \
                  os-usb-devices).";
    assert_eq!(why, format!("No available USB device matches {{\"serial\":\"S3\"}}: {advice}"));
    let none = served.attach(member, ERP, &json!([{ "serial": "none" }]));
    assert_eq!(
        none.fault("conflictingRequest"),
        why.replace("S3", "none"),
        "a hidden device looks like none"
    );
    let filtered =
        served.ask(member, "GET", &format!("/v3/os-usb-devices?instance_uuid={CRM}"), "").json();
    assert_eq!(filtered["usb_devices"], json!([]), "a filter tells nothing that is not shown");
    let audit = served.ask(member, "GET", &item(1, "/events"), "").text;
    assert!(audit.contains("erp") && !audit.contains("crm"), "{audit}");
    let admins = served.ask(&callers[2].1, "GET", &item(1, "/events"), "").text;
    assert!(admins.contains("crm") && admins.contains("\"actor\":\"api admin\""), "{admins}");
    // What an administrator did to the device: that he did, and neither why nor who he is.
    let events = served.ask(member, "GET", &item(1, "/events"), "").json()["events"].clone();
    let disabled =
        events.as_array().unwrap().iter().find(|event| event["event"] == "disabled").unwrap();
    assert_eq!(
        (&disabled["actor"], &disabled["detail"]),
        (&json!(null), &json!(null)),
        "{disabled}"
    );
    assert!(admins.contains("lent") && !audit.contains("lent"), "{audit}");
    // The release of a device may be the agent's.
    let own = |event: &&Value| event["project_id"] == OURS && event["event"] == "claimed";
    let own = events.as_array().unwrap().iter().find(own).unwrap();
    assert!(own["actor"].as_str().unwrap().starts_with("api "), "{own}");
}

#[test]
fn without_a_token_paths_are_hidden_and_errors_have_one_shape() {
    let served = Served::new("");
    for path in ["/v3/os-usb-devices/%ff", "/v2/%ff/os-hypervisors", "/v3/nowhere/%ff"] {
        let answer = served.ask("vusb_nobody", "GET", path, "");
        assert!([401, 404].contains(&answer.status), "{path}: {answer:?}");
    }
    assert_eq!(served.ask("vusb_nobody", "GET", "/v3/os-usb-devices/%ff", "").status, 401);
    let admin = served.token("root", OURS, "admin");
    let told = served.ask(&admin, "GET", "/v3/os-usb-devices/%ff", "").fault("badRequest");
    assert_eq!(told, "The path is not UTF-8.");
    for path in ["/openapi.json", "/v3/os-hypervisors"] {
        let told = served.ask(&admin, "PUT", path, "{}").fault("badMethod");
        assert_eq!(told, "This resource has no such method.", "{path}");
    }
}

#[test]
fn an_administrator_sets_the_owner_of_a_server() {
    let served = Served::new(RULES);
    let admin = served.token("root", OURS, "admin");
    let (ours, theirs) =
        (served.token("ours", OURS, "member"), served.token("theirs", THEIRS, "member"));
    served.until("the rules", |served| {
        let seen = served.ask(&ours, "GET", "/v3/os-usb-devices", "").json();
        (seen["usb_devices"].as_array()?.len() == 2).then_some(())
    });
    let say = |body: Value| {
        served.ask(&admin, "POST", &format!("/v3/servers/{LAB}/action"), &body.to_string())
    };
    let names = |token: &str| -> Vec<String> {
        let servers = served.ask(token, "GET", "/v3/servers", "").json();
        servers["servers"]
            .as_array()
            .unwrap()
            .iter()
            .map(|s| s["name"].as_str().unwrap().into())
            .collect()
    };
    assert_eq!(
        (names(&ours), names(&theirs)),
        (vec!["erp".into(), "off".into()], vec!["crm".to_owned()])
    );
    assert_eq!(
        served.attach(&ours, LAB, &json!([{ "id": 2 }])).status,
        404,
        "a server without an owner belongs to no project"
    );
    let said = say(json!({ "set_usb_owner": { "project_id": OURS } }));
    assert_eq!(
        (said.status, &said.json()["server"]["project_id"]),
        (200, &json!(OURS)),
        "{said:?}"
    );
    assert_eq!((names(&ours).len(), names(&theirs).len()), (3, 1));
    // The whitelist gives device 2 to that project, and so to its server.
    let attached = served.attach(&ours, LAB, &json!([{ "serial": "S2" }]));
    assert_eq!(attached.status, 202, "{attached:?}");
    assert_eq!(served.attach(&theirs, LAB, &json!([{ "id": 1 }])).status, 404);
    // What it holds goes with it.
    assert_eq!(say(json!({ "set_usb_owner": { "project_id": THEIRS } })).status, 200);
    let claims = |token: &str| {
        served.ask(token, "GET", "/v3/os-usb-claims", "").json()["usb_claims"].clone()
    };
    assert_eq!((claims(&ours), &claims(&theirs)[0]["usb_device_id"]), (json!([]), &json!(2)));
    assert_eq!(served.detach(&ours, LAB, &json!([{ "id": 2 }])).status, 404);
    assert_eq!(served.detach(&theirs, LAB, &json!([{ "id": 2 }])).status, 202);
    for (body, why) in [
        (json!({ "set_usb_owner": { "project_id": "" } }), "project_id"),
        (json!({ "set_usb_owner": { "project_id": 7 } }), "wants a project"),
        (json!({ "set_usb_owner": null }), "not a JSON object"),
        (json!({ "clear_usb_owner": {} }), "wants null"),
    ] {
        assert!(
            say(body.clone()).fault("badRequest").contains(why),
            "{body}: {:?}",
            say(body.clone())
        );
    }
    let owners = served.ask(&admin, "GET", "/v3/os-usb-owners", "").json();
    assert_eq!(owners["usb_owners"][0]["project_id"], json!(THEIRS));
    assert_eq!(say(json!({ "clear_usb_owner": null })).json()["server"]["project_id"], json!(null));
    assert_eq!(served.ask(&admin, "GET", "/v3/os-usb-owners", "").json()["usb_owners"], json!([]));
    assert_eq!(names(&theirs), ["crm"]);
    let audit = served.ask(&admin, "GET", &format!("/v3/servers/{LAB}/os-usb-events"), "").text;
    assert!(audit.contains("owner-set") && audit.contains("owner-cleared"), "{audit}");
}

#[test]
fn tokens_count_until_they_do_not() {
    let served = Served::new("");
    let (first, second) =
        (served.token("first", OURS, "member"), served.token("second", OURS, "reader"));
    let status = |token: &str| served.ask(token, "GET", "/v3/os-hypervisors", "").status;
    assert_eq!((status(&first), status(&second)), (200, 200));
    ok(&served.host.virt_usb(&["token", "remove", "first"]));
    assert_eq!((status(&first), status(&second)), (401, 200));
    let file = served.host.path("state/tokens.toml");
    let text = std::fs::read_to_string(&file).unwrap();
    let expired = text.replace("role = ", "expires_at = \"2026-01-01T00:00:00Z\"\nrole = ");
    std::fs::write(&file, expired).unwrap();
    assert_eq!(status(&second), 401);
    std::fs::write(&file, "[[token]]\nname = 1\n").unwrap();
    let answer = served.ask(&second, "GET", "/v3/os-hypervisors", "");
    assert!(
        answer.status == 503
            && answer.fault("serviceUnavailable").contains("Tokens cannot be validated"),
        "{answer:?}"
    );
    assert!(served.log().contains("tokens.toml is wrong"), "{}", served.log());
    std::fs::remove_file(&file).unwrap();
    assert_eq!(status(&second), 401);
    std::fs::write(&file, text).unwrap();
    std::fs::set_permissions(&file, std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
    assert_eq!(status(&second), 200);
    let listed = ok(&served.host.virt_usb(&["token", "list"]));
    assert!(
        listed.contains("second") && listed.contains("reader") && !listed.contains(&second),
        "{listed}"
    );
}
