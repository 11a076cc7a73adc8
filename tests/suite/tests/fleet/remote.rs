//! The API of one host, which shows the fleet and acts on guests of other hosts.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::process::Command;
use std::time::Duration;

use serde_json::{Value, json};
use virt_usb_suite::{Etcd, Host, until};

use crate::common::{ERP, agent, host, key, log, ok};

const CRM: &str = "99999999-2222-4333-8444-555555555555";
const LAB: &str = "77777777-2222-4333-8444-555555555555";
const OURS: &str = "3f0c7a5e9d2b4c1f8a6e5d4c3b2a1908";
const THEIRS: &str = "00000000000000000000000000000002";

/// A host with an API, and its guests.
fn served(
    etcd: &Etcd,
    name: &str,
    machine: char,
    devices: &str,
    guests: &[(&str, &str, &str)],
) -> Host {
    let host = host(etcd, name, machine, "");
    let config = std::fs::read_to_string(host.config_file()).unwrap();
    std::fs::write(host.config_file(), config.replace("api = \"off\"", "api = \"127.0.0.1:0\""))
        .unwrap();
    let guest = |(name, uuid, project): &(&str, &str, &str)| {
        format!("[[domain]]\nname = '{name}'\nuuid = '{uuid}'\nproject = '{project}'\n")
    };
    let guests: String = guests.iter().map(guest).collect();
    std::fs::write(host.path("sim.toml"), format!("{devices}{guests}")).unwrap();
    ok(&host.virt_usb(&["fleet", "join"]));
    host
}

/// Where the host's API is.
pub(crate) fn address(host: &Host) -> String {
    let log = log(host);
    let at = log.rsplit("the API is served at http://").next().and_then(|at| at.split('/').next());
    at.unwrap().to_owned()
}

/// A page of the host's portal for the owner of that token.
fn page(host: &Host, token: &str, path: &str) -> String {
    let (at, jar) = (address(host), host.path("cookies"));
    let curl = |arguments: &[&str]| {
        let mut command = Command::new("curl");
        command
            .args(["--silent", "--show-error", "--fail", "--cookie-jar"])
            .arg(&jar)
            .arg("--cookie")
            .arg(&jar);
        ok(&command.args(arguments).output().unwrap())
    };
    curl(&["--data-urlencode", &format!("token={token}"), &format!("http://{at}/portal/sign-in")]);
    curl(&[&format!("http://{at}{path}")])
}

