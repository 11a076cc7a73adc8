//! What is wrong with this host, and how it is mended. Looks, and changes nothing.
//!
//! ```text
//!  hook ─► configuration ─► AppArmor, SELinux ─► agent ─► boot id ─► inventory ─► fleet ─► libvirt ─► its guests ─► devices
//! ```
//! What one check needs and does not have is said by the check before it: nothing is said twice.

use std::cmp::Reverse;
use std::fmt::Display;
use std::fs::Metadata;
use std::net::TcpStream;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use serde::Serialize;
use virt_usb_domxml::Domain;
use virt_usb_hook::config::{self, Config};
use virt_usb_hook::guest::{Delivery, NO_SPICE, missing_redirdevs, port_speeds, room};
use virt_usb_hook::machine::{self, Agent};
use virt_usb_hook::rules;
use virt_usb_hook::sysfs::{attribute, device_dir};
use virt_usb_model::{Class, Flavor, SpeedMask};
use virt_usb_store::{Durability, Record, Store};

use crate::agent::observe::flavor;
use crate::agent::operate::selects;
use crate::api::keystone::Keystone;
use crate::api::tokens::TokenFile;
use crate::client;
use crate::hypervisor::Libvirt;

/// Our hook's name among others of libvirt's `qemu.d`.
const HOOK: &str = "qemu.d/50-virt-usb";
/// A log of this size is one that nobody folds: writers do past half a MiB.
const LOG_LIMIT: u64 = 16 << 20;
/// etcd's database is nearly full at this size, in bytes, unless it was given more room than by default.
const DB_SIZE: i64 = 1600 << 20;
const VERSION: &str = env!("CARGO_PKG_VERSION");
/// How long the doctor waits for the store's lock.
const PATIENCE: Duration = Duration::from_secs(5);
/// So many problems of guests are shown.
const PROBLEMS: usize = 10;

/// How bad a finding is. The order is that of badness.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Level {
    /// As it should be.
    Well,
    /// Something will not work for somebody.
    Warning,
    /// Guests that ask for devices do not get them, or the doctor cannot tell.
    Broken,
}

/// One of them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// What was looked at: `hook`, `agent`, …
    pub check: &'static str,
    /// How bad it is.
    pub level: Level,
    /// What was found.
    pub what: String,
    /// What to do about it.
    pub mend: Option<String>,
}

/// Where to look.
#[derive(Debug, Clone)]
pub struct Places {
    /// The configuration's file, where it is not the default one.
    pub config: Option<PathBuf>,
    /// libvirt's hooks.
    pub hooks: PathBuf,
    /// Where daemons leave their process ids.
    pub run: PathBuf,
}

/// Looks at everything; what can be asked of libvirt only while it answers is left out where it does not. `tell` is given each
/// finding as it is made: some checks wait for others' answers.
pub fn examine(places: &Places, tell: &mut dyn FnMut(&Finding)) -> Vec<Finding> {
    let mut report = Report { findings: Vec::new(), tell };
    report.hook(places);
    let Some(config) = report.config(places) else { return report.findings };
    report.confinement(places, &config);
    report.agent(places, &config);
    report.machine(&config);
    report.metrics(&config);
    let store = report.store(places, &config);
    if let Some(store) = &store {
        report.problems(store);
    }
    report.fleet(&config, store.as_ref());
    report.tokens(&config);
    report.keystone(&config);
    report.guests(&config, store.as_ref());
    if let Some(store) = &store {
        report.devices(&config, store);
    }
    report.findings
}

struct Report<'a> {
    findings: Vec<Finding>,
    tell: &'a mut dyn FnMut(&Finding),
}

