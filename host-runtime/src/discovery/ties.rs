//! Ties of a device to its host beyond [`Device::host_use`](virt_usb_model::Device::host_use): uses
//! whose meaning depends on the inventory or the guests.
//!
//! ```text
//!   sysfs, udev's database ─► nodes: /dev/sdb, enx0, host6 ──┐
//!   guests' XML: <disk>, <serial>, <interface>, <hostdev> ───┴─► used by guest g as disk vda
//!   /proc/*/fd, usbfs ─────────────────────────────────────────► open in picocom (812)
//!   authorized = 0 ────────────────────────────────────────────► not authorized
//! ```

use std::collections::{BTreeMap, BTreeSet};

use virt_usb_model::{Device, InstanceId, PortPath, clean_text};

/// Ties of one device to the host.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Ties {
    /// The device's nodes on the host, which a guest's XML may name.
    pub nodes: Nodes,
    /// Processes that have the device open, in words (`open in picocom (812)`). Ignored while a
    /// claim holds the device, because the process is then the guest's QEMU.
    pub open: Vec<String>,
    /// Whether the kernel must not use the device (`authorized`,
    /// Documentation/ABI/testing/sysfs-bus-usb). QEMU cannot use it either.
    pub unauthorized: bool,
}

/// The names under which the host knows the parts of a device.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Nodes {
    /// Device nodes, and udev's links to them: `/dev/sdb`, `/dev/disk/by-id/usb-...`.
    pub paths: BTreeSet<String>,
    /// Network interfaces of the device.
    pub networks: BTreeSet<String>,
    /// SCSI host adapters of the device: `host6`.
    pub scsi_hosts: BTreeSet<String>,
}

/// Description of a device that is not authorized.
pub(crate) const UNAUTHORIZED: &str = "not authorized (authorized = 0)";

/// Uses of the host's devices by guests without a claim.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum GuestUses {
    /// libvirt was not queried. The recorded uses stay.
    #[default]
    Unknown,
    /// All uses, by port.
    Known(BTreeMap<PortPath, Vec<GuestUse>>),
}

/// One use of a device by a guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GuestUse {
    /// Instance of the guest; `None` if the use was read from the inventory, which has only the
    /// text.
    pub instance: Option<InstanceId>,
    /// Whether the guest is running. If so, no whitelist rule makes the device available.
    pub running: bool,
    /// Description of the use: `used by guest g as disk vda`.
    pub what: String,
}

/// Prefix of the description of a guest's use, which distinguishes it from other uses in
/// [`Device::host_use`].
const USED_BY: &str = "used by guest ";
/// Text that marks a use by a defined guest that is not running.
const DOES_NOT_RUN: &str = ", which does not run, as ";

impl GuestUse {
    /// Creates a use of a device by the guest `domain` as `what` (`disk vda`).
    pub fn new(instance: InstanceId, domain: &str, running: bool, what: &str) -> Self {
        // Semicolons separate the descriptions of several uses.
        let domain = clean_text(domain).unwrap_or_default().replace(';', ",");
        let what = clean_text(what).unwrap_or_default().replace(';', ",");
        let how = if running { " as " } else { DOES_NOT_RUN };
        Self { instance: Some(instance), running, what: format!("{USED_BY}{domain}{how}{what}") }
    }

    /// Parses the uses from the inventory's text.
    fn recorded(host_use: &str) -> Vec<Self> {
        let words = host_use.split("; ").filter(|words| words.starts_with(USED_BY));
        let one = |words: &str| Self {
            instance: None,
            running: !words.contains(DOES_NOT_RUN),
            what: words.to_owned(),
        };
        words.map(one).collect()
    }
}

/// Facts of the inventory about a device.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Recorded<'a> {
    /// Instance that holds the device.
    pub(crate) holder: Option<InstanceId>,
    /// Descriptions of the recorded uses.
    pub(crate) host_use: Option<&'a str>,
}

/// All uses of a device.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Uses {
    /// Descriptions of the uses, joined by semicolons.
    pub(crate) words: Option<String>,
    /// Description of a use that no whitelist rule overrides.
    pub(crate) fixed: Option<String>,
}

