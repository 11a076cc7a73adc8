//! Plans the steps for one instance from the state of its guest and of the inventory. Does no IO.
//!
//! ```text
//!   claimed, plugged in, not in the guest ── Attach ──► in the guest ── Settle ──► allocated
//!                                                            │ unplugged, or moved to another port
//!                     claim without its device ◄── Detach ───┘ (the stale hostdev)
//!                                 └── replug = "release" ──► Release
//!
//!   a hostdev without a claim ── Adopt ──► allocated
//!   a hostdev of a restored or migrated guest ── Detach ──► Attach
//!   an absent guest ── 10 s ──► Release, 60 s ──► End
//! ```
//! Every step may be executed twice, and no step depends on the one before: the plan is made again
//! afterwards.

use std::collections::{BTreeMap, BTreeSet};

use virt_usb_config::ReplugPolicy;
use virt_usb_domxml::{Domain, UsbHostdev};
use virt_usb_hook::verify::{holding, missing_redirdevs};
use virt_usb_model::{DeviceId, InstanceId};
use virt_usb_store::adopt::Holding;
use virt_usb_store::{ClaimRow, Record};

use crate::discovery::CLAIMED;

/// A running guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Guest {
    /// Live XML of the guest.
    pub domain: Domain,
    /// Number of redirections that its flavor requests.
    pub redirections: usize,
    /// Whether its state is being transferred; see
    /// [`Running::moving`](crate::hypervisor::Running::moving).
    pub moving: bool,
}

/// Duration of the absence of an instance's guest.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Absence {
    /// Seconds since the guest was last running, with unchanged claims.
    pub seconds: f64,
    /// Seconds since the domain was undefined. `None` if it is defined.
    pub undefined: Option<f64>,
}

/// Observed state of an instance's guest.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Seen<'a> {
    /// The guest could not be queried. The plan is empty.
    Unknown,
    /// The guest is running.
    Running(&'a Guest),
    /// The guest is not running.
    Absent(Absence),
}

/// Inputs of the plan for one instance.
#[derive(Debug, Clone, Copy)]
pub struct Instance<'a> {
    /// UUID of the instance.
    pub id: InstanceId,
    /// State of its guest.
    pub seen: Seen<'a>,
    /// Claims of the instance.
    pub claims: &'a [&'a ClaimRow],
    /// Whether the instance has assignments, or an owner that an administrator set.
    pub assigned: bool,
    /// Recorded problems of the instance, by their subject.
    pub problems: &'a BTreeMap<String, String>,
}

/// Inputs of the plan about the host.
#[derive(Debug, Clone, Copy)]
pub struct Host<'a> {
    /// Every device that is plugged in or held.
    pub devices: &'a BTreeMap<DeviceId, Record>,
    /// Holder of each held device.
    pub holders: &'a BTreeMap<DeviceId, InstanceId>,
    /// Policy for the claim of an unplugged device.
    pub replug: ReplugPolicy,
    /// Seconds of absence after which the devices of a guest are released. A single check is not
    /// enough.
    pub absent_grace: f64,
    /// Seconds after which the assignments of an undefined domain end. Nova's hard reboot undefines
    /// and redefines the domain.
    pub undefined_grace: f64,
}

/// A step of the plan.
#[derive(Debug, Clone, PartialEq)]
pub enum Step {
    /// Detach a hostdev from the guest.
    Detach {
        /// Alias of the hostdev.
        alias: String,
        /// The device to detach.
        device: DeviceId,
    },
    /// Check whether a driver of the host has taken the device back. If so, detach its hostdev.
    TakenBack {
        /// Alias of the hostdev.
        alias: String,
        /// The device that the driver may have taken back.
        device: DeviceId,
        /// The other devices that the guest has.
        others: Vec<DeviceId>,
    },
    /// Claim a device that the guest has and no instance holds.
    Adopt {
        /// The hostdev in the live XML.
        holding: Holding,
        /// The device to adopt.
        device: DeviceId,
    },
    /// Update the states of the claims to match the live XML.
    Settle {
        /// Devices of the instance in its live XML.
        in_guest: Vec<DeviceId>,
    },
    /// Attach a device that the instance holds.
    Attach {
        /// The device to attach.
        device: DeviceId,
    },
    /// Attach a redirection.
    Redirect {
        /// Index of the flavor's entry.
        n: usize,
    },
    /// End a claim, if it is unchanged.
    Release {
        /// The device to release.
        device: DeviceId,
        /// Revision of the unchanged claim.
        revision: i64,
        /// Reason of the release.
        why: &'static str,
    },
    /// Record that the guest has no devices, because it is not running. Held devices stay claimed.
    OutOfGuest,
    /// End all claims and assignments of the instance, because it no longer exists.
    End,
    /// Record a problem.
    Note {
        /// Subject of the problem.
        about: String,
        /// Description of the problem.
        what: String,
    },
    /// Record that a problem is solved.
    Solved {
        /// Subject of the problem.
        about: String,
    },
}

