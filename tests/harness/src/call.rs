//! One call of one hook, as libvirtd makes it.
//!
//! This is `virRunScript` (src/util/virhook.c) and below it `virCommandRun`
//! (src/util/vircommand.c):
//!
//! ```text
//! spawn ─► poll: feed stdin, read stdout and stderr ─► all three closed? ─► wait ─► exit status 0?
//!            │                                            ▲
//!            └── EPIPE on stdin: close it, go on ─────────┘      (virCommandProcessIO)
//! ```
//!
//! libvirt reads both pipes until they close, not until the hook ends, and it has no deadline. The
//! harness has one.

use std::ffi::OsString;
use std::fmt;
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::PathBuf;
use std::process::{Child, ChildStderr, ChildStdin, ChildStdout, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, kill_process_group, waitid};

use crate::surroundings::environment;

/// A call: the program, its arguments and its input.
#[derive(Debug, Clone)]
pub struct Call<'a> {
    /// The executable; an absolute path, for the call is made from `/`.
    pub hook: PathBuf,
    /// Arguments that come before the four of libvirt, which itself gives none.
    pub before: Vec<OsString>,
    /// The domain's name.
    pub name: String,
    /// The operation: `prepare`, `start`, `started`, `stopped`, `release`, `reconnect`, `migrate`,
    /// `restore`.
    pub op: String,
    /// `begin` or `end`.
    pub subop: String,
    /// Why, with `release`; empty means `-`.
    pub extra: String,
    /// The domain XML.
    pub stdin: &'a [u8],
}

/// How calls are made.
#[derive(Debug, Clone)]
pub struct Settings {
    /// How long a call may take before it is ended. libvirt waits for ever.
    pub timeout: Duration,
    /// Names of environment variables passed to the hook beyond those of libvirt.
    pub keep_env: Vec<String>,
}

impl Default for Settings {
    fn default() -> Self {
        Self { timeout: Duration::from_secs(30), keep_env: Vec::new() }
    }
}

/// How a hook ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// With this exit status, 0 to 255.
    Code(i32),
    /// By this signal.
    Signal(i32),
}

/// `exit status 1`, `fatal signal 9`: the words of `virProcessTranslateStatus`
/// (src/util/virprocess.c).
impl fmt::Display for Exit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Code(code) => write!(f, "exit status {code}"),
            Self::Signal(signal) => write!(f, "fatal signal {signal}"),
        }
    }
}

/// Why the harness ended a call that libvirt would still be waiting for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hang {
    /// The hook was still running.
    StillRunning,
    /// The hook had exited, but one of its children still held the pipes.
    PipesHeld,
}

impl fmt::Display for Hang {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::StillRunning => {
                "the hook was still running: libvirt would wait for ever; the \
                harness ended it"
            }
            Self::PipesHeld => {
                "a child of the hook still holds stdout/stderr open: libvirt would hang here; the \
                    harness ended it"
            }
        })
    }
}

/// Result of a call.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// Everything that was printed.
    pub stdout: Vec<u8>,
    /// Everything that was complained about; bytes that are not UTF-8 are replaced.
    pub stderr: String,
    /// How the hook ended.
    pub exit: Exit,
    /// From before the spawn until both pipes were closed and the hook had been waited for.
    pub duration: Duration,
    /// Whether the deadline had to end it.
    pub hang: Option<Hang>,
}

impl Answer {
    /// Whether libvirt takes it for a success: exit status 0, and nothing waited for in vain.
    pub fn succeeded(&self) -> bool {
        self.exit == Exit::Code(0) && self.hang.is_none()
    }

    /// The error that libvirt shows its user for this answer to `call`, `None` for a success.
    ///
    /// `virCommandWait` words it, `virRunScript` puts its own name before it.
    pub fn message(&self, call: &Call<'_>, settings: &Settings) -> Option<String> {
        if self.succeeded() {
            return None;
        }
        if let Some(hang) = self.hang {
            return Some(format!("no answer within {} s: {hang}", settings.timeout.as_secs_f32()));
        }
        let stderr = self.stderr.trim_end();
        let colon = if stderr.is_empty() { "" } else { ": " };
        let command = command_line(call, settings);
        Some(format!(
            "Hook script execution failed: internal error: Child process ({command}) unexpected \
                {}{colon}{stderr}",
            self.exit
        ))
    }
}

/// The four arguments, after those that come before them.
pub(crate) fn arguments(call: &Call<'_>) -> Vec<OsString> {
    let extra = if call.extra.is_empty() { "-" } else { &call.extra };
    let four = [&call.name, &call.op, &call.subop, extra];
    call.before.iter().cloned().chain(four.into_iter().map(OsString::from)).collect()
}

