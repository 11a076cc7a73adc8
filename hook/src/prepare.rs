//! `prepare`: claims the requested devices and writes them into the XML, or refuses the start.
//! Also refuses a domain that `restore` has marked as refused.

use virt_usb_config::host_env::{self, Agent};
use virt_usb_config::{Config, HoldPolicy, RequireAgent};
use virt_usb_model::{DeviceId, Flavor};
use virt_usb_store::adopt::{Adoption, Entered};
use virt_usb_store::claim::{ClaimMode, ClaimRequest, Claimant, Claimed};
use virt_usb_store::{Assignment, ClaimRow, Context, Source, Store};

use crate::answer::Answer;
use crate::call::HookCaller;
use crate::flavor_source::{FlavorRequest, wants};
use crate::job::{HookError, Job, NOTHING};
use crate::message;
use crate::verify::{Guest, Ports, claimant, holding, open, refuse_hubs};

pub(crate) fn prepare(job: &Job<'_>) -> Result<Answer, HookError> {
    if let Some(why) = &job.domain.refusal {
        return Ok(Answer::refused(why));
    }
    let state_dir = job.state_dir();
    let request = FlavorRequest::read(&job.domain.flavor, &state_dir)?;
    let known = job.may_be_known(&state_dir);
    let holds = job.domain.has_host_devices();
    if !(request.is_certain() || request.needs_store() || known || holds) {
        return Ok(Answer::unchanged(NOTHING));
    }
    // An error refuses only a domain that is known to request or hold a device of virt-usb.
    let injected = job.domain.hostdevs.iter().any(|h| h.injected().is_some());
    let concerned = request.is_certain()
        || job.is_assigned(&state_dir)
        || (injected && job.is_holder(&state_dir));
    let config = job.config(concerned)?;
    if let Some(refusal) = refuse_hubs(config, job.domain) {
        return Ok(refusal);
    }
    if !(request.needs_store() || known || holds) {
        return redirections_only(job, config, request);
    }
    let no_uuid = || HookError::of(concerned, "its XML has no <uuid>, which a claim needs");
    let instance = job.domain.uuid.ok_or_else(no_uuid)?;
    let (store, context) = open(config, &job.call.op, concerned)?;
    job.admit(&store, config, concerned)?;
    let claimant =
        claimant(&store, job.domain, instance).map_err(|e| HookError::of(concerned, e))?;
    let mut gate = Gate { job, config, store, context, claimant, concerned };
    let entered = gate.enter()?;
    let answer = match gate.refusal(&entered) {
        Some(refusal) => refusal,
        // An incoming domain without hostdevs of virt-usb is handled like any start.
        None if entered.arriving && injected => {
            gate.arrive(&entered, request.resolve(&gate.store).ok())?
        }
        None => {
            let flavor = request.resolve(&gate.store)?;
            gate.concerned |= !flavor.is_empty();
            gate.claim(&flavor, &devices(&entered))?
        }
    };
    if job.call.caller == HookCaller::Process {
        gate.store.leave();
    }
    Ok(answer)
}

/// Handles a flavor without `usb_devices`, which needs no inventory.
fn redirections_only(
    job: &Job<'_>,
    config: &Config,
    request: FlavorRequest,
) -> Result<Answer, HookError> {
    let FlavorRequest::Flavor(flavor) = request else { return Ok(Answer::unchanged(NOTHING)) };
    let mut guest = Guest::new(
        &config.sysfs_root,
        job.domain,
        flavor.usb_redirection_devices.len(),
        &[],
        job.call.caller,
    );
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
    claimant: Claimant,
    /// Whether the domain is known to request a device.
    concerned: bool,
}

