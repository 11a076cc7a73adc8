//! Texts of refusals: one line that names the request, the matching devices, their holders, and
//! what to do.

use std::collections::BTreeMap;

use virt_usb_config::Config;
use virt_usb_config::host_env::{self, Agent};
use virt_usb_model::{
    Aliases, DeviceId, DeviceRequest, Selector, Status, UnavailableReason, UsbId,
};
use virt_usb_store::claim::{Claimant, Obstacle, Shortage, Why};
use virt_usb_store::{ClaimRow, Record, Store};

/// Describes a device, as in `device 5 (0529:0001 "HASP HL", port 1-1.4)`.
pub fn device(record: &Record) -> String {
    let name = record.name().map(|n| format!(" \"{n}\"")).unwrap_or_default();
    format!("device {} ({}{name}, port {})", record.entry.id, record.usb(), record.entry.port_path)
}

/// Maximum number of devices that a message lists.
const MAX_LISTED: usize = 3;

/// Facts about the host that a refusal adds to the result of the claim.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Host {
    /// Whether an agent is running, which keeps the inventory up to date.
    agent_runs: bool,
    /// For the number of each request without a match, a device that nearly matches it.
    near: BTreeMap<usize, String>,
}

impl Host {
    /// Reads the facts. Those that cannot be read are left out.
    pub fn of(config: &Config, store: &Store, short: &[Shortage]) -> Self {
        let agent_runs = host_env::agent(&config.state_dir) == Agent::Alive;
        let mut near = BTreeMap::new();
        if short.iter().any(|s| s.total == 0) {
            let devices = store.devices().unwrap_or_default();
            let hint = |s: &Shortage| {
                let hint =
                    devices.iter().find_map(|r| nearly(&s.request.selector, r, &config.aliases))?;
                Some((s.number, hint))
            };
            near = short.iter().filter(|s| s.total == 0).filter_map(hint).collect();
        }
        Self { agent_runs, near }
    }
}

/// Describes the difference between a device and a selector that nearly matches it. `None` if the
/// difference is obvious.
fn nearly(selector: &Selector, record: &Record, aliases: &Aliases) -> Option<String> {
    let plain = |text: &str| text.split_whitespace().collect::<String>().to_lowercase();
    let serial = || {
        let (wanted, is) = (selector.serial.as_deref()?, record.entry.serial.as_deref()?);
        let other = Selector { serial: Some(is.to_owned()), ..selector.clone() };
        let alike = plain(wanted) == plain(is) && record.is_selected_by(&other);
        alike.then(|| {
            format!("{} has the serial \"{is}\": letter case and spaces count", device(record))
        })
    };
    let kind = || {
        let usb = UsbId { vendor: selector.vendor_id?, product: selector.product_id? };
        let is = record.usb();
        let (vendor_id, product_id) = (Some(is.vendor), Some(is.product));
        let other = Selector { vendor_id, product_id, serial: None, ..selector.clone() };
        (aliases.join(usb, is) && record.is_selected_by(&other)).then(|| {
            format!(
                "{} is {usb} in another mode (usb_aliases): request {is}, or its id",
                device(record)
            )
        })
    };
    serial().or_else(kind)
}

/// Explains why requests cannot be satisfied. Requests from number `operators` on are assignments
/// by operators.
pub fn shortages(claimant: &Claimant, short: &[Shortage], operators: usize, host: &Host) -> String {
    first(short, |s| {
        let request = brief(&s.request.to_string());
        let text = |subject: String| shortage(&subject, claimant.project.is_some(), s, host);
        if s.number < operators {
            return text(format!(
                "{} asks for usb_devices[{}] {request}",
                claimant.domain, s.number
            ));
        }
        format!(
            "{}. This is an assignment: 'virt-usb detach {} {}' removes it",
            text(format!("{} has {request} assigned to it by an operator", claimant.domain)),
            claimant.domain,
            argument(&s.request)
        )
    })
}

/// Formats a request as an argument of the command line.
fn argument(request: &DeviceRequest) -> String {
    let Selector { id, vendor_id, product_id, .. } = &request.selector;
    let only_kind =
        Selector { vendor_id: *vendor_id, product_id: *product_id, ..Selector::default() };
    match (id, vendor_id, product_id) {
        (Some(id), _, _) => id.to_string(),
        (None, Some(vendor), Some(product)) if request.selector == only_kind => {
            format!("{vendor}:{product}")
        }
        _ => {
            let one = DeviceRequest { count: 1, ..request.clone() };
            format!("\"{}\"", one.to_string().replace('"', "\\\""))
        }
    }
}

