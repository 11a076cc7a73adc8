//! `prepare`: claim what the domain asks for, and write it into the XML, or refuse the start. What `restore` refused is refused here.

use virt_usb_model::{DeviceId, Flavor, Selector};
use virt_usb_store::adopt::{Adoption, Stage};
use virt_usb_store::claim::{Asker, Claimed, Granted, Standing, Want};
use virt_usb_store::{Assignment, Context, Source, Store};

use crate::answer::Answer;
use crate::call::Caller;
use crate::config::{Config, HoldPolicy, RequireAgent};
use crate::guest::{Guest, Ports, asker, holding, open, refuse_hubs};
use crate::machine::{self, Agent};
use crate::message;
use crate::run::{Fault, Job, NOTHING};
use crate::wish::{Wish, wants};

pub(crate) fn prepare(job: &Job<'_>) -> Result<Answer, Fault> {
    if let Some(why) = &job.domain.refusal {
        return Ok(Answer::refused(why));
    }
    let state_dir = job.state_dir();
    let wish = Wish::read(&job.domain.flavor, &state_dir)?;
    let known = job.may_be_known(&state_dir);
    let hostdevs = &job.domain.hostdevs;
    if !(wish.is_certain() || wish.needs_store() || known || !hostdevs.is_empty()) {
        return Ok(Answer::unchanged(NOTHING));
    }
    // Only a domain that surely asks for a device, or has one of ours, is refused when we fail.
    let injected = hostdevs.iter().any(|h| h.injected().is_some());
    let concerned = wish.is_certain() || injected || job.is_assigned(&state_dir);
    let config = job.config(concerned)?;
    if let Some(refusal) = refuse_hubs(config, job.domain) {
        return Ok(refusal);
    }
    if !(wish.needs_store() || known || !hostdevs.is_empty()) {
        return redirections_only(job, config, wish);
    }
    let no_uuid = || Fault::of(concerned, "its XML has no <uuid>, by which devices are claimed");
    let instance = job.domain.uuid.ok_or_else(no_uuid)?;
    let (store, context) = open(config, &job.call.op, concerned)?;
    let asker = asker(&store, job.domain, instance).map_err(|e| Fault::of(concerned, e))?;
    let mut gate = Gate { job, config, store, context, asker, concerned };
    if let Some(refusal) = gate.take_over_by_hand()? {
        return Ok(refusal);
    }
    let flavor = wish.resolve(&gate.store)?;
    gate.concerned |= !flavor.is_empty();
    let answer = gate.claim(&flavor)?;
    if job.call.caller == Caller::Process {
        gate.store.leave();
    }
    Ok(answer)
}

/// A flavor without `usb_devices` needs no inventory.
fn redirections_only(job: &Job<'_>, config: &Config, wish: Wish) -> Result<Answer, Fault> {
    let Wish::Flavor(flavor) = wish else { return Ok(Answer::unchanged(NOTHING)) };
    let mut guest = Guest::new(&config.sysfs_root, job.domain, flavor.usb_redirection_devices.len());
    if !guest.missing_redirdevs().is_empty()
        && let Some(refusal) = refuse_without_agent(job, config)
    {
        return Ok(refusal);
    }
    match guest.plan(&[]) {
        Err(why) => Ok(Answer::refused(format!("{} {why}", job.domain.name))),
        Ok(()) => rewritten(job, config, &guest, "redirection only".into()),
    }
}

struct Gate<'a> {
    job: &'a Job<'a>,
    config: &'a Config,
    store: Store,
    context: Context,
    asker: Asker,
    /// Whether the domain surely asks for a device.
    concerned: bool,
}

