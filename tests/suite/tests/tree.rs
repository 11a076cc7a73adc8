//! The tree and who may depend on whom: the rules of ARCHITECTURE.md.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

use std::collections::BTreeSet;
use std::process::Command;

use serde_json::Value;
use virt_usb_suite::root;

/// What `cargo tree` prints, a package a line.
fn tree(arguments: &[&str]) -> String {
    let output = Command::new(env!("CARGO"))
        .args(["tree", "--offline", "--prefix", "none"])
        .args(arguments)
        .current_dir(root())
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// All packages that `package` is built with, itself not.
fn closure(package: &str) -> BTreeSet<String> {
    let text = tree(&["-p", package, "-e", "normal,build", "--format", "{p}"]);
    let names = text.lines().filter_map(|line| line.split_whitespace().next()).map(str::to_owned);
    names.filter(|name| name != package).collect()
}

/// The packages of the workspace, as `cargo metadata` describes them.
fn members() -> Vec<Value> {
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--offline", "--no-deps", "--format-version", "1"])
        .current_dir(root())
        .output()
        .unwrap();
    let mut metadata: Value = serde_json::from_slice(&output.stdout).unwrap();
    serde_json::from_value(metadata["packages"].take()).unwrap()
}

fn direct(package: &str) -> BTreeSet<String> {
    let packages = members();
    let found = packages
        .iter()
        .find(|p| p["name"] == package)
        .unwrap_or_else(|| panic!("no package {package}"));
    let normal = found["dependencies"].as_array().unwrap().iter().filter(|d| d["kind"].is_null());
    normal.map(|d| d["name"].as_str().unwrap().to_owned()).collect()
}

fn names(list: &[&str]) -> BTreeSet<String> {
    list.iter().map(|n| (*n).to_owned()).collect()
}

#[test]
fn the_model_needs_serde_alone() {
    assert_eq!(direct("virt-usb-model"), names(&["serde", "serde_json"]));
    let source = std::fs::read_to_string(root().join("host-runtime/model/src/lib.rs")).unwrap();
    assert!(source.contains("#![no_std]"));
}

#[test]
fn the_rules_of_the_filter_know_no_host() {
    assert_eq!(
        direct("virt-usb-filter-core"),
        names(&["hashbrown", "serde", "serde_json", "virt-usb-model"])
    );
    let source = std::fs::read_to_string(root().join("filter-wasm/core/src/lib.rs")).unwrap();
    assert!(source.contains("#![no_std]"));
    let ours = |package: &str| -> BTreeSet<String> {
        closure(package).into_iter().filter(|name| name.starts_with("virt-usb")).collect()
    };
    assert_eq!(ours("virt-usb-filter"), names(&["virt-usb-filter-core", "virt-usb-model"]));
    assert_eq!(
        ours("virt-usb-filter-host"),
        names(&["virt-usb-model"]),
        "the rules are its oracle in tests alone"
    );
}

#[test]
fn domxml_and_store_know_the_model_and_not_each_other() {
    for (package, other) in
        [("virt-usb-domxml", "virt-usb-store"), ("virt-usb-store", "virt-usb-domxml")]
    {
        let all = closure(package);
        assert!(all.contains("virt-usb-model"));
        for forbidden in [other, "virt-usb-hook", "virt-usb", "rusb", "virt", "wasmtime", "tokio"] {
            assert!(!all.contains(forbidden), "{package} is built with {forbidden}");
        }
    }
    assert!(!closure("virt-usb-domxml").contains("rusqlite"), "domxml does no IO");
}

#[test]
fn the_hook_stays_small() {
    let all = closure("virt-usb-hook");
    for forbidden in [
        "virt",
        "virt-sys",
        "rusb",
        "libusb1-sys",
        "wasmtime",
        "tokio",
        "async-std",
        "smol",
        "futures",
        "clap",
        "virt-usb",
    ] {
        assert!(!all.contains(forbidden), "the hook is built with {forbidden}");
    }
    let ours: Vec<_> =
        all.iter().filter(|n| n.starts_with("virt-usb")).map(String::as_str).collect();
    assert_eq!(ours, ["virt-usb-config", "virt-usb-domxml", "virt-usb-model", "virt-usb-store"]);
}

#[test]
fn no_product_is_built_with_test_code() {
    for package in ["virt-usb", "virt-usb-hook", "virt-usb-filter", "virt-usb-filter-host"] {
        let all = closure(package);
        for forbidden in ["virt-usb-harness", "virt-usb-suite", "virt-usb-bench", "proptest"] {
            assert!(!all.contains(forbidden), "{package} is built with {forbidden}");
        }
    }
}

#[test]
fn dependencies_are_compiled_once_for_programs_and_tests() {
    let features = |edges: &str, excluded: &[&str]| -> BTreeSet<String> {
        let text = tree(&[&["--workspace", "-e", edges, "--format", "{p} {f}"], excluded].concat());
        text.lines().map(|line| line.trim_end_matches(" (*)").trim_end().to_owned()).collect()
    };
    // As install/build builds them, and as the tests are built.
    let (programs, tests) =
        (features("normal", &["--exclude", "virt-usb-bench"]), features("normal,dev", &[]));
    let versions = |all: &BTreeSet<String>| -> BTreeSet<String> {
        all.iter()
            .map(|line| line.split_whitespace().take(2).collect::<Vec<_>>().join(" "))
            .collect()
    };
    let shared = versions(&programs);
    let twice: Vec<_> = tests
        .difference(&programs)
        .filter(|line| {
            shared.contains(&line.split_whitespace().take(2).collect::<Vec<_>>().join(" "))
        })
        .collect();
    assert!(
        twice.is_empty(),
        "tests want these with other features than programs: name the features in Cargo.toml: \
            {twice:#?}"
    );
    let manifest: toml::Table =
        std::fs::read_to_string(root().join("Cargo.toml")).unwrap().parse().unwrap();
    let checked: BTreeSet<String> =
        manifest["profile"]["bench"]["package"].as_table().unwrap().keys().cloned().collect();
    let all: BTreeSet<String> =
        members().iter().map(|p| p["name"].as_str().unwrap().to_owned()).collect();
    assert_eq!(
        checked, all,
        "profile.bench.package in Cargo.toml names every package of the workspace"
    );
}

#[test]
fn no_test_puts_another_program_in_place_of_the_one_that_is_shipped() {
    for package in members() {
        let kinds: BTreeSet<&str> = package["targets"]
            .as_array()
            .unwrap()
            .iter()
            .filter_map(|t| t["kind"][0].as_str())
            .collect();
        let both = kinds.contains("bin") && kinds.contains("test");
        assert!(
            !both,
            "{} has programs and a folder tests: its tests go to tests/suite",
            package["name"]
        );
    }
}

#[test]
fn the_top_holds_the_folders_of_the_design_and_no_other() {
    let output = Command::new("git").args(["ls-files"]).current_dir(root()).output().unwrap();
    let files = String::from_utf8(output.stdout).unwrap();
    let folders: BTreeSet<&str> = files
        .lines()
        .filter_map(|f| f.split_once('/'))
        .map(|(top, _)| top)
        .filter(|top| !top.starts_with('.'))
        .collect();
    let design = BTreeSet::from([
        "hook",
        "filter-wasm",
        "host-runtime",
        "wit",
        "tests",
        "install",
        "debian",
    ]);
    assert!(!folders.is_empty() && folders.is_subset(&design), "{folders:?}");
}

/// Root works in `state_dir` as its owner (`store::user`). The store sees to that itself; a file
/// beside it that is named elsewhere is used under the same guard, or is only looked at, or is
/// opened without following a link.
#[test]
fn who_names_a_file_in_the_state_uses_it_as_its_owner() {
    let looks = [
        "host-runtime/config/src/host_env.rs",
        "host-runtime/config/src/lib.rs",
        "host-runtime/src/api/mod.rs",
        "host-runtime/src/cli/recover.rs",
        "host-runtime/src/doctor/agent.rs",
        "host-runtime/src/doctor/hook.rs",
        "host-runtime/src/doctor/mod.rs",
    ];
    let mut folders: Vec<_> = ["hook/src", "host-runtime/config/src", "host-runtime/src"]
        .map(|folder| root().join(folder))
        .into();
    let mut found = 0;
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
                continue;
            }
            if path.extension().is_none_or(|extension| extension != "rs") {
                continue;
            }
            let text = std::fs::read_to_string(&path).unwrap();
            let name = path.strip_prefix(root()).unwrap().to_str().unwrap();
            if text.contains("state_dir.join(") {
                found += 1;
                let guarded = text.contains("User::of");
                assert!(
                    guarded || looks.contains(&name),
                    "{name} uses files in state_dir without store::user"
                );
            }
        }
    }
    assert!(found >= looks.len());
}

