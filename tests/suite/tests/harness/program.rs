//! hook-harness as an operator runs it: scenarios, exit statuses, the story and the document.
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use super::common::{domain, folder, recorded, recorder, script};
use serde_json::Value;
use tempfile::TempDir;

/// A folder with a hook, two domains, and something that answers like `virt-usb`.
struct Bench {
    dir: TempDir,
}

impl Bench {
    fn new(more: &str) -> Self {
        let dir = folder();
        let at = |name: &str| dir.path().join(name);
        recorder(&at("hook"), &at("log"), more);
        fs::write(at("a.xml"), domain("a", "")).unwrap();
        fs::write(at("b.xml"), domain("b", "")).unwrap();
        let told = at("told");
        let body = format!(
            "echo \"$@\" >> {}\ncase \"$3\" in claims) echo \
                '[{{\"device_id\":5,\"domain\":\"erp\"}}]';; *) echo did \"$3\";; esac",
            told.display()
        );
        script(&at("virt-usb"), &body);
        Self { dir }
    }

    fn at(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn run(&self, args: &[&str]) -> Output {
        Command::new(virt_usb_suite::program("hook-harness"))
            .current_dir(self.dir.path())
            .args(["--hook", "hook", "--virt-usb", "virt-usb"])
            .args(args)
            .output()
            .unwrap()
    }

    fn json(&self, args: &[&str]) -> (Value, i32) {
        let output = self.run(&[&["--json"], args].concat());
        let document = serde_json::from_slice(&output.stdout).unwrap_or_else(|e| {
            panic!(
                "{e}: {} {}",
                String::from_utf8_lossy(&output.stdout),
                String::from_utf8_lossy(&output.stderr)
            )
        });
        (document, output.status.code().unwrap())
    }

    fn calls(&self) -> Vec<String> {
        recorded(&self.at("log"))
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn scenario(bench: &Bench, text: &str) -> String {
    let whole = format!("[domains]\na = 'a.xml'\nb = 'b.xml'\n{text}");
    fs::write(bench.at("s.toml"), whole).unwrap();
    "s.toml".to_owned()
}

const VETO_B: &str = "[ \"$1 $2\" != 'b prepare' ] || { echo 'a holds it' >&2; exit 1; }";

#[test]
fn exit_statuses() {
    let bench = Bench::new(VETO_B);
    let status = |args: &[&str]| bench.run(args).status.code().unwrap();
    assert_eq!(status(&["start", "a.xml"]), 0);
    assert_eq!(status(&["start", "b.xml"]), 1);
    assert_eq!(status(&["start", "b.xml", "--expect", "veto"]), 0);
    assert_eq!(status(&["start", "b.xml", "--expect", "veto", "--expect-stderr", "a holds"]), 0);
    assert_eq!(status(&["start", "b.xml", "--expect", "veto", "--expect-stderr", "other"]), 1);
    assert_eq!(status(&["start", "a.xml", "--expect", "veto"]), 1);
    assert_eq!(status(&["start"]), 2);
    assert_eq!(status(&["start", "none.xml"]), 2);
    assert_eq!(status(&["scenario", "none.toml"]), 2);
    assert_eq!(status(&["--hook", "/none", "start", "a.xml"]), 2, "given twice");
    fs::remove_file(bench.at("hook")).unwrap();
    assert_eq!(status(&["start", "a.xml"]), 3);
}

#[test]
fn the_document_has_every_call() {
    let bench = Bench::new("[ \"$2\" = prepare ] && cat; umask >&2; true");
    let (document, status) = bench.json(&["start", "a.xml", "--config", "c.toml"]);
    assert_eq!((status, document["verdict"].as_str()), (0, Some("as-expected")));
    let play = &document["plays"][0];
    assert_eq!((play["action"].as_str(), play["domain"].as_str()), (Some("start"), Some("a")));
    let call = &play["calls"][0];
    let config = bench.at("c.toml");
    let args: Vec<_> =
        call["args"].as_array().unwrap().iter().map(|v| v.as_str().unwrap()).collect();
    assert_eq!(args, ["--config", config.to_str().unwrap(), "a", "prepare", "begin", "-"]);
    assert_eq!(call["exit"], 0);
    assert!(call["duration_us"].as_u64().unwrap() > 0);
    assert_eq!(call["stdout"].as_str(), Some(domain("a", "").as_str()));
    assert_eq!(call["stderr"].as_str(), Some("0022\n"), "the mask of a daemon");
    assert_eq!(call["output"], "discarded");
    assert_eq!(play["claims_before"], play["claims_after"]);
    assert_eq!(play["claims_after"][0]["device_id"], 5);
}

#[test]
fn the_story() {
    let more = "[ \"$2\" = prepare ] && sed 's|<devices>|<devices><hostdev/>|'; true";
    let bench = Bench::new(more);
    let told = text(&bench.run(&["start", "a.xml", "--config", "c.toml"]).stdout);
    for line in [
        "start a (00000000-0000-4000-8000-00000000000a)",
        "  prepare begin -",
        "libvirt discards this",
        "      -  <devices></devices>",
        "      +  <devices><hostdev/></devices>",
        "  claims, before and after:",
        "      5          erp",
        "all as expected",
    ] {
        assert!(told.contains(line), "{line:?} is not in:\n{told}");
    }
    assert!(!told.contains('\x1b'), "no colour without a terminal");
    let coloured = text(&bench.run(&["start", "a.xml", "--color", "always"]).stdout);
    assert!(coloured.contains("\x1b[32m+  <devices><hostdev/></devices>\x1b[0m"), "{coloured}");
    assert!(coloured.contains("give --config FILE"), "{coloured}");
}

#[test]
fn a_call_with_anything_on_its_standard_input() {
    let bench = Bench::new("cat >/dev/null");
    fs::write(bench.at("odd"), "no xml").unwrap();
    assert_eq!(bench.run(&["call", "prepare", "odd"]).status.code(), Some(2));
    assert_eq!(
        bench.run(&["call", "release", "odd", "--name", "x", "--extra", "crashed"]).status.code(),
        Some(0)
    );
    assert_eq!(bench.run(&["call", "future", "a.xml"]).status.code(), Some(0));
    assert_eq!(bench.calls(), ["release crashed", "future -"]);
}

#[test]
fn a_scenario_from_end_to_end() {
    let bench = Bench::new(VETO_B);
    let steps = r#"
        [[steps]]
        do = "start"
        domain = "a"
        [[steps]]
        say = "the second taker"
        do = "start"
        domain = "b"
        expect = "veto"
        expect_stderr = "a holds it"
        [[steps]]
        do = "save"
        domain = "a"
        [[steps]]
        do = "restore"
        domain = "a"
        [[steps]]
        do = "restart-daemon"
        [[steps]]
        do = "call"
        domain = "a"
        op = "attach"
        [[steps]]
        do = "stop"
        domain = "a"
    "#;
    let file = scenario(&bench, steps);
    let (document, status) = bench.json(&["scenario", &file]);
    assert_eq!(status, 0, "{document:#}");
    let starts = ["prepare -", "start -", "started -"];
    let refused = ["prepare -", "stopped -", "release failed"];
    let back = ["stopped -", "release saved", "restore -", "prepare -", "start -", "started -"];
    let rest = ["reconnect -", "attach -", "stopped -", "release shutdown"];
    assert_eq!(bench.calls(), [&starts[..], &refused, &back, &rest].concat());
    assert_eq!(document["plays"].as_array().unwrap().len(), 7);
}

#[test]
fn a_step_that_cannot_be_is_not_as_expected() {
    let bench = Bench::new("");
    let file = scenario(
        &bench,
        "[[steps]]\ndo = 'stop'\ndomain = 'a'\n[[steps]]\ndo = 'start'\ndomain = 'a'",
    );
    let (document, status) = bench.json(&["scenario", &file]);
    assert_eq!(status, 1);
    assert_eq!(document["plays"][0]["problem"], "stop cannot be: the guest a does not run");
    assert_eq!(document["plays"][1]["problem"], Value::Null);
}

#[test]
fn devices_come_and_go_in_an_inventory_of_its_own() {
    let bench = Bench::new("");
    let file = scenario(
        &bench,
        "[[steps]]\ndo = 'discover'\nsim = 'in.toml'\n[[steps]]\ndo = 'start'\ndomain = \
            'a'\n[[steps]]\ndo = 'unplug'\nsim = 'out.toml'\n[[steps]]\ndo = 'virt-usb'\nargs = \
            ['events']\nexpect_stdout = 'did events'",
    );
    let output = bench.run(&["scenario", &file]);
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stdout));
    let told = fs::read_to_string(bench.at("told")).unwrap();
    let mut lines = told.lines();
    let first: Vec<_> = lines.next().unwrap().split(' ').collect();
    let [_, config, "discover", "--sim", sim, "--sysfs-out", sysfs] = first[..] else {
        panic!("{first:?}")
    };
    assert_eq!(Path::new(sim).file_name().unwrap(), "in.toml");
    assert_eq!(Path::new(sysfs).parent(), Path::new(config).parent());
    assert!(!Path::new(config).exists(), "the scratch folder is gone");
    assert!(told.contains("out.toml"));
    assert!(told.lines().last().unwrap().ends_with(" events"));
}

#[test]
fn a_scenario_says_what_is_wrong_with_it() {
    let bench = Bench::new("");
    let wrong = |steps: &str| {
        let output = bench.run(&["scenario", &scenario(&bench, steps)]);
        assert_eq!(output.status.code(), Some(2));
        text(&output.stderr)
    };
    let has = |steps: &str, what: &str| {
        let error = wrong(steps);
        assert!(error.contains(what), "{what:?} is not in {error}");
    };
    has("[[steps]]\ndo = 'fly'", "step 1: do = \"fly\" is not known; there are: start, stop,");
    has("[[steps]]\ndo = 'start'", "step 1: do = \"start\" needs domain");
    has("[[steps]]\ndo = 'start'\ndomain = 'c'", "no domain \"c\" in [domains]; there are: a, b");
    has(
        "[[steps]]\ndo = 'start'\ndomain = 'a'\n[[steps]]\ndo = 'plug'",
        "step 2: do = \"plug\" needs sim",
    );
    has(
        "[[steps]]\ndo = 'start'\ndomain = 'a'\nsim = 'x'",
        "sim has no meaning for do = \"start\"",
    );
    has("[[steps]]\ndo = 'start'\ndomein = 'a'", "unknown field `domein`");
    has("[[steps]]\ndo = 'call'\ndomain = 'a'", "needs op");
    has("[[steps]]\ndo = 'virt-usb'", "needs args");
    has("[[steps]]\ndo = 'start'\ndomain = 'a'\nexpect = 'maybe'", "unknown variant `maybe`");
    has("c = 'none.xml'", "cannot read the domain");
    has("steps", "the scenario s.toml is wrong");
}

#[test]
fn a_flavor_is_tried_and_nothing_stays() {
    let bench = Bench::new("cat > /dev/null");
    let before = fs::read(bench.at("a.xml")).unwrap();
    let flavor = r#"{"usb_devices":[{"id":5}]}"#;
    let (document, status) = bench.json(&["try", "a.xml", "--flavor", flavor, "--sim", "in.toml"]);
    assert_eq!(status, 0, "{document:#}");
    let actions: Vec<_> = document["plays"]
        .as_array()
        .unwrap()
        .iter()
        .map(|play| play["action"].as_str().unwrap())
        .collect();
    assert_eq!(actions, ["discover", "start", "stop"]);
    let config = document["plays"][1]["calls"][0]["args"][1].as_str().unwrap();
    assert!(!Path::new(config).parent().unwrap().exists());
    assert_eq!(fs::read(bench.at("a.xml")).unwrap(), before);
    let told = fs::read_to_string(bench.at("told")).unwrap();
    assert!(told.contains("--sysfs-out"), "{told}");
}

#[test]
fn an_error_is_reported_once() {
    let bench = Bench::new(VETO_B);
    let output = bench.run(&["try", "nosuch.xml"]);
    assert_eq!(
        text(&output.stderr),
        "hook-harness: cannot read the domain nosuch.xml: No such file or directory (os error 2)\n"
    );
    let output = bench.run(&["scenario", "nosuch.toml"]);
    assert_eq!(text(&output.stderr).matches("os error 2").count(), 1);
    let told = text(&bench.run(&["start", "b.xml"]).stdout);
    assert_eq!(told.matches("a holds it").count(), 1, "{told}");
    assert!(told.contains("not as expected: prepare was refused, as shown above"), "{told}");
}

#[test]
fn a_trial_without_devices_or_flavor_does_not_start() {
    let bench = Bench::new("cat > /dev/null");
    for (flavor, found) in [("x", "found \"x\", which is no JSON"), ("[]", "found []")] {
        let output = bench.run(&["try", "a.xml", "--flavor", flavor]);
        let said = text(&output.stderr);
        assert_eq!(output.status.code(), Some(2));
        assert!(said.contains(&format!("--flavor: {found}, wanted a JSON object")), "{said}");
    }
    script(
        &bench.at("virt-usb"),
        "case \"$3\" in discover) echo 'no such file' >&2; exit 1;; esac",
    );
    let (document, status) = bench.json(&["try", "a.xml", "--sim", "nosuch.toml"]);
    assert_eq!((status, document["plays"].as_array().unwrap().len()), (1, 1), "{document:#}");
    assert!(bench.calls().is_empty(), "no hook is called");
    let told = text(&bench.run(&["try", "a.xml", "--sim", "nosuch.toml"]).stdout);
    assert_eq!(told.matches("no such file").count(), 1, "{told}");
}

#[test]
fn installed_hooks_are_kept_away_from_a_trial() {
    let bench = Bench::new("");
    let file = scenario(&bench, "[[steps]]\ndo = 'discover'");
    for args in [["try", "a.xml"], ["scenario", &file]] {
        let output = bench.run(&[&args[..], &["--hooks-dir", "."]].concat());
        assert_eq!(output.status.code(), Some(2));
        assert!(text(&output.stderr).contains("work on the installed inventory"));
    }
    assert!(bench.calls().is_empty());
}

#[test]
fn a_stored_flavor_is_looked_up() {
    let bench = Bench::new("[ \"$2\" != prepare ] || { cat >&2; exit 1; }");
    let body = "case \"$3 $4 $5\" in 'flavor show erp') echo \
        '{\"name\":\"erp\",\"spec\":{\"usb_devices\":[{\"id\":7}]}}';; claims*) echo '[]';; esac";
    script(&bench.at("virt-usb"), body);
    let (document, status) = bench.json(&[
        "try",
        "a.xml",
        "--flavor-name",
        "erp",
        "--expect",
        "veto",
        "--config",
        "c.toml",
    ]);
    assert_eq!(status, 0, "{document:#}");
    let fed = document["plays"][1]["calls"][0]["stderr"].as_str().unwrap();
    assert!(
        fed.contains(
            "<virt-usb:flavor \
                xmlns:virt-usb=\"urn:virt-usb:flavor:1\">{\"usb_devices\":[{\"id\":7}]}<"
        ),
        "{fed}"
    );
}

#[test]
fn a_hang_is_reported_whatever_was_expected() {
    let bench = Bench::new("[ \"$2\" != prepare ] || sleep 600 & true");
    let (document, status) = bench.json(&["start", "a.xml", "--expect", "veto", "--timeout", "10"]);
    assert_eq!(status, 1);
    let problem = document["plays"][0]["problem"].as_str().unwrap();
    assert!(problem.contains("libvirt would hang here"), "{problem}");
}

#[test]
fn the_example_is_a_scenario() {
    let file = virt_usb_suite::root().join("tests/harness/examples/two-guests.toml");
    let scenario = virt_usb_harness::Scenario::load(&file).unwrap();
    assert!(scenario.needs_product() && scenario.is_simulated());
    assert_eq!(scenario.domains.len(), 2);
}