impl Gate<'_> {
    /// Hostdevs that somebody wrote into the domain are claimed for it too, so that nobody else is given them. What another
    /// instance holds refuses the start.
    fn take_over_by_hand(&mut self) -> Result<Option<Answer>, Fault> {
        let holdings: Vec<_> =
            self.job.domain.hostdevs.iter().filter(|h| h.injected().is_none()).map(holding).collect();
        if holdings.is_empty() {
            return Ok(None);
        }
        let mut ports = Ports { sysfs_root: &self.config.sysfs_root };
        let adopted = self
            .store
            .adopt(&self.asker, &holdings, Stage::Starting, &mut ports, &self.context)
            .map_err(|e| Fault::of(self.concerned, e))?;
        let held = adopted.into_iter().find_map(|a| match a {
            Adoption::HeldBy(device, claim) => Some(Answer::refused(format!(
                "{} has a <hostdev> for {} in its own XML, and {} ({}) holds it since {}: take the <hostdev> out, or stop that guest",
                self.job.domain.name,
                message::device(&device),
                claim.domain,
                claim.instance_uuid,
                claim.created_at
            ))),
            Adoption::SetAside(device) => Some(Answer::refused(message::set_aside_by_hand(
                &self.job.domain.name,
                &device,
            ))),
            _ => None,
        });
        Ok(held)
    }

    fn claim(&mut self, flavor: &Flavor) -> Result<Answer, Fault> {
        let domain = self.job.domain;
        let injected: Vec<DeviceId> =
            domain.hostdevs.iter().filter_map(virt_usb_domxml::UsbHostdev::injected).collect();
        let wants = match self.arrived_with(&injected)? {
            Some(wants) => wants,
            None => wants(flavor, self.config.hold, &self.assigned()?),
        };
        let mut guest = Guest::new(&self.config.sysfs_root, domain, flavor.usb_redirection_devices.len());
        self.concerned |= !wants.is_empty();
        if !self.concerned && !self.job.may_be_known(&self.config.state_dir) {
            return Ok(Answer::unchanged(NOTHING));
        }
        // What is in the XML already, libvirt itself gives to the guest.
        let asked: usize = wants.iter().map(|w| w.request.count as usize).sum();
        if (asked > injected.len() || !guest.missing_redirdevs().is_empty())
            && let Some(refusal) = refuse_without_agent(self.job, self.config)
        {
            return Ok(refusal);
        }
        let claimed = self
            .store
            .claim(&self.asker, &wants, &injected, Standing::Firm, &mut guest, &self.context)
            .map_err(|e| Fault::of(self.concerned, e))?;
        match claimed {
            Claimed::Short(short) => Ok(Answer::refused(message::shortages(&self.asker, &short))),
            Claimed::Unfit(why) => Ok(Answer::refused(format!("{} {why}", domain.name))),
            Claimed::Granted(granted) => {
                self.make_lasting(flavor)?;
                rewritten(self.job, self.config, &guest, claimed_text(&granted))
            }
        }
    }

    /// What is assigned to the instance; without a hint of it there is nothing.
    fn assigned(&self) -> Result<Vec<Assignment>, Fault> {
        match self.job.may_be_known(&self.config.state_dir) {
            true => self.store.assignments(self.asker.instance).map_err(|e| Fault::of(self.concerned, e)),
            false => Ok(Vec::new()),
        }
    }

    /// A guest that comes in by restore or migration has what the filter claimed for it: its flavor may name devices
    /// of the host that it left, and is not asked again.
    fn arrived_with(&self, injected: &[DeviceId]) -> Result<Option<Vec<Want>>, Fault> {
        if injected.is_empty() {
            return Ok(None);
        }
        let claims = self.store.claims_of(self.asker.instance).map_err(|e| Fault::of(self.concerned, e))?;
        let lasting = self.config.hold == HoldPolicy::Instance;
        let exactly = |id: &DeviceId| {
            let by_hand = claims.iter().any(|c| c.device_id == *id && c.request.is_none());
            Want { request: only(*id), lasting: lasting && !by_hand, by_hand }
        };
        Ok(claims.iter().any(|c| c.pending).then(|| injected.iter().map(exactly).collect()))
    }

    /// With `hold = "instance"` the flavor's requests become assignments.
    fn make_lasting(&mut self, flavor: &Flavor) -> Result<(), Fault> {
        let requests = match self.config.hold {
            HoldPolicy::Instance if flavor.usb_devices.is_empty() => return Ok(()),
            HoldPolicy::Instance => flavor.usb_devices.as_slice(),
            HoldPolicy::Running => &[],
        };
        self.store
            .assign(&self.asker, Source::Flavor, requests, &self.context)
            .map(drop)
            .map_err(|e| Fault::of(self.concerned, e))
    }
}

/// The request for one device.
pub(crate) fn only(id: DeviceId) -> virt_usb_model::DeviceRequest {
    virt_usb_model::DeviceRequest { selector: Selector { id: Some(id), ..Selector::default() }, count: 1 }
}

fn claimed_text(granted: &[Granted]) -> String {
    if granted.is_empty() {
        return "nothing to claim".into();
    }
    let ids: Vec<String> = granted.iter().map(|g| g.device.entry.id.to_string()).collect();
    format!("claimed {}", ids.join(", "))
}

/// The answer with the XML that the plan leads to.
fn rewritten(job: &Job<'_>, config: &Config, guest: &Guest<'_>, did: String) -> Result<Answer, Fault> {
    let xml = job
        .document
        .rewrite(&guest.edits)
        .map_err(|e| Fault::of(true, format!("cannot write the devices into the domain XML: {e}")))?;
    let mut answer = Answer { xml, did, ..Answer::default() };
    if job.domain.hostdevs.iter().any(|h| h.has_startup_policy) {
        answer = answer.warn("a <hostdev> of the domain has a startupPolicy: with its device missing, QEMU takes any other it can open; take the attribute out");
    }
    if answer.xml.is_none() || job.call.caller == Caller::Starter {
        return Ok(answer);
    }
    Ok(match machine::agent(&config.state_dir) {
        Agent::Alive => answer,
        Agent::Dead => answer.warn("the agent does not run: only a caller that uses the printed XML gets the device (systemctl start virt-usbd)"),
        Agent::NotInstalled => answer.warn("no agent is installed: only a caller that uses the printed XML gets the device"),
    })
}

/// libvirt throws away what is printed: a guest that the agent must give its device does not start without the agent, where
/// the configuration says so.
fn refuse_without_agent(job: &Job<'_>, config: &Config) -> Option<Answer> {
    if job.call.caller == Caller::Starter {
        return None;
    }
    let name = &job.domain.name;
    match (config.require_agent, machine::agent(&config.state_dir)) {
        (RequireAgent::Never, _) | (_, Agent::Alive) | (RequireAgent::Auto, Agent::NotInstalled) => None,
        (_, Agent::Dead) => Some(Answer::refused(format!(
            "{name} asks for USB devices, and the agent that attaches them does not run: 'systemctl start virt-usbd', or start it with 'virt-usb start {name}' \
             (require_agent = false in the configuration: let it start without)"
        ))),
        (_, Agent::NotInstalled) => Some(Answer::refused(format!(
            "{name} asks for USB devices, and the configuration demands an agent to attach them (require_agent = true), but none is installed: \
             install virt-usbd, or start it with 'virt-usb start {name}'"
        ))),
    }
}
