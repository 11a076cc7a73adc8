//! The tree and who may depend on whom: the rules of ARCHITECTURE.md.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

use std::collections::BTreeSet;
use std::process::Command;

use serde_json::Value;
use virt_usb_suite::root;

/// All packages that `package` is built with, itself not.
fn closure(package: &str) -> BTreeSet<String> {
    let output = Command::new(env!("CARGO"))
        .args([
            "tree",
            "--offline",
            "-p",
            package,
            "-e",
            "normal,build",
            "--prefix",
            "none",
            "--format",
            "{p}",
        ])
        .current_dir(root())
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8(output.stdout).unwrap();
    let names = text.lines().filter_map(|line| line.split_whitespace().next()).map(str::to_owned);
    names.filter(|name| name != package).collect()
}

fn direct(package: &str) -> BTreeSet<String> {
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--offline", "--no-deps", "--format-version", "1"])
        .current_dir(root())
        .output()
        .unwrap();
    let metadata: Value = serde_json::from_slice(&output.stdout).unwrap();
    let packages = metadata["packages"].as_array().unwrap();
    let found =
        packages.iter().find(|p| p["name"] == package).unwrap_or_else(|| panic!("no package {package}"));
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
    for (package, other) in [("virt-usb-domxml", "virt-usb-store"), ("virt-usb-store", "virt-usb-domxml")] {
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
    let ours: Vec<_> = all.iter().filter(|n| n.starts_with("virt-usb")).map(String::as_str).collect();
    assert_eq!(ours, ["virt-usb-domxml", "virt-usb-model", "virt-usb-store"]);
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
fn the_top_holds_the_folders_of_the_design_and_no_other() {
    let output = Command::new("git").args(["ls-files"]).current_dir(root()).output().unwrap();
    let files = String::from_utf8(output.stdout).unwrap();
    let folders: BTreeSet<&str> = files
        .lines()
        .filter_map(|f| f.split_once('/'))
        .map(|(top, _)| top)
        .filter(|top| !top.starts_with('.'))
        .collect();
    let design = BTreeSet::from(["hook", "filter-wasm", "host-runtime", "wit", "tests", "install", "debian"]);
    assert!(!folders.is_empty() && folders.is_subset(&design), "{folders:?}");
}

#[test]
fn every_folder_of_a_part_explains_itself() {
    for folder in [
        "hook",
        "host-runtime",
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
    use virt_usb_hook::config::Config;
    let text = std::fs::read_to_string(root().join("install/config.toml")).unwrap();
    assert_eq!(Config::parse(&text).unwrap(), Config::default());
    for key in
        ["state_dir", "sysfs_root", "usb_white_list_switch", "usb_passthrough_whitelist", "hold", "migration"]
    {
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
    assert_eq!((fleet.endpoints.len(), fleet.user.is_some(), fleet.identity.is_some()), (3, true, true));
    let numbers = |f: virt_usb_hook::config::Fleet| (f.prefix, f.lease, f.heartbeat, f.machine_id);
    assert_eq!(numbers(fleet), numbers(bare));
}
