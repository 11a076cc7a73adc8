//! `virt-usb scheduler`: the filter as a service, beside any scheduler. It follows the fleet, and
//! answers which hosts can serve.
//!
//! ```text
//!  etcd ─► fleet::reader ─► view ─► filter (one instance for each who asks) ─► serve ─► HTTP, unix socket
//!                            ▲                                                  │
//!                            └──── assume: promised, and not published yet ◄────┘
//! ```
//! Nothing of it lasts: each instance is made anew of what etcd holds, and several may run.

mod assume;
mod flavors;
mod metrics;
mod serve;
mod view;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use tokio::sync::{Semaphore, watch};
use virt_usb_config::Fleet;
use virt_usb_filter_host::Filter;
use virt_usb_model::Flavor;

use crate::fleet::keys::Keys;
use crate::fleet::reader::Reader;
use crate::fleet::shared::Shared as _;
use crate::listen::{CONNECTIONS, END_TIME, SOCKET_MODE, Server};

pub(crate) use view::View;

/// How often promises are looked through and instances fed.
const TICK: Duration = Duration::from_millis(200);

/// What the service is started with.
#[derive(Debug)]
pub(crate) struct Options {
    pub(crate) fleet: Fleet,
    pub(crate) filter: Filter,
    /// Where HTTP is served.
    pub(crate) listen: Option<SocketAddr>,
    /// The unix socket's path.
    pub(crate) socket: Option<PathBuf>,
    /// When nothing was heard for longer, questions are refused.
    pub(crate) max_age: Duration,
}

/// Serves until it is told to stop by SIGTERM or SIGINT.
///
/// # Errors
/// When there can be no threads for it.
pub(crate) fn run(options: &Options) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .thread_name("scheduler")
        .enable_all()
        .build()
        .context("cannot make threads")?;
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
    let mut named = Reader::new(&options.fleet, keys.shared(Flavor::PLURAL));
    let mut sink = flavors;
    runtime.spawn(async move { named.follow(&mut sink).await });
    runtime.spawn(async move {
        let mut ticks = tokio::time::interval(TICK);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            tokio::task::block_in_place(|| view.tick());
        }
    });
    drop(sd_notify::notify(&[sd_notify::NotifyState::Ready]));
    // Until one comes.
    let _ = signals.forever().next();
    drop(sd_notify::notify(&[sd_notify::NotifyState::Stopping]));
    stop.send_replace(true);
    let all = u32::try_from(CONNECTIONS).unwrap_or(u32::MAX);
    let ended = async { tokio::time::timeout(END_TIME, limit.acquire_many(all)).await.is_ok() };
    runtime.block_on(ended);
    runtime.shutdown_timeout(Duration::from_secs(1));
    if let Some(path) = &options.socket {
        drop(std::fs::remove_file(path));
    }
    Ok(())
}