/// Asks a host's API: with a token over the network, or else as root on its socket.
fn api(host: &Host, token: Option<&str>, method: &str, path: &str, body: &Value) -> (u16, Value) {
    let body = if body.is_null() { String::new() } else { body.to_string() };
    let token_line = token.map(|token| format!("X-Auth-Token: {token}\r\n")).unwrap_or_default();
    let request = format!(
        "{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{token_line}Content-Type: \
            application/json\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    );
    let mut text = String::new();
    if token.is_some() {
        let mut stream = std::net::TcpStream::connect(address(host)).unwrap();
        stream.write_all(request.as_bytes()).unwrap();
        stream.read_to_string(&mut text).unwrap();
    } else {
        let Ok(mut stream) = UnixStream::connect(host.path("state/api.sock")) else {
            return (0, Value::Null);
        };
        stream.write_all(request.as_bytes()).unwrap();
        stream.read_to_string(&mut text).unwrap();
    }
    let status = text.split(' ').nth(1).and_then(|code| code.parse().ok()).unwrap_or(0);
    let body = text.split_once("\r\n\r\n").map_or("", |(_, body)| body);
    (status, serde_json::from_str(body).unwrap_or_else(|_| Value::String(body.to_owned())))
}

fn act(host: &Host, token: Option<&str>, action: &str, server: &str, id: u64) -> (u16, Value) {
    let body = json!({ action: { "usb_devices_requests": [{ "id": id }] } });
    api(host, token, "POST", &format!("/v3/servers/{server}/action"), &body)
}

fn message(answer: &(u16, Value), status: u16) -> String {
    assert_eq!(answer.0, status, "{answer:?}");
    let fault = answer.1.as_object().and_then(|fault| fault.values().next()).unwrap();
    fault["message"].as_str().unwrap().to_owned()
}

pub(crate) fn token(host: &Host, name: &str, project: &str, role: &str) -> String {
    let made =
        host.virt_usb(&["--json", "token", "add", name, "--project", project, "--role", role]);
    let made: Value = serde_json::from_str(&ok(&made)).unwrap();
    made["token"].as_str().unwrap().to_owned()
}

#[test]
fn any_hosts_api_shows_the_fleet_and_acts_on_it() {
    let etcd = Etcd::new();
    let one = served(&etcd, "compute1", 'a', &key(1), &[("erp", ERP, OURS)]);
    let two = served(
        &etcd,
        "compute2",
        'b',
        &(key(2) + &key(3)),
        &[("crm", CRM, THEIRS), ("lab", LAB, OURS)],
    );
    let (_first, mut second) = (agent(&one), agent(&two));
    let get = |path: &str| api(&one, None, "GET", path, &Value::Null);
    let list = |path: &str, key: &str| get(path).1[key].as_array().cloned().unwrap_or_default();
    until("the fleet to be shown", || {
        (list("/v3/os-usb-devices", "usb_devices").len() == 3
            && list("/v3/servers", "servers").len() == 3)
            .then_some(())
    });
    let hosts = list("/v3/os-hypervisors", "hypervisors");
    let brief: Vec<_> = hosts
        .iter()
        .map(|h| (h["id"].as_u64(), h["hypervisor_hostname"].as_str(), h["state"].as_str()))
        .collect();
    assert_eq!(
        brief,
        [(Some(2), Some("compute1"), Some("up")), (Some(3), Some("compute2"), Some("up"))]
    );
    let (status, other) = get("/v3/os-hypervisors/compute2");
    assert_eq!(
        (status, other["hypervisor"]["usb_device_stats"].as_array().unwrap().len()),
        (200, 2)
    );
    let first = &other["hypervisor"]["usb_device_stats"][0];
    assert_eq!(
        (&first["id"], &first["hypervisor_hostname"]),
        (&json!(2_000_001), &json!("compute2"))
    );
    // The other host's guest, by that host's agent.
    let attached = act(&one, None, "attach_usb_devices", CRM, 2_000_001);
    assert_eq!(
        (attached.0, &attached.1["usb_devices"][0]["status"], &attached.1["live"]),
        (202, &json!("allocated"), &json!(true)),
        "{attached:?}"
    );
    assert!(
        two.claims().contains(&format!("device 2000001 crm {CRM} allocated")),
        "{}",
        two.claims()
    );
    until("it to be shown", || {
        let (_, server) = get(&format!("/v3/servers/{CRM}/os-usb-devices"));
        let server = &server["server"];
        (server["usb_devices"][0]["held_by"] == "crm"
            && server["usb_devices_requests"] == json!([{"id": 2_000_001}]))
        .then_some(())
    });
    // The portal too.
    let admin = token(&one, "admin", OURS, "admin");
    let devices = page(&one, &admin, "/portal/?q=compute2");
    for words in ["2 hosts: 3 devices", "<td>compute2</td>", "/portal/servers/"] {
        assert!(devices.contains(words), "{words}: {devices}");
    }
    assert!(!devices.contains("<td>compute1</td>"), "{devices}");
    let server = page(&one, &admin, &format!("/portal/servers/{CRM}"));
    for words in ["Host: compute2", "Assigned at each start", "{&quot;id&quot;:2000001}"] {
        assert!(server.contains(words), "{words}: {server}");
    }
    let taken = message(&act(&one, None, "attach_usb_devices", LAB, 2_000_001), 409);
    assert!(
        taken.contains(&format!("USB device 2000001 is held by instance {CRM} (crm)")),
        "{taken}"
    );
    let elsewhere = message(&act(&one, None, "attach_usb_devices", LAB, 1_000_001), 409);
    assert!(elsewhere.contains("No available USB device matches"), "{elsewhere}");
    // Who may what is asked on both sides.
    let (ours, theirs) =
        (token(&one, "ours", OURS, "member"), token(&one, "theirs", THEIRS, "member"));
    assert_eq!(act(&one, Some(&ours), "detach_usb_devices", CRM, 2_000_001).0, 404);
    let servers = api(&one, Some(&ours), "GET", "/v3/servers", &Value::Null).1;
    let names: Vec<&str> = servers["servers"]
        .as_array()
        .unwrap()
        .iter()
        .filter_map(|server| server["name"].as_str())
        .collect();
    assert_eq!(names, ["erp", "lab"]);
    assert_eq!(act(&one, Some(&theirs), "detach_usb_devices", CRM, 2_000_001).0, 202);
    assert_eq!(two.claims(), "");
    let audit = ok(&two.virt_usb(&["events"]));
    assert!(audit.contains("api theirs@compute1"), "{audit}");
    let device = api(
        &one,
        None,
        "POST",
        "/v3/os-usb-devices/2000001/action",
        &json!({"disable": {"reason": "x"}}),
    );
    assert!(message(&device, 409).contains("is on host compute2: use that host's API"));
    let owner = api(
        &one,
        None,
        "POST",
        &format!("/v3/servers/{LAB}/action"),
        &json!({"clear_usb_owner": null}),
    );
    assert!(message(&owner, 409).contains("is on host compute2: set its owner there"));
    // One that does not begin in time does not begin later.
    second.signal("-STOP");
    let late = act(&one, None, "attach_usb_devices", CRM, 2_000_002);
    let late = message(&late, 503);
    assert!(late.contains("did not begin in time") || late.contains("is unreachable"), "{late}");
    second.signal("-CONT");
    until("the host to be heard again", || {
        (get("/v3/os-hypervisors").1["hypervisors"][1]["state"] == "up").then_some(())
    });
    std::thread::sleep(Duration::from_secs(2));
    assert_eq!(two.claims(), "", "nothing was done afterwards");
    // A host that dies: what it has is shown, and not as free.
    second.0.kill().unwrap();
    second.0.wait().unwrap();
    let request = json!({
        "call": "attach", "server": CRM, "usb_devices_requests": [{"id": 2_000_001}],
        "caller": "root", "project_id": null, "role": "admin", "from": "compute1",
    });
    until("it to be unreachable", || {
        (get("/v3/os-hypervisors").1["hypervisors"][1]["state"] == "down").then_some(())
    });
    let devices = list("/v3/os-usb-devices", "usb_devices");
    assert_eq!(
        (&devices[1]["status"], &devices[1]["status_reason"]),
        (&json!("unavailable"), &json!("unreachable"))
    );
    let away = message(&act(&one, None, "attach_usb_devices", CRM, 2_000_001), 503);
    assert!(away.contains("Host compute2 is unreachable: nothing was done"), "{away}");
    // An agent that finds what one before it has begun does it no second time.
    etcd.put("/virt-usb/requests/compute2/r1", &request.to_string());
    etcd.put("/virt-usb/answers/compute2/r1", "\"begun\"");
    second = agent(&two);
    let answer = until("an answer", || {
        let answer: Value =
            serde_json::from_str(&etcd.get("/virt-usb/answers/compute2/r1")).ok()?;
        answer["done"]["status"].is_u64().then_some(answer)
    });
    let said = answer["done"]["body"]["message"].as_str().unwrap();
    assert!(answer["done"]["status"] == 503 && said.contains("The result is unknown"), "{answer}");
    assert!(said.contains("The state is: the server has no device"), "{said}");
    assert_eq!(two.claims(), "");
    drop(second);
}