impl Step {
    /// Subject of a step that may fail and be retried.
    pub fn about(&self) -> Option<String> {
        match self {
            Self::Attach { device }
            | Self::Detach { device, .. }
            | Self::TakenBack { device, .. } => Some(about_device(*device)),
            Self::Redirect { n } => Some(about_redirection(*n)),
            _ => None,
        }
    }
}

/// Subject of the problems of a device.
pub fn about_device(device: DeviceId) -> String {
    format!("device {device}")
}

/// Subject of the problem that the serial of a held device is no longer unique.
pub fn about_serial(device: DeviceId) -> String {
    format!("{ABOUT_SERIAL}{device}")
}

/// Prefix of the subjects of [`about_serial`].
pub const ABOUT_SERIAL: &str = "serial of device ";

/// Subject of the problems of a redirection.
pub fn about_redirection(n: usize) -> String {
    format!("redirection {n}")
}

/// Subject of the problem that a guest was stopped because it could not get a device. The problem
/// stays until the guest's next start.
pub const ABOUT_STOP: &str = "start";

/// Subject of the problem that libvirt does not answer about a guest, or does not know a guest that
/// is running.
pub const ABOUT_LIBVIRT: &str = "libvirt";

/// Plans the steps, in the order of their execution.
pub fn plan(instance: &Instance<'_>, host: &Host<'_>) -> Vec<Step> {
    match instance.seen {
        Seen::Unknown => Vec::new(),
        // The event at the end of the transfer makes the instance due again.
        Seen::Running(guest) if guest.moving => Vec::new(),
        Seen::Running(guest) => Present { instance, host, guest }.plan(),
        Seen::Absent(gone) => absent(instance, host, gone),
    }
}

fn absent(
    instance: &Instance<'_>,
    host: &Host<'_>,
    Absence { seconds, undefined }: Absence,
) -> Vec<Step> {
    let is_over = undefined.is_some_and(|undefined| undefined >= host.undefined_grace);
    let ended = instance.problems.keys().filter(|about| is_over || *about != ABOUT_STOP);
    let mut steps: Vec<Step> = ended.map(|about| Step::Solved { about: about.clone() }).collect();
    let owns = instance.assigned || !instance.claims.is_empty();
    if owns && is_over {
        steps.push(Step::End);
        return steps;
    }
    if seconds < host.absent_grace {
        return steps;
    }
    // A pending claim belongs to a restore or migration, and has a grace period of its own.
    for claim in instance.claims.iter().filter(|c| !c.pending) {
        if !claim.is_lasting() || claim.ending {
            let (device, revision) = (claim.device_id, claim.revision);
            steps.push(Step::Release { device, revision, why: "its guest does not run" });
        }
    }
    let lasting = |c: &&&ClaimRow| !c.pending && !c.ending && c.is_lasting() && c.is_allocated();
    if instance.claims.iter().any(|c| lasting(&c)) {
        steps.push(Step::OutOfGuest);
    }
    steps
}

/// A hostdev of the live XML that is a device of the inventory.
struct Hosted<'a> {
    hostdev: &'a UsbHostdev,
    record: &'a Record,
    /// Whether the device is plugged in and has the address in the hostdev.
    fresh: bool,
}

struct Present<'a> {
    instance: &'a Instance<'a>,
    host: &'a Host<'a>,
    guest: &'a Guest,
}

