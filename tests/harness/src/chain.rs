//! The hooks of a host, called one after the other as `virHookCall` (src/util/virhook.c) calls
//! them.
//!
//! - `DIR/qemu` comes first, then each executable of `DIR/qemu.d`, ordered by `strcmp`.
//! - All are called, also after one has failed; one failure fails the whole.
//! - A filter's output is the next one's input. Output of nothing but white space counts as none.
//!   Once one has failed the following ones get the *original* XML again.
//! - The error that remains, and is shown, is that of the *last* one that failed.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use crate::call::{Answer, Call, Settings, arguments, call};

/// One executable and how it is called.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Script {
    /// Absolute path of the hook.
    pub path: PathBuf,
    /// Arguments put before the four of libvirt.
    pub before: Vec<OsString>,
}

/// The hooks could not be found or called.
#[derive(Debug, thiserror::Error)]
pub enum HookError {
    /// There is nothing to call: libvirt would not even notice.
    #[error("no executable hook: {looked} (a hook is a regular file with an execute permission)")]
    None {
        /// Where was looked.
        looked: String,
    },
    /// A folder of hooks cannot be read.
    #[error("cannot list the hooks in {path}")]
    List {
        /// Path of the folder.
        path: PathBuf,
        /// Cause of the failure.
        source: io::Error,
    },
    /// No process could be made of a hook, or its pipes failed.
    #[error("cannot call the hook")]
    Call(#[from] io::Error),
}

/// The operation for which the hooks are called.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    /// The domain's name.
    pub name: String,
    /// Name of the operation.
    pub op: String,
    /// `begin` or `end`.
    pub subop: String,
    /// Why; empty means `-`.
    pub extra: String,
}

/// One executable's part in a chain.
#[derive(Debug, Clone)]
pub struct Link {
    /// Path of the executable.
    pub path: PathBuf,
    /// Arguments of the call.
    pub arguments: Vec<OsString>,
    /// The XML that it was given.
    pub input: Vec<u8>,
    /// Answer of the hook.
    pub answer: Answer,
    /// libvirt's error for it.
    pub message: Option<String>,
}

/// Result of calling all hooks.
#[derive(Debug, Clone, Default)]
pub struct Chained {
    /// Every call, in order.
    pub links: Vec<Link>,
    /// The XML that a filter made; `None` means unchanged.
    pub output: Option<Vec<u8>>,
    /// The error that libvirt shows, when any of them failed.
    pub failure: Option<String>,
}

/// Hooks in the hook folder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hooks {
    scripts: Vec<Script>,
}

impl Hooks {
    /// Finds the hooks to call.
    ///
    /// `hook` alone is the only one. `dir` alone is read like `/etc/libvirt/hooks`. With both,
    /// `hook` takes the place that it would have if it were installed in `dir/qemu.d` under its own
    /// file name.
    ///
    /// # Errors
    /// When there is nothing executable, or `dir` cannot be read.
    pub fn find(hook: Option<Script>, dir: Option<&Path>) -> Result<Self, HookError> {
        let mut looked = Vec::new();
        let mut main = None;
        let mut rest = Vec::new();
        if let Some(script) = hook {
            if !is_executable(&script.path) {
                return Err(HookError::None { looked: script.path.display().to_string() });
            }
            rest.push(script);
        }
        if let Some(dir) = dir {
            let (first, folder) = (dir.join("qemu"), dir.join("qemu.d"));
            let others =
                executables(&folder)?.into_iter().filter(|path| !same_name(path, &rest)).map(plain);
            let others: Vec<_> = others.collect();
            rest.extend(others);
            looked = vec![first.display().to_string(), folder.join("*").display().to_string()];
            main = Some(first).filter(|path| is_executable(path)).map(plain);
        }
        rest.sort_by(|a, b| file_name(&a.path).cmp(file_name(&b.path)));
        let scripts: Vec<_> = main.into_iter().chain(rest).collect();
        if scripts.is_empty() {
            return Err(HookError::None { looked: looked.join(", ") });
        }
        Ok(Self { scripts })
    }

    /// The hooks, in the order of the calls.
    pub fn scripts(&self) -> &[Script] {
        &self.scripts
    }

    /// Calls them all.
    ///
    /// With `filter` the output of each is read as the XML that replaces its input; without it
    /// libvirt has no use for what is printed.
    ///
    /// # Errors
    /// When a call cannot be made at all.
    pub fn call(
        &self,
        request: &Request,
        xml: &[u8],
        filter: bool,
        settings: &Settings,
    ) -> Result<Chained, HookError> {
        let mut chained = Chained::default();
        for script in &self.scripts {
            let input = chained.input(xml).to_vec();
            let link = run(script, request, input, settings)?;
            chained.add(link, filter);
        }
        Ok(chained)
    }
}

impl Chained {
    fn input<'a>(&'a self, original: &'a [u8]) -> &'a [u8] {
        self.output.as_deref().filter(|_| self.failure.is_none()).unwrap_or(original)
    }

    fn add(&mut self, link: Link, filter: bool) {
        if let Some(message) = &link.message {
            self.failure = Some(message.clone());
        } else if let Some(text) = replacement(&link.answer.stdout).filter(|_| filter) {
            self.output = Some(text.to_vec());
        }
        self.links.push(link);
    }
}

/// The output of a filter as libvirt reads it: a C string, `None` if it is empty or blank
/// (`virStringIsEmpty`).
pub(crate) fn replacement(stdout: &[u8]) -> Option<&[u8]> {
    let text = stdout.split(|byte| *byte == 0).next().unwrap_or_default();
    (!text.trim_ascii().is_empty()).then_some(text)
}

fn run(
    script: &Script,
    request: &Request,
    input: Vec<u8>,
    settings: &Settings,
) -> Result<Link, HookError> {
    let made = Call {
        hook: script.path.clone(),
        before: script.before.clone(),
        name: request.name.clone(),
        op: request.op.clone(),
        subop: request.subop.clone(),
        extra: request.extra.clone(),
        stdin: &input,
    };
    let answer = call(&made, settings)?;
    let message = answer.message(&made, settings);
    let arguments = arguments(&made);
    Ok(Link { path: script.path.clone(), arguments, input, answer, message })
}

/// A folder that is not there holds no hooks.
fn executables(dir: &Path) -> Result<Vec<PathBuf>, HookError> {
    let failed = |source| HookError::List { path: dir.into(), source };
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(failed(error)),
    };
    let paths = entries
        .map(|entry| entry.map(|e| e.path()))
        .collect::<io::Result<Vec<_>>>()
        .map_err(failed)?;
    Ok(paths.into_iter().filter(|path| is_executable(path)).collect())
}

/// `virFileIsExecutable` (src/util/virfile.c): a regular file, links followed, with any execute
/// permission.
fn is_executable(path: &Path) -> bool {
    fs::metadata(path).is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
}

fn plain(path: PathBuf) -> Script {
    Script { path, before: Vec::new() }
}

fn file_name(path: &Path) -> &[u8] {
    path.file_name().map(|name| name.as_bytes()).unwrap_or_default()
}

fn same_name(path: &Path, others: &[Script]) -> bool {
    others.iter().any(|other| file_name(&other.path) == file_name(path))
}
