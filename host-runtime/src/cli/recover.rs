//! The commands `store restore` and `store rebuild`.

use std::path::Path;
use std::process::ExitCode;

use anyhow::bail;
use virt_usb_config::Config;
use virt_usb_store::StoreError;
use virt_usb_store::recover::{Health, check_backup, health};

use super::Session;
use super::arguments::Recover;
use super::devices::source;
use crate::agent::guest_uses::ask;
use crate::discovery::origin;
use crate::hypervisor::{Hypervisor, Libvirt};
use crate::inventory::host_name;
use crate::recover::{Recovery, Refusal, Report};
use crate::timeouts::COMMAND_LOCK_TIMEOUT;

pub(super) fn restore(
    session: &Session,
    file: &Path,
    options: &Recover,
) -> anyhow::Result<ExitCode> {
    let config = session.config()?;
    // Never replace the database of another program.
    if let Err(e @ StoreError::Foreign { .. }) = health(&config.state_dir, COMMAND_LOCK_TIMEOUT) {
        bail!(e);
    }
    check_backup(file)?;
    run(session, &config, Some(file), options)
}

pub(super) fn rebuild(
    session: &Session,
    force: bool,
    options: &Recover,
) -> anyhow::Result<ExitCode> {
    let config = session.config()?;
    match health(&config.state_dir, COMMAND_LOCK_TIMEOUT) {
        Ok(Health::Sound) if !force => bail!(
            "it is sound: {} needs no rebuild ('virt-usb discover' updates it; --force rebuilds \
             it anyway)",
            config.state_dir.join(virt_usb_store::FILE_NAME).display()
        ),
        Ok(_) => {}
        Err(StoreError::Newer { .. } | StoreError::Foreign { .. }) if force => {}
        Err(e) => bail!(e),
    }
    run(session, &config, None, options)
}

fn run(
    session: &Session,
    config: &Config,
    backup: Option<&Path>,
    options: &Recover,
) -> anyhow::Result<ExitCode> {
    let (what, done) =
        if backup.is_some() { ("restore", "restored") } else { ("rebuild", "rebuilt") };
    let libvirt = match options.without_guests {
        true => None,
        false => Some(Libvirt::open(&config.libvirt_uri).map_err(|e| unasked(&e.to_string()))?),
    };
    let mut snapshot = source(config, options.sim.as_deref())?.snapshot();
    if let Some(libvirt) = &libvirt {
        snapshot.guests = ask(libvirt, &snapshot).map_err(|e| unasked(&e.to_string()))?;
    }
    let context = session.context(config, &format!("store {what}"))?;
    let recovery = Recovery {
        config,
        origin: origin(options.sim.as_deref(), &config.sysfs_root),
        host: &host_name(&config.procfs_root)?,
        snapshot: &snapshot,
        hypervisor: libvirt.as_ref().map(|libvirt| libvirt as &dyn Hypervisor),
        backup,
        lock_timeout: COMMAND_LOCK_TIMEOUT,
        context: &context,
    };
    let mut report = recovery.run().map_err(|refusal| match refusal {
        Refusal::Guests(why) => unasked(&why),
        Refusal::Store(e) => e.into(),
    })?;
    if options.without_guests {
        report.warnings.push(
            "libvirt was not queried: a device that is in a guest but has no claim is shown as \
             available until the agent adopts it (within scan_interval, or at once with \
             'systemctl restart virt-usbd'); until then, start no guest that requests a device"
                .into(),
        );
    }
    report.warnings.extend(snapshot.problems.iter().map(|p| {
        let place = if p.place.is_empty() { "the whole scan" } else { &p.place };
        format!("could not be read: {place}: {}", p.what)
    }));
    session.out.show(&report, || tell(done, &report))?;
    Ok(if snapshot.failed() { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

fn unasked(why: &str) -> anyhow::Error {
    anyhow::anyhow!(
        "{why}; nothing was changed, because only libvirt knows which guests have which devices: \
         see 'systemctl status libvirtd virtqemud', or use --without-guests"
    )
}

fn tell(done: &str, report: &Report) -> String {
    let mut lines = vec![format!(
        "{done} {}: {} device(s), {} claim(s)",
        report.file.display(),
        report.devices,
        report.claims
    )];
    for kept in report.kept.iter().filter(|kept| kept.rows > 0 || kept.refused > 0 || kept.torn) {
        let mut line = format!("  {:<26} {} row(s) kept", kept.table, kept.rows);
        if kept.refused > 0 {
            line.push_str(&format!(", {} were invalid", kept.refused));
        }
        if kept.torn {
            line.push_str(", part of it could not be read");
        }
        lines.push(line);
    }
    if report.lost_devices > 0 {
        lines.push(format!(
            "{} device id(s) are lost: those devices have new ids, and a flavor that names an old \
             id matches nothing ('virt-usb flavor list', 'virt-usb devices')",
            report.lost_devices
        ));
    }
    if let Some(aside) = &report.aside {
        lines.push(format!("the previous inventory is kept: {}", aside.display()));
    }
    if report.agent_ends {
        lines.push(
            "the running agent has the old file open: it exits within seconds, and systemd \
             restarts it ('systemctl restart virt-usbd')"
                .into(),
        );
    }
    lines.extend(report.warnings.iter().map(|warning| format!("warning: {warning}")));
    lines.join("\n")
}
