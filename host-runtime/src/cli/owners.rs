//! The command `owner`: owner projects of instances.

use std::process::ExitCode;

use anyhow::bail;
use serde::Serialize;
use virt_usb_model::{InstanceId, ProjectId};
use virt_usb_store::Owner;

use super::Session;
use super::guests::{find, open};
use super::output::table;
use crate::hypervisor::{Failure, Hypervisor as _};

pub(super) fn list(session: &Session) -> anyhow::Result<ExitCode> {
    let owners = match session.remote()? {
        Some(api) => api.owners()?,
        None => session.store()?.owners()?,
    };
    session.out.show(&owners, || {
        let row = |o: &Owner| {
            vec![
                o.domain.clone(),
                o.instance_uuid.to_string(),
                o.project_id.to_string(),
                o.created_at.clone(),
            ]
        };
        table(
            &["DOMAIN", "INSTANCE", "PROJECT", "SINCE"],
            owners.iter().map(row).collect(),
            "no owners are set here: an instance has the owner that its domain names",
        )
    })?;
    Ok(ExitCode::SUCCESS)
}

#[derive(Serialize)]
struct Owned<'a> {
    instance_uuid: InstanceId,
    project_id: Option<&'a ProjectId>,
}

pub(super) fn set(session: &Session, name: &str, project: &ProjectId) -> anyhow::Result<ExitCode> {
    let instance = match session.guests_api()? {
        Some(api) => {
            let instance = api.server(name)?;
            api.set_owner(instance, Some(project))?;
            instance
        }
        None => {
            let (libvirt, mut worker) = open(session)?;
            let instance = find(&libvirt, name)?;
            let Some(xml) = libvirt.xml(instance)? else {
                bail!("the domain {name} was just undefined")
            };
            let domain = virt_usb_domxml::read(xml.as_bytes())?;
            if let Some(own) = domain.project {
                bail!(
                    "the domain {name} names project {own} as its owner: an owner set here would \
                     have no effect"
                );
            }
            let context = session.context(&session.config()?, "owner set")?;
            worker.store.set_owner(instance, &domain.name, Some(project), &context)?;
            instance
        }
    };
    let owned = Owned { instance_uuid: instance, project_id: Some(project) };
    session.out.show(&owned, || format!("{name} now belongs to project {project}"))?;
    Ok(ExitCode::SUCCESS)
}

pub(super) fn clear(session: &Session, name: &str) -> anyhow::Result<ExitCode> {
    let instance = match session.guests_api()? {
        Some(api) => {
            let instance = api.server(name)?;
            api.set_owner(instance, None)?;
            instance
        }
        None => {
            let mut store = session.store()?;
            let instance = known(session, &store.owners()?, name)?;
            let context = session.context(&session.config()?, "owner clear")?;
            store.set_owner(instance, name, None, &context)?;
            instance
        }
    };
    session.out.show(&Owned { instance_uuid: instance, project_id: None }, || {
        format!("{name} now has the owner that its domain names, if any")
    })?;
    Ok(ExitCode::SUCCESS)
}

/// Finds an instance by its UUID, by the name recorded with its owner, or by libvirt's name.
fn known(session: &Session, owners: &[Owner], name: &str) -> anyhow::Result<InstanceId> {
    if let Ok(id) = name.parse() {
        return Ok(id);
    }
    let named: Vec<&Owner> = owners.iter().filter(|owner| owner.domain == name).collect();
    if let [one] = named.as_slice() {
        return Ok(one.instance_uuid);
    }
    let (libvirt, _) = open(session)?;
    match libvirt.resolve(name) {
        Err(Failure::Gone) => {
            bail!(
                "no owner is set for a domain {name:?}: 'virt-usb owner list' shows the owners \
                that are set"
            )
        }
        found => Ok(found?),
    }
}
