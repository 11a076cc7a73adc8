//! `restore` and `migrate`: libvirt uses what is printed here. Each USB hostdev gets the device that it is to have on this host.
//!
//! A restore is not refused here but by the `prepare` that follows it ([`hand_on`]).

use virt_usb_domxml::{Document, Edits, UsbHostdev};
use virt_usb_model::{DeviceId, DeviceRequest, Selector};
use virt_usb_store::claim::{Asker, Claimed, Granted, Judge, Standing, Verified, Want};
use virt_usb_store::{ClaimRow, Context, Record, Store};

use crate::answer::Answer;
use crate::call::Incoming;
use crate::config::{Config, MigrationPolicy};
use crate::guest::{Ports, asker, hostdev, open, refuse_hubs};
use crate::message;
use crate::prepare::only;
use crate::run::{Fault, Job, NOTHING};

pub(crate) fn incoming(job: &Job<'_>, how: Incoming) -> Result<Answer, Fault> {
    let domain = job.domain;
    if domain.hostdevs.is_empty() {
        return Ok(Answer::unchanged(NOTHING));
    }
    // A hostdev that somebody wrote into a saved domain is theirs: where we fail, it goes on as if we were not there.
    let concerned = how == Incoming::Migrate || domain.hostdevs.iter().any(|h| h.injected().is_some());
    let config = job.config(concerned)?;
    if how == Incoming::Migrate && config.migration == MigrationPolicy::Refuse {
        return Ok(Answer::refused(format!(
            "{} has {} USB device(s) of its host passed through, which cannot move with it: detach them before the migration, or set \
             migration = \"reclaim\" in the configuration of this host to give it equivalent ones",
            domain.name,
            domain.hostdevs.len()
        )));
    }
    if let Some(refusal) = refuse_hubs(config, domain) {
        return Ok(refusal);
    }
    let instance = domain
        .uuid
        .ok_or_else(|| Fault::of(concerned, "its XML has no <uuid>, by which devices are claimed"))?;
    let (store, context) = open(config, &job.call.op, concerned)?;
    let asker = asker(&store, domain, instance).map_err(|e| Fault::of(concerned, e))?;
    Arrival { job, config, store, context, asker, concerned }.settle(how)
}

/// Writes a restore's refusal into the XML, for `prepare` to refuse with.
///
/// libvirt 11.3 takes a restore hook's failure for a success, and removes the managed save image of a guest that it did not start
/// (`qemuDomainObjRestore` in src/qemu/qemu_driver.c leaves `ret` at 0). `prepare`, which comes next and gets this XML, is heeded: the start
/// fails, the user sees why, and the image stays.
pub(crate) fn hand_on(answer: Answer, document: &Document<'_>) -> Answer {
    let Some(why) = answer.refusal.clone() else { return answer };
    match document.rewrite(&Edits { refusal: Some(why), ..Edits::default() }) {
        Ok(xml) => Answer { xml, did: "refused, which prepare is to say".into(), ..Answer::default() },
        Err(_) => answer,
    }
}

/// A guest that comes in with devices.
struct Arrival<'a> {
    job: &'a Job<'a>,
    config: &'a Config,
    store: Store,
    context: Context,
    asker: Asker,
    concerned: bool,
}

