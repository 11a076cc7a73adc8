//! State of the host: the boot id, the uptime, and whether an agent is running.

use std::fs::{File, TryLockError};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::time::Duration;

use virt_usb_store::Context;

use crate::Config;

/// The boot id or the uptime cannot be read.
#[derive(Debug, thiserror::Error)]
#[error("cannot read {path}: {what}; without it no claim can be dated")]
pub struct BootError {
    path: String,
    what: String,
}

/// Returns the context of a write: the boot, the uptime, the `actor` (`hook prepare`), and the
/// grace period of pending claims.
///
/// # Errors
/// If `sys/kernel/random/boot_id` or `uptime` in procfs cannot be read.
pub fn context(config: &Config, actor: impl Into<String>) -> Result<Context, BootError> {
    let read = |name: &str| {
        let path = config.procfs_root.join(name);
        std::fs::read_to_string(&path)
            .map_err(|e| BootError { path: path.display().to_string(), what: e.to_string() })
    };
    let boot_id = read("sys/kernel/random/boot_id")?.trim().to_owned();
    // A wrong boot id would void all claims, because claims of another boot are void.
    if boot_id.parse::<virt_usb_model::InstanceId>().is_err() {
        let path = config.procfs_root.join("sys/kernel/random/boot_id").display().to_string();
        return Err(BootError { path, what: format!("{boot_id:?} is not a boot id") });
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

/// Name of the agent's lock file in `state_dir`.
pub const AGENT_LOCK: &str = "agent.lock";

/// State of the agent, which attaches devices to guests after they have started.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Agent {
    /// The agent is running.
    Alive,
    /// The agent is installed, but not running.
    Dead,
    /// No agent is installed. Only a caller that uses the printed XML gets the device.
    NotInstalled,
}

/// Returns the state of the agent, from the lock on `state_dir/agent.lock`.
pub fn agent(state_dir: &Path) -> Agent {
    // The directory belongs to another user: follow no links there, and do not block on a file that
    // is not a regular one.
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

/// Name of the agent's socket in `state_dir`, to which hooks and commands send notifications.
pub const HOOK_SOCKET: &str = "hook.sock";

/// Operation in a notification ([`tell_agent`]) of a command that may have changed the inventory.
pub const COMMAND: &str = "command";

/// Opens [`HOOK_SOCKET`] with `O_PATH`, so that `/proc/self/fd` addresses it. Links are not
/// followed: the owner of the directory could link the name to a socket that accepts root only.
///
/// # Errors
/// If there is no such socket.
pub fn hook_socket(state_dir: &Path) -> std::io::Result<File> {
    File::options()
        .read(true)
        .custom_flags(libc::O_PATH | libc::O_NOFOLLOW)
        .open(state_dir.join(HOOK_SOCKET))
}

/// Notifies the agent of a call, as in `prepare 1234 0`: the operation, its duration in
/// microseconds, its exit status. Does not block, and does nothing if no agent is running.
pub fn tell_agent(state_dir: &Path, op: &str, took: Duration, exit: u8) {
    let sent = hook_socket(state_dir).and_then(|address| {
        let socket = UnixDatagram::unbound()?;
        socket.set_nonblocking(true)?;
        let message = format!("{op} {} {exit}", took.as_micros());
        socket.send_to(message.as_bytes(), format!("/proc/self/fd/{}", address.as_raw_fd()))
    });
    drop(sent);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lock_shows_whether_the_agent_runs() {
        let state = tempfile::tempdir().unwrap();
        assert_eq!(agent(state.path()), Agent::NotInstalled);
        let lock = File::create(state.path().join("agent.lock")).unwrap();
        assert_eq!(agent(state.path()), Agent::Dead);
        lock.lock().unwrap();
        assert_eq!(agent(state.path()), Agent::Alive);
        // A link is not followed, and a pipe does not block.
        let file = state.path().join("agent.lock");
        std::fs::remove_file(&file).unwrap();
        std::os::unix::fs::symlink("/dev/zero", &file).unwrap();
        assert_eq!(agent(state.path()), Agent::NotInstalled);
        std::fs::remove_file(&file).unwrap();
        assert!(std::process::Command::new("mkfifo").arg(&file).status().unwrap().success());
        assert_eq!(agent(state.path()), Agent::NotInstalled);
    }

    #[test]
    fn a_notification_goes_to_the_socket_and_not_through_a_link() {
        let state = tempfile::tempdir().unwrap();
        let file = state.path().join(HOOK_SOCKET);
        let receive = |socket: &UnixDatagram| {
            socket.set_nonblocking(true).unwrap();
            let mut message = [0; 64];
            socket
                .recv(&mut message)
                .map(|length| String::from_utf8_lossy(&message[..length]).into_owned())
        };
        let agent = UnixDatagram::bind(&file).unwrap();
        tell_agent(state.path(), "prepare", Duration::from_micros(1234), 0);
        assert_eq!(receive(&agent).unwrap(), "prepare 1234 0");
        let other = state.path().join("other");
        std::fs::rename(&file, &other).unwrap();
        std::os::unix::fs::symlink(&other, &file).unwrap();
        tell_agent(state.path(), "prepare", Duration::ZERO, 0);
        assert!(receive(&agent).is_err());
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
