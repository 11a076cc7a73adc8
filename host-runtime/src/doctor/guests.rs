//! Checks whether domains can have the devices that they request.

use std::cmp::Reverse;

use virt_usb_domxml::Domain;
use virt_usb_hook::verify::{Delivery, NO_SPICE, missing_redirdevs, port_speeds, room};
use virt_usb_model::{Flavor, SpeedMask};
use virt_usb_store::Record;

use super::{Host, Report};
use crate::agent::observe::flavor;
use crate::hypervisor::Libvirt;

pub(super) fn check(host: &Host, report: &Report) {
    // The check of libvirt reports that it does not answer.
    let Ok(libvirt) = Libvirt::open(&host.config.libvirt_uri) else { return };
    let (Ok(store), Ok(definitions)) = (host.store(), libvirt.definitions()) else { return };
    let known = store.devices().unwrap_or_default();
    let mut asking = 0;
    for xml in definitions {
        let Ok(domain) = virt_usb_domxml::read(xml.as_bytes()) else { continue };
        match flavor(&domain, &host.config, &store) {
            Ok(flavor) if flavor.is_empty() => {}
            Ok(flavor) => {
                asking += 1;
                if let Some(why) = unfit(&domain, &flavor, &known) {
                    report.warn(
                        format!("{} requests USB devices, but {why}", domain.name),
                        "fix the problem above; until then its starts are refused",
                    );
                }
            }
            Err(why) => report.warn(
                format!("{}: its flavor cannot be read: {why}", domain.name),
                "correct it in the domain's metadata ('virsh metadata', 'virsh edit')",
            ),
        }
    }
    report.ok(format!("{asking} domain(s) request USB devices"));
}

/// Port speeds for the least demanding devices that match the flavor. If these do not fit, no
/// others do.
fn speeds(flavor: &Flavor, known: &[Record]) -> Vec<SpeedMask> {
    let mut speeds = Vec::new();
    for request in &flavor.usb_devices {
        let matching = known.iter().filter(|record| record.is_selected_by(&request.selector));
        let mut there: Vec<SpeedMask> = matching.map(port_speeds).collect();
        there.sort_by_key(|speeds| (speeds.slowest(), Reverse(speeds.fastest())));
        there.resize(request.count as usize, SpeedMask::ANY);
        speeds.extend(there);
    }
    speeds
}

/// Returns why a domain cannot have the devices of its flavor.
fn unfit(domain: &Domain, flavor: &Flavor, known: &[Record]) -> Option<String> {
    let redirections = missing_redirdevs(domain, flavor.usb_redirection_devices.len());
    if !redirections.is_empty() && !domain.spice {
        return Some(NO_SPICE.into());
    }
    // Devices in the definition have their ports already.
    let there = domain.hostdevs.iter().filter(|h| h.injected().is_some()).count();
    let mut wanted: Vec<SpeedMask> = speeds(flavor, known).into_iter().skip(there).collect();
    wanted.extend(redirections.iter().map(|_| SpeedMask::ANY));
    room(domain, &wanted, Delivery::Unknown).err()
}
