//! Resources of the host that a device of the domain uses, except USB hostdevs: a disk, a serial
//! port, a network interface.
//!
//! Behind each of them may be a USB device. Which one, only the host knows; here is what the domain
//! says.

use crate::device::{Device, Part};

/// Something of the host that a device of the domain uses.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostSource {
    /// Device of the domain: `disk vda`, `serial 0`.
    pub what: String,
    /// Resource that the device uses.
    pub place: HostPlace,
}

/// A thing of the host, as a domain names it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum HostPlace {
    /// A device node, or a link to one.
    Path(String),
    /// A network interface.
    Network(String),
    /// A SCSI host adapter: `host6`.
    ScsiHost(String),
}

/// The host's resource that the device uses, if the resource may be on a USB device.
pub(crate) fn host_source(device: &Device<'_>, text: &str) -> Option<HostSource> {
    let tag = &device.node.tag;
    let source =
        |attribute| Some(device.value(Part::Source, attribute)).filter(|value| !value.is_empty());
    let place = match tag.name {
        // libvirt takes a block device as a file, too.
        "disk" => HostPlace::Path(source("dev").or_else(|| source("file"))?),
        "serial" | "parallel" | "console" | "channel" | "smartcard" | "redirdev"
            if tag.is("type", "dev") =>
        {
            HostPlace::Path(source("path")?)
        }
        "input" => HostPlace::Path(source("dev").or_else(|| source("evdev"))?),
        "rng" => HostPlace::Path(device.text(Part::Backend, text)?),
        "interface" if tag.is("type", "direct") => HostPlace::Network(source("dev")?),
        "hostdev" if tag.is("type", "scsi") => {
            let adapter = device.value(Part::SourceAdapter, "name");
            HostPlace::ScsiHost(adapter.strip_prefix("scsi_")?.to_owned())
        }
        _ => return None,
    };
    if matches!(&place, HostPlace::Path(path) if !path.starts_with("/dev/") && !has_node(tag.name))
    {
        return None;
    }
    let name = [device.value(Part::Target, "dev"), device.value(Part::Target, "port")].concat();
    let what = if name.is_empty() { tag.name.to_owned() } else { format!("{} {name}", tag.name) };
    Some(HostSource { what, place })
}

/// Whether what the device names is a device node wherever it is; else only what is in /dev.
fn has_node(device: &str) -> bool {
    !matches!(device, "disk" | "rng")
}
