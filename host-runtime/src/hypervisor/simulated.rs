//! A hypervisor in memory, for a laptop and for tests. It starts and stops the domains of a file,
//! calls the hook as libvirt does, and keeps the attached devices. No guest runs.
//!
//! Each `[[domain]]` of the simulation file has `name`, `uuid`, and optionally `running` (true),
//! `flavor` (JSON) and `project` (Nova's owner), for its metadata, `controller` (`"qemu-xhci"`;
//! `"none"`: no USB), `ports` (15), `spice` (false) and `devices` (XML of its other devices). A
//! change of the file is what an operator does: `running = false` stops the domain, an entry that
//! goes undefines it.
//!
//! `hangs = true`: the guest's QEMU does not answer, so attach and detach wait. `locked = true`:
//! every call about the guest waits, and so do lists of all domains, as while another program's
//! hook blocks libvirtd.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::sync::mpsc::Sender;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use serde::Deserialize;
use virt_usb_config::Config;
use virt_usb_domxml::Fit;
use virt_usb_hook::call::{Call, Happened, HookCaller, Incoming, Operation};
use virt_usb_hook::input::Input;
use virt_usb_hook::run;
use virt_usb_model::{BusAddress, InstanceId, SpeedMask};

use super::{Event, Failure, Hypervisor, Running};

/// The models of USB controllers that a domain may have.
const CONTROLLERS: [&str; 9] = [
    "qemu-xhci",
    "nec-xhci",
    "ich9-ehci1",
    "ehci",
    "piix3-uhci",
    "piix4-uhci",
    "vt82c686b-uhci",
    "pci-ohci",
    "none",
];

/// The simulated hypervisor.
pub struct SimulatedHypervisor {
    config: Config,
    events: Sender<Event>,
    domains: Mutex<BTreeMap<InstanceId, Domain>>,
    /// Notified when the domains have changed.
    changed: Condvar,
}

/// A `[[domain]]` of the file.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
struct Spec {
    name: String,
    uuid: String,
    #[serde(default = "yes")]
    running: bool,
    flavor: Option<String>,
    project: Option<String>,
    #[serde(default = "xhci")]
    controller: String,
    #[serde(default = "fifteen")]
    ports: u8,
    #[serde(default)]
    spice: bool,
    #[serde(default)]
    devices: String,
    #[serde(default)]
    hangs: bool,
    #[serde(default)]
    locked: bool,
}

const fn yes() -> bool {
    true
}
fn xhci() -> String {
    "qemu-xhci".into()
}
const fn fifteen() -> u8 {
    15
}

#[derive(Debug, Clone)]
struct Domain {
    spec: Spec,
    running: bool,
    devices: Vec<Attached>,
}

impl Domain {
    /// Whether QEMU is running, but does not answer.
    const fn hangs(&self) -> bool {
        self.running && self.spec.hangs
    }
}

/// A device of a running domain.
#[derive(Debug, Clone)]
struct Attached {
    alias: String,
    /// XML element of the device.
    xml: String,
    /// Whether QEMU no longer has the device, although the XML shows it, as after a restore.
    released: bool,
}

#[derive(Deserialize)]
struct File {
    #[serde(default)]
    domain: Vec<Spec>,
}

impl SimulatedHypervisor {
    /// Creates a hypervisor without domains. `config` is the hook's configuration.
    pub fn new(config: Config, events: Sender<Event>) -> Self {
        Self { config, events, domains: Mutex::default(), changed: Condvar::new() }
    }

    /// Checks the domains in the text of a file.
    ///
    /// # Errors
    /// What is wrong.
    pub fn check(text: &str) -> Result<(), String> {
        parse(text).map(drop)
    }

    /// Defines, undefines, starts and stops domains to match the text of a file. Returns the hook's
    /// message for each refused start.
    ///
    /// # Errors
    /// If the text is invalid. Nothing is changed then.
    pub fn apply(&self, text: &str) -> Result<Vec<String>, String> {
        let wanted = parse(text)?;
        let mut refused = Vec::new();
        let now: Vec<(InstanceId, bool)> =
            self.domains().iter().map(|(id, d)| (*id, d.running)).collect();
        for (instance, running) in now {
            let stays_running = wanted.get(&instance).is_some_and(|spec| spec.running);
            if running && !stays_running {
                self.end(instance);
            }
            if !wanted.contains_key(&instance) {
                self.domains().remove(&instance);
                self.changed.notify_all();
                self.notify(Event::Changed(instance));
            }
        }
        for (instance, spec) in wanted {
            if let Some(domain) = self.domains().get_mut(&instance) {
                (domain.spec.hangs, domain.spec.locked) = (spec.hangs, spec.locked);
            }
            self.changed.notify_all();
            let domain = self.domains().get(&instance).cloned();
            // A changed definition of a running domain applies from its next start.
            let changed = domain.as_ref().is_none_or(|d| d.spec != spec);
            let runs = domain.is_some_and(|d| d.running);
            if changed && !runs {
                let domain = Domain { spec: spec.clone(), running: false, devices: Vec::new() };
                self.domains().insert(instance, domain);
                self.notify(Event::Changed(instance));
            }
            if spec.running
                && !runs
                && changed
                && let Err(why) = self.begin(instance)
            {
                refused.push(format!("{}: {why}", spec.name));
            }
        }
        Ok(refused)
    }

