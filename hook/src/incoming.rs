//! `restore` and `migrate`: libvirt uses what is printed here. Each USB hostdev gets the device that it is to have on this host.

use virt_usb_domxml::{Edits, UsbHostdev};
use virt_usb_model::{DeviceRequest, Selector};
use virt_usb_store::claim::{Claimed, Granted, Standing, Want};

use crate::answer::Answer;
use crate::call::Incoming;
use crate::config::{Config, MigrationPolicy};
use crate::guest::{Ports, hostdev, open};
use crate::message;
use crate::prepare::{asker, only};
use crate::run::{Fault, Job, NOTHING};

pub(crate) fn incoming(job: &Job<'_>, how: Incoming) -> Result<Answer, Fault> {
    let domain = job.domain;
    if domain.hostdevs.is_empty() {
        return Ok(Answer::unchanged(NOTHING));
    }
    let config = job.config(true)?;
    if how == Incoming::Migrate && config.migration == MigrationPolicy::Refuse {
        return Ok(Answer::refused(format!(
            "{} has {} USB device(s) of its host passed through, which cannot move with it: detach them before the migration, or set \
             migration = \"reclaim\" in the configuration of this host to give it equivalent ones",
            domain.name,
            domain.hostdevs.len()
        )));
    }
    let instance = domain.uuid.ok_or_else(|| Fault::of(true, format!("its XML has no <uuid>, by which devices are claimed")))?;
    let (mut store, context) = open(config, &job.call.op, true)?;
    let prefer: Vec<_> = domain.hostdevs.iter().filter_map(UsbHostdev::injected).filter(|_| how == Incoming::Restore).collect();
    let mut ports = Ports { sysfs_root: &config.sysfs_root };
    let asker = asker(domain, instance);
    let mut short = Vec::new();
    for &choice in choices(config, how) {
        let (positions, wants) = wants(&domain.hostdevs, choice);
        if wants.is_empty() {
            return Ok(Answer::unchanged("no USB device that could be told apart"));
        }
        let claimed = store
            .claim(&asker, &wants, &prefer, Standing::Pending, &mut ports, &context)
            .map_err(|e| Fault::of(true, e))?;
        match claimed {
            Claimed::Granted(granted) => return relocated(job, &positions, &granted),
            Claimed::Unfit(why) => return Ok(Answer::refused(format!("{} {why}", domain.name))),
            Claimed::Short(missing) => short = missing,
        }
    }
    let missing = message::shortages_of_incoming(&asker, &short);
    Ok(Answer::refused(match how {
        Incoming::Migrate => missing,
        Incoming::Restore => format!(
            "{missing}. To start the guest without its saved state: 'virsh managedsave-remove {}' (what was in its memory is lost, as after a power cut)",
            domain.name
        ),
    }))
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

/// A request for each hostdev that says what it is, with its position in the XML. One that has only an address says nothing
/// about who it was: it stays as it is.
fn wants(hostdevs: &[UsbHostdev], choice: Choice) -> (Vec<usize>, Vec<Want>) {
    let request = |h: &UsbHostdev| -> Option<DeviceRequest> {
        let kind = h.usb.map(|usb| Selector { vendor_id: Some(usb.vendor), product_id: Some(usb.product), ..Selector::default() });
        match (choice, h.injected(), kind) {
            (Choice::Same, Some(id), _) => Some(only(id)),
            (_, _, Some(selector)) => Some(DeviceRequest { selector, count: 1 }),
            (_, _, None) => None,
        }
    };
    hostdevs.iter().enumerate().filter_map(|(i, h)| Some((i, Want { request: request(h)?, lasting: false }))).unzip()
}

fn relocated(job: &Job<'_>, positions: &[usize], granted: &[Granted]) -> Result<Answer, Fault> {
    let relocate = granted.iter().filter_map(|g| Some((*positions.get(g.request)?, hostdev(&g.device)))).collect();
    let edits = Edits { relocate, ..Edits::default() };
    let xml = virt_usb_domxml::rewrite(job.xml, &edits)
        .map_err(|e| Fault::of(true, format!("cannot write the devices' new addresses into the domain XML: {e}")))?;
    let ids: Vec<String> = granted.iter().map(|g| g.device.entry.id.to_string()).collect();
    Ok(Answer { xml, did: format!("claimed {}, to be confirmed", ids.join(", ")), ..Answer::default() })
}
