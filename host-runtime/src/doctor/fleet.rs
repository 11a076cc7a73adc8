//! etcd, through which the fleet shares its inventory.

use super::{Host, Report};

/// etcd's database is nearly full at this size, in bytes, unless it has a larger quota than by
/// default.
const DB_SIZE: i64 = 1600 << 20;

/// No finding here keeps a guest of this host from its devices.
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
                "fix the error above; the network and 'etcdctl endpoint health' tell \
                more. Guests of this host get their devices all the same",
            );
            return;
        }
    };
    for endpoint in &status.endpoints {
        let name = &endpoint.endpoint;
        if let Some(fault) = &endpoint.fault {
            report.warn(
                format!("etcd at {name}: {fault}"),
                "bring it back, or take it out of fleet.endpoints; the others serve meanwhile",
            );
        }
        if !endpoint.alarms.is_empty() {
            report.warn(
                format!("etcd at {name} has an alarm: {}", endpoint.alarms.join(", ")),
                "NOSPACE: 'etcdctl compact' to a revision of late, 'etcdctl defrag', a larger \
                    --quota-backend-bytes, then 'etcdctl alarm disarm'",
            );
        }
        if endpoint.db_size.is_some_and(|size| size > DB_SIZE) {
            let used = endpoint.db_used.unwrap_or_default() >> 20;
            report.warn(
                format!(
                    "etcd's database at {name} has {} MiB, of which {used} are in use: by \
                    default it takes no more than \
                    2048",
                    endpoint.db_size.unwrap_or_default() >> 20
                ),
                "'etcdctl defrag' gives back what is not in use; where most is, a larger \
                    --quota-backend-bytes (8 GiB at most)",
            );
        }
    }
    if status.never_compacted {
        report.warn(
            "etcd has forgotten nothing in ten thousand changes: its database grows until it is \
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
            "this host has not joined it: nobody else knows its \
            devices",
            "'virt-usb fleet join'",
        ),
        (Some(joined), _) if number.is_some_and(|own| own != joined) => report.warn(
            format!(
                "this machine is number {joined} there, and its inventory has another: nothing \
                is published"
            ),
            "'virt-usb fleet join' gives its devices the ids that belong to it",
        ),
        (Some(_), published) if published < revision => report.warn(
            format!(
                "it knows revision {} of this host, and the inventory is at \
                {}",
                published.unwrap_or_default(),
                revision.unwrap_or_default()
            ),
            "look again in a second; if it stays so: 'journalctl -u virt-usbd' says what keeps the \
                agent from publishing",
        ),
        (Some(joined), _) => report.ok(format!("this host is number {joined}, and is published")),
    }
}
