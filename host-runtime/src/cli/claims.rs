//! The commands `claims` and `events`.

use std::process::ExitCode;

use anyhow::{Context as _, bail};
use serde::Serialize;
use virt_usb_model::{DeviceId, EventKind, InstanceId, Status};
use virt_usb_store::events::{EventRow, Filter};
use virt_usb_store::problems::Problem;
use virt_usb_store::release::Extent;
use virt_usb_store::watch::Moment;
use virt_usb_store::{ClaimRow, Record, Store};

use super::Session;
use super::arguments::Events;
use super::output::{or_dash, table};
use crate::agent::plan::{ABOUT_SERIAL, ABOUT_STOP, about_device};

pub(super) fn list(session: &Session) -> anyhow::Result<ExitCode> {
    let (devices, claims, problems, boot_id, store) = match session.remote()? {
        Some(api) => {
            let (claims, problems) = api.claims()?;
            // The agent of that host removes void claims before it serves the API.
            (api.devices(false)?, claims, problems, None, None)
        }
        None => {
            let store = session.store()?;
            let Moment { devices, claims, problems, .. } = store.moment(0)?;
            let now = session.context(&session.config()?, "claims")?;
            (devices, claims, problems, Some(now.boot_id), Some(store))
        }
    };
    let mut shown: Vec<Shown> =
        claims.into_iter().map(|claim| Shown::new(claim, &devices, &problems)).collect();
    for one in &mut shown {
        one.moved_to = moved_to(&one.claim, &devices, store.as_ref())?;
    }
    session.out.show(&shown, || {
        let row = |Shown { claim, unplugged, .. }: &Shown| {
            vec![
                claim.device_id.to_string(),
                claim.domain.clone(),
                claim.instance_uuid.to_string(),
                state(claim, *unplugged, boot_id.as_ref().unwrap_or(&claim.boot_id)),
                claim.hold.clone(),
                claim.created_at.clone(),
            ]
        };
        let mut text = table(
            &["DEVICE", "DOMAIN", "INSTANCE", "STATE", "HOLD", "SINCE"],
            shown.iter().map(row).collect(),
            "no device is held",
        );
        for problem in &problems {
            text.push_str(&format!("\n{}", in_the_way(problem)));
        }
        for hint in shown.iter().filter_map(|shown| moved(shown, &devices)) {
            text.push_str(&format!("\n{hint}"));
        }
        text
    })?;
    Ok(ExitCode::SUCCESS)
}

/// State of a claim, as it is shown to people.
pub(super) fn state(claim: &ClaimRow, unplugged: bool, boot_id: &str) -> String {
    match (claim.pending, claim.boot_id == boot_id || claim.is_lasting()) {
        (_, false) => "void (earlier boot)".to_owned(),
        (true, true) => format!("{}, pending", claim.state),
        (false, true) if claim.ending => "being detached".to_owned(),
        (false, true) if unplugged => "removed".to_owned(),
        (false, true) => claim.state.clone(),
    }
}

/// Describes a problem that keeps a device out of a guest.
pub(super) fn in_the_way(Problem { domain, about, what, since, .. }: &Problem) -> String {
    let lead = match about.as_str() {
        ABOUT_STOP => format!("{domain} is not running"),
        about if about.starts_with(ABOUT_SERIAL) => {
            format!("{domain} holds a device that may be mistaken for another")
        }
        about => format!("{domain} does not get {about}"),
    };
    format!("{lead} (since {since}): {what}")
}

/// The devices that may be the unplugged device of this claim in another port. A device without a
/// serial gets a new id in another port. The function returns the free devices of the same kind
/// that were plugged in later. If the audit has no event for a device, the device is included.
fn moved_to(
    claim: &ClaimRow,
    devices: &[Record],
    store: Option<&Store>,
) -> anyhow::Result<Vec<DeviceId>> {
    let gone = devices.iter().find(|r| r.entry.id == claim.device_id && !r.present);
    let Some(held) = gone.filter(|held| !held.key().serial_decides()) else {
        return Ok(Vec::new());
    };
    let last = |device: DeviceId, kinds: &[EventKind]| -> anyhow::Result<Option<i64>> {
        let Some(store) = store else { return Ok(None) };
        let events = store.events(&Filter { device: Some(device), ..Filter::default() })?;
        let is_meant = |e: &&EventRow| e.event.parse().is_ok_and(|kind| kinds.contains(&kind));
        Ok(events.iter().find(is_meant).map(|e| e.id))
    };
    let went = last(held.entry.id, &[EventKind::Removed])?;
    let alike = |r: &&Record| r.usb() == held.usb() && r.entry.state() == Ok(Status::Available);
    let mut found = Vec::new();
    for free in devices.iter().filter(alike).map(|r| r.entry.id) {
        let was_there = match (went, last(free, &[EventKind::Added, EventKind::Returned])?) {
            (Some(went), Some(came)) => came < went,
            _ => false,
        };
        // A scan records unplugged devices before new ones.
        if !was_there {
            found.push(free);
        }
    }
    Ok(found)
}