impl Report<'_> {
    fn add(&mut self, finding: Finding) {
        (self.tell)(&finding);
        self.findings.push(finding);
    }

    fn well(&mut self, check: &'static str, what: impl Display) {
        self.add(Finding { check, level: Level::Well, what: what.to_string(), mend: None });
    }

    fn warn(&mut self, check: &'static str, what: impl Display, mend: impl Display) {
        let mend = Some(mend.to_string());
        self.add(Finding { check, level: Level::Warning, what: what.to_string(), mend });
    }

    fn broken(&mut self, check: &'static str, what: impl Display, mend: impl Display) {
        let mend = Some(mend.to_string());
        self.add(Finding { check, level: Level::Broken, what: what.to_string(), mend });
    }

    /// What stands between guests and what they are to have, as the agent has noted it.
    fn problems(&mut self, store: &Store) {
        match store.problems() {
            Ok(problems) => {
                for problem in problems.iter().take(PROBLEMS) {
                    let what = format!("{}: {}: {}", problem.domain, problem.about, problem.what);
                    self.warn("problems", what, "what is said above; 'virt-usb claims' shows it too");
                }
                if let Some(more) = problems.len().checked_sub(PROBLEMS).filter(|more| *more > 0) {
                    self.warn("problems", format!("{more} more"), "'virt-usb claims' shows all");
                }
            }
            Err(e) => self.broken("problems", e, "'virt-usb store check' says more"),
        }
    }

    /// Whether the agent's metrics can be read where they are to be served.
    fn metrics(&mut self, config: &Config) {
        let (place, connected) = match &config.metrics {
            config::Metrics::Off => return,
            config::Metrics::Tcp(address) => {
                (address.to_string(), TcpStream::connect_timeout(address, PATIENCE).map(drop))
            }
            config::Metrics::Unix(path) => (path.display().to_string(), UnixStream::connect(path).map(drop)),
        };
        let is_alive = machine::agent(&config.state_dir) == Agent::Alive;
        match connected {
            Err(e) if is_alive => self.warn(
                "metrics",
                format!("nobody serves them at {place}: {e}"),
                "'journalctl -u virt-usbd' says why; guests are served all the same",
            ),
            Ok(()) if is_alive => self.well("metrics", format!("they are served at {place}")),
            Ok(()) => self.warn(
                "metrics",
                format!("another program listens at {place}"),
                "another place in metrics, before the agent is started",
            ),
            // The agent's own finding.
            Err(_) => {}
        }
    }

    fn config(&mut self, places: &Places) -> Option<Config> {
        match Config::load(places.config.as_deref()) {
            Ok(config) => {
                self.well("configuration", "it can be read");
                if config.whitelist.on && config.whitelist.rules.is_empty() {
                    self.warn(
                        "configuration",
                        "usb_white_list_switch is on and there is no rule: no device is offered to anybody",
                        "write rules into usb_passthrough_whitelist, or turn the switch off",
                    );
                }
                Some(config)
            }
            Err(e) => {
                self.broken(
                    "configuration",
                    e,
                    "correct it: every key is explained in the file that was installed",
                );
                None
            }
        }
    }

    fn hook(&mut self, places: &Places) {
        let hook = places.hooks.join(HOOK);
        let Ok(found) = std::fs::metadata(&hook) else {
            self.broken(
                "hook",
                format!("there is none at {}", hook.display()),
                "install it: 'make install-hook', or the package again",
            );
            return;
        };
        if !found.is_file() || found.permissions().mode() & 0o111 == 0 {
            let mend = format!("chmod 0755 {}", hook.display());
            self.broken(
                "hook",
                format!("{} is not executable: libvirt passes it over", hook.display()),
                mend,
            );
            return;
        }
        if found.uid() != 0 || found.permissions().mode() & 0o022 != 0 {
            let mend = format!("chown root:root {0} && chmod 0755 {0}", hook.display());
            self.broken(
                "hook",
                format!("others than root may write {}, which libvirtd runs as root", hook.display()),
                mend,
            );
        }
        let version = Command::new(&hook).arg("--version").output();
        let version =
            version.map(|o| String::from_utf8_lossy(&o.stdout).trim().to_owned()).unwrap_or_default();
        match version.strip_prefix("virt-usb-hook ") {
            Some(VERSION) => {
                self.well("hook", format!("{} is of this version", hook.display()));
            }
            Some(version) => self.warn(
                "hook",
                format!("{} is version {version}, this program is {}", hook.display(), VERSION),
                "install both from one package, or with 'make install-hook'",
            ),
            None => self.broken(
                "hook",
                format!("{} does not answer to --version: it is not ours, or cannot run", hook.display()),
                "install it again: 'make install-hook', or the package",
            ),
        }
        self.seen_by_daemon(places);
    }

    /// libvirt looks when it starts or reloads whether there are hooks at all.
    fn seen_by_daemon(&mut self, places: &Places) {
        let folder = places.hooks.join("qemu.d");
        let made = std::fs::metadata(&folder).and_then(|found| found.created());
        for (daemon, pid) in daemons(places) {
            let began = std::fs::metadata(Path::new("/proc").join(&pid)).and_then(|found| found.modified());
            match (&made, began) {
                (Ok(made), Ok(began)) if *made > began => self.warn(
                    "hook",
                    format!(
                        "{daemon} runs for longer than {} exists, and may not know of hooks",
                        folder.display()
                    ),
                    format!(
                        "'systemctl reload {daemon}' (guests keep running); if that was done, all is well"
                    ),
                ),
                (Ok(_), Ok(_)) => {
                    self.well("hook", format!("{daemon} was started after {} was made", folder.display()));
                }
                // A process id of a daemon that is gone, or a file system that does not know when its files were made.
                _ => {}
            }
        }
    }

    /// What keeps libvirt's daemon from running the hook although all files are as they should be.
    fn confinement(&mut self, places: &Places, config: &Config) {
        let hook = std::fs::canonicalize(places.hooks.join(HOOK));
        for (daemon, pid) in daemons(places) {
            let label = std::fs::read_to_string(config.procfs_root.join(&pid).join("attr/current"))
                .unwrap_or_default();
            if !label.trim_end_matches(['\0', '\n']).ends_with("(enforce)") {
                continue;
            }
            // Debian's profiles (/etc/apparmor.d/usr.sbin.libvirtd, usr.sbin.virtqemud) let the daemon run what lies there.
            let hooks = std::fs::canonicalize(&places.hooks).unwrap_or_else(|_| places.hooks.clone());
            let allowed = [hooks.as_path(), Path::new("/usr/bin"), Path::new("/usr/sbin")];
            match &hook {
                Ok(real) if !allowed.iter().any(|folder| real.starts_with(folder)) => self.broken(
                    "hook",
                    format!("AppArmor confines {daemon}, whose profile does not let it run {}, which the hook is a link to", real.display()),
                    "put the program itself there, or a link into /usr/sbin: 'make install-hook', or the package",
                ),
                _ => self.well("hook", format!("AppArmor lets {daemon} run it")),
            }
        }
        let enforces = std::fs::read_to_string(config.sysfs_root.join("fs/selinux/enforce"));
        if enforces.is_ok_and(|enforces| enforces.trim() == "1") {
            self.warn(
                "hook",
                "SELinux enforces its policy, in which virt-usb's hook has no rules: libvirt's daemon may be kept from running it, or it from its inventory",
                "start a guest, then 'ausearch -m avc -ts recent': audit2allow makes a policy module of what was denied",
            );
        }
    }

    /// Whether the agent runs as who it should, and may talk to libvirt.
    fn agent_user(&mut self, places: &Places, config: &Config) {
        let Some(process) = holder(&config.state_dir.join(machine::AGENT_LOCK)) else { return };
        let Ok(owner) = std::fs::metadata(&config.state_dir).map(|found| found.uid()) else { return };
        if process.uid != owner {
            self.warn(
                "agent",
                format!(
                    "it runs as user {}, and {} belongs to user {owner}: files that it makes there are not its owner's",
                    process.uid,
                    config.state_dir.display()
                ),
                format!("start it by its unit ('systemctl restart virt-usbd'), or 'chown -R' {} to its user", config.state_dir.display()),
            );
        }
        for socket in ["libvirt/libvirt-sock", "libvirt/virtqemud-sock"] {
            let socket = places.run.join(socket);
            let Ok(found) = std::fs::metadata(&socket) else { continue };
            match may(&found, process.uid, &process.groups, 0o2) {
                true => self.well("agent", format!("it may talk to libvirt at {}", socket.display())),
                false => self.broken(
                    "agent",
                    format!("it runs as user {}, which may not write {} (group {}): it cannot give guests anything", process.uid, socket.display(), found.gid()),
                    "'usermod --append --groups libvirt virt-usb', then 'systemctl restart virt-usbd'",
                ),
            }
        }
    }

    fn agent(&mut self, places: &Places, config: &Config) {
        self.agent_user(places, config);
        match machine::agent(&config.state_dir) {
            Agent::Alive if config.state_dir.join(machine::HOOK_SOCKET).exists() => self.well("agent", "it runs"),
            Agent::Alive => self.warn("agent", "it runs, and does not hear hooks: their durations are not counted", "'systemctl restart virt-usbd' (guests keep their devices)"),
            Agent::Dead => self.broken(
                "agent",
                "it is installed and does not run: guests that ask for a device are refused, or do not get it",
                "'systemctl start virt-usbd', and if it does not stay: 'journalctl -u virt-usbd'",
            ),
            Agent::NotInstalled => self.warn(
                "agent",
                "none is installed: only 'virt-usb start' gives guests their devices",
                "'make install-agent', then 'systemctl enable --now virt-usbd'",
            ),
        }
    }

    fn machine(&mut self, config: &Config) {
        match machine::context(config, "virt-usb doctor") {
            Ok(_) => self.well("machine", "it has a boot id, by which claims are dated"),
            Err(e) => self.broken("machine", e, "mount procfs, or correct procfs_root in the configuration"),
        }
    }

    /// Whether the API's tokens can be relied on.
    fn tokens(&mut self, config: &Config) {
        if let Err(e) = TokenFile::new(&config.state_dir).entries() {
            self.warn(
                "tokens",
                e,
                "what is said above: until then the API lets nobody in by a token of this file",
            );
        }
    }

    /// Whether Keystone can be asked whose tokens are. None of it keeps a guest from its devices.
    fn keystone(&mut self, config: &Config) {
        const ROLES: [&str; 2] = ["service", "admin"];
        let Some(keystone) = &config.keystone else { return };
        match Keystone::new(keystone.clone(), Arc::default()).check() {
            Err(why) => self.warn(
                "keystone",
                why,
                "what is said above; until then its tokens are refused, and those of 'virt-usb token' count",
            ),
            Ok(roles) if !roles.iter().any(|role| ROLES.contains(&role.as_str())) => self.warn(
                "keystone",
                format!(
                    "the user {} has the roles {}: by default Keystone does not let it ask about others' tokens",
                    keystone.user,
                    roles.join(", ")
                ),
                format!("'openstack role add --user {} --project {} service'", keystone.user, keystone.project),
            ),
            Ok(_) => self.well("keystone", format!("{} answers", keystone.url)),
        }
        self.secret("keystone", &keystone.password_file, config);
        if keystone.url.parse().is_ok_and(|address| client::is_open(&address)) {
            self.warn(
                "keystone",
                format!(
                    "{} is not encrypted: whoever is on the way reads the password and the tokens",
                    keystone.url
                ),
                "an https:// address, unless it is on this host or on a network of your own",
            );
        }
    }

    /// Whether the agent may read the file of its password, and nobody else. Who looks is root, who may read all.
    fn secret(&mut self, check: &'static str, file: &Path, config: &Config) {
        let (Ok(found), Ok(agent)) = (std::fs::metadata(file), std::fs::metadata(&config.state_dir)) else {
            return;
        };
        let what = if !may(&found, agent.uid(), &[agent.gid()], 0o4) {
            "the agent may not read it"
        } else if found.mode() & 0o007 != 0 {
            "everybody on this host may read it, or write to it"
        } else {
            return;
        };
        let (name, owner) = (file.display(), agent.uid());
        self.warn(
            check,
            format!("the password in {name}: {what}"),
            format!(
                "'chown {owner} {name}; chmod 600 {name}': {owner} is the agent's user, who has {}",
                config.state_dir.display()
            ),
        );
    }

    /// How it is with etcd, where there is a fleet. None of it keeps a guest of this host from its devices.
    fn fleet(&mut self, config: &Config, store: Option<&Store>) {
        let Some(fleet) = &config.fleet else { return };
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let asked = crate::inventory::host_name(&config.procfs_root).and_then(|host| {
            let status = runtime?.block_on(crate::fleet::join::status(fleet, &host))?;
            Ok(status)
        });
        let status = match asked {
            Ok(status) => status,
            Err(e) => {
                let why = e.chain().map(ToString::to_string).collect::<Vec<_>>().join(": ");
                self.warn("fleet", why, "what is said above; the network and 'etcdctl endpoint health' tell more. Guests of this host get their devices all the same");
                return;
            }
        };
        for endpoint in &status.endpoints {
            let name = &endpoint.endpoint;
            if let Some(fault) = &endpoint.fault {
                self.warn(
                    "fleet",
                    format!("etcd at {name}: {fault}"),
                    "bring it back, or take it out of fleet.endpoints; the others serve meanwhile",
                );
            }
            if !endpoint.alarms.is_empty() {
                self.warn(
                    "fleet",
                    format!("etcd at {name} has an alarm: {}", endpoint.alarms.join(", ")),
                    "NOSPACE: 'etcdctl compact' to a revision of late, 'etcdctl defrag', a larger --quota-backend-bytes, then 'etcdctl alarm disarm'",
                );
            }
            if endpoint.db_size.is_some_and(|size| size > DB_SIZE) {
                let used = endpoint.db_used.unwrap_or_default() >> 20;
                self.warn(
                    "fleet",
                    format!("etcd's database at {name} has {} MiB, of which {used} are in use: by default it takes no more than 2048", endpoint.db_size.unwrap_or_default() >> 20),
                    "'etcdctl defrag' gives back what is not in use; where most is, a larger --quota-backend-bytes (8 GiB at most)",
                );
            }
        }
        if status.never_compacted {
            self.warn(
                "fleet",
                "etcd has forgotten nothing in ten thousand changes: its database grows until it is full",
                "start it with --auto-compaction-mode=periodic --auto-compaction-retention=10m",
            );
        }
        let number = store.and_then(|store| store.node().ok());
        let revision = store.and_then(|store| store.host_document().ok()?).map(|document| document.revision);
        match (status.number, status.published) {
            (None, _) => self.warn("fleet", "this host has not joined it: nobody else knows its devices", "'virt-usb fleet join'"),
            (Some(joined), _) if number.is_some_and(|own| own != joined) => self.warn(
                "fleet",
                format!("this machine is number {joined} there, and its inventory has another: nothing is published"),
                "'virt-usb fleet join' gives its devices the ids that belong to it",
            ),
            (Some(_), published) if published < revision => self.warn(
                "fleet",
                format!("it knows revision {} of this host, and the inventory is at {}", published.unwrap_or_default(), revision.unwrap_or_default()),
                "look again in a second; if it stays so: 'journalctl -u virt-usbd' says what keeps the agent from publishing",
            ),
            (Some(joined), _) => self.well("fleet", format!("this host is number {joined}, and is published")),
        }
    }

    fn store(&mut self, places: &Places, config: &Config) -> Option<Store> {
        let store = match Store::open(&config.state_dir, PATIENCE, Durability::Power) {
            Ok(store) => store,
            Err(e) => {
                self.broken(
                    "inventory",
                    e,
                    "what is said above; 'virt-usb discover' makes one where there is none",
                );
                return None;
            }
        };
        match store.check() {
            Ok(findings) if findings.is_empty() => {
                self.well("inventory", format!("{} is sound", store.path().display()));
            }
            Ok(findings) => {
                for finding in findings {
                    self.broken("inventory", finding, "'virt-usb store rebuild' makes it anew and keeps what can be kept, or 'virt-usb store restore FILE' takes a backup; a hint that is missing: 'virt-usb discover'");
                }
            }
            Err(e) => self.broken("inventory", e, "'virt-usb store check' says more"),
        }
        let log = store.path().with_extension("sqlite-wal");
        if let Some(size) =
            std::fs::metadata(&log).ok().map(|found| found.len()).filter(|size| *size > LOG_LIMIT)
        {
            self.warn(
                "inventory",
                format!(
                    "{} has {} MiB: somebody reads for very long, and it cannot be folded",
                    log.display(),
                    size >> 20
                ),
                "find who has it open: 'fuser -v' with its name",
            );
        }
        if let Err(lost) = rules::admit(&store, config, places.config.as_deref()) {
            self.broken(
                "configuration",
                lost,
                "no guest starts with a device until the file is whole: restore it from a backup",
            );
        }
        self.clock(&store);
        Some(store)
    }

    /// Events are dated by the clock.
    fn clock(&mut self, store: &Store) {
        match store.newest_ahead() {
            Ok(Some(at)) => self.warn(
                "machine",
                format!("the newest event is of {at}, which is still to come: the clock was set back, and the audit is out of order"),
                "'timedatectl' shows whether the clock is synchronised; claims do not depend on it",
            ),
            Ok(None) => self.well("machine", "the clock is not behind the audit"),
            Err(e) => self.broken("inventory", e, "'virt-usb store check' says more"),
        }
    }

    fn guests(&mut self, config: &Config, store: Option<&Store>) {
        let libvirt = match Libvirt::open(&config.libvirt_uri) {
            Ok(libvirt) => libvirt,
            Err(e) => {
                self.broken(
                    "libvirt",
                    e,
                    "'systemctl status libvirtd virtqemud'; may this user talk to it (group libvirt)?",
                );
                return;
            }
        };
        match libvirt.domain_capabilities() {
            Ok(capabilities) => self.capabilities(&capabilities),
            Err(e) => self.warn(
                "libvirt",
                format!("it does not say what its guests can have: {e}"),
                "look at 'virsh domcapabilities' yourself",
            ),
        }
        let (Some(store), Ok(definitions)) = (store, libvirt.definitions()) else { return };
        let known = store.devices().unwrap_or_default();
        let mut asking = 0;
        for xml in definitions {
            let Ok(domain) = virt_usb_domxml::read(xml.as_bytes()) else { continue };
            match flavor(&domain, config, store) {
                Ok(flavor) if flavor.is_empty() => {}
                Ok(flavor) => {
                    asking += 1;
                    if let Some(why) = unfit(&domain, &flavor, &known) {
                        self.warn(
                            "guest",
                            format!("{} asks for USB devices, but {why}", domain.name),
                            "what is said above; until then its starts are refused",
                        );
                    }
                }
                Err(why) => self.warn(
                    "guest",
                    format!("{}: its flavor cannot be read: {why}", domain.name),
                    "correct it in the domain's metadata ('virsh metadata', 'virsh edit')",
                ),
            }
        }
        self.well("guest", format!("{asking} domain(s) ask for USB devices"));
    }

    fn capabilities(&mut self, capabilities: &str) {
        let section = |name: &str| {
            let begin = capabilities.find(&format!("<{name} supported='yes'"))?;
            capabilities.get(begin..)?.split(&format!("</{name}>")).next()
        };
        if section("hostdev").is_some_and(|s| s.contains("<value>usb</value>")) {
            self.well("libvirt", "QEMU can pass USB devices through");
        } else {
            self.broken(
                "libvirt",
                "QEMU has no usb-host: no guest can be given a device",
                "install a QEMU that was built with libusb (Debian: qemu-system-x86)",
            );
        }
        if section("graphics").is_some_and(|s| s.contains("<value>spice</value>")) {
            self.well("libvirt", "QEMU has SPICE");
        } else {
            self.warn("libvirt", "QEMU has no SPICE: redirections are refused", "install its SPICE module (Debian 13: qemu-system-modules-spice, 12: qemu-system-gui), if redirections are wanted");
        }
    }

    /// What waits for somebody.
    fn set_aside(&mut self, record: &Record) {
        let subject = format!("device {} (port {})", record.entry.id, record.entry.port_path);
        let clear = format!("look at it, then 'virt-usb quarantine clear {}'", record.entry.id);
        match (&record.quarantined, &record.flapping_until, record.altered()) {
            (Some(why), _, Some(_)) => self.broken("device", format!("{subject} is set aside: {why}"), clear),
            (Some(why), _, None) => self.warn("device", format!("{subject} is set aside: {why}"), clear),
            (None, Some(until), _) => self.warn(
                "device",
                format!("{subject} comes and goes; it is not offered until {until}"),
                "look at its plug, its cable and its hub",
            ),
            (None, None, _) => {}
        }
    }

    /// After a kill -9 of QEMU nobody gives the device back to the host's driver.
    fn devices(&mut self, config: &Config, store: &Store) {
        let Ok(devices) = store.devices() else { return };
        let free = devices.iter().filter(|r| r.present && r.entry.instance_uuid.is_none());
        let mut none = true;
        for record in free {
            for interface in driverless(config, record) {
                none = false;
                self.warn(
                    "device",
                    format!("device {} (port {}): nobody holds it, and its interface {interface} has no driver: a guest that was killed may have left it so", record.entry.id, record.entry.port_path),
                    format!("'echo {interface} > {}/bus/usb/drivers_probe' gives it to the host's driver; the next guest gets it all the same", config.sysfs_root.display()),
                );
            }
        }
        if none {
            self.well("device", "no free device was left without its driver");
        }
        for record in &devices {
            self.set_aside(record);
        }
    }
}