impl Arrival<'_> {
    /// The guest comes from another host, and by this inventory it runs on this one: two libvirtds use one inventory, and the device that
    /// its old QEMU has would be given to its new one too.
    fn refuse_shared(&self) -> Result<Option<Answer>, Fault> {
        let claims = self.store.claims_of(self.asker.instance).map_err(|e| Fault::of(self.concerned, e))?;
        let runs = |c: &&ClaimRow| {
            let firm = !c.pending && c.boot_id == self.context.boot_id;
            firm && (c.state == "allocated" || c.hold == "running")
        };
        Ok(claims.iter().find(runs).map(|claim| {
            Answer::refused(format!(
                "{} comes from another host, and in this host's inventory ({}) it holds device {} since {}, as a guest does that runs here: each libvirtd \
                 needs a state_dir of its own. If it has ended here, the agent frees the device within seconds",
                self.asker.domain,
                self.config.state_dir.display(),
                claim.device_id,
                claim.created_at
            ))
        }))
    }

    fn settle(mut self, how: Incoming) -> Result<Answer, Fault> {
        if how == Incoming::Migrate
            && let Some(refusal) = self.refuse_shared()?
        {
            return Ok(refusal);
        }
        let known = self.store.all_devices().map_err(|e| Fault::of(self.concerned, e))?;
        let mut refusal = String::new();
        for &choice in choices(self.config, how) {
            let places = match self.places(choice, &known) {
                Ok(places) => places,
                Err(why) => {
                    refusal = why;
                    continue;
                }
            };
            if places.is_empty() {
                return Ok(Answer::unchanged("no USB device that could be told apart"));
            }
            let want = |p: &Place| Want { request: p.request.clone(), lasting: false, by_hand: p.by_hand };
            let wants: Vec<Want> = places.iter().map(want).collect();
            let mut ports = Ports { sysfs_root: &self.config.sysfs_root };
            let claimed = self
                .store
                .claim(&self.asker, &wants, &[], Standing::Pending, &mut ports, &self.context)
                .map_err(|e| Fault::of(self.concerned, e))?;
            match claimed {
                Claimed::Granted(granted) => return relocated(self.job, &places, &granted),
                Claimed::Unfit(why) => return Ok(Answer::refused(format!("{} {why}", self.asker.domain))),
                Claimed::Short(short) => {
                    let lead = |n: usize| places.get(n).map_or_else(String::new, |p| p.what.clone());
                    refusal = message::shortages_of_incoming(&self.asker, &short, lead);
                }
            }
        }
        Ok(Answer::refused(match how {
            Incoming::Migrate => refusal,
            Incoming::Restore => format!(
                "{refusal}. To start the guest without its saved state: 'virsh managedsave-remove {}' (what was in its memory is lost, as after a power cut)",
                self.asker.domain
            ),
        }))
    }

    /// What each hostdev of the XML is to get. One that names no device that this host knows stays as it is: it is not ours.
    fn places(&self, choice: Choice, known: &[Record]) -> Result<Vec<Place>, String> {
        let mut places = Vec::new();
        for (position, hostdev) in self.job.domain.hostdevs.iter().enumerate() {
            let same = match choice {
                Choice::Same => self.same(hostdev, known)?,
                Choice::Equivalent => None,
            };
            let kind = hostdev.usb.map(|usb| Selector {
                vendor_id: Some(usb.vendor),
                product_id: Some(usb.product),
                ..Selector::default()
            });
            let (request, what) = match (same, kind) {
                (Some(id), _) => (only(id), describe(id, hostdev, known)),
                (None, Some(selector)) if choice == Choice::Equivalent => {
                    let request = DeviceRequest { selector, count: 1 };
                    let what = format!("a USB device {request}");
                    (request, what)
                }
                _ => continue,
            };
            let by_hand = hostdev.injected().is_none();
            places.push(Place { position, request, by_hand, what });
        }
        Ok(places)
    }

    /// The device that the guest had: by our alias, or, in a hostdev that somebody wrote, the one of its kind that is at its address,
    /// or the only one of its kind. Which of several twins it was cannot be known.
    fn same(&self, hostdev: &UsbHostdev, known: &[Record]) -> Result<Option<DeviceId>, String> {
        // An alias from another host, or from an inventory that was begun anew, may name another device here.
        let differs =
            |id| hostdev.usb.is_some_and(|usb| known.iter().any(|r| r.entry.id == id && r.usb() != usb));
        if let Some(id) = hostdev.injected().filter(|id| !differs(*id)) {
            return Ok(Some(id));
        }
        let Some(usb) = hostdev.usb else { return Ok(None) };
        let twins: Vec<&Record> = known.iter().filter(|r| r.deleted == 0 && r.usb() == usb).collect();
        let mut ports = Ports { sysfs_root: &self.config.sysfs_root };
        let mut at_address =
            |r: &&&Record| matches!(ports.verify(r), Verified::Here(now) if hostdev.address == Some(now));
        match (twins.iter().find(&mut at_address), twins.as_slice()) {
            (Some(device), _) | (None, [device]) => Ok(Some(device.entry.id)),
            (None, []) if hostdev.injected().is_some() => Err(format!(
                "{} comes with a USB device {usb}, and this host has no such device: plug it in, and run 'virt-usb discover'",
                self.asker.domain
            )),
            (None, []) => Ok(None),
            (None, several) => Err(format!(
                "{} comes with a USB device {usb}, of which this host has {}, none at the address that it had: which one was the guest's cannot be told. \
                 Let a flavor ask for it, which tells them apart",
                self.asker.domain,
                several.len()
            )),
        }
    }
}

/// What will do for a hostdev.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Choice {
    /// The same device.
    Same,
    /// One of the same kind.
    Equivalent,
}

/// A saved guest gets back its own device; another one only where the policy allows it. A guest from another host cannot get its own.
const fn choices(config: &Config, how: Incoming) -> &'static [Choice] {
    match (how, config.migration) {
        (Incoming::Migrate, _) => &[Choice::Equivalent],
        (Incoming::Restore, MigrationPolicy::Reclaim) => &[Choice::Same, Choice::Equivalent],
        (Incoming::Restore, MigrationPolicy::Refuse) => &[Choice::Same],
    }
}

/// A hostdev, by its position in the XML, and the request for its device.
struct Place {
    position: usize,
    request: DeviceRequest,
    by_hand: bool,
    /// The device in words, for messages.
    what: String,
}

/// `device 5 (0529:0001 "HASP HL", port 1-1.4)`, as far as it is known here.
fn describe(id: DeviceId, hostdev: &UsbHostdev, known: &[Record]) -> String {
    match (known.iter().find(|r| r.entry.id == id), hostdev.usb) {
        (Some(record), _) => message::device(record),
        (None, Some(usb)) => format!("device {id} ({usb})"),
        (None, None) => format!("device {id}"),
    }
}

fn relocated(job: &Job<'_>, places: &[Place], granted: &[Granted]) -> Result<Answer, Fault> {
    let relocate =
        granted.iter().filter_map(|g| Some((places.get(g.request)?.position, hostdev(&g.device)))).collect();
    let edits = Edits { relocate, ..Edits::default() };
    let xml = job.document.rewrite(&edits).map_err(|e| {
        Fault::of(true, format!("cannot write the devices' new addresses into the domain XML: {e}"))
    })?;
    let ids: Vec<String> = granted.iter().map(|g| g.device.entry.id.to_string()).collect();
    Ok(Answer { xml, did: format!("claimed {}, to be confirmed", ids.join(", ")), ..Answer::default() })
}