    /// Starts a domain as libvirt does: prepare, start, started. A refusal is followed by stopped
    /// and release.
    ///
    /// # Errors
    /// The hook's message, if it refuses.
    pub fn begin(&self, instance: InstanceId) -> Result<(), String> {
        if let Err(why) = self.call(instance, "prepare", Operation::Gate) {
            self.call_to_end(instance, "failed");
            return Err(why);
        }
        self.go(instance);
        Ok(())
    }

    fn go(&self, instance: InstanceId) {
        if let Some(domain) = self.domains().get_mut(&instance) {
            domain.running = true;
        }
        drop(self.call(instance, "started", Operation::Notice(Happened::Started)));
        self.notify(Event::Started(instance));
    }

    /// Saves a running domain and restores it, as `virsh managedsave` and `start` do: stopped,
    /// release, restore, prepare, started. Afterwards QEMU no longer has the host's devices,
    /// although the XML shows them.
    ///
    /// # Errors
    /// The hook's message, if it refuses. The domain is then not running.
    pub fn save_and_restore(&self, instance: InstanceId) -> Result<(), String> {
        let Some(saved) = self.domains().get(&instance).filter(|d| d.running).cloned() else {
            return Ok(());
        };
        self.end(instance);
        let hostdevs = |xml: &[u8]| -> Result<Vec<(String, String)>, String> {
            let read = virt_usb_domxml::read(xml).map_err(|e| e.to_string())?;
            let named = read.hostdevs.into_iter().filter_map(|h| h.address.zip(h.alias));
            Ok(named.map(|(address, alias)| (source(address), alias)).collect())
        };
        let image = xml(instance, &saved).into_bytes();
        let printed =
            self.ask(&saved, "restore", Operation::Filter(Incoming::Restore), image.clone())?;
        let restored = printed.unwrap_or_else(|| image.clone());
        let (old, new) = (hostdevs(&image)?, hostdevs(&restored)?);
        if let Some(domain) = self.domains().get_mut(&instance) {
            domain.devices.clone_from(&saved.devices);
            for device in &mut domain.devices {
                let pair = old.iter().zip(&new).find(|((_, alias), _)| *alias == device.alias);
                if let Some(((before, was), (now, is))) = pair {
                    let renamed = device.xml.replace(&format!("'{was}'"), &format!("'{is}'"));
                    let xml = renamed.replace(before, now);
                    *device = Attached { alias: is.clone(), xml, released: true };
                }
            }
        }
        let asked = self.ask(&saved, "prepare", Operation::Gate, restored).map(drop);
        let begun =
            asked.and_then(|()| self.refuse_taken(instance, new.iter().map(|(source, _)| source)));
        match begun {
            Ok(()) => self.go(instance),
            Err(_) => self.end(instance),
        }
        begun
    }

