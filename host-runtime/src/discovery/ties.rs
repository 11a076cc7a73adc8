//! Ties of a device to its host beyond [`Device::host_use`](virt_usb_model::Device::host_use): uses
//! that count only in view of the inventory or of the guests.
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
    /// Processes that have the device open, in words (`open in picocom (812)`). They count unless a
    /// claim of ours holds the device: then the process is the guest's QEMU.
    pub open: Vec<String>,
    /// Whether the kernel may not use the device (`authorized`,
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

/// The words for a device that is not authorized.
pub(crate) const UNAUTHORIZED: &str = "not authorized (authorized = 0)";

/// Uses of the host's devices by guests, without claims of ours.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum GuestUses {
    /// libvirt was not asked: what is recorded stays.
    #[default]
    Unknown,
    /// All of them, by port.
    Known(BTreeMap<PortPath, Vec<GuestUse>>),
}

/// One use of a device by a guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GuestUse {
    /// Instance of the guest; `None` if the use was read from the inventory, which has only the
    /// text.
    pub instance: Option<InstanceId>,
    /// Whether the guest runs: then no rule of the whitelist gives the device away.
    pub running: bool,
    /// In words: `used by guest g as disk vda`.
    pub what: String,
}

/// How the words of a guest's use begin, by which they are found among the others in
/// [`Device::host_use`].
const USED_BY: &str = "used by guest ";
/// Text that marks a use by a defined guest that is not running.
const DOES_NOT_RUN: &str = ", which does not run, as ";

impl GuestUse {
    /// The guest `domain` uses it as `what` (`disk vda`).
    pub fn new(instance: InstanceId, domain: &str, running: bool, what: &str) -> Self {
        // The words of several uses are joined by semicolons.
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
    /// The words of its uses.
    pub(crate) host_use: Option<&'a str>,
}

/// All uses of a device.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Uses {
    /// In words, joined by semicolons.
    pub(crate) words: Option<String>,
    /// The one that no rule lifts.
    pub(crate) fixed: Option<String>,
}

/// Puts together what the host and its guests use a device for.
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
    // The holder has it by its claim.
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

    fn told(ties: &Ties, guests: &[GuestUse], recorded: Recorded<'_>) -> (String, String) {
        let known = GuestUses::Known(BTreeMap::from([("1-1".parse().unwrap(), guests.to_vec())]));
        let uses = uses(&device("host_use = 'swap'"), ties, &known, recorded);
        (uses.words.unwrap_or_default(), uses.fixed.unwrap_or_default())
    }

    #[test]
    fn what_is_open_counts_unless_a_claim_explains_it() {
        let ties = Ties { open: vec!["open in upsd (812)".into()], ..Ties::default() };
        let free = Recorded::default();
        assert_eq!(told(&ties, &[], free), ("swap; open in upsd (812)".into(), String::new()));
        let held = Recorded { holder: Some(instance(1)), ..free };
        assert_eq!(told(&ties, &[], held).0, "swap");
    }

    #[test]
    fn a_running_guest_is_not_robbed_and_a_defined_one_may_be() {
        let runs = GuestUse::new(instance(1), "erp", true, "disk vda");
        let off = GuestUse::new(instance(2), "old; one", false, "serial 0");
        let (words, fixed) =
            told(&Ties::default(), &[off.clone(), runs.clone()], Recorded::default());
        assert_eq!(
            words,
            "swap; used by guest old, one, which does not run, as serial 0; used by guest erp as \
                disk vda"
        );
        assert_eq!(fixed, "used by guest erp as disk vda");
        assert_eq!(told(&Ties::default(), &[off], Recorded::default()).1, "");
        let held = Recorded { holder: Some(instance(1)), ..Recorded::default() };
        assert_eq!(
            told(&Ties::default(), &[runs], held),
            ("swap".into(), String::new()),
            "its own"
        );
    }

    #[test]
    fn while_libvirt_is_not_asked_the_record_stays() {
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
    fn an_unauthorized_device_is_fixed_whatever_else_is_said() {
        let ties = Ties { unauthorized: true, ..Ties::default() };
        let (words, fixed) = told(&ties, &[], Recorded::default());
        assert_eq!(
            (words.as_str(), fixed.as_str()),
            ("swap; not authorized (authorized = 0)", UNAUTHORIZED)
        );
    }
}
