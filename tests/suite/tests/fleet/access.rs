//! Access to etcd: roles, passwords and certificates.

use std::io::Write;
use std::process::Command;

use virt_usb_suite::{Etcd, root, until};

use crate::common::{agent, host, key, ok, refused};

/// Runs the script that makes etcd's roles.
fn roles(etcd: &Etcd, password: &str, arguments: &[&str]) {
    let mut script = etcd
        .client(root().join("install/etcd-roles"), "300s")
        .args(arguments)
        .stdin(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    script.stdin.take().unwrap().write_all(format!("{password}\n").as_bytes()).unwrap();
    assert!(script.wait().unwrap().success(), "{arguments:?}");
}

#[test]
fn a_host_writes_its_own_document_and_nothing_else() {
    let etcd = Etcd::new();
    roles(&etcd, "", &["roles"]);
    roles(&etcd, "secret1", &["host", "compute1"]);
    roles(&etcd, "secret9", &["user", "joiner", "virt-usb-admin"]);
    roles(&etcd, "look", &["user", "scheduler", "virt-usb-reader"]);
    // Twice is once.
    roles(&etcd, "", &["roles"]);
    roles(&etcd, "secret1", &["host", "compute1"]);
    ok(&etcd.etcdctl(&["user", "add", "root:rootpw"]));
    ok(&etcd.etcdctl(&["user", "grant-role", "root", "root"]));
    ok(&etcd.etcdctl(&["auth", "enable"]));
    let password = |text: &str| {
        let file = etcd.path().join("password");
        std::fs::write(&file, format!("{text}\n")).unwrap();
        file
    };
    let own = password("secret1");
    let own =
        std::fs::rename(&own, etcd.path().join("own")).map(|()| etcd.path().join("own")).unwrap();
    let one = host(&etcd, "compute1", 'a', &format!("user = 'compute1'\npassword_file = {own:?}"));
    std::fs::write(one.path("sim.toml"), key(1)).unwrap();
    // The host's own user may not join it to the fleet; an administrator may.
    let why = refused(&one.virt_usb(&["fleet", "join"]));
    assert!(
        why.contains("etcd does not allow user \"compute1\" to join the fleet: /usr/share"),
        "{why}"
    );
    let admin = password("secret9");
    let wrong = refused(&one.virt_usb(&[
        "fleet",
        "join",
        "--user",
        "joiner",
        "--password-file",
        own.to_str().unwrap(),
    ]));
    assert!(wrong.contains("etcd rejects the credentials"), "{wrong}");
    ok(&one.virt_usb(&[
        "fleet",
        "join",
        "--user",
        "joiner",
        "--password-file",
        admin.to_str().unwrap(),
    ]));
    let _agent = agent(&one);
    let as_user = |user: &str, rest: &[&str]| etcd.etcdctl(&[&["--user", user], rest].concat());
    until("the document", || {
        let got =
            as_user("root:rootpw", &["get", "--print-value-only", "/virt-usb/hosts/compute1"]);
        ok(&got).contains("\"compute_node_id\":2").then_some(())
    });
    for key in [
        "hosts/compute2",
        "servers/compute2",
        "answers/compute2/1",
        "hosts/compute11",
        "requests/compute1/1",
        "flavors/erp",
        "grants/erp",
        "nodes/2",
        "machines/x",
        "next",
    ] {
        let denied = as_user("compute1:secret1", &["put", &format!("/virt-usb/{key}"), "x"]);
        let text = String::from_utf8_lossy(&denied.stderr).into_owned();
        assert!(!denied.status.success() && text.contains("permission denied"), "{key}: {text}");
    }
    assert!(
        as_user("compute1:secret1", &["put", "/virt-usb/hosts/compute1", "{}"]).status.success()
    );
    assert!(
        !as_user("scheduler:look", &["put", "/virt-usb/hosts/compute1", "{}"]).status.success()
    );
    assert!(as_user("scheduler:look", &["get", "--prefix", "/virt-usb/"]).status.success());
    // Without a user at all.
    let none = host(&etcd, "compute2", 'b', "");
    assert!(
        refused(&none.virt_usb(&["fleet", "status"]))
            .contains("etcd rejects the credentials: user name is empty")
    );
}

#[test]
fn etcd_is_spoken_to_with_certificates_on_both_sides() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).display().to_string();
    let script = "set -e; cd \"$0\"
        openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout ca.key -out \
        ca.crt -subj /CN=ca -days 2
        printf 'subjectAltName=IP:127.0.0.1\\nextendedKeyUsage=serverAuth,clientAuth\\n' > ext
        for who in etcd host; do
            openssl req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout $who.key -out \
            $who.csr -subj /CN=$who
            openssl x509 -req -in $who.csr -CA ca.crt -CAkey ca.key -CAcreateserial -out $who.crt \
            -days 2 -extfile ext
        done";
    let made = Command::new("bash").args(["-c", script]).arg(dir.path()).output().unwrap();
    ok(&made);
    let arguments: Vec<String> =
        [("--cert-file", "etcd.crt"), ("--key-file", "etcd.key"), ("--trusted-ca-file", "ca.crt")]
            .iter()
            .flat_map(|(name, file)| [(*name).to_owned(), path(file)])
            .chain(["--client-cert-auth".to_owned()])
            .collect();
    let etcd = Etcd::with(&arguments, "https");
    let whole = format!(
        "ca = {:?}\ncertificate = {:?}\nkey = {:?}",
        path("ca.crt"),
        path("host.crt"),
        path("host.key")
    );
    let one = host(&etcd, "compute1", 'a', &whole);
    assert!(ok(&one.virt_usb(&["fleet", "join"])).contains("with number 2"));
    let nobody = host(&etcd, "compute2", 'b', &format!("ca = {:?}", path("ca.crt")));
    let why = refused(&nobody.virt_usb(&["fleet", "join"]));
    assert!(why.contains("no etcd endpoint responds"), "{why}");
    let stranger = host(&etcd, "compute3", 'c', &whole.replace("ca.crt", "host.crt"));
    let why = refused(&stranger.virt_usb(&["fleet", "join"]));
    assert!(why.contains("no etcd endpoint responds"), "{why}");
    let lost = host(&etcd, "compute4", 'd', &format!("ca = {:?}", path("none.crt")));
    let why = refused(&lost.virt_usb(&["fleet", "join"]));
    assert!(why.contains("none.crt: No such file or directory"), "{why}");
}
