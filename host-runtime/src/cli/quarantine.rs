//! The commands that change one device: `enable`, `disable`, `forget`, `quarantine`, `tag` and
//! `untag`.

use std::process::ExitCode;

use anyhow::bail;
use serde::Serialize;
use serde_json::json;
use virt_usb_hook::message;
use virt_usb_model::DeviceId;
use virt_usb_model::flavor::{MAX_TAGS, Tag};
use virt_usb_store::forget::Forgotten;
use virt_usb_store::quarantine::Wished;
use virt_usb_store::{Context, Record, Store};

use super::Session;
use super::output::table;
use crate::api::actions::DeviceAction;

#[derive(Serialize)]
struct Changed<'a> {
    changed: bool,
    device: &'a Record,
}

/// Opens the store, with a context that names the command.
fn open(session: &Session, doing: &str) -> anyhow::Result<(Store, Context)> {
    let config = session.config()?;
    let context = session.context(&config, doing)?;
    Ok((session.store()?, context))
}

/// Forgets a device that is not plugged in.
pub(super) fn forget(session: &Session, device: DeviceId) -> anyhow::Result<ExitCode> {
    let forgotten = match session.remote()? {
        Some(api) => api.forget(device)?,
        None => {
            let (mut store, context) = open(session, "forget")?;
            store.forget(device, &context)?
        }
    };
    let record = match &forgotten {
        Forgotten::Done(record) => record,
        Forgotten::Unknown => {
            bail!("there is no device {device}: 'virt-usb devices --all' lists all known devices")
        }
        Forgotten::Here(record) => bail!("{}", in_use(record)),
        Forgotten::Named(record, what) => {
            bail!("{} is named by its id in {what}: change that first", message::device(record))
        }
    };
    session.out.show(&json!({ "forgotten": record }), || {
        format!("{} was forgotten: if it returns, it gets a new id", message::device(record))
    })?;
    Ok(ExitCode::SUCCESS)
}

/// Explains why a device that is plugged in or held cannot be forgotten.
fn in_use(record: &Record) -> String {
    let (name, id) = (message::device(record), record.entry.id);
    match (record.present, record.entry.instance_uuid) {
        (false, Some(holder)) => format!(
            "{name} is unplugged, but {holder} holds it: 'virt-usb detach {holder} {id}' releases \
             it, then it can be forgotten"
        ),
        (_, holder) => {
            let held = holder.map(|holder| format!(", and {holder} holds it")).unwrap_or_default();
            format!(
                "{name} is plugged in{held}: only an unplugged device can be forgotten; 'virt-usb \
                 disable {id}' makes it unavailable"
            )
        }
    }
}

/// Returns the device after a change, and whether anything changed.
///
/// # Errors
/// If there is no such device, or it would have too many tags.
fn changed(wished: &Wished, device: DeviceId) -> anyhow::Result<Changed<'_>> {
    match wished {
        Wished::Done(device) => Ok(Changed { changed: true, device }),
        Wished::Already(device) => Ok(Changed { changed: false, device }),
        Wished::Unknown => {
            bail!("there is no device {device}: 'virt-usb devices --all' lists all known devices")
        }
        Wished::TooManyTags => {
            bail!(
                "device {device} would have more than {MAX_TAGS} tags: 'virt-usb untag' removes \
                 tags"
            )
        }
    }
}

/// Reports the result of a change; `now` describes the wanted state.
fn tell(
    session: &Session,
    wished: &Wished,
    device: DeviceId,
    now: &str,
) -> anyhow::Result<ExitCode> {
    let result = changed(wished, device)?;
    session.out.show(&result, || {
        let record = result.device;
        let already = if result.changed { "" } else { " already" };
        let status = match (&record.entry.instance_uuid, record.deleted) {
            (Some(instance), _) => {
                format!("{}, by {instance}, which keeps it until release", record.entry.status)
            }
            (None, 0) => {
                record.entry.state().map_or_else(|_| record.entry.status.clone(), |s| s.to_string())
            }
            (None, _) => "not plugged in".to_owned(),
        };
        format!("{} is{already} {now}; it is {status}", message::device(record))
    })?;
    Ok(ExitCode::SUCCESS)
}

pub(super) fn disable(
    session: &Session,
    device: DeviceId,
    reason: Option<&str>,
) -> anyhow::Result<ExitCode> {
    let reason =
        reason.and_then(virt_usb_model::clean_text).unwrap_or_else(|| "by an operator".into());
    let wished = match session.remote()? {
        Some(api) => api.change(device, &DeviceAction::Disable(Some(reason.clone())), |now| {
            now.disabled.as_ref() == Some(&reason)
        })?,
        None => {
            let (mut store, context) = open(session, "disable")?;
            store.set_disabled(device, Some(&reason), &context)?
        }
    };
    tell(session, &wished, device, &format!("disabled ({reason})"))
}

