//! The commands `fleet join`, `leave`, `status` and `simulate`.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::bail;
use serde::Serialize;
use virt_usb_config::{Config, Fleet, User};
use virt_usb_filter_host::Limits;
use virt_usb_model::{Flavor, Grant};
use virt_usb_store::renumber::{Numbered, Renumbered};

use super::Session;
use super::arguments::{Credentials, Simulate};
use super::output::{complain, or_dash, table};
use crate::inventory::host_name;
use crate::publish::simulate;
use virt_usb_fleet::replicated::{Shared as _, contribute};
use virt_usb_fleet::{join, wait};

/// The configured fleet, with the credentials of the arguments.
fn fleet(config: &Config, credentials: Option<&Credentials>) -> anyhow::Result<Fleet> {
    let Some(mut fleet) = config.fleet.clone() else {
        bail!("the configuration has no [fleet] section: add one with its endpoints first");
    };
    if let Some(Credentials { user: Some(name), password_file: Some(password_file) }) = credentials
    {
        fleet.user = Some(User { name: name.clone(), password_file: password_file.clone() });
    }
    Ok(fleet)
}

#[derive(Serialize)]
struct Joined {
    host: String,
    number: u64,
    renumbered: Option<Renumbered>,
    /// Flavors that the fleet defines in another way; its definitions apply from now on.
    replaced_flavors: Vec<String>,
    /// Grants that the fleet defines in another way.
    replaced_grants: Vec<String>,
}

pub(super) fn join(session: &Session, credentials: &Credentials) -> anyhow::Result<ExitCode> {
    let config = session.config()?;
    let fleet = fleet(&config, Some(credentials))?;
    let host = host_name(&config.procfs_root)?;
    let mut store = session.make_store(&config)?;
    // Check before etcd is changed: the renumbering at the end would be refused.
    let held = store.claims()?;
    if store.node()? == virt_usb_store::LONE_NODE && !held.is_empty() {
        bail!("{}", is_held(&held));
    }
    let number = wait(join::join(&fleet, &host))?;
    let context = session.context(&config, "fleet join")?;
    store.restart_lock_timeout();
    let renumbered = match store.renumber(&host, number, &context)? {
        Numbered::Already => None,
        Numbered::Renumbered(renumbered) => Some(renumbered),
        Numbered::Held(held) => bail!("{}", is_held(&held)),
    };
    let replaced_flavors = wait(contribute(&fleet, &Flavor::all(&store)?))?;
    let replaced_grants = wait(contribute(&fleet, &Grant::all(&store)?))?;
    let joined = Joined { host, number, renumbered, replaced_flavors, replaced_grants };
    session.out.show(&joined, || text(&joined))?;
    Ok(ExitCode::SUCCESS)
}

fn is_held(held: &[virt_usb_store::ClaimRow]) -> String {
    let list: Vec<String> = held
        .iter()
        .map(|claim| format!("device {} by {}", claim.device_id, claim.domain))
        .collect();
    format!(
        "devices are held, and joining changes the id of each device: {}: stop these guests, or \
         detach the devices, and try again",
        list.join(", ")
    )
}

fn text(joined: &Joined) -> String {
    let Joined { host, number, renumbered, replaced_flavors, replaced_grants } = joined;
    let mut text = match renumbered {
        None => format!("{host} is in the fleet, with number {number} as before"),
        Some(Renumbered { devices, added, .. }) => format!(
            "{host} is in the fleet, with number {number}: {added} was added to the id of each of \
             its {devices} device(s)"
        ),
    };
    if let Some(Renumbered { assignments, flavors, grants, .. }) = renumbered {
        if *assignments > 0 {
            text.push_str(&format!("\n{assignments} assignment(s) name the new ids"));
        }
        for (noun, names) in
            [("flavor", flavors), ("grant", grants)].iter().filter(|(_, n)| !n.is_empty())
        {
            text.push_str(&format!(
                "\nthese {noun}s name a device by its old id, change them with 'virt-usb {noun} \
                 set': {}",
                names.join(", ")
            ));
        }
    }
    let replaced = [("flavors", replaced_flavors), ("grants", replaced_grants)];
    for (what, names) in replaced.iter().filter(|(_, names)| !names.is_empty()) {
        text.push_str(&format!(
            "\nthe fleet has other {what} with these names, which apply from now on: {}",
            names.join(", ")
        ));
    }
    text
}

#[derive(Serialize)]
struct Left<'a> {
    host: &'a str,
    was_joined: bool,
}

pub(super) fn leave(
    session: &Session,
    host: Option<&str>,
    credentials: &Credentials,
) -> anyhow::Result<ExitCode> {
    let config = session.config()?;
    let fleet = fleet(&config, Some(credentials))?;
    let own = host_name(&config.procfs_root)?;
    let host = host.unwrap_or(&own);
    let was_joined = wait(join::leave(&fleet, host))?;
    session.out.show(&Left { host, was_joined }, || match was_joined {
        true => format!(
            "{host} has left the fleet; its devices keep their ids, and it gets the same number \
             if it joins again"
        ),
        false => format!("{host} is not in the fleet"),
    })?;
    Ok(ExitCode::SUCCESS)
}

