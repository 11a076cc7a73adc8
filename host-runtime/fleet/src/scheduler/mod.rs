//! `virt-usb-scheduler`: the filter as a service for any scheduler. It follows the fleet, and
//! answers which hosts can serve a flavor.
//!
//! ```text
//!  etcd ─► fleet::reader ─► view ─► filter (several sessions) ─► serve ─► HTTP, unix socket
//!                            ▲                                     │
//!                            └── assume: promised, not published ◄─┘
//! ```
//! The service keeps no state: it is built from the content of etcd, and several may run.

mod arguments;
mod assume;
mod flavors;
mod metrics;
mod serve;
mod view;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, bail};
use tokio::sync::{Semaphore, watch};
use virt_usb_config::{Config, Fleet};
use virt_usb_filter_host::{Filter, Limits};
use virt_usb_model::Flavor;

use crate::http_server::{CONNECTIONS, SHUTDOWN_TIMEOUT, SOCKET_MODE, Server};
use crate::keys::Keys;
use crate::reader::Reader;
use crate::replicated::Shared as _;

pub use arguments::{Arguments, Scheduler};
pub use view::View;

/// Interval at which assumptions expire and sessions receive changes.
const TICK_INTERVAL: Duration = Duration::from_millis(200);

/// Parameters of the service.
#[derive(Debug)]
struct Options {
    fleet: Fleet,
    filter: Filter,
    /// Address of the HTTP server.
    listen: Option<SocketAddr>,
    /// Path of the unix socket.
    socket: Option<PathBuf>,
    /// Maximum age of the fleet view; requests are refused if it is older.
    max_age: Duration,
}

/// Serves until SIGTERM or SIGINT.
///
/// # Errors
/// If the threads cannot be started.
fn run(options: &Options) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .thread_name("scheduler")
        .enable_all()
        .build()
        .context("cannot start threads")?;
    let (stop, stopping) = watch::channel(false);
    let mut signals = signal_hook::iterator::Signals::new([
        signal_hook::consts::SIGTERM,
        signal_hook::consts::SIGINT,
    ])?;
    let view = Arc::new(View::new(&options.filter));
    let limit = Arc::new(Semaphore::new(CONNECTIONS));
    let flavors = flavors::Flavors::default();
    let router = serve::router(view.clone(), flavors.clone(), options.max_age);
    let server = Server {
        what: "the scheduler",
        router,
        limit: limit.clone(),
        stopping,
        served: Arc::default(),
    };
    if let Some(address) = options.listen {
        runtime.spawn(server.clone().network(address, None));
    }
    if let Some(path) = &options.socket {
        runtime.spawn(server.local(path.clone(), SOCKET_MODE));
    }
    let keys = Keys::new(options.fleet.prefix.clone());
    let mut hosts = Reader::new(&options.fleet, keys.hosts());
    let mut sink = view.clone();
    runtime.spawn(async move { hosts.follow(&mut sink).await });
    let mut definitions = Reader::new(&options.fleet, keys.shared(Flavor::PLURAL));
    let mut sink = flavors;
    runtime.spawn(async move { definitions.follow(&mut sink).await });
    runtime.spawn(async move {
        let mut ticks = tokio::time::interval(TICK_INTERVAL);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            tokio::task::block_in_place(|| view.tick());
        }
    });
    drop(sd_notify::notify(&[sd_notify::NotifyState::Ready]));
    // Wait for a signal.
    let _ = signals.forever().next();
    drop(sd_notify::notify(&[sd_notify::NotifyState::Stopping]));
    stop.send_replace(true);
    let all = u32::try_from(CONNECTIONS).unwrap_or(u32::MAX);
    let ended =
        async { tokio::time::timeout(SHUTDOWN_TIMEOUT, limit.acquire_many(all)).await.is_ok() };
    runtime.block_on(ended);
    runtime.shutdown_timeout(Duration::from_secs(1));
    if let Some(path) = &options.socket {
        drop(std::fs::remove_file(path));
    }
    Ok(())
}

/// Main function of the program `virt-usb-scheduler`.
pub fn main() -> ExitCode {
    virt_usb_config::panics::abort();
    let arguments: Arguments = match crate::log::arguments() {
        Ok(arguments) => arguments,
        Err(code) => return code,
    };
    crate::log::start(tracing::Level::INFO);
    crate::log::finish(begin(&arguments))
}

fn begin(arguments: &Arguments) -> anyhow::Result<()> {
    let Some(fleet) = Config::load(arguments.config.as_deref())?.fleet else {
        bail!("the configuration has no [fleet] section: add one with its endpoints first");
    };
    let options = &arguments.options;
    run(&Options {
        fleet,
        filter: options.component.load(Limits::default())?,
        listen: options.listen,
        socket: options.socket.clone(),
        max_age: Duration::from_secs(options.max_age),
    })
}
