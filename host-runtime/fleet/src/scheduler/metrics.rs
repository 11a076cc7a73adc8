//! Metrics of the scheduler.

use std::sync::atomic::AtomicI64;

use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::{Registry, Unit};

type Labels = Vec<(&'static str, String)>;

pub(super) struct Metrics {
    registry: Registry,
    pub(super) changes: Counter,
    pub(super) hosts: Gauge<i64, AtomicI64>,
    pub(super) assumed: Gauge<i64, AtomicI64>,
    pub(super) connected: Gauge<i64, AtomicI64>,
    answers: Family<Labels, Histogram>,
}

/// Histogram with buckets from a tenth of a millisecond to a second.
fn seconds() -> Histogram {
    Histogram::new([
        0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0,
    ])
}

impl Default for Metrics {
    fn default() -> Self {
        let mut registry = Registry::with_prefix("virt_usb_scheduler");
        let metrics = Self {
            changes: Counter::default(),
            hosts: Gauge::default(),
            assumed: Gauge::default(),
            connected: Gauge::default(),
            answers: Family::new_with_constructor(seconds),
            registry: Registry::default(),
        };
        registry.register("changes", "Host documents received or removed", metrics.changes.clone());
        registry.register("hosts", "Known hosts", metrics.hosts.clone());
        registry.register("assumptions", "Assumptions in effect", metrics.assumed.clone());
        registry.register("connected", "1 while connected to etcd", metrics.connected.clone());
        registry.register_with_unit(
            "answers",
            "Requests, by path and status",
            Unit::Seconds,
            metrics.answers.clone(),
        );
        Self { registry, ..metrics }
    }
}

impl Metrics {
    pub(super) fn answered(&self, path: &'static str, status: u16, seconds: f64) {
        let labels = vec![("path", path.to_owned()), ("status", status.to_string())];
        self.answers.get_or_create(&labels).observe(seconds);
    }

    pub(super) fn text(&self) -> String {
        let mut text = String::new();
        // Writing into a String cannot fail.
        let _ = encode(&mut text, &self.registry);
        text
    }
}
