//! The filter builds to the same bytes, wherever the source is: a filter that is pinned by its
//! digest can be verified by building it.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

use std::path::Path;
use std::process::Command;

use virt_usb_suite::{program, root};

#[test]
fn two_builds_give_the_same_bytes() {
    let elsewhere = tempfile::tempdir().unwrap();
    let tracked =
        Command::new("git").args(["ls-files", "-z"]).current_dir(root()).output().unwrap();
    assert!(tracked.status.success());
    for name in String::from_utf8(tracked.stdout).unwrap().split_terminator('\0') {
        let (from, to) = (root().join(name), elsewhere.path().join(name));
        std::fs::create_dir_all(to.parent().unwrap()).unwrap();
        // A file that is tracked and gone is no part of the source that was built.
        if from.exists() {
            std::fs::copy(from, to).unwrap();
        }
    }
    let built = Command::new(elsewhere.path().join("filter-wasm/build"))
        .env("VIRT_USB_FILTER_PACK", program("virt-usb-filter-pack"))
        .env_remove("CARGO_TARGET_DIR")
        .output()
        .unwrap();
    assert!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
    for name in ["virt-usb-filter.wasm", "virt-usb-filter-module.wasm"] {
        let read = |root: &Path| std::fs::read(root.join("target/release").join(name)).unwrap();
        let (here, there) = (read(&root()), read(elsewhere.path()));
        assert_eq!(here.len(), there.len(), "{name}");
        assert!(here == there, "{name} differs from build to build");
        for built_in in [&root(), elsewhere.path()] {
            // With the folder below: "/src" alone is in every program.
            for folder in ["filter-wasm", "host-runtime", "wit", "target"] {
                let path = built_in.join(folder);
                let path = path.as_os_str().as_encoded_bytes();
                let found = here.windows(path.len()).any(|part| part == path);
                assert!(
                    !found,
                    "{name} holds the path that it was built in: {}",
                    built_in.display()
                );
            }
        }
    }
}
