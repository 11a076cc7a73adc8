//! The commands `discover`, `devices`, `hosts` and `whitelist check`.

use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context as _, bail};
use serde::Serialize;
use virt_usb_config::Config;
use virt_usb_config::host_env::{self, Agent};
use virt_usb_config::rules;
use virt_usb_model::device::Problem;
use virt_usb_model::{Device, EventKind, RuleVerdict, Serial, clean_json};
use virt_usb_store::Record;
use virt_usb_store::reconcile::Done;
use virt_usb_store::user::User;

use super::Session;
use super::arguments::Discover;
use super::output::{or_dash, table};
use crate::agent::guest_uses::ask;
use crate::discovery::{LibUsb, Simulated, Snapshot, UsbSource, origin};
use crate::hypervisor::Libvirt;
use crate::inventory::{host_name, judge, located, plan};

pub(super) fn source(config: &Config, sim: Option<&Path>) -> anyhow::Result<Box<dyn UsbSource>> {
    Ok(match sim {
        Some(file) => Box::new(Simulated::load(file)?),
        None => Box::new(LibUsb::new(config)),
    })
}

#[derive(Serialize)]
struct Discovered {
    devices: Vec<Record>,
    changes: Vec<Done>,
    hubs: usize,
    problems: Vec<Problem>,
}