/// Advice if a held device was moved to another port.
fn moved(Shown { claim, moved_to, .. }: &Shown, devices: &[Record]) -> Option<String> {
    let place = |id: &DeviceId| {
        let device = devices.iter().find(|r| r.entry.id == *id)?;
        Some(format!("device {id} at port {}", device.entry.port_path))
    };
    let places: Vec<String> = moved_to.iter().filter_map(place).collect();
    let (domain, old) = (&claim.domain, claim.device_id);
    let (is, same, new) = match moved_to.as_slice() {
        [] => return None,
        [one] => ("is", "it is the same device", one.to_string()),
        _ => ("are", "one of them is the same device", "DEVICE".to_owned()),
    };
    Some(format!(
        "device {old} is unplugged, and {} of the same kind {is} free. Without a serial, virt-usb \
         cannot tell whether {same} in another port. If so: 'virt-usb attach {domain} {new}', \
         then 'virt-usb detach {domain} {old}'",
        places.join(", ")
    ))
}

#[derive(Serialize)]
struct Shown {
    #[serde(flatten)]
    claim: ClaimRow,
    /// Whether the claim's device is unplugged.
    unplugged: bool,
    /// Why the device is not in the guest.
    problem: Option<String>,
    /// Devices that may be the claim's device, if it was moved to another port.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    moved_to: Vec<DeviceId>,
}

impl Shown {
    fn new(claim: ClaimRow, devices: &[Record], problems: &[Problem]) -> Self {
        let unplugged = devices.iter().any(|r| r.entry.id == claim.device_id && !r.present);
        let about = about_device(claim.device_id);
        let problem =
            problems.iter().find(|p| p.instance_uuid == claim.instance_uuid && p.about == about);
        Self { unplugged, problem: problem.map(|p| p.what.clone()), moved_to: Vec::new(), claim }
    }
}

#[derive(Serialize)]
struct Released {
    instance_uuid: InstanceId,
    freed: Vec<DeviceId>,
    /// Number of assignments that ended.
    assignments: usize,
}

pub(super) fn release(session: &Session, instance: &str, force: bool) -> anyhow::Result<ExitCode> {
    let config = session.config()?;
    let mut store = session.store()?;
    let id = find_instance(&store, instance)?;
    if !force {
        bail!(
            "a guest that still runs keeps using its released devices, and another guest may get \
             them too: make sure that {instance} is gone, then add --force"
        );
    }
    let context = session.context(&config, "claims release")?;
    let assignments = store.assignments(id)?.len();
    let freed = store.release(id, Extent::Everything, "released by an operator", &context)?;
    let released = Released { instance_uuid: id, freed, assignments };
    session.out.show(&released, || match released.freed.as_slice() {
        [] if released.assignments > 0 => {
            format!("{instance} held no device; {} assignment(s) ended", released.assignments)
        }
        [] => format!("{instance} held nothing"),
        freed => {
            format!(
                "freed device {}",
                freed.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
            )
        }
    })?;
    Ok(ExitCode::SUCCESS)
}

/// Instances that hold devices under this domain name.
fn holders(store: &Store, name: &str) -> anyhow::Result<Vec<InstanceId>> {
    let mut named: Vec<InstanceId> =
        store.claims()?.into_iter().filter(|c| c.domain == name).map(|c| c.instance_uuid).collect();
    named.dedup();
    Ok(named)
}

/// Finds an instance that holds devices, by its UUID or by the name that its domain had then.
pub(super) fn find_instance(store: &Store, text: &str) -> anyhow::Result<InstanceId> {
    if let Ok(id) = text.parse() {
        return Ok(id);
    }
    match holders(store, text)?.as_slice() {
        [one] => Ok(*one),
        [] => {
            bail!("no domain named {text:?} holds a device: 'virt-usb claims' lists the holders")
        }
        several => bail!(
            "{} instances named {text:?} hold devices: use the UUID, which 'virt-usb claims' shows",
            several.len()
        ),
    }
}

/// Finds an instance by its UUID or name: one that holds a device, otherwise the last one of that
/// name in the audit trail.
fn find_in_audit(session: &Session, text: &str) -> anyhow::Result<InstanceId> {
    if let Ok(id) = text.parse() {
        return Ok(id);
    }
    if let Some(api) = session.remote()? {
        return api.server(text);
    }
    let store = session.store()?;
    if !holders(&store, text)?.is_empty() {
        return find_instance(&store, text);
    }
    store
        .last_named(text)?
        .with_context(|| format!("no instance named {text:?}: 'virt-usb events' shows their names"))
}

pub(super) fn events(session: &Session, options: &Events) -> anyhow::Result<ExitCode> {
    let device = options.device.as_ref().map(|wanted| session.device(wanted)).transpose()?;
    let instance =
        options.instance.as_deref().map(|name| find_in_audit(session, name)).transpose()?;
    let events = match session.remote()? {
        Some(api) => api.events(instance, device, options.limit)?,
        None => {
            let filter = Filter { instance, device, limit: options.limit, ..Filter::default() };
            let store = session.store()?;
            let events = store.events(&filter)?;
            if let Some(id) = device.filter(|_| events.is_empty())
                && !store.all_devices()?.iter().any(|record| record.entry.id == id)
            {
                bail!("there is no device {id}: 'virt-usb devices --all' lists all known devices");
            }
            events
        }
    };
    session.out.show(&events, || {
        let row = |e: &EventRow| {
            let domain = e.domain.clone().or_else(|| e.instance_uuid.map(|i| i.to_string()));
            vec![
                e.at.clone(),
                e.event.clone(),
                or_dash(e.device_id),
                or_dash(domain),
                or_dash(Some(&e.actor).filter(|actor| !actor.is_empty())),
                or_dash(e.detail.as_deref()),
            ]
        };
        table(
            &["AT", "EVENT", "DEVICE", "DOMAIN", "BY", "DETAIL"],
            events.iter().map(row).collect(),
            "no events yet",
        )
    })?;
    Ok(ExitCode::SUCCESS)
}
