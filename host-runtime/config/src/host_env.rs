//! The machine: which boot this is, how long it lasts, whether an agent lives.

use std::fs::{File, TryLockError};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::time::Duration;

use virt_usb_store::Context;

use crate::Config;

/// The machine cannot say which boot this is.
#[derive(Debug, thiserror::Error)]
#[error("cannot read {path}: {what}; without it no claim can be dated")]
pub struct BootError {
    path: String,
    what: String,
}

/// The context of a write: this boot, this moment, `actor` (`hook prepare`), and what the
/// configuration says of pending claims.
///
/// # Errors
/// When procfs does not hold `sys/kernel/random/boot_id` and `uptime`.
pub fn context(config: &Config, actor: impl Into<String>) -> Result<Context, BootError> {
    let read = |name: &str| {
        let path = config.procfs_root.join(name);
        std::fs::read_to_string(&path)
            .map_err(|e| BootError { path: path.display().to_string(), what: e.to_string() })
    };
    let boot_id = read("sys/kernel/random/boot_id")?.trim().to_owned();
    // Claims of another boot are void: what is no boot id must not void them.
    if boot_id.parse::<virt_usb_model::InstanceId>().is_err() {
        let path = config.procfs_root.join("sys/kernel/random/boot_id").display().to_string();
        return Err(BootError { path, what: format!("{boot_id:?} is no boot id") });
    }
    let uptime = read("uptime")?;
    let uptime =
        uptime.split_whitespace().next().and_then(|t| t.parse().ok()).ok_or_else(|| BootError {
            path: config.procfs_root.join("uptime").display().to_string(),
            what: format!("{:?} does not begin with seconds since boot", uptime.trim()),
        })?;
    Ok(Context {
        boot_id,
        uptime,
        pending_grace: config.pending_grace.as_secs_f64(),
        actor: actor.into(),
    })
}

/// The agent's lock, in `state_dir`.
pub const AGENT_LOCK: &str = "agent.lock";

/// Whether somebody attaches devices to guests that are started by others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Agent {
    /// It holds its lock.
    Alive,
    /// It is installed, but does not run.
    Dead,
    /// There is none: only a caller that uses the printed XML gets the device.
    NotInstalled,
}

/// Asks the kernel, by the lock on `state_dir/agent.lock`.
pub fn agent(state_dir: &Path) -> Agent {
    // The folder belongs to another user: no link is followed there, and nothing that is not a file
    // is waited for.
    let careful = File::options()
        .read(true)
        .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
        .open(state_dir.join(AGENT_LOCK));
    match careful.and_then(|file| Ok((file.metadata()?.is_file(), file))) {
        Err(_) | Ok((false, _)) => Agent::NotInstalled,
        Ok((true, file)) => match file.try_lock_shared() {
            Err(TryLockError::WouldBlock) => Agent::Alive,
            _ => Agent::Dead,
        },
    }
}

/// The agent's ear, in `state_dir`: hooks tell it what they did.
pub const HOOK_SOCKET: &str = "hook.sock";

/// What [`tell_agent`] calls a command of `virt-usb` that may have changed the inventory.
pub const COMMAND: &str = "command";

/// Opens [`HOOK_SOCKET`] as a place, which `/proc/self/fd` addresses. The name may be a link of the
/// folder's owner to a socket that listens to root alone: no link is followed.
///
/// # Errors
/// If there is no such socket.
pub fn hook_socket(state_dir: &Path) -> std::io::Result<File> {
    File::options()
        .read(true)
        .custom_flags(libc::O_PATH | libc::O_NOFOLLOW)
        .open(state_dir.join(HOOK_SOCKET))
}

/// Tells the agent of a call: `prepare 1234 0` is the operation, its microseconds, its exit status.
/// Nobody waits, and nobody minds if there is no agent.
pub fn tell_agent(state_dir: &Path, op: &str, took: Duration, exit: u8) {
    let told = hook_socket(state_dir).and_then(|place| {
        let socket = UnixDatagram::unbound()?;
        socket.set_nonblocking(true)?;
        let told = format!("{op} {} {exit}", took.as_micros());
        socket.send_to(told.as_bytes(), format!("/proc/self/fd/{}", place.as_raw_fd()))
    });
    drop(told);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lock_tells_whether_the_agent_lives() {
        let state = tempfile::tempdir().unwrap();
        assert_eq!(agent(state.path()), Agent::NotInstalled);
        let lock = File::create(state.path().join("agent.lock")).unwrap();
        assert_eq!(agent(state.path()), Agent::Dead);
        lock.lock().unwrap();
        assert_eq!(agent(state.path()), Agent::Alive);
        // What its owner might put there instead is neither followed nor waited for.
        let file = state.path().join("agent.lock");
        std::fs::remove_file(&file).unwrap();
        std::os::unix::fs::symlink("/dev/zero", &file).unwrap();
        assert_eq!(agent(state.path()), Agent::NotInstalled);
        std::fs::remove_file(&file).unwrap();
        assert!(std::process::Command::new("mkfifo").arg(&file).status().unwrap().success());
        assert_eq!(agent(state.path()), Agent::NotInstalled);
    }

    #[test]
    fn the_agent_is_told_at_its_socket_and_nobody_at_a_link() {
        let state = tempfile::tempdir().unwrap();
        let file = state.path().join(HOOK_SOCKET);
        let hear = |socket: &UnixDatagram| {
            socket.set_nonblocking(true).unwrap();
            let mut told = [0; 64];
            socket
                .recv(&mut told)
                .map(|length| String::from_utf8_lossy(&told[..length]).into_owned())
        };
        let agent = UnixDatagram::bind(&file).unwrap();
        tell_agent(state.path(), "prepare", Duration::from_micros(1234), 0);
        assert_eq!(hear(&agent).unwrap(), "prepare 1234 0");
        let other = state.path().join("other");
        std::fs::rename(&file, &other).unwrap();
        std::os::unix::fs::symlink(&other, &file).unwrap();
        tell_agent(state.path(), "prepare", Duration::ZERO, 0);
        assert!(hear(&agent).is_err());
    }

    #[test]
    fn this_boot_has_an_id() {
        let context = context(&Config::default(), "test").unwrap();
        assert_eq!(context.boot_id.len(), 36);
        assert!(context.uptime > 0.0);
        assert!(
            super::context(&Config { procfs_root: "/nowhere".into(), ..Config::default() }, "test")
                .unwrap_err()
                .to_string()
                .contains("/nowhere/sys/kernel/random/boot_id")
        );
    }
}
