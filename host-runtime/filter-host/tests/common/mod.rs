//! The built filter, and filters made from WebAssembly text.
#![allow(
    dead_code,
    clippy::unwrap_used,
    clippy::panic,
    reason = "shared by several tests; none uses all of it"
)]

use std::path::{Path, PathBuf};

use virt_usb_filter_host::{Filter, Fleet, Limits, Options, Question};
use wit_component::{ComponentEncoder, StringEncoding, embed_component_metadata};
use wit_parser::Resolve;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(2).unwrap().to_path_buf()
}

/// The component that `make filter` builds.
pub(crate) fn built() -> PathBuf {
    let path = root().join("target/release/virt-usb-filter.wasm");
    assert!(path.exists(), "{} is not built: run 'make filter'", path.display());
    path
}

/// The filter of this repository.
pub(crate) fn ours() -> Filter {
    Filter::load(built(), &Options::default()).unwrap()
}

/// The filter of `first-come.wat`, with instructions inserted at a mark.
pub(crate) fn made(mark: &str, instructions: &str) -> Vec<u8> {
    let text = include_str!("../first-come.wat");
    let mark = format!(";; @{mark}\n");
    assert!(text.contains(&mark), "no mark {mark}");
    component(&text.replace(&mark, &format!("{instructions}\n")), "filter")
}

/// Builds a component from WebAssembly text that follows the ABI of a world of `wit/`.
pub(crate) fn component(text: &str, world: &str) -> Vec<u8> {
    let mut resolve = Resolve::default();
    let (package, _) = resolve.push_path(root().join("wit")).unwrap();
    let world = resolve.select_world(&[package], Some(world)).unwrap();
    let mut module = wat::parse_str(text).unwrap();
    embed_component_metadata(&mut module, &resolve, world, StringEncoding::UTF8).unwrap();
    ComponentEncoder::default().module(&module).unwrap().encode().unwrap()
}

/// Writes the bytes to a file in a temporary directory.
pub(crate) fn file(bytes: &[u8]) -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("filter.wasm");
    std::fs::write(&path, bytes).unwrap();
    (dir, path)
}

/// Loads a filter with a fault at a mark, with small limits.
pub(crate) fn faulty(mark: &str, instructions: &str) -> Filter {
    let (_dir, path) = file(&made(mark, instructions));
    Filter::load(path, &Options { limits: small(), ..Options::default() }).unwrap()
}

/// Small limits that suffice for a correct filter on a busy machine.
pub(crate) fn small() -> Limits {
    Limits { memory: 8 << 20, epoch: std::time::Duration::from_millis(500) }
}

/// Creates a fleet of two hosts: alpha with two keys, one of them free, and beta without devices.
pub(crate) fn fleet() -> Fleet {
    let fleet = Fleet::new();
    let key = |id: u64, status: &str| {
        format!(
            r#"{{"id":{id},"compute_node_id":2,"address":"usb_1_{}","vendor_id":"0529","product_id":"0001",
                 "status":"{status}","port_path":"1-{}","serial_kind":"missing","class":"ff"}}"#,
            id % 100,
            id % 100
        )
    };
    let alpha = format!(
        r#"{{"version":1,"host":"alpha","compute_node_id":2,"revision":1,"devices":[{},{}]}}"#,
        key(1_000_001, "available"),
        key(1_000_002, "allocated")
    );
    fleet.put_text(&alpha, 5).unwrap();
    fleet
        .put_text(r#"{"version":1,"host":"beta","compute_node_id":3,"revision":1,"devices":[]}"#, 5)
        .unwrap();
    fleet
}

/// A question for `count` keys.
pub(crate) fn keys(count: u32) -> Question {
    let flavor = format!(
        r#"{{"usb_devices":[{{"vendor_id":"0529","product_id":"0001","count":{count}}}]}}"#
    );
    Question::new(flavor.parse().unwrap())
}

pub(crate) fn names(names: &[&str]) -> Vec<String> {
    names.iter().map(|name| (*name).to_owned()).collect()
}