/// Makes the call.
///
/// # Errors
/// When no process can be made or its pipes fail. A file that cannot be executed is no error but an
/// answer with exit status 126 or 127, as under libvirt.
pub fn call(call: &Call<'_>, settings: &Settings) -> io::Result<Answer> {
    let begun = Instant::now();
    let deadline = begun.checked_add(settings.timeout);
    let mut child = match command(call, settings).spawn() {
        Ok(child) => child,
        Err(error) => return not_executed(call, &error, begun),
    };
    let mut pipes = Pipes::of(&mut child, call.stdin);
    let hang =
        match pipes.run_until(deadline).and_then(|done| Ok(done && ended_by(&child, deadline)?)) {
            Ok(true) => None,
            Ok(false) => Some(end(&child)?),
            Err(error) => {
                end(&child)?;
                child.wait()?;
                return Err(error);
            }
        };
    let exit = exit(child.wait()?);
    let stderr = String::from_utf8_lossy(&pipes.complaints).into_owned();
    Ok(Answer { stdout: pipes.printed, stderr, exit, duration: begun.elapsed(), hang })
}

/// A process group of its own, unlike under libvirt, so that the deadline ends what the hook left
/// behind, too.
fn command(call: &Call<'_>, settings: &Settings) -> Command {
    let mut command = Command::new(&call.hook);
    command
        .args(arguments(call))
        .env_clear()
        .envs(environment(&settings.keep_env))
        .current_dir("/")
        .process_group(0)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    command
}

/// libvirt forks first: a failed exec is the child's exit status and a line on its stderr
/// (`virExec`).
fn not_executed(call: &Call<'_>, error: &io::Error, begun: Instant) -> io::Result<Answer> {
    let status = match error.kind() {
        io::ErrorKind::NotFound => 127,
        io::ErrorKind::PermissionDenied | io::ErrorKind::ExecutableFileBusy => 126,
        _ if error.raw_os_error() == Some(Errno::NOEXEC.raw_os_error()) => 126,
        _ => return Err(io::Error::new(error.kind(), format!("{}: {error}", call.hook.display()))),
    };
    let reason = error.to_string();
    let reason = reason.split(" (os error").next().unwrap_or_default();
    let stderr =
        format!("libvirt:  error : cannot execute binary {}: {reason}\n", call.hook.display());
    Ok(Answer {
        stdout: Vec::new(),
        stderr,
        exit: Exit::Code(status),
        duration: begun.elapsed(),
        hang: None,
    })
}

/// The parent's ends; a pipe that is done with is `None`, and closed.
struct Pipes<'a> {
    stdin: Option<ChildStdin>,
    stdout: Option<ChildStdout>,
    stderr: Option<ChildStderr>,
    to_write: &'a [u8],
    printed: Vec<u8>,
    complaints: Vec<u8>,
}

/// Pipes that poll(2) found ready.
struct Ready {
    stdin: bool,
    stdout: bool,
    stderr: bool,
}

impl<'a> Pipes<'a> {
    fn of(child: &mut Child, to_write: &'a [u8]) -> Self {
        let (stdin, stdout, stderr) =
            (child.stdin.take(), child.stdout.take(), child.stderr.take());
        Self { stdin, stdout, stderr, to_write, printed: Vec::new(), complaints: Vec::new() }
    }

    /// `virCommandProcessIO`, with a deadline: `false` when it passed while a pipe was open.
    fn run_until(&mut self, deadline: Option<Instant>) -> io::Result<bool> {
        if let Some(stdin) = &self.stdin {
            rustix::io::ioctl_fionbio(stdin, true)?;
        }
        while self.stdin.is_some() || self.stdout.is_some() || self.stderr.is_some() {
            let Some(ready) = self.wait(deadline)? else { return Ok(false) };
            if ready.stdin {
                self.feed()?;
            }
            if ready.stdout {
                drain(&mut self.stdout, &mut self.printed)?;
            }
            if ready.stderr {
                drain(&mut self.stderr, &mut self.complaints)?;
            }
        }
        Ok(true)
    }

    /// `None` when the deadline has passed.
    fn wait(&self, deadline: Option<Instant>) -> io::Result<Option<Ready>> {
        let pipes = [
            (self.stdin.as_ref().map(AsFd::as_fd), PollFlags::OUT),
            (self.stdout.as_ref().map(AsFd::as_fd), PollFlags::IN),
            (self.stderr.as_ref().map(AsFd::as_fd), PollFlags::IN),
        ];
        let open =
            pipes.iter().filter_map(|(fd, flags)| Some(PollFd::from_borrowed_fd((*fd)?, *flags)));
        let mut fds: Vec<_> = open.collect();
        loop {
            let left = deadline.map(|at| at.saturating_duration_since(Instant::now()));
            match poll(&mut fds, left.map(timespec).as_ref()) {
                Ok(0) => return Ok(None),
                Ok(_) => break,
                Err(Errno::INTR | Errno::AGAIN) => {}
                Err(error) => return Err(error.into()),
            }
        }
        let mut polled = fds.iter();
        let [stdin, stdout, stderr] = pipes.map(|(fd, _)| {
            fd.is_some() && polled.next().is_some_and(|fd| !fd.revents().is_empty())
        });
        Ok(Some(Ready { stdin, stdout, stderr }))
    }

