//! `claims` and `events`.

use std::process::ExitCode;

use anyhow::{Context as _, bail};
use serde::Serialize;
use virt_usb_model::{DeviceId, InstanceId, Status};
use virt_usb_store::events::{EventRow, Filter};
use virt_usb_store::give_back::Extent;
use virt_usb_store::problems::Problem;
use virt_usb_store::watch::Moment;
use virt_usb_store::{ClaimRow, Record, Store};

use super::Session;
use super::arguments::Events;
use super::output::{or_dash, table};
use crate::agent::plan::{ABOUT_SERIAL, ABOUT_STOP, about_device};

pub(super) fn list(session: &Session) -> anyhow::Result<ExitCode> {
    let (devices, claims, problems, boot_id) = match session.remote()? {
        Some(api) => {
            let (claims, problems) = api.claims()?;
            // An agent sweeps before it serves.
            (api.devices(false)?, claims, problems, None)
        }
        None => {
            let Moment { devices, claims, problems, .. } = session.store()?.moment(0)?;
            let now = session.context(&session.config()?, "claims")?;
            (devices, claims, problems, Some(now.boot_id))
        }
    };
    let shown: Vec<Shown> = claims.into_iter().map(|claim| Shown::new(claim, &devices, &problems)).collect();
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
            "no device is held by anybody",
        );
        for problem in &problems {
            text.push_str(&format!("\n{}", in_the_way(problem)));
        }
        for hint in shown.iter().filter_map(|shown| moved(&shown.claim, &devices)) {
            text.push_str(&format!("\n{hint}"));
        }
        text
    })?;
    Ok(ExitCode::SUCCESS)
}

/// How far a claim has come, in words.
pub(super) fn state(claim: &ClaimRow, unplugged: bool, boot_id: &str) -> String {
    match (claim.pending, claim.boot_id == boot_id || claim.hold == "instance") {
        (_, false) => "void (earlier boot)".to_owned(),
        (true, true) => format!("{}, to be confirmed", claim.state),
        (false, true) if claim.ending => "being detached".to_owned(),
        (false, true) if unplugged => "unplugged".to_owned(),
        (false, true) => claim.state.clone(),
    }
}

/// What keeps a device out of a guest.
pub(super) fn in_the_way(Problem { domain, about, what, since, .. }: &Problem) -> String {
    let lead = match about.as_str() {
        ABOUT_STOP => format!("{domain} does not run"),
        about if about.starts_with(ABOUT_SERIAL) => format!("{domain} holds a device that may be mistaken"),
        about => format!("{domain} does not get {about}"),
    };
    format!("{lead} (since {since}): {what}")
}

/// What to do if a held device without a serial of its own was moved to another port: there it is another device.
fn moved(claim: &ClaimRow, devices: &[Record]) -> Option<String> {
    let held = devices.iter().find(|r| r.entry.id == claim.device_id && !r.present)?;
    if held.key().serial_decides() {
        return None;
    }
    let alike = |r: &&Record| r.usb() == held.usb() && r.entry.status == Status::Available.name();
    let free = devices.iter().find(alike)?;
    let (domain, old, new) = (&claim.domain, held.entry.id, free.entry.id);
    Some(format!(
        "device {new} of the same kind as device {old} is free at port {}. No serial says whether it is the same device, \
         moved. If it is: 'virt-usb attach {domain} {new}', then 'virt-usb detach {domain} {old}'",
        free.entry.port_path
    ))
}

#[derive(Serialize)]
struct Shown {
    #[serde(flatten)]
    claim: ClaimRow,
    /// Whether the device is away.
    unplugged: bool,
    /// Why the device is not in the guest.
    problem: Option<String>,
}

impl Shown {
    fn new(claim: ClaimRow, devices: &[Record], problems: &[Problem]) -> Self {
        let unplugged = devices.iter().any(|r| r.entry.id == claim.device_id && !r.present);
        let about = about_device(claim.device_id);
        let problem = problems.iter().find(|p| p.instance_uuid == claim.instance_uuid && p.about == about);
        Self { unplugged, problem: problem.map(|p| p.what.clone()), claim }
    }
}

#[derive(Serialize)]
struct Released {
    instance_uuid: InstanceId,
    freed: Vec<DeviceId>,
    /// How many assignments ended.
    assignments: usize,
}

pub(super) fn release(session: &Session, instance: &str, force: bool) -> anyhow::Result<ExitCode> {
    let config = session.config()?;
    let mut store = session.store()?;
    let id = find_instance(&store, instance)?;
    if !force {
        bail!(
            "a guest that still runs keeps using what is released here, and another guest may be given it too: make sure that {instance} is gone, then add --force"
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
            format!("freed device {}", freed.iter().map(ToString::to_string).collect::<Vec<_>>().join(", "))
        }
    })?;
    Ok(ExitCode::SUCCESS)
}

/// By UUID, or by the name that the domain had when it claimed.
pub(super) fn find_instance(store: &Store, text: &str) -> anyhow::Result<InstanceId> {
    if let Ok(id) = text.parse() {
        return Ok(id);
    }
    let mut named: Vec<InstanceId> =
        store.claims()?.into_iter().filter(|c| c.domain == text).map(|c| c.instance_uuid).collect();
    named.dedup();
    match named.as_slice() {
        [one] => Ok(*one),
        [] => bail!("no domain of the name {text:?} holds a device: 'virt-usb claims' shows who does"),
        _ => bail!(
            "{} instances of the name {text:?} hold devices: name the UUID, 'virt-usb claims' shows it",
            named.len()
        ),
    }
}

pub(super) fn events(session: &Session, options: &Events) -> anyhow::Result<ExitCode> {
    let instance = options.instance.as_deref().map(str::parse).transpose().context("--instance")?;
    let device = options.device.as_deref().map(str::parse).transpose().context("--device")?;
    let events = match session.remote()? {
        Some(api) => api.events(instance, device, options.limit)?,
        None => {
            let filter = Filter { instance, device, limit: options.limit, ..Filter::default() };
            session.store()?.events(&filter)?
        }
    };
    session.out.show(&events, || {
        let row = |e: &EventRow| {
            let whom = e.domain.clone().or_else(|| e.instance_uuid.map(|i| i.to_string()));
            vec![
                e.at.clone(),
                e.event.clone(),
                or_dash(e.device_id),
                or_dash(whom),
                or_dash(Some(&e.actor).filter(|actor| !actor.is_empty())),
                or_dash(e.detail.as_deref()),
            ]
        };
        table(
            &["AT", "EVENT", "DEVICE", "DOMAIN", "BY", "DETAIL"],
            events.iter().map(row).collect(),
            "nothing has happened yet",
        )
    })?;
    Ok(ExitCode::SUCCESS)
}