/// Explains why an incoming guest cannot get its devices. `what` describes the device of each
/// place.
pub(crate) fn shortages_of_incoming(
    claimant: &Claimant,
    short: &[Shortage],
    what: impl Fn(usize) -> String,
    host: &Host,
) -> String {
    first(short, |s| {
        let subject = format!("{} comes with {}", claimant.domain, what(s.number));
        shortage(&subject, claimant.project.is_some(), s, host)
    })
}

/// Explains the first shortage, and counts the others. libvirt cuts the message at about 1000
/// bytes, and one reason suffices.
fn first(short: &[Shortage], text: impl Fn(&Shortage) -> String) -> String {
    let more = short.len().saturating_sub(1);
    let others = if more == 0 {
        String::new()
    } else {
        format!(" ({more} more of its requests cannot be served)")
    };
    short.first().map_or_else(String::new, |s| format!("{}{others}", text(s)))
}

/// Shortens a text of the domain for a message.
fn brief(text: &str) -> String {
    match text.char_indices().nth(120) {
        Some((cut, _)) => format!("{}…", &text[..cut]),
        None => text.to_owned(),
    }
}

/// Describes a request that cannot be satisfied, and the devices that match it.
fn shortage(subject: &str, owner_known: bool, short: &Shortage, host: &Host) -> String {
    let count = short.request.count;
    if short.total == 0 {
        let plug = "plug it in, or list the devices with 'virt-usb devices'";
        let what = host.near.get(&short.number).map_or(plug, String::as_str);
        return format!("{subject}, and this host has no such device: {what}");
    }
    let (hidden, shown): (Vec<&Obstacle>, Vec<&Obstacle>) =
        short.matching.iter().partition(|o| o.why == Why::Project);
    let mut parts: Vec<String> = shown.iter().take(MAX_LISTED).map(|o| obstacle(o)).collect();
    if !hidden.is_empty() {
        let owner = if owner_known { "" } else { ", and this domain has no owner project" };
        parts.push(format!("{} available to certain projects only{owner}", hidden.len()));
    }
    let more = short.total.saturating_sub(hidden.len() + shown.len().min(MAX_LISTED));
    if more > 0 {
        parts.push(format!("{more} not listed here ('virt-usb devices')"));
    }
    let missing = count.saturating_sub(short.got);
    let lack = if count == 1 { String::new() } else { format!(", {missing} too few") };
    if short.matching.is_empty() {
        return format!(
            "{subject}{lack}: this host has {} that match. {}",
            short.total,
            advice(short, host)
        );
    }
    format!(
        "{subject}{lack}; of {} that match: {}. {}",
        short.total,
        parts.join("; "),
        advice(short, host)
    )
}

fn obstacle(obstacle: &Obstacle) -> String {
    let subject = device(&obstacle.device);
    match &obstacle.why {
        Why::HeldBy(claim) => format!(
            "{subject} is held by {} ({}) since {}",
            claim.domain, claim.instance_uuid, claim.created_at
        ),
        Why::OtherRequest => format!("{subject} serves another request of this domain"),
        Why::NotThere(why) => format!("{subject} is not where it was: {why}"),
        Why::Project => format!("{subject} is available to certain projects only"),
        Why::Unavailable => unavailable(&obstacle.device),
    }
}

/// Describes an unavailable device, as in `device 5 (…) is unavailable (quarantined): g has used
/// it`.
fn unavailable(record: &Record) -> String {
    // The status of a held device is that of its claim. The reason is in another column.
    let held = record.entry.instance_uuid.is_some();
    let set_aside = record.withheld.filter(|_| held).map(Status::Unavailable);
    let status = set_aside.or_else(|| record.entry.state().ok()).unwrap_or(Status::Available);
    let more = match status.reason() {
        Some(UnavailableReason::HostUse) => record.entry.host_use.as_deref(),
        Some(UnavailableReason::Disabled) => record.disabled.as_deref(),
        Some(UnavailableReason::Quarantined) => record.quarantined.as_deref(),
        Some(UnavailableReason::Flapping) => record.flapping_until.as_deref(),
        Some(UnavailableReason::Whitelist | UnavailableReason::Unreachable) | None => None,
    };
    format!("{} is {status}{}", device(record), more.map(|m| format!(": {m}")).unwrap_or_default())
}

