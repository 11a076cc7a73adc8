//! `virt-usbd`: starts the threads and connects the parts. No other module knows them all.
//!
//! ```text
//!  libusb, sysfs ─► devices (thread) ─► store ◄── hook, virt-usb
//!                        │ DeviceSignal, Signal
//!  libvirt ─ events ─► guests (thread) ─► workers ─► libvirt
//!  metrics, API, publisher: threads of their own
//! ```

mod arguments;
mod simulation;

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, IsTerminal as _, Write as _};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};
use std::time::Duration;

use anyhow::{Context as _, bail};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use virt_usb_config::host_env;
use virt_usb_config::{self as config, Config, DEFAULT_PATH};
use virt_usb_model::{ParseError, ProjectId};
use virt_usb_store::Store;
use virt_usb_store::user::User;

use crate::agent::devices::{Devices, Files};
use crate::agent::guests::Guests;
use crate::agent::live_config::LiveConfig;
use crate::agent::signals::{DeviceSignal, Pulse, Signal};
use crate::agent::{ACTOR, guest_uses, health};
use crate::api::identity::{Identities, Role};
use crate::api::keystone::Keystone;
use crate::api::tokens::{Made, TokenFile, Tokens, TokensError, Wanted};
use crate::api::{self, Api, Listening};
use crate::discovery::{LibUsb, UsbSource, hotplug, origin};
use crate::hypervisor::{Event, Hypervisor, Libvirt, Listeners, Supervised};
use crate::metrics::{self, Metrics};
use crate::publish::publisher::{Publisher, Publishing};
use crate::timeouts::STORE_LOCK_TIMEOUT;

pub use arguments::Arguments;
use simulation::Simulation;

/// Socket that exists while udevd runs. libusb receives hotplug events from udevd.
const UDEVD_SOCKET: &str = "/run/udev/control";
/// Interval at which devices are scanned without udevd.
const SCAN_INTERVAL_WITHOUT_UDEVD: Duration = Duration::from_secs(10);
/// Number of attempts to lock the agent's file, which a hook may hold for a moment.
const MAX_LOCK_ATTEMPTS: usize = 20;
/// Wait between two attempts.
const LOCK_RETRY_INTERVAL: Duration = Duration::from_millis(10);

/// Parameters of the agent.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// File of the configuration.
    pub config: Option<PathBuf>,
    /// File of the simulated devices and domains.
    pub sim: Option<PathBuf>,
}

/// Runs the agent until a signal stops it.
///
/// # Errors
/// If the agent cannot start, or its files were replaced while it ran.
pub fn run(options: &Options) -> anyhow::Result<()> {
    let rules = LiveConfig::read(options.config.clone())?;
    let mut config = Config::clone(&rules.now());
    let simulation =
        options.sim.as_deref().map(|file| Simulation::new(file, &mut config)).transpose()?;
    let rules = rules.with(config.clone());
    let mut store = Store::create(&config.state_dir, STORE_LOCK_TIMEOUT)?;
    let (_lock, lock_file) = lock(&config.state_dir)?;
    store.admit(origin(options.sim.as_deref(), &config.sysfs_root))?;
    virt_usb_config::rules::admit(&store, &config, options.config.as_deref())?;
    if options.config.is_none() && !Path::new(DEFAULT_PATH).exists() {
        tracing::warn!(
            "there is no {DEFAULT_PATH}: the defaults apply, which offer every device of this host \
                to every project"
        );
    }
    let files = Files::new(vec![lock_file, config.state_dir.join(virt_usb_store::FILE_NAME)])
        .with_context(|| format!("cannot read {}", config.state_dir.display()))?;
    // End the claims of an earlier boot before any device is requested.
    store.sweep(&host_env::context(&config, ACTOR)?)?;
    let host = crate::inventory::host_name(&config.procfs_root)?;
    let metrics = Arc::new(Metrics::default());
    if let (config::Api::On(_), Some(tls)) = (config.api, &config.api_tls) {
        metrics.watch_certificate(tls.certificate.clone());
    }
    metrics::serve(metrics.clone(), config.metrics.clone())?;
    let (to_devices, device_signals) = channel();
    let (to_guests, signals) = channel();
    follow_signals(to_devices.clone(), to_guests.clone())?;
    let world = World::new(&config, simulation, &to_devices, &to_guests)?;
    let (reconnect, threads) = (world.reconnect, (to_devices.clone(), to_guests.clone()));
    let hypervisor =
        Arc::new(Supervised::new(world.hypervisor, listeners(&to_guests, &to_devices)));
    let tls = config.api_tls.clone().filter(|_| config.api != config::Api::Off);
    let sources = (metrics.clone(), hypervisor.clone(), tls);
    let simulated = options.sim.is_some();
    let report = move || health::report(&sources.0, &sources.1, sources.2.as_ref(), simulated);
    let received = move |message: &str| {
        // A call of the hook shows that libvirt is running.
        reconnect();
        if message.split(' ').next() == Some(host_env::COMMAND) {
            let _ = threads.0.send(DeviceSignal::Usb);
            drop(threads.1.send(Signal::Devices));
        }
    };
    receive_notifications(&config.state_dir, metrics.clone(), received, report);
    let pulse = Pulse::new();
    let guests = Guests::new(
        rules.clone(),
        hypervisor.clone(),
        metrics.clone(),
        to_guests.clone(),
        to_devices.clone(),
        pulse.clone(),
    )?;
    let publishing = publish(&config, &hypervisor, metrics.clone(), &host)?;
    let api = serve_api(&rules, hypervisor.clone(), metrics.clone(), &host)?;
    let devices = Devices {
        rules,
        source: world.source,
        store,
        host,
        metrics,
        files,
        reported: Vec::new(),
        without_events: world.without_events,
        hypervisor,
        pulse,
        guests: to_guests,
        after: world.after,
    };
    let ready = || {
        tracing::info!("ready");
        // An error here means that there is no service manager.
        drop(sd_notify::notify(&[
            sd_notify::NotifyState::Ready,
            sd_notify::NotifyState::Status("watching devices and guests"),
        ]));
    };
    let watching = std::thread::Builder::new()
        .name("devices".into())
        .spawn(move || devices.run(&device_signals, ready))?;
    guests.run(&signals);
    drop(sd_notify::notify(&[sd_notify::NotifyState::Stopping]));
    api.stop();
    if let Some(publishing) = publishing {
        publishing.stop();
    }
    let _ = to_devices.send(DeviceSignal::Stop);
    match watching.join() {
        Ok(Ok(())) => tracing::info!("stopped"),
        Ok(Err(why)) => bail!(why),
        Err(_) => bail!("the thread of the devices has failed"),
    }
    Ok(())
}