impl<'a> Present<'a> {
    fn plan(&self) -> Vec<Step> {
        let hosted = self.hosted();
        let mut steps = Vec::new();
        let mut problems = BTreeMap::new();
        let mut suspects = Vec::new();
        let (mut in_guest, mut stale) = (BTreeSet::new(), BTreeSet::new());
        for h in &hosted {
            let device = h.record.entry.id;
            let claim = self.claim(device);
            match (self.host.holders.get(&device), h.fresh) {
                // A restore or migration of the same instance made the claim while this guest runs.
                // The claim is not for this guest.
                _ if claim.is_some_and(|c| c.pending) => {}
                (Some(holder), true)
                    if *holder == self.instance.id && !claim.is_some_and(|c| c.ending) =>
                {
                    in_guest.insert(device);
                    // The XML still shows the device, but QEMU has released it: see
                    // [`ClaimRow::needs_reattach`].
                    steps.extend(claim.filter(|c| c.needs_reattach).and_then(|_| detach(h)));
                    suspects.extend(claim.and_then(|c| taken_back(c, h)));
                }
                (Some(holder), _) if *holder == self.instance.id => {
                    stale.insert(device);
                    steps.extend(detach(h));
                }
                (Some(holder), true) => {
                    let why = format!(
                        "it was attached by hand although instance {holder} holds it: detach it \
                         from one of them (virsh detach-device)"
                    );
                    problems.insert(about_device(device), why);
                }
                (None, true) => steps.push(Step::Adopt { holding: holding(h.hostdev), device }),
                (_, false) => {}
            }
        }
        steps.extend(suspects.into_iter().map(|(alias, device)| {
            let others = in_guest.iter().copied().filter(|other| *other != device).collect();
            Step::TakenBack { alias, device, others }
        }));
        let is_missing =
            |c: &ClaimRow| !in_guest.contains(&c.device_id) && !stale.contains(&c.device_id);
        let (taken, held): (Vec<&ClaimRow>, Vec<&ClaimRow>) =
            self.claims().partition(|c| is_missing(c) && self.was_detached_by_hand(c));
        let settled = |c: &&ClaimRow| {
            let inside = in_guest.contains(&c.device_id);
            (c.is_allocated()) == (inside && !c.needs_reattach) && (inside || !c.needs_reattach)
        };
        if !held.iter().all(settled) {
            // Settle before a stale hostdev is detached. Otherwise its absence would look like a
            // detach by hand.
            steps.insert(0, Step::Settle { in_guest: in_guest.iter().copied().collect() });
        }
        for claim in taken {
            let (device, revision) = (claim.device_id, claim.revision);
            steps.insert(0, Step::Release { device, revision, why: "detached by hand" });
        }
        for claim in held.iter().filter(|c| c.serial_shared) {
            problems.insert(
                about_serial(claim.device_id),
                format!(
                    "another device of the kind of device {} has the same serial: only the port \
                     identifies it. Do not move it to another port while a guest holds it",
                    claim.device_id
                ),
            );
        }
        for claim in held.into_iter().filter(|c| is_missing(c)) {
            match self.withheld(claim) {
                Some(why) => drop(problems.insert(about_device(claim.device_id), why)),
                None => steps.extend(self.missing(claim)),
            }
        }
        let redirections = missing_redirdevs(&self.guest.domain, self.guest.redirections);
        steps.extend(redirections.into_iter().map(|n| Step::Redirect { n }));
        self.add_problems(problems, &mut steps);
        steps
    }

    /// Whether the device was attached by hand without a request, and has been detached again.
    fn was_detached_by_hand(&self, claim: &ClaimRow) -> bool {
        let present = self.host.devices.get(&claim.device_id).is_some_and(|record| record.present);
        let unasked = claim.by_hand && claim.request.is_none();
        unasked && claim.is_allocated() && present
    }

    /// Returns why the guest does not get a quarantined or flapping device back.
    fn withheld(&self, claim: &ClaimRow) -> Option<String> {
        let record =
            self.host.devices.get(&claim.device_id).filter(|r| r.present && !claim.ending)?;
        let why = match (&record.quarantined, &record.flapping_until) {
            (Some(why), _) => {
                format!("{why}; then 'virt-usb quarantine clear {}'", claim.device_id)
            }
            (None, Some(until)) => format!(
                "it connects and disconnects too often: the guest gets it back if it stays \
                 connected until {until}"
            ),
            (None, None) => return None,
        };
        Some(why)
    }

    /// Plans the step for a claim whose device is not in the guest.
    fn missing(&self, claim: &ClaimRow) -> Option<Step> {
        let (device, revision) = (claim.device_id, claim.revision);
        let present = self.host.devices.get(&device).is_some_and(|record| record.present);
        if claim.ending {
            return Some(Step::Release { device, revision, why: "detached" });
        }
        match (present, self.host.replug) {
            (true, _) => Some(Step::Attach { device }),
            (false, ReplugPolicy::Reattach) => None,
            (false, ReplugPolicy::Release) => {
                Some(Step::Release { device, revision, why: "unplugged" })
            }
        }
    }

    /// Records new problems and solved ones. A problem about a pending step stays until that step
    /// is done.
    fn add_problems(&self, problems: BTreeMap<String, String>, steps: &mut Vec<Step>) {
        let open: BTreeSet<String> = steps.iter().filter_map(Step::about).collect();
        for about in self.instance.problems.keys() {
            if !open.contains(about) && !problems.contains_key(about) {
                steps.push(Step::Solved { about: about.clone() });
            }
        }
        let new = problems
            .into_iter()
            .filter(|(about, what)| self.instance.problems.get(about) != Some(what));
        steps.extend(new.map(|(about, what)| Step::Note { about, what }));
    }