/// Combines the uses of a device by the host and its guests.
pub(crate) fn uses(
    device: &Device,
    ties: &Ties,
    guests: &GuestUses,
    recorded: Recorded<'_>,
) -> Uses {
    let guests = match guests {
        GuestUses::Unknown => GuestUse::recorded(recorded.host_use.unwrap_or_default()),
        GuestUses::Known(all) => all.get(&device.key.port).cloned().unwrap_or_default(),
    };
    // The use by the holder is explained by its claim.
    let others: Vec<&GuestUse> = guests
        .iter()
        .filter(|one| recorded.holder.is_none() || one.instance != recorded.holder)
        .collect();
    let unauthorized = ties.unauthorized.then(|| UNAUTHORIZED.to_owned());
    let running = others.iter().find(|one| one.running).map(|one| one.what.clone());
    let fixed = unauthorized.clone().or(running);
    let mut words: Vec<String> = device.host_use.iter().cloned().chain(unauthorized).collect();
    words.extend(others.iter().map(|one| one.what.clone()));
    if recorded.holder.is_none() {
        words.extend(ties.open.iter().cloned());
    }
    words.dedup();
    Uses { words: (!words.is_empty()).then(|| words.join("; ")), fixed }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::discovery::{Simulated, UsbSource};

    const KEY: &str =
        "[[device]]\nvendor = '0529'\nproduct = '0001'\nbus = 1\ndevice = 5\nport = '1-1'\n";

    fn device(more: &str) -> Device {
        Simulated::parse(&format!("{KEY}{more}")).unwrap().snapshot().devices.remove(0)
    }

    fn instance(n: u8) -> InstanceId {
        format!("0000000{n}-2222-4333-8444-555555555555").parse().unwrap()
    }

    fn described(ties: &Ties, guests: &[GuestUse], recorded: Recorded<'_>) -> (String, String) {
        let known = GuestUses::Known(BTreeMap::from([("1-1".parse().unwrap(), guests.to_vec())]));
        let uses = uses(&device("host_use = 'swap'"), ties, &known, recorded);
        (uses.words.unwrap_or_default(), uses.fixed.unwrap_or_default())
    }

    #[test]
    fn an_open_device_is_in_use_unless_a_claim_holds_it() {
        let ties = Ties { open: vec!["open in upsd (812)".into()], ..Ties::default() };
        let free = Recorded::default();
        assert_eq!(described(&ties, &[], free), ("swap; open in upsd (812)".into(), String::new()));
        let held = Recorded { holder: Some(instance(1)), ..free };
        assert_eq!(described(&ties, &[], held).0, "swap");
    }

    #[test]
    fn only_a_running_guests_use_is_fixed() {
        let runs = GuestUse::new(instance(1), "erp", true, "disk vda");
        let off = GuestUse::new(instance(2), "old; one", false, "serial 0");
        let (words, fixed) =
            described(&Ties::default(), &[off.clone(), runs.clone()], Recorded::default());
        assert_eq!(
            words,
            "swap; used by guest old, one, which does not run, as serial 0; used by guest erp as \
                disk vda"
        );
        assert_eq!(fixed, "used by guest erp as disk vda");
        assert_eq!(described(&Ties::default(), &[off], Recorded::default()).1, "");
        let held = Recorded { holder: Some(instance(1)), ..Recorded::default() };
        assert_eq!(
            described(&Ties::default(), &[runs], held),
            ("swap".into(), String::new()),
            "its own"
        );
    }

    #[test]
    fn without_libvirt_the_recorded_uses_stay() {
        let record = "mounted on /; used by guest erp as disk vda; used by guest b, which does not \
            run, as serial 0; open in a (1)";
        let recorded = Recorded { holder: None, host_use: Some(record) };
        let unknown = uses(&device(""), &Ties::default(), &GuestUses::Unknown, recorded);
        assert_eq!(
            unknown.words.as_deref(),
            Some("used by guest erp as disk vda; used by guest b, which does not run, as serial 0")
        );
        assert_eq!(unknown.fixed.as_deref(), Some("used by guest erp as disk vda"));
        let known =
            uses(&device(""), &Ties::default(), &GuestUses::Known(BTreeMap::new()), recorded);
        assert_eq!(known, Uses { words: None, fixed: None });
    }

    #[test]
    fn no_rule_overrides_a_missing_authorization() {
        let ties = Ties { unauthorized: true, ..Ties::default() };
        let (words, fixed) = described(&ties, &[], Recorded::default());
        assert_eq!(
            (words.as_str(), fixed.as_str()),
            ("swap; not authorized (authorized = 0)", UNAUTHORIZED)
        );
    }
}
