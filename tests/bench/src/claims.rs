//! Claims inside one process, 10 000 devices in the store. Verifying the port is part of a claim,
//! and of the figure.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use virt_usb_config::Config;
use virt_usb_config::{host_env, sysfs};
use virt_usb_model::{Flavor, InstanceId};
use virt_usb_store::claim::{
    ClaimMode, ClaimRequest, ClaimVerifier, Claimant, Claimed, Granted, Verified,
};
use virt_usb_store::release::Extent;
use virt_usb_store::{Context, Location, Record, Store};

use crate::samples::Samples;
use crate::table::Table;
use crate::world::{Devices, World, place, serial};

const COUNT: usize = 10_000;
const KINDS: usize = 20;
const RUNS: u64 = 200;
const TARGET: Duration = Duration::from_millis(1);

pub(crate) fn measure(table: &mut Table) -> Result<()> {
    let world = World::new(COUNT, Devices::Kinds(KINDS))?;
    let mut bench = Bench {
        store: world.store()?,
        ports: Ports { sysfs_root: world.sysfs_root() },
        context: host_env::context(&Config::default(), "bench")?,
    };
    // A device that is free in both rounds.
    let (last, (_, _, port)) = (serial(COUNT - 1), place(COUNT - 1));
    let selectors = [
        ("vendor and product", r#"{"vendor_id":"0529","product_id":"0007"}"#.to_owned()),
        ("serial", format!(r#"{{"serial":"{last}"}}"#)),
        ("port", format!(r#"{{"port":"{port}"}}"#)),
        ("class", r#"{"class":"08"}"#.to_owned()),
        ("tag", r#"{"tags":["erp"]}"#.to_owned()),
    ];
    for (name, selector) in &selectors {
        bench.row(&format!("claim by {name}, 10 000 devices"), selector, table)?;
    }
    bench.hold_half()?;
    for (name, selector) in &selectors {
        bench.row(&format!("claim by {name}, half of the 10 000 held"), selector, table)?;
    }
    Ok(())
}

struct Bench {
    store: Store,
    ports: Ports,
    context: Context,
}

impl Bench {
    fn row(&mut self, figure: &str, selector: &str, table: &mut Table) -> Result<()> {
        let mut samples = Samples::default();
        for round in 0..RUNS + 10 {
            let took = self.claim(round, selector)?;
            self.store.release(instance(round)?, Extent::Run, "bench", &self.context)?;
            if round >= 10 {
                samples.push(took);
            }
        }
        let share = crate::table::ratio(samples.median(), TARGET);
        table.row(figure, samples, "1 ms", &format!("{share:.2} ×"), "< 1 ms");
        Ok(())
    }

    fn claim(&mut self, number: u64, selector: &str) -> Result<Duration> {
        let claimant = Claimant {
            instance: instance(number)?,
            domain: format!("instance-{number:08x}"),
            project: None,
        };
        let requests = Flavor::parse_lists(Some(selector), None)?.usb_devices;
        let wants: Vec<ClaimRequest> =
            requests.into_iter().map(|request| ClaimRequest::new(request, false)).collect();
        let began = Instant::now();
        let claimed = self.store.claim(
            &claimant,
            &wants,
            &[],
            ClaimMode::Replace,
            &mut self.ports,
            &self.context,
        )?;
        let took = began.elapsed();
        ensure!(matches!(claimed, Claimed::Granted(_)), "{selector}: {claimed:?}");
        Ok(took)
    }

    /// Claims the older half, so that free devices have higher ids.
    fn hold_half(&mut self) -> Result<()> {
        for guest in 0..COUNT as u64 / 2 / 100 {
            self.claim(1_000_000 + guest, r#"{"tags":["erp"],"count":100}"#)?;
        }
        Ok(())
    }
}

fn instance(n: u64) -> Result<InstanceId> {
    Ok(format!("00000000-0000-4000-8000-{n:012x}").parse()?)
}

/// Reads the port, as the hook does.
struct Ports {
    sysfs_root: PathBuf,
}

impl ClaimVerifier for Ports {
    fn verify(&mut self, candidate: &Record) -> Verified {
        match sysfs::at_port(&self.sysfs_root, &candidate.entry.port_path) {
            Ok(Some(seen)) if seen.usb == candidate.usb() => {
                Verified::Here(Location { address: seen.address, ..candidate.location() })
            }
            other => Verified::Not(format!("{other:?}")),
        }
    }
    fn fits(&mut self, _: &[Granted]) -> Result<(), String> {
        Ok(())
    }
}