/// Callbacks of the supervised calls to libvirt.
fn listeners(guests: &Sender<Signal>, devices: &Sender<DeviceSignal>) -> Listeners {
    let (guests, devices) = (guests.clone(), devices.clone());
    Listeners {
        answered: Box::new(move |instance| {
            drop(guests.send(Signal::Answered(instance)));
        }),
        changed: Box::new(move |before, now| {
            if guest_uses::have_changed(before, now) {
                // The devices' thread ends after the guests'.
                let _ = devices.send(DeviceSignal::Usb);
            }
        }),
    }
}

/// The observed host: this machine, or a simulation.
struct World {
    /// Scan interval if hotplug events do not arrive.
    without_events: Option<Duration>,
    /// Reconnects to libvirt immediately, if there is no connection.
    reconnect: Box<dyn Fn() + Send>,
    source: Box<dyn UsbSource + Send>,
    hypervisor: Arc<dyn Hypervisor>,
    after: Box<dyn Fn() + Send>,
}

impl World {
    fn new(
        config: &Config,
        simulation: Option<Simulation>,
        devices: &Sender<DeviceSignal>,
        guests: &Sender<Signal>,
    ) -> anyhow::Result<Self> {
        let events = forward(guests.clone())?;
        if let Some(simulation) = simulation {
            return simulation.start(config, events, devices.clone());
        }
        let failed = |why: &str| {
            tracing::warn!("no hotplug events ({why}): changes are noticed at the next scan");
        };
        hotplug::follow(devices.clone(), DeviceSignal::Usb, failed)?;
        let libvirt = Libvirt::new(&config.libvirt_uri);
        libvirt.follow(events)?;
        let retried = libvirt.clone();
        let without_events =
            (!Path::new(UDEVD_SOCKET).exists()).then_some(SCAN_INTERVAL_WITHOUT_UDEVD);
        if without_events.is_some() {
            tracing::warn!(
                "udevd does not run here ({UDEVD_SOCKET} is missing), so there are no hotplug \
                    events: the agent scans the devices every {} s",
                SCAN_INTERVAL_WITHOUT_UDEVD.as_secs()
            );
        }
        Ok(Self {
            without_events,
            reconnect: Box::new(move || retried.retry()),
            source: Box::new(LibUsb::new(config)),
            hypervisor: Arc::new(libvirt),
            after: Box::new(|| {}),
        })
    }
}

/// Starts publishing this host, if there is a fleet.
fn publish(
    config: &Config,
    hypervisor: &Arc<Supervised>,
    metrics: Arc<Metrics>,
    host: &str,
) -> anyhow::Result<Option<Publishing>> {
    let Some(fleet) = config.fleet.clone() else { return Ok(None) };
    let config = config.clone();
    let (hypervisor, host) = (Some(hypervisor.clone()), host.to_owned());
    let publisher = Publisher { fleet, config, host, hypervisor, metrics };
    Ok(Some(publisher.start().context("cannot publish this host to the fleet")?))
}