pub(super) fn discover(session: &Session, options: &Discover) -> anyhow::Result<ExitCode> {
    let config = session.config()?;
    if let (Some(sim), Some(dir)) = (&options.sim, &options.sysfs_out) {
        if dir.starts_with("/sys") {
            bail!("--sysfs-out {} is the kernel's own tree: use another directory", dir.display());
        }
        let simulated = Simulated::load(sim)?;
        User::of(dir)
            .and_then(User::enter)
            .and_then(|_owner| simulated.write_sysfs(dir))
            .with_context(|| {
                format!("cannot write the simulated sysfs tree to {}", dir.display())
            })?;
    }
    let mut snapshot = source(&config, options.sim.as_deref())?.snapshot();
    // If no agent is installed, this command asks libvirt which devices its guests use. If libvirt
    // cannot be reached, the recorded use stays.
    if options.sim.is_none()
        && host_env::agent(&config.state_dir) == Agent::NotInstalled
        && let Ok(uses) =
            Libvirt::open(&config.libvirt_uri).and_then(|libvirt| ask(&libvirt, &snapshot))
    {
        snapshot.guests = uses;
    }
    if options.dry_run {
        return show_verdicts(session, &config, &snapshot);
    }
    let context = session.context(&config, "discover")?;
    let mut store = session.make_store(&config)?;
    store.admit(origin(options.sim.as_deref(), &config.sysfs_root))?;
    rules::admit(&store, &config, session.config_file.as_deref())?;
    store.mend_hints()?;
    let whitelist = located(&config.whitelist, &mut store, &snapshot, &config.sysfs_root)?;
    let changes = store.reconcile(
        &host_name(&config.procfs_root)?,
        &config.flapping,
        snapshot.seen(&config.aliases),
        |known| plan(&snapshot, known, &whitelist, &config.aliases),
        &context,
    )?;
    store.note_rules(rules::remembered(&config))?;
    if config.events_keep_days > 0 {
        store.prune_events(config.events_keep_days)?;
    }
    if config.forget_after_days > 0 {
        store.forget_old(config.forget_after_days, &context)?;
    }
    store.fold_wal()?;
    let failed = snapshot.failed();
    let found = Discovered {
        devices: store.devices()?,
        changes,
        hubs: snapshot.hubs.len(),
        problems: snapshot.problems,
    };
    session.out.show(&found, || {
        let mut text = device_table(&found.devices, nothing(&config));
        text.push_str(&format!("\n\n{}", summary(&found)));
        text.push_str(&problems(&found.problems));
        text.push_str(&alterations(&found.changes));
        text
    })?;
    Ok(if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

/// Explains an empty list of devices.
fn nothing(config: &Config) -> &'static str {
    match config.sysfs_root.join("bus/usb").exists() {
        true => "no USB device is plugged into this host",
        false => "this host has no USB at all: there is no bus/usb in its sysfs",
    }
}

fn summary(found: &Discovered) -> String {
    use EventKind::{Added, Changed, Removed, Returned, Steady};
    let is_of = |done: &&Done, kind| done.what.parse() == Ok(kind);
    let count = |kind| found.changes.iter().filter(|done| is_of(done, kind)).count();
    let changed: Vec<String> = [Added, Returned, Changed, Removed, Steady]
        .into_iter()
        .filter(|kind| count(*kind) > 0)
        .map(|kind| format!("{} {kind}", count(kind)))
        .collect();
    let changed =
        if changed.is_empty() { "nothing changed".to_owned() } else { changed.join(", ") };
    let hubs = if found.hubs > 0 {
        format!("; {} hub(s) are never offered", found.hubs)
    } else {
        String::new()
    };
    format!("{} device(s): {changed}{hubs}", found.devices.len())
}

fn problems(problems: &[Problem]) -> String {
    let line = |p: &Problem| {
        let place = if p.place.is_empty() { "the whole scan" } else { &p.place };
        format!("\ncould not be read: {place}: {}", p.what)
    };
    problems.iter().map(line).collect()
}

/// Reports changed descriptors prominently: a device that has become another one is an attack until
/// an operator decides otherwise.
fn alterations(changes: &[Done]) -> String {
    let line = |d: &Done| Some(format!("\nWARNING: device {}: {}", d.id, d.altered.as_ref()?));
    changes.iter().filter_map(line).collect()
}

pub(super) fn list(session: &Session, all: bool) -> anyhow::Result<ExitCode> {
    let devices = match session.remote()? {
        Some(api) => api.devices(all)?,
        None if all => session.store()?.all_devices()?,
        None => session.store()?.devices()?,
    };
    session.out.show(&devices, || {
        device_table(
            &devices,
            "the inventory holds no device: plug one in and run 'virt-usb discover'",
        )
    })?;
    Ok(ExitCode::SUCCESS)
}

fn device_table(devices: &[Record], empty: &str) -> String {
    let row = |r: &Record| {
        let e = &r.entry;
        vec![
            e.id.to_string(),
            r.usb().to_string(),
            name(e.manufacturer.as_deref(), e.product_name.as_deref()),
            serial(&r.key().serial),
            e.port_path.to_string(),
            e.address.to_string(),
            or_dash(e.speed),
            status(r),
            or_dash(e.instance_uuid),
        ]
    };
    let mut header =
        vec!["ID", "USB ID", "NAME", "SERIAL", "PORT", "ADDRESS", "SPEED", "STATUS", "INSTANCE"];
    let mut rows: Vec<Vec<String>> = devices.iter().map(row).collect();
    // Omit a column that is empty in every row.
    if devices.iter().all(|r| r.entry.instance_uuid.is_none()) {
        header.pop();
        rows.iter_mut().for_each(|cells| cells.truncate(header.len()));
    }
    table(&header, rows, empty)
}

/// Status of the device, with the reason.
pub(super) fn status(record: &Record) -> String {
    let e = &record.entry;
    match (e.state(), &e.status_reason) {
        _ if record.deleted != 0 => "unplugged".to_owned(),
        (Ok(state), _) => state.to_string(),
        // The API of another host may have a newer version, with more states.
        (Err(_), Some(why)) => format!("{} ({why})", e.status),
        (Err(_), None) => e.status.clone(),
    }
}

pub(super) fn name(manufacturer: Option<&str>, product: Option<&str>) -> String {
    match (manufacturer, product) {
        (Some(m), Some(p)) if p.starts_with(m) => p.to_owned(),
        (Some(m), Some(p)) => format!("{m} {p}"),
        (one, other) => one.or(other).unwrap_or("-").to_owned(),
    }
}

fn serial(serial: &Serial) -> String {
    match serial {
        Serial::Unique(text) => text.clone(),
        Serial::Duplicate(text) => format!("{text} (not unique)"),
        Serial::Worthless(text) => format!("{text} (placeholder)"),
        Serial::Missing => "-".to_owned(),
    }
}

pub(super) fn hosts(session: &Session) -> anyhow::Result<ExitCode> {
    let hosts = match session.remote()? {
        Some(api) => api.hosts()?,
        None => session.store()?.hosts()?,
    };
    session.out.show(&hosts, || {
        let rows = hosts.iter().map(|h| {
            vec![
                h.id.to_string(),
                h.host.clone(),
                h.devices.to_string(),
                h.available.to_string(),
                or_dash(h.scanned_at.as_deref()),
            ]
        });
        table(
            &["ID", "HOST", "DEVICES", "AVAILABLE", "LAST SCAN"],
            rows.collect(),
            "no host was scanned yet: run 'virt-usb discover'",
        )
    })?;
    Ok(ExitCode::SUCCESS)
}

/// Prints host documents as they are published, one per line.
pub(super) fn documents(session: &Session) -> anyhow::Result<ExitCode> {
    let documents = match session.remote()? {
        Some(api) => api.documents()?,
        None => session.store()?.host_document()?.into_iter().collect(),
    };
    for document in documents {
        session
            .out
            .raw(format!("{}\n", clean_json(&serde_json::to_string(&document)?)).as_bytes())?;
    }
    Ok(ExitCode::SUCCESS)
}

#[derive(Serialize)]
struct Judged {
    address: String,
    vendor_id: String,
    product_id: String,
    port_path: String,
    serial: Option<String>,
    name: String,
    offered: bool,
    #[serde(flatten)]
    verdict: RuleVerdict,
}

impl Judged {
    fn new(device: &Device, verdict: RuleVerdict) -> Self {
        let key = &device.key;
        Self {
            address: device.address.to_string(),
            vendor_id: key.usb.vendor.to_string(),
            product_id: key.usb.product.to_string(),
            port_path: key.port.to_string(),
            serial: key.serial.text().map(Into::into),
            name: name(device.manufacturer.as_deref(), device.product.as_deref()),
            offered: verdict.withheld.is_none(),
            verdict,
        }
    }

    /// Hubs are never offered, whatever the rules say.
    fn hub(device: &Device) -> Self {
        let because =
            "it is a hub: a guest with the hub would get every device behind it".to_owned();
        let verdict = RuleVerdict {
            withheld: None,
            rule: None,
            projects: Vec::new(),
            tags: Vec::new(),
            one_time_use: false,
            because,
        };
        Self { offered: false, ..Self::new(device, verdict) }
    }

    fn row(&self) -> Vec<String> {
        let to = match (self.offered, self.verdict.projects.as_slice()) {
            (false, _) => "nobody".to_owned(),
            (true, []) => "every project".to_owned(),
            (true, projects) => {
                projects.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
            }
        };
        vec![
            format!("{}:{}", self.vendor_id, self.product_id),
            self.name.clone(),
            self.port_path.clone(),
            to,
            self.verdict.tags.join(", "),
            self.verdict.because.clone(),
        ]
    }
}

pub(super) fn check_whitelist(session: &Session, sim: Option<&Path>) -> anyhow::Result<ExitCode> {
    let config = session.config()?;
    let snapshot = source(&config, sim)?.snapshot();
    show_verdicts(session, &config, &snapshot)
}

fn show_verdicts(
    session: &Session,
    config: &Config,
    snapshot: &Snapshot,
) -> anyhow::Result<ExitCode> {
    // If there is an inventory, it knows the device paths of ports that rules name, and its claims
    // explain why a device is open.
    let store = session.store().ok();
    if let Some(store) = &store {
        rules::admit(store, config, session.config_file.as_deref())?;
    }
    let paths = store.as_ref().and_then(|store| store.known_rule_paths().ok()).unwrap_or_default();
    let whitelist = config.whitelist.at(|port| paths.get(port).cloned());
    let known = store.and_then(|store| store.devices().ok()).unwrap_or_default();
    let verdict = |device: &Device| {
        let row =
            known.iter().find(|r| r.key().is(&device.key) && r.entry.port_path == device.key.port);
        let (device, verdict) = judge(snapshot, device.clone(), row, &whitelist);
        Judged::new(&device, verdict)
    };
    let devices = snapshot.devices.iter().map(verdict);
    let verdicts: Vec<Judged> = devices.chain(snapshot.hubs.iter().map(Judged::hub)).collect();
    session.out.show(&verdicts, || {
        let rules = config.whitelist.rules.len();
        let switch = if config.whitelist.on { "on" } else { "off" };
        let header = ["USB ID", "NAME", "PORT", "OFFERED TO", "TAGS", "BECAUSE"];
        let rows = verdicts.iter().map(Judged::row).collect();
        let table = table(&header, rows, nothing(config));
        let limited =
            config.whitelist.rules.iter().any(|r| !r.projects.is_empty()) && !config.whitelist.on;
        let note = if limited {
            "; their projects apply only while it is on: every project gets these devices"
        } else {
            ""
        };
        format!(
            "usb_white_list_switch is {switch}, {rules} rule(s){note}\n\n{table}{}",
            problems(&snapshot.problems)
        )
    })?;
    Ok(if snapshot.failed() { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}