/// libvirt's daemons that run, and their process ids.
fn daemons(places: &Places) -> Vec<(&'static str, String)> {
    let pid = |daemon: &'static str| {
        let text = std::fs::read_to_string(places.run.join(format!("{daemon}.pid"))).ok()?;
        Some((daemon, text.trim().to_owned()))
    };
    ["virtqemud", "libvirtd"].into_iter().filter_map(pid).collect()
}

/// As whom a process runs.
struct Process {
    uid: u32,
    /// All of its groups.
    groups: Vec<u32>,
}

/// Who holds the lock on this file, as the kernel lists it (proc_locks(5)).
fn holder(lock: &Path) -> Option<Process> {
    let inode = std::fs::metadata(lock).ok()?.ino().to_string();
    let locks = std::fs::read_to_string("/proc/locks").ok()?;
    let pid = locks.lines().find_map(|line| {
        let words: Vec<&str> = line.split_whitespace().collect();
        let [_, "FLOCK", _, _, pid, file, ..] = words.as_slice() else { return None };
        (file.rsplit(':').next() == Some(&inode)).then_some(*pid)
    })?;
    let status = std::fs::read_to_string(Path::new("/proc").join(pid).join("status")).ok()?;
    let numbers = |key: &str| -> Vec<u32> {
        let line = status.lines().find_map(|line| line.strip_prefix(key));
        line.into_iter().flat_map(str::split_whitespace).filter_map(|n| n.parse().ok()).collect()
    };
    // Real, effective, saved, file system.
    let (uid, mut groups) = (*numbers("Uid:").get(1)?, numbers("Groups:"));
    groups.extend(numbers("Gid:"));
    Some(Process { uid, groups })
}

