//! `virt-usb`, run as an operator runs it.

use std::ffi::{OsStr, OsString};
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use serde_json::Value;

use crate::record::ProductRun;

/// `virt-usb` could not be run, or did not answer as agreed.
#[derive(Debug, thiserror::Error)]
pub enum ProductError {
    /// No process could be made of it.
    #[error("cannot run {program}")]
    Run {
        /// Path of the executable.
        program: PathBuf,
        /// Cause of the failure.
        source: io::Error,
    },
    /// The command failed, and the harness needs its output.
    #[error("{command} failed ({exit}): {stderr}")]
    Failed {
        /// Command that was run.
        command: String,
        /// How it ended.
        exit: String,
        /// Standard error of the command.
        stderr: String,
    },
    /// The output is not JSON.
    #[error("{command} printed no JSON")]
    Json {
        /// Command that was run.
        command: String,
        /// Cause of the failure.
        source: serde_json::Error,
    },
}

/// `virt-usb` and the configuration that it reads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Product {
    /// Path of the executable.
    pub program: PathBuf,
    /// Given as `--config FILE` before every verb.
    pub config: PathBuf,
    /// Where `discover --sim` writes the matching sysfs tree; the configuration's `sysfs_root`
    /// should name it.
    pub sysfs_out: Option<PathBuf>,
}

impl Product {
    /// Runs it with these arguments; its environment is ours, its standard input is empty.
    ///
    /// # Errors
    /// When it cannot be run. That it fails is in what is returned.
    pub fn run<A: AsRef<OsStr>>(&self, args: &[A]) -> Result<ProductRun, ProductError> {
        let given = [OsStr::new("--config"), self.config.as_os_str()];
        let all: Vec<_> = given.into_iter().chain(args.iter().map(AsRef::as_ref)).collect();
        let begun = Instant::now();
        let output = Command::new(&self.program)
            .args(&all)
            .stdin(Stdio::null())
            .output()
            .map_err(|source| ProductError::Run { program: self.program.clone(), source })?;
        Ok(ProductRun {
            args: all.iter().map(|word| word.to_string_lossy().into_owned()).collect(),
            exit: output.status.code(),
            duration_us: begun.elapsed().as_micros(),
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        })
    }

    /// Scans the machine's devices, or those of a simulation file.
    ///
    /// # Errors
    /// When it cannot be run.
    pub fn discover(&self, sim: Option<&Path>) -> Result<ProductRun, ProductError> {
        let mut args = vec![OsString::from("discover")];
        if let Some(sim) = sim {
            args.extend(["--sim".into(), sim.into()]);
            if let Some(out) = &self.sysfs_out {
                args.extend(["--sysfs-out".into(), out.into()]);
            }
        }
        self.run(&args)
    }

    /// Claims, as in `virt-usb claims --json`.
    ///
    /// # Errors
    /// When it cannot be run, fails, or prints something else.
    pub fn claims(&self) -> Result<Value, ProductError> {
        self.json(&["claims", "--json"])
    }

    /// The document that a verb prints.
    ///
    /// # Errors
    /// When it cannot be run, fails, or prints something else.
    pub fn json(&self, args: &[&str]) -> Result<Value, ProductError> {
        let run = self.run(args)?;
        let command = || format!("{} {}", self.program.display(), run.args.join(" "));
        if run.exit != Some(0) {
            let exit = run
                .exit
                .map_or_else(|| "a signal".to_owned(), |code| format!("exit status {code}"));
            return Err(ProductError::Failed {
                command: command(),
                exit,
                stderr: run.stderr.trim().to_owned(),
            });
        }
        serde_json::from_str(&run.stdout)
            .map_err(|source| ProductError::Json { command: command(), source })
    }
}
