//! Refusals: one line that names the request, what is there, who holds it, and what to do.

use virt_usb_model::{Reason, Status};
use virt_usb_store::Record;
use virt_usb_store::claim::{Asker, Obstacle, Shortage, Why};

/// `device 5 (0529:0001 "HASP HL", port 1-1.4)`
pub fn device(record: &Record) -> String {
    let name = record.name().map(|n| format!(" \"{n}\"")).unwrap_or_default();
    format!("device {} ({}{name}, port {})", record.entry.id, record.usb(), record.entry.port_path)
}

/// How many devices a message lists: more would not be read.
const SHOWN: usize = 3;

/// All requests that cannot be served, each with what there is.
pub fn shortages(asker: &Asker, short: &[Shortage]) -> String {
    first(short, |s| {
        let asked =
            format!("{} asks for usb_devices[{}] {}", asker.domain, s.number, brief(&s.request.to_string()));
        shortage(&asked, asker.project.is_some(), s)
    })
}

/// The same for a guest that comes in with devices; `what` names the device of each place.
pub(crate) fn shortages_of_incoming(
    asker: &Asker,
    short: &[Shortage],
    what: impl Fn(usize) -> String,
) -> String {
    first(short, |s| {
        shortage(&format!("{} comes with {}", asker.domain, what(s.number)), asker.project.is_some(), s)
    })
}

/// The first of them: libvirt cuts what it shows at about a thousand bytes, and one reason is enough to refuse.
fn first(short: &[Shortage], text: impl Fn(&Shortage) -> String) -> String {
    let more = short.len().saturating_sub(1);
    let others =
        if more == 0 { String::new() } else { format!(" ({more} more of its requests cannot be served)") };
    short.first().map_or_else(String::new, |s| format!("{}{others}", text(s)))
}

/// Text of the domain's, cut to what a message can bear.
fn brief(text: &str) -> String {
    match text.char_indices().nth(120) {
        Some((cut, _)) => format!("{}…", &text[..cut]),
        None => text.to_owned(),
    }
}

/// What was asked for and cannot be had, and what there is.
fn shortage(asked: &str, owner_known: bool, short: &Shortage) -> String {
    let count = short.request.count;
    if short.total == 0 {
        return format!(
            "{asked}, and this host has no such device: plug it in, or see 'virt-usb devices' for what there is"
        );
    }
    let (hidden, shown): (Vec<&Obstacle>, Vec<&Obstacle>) =
        short.matching.iter().partition(|o| o.why == Why::Project);
    let mut parts: Vec<String> = shown.iter().take(SHOWN).map(|o| obstacle(o)).collect();
    if !hidden.is_empty() {
        let owner = if owner_known { "" } else { ", and this domain names no owner" };
        parts.push(format!("{} given to certain projects only{owner}", hidden.len()));
    }
    let more = short.total.saturating_sub(hidden.len() + shown.len().min(SHOWN));
    if more > 0 {
        parts.push(format!("{more} not listed here ('virt-usb devices')"));
    }
    let missing = count.saturating_sub(short.got);
    let lack = if count == 1 { String::new() } else { format!(", {missing} too few") };
    if short.matching.is_empty() {
        return format!("{asked}{lack}: this host has {} that match. {}", short.total, advice(short));
    }
    format!("{asked}{lack}; of {} that match: {}. {}", short.total, parts.join("; "), advice(short))
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
        Why::Project => format!("{subject} is given to certain projects only"),
        Why::Unavailable => unavailable(&obstacle.device),
    }
}

/// `device 5 (…) is unavailable (quarantined): g has used it`
fn unavailable(record: &Record) -> String {
    // A device that is held has its holder's state: why it cannot be had stands beside that.
    let held = record.entry.instance_uuid.is_some();
    let set_aside = record.withheld.filter(|_| held).map(Status::Unavailable);
    let status = set_aside.or_else(|| record.entry.state().ok()).unwrap_or(Status::Available);
    let more = match status.reason() {
        Some(Reason::HostUse) => record.entry.host_use.as_deref(),
        Some(Reason::Disabled) => record.disabled.as_deref(),
        Some(Reason::Quarantined) => record.quarantined.as_deref(),
        Some(Reason::Flapping) => record.flapping_until.as_deref(),
        Some(Reason::Whitelist | Reason::Unreachable) | None => None,
    };
    format!("{} is {status}{}", device(record), more.map(|m| format!(": {m}")).unwrap_or_default())
}

/// A domain's own XML names a device that is set aside.
pub(crate) fn set_aside_by_hand(domain: &str, record: &Record) -> String {
    let advice = set_aside(record).unwrap_or_default();
    format!("{domain} has a <hostdev> in its own XML, and {}. {advice}", unavailable(record))
}

/// What to do about a device that is set aside whatever the rules say.
fn set_aside(record: &Record) -> Option<&'static str> {
    match record.entry.state().ok()?.reason().or(record.withheld)? {
        Reason::Disabled => Some("'virt-usb enable DEVICE' offers it again"),
        Reason::Quarantined => Some("Look at it, then 'virt-usb quarantine clear DEVICE'"),
        Reason::Flapping => {
            Some("Look at its plug, its cable and its hub; it is offered again once it has stayed")
        }
        Reason::Whitelist | Reason::HostUse | Reason::Unreachable => None,
    }
}

/// What to do, by what stands in the way most often.
fn advice(short: &Shortage) -> &'static str {
    let any = |test: fn(&Why) -> bool| short.matching.iter().any(|o| test(&o.why));
    if any(|w| matches!(w, Why::HeldBy(_))) {
        "Stop the guest that holds it, or 'virt-usb claims release INSTANCE --force' if that guest is gone"
    } else if any(|w| matches!(w, Why::NotThere(_))) {
        "Run 'virt-usb discover' on this host"
    } else if let Some(aside) = short.matching.iter().find_map(|o| set_aside(&o.device)) {
        aside
    } else if any(|w| matches!(w, Why::Unavailable)) {
        "'virt-usb whitelist check' says why it is not offered"
    } else if any(|w| matches!(w, Why::Project)) {
        "The whitelist of this host says to which ('virt-usb whitelist check')"
    } else {
        "Plug in one more"
    }
}