/// Explains the refusal of a domain whose own XML names a device that another instance holds.
pub(crate) fn held_by_hand(domain: &str, record: &Record, claim: &ClaimRow) -> String {
    let advice = match is_kept(claim) {
        true => format!(
            "remove the <hostdev>, or run 'virt-usb claims release {} --force' to end that \
             guest's reservation",
            claim.instance_uuid
        ),
        false => "remove the <hostdev>, or stop that guest".to_owned(),
    };
    format!(
        "{domain} has a <hostdev> for {} in its own XML, and {} ({}) holds it since {}: {advice}",
        device(record),
        claim.domain,
        claim.instance_uuid,
        claim.created_at
    )
}

/// Explains the refusal of an incoming guest whose device was unplugged in the meantime.
pub(crate) fn lost(domain: &str, id: DeviceId) -> String {
    format!(
        "{domain} has a <hostdev> (alias ua-usb-{id}) in its XML with an address that is not that \
         of device {id}: the device was unplugged or replugged after the restore or migration \
         began. Plug it in and try again"
    )
}

/// Explains the refusal of a domain whose own XML names a disabled, quarantined or flapping device.
pub(crate) fn set_aside_by_hand(domain: &str, record: &Record) -> String {
    let advice = set_aside(record).unwrap_or_default();
    format!("{domain} has a <hostdev> in its own XML, and {}. {advice}", unavailable(record))
}

/// Advice for a device that is disabled, quarantined or flapping.
fn set_aside(record: &Record) -> Option<String> {
    let id = record.entry.id;
    match record.entry.state().ok()?.reason().or(record.withheld)? {
        UnavailableReason::Disabled => {
            Some(format!("'virt-usb enable {id}' makes it available again"))
        }
        UnavailableReason::Quarantined => {
            Some(format!("Inspect it, then run 'virt-usb quarantine clear {id}'"))
        }
        UnavailableReason::Flapping => Some(
            "Check its plug, cable and hub; it is available again once it stays connected".into(),
        ),
        UnavailableReason::Whitelist
        | UnavailableReason::HostUse
        | UnavailableReason::Unreachable => None,
    }
}

/// Advice for the most frequent obstacle.
fn advice(short: &Shortage, host: &Host) -> String {
    let any = |test: fn(&Why) -> bool| short.matching.iter().any(|o| test(&o.why));
    let holders = || {
        short.matching.iter().filter_map(|o| match &o.why {
            Why::HeldBy(claim) => Some(&**claim),
            _ => None,
        })
    };
    // Prefer a holder whose stop releases the device.
    if let Some(claim) = holders().find(|c| !is_kept(c)) {
        return format!(
            "Stop the guest that holds it, or 'virt-usb claims release {} --force' if that guest \
                is gone",
            claim.instance_uuid
        );
    }
    if let Some(claim) = holders().next() {
        return format!(
            "It is reserved for that guest even while the guest is off. If the guest is off, \
             'virt-usb claims release {} --force' ends the reservation",
            claim.instance_uuid
        );
    }
    if any(|w| matches!(w, Why::NotThere(_))) {
        let is_recorded = |o: &Obstacle| matches!(o.why, Why::NotThere(_)) && !o.device.present;
        match (host.agent_runs, short.matching.iter().any(is_recorded)) {
            (true, _) => "Plug it in again; the agent records it automatically",
            (false, true) => "Plug it in again, then run 'virt-usb discover' on this host",
            (false, false) => "Run 'virt-usb discover' on this host",
        }
    } else if let Some(aside) = short.matching.iter().find_map(|o| set_aside(&o.device)) {
        return aside;
    } else if any(|w| matches!(w, Why::Unavailable)) {
        "'virt-usb whitelist check' shows why it is not offered"
    } else if any(|w| matches!(w, Why::Project)) {
        "'virt-usb whitelist check' shows to which projects"
    } else {
        "Plug in one more"
    }
    .to_owned()
}

/// Whether the instance holds the device although its guest does not have it, because the guest is
/// off or has just started.
fn is_kept(claim: &ClaimRow) -> bool {
    claim.is_lasting() && !claim.is_allocated() && !claim.pending
}
