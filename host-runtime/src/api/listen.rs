//! The API's sockets, and its end.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use tokio::sync::{Semaphore, watch};
use virt_usb_config as config;
use virt_usb_store::user::User;

use super::keystone::PLACES;
use super::{Api, LONG_TURNS, TURNS, WORKS, fleet, router, socket};
use virt_usb_fleet::http_server::{CONNECTIONS, Certificate, SOCKET_MODE, Server};

/// Time that a shutdown waits for requests that have begun. The agent ends within 5 s, even if
/// libvirt does not answer.
const END_TIME: Duration = Duration::from_secs(3);

/// The running API.
pub struct Listening {
    runtime: tokio::runtime::Runtime,
    api: Arc<Api>,
    /// Limits of connections, then of the work behind them, each with its maximum.
    limits: Vec<(Arc<Semaphore>, usize)>,
    /// Path of the unix socket, which is removed at the end.
    socket: Option<PathBuf>,
}

impl Listening {
    /// Rejects new requests, and waits for those that have begun.
    pub fn stop(self) {
        self.api.ending.send_replace(true);
        let ended = async {
            for (limit, all) in &self.limits {
                drop(limit.acquire_many(u32::try_from(*all).unwrap_or(u32::MAX)).await);
            }
        };
        // Connections that are still open after this time are closed.
        drop(self.runtime.block_on(async { tokio::time::timeout(END_TIME, ended).await }));
        self.runtime.shutdown_timeout(Duration::from_millis(500));
        if let Some(socket) = self.socket {
            let owner = User::of_folder_of(&socket).and_then(User::enter);
            drop(owner.and_then(|_owner| std::fs::remove_file(socket)));
        }
    }
}

/// Serves the API until it is stopped. If a socket cannot be opened, retries until then.
///
/// # Errors
/// If the threads cannot be created.
pub fn start(api: &Arc<Api>) -> io::Result<Listening> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .thread_name("api")
        .max_blocking_threads(WORKS + PLACES + TURNS + LONG_TURNS)
        .enable_all()
        .build()?;
    let stopping = api.ending.subscribe();
    let config = (api.config)();
    let mut limits = Vec::new();
    let mut server = |stopping: watch::Receiver<bool>, served: Arc<AtomicBool>| {
        let limit = Arc::new(Semaphore::new(CONNECTIONS));
        limits.push((limit.clone(), CONNECTIONS));
        Server { what: "the API", router: router(api.clone()), limit, stopping, served }
    };
    let mut local = None;
    if let config::Api::On(address) = config.api {
        let tls = config.api_tls.clone().map(Certificate::new);
        let served = api.metrics.api_served.clone();
        runtime.spawn(server(stopping.clone(), served).network(address, tls));
        runtime.spawn(server(stopping, Arc::default()).local(socket(&config), SOCKET_MODE));
        local = Some(socket(&config));
    }
    if let Some(fleet) = config.fleet.clone() {
        runtime.spawn(fleet::follow(api.clone(), fleet));
    }
    limits.extend([(api.turns.clone(), TURNS), (api.works.clone(), WORKS)]);
    Ok(Listening { runtime, api: api.clone(), limits, socket: local })
}