impl Gate<'_> {
    /// Claims the devices in the domain's own XML, so that no other guest gets them.
    fn enter(&mut self) -> Result<Entered, HookError> {
        let holdings: Vec<_> = self.job.domain.host_devices().map(holding).collect();
        if holdings.is_empty() {
            return Ok(Entered { adopted: Vec::new(), arriving: false });
        }
        let mut ports = Ports { sysfs_root: &self.config.sysfs_root };
        self.store
            .enter(&self.claimant, &holdings, &mut ports, &self.context)
            .map_err(|e| HookError::of(self.concerned, e))
    }

    /// Refuses a domain that cannot start with the devices in its own XML. Handwritten hostdevs
    /// must be available; an incoming guest also needs the devices that were claimed for it.
    fn refusal(&self, entered: &Entered) -> Option<Answer> {
        let domain = self.job.domain;
        for adopted in &entered.adopted {
            let why = match adopted {
                Adoption::HeldBy(device, claim) => {
                    message::held_by_hand(&domain.name, device, claim)
                }
                Adoption::SetAside(device) => message::set_aside_by_hand(&domain.name, device),
                Adoption::Lost(id) => message::lost(&domain.name, *id),
                Adoption::Unknown | Adoption::New(_) | Adoption::AlreadyYours(_) => continue,
            };
            return Some(Answer::refused(why));
        }
        None
    }

    /// Handles a guest that is restored or migrated, for which `restore` or `migrate` has claimed
    /// devices. If its flavor and assignments request more, for example because a device was
    /// unplugged while the guest was saved, claims these as well. A device that is not available is
    /// only a warning: the flavor may have changed, or name devices of the source host.
    fn arrive(&mut self, entered: &Entered, flavor: Option<Flavor>) -> Result<Answer, HookError> {
        if let Some(flavor) = &flavor {
            self.make_lasting(flavor)?;
        }
        let mut ids = devices(entered);
        let lacking = self.lacking(&flavor.unwrap_or_default())?;
        let mut warning = None;
        if !lacking.is_empty() {
            match self.claim_more(&lacking, &ids)? {
                Ok(more) => ids.extend(more),
                Err(why) => warning = Some(why),
            }
        }
        let answer = startup_policy(self.job, Answer::unchanged(claimed_text(&ids)));
        Ok(match warning {
            Some(why) => answer.warn(&why),
            None => answer,
        })
    }

    /// Requests of the flavor and the assignments that the instance's claims do not satisfy yet.
    fn lacking(&self, flavor: &Flavor) -> Result<Vec<ClaimRequest>, HookError> {
        let wants = wants(flavor, self.config.hold, &self.assigned()?);
        if wants.is_empty() {
            return Ok(wants);
        }
        let mut claims = self
            .store
            .claims_of(self.claimant.instance)
            .map_err(|e| HookError::of(self.concerned, e))?;
        claims.retain(|claim| !claim.ending);
        let mut left = self.store.devices().map_err(|e| HookError::of(self.concerned, e))?;
        left.retain(|record| claims.iter().any(|claim| claim.device_id == record.entry.id));
        let serving = |want: &ClaimRequest| {
            left.iter().filter(|r| r.is_selected_by(&want.request.selector)).count()
        };
        let mut wants: Vec<(usize, u32, ClaimRequest)> =
            (0..).zip(wants).map(|(number, want)| (serving(&want), number, want)).collect();
        // Begin with the requests that match the fewest devices.
        wants.sort_by_key(|(serving, number, _)| (*serving, *number));
        let mut lacking = Vec::new();
        for (_, number, mut want) in wants {
            while want.request.count > 0
                && let Some(at) = left.iter().position(|r| r.is_selected_by(&want.request.selector))
            {
                left.remove(at);
                want.request.count -= 1;
            }
            if want.request.count > 0 {
                want.number = Some(number);
                lacking.push(want);
            }
        }
        lacking.sort_by_key(|want| want.number);
        // A request may name an id of the source host. A device that was claimed in its place
        // serves the request, although it does not match.
        let is_unasked = |c: &ClaimRow| c.by_hand && c.request.is_none();
        let unasked: Vec<DeviceId> =
            claims.iter().filter(|c| is_unasked(c)).map(|c| c.device_id).collect();
        left.retain(|record| !unasked.contains(&record.entry.id));
        for _ in left {
            if let Some(want) = lacking.iter_mut().find(|want| want.request.count > 0) {
                want.request.count -= 1;
            }
        }
        lacking.retain(|want| want.request.count > 0);
        Ok(lacking)
    }

    /// Claims additional devices for an incoming guest. The inner error is the reason for a
    /// warning.
    fn claim_more(
        &mut self,
        wants: &[ClaimRequest],
        inside: &[DeviceId],
    ) -> Result<Result<Vec<DeviceId>, String>, HookError> {
        let name = &self.job.domain.name;
        let without = |why: String| {
            format!("{name} was restored or migrated without some of its USB devices: {why}")
        };
        let mut guest =
            Guest::new(&self.config.sysfs_root, self.job.domain, 0, inside, self.job.call.caller);
        let claimed = self
            .store
            .claim(&self.claimant, wants, &[], ClaimMode::Add, &mut guest, &self.context)
            .map_err(|e| HookError::of(self.concerned, e))?;
        Ok(match claimed {
            Claimed::Granted(granted) => Ok(granted.iter().map(|g| g.device.entry.id).collect()),
            Claimed::Unfit(why) => Err(without(why)),
            Claimed::Short(short) => {
                let host = message::Host::of(self.config, &self.store, &short);
                Err(without(message::shortages(&self.claimant, &short, usize::MAX, &host)))
            }
        })
    }

    /// Claims the requested devices. `inside` are the devices in the domain's own XML, which
    /// libvirt itself gives to the guest.
    fn claim(&mut self, flavor: &Flavor, inside: &[DeviceId]) -> Result<Answer, HookError> {
        let domain = self.job.domain;
        let assigned = self.assigned()?;
        let wants = wants(flavor, self.config.hold, &assigned);
        let mut guest = Guest::new(
            &self.config.sysfs_root,
            domain,
            flavor.usb_redirection_devices.len(),
            inside,
            self.job.call.caller,
        );
        self.concerned |= !wants.is_empty();
        if !self.concerned && !self.job.may_be_known(&self.config.state_dir) {
            return Ok(Answer::unchanged(NOTHING));
        }
        let count: usize = wants.iter().map(|w| w.request.count as usize).sum();
        if (count > inside.len() || !guest.missing_redirdevs().is_empty())
            && let Some(refusal) = refuse_without_agent(self.job, self.config)
        {
            return Ok(refusal);
        }
        let claimed = self
            .store
            .claim(&self.claimant, &wants, inside, ClaimMode::Replace, &mut guest, &self.context)
            .map_err(|e| HookError::of(self.concerned, e))?;
        match claimed {
            Claimed::Short(short) => {
                let operators = assigned.iter().filter(|a| a.source == Source::Operator).count();
                let host = message::Host::of(self.config, &self.store, &short);
                let from = wants.len() - operators;
                Ok(Answer::refused(message::shortages(&self.claimant, &short, from, &host)))
            }
            Claimed::Unfit(why) => Ok(Answer::refused(format!("{} {why}", domain.name))),
            Claimed::Granted(granted) => {
                self.make_lasting(flavor)?;
                let ids: Vec<DeviceId> = granted.iter().map(|g| g.device.entry.id).collect();
                rewritten(self.job, self.config, &guest, claimed_text(&ids))
            }
        }
    }

    /// Reads the assignments of the instance. Without a hint there are none.
    fn assigned(&self) -> Result<Vec<Assignment>, HookError> {
        match self.job.may_be_known(&self.config.state_dir) {
            true => self
                .store
                .assignments(self.claimant.instance)
                .map_err(|e| HookError::of(self.concerned, e)),
            false => Ok(Vec::new()),
        }
    }

    /// With `hold = "instance"`, stores the flavor's requests as assignments.
    fn make_lasting(&mut self, flavor: &Flavor) -> Result<(), HookError> {
        let requests = match self.config.hold {
            HoldPolicy::Instance if flavor.usb_devices.is_empty() => return Ok(()),
            HoldPolicy::Instance => flavor.usb_devices.as_slice(),
            HoldPolicy::Running => &[],
        };
        self.store
            .assign(&self.claimant, Source::Flavor, requests, &self.context)
            .map(drop)
            .map_err(|e| HookError::of(self.concerned, e))
    }
}

