//! Connections: malformed requests, limits, TLS, the socket, the end of the agent.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::process::Command;

use crate::common::{Answer, ERP, OURS, Served, read, request};

#[test]
fn invalid_requests_are_refused_and_the_next_one_is_served() {
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
fn a_caller_beyond_its_rate_limit_waits_and_no_other_does() {
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
fn tls_is_verified_and_a_renewed_certificate_is_used_at_once() {
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
