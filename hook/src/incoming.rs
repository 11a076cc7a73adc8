//! `restore` and `migrate`: libvirt uses the printed XML. It gives each USB hostdev its device on
//! this host.
//!
//! A hostdev belongs to virt-usb if it has a claim, or if the guest requests the device that its
//! alias names. Such a hostdev gets its device by the rules. All other hostdevs are handwritten:
//! they are adopted, and only an outdated address is changed in their XML.
//!
//! A restore is not refused here, but by the `prepare` that follows it ([`hand_on`]).

use virt_usb_config::{Config, HoldPolicy, MigrationPolicy};
use virt_usb_domxml::{Document, Domain, Edits, UsbHostdev};
use virt_usb_model::{BusAddress, DeviceId, DeviceRequest, Selector};
use virt_usb_store::adopt::{Holding, Received};
use virt_usb_store::claim::{ClaimRequest, Claimant, Granted};
use virt_usb_store::{ClaimRow, Context, Record, Store};

use crate::answer::Answer;
use crate::call::Incoming;
use crate::flavor_source::{FlavorRequest, only, wants};
use crate::job::{HookError, Job, NOTHING};
use crate::message;
use crate::verify::{Ports, claimant, holding, hostdev, open, refuse_hubs};

pub(crate) fn incoming(job: &Job<'_>, how: Incoming) -> Result<Answer, HookError> {
    let domain = job.domain;
    if !domain.has_host_devices() {
        return Ok(Answer::unchanged(NOTHING));
    }
    let state_dir = job.state_dir();
    // Ignore an invalid flavor: the guest has the devices with which it was saved.
    let request = FlavorRequest::read(&domain.flavor, &state_dir).unwrap_or(FlavorRequest::Nothing);
    // If the hook fails, a saved domain with only handwritten hostdevs continues.
    let injected = domain.hostdevs.iter().any(|h| h.injected().is_some());
    let has_requests =
        request.is_certain() || job.is_assigned(&state_dir) || job.is_holder(&state_dir);
    let concerned = how == Incoming::Migrate || (injected && has_requests);
    let config = job.config(concerned)?;
    if how == Incoming::Migrate && config.migration == MigrationPolicy::Refuse {
        return Ok(Answer::refused(format!(
            "{} has {} USB device(s) of its host passed through, which cannot move with it: \
             detach them before the migration, or set migration = \"reclaim\" in the \
             configuration of this host to claim equivalent devices",
            domain.name,
            domain.host_devices().count()
        )));
    }
    if let Some(refusal) = refuse_hubs(config, domain) {
        return Ok(refusal);
    }
    let instance = domain
        .uuid
        .ok_or_else(|| HookError::of(concerned, "its XML has no <uuid>, which a claim needs"))?;
    let (store, context) = open(config, &job.call.op, concerned)?;
    job.admit(&store, config, concerned)?;
    let error = |e| HookError::of(concerned, e);
    let claimant = claimant(&store, domain, instance).map_err(error)?;
    let claims = store.claims_of(instance).map_err(error)?;
    let known = store.all_devices().map_err(error)?;
    let flavor = request.resolve(&store).unwrap_or_default();
    let requests = wants(&flavor, config.hold, &store.assignments(instance).map_err(error)?);
    Arrival { job, how, config, store, context, claimant, concerned, claims, known, requests }
        .settle()
}

/// Writes the refusal of a restore into the XML, so that `prepare` refuses the domain.
///
/// libvirt 11.3 treats the failure of a restore hook as success, and removes the managed save image
/// although the guest was not started (`qemuDomainObjRestore` in src/qemu/qemu_driver.c leaves
/// `ret` at 0). It respects the failure of `prepare`, which gets this XML next: the start fails,
/// the user sees the reason, and the image stays.
pub(crate) fn hand_on(answer: Answer, document: &Document<'_>) -> Answer {
    let Some(why) = answer.refusal.clone() else { return answer };
    match document.rewrite(&Edits { refusal: Some(why), ..Edits::default() }) {
        Ok(xml) => {
            Answer { xml, did: "refused; prepare reports the reason".into(), ..Answer::default() }
        }
        Err(_) => answer,
    }
}

/// A guest that is restored or migrated with USB devices.
struct Arrival<'a> {
    job: &'a Job<'a>,
    how: Incoming,
    config: &'a Config,
    store: Store,
    context: Context,
    claimant: Claimant,
    concerned: bool,
    /// Claims that the instance holds.
    claims: Vec<ClaimRow>,
    /// All devices of the inventory, including removed ones.
    known: Vec<Record>,
    /// Current requests of the instance's flavor and assignments.
    requests: Vec<ClaimRequest>,
}