#[test]
fn every_folder_of_a_part_explains_itself() {
    for folder in [
        "hook",
        "host-runtime",
        "host-runtime/config",
        "host-runtime/model",
        "host-runtime/domxml",
        "host-runtime/store",
        "host-runtime/filter-host",
        "filter-wasm",
        "filter-wasm/core",
        "wit",
        "tests",
        "tests/embedding",
        "tests/packages",
        "install",
    ] {
        assert!(root().join(folder).join("README.md").exists(), "{folder}/README.md");
    }
}

#[test]
fn the_example_configuration_is_the_defaults() {
    use virt_usb_config::Config;
    let text = std::fs::read_to_string(root().join("install/config.toml")).unwrap();
    assert_eq!(Config::parse(&text).unwrap(), Config::default());
    for key in [
        "state_dir",
        "sysfs_root",
        "usb_white_list_switch",
        "usb_passthrough_whitelist",
        "hold",
        "migration",
    ] {
        assert!(text.contains(&format!("\n{key} = ")), "{key}");
    }
    // The example rule in the comment is one, too.
    let example: String = text
        .lines()
        .skip_while(|l| !l.starts_with("#   usb_passthrough_whitelist"))
        .take_while(|l| l.starts_with("#   "))
        .map(|l| l.trim_start_matches('#').to_owned() + "\n")
        .collect();
    assert_eq!(Config::parse(&example).unwrap().whitelist.rules.len(), 2);
    // So is the example fleet, whose numbers are the defaults.
    let fleet: String = text
        .lines()
        .skip_while(|l| *l != "#   [fleet]")
        .map(|l| l.trim_start_matches('#').to_owned() + "\n")
        .collect();
    let fleet = Config::parse(&fleet).unwrap().fleet.unwrap();
    let bare = Config::parse("[fleet]\nendpoints = ['http://a:1']").unwrap().fleet.unwrap();
    assert_eq!(
        (fleet.endpoints.len(), fleet.user.is_some(), fleet.identity.is_some()),
        (3, true, true)
    );
    let numbers = |f: virt_usb_config::Fleet| (f.prefix, f.lease, f.heartbeat, f.machine_id);
    assert_eq!(numbers(fleet), numbers(bare));
}
