//! Warns if a disk or a serial port of a starting guest is on a USB device that another guest
//! holds.
//!
//! Such a guest requests nothing from virt-usb, so it is never refused. But it takes the device
//! from the guest that holds it.

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use virt_usb_config::Config;
use virt_usb_domxml::HostPlace;
use virt_usb_model::PortPath;

use crate::answer::Answer;
use crate::job::{HookError, Job};
use crate::message;
use crate::verify::open;

/// Adds a warning for each device that the guest takes from another one. Adds none if the inventory
/// cannot be read.
pub(crate) fn warn(answer: Answer, job: &Job<'_>) -> Answer {
    if answer.refusal.is_some() || job.domain.host_sources.is_empty() {
        return answer;
    }
    match warnings(job) {
        Ok(warnings) => warnings.into_iter().fold(answer, Answer::warn),
        Err(_) => answer,
    }
}

fn warnings(job: &Job<'_>) -> Result<Vec<String>, HookError> {
    let config: &Config = job.config(false)?;
    let on_usb: Vec<(&str, &str, PortPath)> = job
        .domain
        .host_sources
        .iter()
        .filter_map(|source| match &source.place {
            HostPlace::Path(path) => {
                Some((source.what.as_str(), path.as_str(), port(&config.sysfs_root, path)?))
            }
            HostPlace::Network(_) | HostPlace::ScsiHost(_) => None,
        })
        .collect();
    if on_usb.is_empty() {
        return Ok(Vec::new());
    }
    let (store, _) = open(config, &job.call.op, false)?;
    let error = |e| HookError::of(false, e);
    let (devices, claims) = (store.devices().map_err(error)?, store.claims().map_err(error)?);
    let mut warnings = Vec::new();
    for (what, path, port) in on_usb {
        let device = devices.iter().find(|d| d.present && d.entry.port_path == port);
        let claim = device.and_then(|d| claims.iter().find(|c| c.device_id == d.entry.id));
        let (Some(device), Some(claim)) = (device, claim) else { continue };
        if job.domain.uuid != Some(claim.instance_uuid) {
            warnings.push(format!(
                "{} has {path} as its {what}, which is on {}, and {} ({}) holds that device since \
                    {}: stop one of the guests",
                job.domain.name,
                message::device(device),
                claim.domain,
                claim.instance_uuid,
                claim.created_at
            ));
        }
    }
    Ok(warnings)
}

/// Returns the port of the USB device that a device node belongs to. `None` for other nodes.
fn port(sysfs_root: &Path, node: &str) -> Option<PortPath> {
    // Access to a path outside of /dev could block on a file system that does not respond.
    if !node.starts_with("/dev/") {
        return None;
    }
    let found = fs::metadata(node).ok()?;
    let kind = match found.file_type() {
        kind if kind.is_block_device() => "block",
        kind if kind.is_char_device() => "char",
        _ => return None,
    };
    let (major, minor) = (libc::major(found.rdev()), libc::minor(found.rdev()));
    let dir = fs::canonicalize(sysfs_root.join(format!("dev/{kind}/{major}:{minor}"))).ok()?;
    dir.ancestors().find_map(|dir| dir.file_name()?.to_str()?.parse().ok())
}