    /// Refuses a domain with a device that another domain has, or with one device twice, as libvirt
    /// does.
    fn refuse_taken<'a>(
        &self,
        instance: InstanceId,
        mut sources: impl Iterator<Item = &'a String>,
    ) -> Result<(), String> {
        let domains = self.domains();
        let others = || domains.iter().filter(|(id, domain)| **id != instance && domain.running);
        let mut own = BTreeSet::new();
        let is_taken = |source: &&'a String| {
            !own.insert(*source)
                || others().any(|(_, domain)| {
                    domain.devices.iter().any(|d| d.xml.contains(source.as_str()))
                })
        };
        match sources.find(is_taken) {
            Some(source) => Err(format!("USB device {source} is in use by driver QEMU")),
            None => Ok(()),
        }
    }

    /// Aliases of a running domain's devices that QEMU no longer has, although the XML shows them.
    pub fn let_go(&self, instance: InstanceId) -> Vec<String> {
        let domains = self.domains();
        let devices = domains.get(&instance).filter(|d| d.running).map_or(&[][..], |d| &d.devices);
        devices.iter().filter(|d| d.released).map(|d| d.alias.clone()).collect()
    }

    /// Ends a domain with stopped and release.
    pub fn end(&self, instance: InstanceId) {
        if let Some(domain) = self.domains().get_mut(&instance) {
            domain.running = false;
        }
        self.changed.notify_all();
        self.call_to_end(instance, "destroyed");
        if let Some(domain) = self.domains().get_mut(&instance) {
            domain.devices.clear();
        }
        self.notify(Event::Changed(instance));
    }

    /// Ends a domain without calling the hook, as if the host and the daemon crashed together.
    pub fn vanish(&self, instance: InstanceId) {
        if let Some(domain) = self.domains().get_mut(&instance) {
            domain.running = false;
            domain.devices.clear();
        }
    }

    fn call_to_end(&self, instance: InstanceId, reason: &str) {
        drop(self.call(instance, "stopped", Operation::Notice(Happened::Stopped)));
        let released = Happened::Released { reason: reason.to_owned() };
        drop(self.call(instance, "release", Operation::Notice(released)));
    }

    /// Calls the hook, without holding a lock.
    fn call(&self, instance: InstanceId, op: &str, operation: Operation) -> Result<(), String> {
        let Some(domain) = self.domains().get(&instance).cloned() else { return Ok(()) };
        let xml = xml(instance, &domain).into_bytes();
        self.ask(&domain, op, operation, xml).map(drop)
    }

    fn ask(
        &self,
        domain: &Domain,
        op: &str,
        operation: Operation,
        xml: Vec<u8>,
    ) -> Result<Option<Vec<u8>>, String> {
        let call = Call {
            config: None,
            name: domain.spec.name.clone(),
            op: op.to_owned(),
            operation,
            caller: HookCaller::Simulation,
        };
        let handled = run::handle_with(Ok(self.config.clone()), &call, Input::Xml(xml));
        handled.answer.refusal.map_or(Ok(handled.answer.xml), Err)
    }

    fn domains(&self) -> MutexGuard<'_, BTreeMap<InstanceId, Domain>> {
        self.domains.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Locks the domains, after waiting while a domain blocks such calls.
    fn unlocked(
        &self,
        keeps: impl Fn(InstanceId, &Domain) -> bool,
    ) -> MutexGuard<'_, BTreeMap<InstanceId, Domain>> {
        let waits = |all: &mut BTreeMap<InstanceId, Domain>| {
            all.iter().any(|(id, domain)| keeps(*id, domain))
        };
        self.changed.wait_while(self.domains(), waits).unwrap_or_else(PoisonError::into_inner)
    }

    fn notify(&self, event: Event) {
        // The receiver may have been dropped.
        drop(self.events.send(event));
    }

    fn change<T>(
        &self,
        instance: InstanceId,
        act: impl FnOnce(&mut Domain, &[String]) -> Result<T, Failure>,
    ) -> Result<T, Failure> {
        let mut domains =
            self.unlocked(|id, domain| id == instance && (domain.spec.locked || domain.hangs()));
        let elsewhere: Vec<String> = domains
            .iter()
            .filter(|(id, _)| **id != instance)
            .flat_map(|(_, d)| d.devices.iter().map(|device| device.xml.clone()))
            .collect();
        let domain = domains.get_mut(&instance).filter(|d| d.running).ok_or(Failure::Gone)?;
        let done = act(domain, &elsewhere);
        drop(domains);
        self.notify(Event::Changed(instance));
        done
    }
}

fn parse(text: &str) -> Result<BTreeMap<InstanceId, Spec>, String> {
    let file: File = toml::from_str(text).map_err(|e| e.message().to_owned())?;
    let mut domains = BTreeMap::new();
    for spec in file.domain {
        let name = spec.name.clone();
        let instance: InstanceId =
            spec.uuid.parse().map_err(|e| format!("domain {name}: uuid: {e}"))?;
        if !CONTROLLERS.contains(&spec.controller.as_str()) {
            return Err(format!(
                "domain {name}: controller: found {:?}, wanted one of {}",
                spec.controller,
                CONTROLLERS.join(", ")
            ));
        }
        if domains.insert(instance, spec).is_some() {
            return Err(format!("domain {name}: its uuid belongs to another domain"));
        }
    }
    Ok(domains)
}