pub(super) fn enable(session: &Session, device: DeviceId) -> anyhow::Result<ExitCode> {
    let wished = match session.remote()? {
        Some(api) => api.change(device, &DeviceAction::Enable, |now| now.disabled.is_none())?,
        None => {
            let (mut store, context) = open(session, "enable")?;
            store.set_disabled(device, None, &context)?
        }
    };
    tell(session, &wished, device, "enabled")
}

pub(super) fn clear(session: &Session, device: DeviceId) -> anyhow::Result<ExitCode> {
    let wished = match session.remote()? {
        Some(api) => api.change(device, &DeviceAction::ClearQuarantine, |now| {
            now.quarantined.is_none() && now.flapping_until.is_none()
        })?,
        None => {
            let (mut store, context) = open(session, "quarantine clear")?;
            store.clear_quarantine(device, &context)?
        }
    };
    tell(session, &wished, device, "out of quarantine")
}

pub(super) fn tag(
    session: &Session,
    device: DeviceId,
    tags: &[Tag],
    add: bool,
) -> anyhow::Result<ExitCode> {
    let tags: Vec<String> = tags.iter().cloned().map(Tag::into_text).collect();
    let wished = match session.remote()? {
        Some(api) => {
            let action = if add { DeviceAction::AddTags } else { DeviceAction::RemoveTags };
            let is_so = |now: &Record| tags.iter().all(|tag| now.entry.tags.contains(tag) == add);
            api.change(device, &action(tags.clone()), is_so)?
        }
        None => set_tags(session, device, &tags, add)?,
    };
    let result = changed(&wished, device)?;
    session.out.show(&result, || {
        let name = message::device(result.device);
        let all = &result.device.entry.tags;
        if add {
            let already = if result.changed { "" } else { " already" };
            return format!("{name} is{already} tagged {}", all.join(", "));
        }
        let left = if all.is_empty() {
            "it has no tags".into()
        } else {
            format!("its tags: {}", all.join(", "))
        };
        if !result.changed {
            return format!("{name} has no tag {}; {left}", quoted(&tags));
        }
        let kept: Vec<String> = tags.iter().filter(|tag| all.contains(tag)).cloned().collect();
        let by_rule = match kept.is_empty() {
            true => String::new(),
            false => format!("; a whitelist rule still gives it {}", quoted(&kept)),
        };
        format!("{name}: removed{by_rule}; {left}")
    })?;
    Ok(ExitCode::SUCCESS)
}

fn quoted(tags: &[String]) -> String {
    tags.iter().map(|tag| format!("{tag:?}")).collect::<Vec<_>>().join(", ")
}

fn set_tags(
    session: &Session,
    device: DeviceId,
    tags: &[String],
    add: bool,
) -> anyhow::Result<Wished> {
    let (mut store, context) = open(session, if add { "tag" } else { "untag" })?;
    let known = store.all_devices()?.into_iter().find(|r| r.entry.id == device);
    if let Some(of_rule) =
        known.filter(|_| !add).and_then(|record| record.tag_of_a_rule(tags).cloned())
    {
        bail!(
            "device {device} has the tag {of_rule:?} from a whitelist rule: change that rule in \
                the configuration"
        );
    }
    let (more, fewer) = if add { (tags, &[][..]) } else { (&[][..], tags) };
    Ok(store.set_tags(device, more, fewer, &context)?)
}

#[derive(Serialize)]
struct Quarantined<'a> {
    #[serde(flatten)]
    device: &'a Record,
    why: &'a str,
    /// How the device differs from its last claim; `null` if it does not, or if that is unknown.
    altered: Option<String>,
}

pub(super) fn list(session: &Session) -> anyhow::Result<ExitCode> {
    let devices: Vec<(Record, Option<String>)> = match session.remote()? {
        Some(api) => api.set_aside()?,
        None => {
            let devices = session.store()?.all_devices()?.into_iter();
            devices
                .map(|device| (device.altered(), device))
                .map(|(altered, device)| (device, altered))
                .collect()
        }
    };
    let flapping =
        |r: &Record| r.flapping_until.as_ref().map(|_| "it connects and disconnects too often");
    let set_aside: Vec<Quarantined<'_>> = devices
        .iter()
        .filter_map(|(device, altered)| {
            let why = device.quarantined.as_deref().or_else(|| flapping(device))?;
            Some(Quarantined { device, why, altered: altered.clone() })
        })
        .collect();
    session.out.show(&set_aside, || {
        let row = |q: &Quarantined<'_>| {
            let e = &q.device.entry;
            let until =
                q.device.flapping_until.as_deref().filter(|_| q.device.quarantined.is_none());
            vec![
                e.id.to_string(),
                q.device.usb().to_string(),
                q.device.name().unwrap_or("-").to_owned(),
                e.port_path.to_string(),
                until.unwrap_or("an operator").to_owned(),
                q.why.to_owned(),
            ]
        };
        table(
            &["ID", "USB ID", "NAME", "PORT", "WAITS FOR", "BECAUSE"],
            set_aside.iter().map(row).collect(),
            "no device is quarantined",
        )
    })?;
    Ok(ExitCode::SUCCESS)
}
