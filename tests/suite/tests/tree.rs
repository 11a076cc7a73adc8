//! The tree and its dependencies: the rules of ARCHITECTURE.md.
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

/// Output of `cargo tree`, one package per line.
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

/// Modules at the top of `virt-usb`, each with those that it may use. No two use each other, also
/// not through others: a module may only use modules below it in this list.
const LAYERS: [(&str, &[&str]); 15] = [
    ("main", &["cli"]),
    (
        "cli",
        &[
            "agent",
            "api",
            "client",
            "discovery",
            "doctor",
            "filter",
            "hypervisor",
            "inventory",
            "manual",
            "publish",
            "recover",
            "timeouts",
        ],
    ),
    ("manual", &["daemon"]),
    (
        "daemon",
        &["agent", "api", "discovery", "hypervisor", "inventory", "metrics", "publish", "timeouts"],
    ),
    ("doctor", &["agent", "api", "client", "hypervisor", "inventory", "timeouts"]),
    ("api", &["agent", "client", "hypervisor", "metrics", "publish", "timeouts"]),
    ("publish", &["discovery", "hypervisor", "inventory", "metrics", "timeouts"]),
    ("agent", &["discovery", "hypervisor", "inventory", "metrics", "timeouts"]),
    ("recover", &["discovery", "hypervisor", "inventory"]),
    ("metrics", &["hypervisor"]),
    ("inventory", &["discovery"]),
    ("filter", &[]),
    ("client", &[]),
    ("hypervisor", &[]),
    ("discovery", &[]),
];

/// The source files below a folder, each with its path from there and its text without tests.
fn sources(folder: &str) -> Vec<(String, String)> {
    let code = |text: String| {
        let text = text.split("#[cfg(test)]\nmod tests").next().unwrap();
        let lines = text.lines().filter(|line| !line.trim_start().starts_with("//"));
        lines.collect::<Vec<_>>().join("\n")
    };
    files(folder).into_iter().map(|(name, text)| (name, code(text))).collect()
}

/// The source files below a folder, each with its path from there and its text.
fn files(folder: &str) -> Vec<(String, String)> {
    let (base, mut found) = (root().join(folder), Vec::new());
    let mut folders = vec![base.clone()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let name = path.strip_prefix(&base).unwrap().to_str().unwrap();
                found.push((name.to_owned(), std::fs::read_to_string(&path).unwrap()));
            }
        }
    }
    assert!(!found.is_empty());
    found
}

/// The modules that a file names: `crate::name`, and the names in `crate::{...}`.
fn uses(text: &str) -> BTreeSet<String> {
    let word = |text: &str| -> String {
        text.chars().take_while(|c| c.is_ascii_lowercase() || *c == '_').collect()
    };
    let mut found = BTreeSet::new();
    for rest in text.split("crate::").skip(1) {
        match rest.strip_prefix('{') {
            None => found.insert(word(rest)),
            Some(list) => {
                let list = list.split("};").next().unwrap();
                let mut depth = 0;
                let top = list.split_inclusive(['{', '}', ',']).filter_map(|part| {
                    let is_top = depth == 0;
                    depth += i32::from(part.ends_with('{')) - i32::from(part.ends_with('}'));
                    is_top.then(|| word(part.trim_start()))
                });
                found.extend(top.collect::<Vec<_>>());
                true
            }
        };
    }
    found
}

#[test]
fn modules_of_virt_usb_use_only_those_below_them() {
    for (at, (module, may)) in LAYERS.iter().enumerate() {
        let below: Vec<_> = LAYERS[at + 1..].iter().map(|(name, _)| *name).collect();
        for other in may.iter().filter(|other| **other != "timeouts") {
            assert!(below.contains(other), "{module} may not use {other}, which is above it");
        }
    }
    let modules: BTreeSet<&str> = LAYERS.iter().map(|(name, _)| *name).collect();
    let mut seen = BTreeSet::new();
    for (name, text) in sources("host-runtime/src") {
        let module = name.split('/').next().unwrap().trim_end_matches(".rs").to_owned();
        let Some((_, may)) = LAYERS.iter().find(|(layer, _)| *layer == module) else {
            assert!(
                ["lib", "timeouts", "virt-usbd"].contains(&module.as_str()),
                "{name}: give the module a place in LAYERS"
            );
            continue;
        };
        seen.insert(module.clone());
        for other in uses(&text) {
            let is_module = modules.contains(other.as_str()) || other == "timeouts";
            assert!(
                !is_module || other == module || may.contains(&other.as_str()),
                "{name} uses crate::{other}, which LAYERS does not permit"
            );
        }
    }
    assert!(seen.len() + 1 >= LAYERS.len(), "{seen:?}");
}