#[derive(Serialize)]
struct Shown {
    host: String,
    /// State of this host's inventory.
    inventory: Option<Inventory>,
    #[serde(flatten)]
    fleet: join::Status,
}

#[derive(Serialize)]
struct Inventory {
    number: u64,
    revision: Option<u64>,
}

pub(super) fn status(session: &Session) -> anyhow::Result<ExitCode> {
    let config = session.config()?;
    let fleet = fleet(&config, None)?;
    let host = host_name(&config.procfs_root)?;
    let inventory = match session.store() {
        Ok(store) => {
            let revision = store.host_document()?.map(|document| document.revision);
            Some(Inventory { number: store.node()?, revision })
        }
        Err(_) => None,
    };
    let status = wait(join::status(&fleet, &host))?;
    let shown = Shown { host, inventory, fleet: status };
    session.out.show(&shown, || status_text(&shown))?;
    let well = shown.fleet.endpoints.iter().all(|endpoint| endpoint.fault.is_none());
    Ok(if well { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn status_text(shown: &Shown) -> String {
    let Shown { host, inventory, fleet } = shown;
    let rows = fleet.endpoints.iter().map(|endpoint| {
        vec![
            endpoint.endpoint.clone(),
            match (&endpoint.fault, endpoint.is_leader) {
                (Some(fault), _) => fault.clone(),
                (None, true) => "answers, leads".to_owned(),
                (None, false) => "answers".to_owned(),
            },
            or_dash(endpoint.version.as_ref()),
            or_dash(endpoint.db_size.map(|bytes| format!("{:.1} MB", bytes as f64 / 1e6))),
        ]
    });
    let endpoints = table(&["ENDPOINT", "STATE", "ETCD", "SIZE"], rows.collect(), "");
    let revision = inventory.as_ref().and_then(|inventory| inventory.revision);
    let own = match (fleet.number, inventory, fleet.published) {
        (None, ..) => "has not joined: 'virt-usb fleet join'".to_owned(),
        (Some(number), Some(inventory), _) if inventory.number != number => format!(
            "is number {number}, and its inventory has number {}: 'virt-usb fleet join'",
            inventory.number
        ),
        (Some(number), _, None) => {
            format!("is number {number}, and has published nothing: does its agent run?")
        }
        (Some(number), _, Some(published))
            if revision.is_some_and(|revision| revision > published) =>
        {
            format!(
                "is number {number}, and has published revision {published} of {}",
                revision.unwrap_or_default()
            )
        }
        (Some(number), _, Some(published)) => {
            format!("is number {number}, and has published revision {published}")
        }
    };
    let gone = match fleet.unreachable.as_slice() {
        [] => String::new(),
        some => format!("\nunreachable: {}", some.join(", ")),
    };
    format!(
        "{endpoints}\n\n{host} {own}\n{} host(s) have joined, {} can be reached, with {} \
            device(s), {} of them available{gone}",
        fleet.hosts,
        fleet.hosts.saturating_sub(fleet.unreachable.len()),
        fleet.devices,
        fleet.available
    )
}

pub(super) fn simulate(session: &Session, options: &Simulate) -> anyhow::Result<ExitCode> {
    let fleet = fleet(&session.config()?, None)?;
    let options = simulate::Options {
        fleet,
        filter: options.component.load(Limits::default())?,
        hosts: options.hosts,
        devices: options.devices,
        churn: options.churn,
        time: Duration::from_secs(options.time),
        seed: options.seed,
    };
    // Progress goes to stderr, because stdout gets the report.
    let told = |what: &str| complain(&format!("{what} ..."));
    let report = simulate::run(&options, told)?;
    session.out.show(&report, || simulation_text(&report))?;
    Ok(if report.broken.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn simulation_text(report: &simulate::Report) -> String {
    let done = report
        .done
        .iter()
        .map(|(what, times)| vec![(*what).to_owned(), times.to_string()])
        .collect();
    let broken = match report.broken.as_slice() {
        [] => "all invariants held".to_owned(),
        some => format!("BROKEN:\n{}", some.join("\n")),
    };
    format!(
        "{}\n\n{:.0} changes a second; from a change to its watchers: p50 {:.1} ms, p99 {:.1} ms, \
         at most {:.1} ms\n{} documents, {} bytes on average, {} at most; etcd takes {:.1} \
         MB\n{broken}",
        table(&["WHAT HAPPENED", "TIMES"], done, "nothing happened"),
        report.changes_per_second,
        report.lag_ms.p50,
        report.lag_ms.p99,
        report.lag_ms.max,
        report.documents,
        report.mean_document,
        report.largest_document,
        report.db_size as f64 / 1e6,
    )
}