impl<'a> Arrival<'a> {
    /// Refuses a guest that migrates from another host although this inventory shows it running
    /// here. Two libvirtds then share the inventory, and two QEMUs would get the same device.
    fn refuse_shared(&self) -> Option<Answer> {
        let claim = self.claims.iter().find(|c| c.is_of_a_run(&self.context.boot_id))?;
        Some(Answer::refused(format!(
            "{} comes from another host, and in this host's inventory ({}) it holds device {} \
             since {}, like a guest that runs here: each libvirtd needs its own state_dir. If the \
             guest has stopped here, the agent releases the device within seconds",
            self.claimant.domain,
            self.config.state_dir.display(),
            claim.device_id,
            claim.created_at
        )))
    }

    fn settle(mut self) -> Result<Answer, HookError> {
        if self.how == Incoming::Migrate
            && let Some(refusal) = self.refuse_shared()
        {
            return Ok(refusal);
        }
        let (places, by_hand) = self.places();
        // Addresses and ports of the source host mean nothing here.
        let here = |holding: Holding| match self.how {
            Incoming::Migrate => Holding { address: None, port: None, ..holding },
            Incoming::Restore => holding,
        };
        let holdings: Vec<Holding> =
            by_hand.iter().map(|(_, hostdev)| here(holding(hostdev))).collect();
        let mut refusal = String::new();
        for &choice in choices(self.config, self.how) {
            let Some(wants) = wanted(&places, choice) else { continue };
            let mut ports = Ports { sysfs_root: &self.config.sysfs_root };
            let equivalent = choice == Choice::Equivalent;
            let received = self
                .store
                .receive(&self.claimant, &wants, &holdings, equivalent, &mut ports, &self.context)
                .map_err(|e| HookError::of(self.concerned, e))?;
            let name = &self.claimant.domain;
            refusal = match received {
                Received::Granted { ours, by_hand: found } => {
                    let readdress = readdressed(self.job, &by_hand, &found);
                    let answer = self.relocated(&places, &ours, readdress, &found)?;
                    return Ok(self.warned(answer, &by_hand, &found));
                }
                Received::Unfit(why) => return Ok(Answer::refused(format!("{name} {why}"))),
                Received::HeldBy(device, claim) => message::held_by_hand(name, &device, &claim),
                Received::SetAside(device) => message::set_aside_by_hand(name, &device),
                Received::Short(short) => {
                    let lead =
                        |n: usize| places.get(n).map_or_else(String::new, |p| p.what(choice));
                    let host = message::Host::of(self.config, &self.store, &short);
                    message::shortages_of_incoming(&self.claimant, &short, lead, &host)
                }
            };
        }
        Ok(Answer::refused(match self.how {
            Incoming::Migrate => refusal,
            Incoming::Restore => format!(
                "{refusal}. To start the guest without its saved state: 'virsh managedsave-remove \
                    {}' (what was in its memory is lost, as after a power cut)",
                self.claimant.domain
            ),
        }))
    }

