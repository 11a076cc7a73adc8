//! The API through real sockets, of a real agent; its devices and guests are simulated.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test's helpers fail the test"
)]

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::net::UnixStream;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use virt_usb_suite::{Host, PROGRAM_TIMEOUT, device, ok, program};

const ERP: &str = "11111111-2222-4333-8444-555555555555";
const CRM: &str = "99999999-2222-4333-8444-555555555555";
const OFF: &str = "77777777-2222-4333-8444-555555555555";
/// A domain that names no owner.
const LAB: &str = "33333333-2222-4333-8444-555555555555";
/// The project of the guests `erp` and `off`; `crm` is another's.
const OURS: &str = "3f0c7a5e9d2b4c1f8a6e5d4c3b2a1908";
const THEIRS: &str = "00000000000000000000000000000002";

/// The agent of a host, and where it answers.
struct Served {
    host: Host,
    child: Child,
    at: SocketAddr,
}

/// A response of the API.
#[derive(Debug)]
struct Answer {
    status: u16,
    headers: BTreeMap<String, String>,
    text: String,
}

impl Answer {
    fn json(&self) -> Value {
        serde_json::from_str(&self.text).unwrap_or_else(|e| panic!("{e}: {self:?}"))
    }

    /// The words of a fault, which must have this name.
    fn fault(&self, name: &str) -> String {
        let body = self.json();
        assert_eq!(body[name]["code"], self.status, "{self:?}");
        body[name]["message"].as_str().unwrap().to_owned()
    }
}

fn read(mut stream: impl Read) -> Answer {
    let mut bytes = Vec::new();
    // One that is cut off has said what it has.
    let _ = stream.read_to_end(&mut bytes);
    let text = String::from_utf8(bytes).unwrap();
    let (head, body) = text.split_once("\r\n\r\n").unwrap_or((&text, ""));
    let mut lines = head.lines();
    let status =
        lines.next().and_then(|line| line.split(' ').nth(1)).and_then(|code| code.parse().ok());
    let header = |line: &str| {
        let (name, value) = line.split_once(": ")?;
        Some((name.to_ascii_lowercase(), value.to_owned()))
    };
    Answer {
        status: status.unwrap_or(0),
        headers: lines.filter_map(header).collect(),
        text: body.to_owned(),
    }
}

fn guest(name: &str, uuid: &str, project: &str, more: &str) -> String {
    format!("[[domain]]\nname = '{name}'\nuuid = '{uuid}'\nproject = '{project}'\n{more}\n")
}

/// Four devices: 1 for all projects, 2 only for our project, 3 only for theirs, 4 for none.
const RULES: &str = r#"
usb_white_list_switch = "on"
usb_passthrough_whitelist = [
    { vendor = "0529", product = "0001" },
    { vendor = "0529", product = "0002", projects = ["3f0c7a5e9d2b4c1f8a6e5d4c3b2a1908"], tags = ["ours"] },
    { vendor = "0529", product = "0003", projects = ["00000000000000000000000000000002"] },
]
"#;

impl Served {
    fn new(keys: &str) -> Self {
        let devices: String = (1..=4)
            .map(|n| {
                device(&format!("000{n}"), &format!("1-{n}"), 4 + n, &format!("serial = 'S{n}'"))
            })
            .collect();
        let guests = guest("erp", ERP, OURS, "")
            + &guest("crm", CRM, THEIRS, "")
            + &guest("off", OFF, OURS, "running = false")
            + &format!("[[domain]]\nname = 'lab'\nuuid = '{LAB}'\n");
        Self::with("host1", keys, &devices, &guests)
    }