#[test]
fn modules_of_hook_and_fleet_have_no_circle() {
    for folder in ["hook/src", "host-runtime/config/src", "host-runtime/fleet/src"] {
        let all = sources(folder);
        let module = |name: &str| -> String {
            name.split('/').next().unwrap().trim_end_matches(".rs").to_owned()
        };
        let mut edges: BTreeSet<(String, String)> = BTreeSet::new();
        for (name, text) in &all {
            let from = module(name);
            edges.extend(uses(text).into_iter().map(|to| (from.clone(), to)));
        }
        let names: BTreeSet<String> = all.iter().map(|(name, _)| module(name)).collect();
        edges.retain(|(from, to)| from != to && from != "lib" && names.contains(to));
        // Modules that use none of those that are left go, until none goes: what stays is a circle.
        loop {
            let before = edges.len();
            let using: BTreeSet<String> = edges.iter().map(|(from, _)| from.clone()).collect();
            edges.retain(|(_, to)| using.contains(to));
            if edges.len() == before {
                break;
            }
        }
        assert!(edges.is_empty(), "{folder}: these modules use each other: {edges:?}");
    }
}

#[test]
fn the_scheduler_links_neither_libvirt_nor_libusb() {
    let all = closure("virt-usb-fleet");
    for forbidden in ["virt", "virt-sys", "rusb", "libusb1-sys", "virt-usb", "virt-usb-hook"] {
        assert!(!all.contains(forbidden), "the scheduler is built with {forbidden}");
    }
    let linked = |program: &str| {
        let output = Command::new("ldd").arg(virt_usb_suite::program(program)).output().unwrap();
        assert!(output.status.success());
        String::from_utf8(output.stdout).unwrap()
    };
    let agent = linked("virt-usbd");
    for library in ["libvirt.so", "libusb-1.0.so"] {
        assert!(agent.contains(library), "ldd shows what a program is linked with: {agent}");
        assert!(!linked("virt-usb-scheduler").contains(library));
    }
}

#[test]
fn no_product_is_built_with_test_code() {
    for package in
        ["virt-usb", "virt-usb-fleet", "virt-usb-hook", "virt-usb-filter", "virt-usb-filter-host"]
    {
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
        "docs",
    ]);
    assert!(!folders.is_empty() && folders.is_subset(&design), "{folders:?}");
}

/// Root works in `state_dir` as its owner (`store::user`). The store sees to that itself; a file
/// beside it that is named elsewhere is used under the same guard, or is only looked at, or is
/// opened without following a link.
#[test]
fn files_in_the_state_are_used_as_their_owner() {
    let looks = [
        "host-runtime/config/src/host_env.rs",
        "host-runtime/config/src/lib.rs",
        "host-runtime/src/api/mod.rs",
        "host-runtime/src/cli/recover.rs",
        "host-runtime/src/doctor/agent.rs",
        "host-runtime/src/doctor/hook.rs",
        "host-runtime/src/doctor/mod.rs",
    ];
    let mut found = 0;
    for folder in
        ["hook/src", "host-runtime/config/src", "host-runtime/fleet/src", "host-runtime/src"]
    {
        for (name, text) in files(folder) {
            let name = format!("{folder}/{name}");
            if text.contains("state_dir.join(") {
                found += 1;
                let guarded = text.contains("User::of");
                assert!(
                    guarded || looks.contains(&name.as_str()),
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
        "host-runtime/fleet",
        "filter-wasm",
        "filter-wasm/core",
        "wit",
        "tests",
        "tests/docs",
        "tests/embedding",
        "tests/packages",
        "install",
        "docs",
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
