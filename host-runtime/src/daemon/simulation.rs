//! `--sim FILE`: runs the agent with the devices and domains of a file. An edit of the file plugs
//! in or unplugs devices, and starts or stops domains.

use std::path::{Path, PathBuf};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, bail};
use virt_usb_config::Config;
use virt_usb_model::device::Problem;
use virt_usb_store::user::User;

use super::World;
use crate::agent::signals::DeviceSignal;
use crate::discovery::{Simulated, Snapshot, UsbSource};
use crate::hypervisor::{Event, SimulatedHypervisor};
use virt_usb_fleet::stamp::{Stamp, stamp};

/// Interval at which the file is checked for changes.
const CHECK_INTERVAL: Duration = Duration::from_millis(100);

pub(super) struct Simulation {
    file: PathBuf,
    sysfs: PathBuf,
}

impl Simulation {
    /// Reads the file, and sets `sysfs_root` to a directory in `state_dir`, where the hook finds
    /// the simulated devices.
    pub(super) fn new(file: &Path, config: &mut Config) -> anyhow::Result<Self> {
        if config.state_dir == Config::default().state_dir {
            bail!(
                "a simulation needs its own state_dir: {} belongs to the real inventory. Set \
                 another state_dir in a configuration file, and pass that file with --config",
                config.state_dir.display()
            );
        }
        let sysfs = config.state_dir.join("simulated-sysfs");
        config.sysfs_root.clone_from(&sysfs);
        let simulation = Self { file: file.to_owned(), sysfs };
        let (text, _) = simulation.read()?;
        if let Err(why) = SimulatedHypervisor::check(&text) {
            bail!("the simulation file {} is wrong: {why}", file.display());
        }
        Ok(simulation)
    }

    fn read(&self) -> anyhow::Result<(String, Simulated)> {
        let simulated = Simulated::load(&self.file)?;
        let text = std::fs::read_to_string(&self.file)
            .with_context(|| format!("cannot read the simulation file {}", self.file.display()))?;
        Ok((text, simulated))
    }

    pub(super) fn start(
        self,
        config: &Config,
        events: Sender<Event>,
        devices: Sender<DeviceSignal>,
    ) -> anyhow::Result<World> {
        // The simulated hypervisor is connected from the beginning.
        events.send(Event::Connected)?;
        let hypervisor = Arc::new(SimulatedHypervisor::new(config.clone(), events));
        let file = self.file.clone();
        std::thread::Builder::new()
            .name("simulation".into())
            .spawn(move || watch(&file, &devices))?;
        let text = Arc::new(Mutex::new(String::new()));
        let source = FileSource { simulation: self, text: text.clone(), known: Mutex::default() };
        let domains = hypervisor.clone();
        let reported = Mutex::new(None);
        let after = move || {
            let text = text.lock().unwrap_or_else(PoisonError::into_inner).clone();
            let result = domains.apply(&text);
            // Each scan applies the same text again.
            let mut reported = reported.lock().unwrap_or_else(PoisonError::into_inner);
            if result.as_ref().err() == reported.as_ref() && result.is_err() {
                return;
            }
            *reported = result.as_ref().err().cloned();
            match result {
                Ok(refused) => {
                    refused.iter().for_each(|why| tracing::warn!("does not start: {why}"));
                }
                Err(why) => tracing::error!(
                    "the domains in the simulation file are invalid: {why}; nothing was changed"
                ),
            }
        };
        Ok(World {
            without_events: None,
            reconnect: Box::new(|| {}),
            source: Box::new(source),
            hypervisor,
            after: Box::new(after),
        })
    }
}

fn watch(file: &Path, devices: &Sender<DeviceSignal>) {
    let mut known = stamp(file);
    loop {
        std::thread::sleep(CHECK_INTERVAL);
        let now = stamp(file);
        if now != known {
            known = now;
            if devices.send(DeviceSignal::Usb).is_err() {
                return;
            }
        }
    }
}

/// Source of the devices in the file, read again each time.
struct FileSource {
    simulation: Simulation,
    text: Arc<Mutex<String>>,
    /// Snapshot from the last read of the file.
    known: Mutex<Option<(Stamp, Snapshot)>>,
}

impl UsbSource for FileSource {
    fn snapshot(&self) -> Snapshot {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let now = stamp(&self.simulation.file);
        if let (Some(now), Some((then, snapshot))) = (now, &*known)
            && now == *then
        {
            return snapshot.clone();
        }
        let read = || {
            let (text, simulated) = self.simulation.read()?;
            let written = User::of(&self.simulation.sysfs)
                .and_then(User::enter)
                .and_then(|_owner| simulated.write_sysfs(&self.simulation.sysfs));
            written.context("cannot write the simulated sysfs")?;
            Ok::<_, anyhow::Error>((text, simulated.snapshot()))
        };
        match read() {
            Ok((text, snapshot)) => {
                *self.text.lock().unwrap_or_else(PoisonError::into_inner) = text;
                *known = now.map(|now| (now, snapshot.clone()));
                snapshot
            }
            Err(e) => Snapshot {
                problems: vec![Problem { place: String::new(), what: format!("{e:#}") }],
                ..Snapshot::default()
            },
        }
    }
}
