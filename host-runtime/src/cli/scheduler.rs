//! `scheduler`: the filter as a service.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::bail;
use virt_usb_filter_host::Limits;

use super::Session;
use super::arguments::Scheduler;
use super::filter::load_with;
use crate::scheduler;

pub(super) fn run(session: &Session, options: &Scheduler) -> anyhow::Result<ExitCode> {
    let Some(fleet) = session.config()?.fleet else {
        bail!("the configuration names no fleet: give [fleet] with its endpoints first");
    };
    crate::log::start(tracing::Level::INFO);
    scheduler::run(&scheduler::Options {
        fleet,
        filter: load_with(&options.component, Limits::default())?,
        listen: options.listen,
        socket: options.socket.clone(),
        max_age: Duration::from_secs(options.max_age),
    })?;
    Ok(ExitCode::SUCCESS)
}