/// Whether a user of these groups may read a file (`access` 4), or write to it (2).
fn may(file: &Metadata, uid: u32, groups: &[u32], access: u32) -> bool {
    uid == 0
        || (file.uid() == uid && file.mode() & (access << 6) != 0)
        || (groups.contains(&file.gid()) && file.mode() & (access << 3) != 0)
        || file.mode() & access != 0
}

/// The ports for devices that would serve the flavor, the least demanding ones: where these do not
/// fit, nothing does.
fn speeds(flavor: &Flavor, known: &[Record]) -> Vec<SpeedMask> {
    let mut speeds = Vec::new();
    for request in &flavor.usb_devices {
        let matching = known.iter().filter(|record| selects(&request.selector, record));
        let mut there: Vec<SpeedMask> = matching.map(port_speeds).collect();
        there.sort_by_key(|speeds| (speeds.slowest(), Reverse(speeds.fastest())));
        there.resize(request.count as usize, SpeedMask::ANY);
        speeds.extend(there);
    }
    speeds
}

/// Why a domain cannot have what its flavor asks for.
fn unfit(domain: &Domain, flavor: &Flavor, known: &[Record]) -> Option<String> {
    let redirections = missing_redirdevs(domain, flavor.usb_redirection_devices.len());
    if !redirections.is_empty() && !domain.spice {
        return Some(NO_SPICE.into());
    }
    // What is in its definition already has its port.
    let there = domain.hostdevs.iter().filter(|h| h.injected().is_some()).count();
    let mut wanted: Vec<SpeedMask> = speeds(flavor, known).into_iter().skip(there).collect();
    wanted.extend(redirections.iter().map(|_| SpeedMask::ANY));
    room(domain, &wanted, Delivery::Unknown).err()
}

/// The interfaces of a free device that the kernel's own drivers would have: storage, printers, keyboards, cameras and the like.
fn driverless(config: &Config, record: &Record) -> Vec<String> {
    const DRIVEN: [u8; 7] = [0x01, 0x02, 0x03, 0x07, 0x08, 0x0e, 0xe0];
    let dir = device_dir(&config.sysfs_root, &record.entry.port_path);
    let Ok(entries) = std::fs::read_dir(&dir) else { return Vec::new() };
    let names = entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned());
    let interfaces = names.filter(|name| name.starts_with(&format!("{}:", record.entry.port_path)));
    let mut left: Vec<String> = interfaces
        .filter(|name| {
            let class = attribute(&dir.join(name), "bInterfaceClass").ok().flatten();
            let class = class.and_then(|class| class.parse::<Class>().ok());
            class.is_some_and(|c| DRIVEN.into_iter().any(|driven| Class::new(driven) == c))
                && !dir.join(name).join("driver").exists()
        })
        .collect();
    left.sort();
    left
}
