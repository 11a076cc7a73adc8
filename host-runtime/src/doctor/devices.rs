//! The devices: those in quarantine, and those without a driver.

use virt_usb_config::Config;
use virt_usb_config::sysfs::{attribute, device_dir};
use virt_usb_model::Class;
use virt_usb_store::Record;

use super::{Host, Report};

/// Reports a device that waits for an operator.
fn quarantined(record: &Record, report: &Report) {
    let subject = format!("device {} (port {})", record.entry.id, record.entry.port_path);
    let clear = format!("inspect it, then run 'virt-usb quarantine clear {}'", record.entry.id);
    match (&record.quarantined, &record.flapping_until, record.altered()) {
        (Some(why), _, Some(_)) => report.broken(format!("{subject} is quarantined: {why}"), clear),
        (Some(why), _, None) => report.warn(format!("{subject} is quarantined: {why}"), clear),
        (None, Some(until), _) => report.warn(
            format!(
                "{subject} connects and disconnects too often; it is unavailable until {until}"
            ),
            "check its plug, cable and hub",
        ),
        (None, None, _) => {}
    }
}

pub(super) fn check(host: &Host, report: &Report) {
    let Ok(devices) = host.store().and_then(|store| store.devices()) else { return };
    let free = devices.iter().filter(|r| r.present && r.entry.instance_uuid.is_none());
    let mut none = true;
    for record in free {
        for interface in driverless(&host.config, record) {
            none = false;
            // After a kill -9 of QEMU, no program returns the device to the host's driver.
            report.warn(
                format!(
                    "device {} (port {}): no instance holds it, but its interface {interface} has \
                     no driver, perhaps because its guest was killed",
                    record.entry.id, record.entry.port_path
                ),
                format!(
                    "'echo {interface} > {}/bus/usb/drivers_probe' gives it to the host's driver; \
                     the next guest can use it either way",
                    host.config.sysfs_root.display()
                ),
            );
        }
    }
    if none {
        report.ok("no available device was left without its driver");
    }
    for record in &devices {
        quarantined(record, report);
    }
}

/// Interfaces of an available device that have no driver, although the kernel has one for their
/// class, such as storage, printers, keyboards or cameras.
fn driverless(config: &Config, record: &Record) -> Vec<String> {
    const DRIVEN: [u8; 7] = [0x01, 0x02, 0x03, 0x07, 0x08, 0x0e, 0xe0];
    let dir = device_dir(&config.sysfs_root, &record.entry.port_path);
    let Ok(entries) = std::fs::read_dir(&dir) else { return Vec::new() };
    let names = entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned());
    let interfaces = names.filter(|name| name.starts_with(&format!("{}:", record.entry.port_path)));
    let mut left: Vec<String> = interfaces
        .filter(|name| {
            let class = attribute(&dir.join(name), "bInterfaceClass").ok().flatten();
            let class = class.and_then(|class| class.parse::<Class>().ok());
            class.is_some_and(|c| DRIVEN.into_iter().any(|driven| Class::new(driven) == c))
                && !dir.join(name).join("driver").exists()
        })
        .collect();
    left.sort();
    left
}