fn serve_api(
    rules: &LiveConfig,
    hypervisor: Arc<Supervised>,
    metrics: Arc<Metrics>,
    host: &str,
) -> anyhow::Result<Listening> {
    let file = TokenFile::new(&rules.now().state_dir);
    match first_token(&file) {
        Ok(None) => {}
        Ok(Some(made)) => {
            let text = format!(
                "the API's first token, for an administrator, is shown only once: {}\n",
                made.token
            );
            // Print the token to the terminal, not to the log.
            io::stderr().write_all(text.as_bytes())?;
        }
        Err(e) => tracing::error!("{e}"),
    }
    let keystone =
        rules.now().keystone.clone().map(|config| Keystone::new(config, metrics.clone()));
    let (rules, identity) = (rules.clone(), Arc::new(Identities::new(Tokens::new(file), keystone)));
    let api =
        Api::new(Box::new(move || rules.now()), hypervisor, metrics, host.to_owned(), identity);
    api::start(&Arc::new(api)).context("cannot serve the API")
}

/// Creates the file of tokens if it does not exist, with a first token if stderr is a terminal.
fn first_token(file: &TokenFile) -> Result<Option<Made>, TokensError> {
    if !file.ensure()? || !io::stderr().is_terminal() {
        return Ok(None);
    }
    let project: ProjectId =
        "admin".parse().map_err(|e: ParseError| TokensError::Refused(e.to_string()))?;
    file.add(&Wanted { name: "first", project: &project, role: Role::Admin, lifetime: None })
        .map(Some)
}

/// Forwards the hypervisor's events to the guests' thread.
fn forward(to: Sender<Signal>) -> std::io::Result<Sender<Event>> {
    let (events, from) = channel();
    let pass_on = move || {
        while let Ok(event) = from.recv() {
            if to.send(Signal::Hypervisor(event)).is_err() {
                return;
            }
        }
    };
    std::thread::Builder::new().name("events".into()).spawn(pass_on)?;
    Ok(events)
}

/// Takes the agent's lock. It ensures that only one agent runs per host, and shows hooks that the
/// agent is running. The kernel releases the lock when the process ends.
fn lock(state_dir: &Path) -> anyhow::Result<(File, PathBuf)> {
    let path = state_dir.join(host_env::AGENT_LOCK);
    let _owner = User::of(state_dir)?.enter()?;
    let file = OpenOptions::new().write(true).create(true).truncate(false).mode(0o644).open(&path);
    let file = file.with_context(|| {
        format!(
            "cannot open {0}: it must belong to the agent's user, as {1} does ('chown \
                --reference={1} {0}')",
            path.display(),
            state_dir.display()
        )
    })?;
    for _ in 0..MAX_LOCK_ATTEMPTS {
        match file.try_lock() {
            Ok(()) => return Ok((file, path)),
            Err(TryLockError::WouldBlock) => std::thread::sleep(LOCK_RETRY_INTERVAL),
            Err(TryLockError::Error(e)) => {
                return Err(e).with_context(|| format!("cannot lock {}", path.display()));
            }
        }
    }
    bail!(
        "another agent runs on {}: it holds agent.lock. Stop it first ('systemctl stop virt-usbd'; \
         'fuser -v {}' shows its process), or set another state_dir for this one",
        state_dir.display(),
        path.display()
    )
}

/// Handles signals: SIGHUP reloads the configuration, SIGTERM and SIGINT stop the agent.
fn follow_signals(devices: Sender<DeviceSignal>, guests: Sender<Signal>) -> std::io::Result<()> {
    let mut signals = Signals::new([SIGHUP, SIGTERM, SIGINT])?;
    let follow = move || {
        for signal in signals.forever() {
            match signal {
                SIGHUP => drop(devices.send(DeviceSignal::Reload)),
                _ => drop(guests.send(Signal::Stop)),
            }
        }
    };
    std::thread::Builder::new().name("signals".into()).spawn(follow).map(drop)
}

/// Receives notifications of hooks and commands, and requests for the agent's health. If the socket
/// cannot be used, the agent runs without them.
fn receive_notifications(
    state_dir: &Path,
    metrics: Arc<Metrics>,
    received: impl Fn(&str) + Send + 'static,
    report: impl Fn() -> String + Send + 'static,
) {
    let path = state_dir.join(host_env::HOOK_SOCKET);
    let start = |socket: UnixDatagram| {
        let receive = move || {
            let mut message = [0; 128];
            while let Ok((length, from)) = socket.recv_from(&mut message) {
                let text = message.get(..length).map(String::from_utf8_lossy).unwrap_or_default();
                if text == health::QUESTION {
                    health::answer(&socket, &from, &report());
                    continue;
                }
                metrics.hook(&text);
                received(&text);
            }
        };
        std::thread::Builder::new().name("hooks".into()).spawn(receive).map(drop)
    };
    let bind = || {
        let _owner = User::of(state_dir)?.enter()?;
        // Remove the socket of an earlier agent.
        drop(std::fs::remove_file(&path));
        UnixDatagram::bind(&path)
    };
    if let Err(e) = bind().and_then(start) {
        tracing::warn!("cannot receive notifications of hooks at {}: {e}", path.display());
    }
}
