//! Serves `/metrics` over HTTP, on a loopback address or a unix socket.

use std::sync::Arc;

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use axum::routing::get;
use tokio::sync::{Semaphore, watch};
use virt_usb_config as config;

use super::Metrics;
use virt_usb_fleet::http_server::Server;

/// Maximum number of connections.
const MAX_CONNECTIONS: usize = 32;
/// Mode of the socket. The metrics contain no secrets: every user with access to the socket's
/// directory may read them.
const SOCKET_MODE: u32 = 0o666;
/// Media type of the response.
const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Serves the metrics until the process ends. If the address cannot be used, the thread retries.
///
/// # Errors
/// If the thread cannot be started.
pub(crate) fn serve(metrics: Arc<Metrics>, at: config::Metrics) -> std::io::Result<()> {
    if at == config::Metrics::Off {
        return Ok(());
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let serve = move || {
        let served = metrics.metrics_served.clone();
        let router = Router::new()
            .route("/metrics", get(answer))
            .fallback(|| async { (StatusCode::NOT_FOUND, "see /metrics\n") })
            .with_state(metrics);
        // Nothing stops it before the process ends.
        let (_end, stopping) = watch::channel(false);
        let limit = Arc::new(Semaphore::new(MAX_CONNECTIONS));
        let server = Server { what: "the metrics", router, limit, stopping, served };
        match at {
            config::Metrics::Off => {}
            config::Metrics::Tcp(address) => runtime.block_on(server.network(address, None)),
            config::Metrics::Unix(path) => runtime.block_on(server.local(path, SOCKET_MODE)),
        }
    };
    std::thread::Builder::new().name("metrics".into()).spawn(serve).map(drop)
}

async fn answer(State(metrics): State<Arc<Metrics>>) -> impl IntoResponse {
    ([(header::CONTENT_TYPE, OPEN_METRICS)], metrics.text())
}