    /// A hook may end, or close its stdin, before it has read the XML.
    fn feed(&mut self) -> io::Result<()> {
        let Some(stdin) = &mut self.stdin else { return Ok(()) };
        match stdin.write(self.to_write) {
            Ok(written) => self.to_write = self.to_write.get(written..).unwrap_or_default(),
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => self.to_write = &[],
            Err(error) if retry(&error) => return Ok(()),
            Err(error) => return Err(error),
        }
        if self.to_write.is_empty() {
            self.stdin = None;
        }
        Ok(())
    }
}

fn drain<P: Read>(pipe: &mut Option<P>, into: &mut Vec<u8>) -> io::Result<()> {
    let Some(open) = pipe else { return Ok(()) };
    let mut chunk = [0; 65_536];
    match open.read(&mut chunk) {
        Ok(0) => *pipe = None,
        Ok(count) => into.extend_from_slice(chunk.get(..count).unwrap_or_default()),
        Err(error) if retry(&error) => {}
        Err(error) => return Err(error),
    }
    Ok(())
}

fn retry(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock)
}

fn timespec(duration: Duration) -> Timespec {
    Timespec {
        tv_sec: i64::try_from(duration.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: duration.subsec_nanos().into(),
    }
}

/// Waits for the hook without reaping it, so that its process id stays its own.
fn ended_by(child: &Child, deadline: Option<Instant>) -> io::Result<bool> {
    let mut pause = Duration::from_micros(50);
    while !has_ended(child)? {
        if deadline.is_some_and(|at| Instant::now() >= at) {
            return Ok(false);
        }
        thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(5));
    }
    Ok(true)
}

fn has_ended(child: &Child) -> io::Result<bool> {
    let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
    Ok(waitid(WaitId::Pid(Pid::from_child(child)), options)?.is_some())
}

/// Ends the hook and its process group; the group's number is safe while the hook is not reaped.
fn end(child: &Child) -> io::Result<Hang> {
    let hang = if has_ended(child)? { Hang::PipesHeld } else { Hang::StillRunning };
    match kill_process_group(Pid::from_child(child), Signal::KILL) {
        Ok(()) | Err(Errno::SRCH) => Ok(hang),
        Err(error) => Err(error.into()),
    }
}

fn exit(status: ExitStatus) -> Exit {
    match (status.code(), status.signal()) {
        (Some(code), _) => Exit::Code(code),
        (None, signal) => Exit::Signal(signal.unwrap_or_default()),
    }
}

/// `virCommandToString`: environment and arguments, quoted for a shell.
fn command_line(call: &Call<'_>, settings: &Settings) -> String {
    let variables = environment(&settings.keep_env).into_iter().map(|(name, value)| {
        let value = quoted(&value.to_string_lossy());
        format!("{name}={value}")
    });
    let words = std::iter::once(call.hook.clone().into_os_string()).chain(arguments(call));
    let words = words.map(|word| quoted(&word.to_string_lossy()));
    variables.chain(words).collect::<Vec<_>>().join(" ")
}

/// `virBufferEscapeShell` (src/util/virbuffer.c).
fn quoted(word: &str) -> String {
    if word.is_empty() {
        return "''".to_owned();
    }
    if !word.contains(|c| "\r\t\n !\"#$&'()*;<>?[\\]^`{|}~".contains(c)) {
        return word.to_owned();
    }
    format!("'{}'", word.replace('\'', "'\\''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_quoted_as_libvirt_quotes_them() {
        assert_eq!(quoted(""), "''");
        assert_eq!(quoted("/etc/libvirt/hooks/qemu"), "/etc/libvirt/hooks/qemu");
        assert_eq!(quoted("it's here"), "'it'\\''s here'");
    }

    #[test]
    fn an_empty_extra_is_a_dash() {
        let call = Call {
            hook: "/bin/true".into(),
            before: vec!["--config".into(), "/c".into()],
            name: "vm".into(),
            op: "prepare".into(),
            subop: "begin".into(),
            extra: String::new(),
            stdin: b"",
        };
        assert_eq!(arguments(&call), ["--config", "/c", "vm", "prepare", "begin", "-"]);
    }
}
