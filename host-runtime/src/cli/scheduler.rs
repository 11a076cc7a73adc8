//! The command `scheduler`: another name for the program `virt-usb-scheduler`.

use std::ffi::OsString;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Command, ExitCode};

use anyhow::{Context as _, bail};
use virt_usb_fleet::scheduler::Scheduler;

use super::Session;

/// Name of the program.
const PROGRAM: &str = "virt-usb-scheduler";

/// Replaces this process by `virt-usb-scheduler` from the same directory.
pub(super) fn run(session: &Session, options: &Scheduler) -> anyhow::Result<ExitCode> {
    let program = std::env::current_exe()
        .context("cannot find out where this program is")?
        .with_file_name(PROGRAM);
    if !program.exists() {
        bail!("{} is missing: install {PROGRAM} there", program.display());
    }
    let failed =
        Command::new(&program).args(arguments(session.config_file.as_deref(), options)).exec();
    Err(failed).with_context(|| format!("cannot start {}", program.display()))
}

fn arguments(config: Option<&Path>, options: &Scheduler) -> Vec<OsString> {
    let Scheduler { listen, socket, max_age, component } = options;
    let mut arguments: Vec<OsString> = Vec::new();
    let mut add = |name: &str, value: Option<OsString>| {
        arguments.extend(value.into_iter().flat_map(|value| [name.into(), value]));
    };
    add("--config", config.map(Into::into));
    add("--listen", listen.map(|address| address.to_string().into()));
    add("--socket", socket.clone().map(Into::into));
    add("--max-age", Some(max_age.to_string().into()));
    add("--component", component.component.clone().map(Into::into));
    add("--sha256", component.sha256.map(|digest| virt_usb_filter_host::hex(&digest).into()));
    arguments
}