    /// Returns the hostdevs of virt-usb, each with its wanted device, and the handwritten hostdevs.
    /// Positions count all host devices.
    fn places(&self) -> (Vec<Place>, Vec<(usize, &'a UsbHostdev)>) {
        let domain: &'a Domain = self.job.domain;
        let (mut ours, mut by_hand) = (Vec::new(), Vec::new());
        for (position, hostdev) in domain.host_devices().enumerate() {
            match self.ours(position, hostdev) {
                Some(place) => ours.push(place),
                None => by_hand.push((position, hostdev)),
            }
        }
        (ours, by_hand)
    }

    fn ours(&self, position: usize, hostdev: &UsbHostdev) -> Option<Place> {
        let id = hostdev.injected()?;
        let kind = hostdev.usb.map(|usb| {
            let (vendor_id, product_id) = (Some(usb.vendor), Some(usb.product));
            DeviceRequest {
                selector: Selector { vendor_id, product_id, ..Selector::default() },
                count: 1,
            }
        });
        if self.how == Incoming::Migrate {
            // The alias is that of the source host. If the guest requests devices, virt-usb gave it
            // this one there.
            kind.as_ref().filter(|_| !self.requests.is_empty())?;
            let lasting = self.config.hold == HoldPolicy::Instance;
            return Some(Place {
                position,
                same: None,
                kind,
                number: None,
                lasting,
                device: String::new(),
            });
        }
        // If the inventory was created again since, the alias may name another device.
        let is_kind = |r: &&Record| {
            let same = |usb| usb == r.usb() || self.config.aliases.join(usb, r.usb());
            r.entry.id == id && hostdev.usb.is_none_or(same)
        };
        let record = self.known.iter().find(is_kind)?;
        let (number, lasting) = match self.claims.iter().find(|c| c.device_id == id) {
            Some(claim) if claim.by_hand => return None,
            Some(claim) => (claim.request, claim.is_lasting()),
            None => {
                let requests_it = |w: &ClaimRequest| record.is_selected_by(&w.request.selector);
                let number = self.requests.iter().position(requests_it)?;
                (u32::try_from(number).ok(), self.requests.get(number).is_some_and(|w| w.lasting))
            }
        };
        Some(Place {
            position,
            same: Some(id),
            kind,
            number,
            lasting,
            device: message::device(record),
        })
    }

    /// Adds a warning for each handwritten hostdev whose device cannot be identified. libvirt
    /// itself then fails, without the reason.
    fn warned(
        &self,
        mut answer: Answer,
        by_hand: &[(usize, &UsbHostdev)],
        found: &[Option<(DeviceId, BusAddress)>],
    ) -> Answer {
        let unknown = by_hand.iter().zip(found).filter(|(_, found)| found.is_none());
        for usb in unknown
            .filter_map(|((_, hostdev), _)| hostdev.usb.filter(|_| hostdev.address.is_some()))
        {
            let kind = self.known.iter().filter(|r| r.deleted == 0 && r.usb() == usb).count();
            if kind > 1 {
                answer = answer.warn(format!(
                    "{} comes with a USB device {usb}. This host has {kind} of that kind, none at \
                     the old address, and virt-usb cannot tell which one the guest had. Request \
                     the device in a flavor, which identifies it",
                    self.claimant.domain
                ));
            }
        }
        answer
    }

    fn relocated(
        &self,
        places: &[Place],
        granted: &[Granted],
        readdress: Vec<(usize, BusAddress)>,
        found: &[Option<(DeviceId, BusAddress)>],
    ) -> Result<Answer, HookError> {
        let place = |g: &Granted| Some((places.get(g.request)?.position, hostdev(&g.device, None)));
        let relocate = granted.iter().filter_map(place).collect();
        let edits = Edits { relocate, readdress, ..Edits::default() };
        let xml = self.job.document.rewrite(&edits).map_err(|e| {
            HookError::of(
                true,
                format!("cannot write the devices' new addresses into the domain XML: {e}"),
            )
        })?;
        let ours = granted.iter().map(|g| g.device.entry.id);
        let ids: Vec<String> = ours
            .chain(found.iter().flatten().map(|(id, _)| *id))
            .map(|id| id.to_string())
            .collect();
        let did = match ids.as_slice() {
            [] => "no identifiable USB device".to_owned(),
            ids => format!("claimed {}, pending", ids.join(", ")),
        };
        Ok(Answer { xml, did, ..Answer::default() })
    }
}

/// Returns the new addresses of handwritten hostdevs with an outdated address, which libvirt would
/// use unchanged.
fn readdressed(
    job: &Job<'_>,
    by_hand: &[(usize, &UsbHostdev)],
    found: &[Option<(DeviceId, BusAddress)>],
) -> Vec<(usize, BusAddress)> {
    let stale = by_hand.iter().zip(found).filter_map(|((position, hostdev), found)| {
        let (_, address) = (*found)?;
        // Devices in QEMU's command line are not edited.
        let is_stale = hostdev.address.is_some_and(|a| a != address);
        (is_stale && *position < job.domain.hostdevs.len()).then_some((*position, address))
    });
    stale.collect()
}

/// Devices that are acceptable for a hostdev.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Choice {
    /// Only the same device.
    Same,
    /// Any device of the same kind.
    Equivalent,
}

/// Returns the acceptable devices, in the order in which they are tried. A restored guest gets its
/// own device, or an equivalent one if the policy allows it. A migrated guest gets an equivalent
/// one.
const fn choices(config: &Config, how: Incoming) -> &'static [Choice] {
    match (how, config.migration) {
        (Incoming::Migrate, _) => &[Choice::Equivalent],
        (Incoming::Restore, MigrationPolicy::Reclaim) => &[Choice::Same, Choice::Equivalent],
        (Incoming::Restore, MigrationPolicy::Refuse) => &[Choice::Same],
    }
}

/// A hostdev of virt-usb in the XML, with the device that it must get.
struct Place {
    position: usize,
    /// The device that the guest had. `None` for a guest from another host.
    same: Option<DeviceId>,
    /// Request for any device of the same kind.
    kind: Option<DeviceRequest>,
    /// Number of the request that the device serves, if known.
    number: Option<u32>,
    lasting: bool,
    /// The device in words, for messages.
    device: String,
}

impl Place {
    fn request(&self, choice: Choice) -> Option<DeviceRequest> {
        match choice {
            Choice::Same => self.same.map(only),
            Choice::Equivalent => self.kind.clone().or_else(|| self.same.map(only)),
        }
    }

    fn what(&self, choice: Choice) -> String {
        match (choice, &self.kind) {
            (Choice::Equivalent, Some(kind)) => format!("a USB device {kind}"),
            _ => self.device.clone(),
        }
    }
}

/// The requests for this choice, one per place; `None` if the choice does not apply to a place.
fn wanted(places: &[Place], choice: Choice) -> Option<Vec<ClaimRequest>> {
    let want = |p: &Place| {
        Some(ClaimRequest { request: p.request(choice)?, lasting: p.lasting, number: p.number })
    };
    places.iter().map(want).collect()
}