    /// Claims of the instance that take part in the plan. A pending claim waits for its guest's own
    /// start.
    fn claims(&self) -> impl Iterator<Item = &'a ClaimRow> {
        self.instance.claims.iter().copied().filter(|c| !c.pending)
    }

    fn claim(&self, device: DeviceId) -> Option<&ClaimRow> {
        self.instance.claims.iter().copied().find(|c| c.device_id == device)
    }

    fn hosted(&self) -> Vec<Hosted<'a>> {
        let hostdevs: Vec<&UsbHostdev> = self.guest.domain.host_devices().collect();
        let mut found: Vec<Option<Hosted<'a>>> =
            hostdevs.iter().map(|h| self.identify(h)).collect();
        // A handwritten hostdev whose device has another address now is the only device of its kind
        // among those of this instance that have no hostdev.
        for (at, hostdev) in hostdevs.into_iter().enumerate() {
            if found[at].is_some() {
                continue;
            }
            let named: BTreeSet<DeviceId> =
                found.iter().flatten().map(|h| h.record.entry.id).collect();
            let mine = self.claims().map(|c| c.device_id).filter(|id| !named.contains(id));
            let alike: Vec<&Record> = mine
                .filter_map(|id| self.host.devices.get(&id))
                .filter(|r| hostdev.usb == Some(r.usb()))
                .collect();
            if let [record] = alike.as_slice() {
                found[at] = Some(Hosted { hostdev, record, fresh: false });
            }
        }
        found.into_iter().flatten().collect()
    }

    /// Finds the device of a hostdev: by its alias, if the instance has a claim on that device, or
    /// by address, port or kind.
    fn identify(&self, hostdev: &'a UsbHostdev) -> Option<Hosted<'a>> {
        let is_kind = |record: &&Record| hostdev.usb.is_none_or(|usb| usb == record.usb());
        let claim = self.claims().find(|c| Some(c.device_id) == hostdev.injected());
        let named = claim.and_then(|c| self.host.devices.get(&c.device_id));
        let there = |r: &&Record| {
            let port = hostdev.port.as_ref();
            let is_there = match (hostdev.address, port) {
                (Some(address), _) => r.entry.address == address,
                (None, Some(port)) => r.entry.port_path == *port,
                // Without an address, QEMU takes any device of the kind. It must be one that the
                // instance holds.
                (None, None) => hostdev.usb.is_some() && self.claim(r.entry.id).is_some(),
            };
            is_there && is_kind(r)
        };
        let all = || self.host.devices.values().filter(there);
        // An unplugged device may have had the address that another device has now.
        let present = || all().find(|r| r.present);
        // The alias of a handwritten hostdev may look like that of another device.
        let has_place = hostdev.address.is_some() || hostdev.port.is_some();
        let is_by_hand =
            |r: &&Record| has_place && self.claim(r.entry.id).is_some_and(|c| c.by_hand);
        let by_hand = || present().filter(is_by_hand);
        // The hostdev of a device that now shows another vendor or product (usb_aliases) is stale.
        let renamed = || named.filter(|_| claim.is_some_and(|c| !c.by_hand));
        let record = by_hand()
            .or_else(|| named.filter(is_kind))
            .or_else(present)
            .or_else(renamed)
            .or_else(|| all().next())?;
        let fresh = record.present
            && is_kind(&record)
            && hostdev.address.is_none_or(|a| a == record.entry.address)
            && hostdev.port.as_ref().is_none_or(|p| *p == record.entry.port_path)
            && self.is_same_stay(record);
        Some(Hosted { hostdev, record, fresh })
    }
}

impl Present<'_> {
    /// Whether the device has been plugged in without interruption since it was attached. If it was
    /// unplugged and has the same address again, the guest does not have it, although the live XML
    /// shows it.
    fn is_same_stay(&self, record: &Record) -> bool {
        let then = self.claim(record.entry.id).and_then(|c| c.generation);
        then.zip(record.generation).is_none_or(|(then, now)| then == now)
    }
}

/// Returns a device that a driver of the host may have taken back. While a guest has a device, the
/// driver of its interfaces is usbfs or none. The inventory has the drivers of the last scan.
fn taken_back(claim: &ClaimRow, hosted: &Hosted<'_>) -> Option<(String, DeviceId)> {
    let drivers = hosted.record.entry.driver.as_deref()?;
    let is_hosts = drivers.split(',').any(|driver| driver != CLAIMED);
    let is_in_guest = claim.is_allocated() && !claim.needs_reattach;
    let alias = hosted.hostdev.alias.clone().filter(|_| is_hosts && is_in_guest)?;
    Some((alias, hosted.record.entry.id))
}

/// Plans the detach of a hostdev. Every device of a running domain has an alias.
fn detach(hosted: &Hosted<'_>) -> Option<Step> {
    let alias = hosted.hostdev.alias.clone()?;
    Some(Step::Detach { alias, device: hosted.record.entry.id })
}
