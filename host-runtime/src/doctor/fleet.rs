//! Checks the fleet: its etcd endpoints, their alarms and sizes, and what this host has published.

use super::{Host, Report};

/// Size in bytes at which etcd's database is nearly full, with the default quota.
const MAX_DB_BYTES: i64 = 1600 << 20;

/// Checks etcd. No finding of this check keeps a guest of this host from getting its devices.
pub(super) fn check(host: &Host, report: &Report) {
    let config = &host.config;
    let Some(fleet) = &config.fleet else { return };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let asked = crate::inventory::host_name(&config.procfs_root).and_then(|host| {
        let status = runtime?.block_on(virt_usb_fleet::join::status(fleet, &host))?;
        Ok(status)
    });
    let status = match asked {
        Ok(status) => status,
        Err(e) => {
            let why = e.chain().map(ToString::to_string).collect::<Vec<_>>().join(": ");
            report.warn(
                why,
                "fix the error above; check the network and 'etcdctl endpoint health'. Guests of \
                 this host still get their devices",
            );
            return;
        }
    };
    for endpoint in &status.endpoints {
        let name = &endpoint.endpoint;
        if let Some(fault) = &endpoint.fault {
            report.warn(
                format!("etcd at {name}: {fault}"),
                "restore it, or remove it from fleet.endpoints; the other endpoints still work",
            );
        }
        if !endpoint.alarms.is_empty() {
            report.warn(
                format!("etcd at {name} has an alarm: {}", endpoint.alarms.join(", ")),
                "NOSPACE: 'etcdctl compact' to a recent revision, 'etcdctl defrag', a larger \
                 --quota-backend-bytes, then 'etcdctl alarm disarm'",
            );
        }
        if endpoint.db_size.is_some_and(|size| size > MAX_DB_BYTES) {
            let used = endpoint.db_used.unwrap_or_default() >> 20;
            report.warn(
                format!(
                    "etcd's database at {name} has {} MiB, {used} of them in use: etcd's default \
                     limit is 2048",
                    endpoint.db_size.unwrap_or_default() >> 20
                ),
                "'etcdctl defrag' frees unused space; if most of it is in use, raise \
                 --quota-backend-bytes (up to 8 GiB)",
            );
        }
    }
    if status.never_compacted {
        report.warn(
            "etcd has compacted nothing in ten thousand changes: its database grows until it is \
             full",
            "start it with --auto-compaction-mode=periodic --auto-compaction-retention=10m",
        );
    }
    let store = host.store().ok();
    let number = store.as_ref().and_then(|store| store.node().ok());
    let revision = store
        .as_ref()
        .and_then(|store| store.host_document().ok()?)
        .map(|document| document.revision);
    match (status.number, status.published) {
        (None, _) => report.warn(
            "this host has not joined it: no other host sees its devices",
            "'virt-usb fleet join'",
        ),
        (Some(joined), _) if number.is_some_and(|own| own != joined) => report.warn(
            format!(
                "this machine is number {joined} there, but its inventory has another number: \
                 nothing is published"
            ),
            "'virt-usb fleet join' renumbers its devices",
        ),
        (Some(_), published) if published < revision => report.warn(
            format!(
                "it has revision {} of this host, but the inventory has {}",
                published.unwrap_or_default(),
                revision.unwrap_or_default()
            ),
            "check again in a second; if this persists, 'journalctl -u virt-usbd' shows why the \
             agent does not publish",
        ),
        (Some(joined), _) => report.ok(format!("this host is number {joined}, and is published")),
    }
}
