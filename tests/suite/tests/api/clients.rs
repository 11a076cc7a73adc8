//! Clients of the API: the command line, and the examples of the documentation.

use std::process::Command;

use serde_json::{Value, json};
use virt_usb_suite::{device, ok, program};

use crate::common::{ERP, OFF, OURS, RULES, Served, guest};

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
    assert!(ok(&there(&["untag", "3", "blue", "green"])).contains(": removed; it has no tags"));
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
    refused(&["attach", "absent", "1"], "knows no server \"absent\"");
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
    // Authorization is checked first, even if the call would change nothing.
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