/// Devices in the domain's own XML.
fn devices(entered: &Entered) -> Vec<DeviceId> {
    entered.adopted.iter().filter_map(Adoption::device).collect()
}

fn claimed_text(ids: &[DeviceId]) -> String {
    if ids.is_empty() {
        return "nothing to claim".into();
    }
    let ids: Vec<String> = ids.iter().map(ToString::to_string).collect();
    format!("claimed {}", ids.join(", "))
}

/// Adds a warning if a hostdev of the domain has a startupPolicy.
fn startup_policy(job: &Job<'_>, answer: Answer) -> Answer {
    match job.domain.hostdevs.iter().any(|h| h.has_startup_policy) {
        true => answer.warn(
            "a <hostdev> of the domain has a startupPolicy: if its device is missing, QEMU takes \
             any other device that it can open; remove the attribute",
        ),
        false => answer,
    }
}

/// Builds the answer with the XML of the plan.
fn rewritten(
    job: &Job<'_>,
    config: &Config,
    guest: &Guest<'_>,
    did: String,
) -> Result<Answer, HookError> {
    let xml = job.document.rewrite(&guest.edits).map_err(|e| {
        HookError::of(true, format!("cannot write the devices into the domain XML: {e}"))
    })?;
    let mut answer = startup_policy(job, Answer { xml, did, ..Answer::default() });
    for warning in &guest.warnings {
        answer = answer.warn(warning);
    }
    if answer.xml.is_none() || job.call.caller == HookCaller::Starter {
        return Ok(answer);
    }
    Ok(match host_env::agent(&config.state_dir) {
        Agent::Alive => answer,
        Agent::Dead => answer.warn(
            "the agent is not running: only a caller that uses the printed XML gets the device \
             (systemctl start virt-usbd)",
        ),
        Agent::NotInstalled => answer
            .warn("no agent is installed: only a caller that uses the printed XML gets the device"),
    })
}

/// Refuses a guest whose device only the agent can attach, if no agent is running and the
/// configuration requires one. libvirt ignores the printed XML.
fn refuse_without_agent(job: &Job<'_>, config: &Config) -> Option<Answer> {
    if job.call.caller == HookCaller::Starter {
        return None;
    }
    let name = &job.domain.name;
    match (config.require_agent, host_env::agent(&config.state_dir)) {
        (RequireAgent::Never, _)
        | (_, Agent::Alive)
        | (RequireAgent::Auto, Agent::NotInstalled) => None,
        (_, Agent::Dead) => Some(Answer::refused(format!(
            "{name} asks for USB devices, and the agent that attaches them is not running: run \
             'systemctl start virt-usbd', or start the domain with 'virt-usb start {name}' \
             (require_agent = false in the configuration disables this check)"
        ))),
        (_, Agent::NotInstalled) => Some(Answer::refused(format!(
            "{name} asks for USB devices, and the configuration requires an agent to attach them \
             (require_agent = true), but none is installed: install virt-usbd, or start the \
             domain with 'virt-usb start {name}'"
        ))),
    }
}