/// XML of a domain as libvirt shows it.
fn xml(instance: InstanceId, domain: &Domain) -> String {
    let Spec { name, flavor, project, controller, ports, spice, .. } = &domain.spec;
    let mut text = format!(
        "<domain type='qemu'>\n  <name>{}</name>\n  <uuid>{instance}</uuid>\n",
        escaped(name)
    );
    if flavor.is_some() || project.is_some() {
        let ours = virt_usb_domxml::NAMESPACE;
        let flavor = flavor
            .iter()
            .map(|f| format!("<usb:flavor xmlns:usb='{ours}'>{}</usb:flavor>", escaped(f)));
        let owner = project.iter().map(|p| {
            let (space, project) = ("http://openstack.org/xmlns/libvirt/nova/1.1", escaped(p));
            format!(
                "<nova:instance xmlns:nova='{space}'><nova:owner><nova:project \
                uuid='{project}'/></nova:owner></nova:instance>"
            )
        });
        let inside: String = flavor.chain(owner).collect();
        // Writing to a String cannot fail.
        let _ = writeln!(text, "  <metadata>{inside}</metadata>");
    }
    let ports = if controller == "qemu-xhci" { format!(" ports='{ports}'") } else { String::new() };
    let _ = writeln!(
        text,
        "  <os><type arch='x86_64' machine='q35'>hvm</type></os>\n  <devices>\n    <controller \
            type='usb' index='0' model='{}'{ports}/>",
        escaped(controller)
    );
    if *spice {
        text.push_str("    <graphics type='spice'/>\n");
    }
    if !domain.spec.devices.is_empty() {
        let _ = writeln!(text, "    {}", domain.spec.devices);
    }
    for device in &domain.devices {
        let _ = writeln!(text, "    {}", device.xml);
    }
    text.push_str("  </devices>\n</domain>\n");
    text
}

/// Source address of a hostdev in XML.
fn source(address: BusAddress) -> String {
    format!("<address bus='{}' device='{}'/>", address.bus(), address.device())
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('\'', "&apos;").replace('"', "&quot;")
}

impl Hypervisor for SimulatedHypervisor {
    fn running(&self) -> Result<Vec<InstanceId>, Failure> {
        let domains = self.unlocked(|_, domain| domain.spec.locked);
        Ok(domains.iter().filter(|(_, d)| d.running).map(|(id, _)| *id).collect())
    }

    fn look(&self, instance: InstanceId) -> Result<Option<Running>, Failure> {
        let domains = self.unlocked(|id, domain| id == instance && domain.spec.locked);
        let domain = domains.get(&instance).filter(|d| d.running);
        Ok(domain.map(|d| Running {
            instance,
            name: d.spec.name.clone(),
            xml: xml(instance, d),
            moving: false,
        }))
    }

    fn all(&self) -> Result<Vec<InstanceId>, Failure> {
        Ok(self.unlocked(|_, domain| domain.spec.locked).keys().copied().collect())
    }

    fn xml(&self, instance: InstanceId) -> Result<Option<String>, Failure> {
        let domains = self.unlocked(|id, domain| id == instance && domain.spec.locked);
        Ok(domains.get(&instance).map(|domain| xml(instance, domain)))
    }

    fn is_busy(&self, instance: InstanceId) -> Result<bool, Failure> {
        Ok(self.domains().get(&instance).is_some_and(|domain| domain.hangs() || domain.spec.locked))
    }

    fn process(&self, _: InstanceId) -> Option<u32> {
        None
    }

    fn identity(&self) -> Result<String, Failure> {
        Ok("a simulation".into())
    }

    fn attach(&self, instance: InstanceId, device: &str) -> Result<(), Failure> {
        self.change(instance, |domain, elsewhere| {
            let read = |domain: &Domain| {
                virt_usb_domxml::read(xml(instance, domain).as_bytes())
                    .map_err(|e| Failure::Refused(format!("XML error: {e}")))
            };
            let before = read(domain)?;
            match before.bus.fit(&[SpeedMask::ANY]) {
                Fit::Fits => {}
                Fit::TooFew(_) => {
                    return Err(Failure::Refused("internal error: No free USB ports".into()));
                }
                _ => {
                    return Err(Failure::Refused(
                        "unsupported configuration: Domain has no USB bus support".into(),
                    ));
                }
            }
            if device.starts_with("<redirdev") && !before.spice {
                let why =
                    "unsupported configuration: chardev 'spicevmc' not supported without spice \
                        graphics";
                return Err(Failure::Refused(why.into()));
            }
            let mut after = domain.clone();
            let new = |alias| Attached { alias, xml: device.to_owned(), released: false };
            after.devices.push(new(String::new()));
            let read = read(&after)?;
            let address = read.hostdevs.get(before.hostdevs.len()).and_then(|h| h.address);
            let taken = |address: BusAddress| {
                let mark = source(address);
                elsewhere.iter().any(|xml| xml.contains(&mark))
                    || before.hostdevs.iter().any(|h| h.address == Some(address))
            };
            if let Some(address) = address.filter(|a| taken(*a)) {
                let why = format!("USB device {address} is in use by driver QEMU");
                return Err(Failure::Refused(why));
            }
            let hostdev = read.hostdevs.get(before.hostdevs.len()).and_then(|h| h.alias.clone());
            let redirdev =
                || read.redirdevs.get(before.redirdevs.len()).and_then(|r| r.alias.clone());
            let alias =
                hostdev.or_else(redirdev).unwrap_or_else(|| format!("dev{}", domain.devices.len()));
            if domain.devices.iter().any(|d| d.alias == alias) {
                return Err(Failure::Refused(format!("non unique alias detected: {alias}")));
            }
            domain.devices.push(new(alias));
            Ok(())
        })
    }