    /// A host of that name, with these devices and guests.
    fn with(name: &str, keys: &str, devices: &str, guests: &str) -> Self {
        let host = Host::new(&format!("api = \"127.0.0.1:0\"\n{keys}"));
        std::fs::write(host.path("proc/sys/kernel/hostname"), name).unwrap();
        std::fs::write(host.path("sim.toml"), format!("{devices}{guests}")).unwrap();
        let log = File::create(host.path("agent.log")).unwrap();
        let mut command = Command::new(program("virt-usbd"));
        command.arg("--config").arg(host.config_file()).arg("--sim").arg(host.path("sim.toml"));
        let child = command.stderr(log).spawn().unwrap();
        let mut served = Self { host, child, at: SocketAddr::from(([127, 0, 0, 1], 0)) };
        served.at = served.until("the API to be served", |served| {
            let log = served.log();
            let at = log
                .split("the API is served at ")
                .nth(1)?
                .split("://")
                .nth(1)?
                .split('/')
                .next()?;
            at.parse().ok()
        });
        served.until("the devices to be found, and the guests to run", |served| {
            served.log().contains(" ready").then_some(())
        });
        served
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.host.path("agent.log")).unwrap_or_default()
    }

    fn until<T>(&self, what: &str, mut look: impl FnMut(&Self) -> Option<T>) -> T {
        let deadline = Instant::now() + PROGRAM_TIMEOUT;
        loop {
            if let Some(found) = look(self) {
                return found;
            }
            assert!(Instant::now() < deadline, "waited in vain for {what}\n{}", self.log());
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    fn token(&self, name: &str, project: &str, role: &str) -> String {
        let made = self.host.virt_usb(&[
            "--json",
            "token",
            "add",
            name,
            "--project",
            project,
            "--role",
            role,
        ]);
        let made: Value = serde_json::from_str(&ok(&made)).unwrap();
        made["token"].as_str().unwrap().to_owned()
    }

    /// Bytes as they are, and what comes back until the other end closes.
    fn raw(&self, bytes: &[u8]) -> Answer {
        let mut stream = TcpStream::connect(self.at).unwrap();
        stream.set_read_timeout(Some(PROGRAM_TIMEOUT)).unwrap();
        // It may have heard enough before all was said.
        let _ = stream.write_all(bytes);
        read(stream)
    }

    fn ask(&self, token: &str, method: &str, path: &str, body: &str) -> Answer {
        self.raw(request(&format!("X-Auth-Token: {token}\r\n"), method, path, body).as_bytes())
    }

    fn local(&self, method: &str, path: &str, body: &str) -> Answer {
        let Ok(mut stream) = UnixStream::connect(self.host.path("state/api.sock")) else {
            return read(&b""[..]);
        };
        stream.write_all(request("", method, path, body).as_bytes()).unwrap();
        read(stream)
    }

    fn attach(&self, token: &str, server: &str, requests: &Value) -> Answer {
        let body = json!({ "attach_usb_devices": { "usb_devices_requests": requests } });
        self.ask(token, "POST", &format!("/v3/servers/{server}/action"), &body.to_string())
    }

    fn detach(&self, token: &str, server: &str, requests: &Value) -> Answer {
        let body = json!({ "detach_usb_devices": { "usb_devices_requests": requests } });
        self.ask(token, "POST", &format!("/v3/servers/{server}/action"), &body.to_string())
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

fn request(headers: &str, method: &str, path: &str, body: &str) -> String {
    let kind = if body.is_empty() { "" } else { "Content-Type: application/json\r\n" };
    format!(
        "{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: \
            close\r\n{headers}{kind}Content-Length: {}\r\n\r\n{body}",
        body.len()
    )
}

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
                .contains("has no such USB device")
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
fn who_may_what() {
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
    // Method, path, body: what comes of it for reader, member, admin, nobody. In this order: what
    // one has done the next one finds.
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
    // What another project holds is in use, and no more is said; in what is asked for by its kind
    // neither.
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
        why.contains("USB device 1 is in use") && !why.contains("crm") && !why.contains(CRM),
        "{why}"
    );
    let why = served.attach(member, ERP, &json!([{ "serial": "S3" }])).fault("conflictingRequest");
    assert_eq!(why, "No available USB device matches {\"serial\":\"S3\"}.");
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
fn who_has_no_token_learns_nothing_of_a_path_and_every_refusal_has_one_shape() {
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
fn a_device_has_so_many_tags_and_names_are_what_they_look_like() {
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
fn an_administrator_says_whose_a_server_is() {
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
        "nobody's is nobody's"
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
fn the_command_line_asks_an_api_as_it_asks_its_own_inventory() {
    let served = Served::new(RULES);
    let token = served.host.path("token");
    std::fs::write(&token, served.token("root", OURS, "admin") + "\n").unwrap();
    let url = format!("http://{}/", served.at);
    let there = |arguments: &[&str]| {
        let api = ["--url", &url, "--token-file", token.to_str().unwrap()];
        served.host.virt_usb(&[&api, arguments].concat())
    };
    served.until("the rules", |_| {
        ok(&there(&["devices"])).contains("unavailable (whitelist)").then_some(())
    });
    // What changes something says the same each time but the first.
    assert_eq!(
        ok(&there(&["attach", "erp", "0529:0001"])),
        "erp has device 1 (0529:0001 \"HASP copy protection dongle\", port 1-1) now\n"
    );
    assert_eq!(
        ok(&there(&["attach", "erp", "1"])),
        "erp has device 1 (0529:0001 \"HASP copy protection dongle\", port 1-1) already\n"
    );
    assert_eq!(
        ok(&there(&["attach", OFF, "0529:0002"])),
        format!(
            "{OFF} is not running: it gets {{\"vendor_id\":\"0529\",\"product_id\":\"0002\"}} at \
             its next start\n"
        )
    );
    assert!(
        ok(&there(&["disable", "2", "--reason", "lent"]))
            .contains("is disabled (lent); it is unavailable")
    );
    assert!(
        ok(&there(&["disable", "2", "--reason", "lent"])).contains("is already disabled (lent)")
    );
    assert!(ok(&there(&["tag", "3", "blue", "green"])).contains("is tagged blue, green"));
    assert!(
        ok(&there(&["flavor", "set", "erp/2 %", r#"{"usb_devices":[{"serial":"S1"}]}"#]))
            .starts_with("stored: ")
    );
    assert!(
        ok(&there(&["flavor", "set", "erp/2 %", r#"{"usb_devices":[{"serial":"S1"}]}"#]))
            .starts_with("unchanged: ")
    );
    let grant = r#"{"usb_devices":[{"serial":"none"}],"projects":["p1"]}"#;
    assert!(ok(&there(&["grant", "set", "erp/2 %", grant])).starts_with("stored: erp/2 % gives {"));
    assert!(ok(&there(&["grant", "set", "erp/2 %", grant])).starts_with("unchanged: "));
    assert_eq!(
        ok(&there(&["owner", "set", "lab", OURS])),
        format!("lab now belongs to project {OURS}\n")
    );
    // What is shown is the same, byte for byte.
    for shown in [
        &["devices"][..],
        &["devices", "--all"],
        &["hosts"],
        &["hosts", "--documents"],
        &["claims"],
        &["events", "--limit", "0"],
        &["events", "--device", "1"],
        &["events", "--instance", ERP, "--device", "1", "--limit", "2"],
        &["events", "--instance", ERP, "--limit", "1"],
        &["flavor", "list"],
        &["flavor", "show", "erp/2 %"],
        &["grant", "list"],
        &["grant", "show", "erp/2 %"],
        &["quarantine"],
        &["owner"],
        // Done already: it tells how it is, and changes nothing.
        &["disable", "2", "--reason", "lent"],
        &["enable", "1"],
        &["tag", "3", "blue"],
        &["quarantine", "clear", "3"],
    ] {
        for form in [&[][..], &["--json"]] {
            let arguments = [form, shown].concat();
            let (here, remote) = (served.host.virt_usb(&arguments), there(&arguments));
            assert_eq!(ok(&remote), ok(&here), "{arguments:?}");
        }
    }
    assert!(ok(&there(&["enable", "2"])).contains("is enabled; it is available"));
    assert!(ok(&there(&["untag", "3", "blue", "green"])).contains("is without tags"));
    assert_eq!(
        ok(&there(&["detach", "erp", "1"])),
        "device 1 (0529:0001 \"HASP copy protection dongle\", port 1-1) is free\n"
    );
    assert!(ok(&there(&["flavor", "remove", "erp/2 %"])).starts_with("removed: "));
    assert!(ok(&there(&["grant", "remove", "erp/2 %"])).starts_with("removed: "));
    assert!(
        ok(&there(&["owner", "clear", "lab"]))
            .starts_with("lab now has the owner that its domain names")
    );
    let refused = |arguments: &[&str], why: &str| {
        let output = there(arguments);
        let text = String::from_utf8(output.stderr).unwrap();
        assert!(
            !output.status.success() && text.contains(why) && text.lines().count() == 1,
            "{arguments:?}: {text}"
        );
    };
    refused(
        &["devices", "--url", "http://127.0.0.1:1"],
        "cannot reach the API at http://127.0.0.1:1: ",
    );
    refused(&["devices", "--url", "host:8790"], "wanted an address such as https://");
    refused(
        &["devices", "--url", "http://192.0.2.1:8790"],
        "without TLS, the token could be read on the network: wanted https://",
    );
    refused(&["devices", "--token-file", "/dev/null"], "holds no token");
    refused(&["devices", "--token-file", "/nowhere"], "cannot read the token in /nowhere: ");
    refused(&["devices", "--cacert", "/dev/null"], "no PEM certificate");
    refused(&["attach", "nobody", "1"], "knows no server \"nobody\"");
    refused(&["attach", "crm", "4"], "the API responded with 409: ");
    refused(
        &["attach", "erp", "99"],
        "the API responded with 404: USB device 99 could not be found.",
    );
    refused(&["enable", "99"], "there is no device 99");
    refused(&["flavor", "show", "none"], "no flavor named \"none\"");
    refused(&["grant", "remove", "none"], "no grant named \"none\"");
    refused(&["grant", "set", "@a", grant], "is not a valid name for a grant");
    refused(&["grant", "set", "a", "{}"], "the grant a is not stored");
    refused(&["doctor"], "this command works only on the host itself");
    std::fs::write(&token, served.token("ours", OURS, "member")).unwrap();
    let hosts = ok(&there(&["hosts", "--json"]));
    let hosts: Value = serde_json::from_str(&hosts).unwrap();
    assert_eq!(
        (&hosts[0]["host"], &hosts[0]["devices"]),
        (&json!("host1"), &json!(2)),
        "those that it may have"
    );
    refused(&["hosts", "--documents"], "host documents need an administrator's token");
    // Whatever is so already, or seems to be: who may not is told that he may not.
    for change in [&["enable", "1"][..], &["quarantine", "clear", "1"], &["untag", "1", "blue"]] {
        refused(change, "the API responded with 403: ");
    }
    let events = ok(&there(&["events", "--device", "2"]));
    assert!(
        events.contains("disabled") && !events.contains("lent") && !events.contains("root"),
        "{events}"
    );
    std::fs::write(&token, "vusb_forged").unwrap();
    refused(&["devices"], "the API responded with 401: ");
}

/// Examples of a document: a command and its output, in which `...` stands for anything. The lines
/// are indented by four.
fn examples(text: &str) -> Vec<(String, String)> {
    let mut found: Vec<(String, String)> = Vec::new();
    let mut goes_on = false;
    for line in text.lines() {
        let line = line.strip_prefix("    ").unwrap_or_default();
        match (line.strip_prefix("$ "), found.last_mut()) {
            (Some(command), _) => found.push((command.to_owned(), String::new())),
            (None, Some((command, _))) if goes_on => *command += &format!("\n{line}"),
            (None, Some((_, output))) if !line.is_empty() => *output += &format!("{line}\n"),
            _ => {}
        }
        goes_on = line.ends_with('\\');
    }
    found
}

/// Whether the text is what the pattern shows; how wide a gap is does not count.
fn is_like(text: &str, pattern: &str) -> bool {
    let narrow = |text: &str| text.split_whitespace().collect::<Vec<_>>().join(" ");
    let (text, pattern) = (narrow(text), narrow(pattern));
    let mut rest = text.as_str();
    for (n, part) in pattern.split("...").enumerate() {
        match rest.find(part) {
            Some(0) => rest = &rest[part.len()..],
            Some(at) if n > 0 => rest = &rest[at + part.len()..],
            _ => return false,
        }
    }
    pattern.ends_with("...") || rest.is_empty()
}

#[test]
fn the_examples_of_the_documents_work() {
    let served = Served::with(
        "compute1",
        "",
        &device("0001", "1-1.4", 5, "serial = 'HL-0001'\nproduct_name = 'HASP HL'"),
        &guest("erp", "6f3c9d7e-0b51-4a55-9a3e-0d3b8c1f2a01", OURS, ""),
    );
    let page = std::fs::read_to_string(virt_usb_suite::root().join("docs/src/api.md")).unwrap();
    let section = |heading: &str| {
        let text = page.split(&format!("\n## {heading}\n")).nth(1).unwrap();
        text.split("\n## ").next().unwrap()
    };
    let (member_examples, admin_examples) =
        (section("Use it with a token"), section("Administer with curl"));
    let member = served.token("anna", OURS, "member");
    let admin = served.token("root", OURS, "admin");
    std::fs::write(served.host.path("token"), &member).unwrap();
    for (text, token, least) in [(member_examples, &member, 9), (admin_examples, &admin, 11)] {
        let examples = examples(text);
        assert!(examples.len() >= least, "{examples:?}");
        let mut script = format!(
            "set -f\nsudo() {{ \"$@\"; }}\nvirt-usb() {{ {:?} --config {:?} \"$@\"; \
                }}\nTOKEN={token}\nAPI=http://127.0.0.1:8790/v2.1\n\
             curl() {{ if [ \"$2\" = HEADERS ]; then shift 2; set -- -s -H \"X-Auth-Token: \
             $TOKEN\" -H 'Content-Type: application/json' \"$@\"; fi; command curl \"$@\"; }}\n",
            program("virt-usb"),
            served.host.config_file()
        );
        for (command, _) in &examples {
            script += &format!("{command} 2>&1\necho; echo '<<<>>>'\n");
        }
        let script = script
            .replace("$H ", "HEADERS ")
            .replace("http://127.0.0.1:8790", &format!("http://{}", served.at))
            .replace("https://compute1.example:8790", &format!("http://{}", served.at))
            .replace("~/.virt-usb-token", served.host.path("token").to_str().unwrap())
            .replace(
                "/var/lib/virt-usb/api.sock",
                served.host.path("state/api.sock").to_str().unwrap(),
            );
        let ran = Command::new("bash").arg("-c").arg(&script).output().unwrap();
        let told = String::from_utf8(ran.stdout).unwrap();
        let outputs: Vec<&str> = told.split("<<<>>>\n").collect();
        assert_eq!(
            outputs.len(),
            examples.len() + 1,
            "{told}{}",
            String::from_utf8_lossy(&ran.stderr)
        );
        for ((command, wanted), output) in examples.iter().zip(outputs) {
            assert!(
                is_like(output.trim_end(), wanted),
                "{command}\nprinted\n{output}\nand is said to print\n{wanted}"
            );
        }
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

#[test]
fn what_is_wrong_is_said_and_the_next_one_is_served() {
    let served = Served::new("");
    let admin = served.token("root", OURS, "admin");
    let action = format!("/v3/servers/{ERP}/action");
    let post = |body: &str| served.ask(&admin, "POST", &action, body);
    for (body, why) in [
        ("{", "not JSON"),
        ("[]", "not a JSON object"),
        ("{}", "names no action"),
        (r#"{"reboot":null}"#, "Unknown action: reboot"),
        (r#"{"attach_usb_devices":null,"detach_usb_devices":null}"#, "more than one action"),
        (r#"{"attach_usb_devices":{"usb_devices_requests":[]}}"#, "is empty"),
        (r#"{"attach_usb_devices":{"usb_devices_requests":{}}}"#, "wants a list"),
        (r#"{"attach_usb_devices":{"devices":[]}}"#, "has the key \"devices\""),
        (
            r#"{"attach_usb_devices":{"usb_devices_requests":[{"id":-1}]}}"#,
            "usb_devices_requests[0].id",
        ),
        (r#"{"attach_usb_devices":{"usb_devices_requests":[{"colour":1}]}}"#, "colour"),
        (
            r#"{"detach_usb_devices":{"usb_devices_requests":[{"vendor_id":"0529","count":2}]}}"#,
            "omit count",
        ),
    ] {
        let answer = post(body);
        assert!(
            answer.status == 400 && answer.fault("badRequest").contains(why),
            "{body}: {answer:?}"
        );
    }
    let token = format!("X-Auth-Token: {admin}\r\n");
    let with = |headers: &str, body: &[u8], length: usize| {
        let head = format!(
            "POST {action} HTTP/1.1\r\nHost: x\r\nConnection: \
                close\r\n{token}{headers}Content-Length: {length}\r\n\r\n"
        );
        served.raw(&[head.as_bytes(), body].concat())
    };
    let json = "Content-Type: application/json\r\n";
    assert_eq!(with("Content-Type: text/plain\r\n", b"{}", 2).status, 415);
    assert!(with(json, b"{\"\xff\":1}", 7).fault("badRequest").contains("byte 2"));
    assert_eq!(with(json, &vec![b' '; 70_000], 70_000).status, 413);
    // Half a request must time out, and must not delay other clients.
    let half = std::thread::scope(|scope| {
        let half = scope.spawn(|| with(json, b"{", 100));
        assert_eq!(served.ask(&admin, "GET", "/v3/os-hypervisors", "").status, 200);
        half.join().unwrap()
    });
    assert_eq!(half.status, 408, "{half:?}");
    assert_eq!(served.raw(b"\x00\x01 / HTTP/1.1\r\n\r\n").status, 400);
    assert_eq!(
        served
            .raw(format!("GET / HTTP/1.1\r\nX: {}\r\n\r\n", "x".repeat(40_000)).as_bytes())
            .status,
        431
    );
    for path in [
        "/v3",
        "/v3/",
        "/v4/os-hypervisors",
        "/v3/../etc/passwd",
        "/v3/os-hypervisors/../../x",
        "/v3//os-hypervisors",
    ] {
        assert_eq!(served.ask(&admin, "GET", path, "").status, 404, "{path}");
    }
    for path in [
        "/v3/os-hypervisors/%2e%2e%2f%2e%2e%2fetc",
        "/v3/os-usb-devices/%00",
        "/v3/os-usb-flavors/%F0%9F%94%91",
    ] {
        assert_eq!(served.ask(&admin, "GET", path, "").status, 404, "{path}");
    }
    assert_eq!(served.ask(&admin, "GET", "/v3/os-usb-devices/%ff", "").status, 400);
    assert_eq!(
        served.ask(&admin, "DELETE", "/v3/os-hypervisors", "").fault("badMethod"),
        "This resource has no such method."
    );
    assert_eq!(
        served.ask("\u{1}", "GET", "/v3/os-hypervisors", "").status,
        400,
        "no header's text"
    );
    assert_eq!(
        served
            .raw(
                b"GET /v3/os-hypervisors HTTP/1.1\r\nHost: x\r\nConnection: \
        close\r\nX-Auth-Token: \xff\r\n\r\n"
            )
            .status,
        401
    );
    let twice = request(&format!("{token}{token}"), "GET", "/v3/os-hypervisors", "");
    assert_eq!(served.raw(twice.as_bytes()).status, 401, "two tokens");
    assert_eq!(
        served
            .raw(b"GET /v3/os-hypervisors HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            .status,
        401
    );
    assert!(served.host.claims().is_empty());
    assert_eq!(served.ask(&admin, "GET", "/v3/os-hypervisors", "").status, 200);
    assert!(!served.log().contains(&admin), "no token is in the log");
}

#[test]
fn more_connections_than_are_taken_are_turned_away() {
    let served = Served::new("");
    let admin = served.token("root", OURS, "admin");
    let mut idle: Vec<TcpStream> =
        (0..256).map(|_| TcpStream::connect(served.at).unwrap()).collect();
    served.until("the next to be turned away", |served| {
        let answer = served.ask(&admin, "GET", "/v3/os-hypervisors", "");
        (answer.status == 503).then(|| answer.fault("serviceUnavailable"))
    });
    assert_eq!(served.local("GET", "/v3/os-hypervisors", "").status, 200, "root is let in still");
    idle.truncate(200);
    served.until("the next to be served", |served| {
        (served.ask(&admin, "GET", "/v3/os-hypervisors", "").status == 200).then_some(())
    });
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

#[test]
fn who_asks_too_often_is_told_to_wait_and_nobody_else_is() {
    let served = Served::new("");
    let (loud, quiet) =
        (served.token("loud", OURS, "member"), served.token("quiet", OURS, "member"));
    let action = format!("/v3/servers/{ERP}/action");
    let too_often =
        |count, ask: &dyn Fn() -> Answer| (0..count).map(|_| ask()).find(|a| a.status == 429);
    let told = too_often(5000, &|| served.ask(&loud, "POST", &action, "{}")).unwrap();
    assert!(told.fault("overLimit").contains("Rate limit exceeded: try again in"), "{told:?}");
    assert!(told.headers["retry-after"].parse::<u64>().unwrap() >= 1);
    assert_eq!(served.ask(&loud, "GET", "/v3/os-usb-devices", "").status, 200, "reading goes on");
    assert_eq!(served.ask(&quiet, "POST", &action, "{}").status, 400);
    let guessed =
        too_often(5000, &|| served.ask("vusb_guess", "GET", "/v3/os-usb-devices", "")).unwrap();
    guessed.fault("overLimit");
    assert_eq!(
        served.ask(&quiet, "GET", "/v3/os-usb-devices", "").status,
        200,
        "who has a token is let in"
    );
}

/// Makes a certificate for 127.0.0.1, `api.crt`, and its key, `api.key`.
fn certify(folder: &std::path::Path) {
    let made = Command::new("openssl")
        .args([
            "req",
            "-x509",
            "-newkey",
            "ec",
            "-pkeyopt",
            "ec_paramgen_curve:prime256v1",
            "-nodes",
            "-days",
            "2",
        ])
        .args(["-subj", "/CN=virt-usb test", "-addext", "subjectAltName=IP:127.0.0.1"])
        .args(["-keyout", "api.key", "-out", "api.crt"])
        .current_dir(folder)
        .output()
        .unwrap_or_else(|e| panic!("no openssl ({e}): 'make test-deps' brings it"));
    assert!(made.status.success(), "{made:?}");
}

#[test]
fn tls_proves_whose_it_is_and_a_renewed_certificate_counts_at_once() {
    let folder = tempfile::tempdir().unwrap();
    certify(folder.path());
    let at = folder.path().display();
    let served =
        Served::new(&format!("api_certificate = \"{at}/api.crt\"\napi_key = \"{at}/api.key\""));
    let token = served.token("erp", OURS, "member");
    let ask = |trusted: &str| {
        let mut client = Command::new("openssl")
            .args([
                "s_client",
                "-quiet",
                "-verify_return_error",
                "-verify_ip",
                "127.0.0.1",
                "-CAfile",
                trusted,
            ])
            .args(["-connect", &served.at.to_string()])
            .current_dir(folder.path())
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::piped())
            .stderr(std::process::Stdio::null())
            .spawn()
            .unwrap();
        let text = request(&format!("X-Auth-Token: {token}\r\n"), "GET", "/v3/os-usb-devices", "");
        // It may have ended, for want of trust.
        let _ = client.stdin.as_mut().unwrap().write_all(text.as_bytes());
        let answer = read(client.stdout.take().unwrap());
        client.wait().unwrap();
        answer.status
    };
    assert_eq!(ask("api.crt"), 200);
    assert_eq!(
        served.ask(&token, "GET", "/v3/os-usb-devices", "").status,
        0,
        "nothing without TLS"
    );
    std::fs::copy(folder.path().join("api.crt"), folder.path().join("old.crt")).unwrap();
    certify(folder.path());
    assert_eq!((ask("old.crt"), ask("api.crt")), (0, 200), "the new one counts");
    std::fs::write(folder.path().join("api.key"), "no key").unwrap();
    assert_eq!(ask("api.crt"), 200, "what is wrong does not");
    assert!(served.log().contains("the API's certificate cannot be used"), "{}", served.log());
}

#[test]
fn it_leaves_no_socket_behind() {
    let mut served = Served::new("");
    let sent = Command::new("kill").arg(served.child.id().to_string()).status().unwrap();
    assert!(sent.success() && served.child.wait().unwrap().success());
    assert!(!served.host.path("state/api.sock").exists());
}

#[test]
fn it_ends_with_what_was_begun() {
    let mut served = Served::new("");
    let admin = served.token("root", OURS, "admin");
    // A connection that is kept open, and says nothing, does not keep it.
    let mut idle = TcpStream::connect(served.at).unwrap();
    idle.write_all(
        request(&format!("X-Auth-Token: {admin}\r\n"), "GET", "/v3/os-hypervisors", "")
            .replace("close", "keep-alive")
            .as_bytes(),
    )
    .unwrap();
    let mut byte = [0];
    idle.read_exact(&mut byte).unwrap();
    let sent = Command::new("kill").arg(served.child.id().to_string()).status().unwrap();
    assert!(sent.success());
    let ended = served.child.wait().unwrap();
    assert_eq!(ended.code(), Some(0), "{}", served.log());
    assert!(!served.host.path("state/api.sock").exists());
}
