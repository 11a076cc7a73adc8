//! The programs that are measured, and how one of them is run.

use std::ffi::OsString;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use virt_usb_harness::environment;

pub(crate) struct Programs {
    pub(crate) hook: PathBuf,
    pub(crate) filter: PathBuf,
    pub(crate) python: PathBuf,
    pub(crate) minidom_hook: PathBuf,
    pub(crate) nothing: PathBuf,
}

impl Programs {
    /// The release programs beside this one, and a Python.
    pub(crate) fn find() -> Result<Self> {
        let me = std::env::current_exe().context("where this program lies")?;
        let hook = me.with_file_name("virt-usb-hook");
        ensure!(hook.exists(), "{} is not there: 'make build' makes it", hook.display());
        let filter = me.with_file_name("virt-usb-filter.wasm");
        ensure!(filter.exists(), "{} is not there: 'make build' makes it", filter.display());
        Ok(Self {
            hook,
            filter,
            python: python()?,
            minidom_hook: Path::new(env!("CARGO_MANIFEST_DIR")).join("minidom_hook.py"),
            nothing: "/bin/true".into(),
        })
    }

    /// Whether the hook is static: a dynamically linked program names its linker.
    pub(crate) fn hook_is_static(&self) -> bool {
        let linker = b"/ld-linux";
        std::fs::read(&self.hook)
            .is_ok_and(|bytes| !bytes.windows(linker.len()).any(|part| part == linker))
    }
}

/// The interpreter itself: what the path finds may be a script that looks for it.
fn python() -> Result<PathBuf> {
    let said = Command::new("python3").args(["-c", "import sys; print(sys.executable)"]).output();
    let said = said.context("python3, the yardstick of the rewriting")?;
    Ok(PathBuf::from(String::from_utf8_lossy(&said.stdout).trim()))
}

/// One call of a program: its arguments, and its standard input.
pub(crate) struct Call {
    pub(crate) program: PathBuf,
    pub(crate) arguments: Vec<OsString>,
    pub(crate) stdin: PathBuf,
}

impl Call {
    pub(crate) fn new(
        program: &Path,
        arguments: impl IntoIterator<Item = impl Into<OsString>>,
        stdin: &Path,
    ) -> Self {
        Self {
            program: program.into(),
            arguments: arguments.into_iter().map(Into::into).collect(),
            stdin: stdin.into(),
        }
    }

    /// From the start to the end of the process, output thrown away. The environment is libvirt's.
    pub(crate) fn time(&self) -> Result<Duration> {
        let mut command = Command::new(&self.program);
        command.args(&self.arguments).env_clear().envs(environment(&[]));
        command.stdin(File::open(&self.stdin)?).stdout(Stdio::null()).stderr(Stdio::null());
        let began = Instant::now();
        let ended = command.status();
        let took = began.elapsed();
        let ended = ended.with_context(|| format!("running {}", self.program.display()))?;
        ensure!(ended.success(), "{} {:?}: {ended}", self.program.display(), self.arguments);
        Ok(took)
    }
}
