//! The files that `install/` places, in a temporary folder.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::process::{Command, Output};

use virt_usb_suite::{ok, program, root};

fn install(dest: &Path, arguments: &[&str]) -> Output {
    program("virt-usb-hook");
    Command::new(root().join("install/hook")).args(arguments).env("DESTDIR", dest).output().unwrap()
}

#[test]
fn installs_a_real_file_beside_other_hooks_and_removes_only_its_own() {
    let dest = tempfile::tempdir().unwrap();
    let hooks = dest.path().join("etc/libvirt/hooks/qemu.d");
    std::fs::create_dir_all(&hooks).unwrap();
    std::fs::write(hooks.join("10-other"), "#!/bin/sh\n").unwrap();
    std::fs::write(dest.path().join("etc/libvirt/hooks/qemu"), "#!/bin/sh\n").unwrap();

    let said = ok(&install(dest.path(), &[]));
    let hook = hooks.join("50-virt-usb");
    let meta = std::fs::symlink_metadata(&hook).unwrap();
    assert!(
        meta.is_file() && meta.permissions().mode() & 0o777 == 0o755,
        "a real file, for AppArmor"
    );
    assert!(said.contains("config.toml") && said.contains("virt-usb discover"), "{said}");
    let state = std::fs::metadata(dest.path().join("var/lib/virt-usb")).unwrap();
    assert_eq!(state.permissions().mode() & 0o7777, 0o750);
    assert!(!dest.path().join("var/lib/virt-usb/inventory.sqlite").exists());
    let version = Command::new(&hook).arg("--version").output().unwrap();
    assert!(ok(&version).starts_with("virt-usb-hook "));
    let listed: Vec<_> =
        std::fs::read_dir(&hooks).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(listed.len(), 2, "libvirt would call whatever else lies here: {listed:?}");
    let command =
        Command::new(dest.path().join("usr/bin/virt-usb")).arg("--version").output().unwrap();
    assert!(ok(&command).starts_with("virt-usb "));
    for filter in ["virt-usb-filter.wasm", "virt-usb-filter-module.wasm"] {
        assert!(dest.path().join("usr/lib/virt-usb").join(filter).exists(), "{filter}");
    }

    std::fs::write(dest.path().join("etc/virt-usb/config.toml"), "log = \"off\"\n").unwrap();
    assert!(
        ok(&install(dest.path(), &[])).contains("nothing has to be reloaded"),
        "again: an upgrade"
    );
    let kept = std::fs::read_to_string(dest.path().join("etc/virt-usb/config.toml")).unwrap();
    assert_eq!(kept, "log = \"off\"\n", "the operator's configuration stays");

    ok(&install(dest.path(), &["--remove"]));
    assert!(!dest.path().join("usr/bin/virt-usb").exists());
    assert!(!dest.path().join("usr/lib/virt-usb").exists());
    assert!(
        !hook.exists()
            && hooks.join("10-other").exists()
            && dest.path().join("etc/libvirt/hooks/qemu").exists()
    );
    assert!(dest.path().join("var/lib/virt-usb").exists(), "the data stays");
    assert!(ok(&install(dest.path(), &["--remove"])).contains("nothing to do"), "twice");
    assert!(!install(dest.path(), &["--purge"]).status.success());
}

#[test]
fn state_dir_is_made_where_the_configuration_says() {
    let dest = tempfile::tempdir().unwrap();
    std::fs::create_dir_all(dest.path().join("etc/virt-usb")).unwrap();
    std::fs::write(
        dest.path().join("etc/virt-usb/config.toml"),
        "# state_dir = \"/no\"\nstate_dir = \"/srv/usb\" # \"big disk\"\n",
    )
    .unwrap();
    ok(&install(dest.path(), &[]));
    assert!(dest.path().join("srv/usb").is_dir() && !dest.path().join("var/lib/virt-usb").exists());
}

/// Gives a folder to the user `nobody`, as the installation does. Returns the owners of the folder
/// and its contents afterwards.
fn give(state: &Path) -> Vec<u32> {
    let give = "config=/nonexistent; . \"$1\"; state_dir=$2; give_state_dir 65534:65534";
    let script = root().join("install/state-dir");
    ok(&Command::new("sh").args(["-ec", give, "sh"]).arg(script).arg(state).output().unwrap());
    let owner = |path: &Path| std::fs::symlink_metadata(path).unwrap().uid();
    let mut found = vec![owner(state)];
    found.extend(["file", "hints", "hints/one", "link"].map(|name| owner(&state.join(name))));
    found
}