    fn detach(&self, instance: InstanceId, alias: &str) -> Result<(), Failure> {
        self.change(instance, |domain, _| {
            domain.devices.retain(|d| d.alias != alias);
            Ok(())
        })
    }

    fn stop(&self, instance: InstanceId) -> Result<(), Failure> {
        if self.look(instance)?.is_none() {
            return Err(Failure::Gone);
        }
        self.end(instance);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_domain_with_an_unknown_controller_or_key_is_refused() {
        let check = |more: &str| SimulatedHypervisor::check(&format!("{ONE}{more}"));
        for model in CONTROLLERS {
            assert_eq!(check(&format!("controller = '{model}'")), Ok(()));
        }
        let why = check("controller = 'foo'").unwrap_err();
        assert!(
            why.starts_with("domain a<b: controller: found \"foo\", wanted one of qemu-xhci, "),
            "{why}"
        );
        assert!(why.ends_with(", none"), "{why}");
        assert!(check("colour = 1").unwrap_err().contains("colour"));
    }

    const ONE: &str = "
        [[domain]]
        name = \"a<b\"
        uuid = \"11111111-2222-4333-8444-555555555555\"
        flavor = '{\"usb_devices\":[]}'
        ports = 1
    ";

    fn hypervisor() -> (SimulatedHypervisor, std::sync::mpsc::Receiver<Event>) {
        let (to, from) = std::sync::mpsc::channel();
        let config = Config {
            state_dir: "/nonexistent/virt-usb".into(),
            log: virt_usb_config::Log::Off,
            ..Config::default()
        };
        (SimulatedHypervisor::new(config, to), from)
    }

    #[test]
    fn it_runs_what_the_file_says() {
        let (simulated, events) = hypervisor();
        let id: InstanceId = "11111111-2222-4333-8444-555555555555".parse().unwrap();
        let is_known = || simulated.xml(id).unwrap().is_some();
        assert_eq!(simulated.apply(ONE), Ok(vec![]));
        assert_eq!(events.try_recv(), Ok(Event::Changed(id)), "it is defined");
        assert_eq!(events.try_recv(), Ok(Event::Started(id)));
        let running = simulated.running().unwrap();
        assert_eq!(
            virt_usb_domxml::read(simulated.look(running[0]).unwrap().unwrap().xml.as_bytes())
                .unwrap()
                .name,
            "a<b"
        );
        assert_eq!(simulated.apply(&format!("{ONE}running = false")), Ok(vec![]));
        assert_eq!((simulated.running(), is_known()), (Ok(vec![]), true));
        assert_eq!(simulated.apply(""), Ok(vec![]));
        assert!(!is_known());
        assert!(
            simulated
                .apply("[[domain]]\nname = 'x'\nuuid = '1'")
                .unwrap_err()
                .contains("domain x: uuid")
        );
    }

    #[test]
    fn it_refuses_what_libvirt_refuses() {
        let (simulated, _events) = hypervisor();
        let id: InstanceId = "11111111-2222-4333-8444-555555555555".parse().unwrap();
        simulated.apply(ONE).unwrap();
        let hostdev = "<hostdev mode='subsystem' type='usb'><source><address bus='1' \
            device='5'/></source><alias name='ua-usb-1'/></hostdev>";
        let refused = |device: &str, why: &str| {
            let said = simulated.attach(id, device).unwrap_err().to_string();
            assert!(said.contains(why), "{said}");
        };
        refused("<redirdev bus='usb' type='spicevmc'/>", "not supported without spice");
        simulated.attach(id, hostdev).unwrap();
        refused(hostdev, "No free USB ports");
        simulated.detach(id, "ua-usb-1").unwrap();
        simulated.attach(id, hostdev).unwrap();
        simulated.stop(id).unwrap();
        assert_eq!(simulated.attach(id, hostdev), Err(Failure::Gone));
    }
}