#[test]
fn the_state_is_given_away_only_while_it_is_root_s_alone() {
    if !rustix::process::geteuid().is_root() {
        eprintln!(
            "the state is given away: not root: nothing can be given to another user, this is not \
                tested"
        );
        return;
    }
    let mode = |path: &Path, mode| {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
    };
    let place = tempfile::tempdir().unwrap();
    let (state, secret) = (place.path().join("state"), place.path().join("secret"));
    std::fs::create_dir_all(state.join("hints")).unwrap();
    for file in [&secret, &state.join("file"), &state.join("hints/one")] {
        std::fs::write(file, "").unwrap();
    }
    std::os::unix::fs::symlink(&secret, state.join("link")).unwrap();
    // Others may write to it: what is in it may be theirs.
    mode(&state, 0o777);
    assert_eq!(give(&state), [0; 5]);
    // Another's already: a link or a second name may stand anywhere.
    mode(&state, 0o750);
    std::os::unix::fs::chown(&state, Some(65534), Some(65534)).unwrap();
    assert_eq!(give(&state), [65534, 0, 0, 0, 0]);
    std::os::unix::fs::chown(&state, Some(0), Some(0)).unwrap();
    // Another user's folder, or one that others may write to, inside root's.
    std::os::unix::fs::chown(state.join("hints"), Some(65534), None).unwrap();
    assert_eq!(give(&state), [0, 0, 65534, 0, 0]);
    std::os::unix::fs::chown(state.join("hints"), Some(0), None).unwrap();
    mode(&state.join("hints"), 0o777);
    assert_eq!(give(&state), [0; 5]);
    mode(&state.join("hints"), 0o755);
    // A second name of a file elsewhere.
    std::fs::hard_link(&secret, state.join("hints/second")).unwrap();
    assert_eq!(give(&state), [0; 5]);
    std::fs::remove_file(state.join("hints/second")).unwrap();
    let link = place.path().join("link-to-state");
    std::os::unix::fs::symlink(&state, &link).unwrap();
    assert_eq!(give(&link), [0, 65534, 65534, 65534, 65534], "the link itself is root's");
    assert_eq!(std::fs::metadata(&state).unwrap().uid(), 65534);
    assert_eq!(std::fs::metadata(&secret).unwrap().uid(), 0);
}

#[test]
fn the_agent_comes_with_a_unit_that_lets_it_do_little() {
    let dest = tempfile::tempdir().unwrap();
    let agent = |arguments: &[&str]| {
        Command::new(root().join("install/agent"))
            .args(arguments)
            .env("DESTDIR", dest.path())
            .output()
            .unwrap()
    };
    ok(&agent(&[]));
    ok(&agent(&[]));
    let program = dest.path().join("usr/sbin/virt-usbd");
    assert_eq!(
        std::fs::read(&program).unwrap(),
        std::fs::read(virt_usb_suite::program("virt-usbd")).unwrap()
    );
    let unit =
        std::fs::read_to_string(dest.path().join("usr/lib/systemd/system/virt-usbd.service"))
            .unwrap();
    for line in [
        "User=virt-usb",
        "Before=libvirtd.service virtqemud.service",
        "Type=notify",
        "CapabilityBoundingSet=",
        "NoNewPrivileges=yes",
    ] {
        assert!(unit.lines().any(|l| l == line), "{line}");
    }
    ok(&agent(&["--remove"]));
    assert!(!program.exists());
    assert!(!agent(&["--purge"]).status.success());
}

/// The paths in `install/files`, for a package: without the files that a * stands for.
fn listed() -> Vec<String> {
    let list = std::fs::read_to_string(root().join("install/files")).unwrap();
    let lines = list.lines().filter(|line| !line.starts_with('#') && !line.is_empty());
    lines.map(|line| line.split_whitespace().nth(3).unwrap().to_owned()).collect()
}

fn files(below: &Path) -> Vec<std::path::PathBuf> {
    let entries = std::fs::read_dir(below).unwrap().map(|e| e.unwrap().path());
    entries.flat_map(|path| if path.is_dir() { files(&path) } else { vec![path] }).collect()
}

#[test]
fn make_install_places_the_list_and_nothing_else() {
    let dest = tempfile::tempdir().unwrap();
    let place = |arguments: &[&str]| {
        let mut command = Command::new(root().join("install/place"));
        command.args(arguments).env("DESTDIR", dest.path()).output().unwrap()
    };
    let make = Command::new("make")
        .arg("install")
        .arg(format!("DESTDIR={}", dest.path().display()))
        .current_dir(root())
        .output()
        .unwrap();
    ok(&make);
    for path in listed() {
        assert!(dest.path().join(path.trim_start_matches('/')).exists(), "{path}");
    }
    let places = listed();
    for file in files(dest.path()) {
        let path = format!("/{}", file.strip_prefix(dest.path()).unwrap().display());
        let named = |place: &String| {
            *place == path || (place.ends_with('/') && path.starts_with(place.as_str()))
        };
        assert!(places.iter().any(named), "{path} is not in install/files");
    }
    let hook = dest.path().join("usr/sbin/virt-usb-hook");
    assert_eq!(std::fs::metadata(hook).unwrap().permissions().mode() & 0o7777, 0o755);
    assert!(dest.path().join("usr/share/man/man1/virt-usb-claims.1").exists());
    assert!(
        !dest.path().join("etc/libvirt").exists() && !dest.path().join("var").exists(),
        "a package's affair"
    );

    ok(&place(&["--remove", "command", "hook", "config", "agent"]));
    assert_eq!(files(dest.path()), Vec::<std::path::PathBuf>::new());
    for wrong in [&["agents"][..], &["--remove"], &[]] {
        assert!(!place(wrong).status.success(), "{wrong:?}");
    }
}

/// A permission that libvirt does not know has no effect and causes no error: `make packages` asks
/// libvirt itself.
#[test]
fn polkits_rule_grants_what_the_agent_does() {
    let rule = std::fs::read_to_string(root().join("install/virt-usb.rules")).unwrap();
    let granted: Vec<&str> = rule
        .split('"')
        .filter(|word| word.starts_with("org.libvirt.") && word.len() > 12)
        .collect();
    let calls = [
        "connect.getattr",
        "connect.read",
        "connect.search-domains",
        "domain.getattr",
        "domain.read",
        "domain.write",
        "domain.stop",
    ];
    let wanted: Vec<String> = std::iter::once("org.libvirt.unix.manage".to_owned())
        .chain(calls.iter().map(|call| format!("org.libvirt.api.{call}")))
        .collect();
    assert_eq!(granted, wanted);
}
