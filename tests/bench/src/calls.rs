//! Whole processes, as libvirtd waits for them: the hook beside `/bin/true` and a Python hook, in
//! turn.

use std::fs::File;

use anyhow::Result;

use crate::program::{Call, Programs};
use crate::samples::Samples;
use crate::table::Table;
use crate::world::{Devices, NOVA, World, domain, flavor};

const WARM_UP: usize = 20;
const RUNS: usize = 300;
/// Number of rounds of Python, which needs fewer because it is slow.
const EVERY: usize = 6;

const SIZE: usize = 20_000;
const KINDS: usize = 20;
const TWO: &str = r#"{"usb_devices":[{"vendor_id":"0529","product_id":"0007","count":2}]}"#;

/// The calls that are compared.
struct Calls {
    nothing: Call,
    without_request: Call,
    claim: Call,
    give_back: Call,
    minidom: Call,
}

#[derive(Default)]
struct Times {
    nothing: Samples,
    without_request: Samples,
    claim: Samples,
    minidom: Samples,
}

pub(crate) fn measure(programs: &Programs, table: &mut Table) -> Result<()> {
    let world = World::new(200, Devices::Kinds(KINDS))?;
    let calls = Calls::new(programs, &world)?;
    let alone = calls.run()?;
    // An agent has the database open for as long as it lives, and holds its lock.
    let agent = world.store()?;
    let lock = File::create(world.state_dir().join("agent.lock"))?;
    lock.lock()?;
    let beside_agent = calls.run()?;
    drop((agent, lock));
    let nothing = |times| ("/bin/true", times);
    let Times { nothing: still, without_request, claim, minidom } = &beside_agent;
    table.multiple(
        "hook, 20 kB domain without a request",
        without_request,
        nothing(still),
        "≤ 1.5 ×",
    );
    table.multiple(
        "hook claims 2 of 200 devices, 20 kB domain, an agent lives",
        claim,
        nothing(still),
        "≤ 3 ×",
    );
    table.multiple(
        "the same, no other process has the database open",
        &alone.claim,
        nothing(&alone.nothing),
        "≤ 3 ×",
    );
    table.faster(
        "the same rewriting in Python with minidom",
        claim,
        ("minidom", minidom),
        "≤ 1 / 25",
    );
    table.multiple("for comparison: that Python hook", minidom, nothing(still), "");
    Ok(())
}

impl Calls {
    fn new(programs: &Programs, world: &World) -> Result<Self> {
        let asks = world.file("asks.xml", &domain(1, SIZE, &flavor(TWO)))?;
        let quiet = world.file("quiet.xml", &domain(2, SIZE, NOVA))?;
        let devices =
            world.file("devices.json", &serde_json::to_string(&world.store()?.devices()?)?)?;
        let config = world.config();
        let hook = |step: [&str; 4], stdin| {
            let words = step.iter().map(Into::into);
            Call::new(
                &programs.hook,
                ["--config".into(), config.clone().into_os_string()].into_iter().chain(words),
                stdin,
            )
        };
        let script = [programs.minidom_hook.clone().into_os_string(), devices.into_os_string()];
        let prepare = ["instance-00000001", "prepare", "begin", "-"];
        Ok(Self {
            nothing: Call::new(&programs.nothing, [""; 0], &asks),
            without_request: hook(["instance-00000002", "prepare", "begin", "-"], &quiet),
            claim: hook(prepare, &asks),
            give_back: hook(["instance-00000001", "release", "end", "destroyed"], &asks),
            minidom: Call::new(
                &programs.python,
                script.into_iter().chain(prepare.map(Into::into)),
                &asks,
            ),
        })
    }

    /// Measures in turn, so that other load on the machine affects all. Each claim is a fresh one.
    fn run(&self) -> Result<Times> {
        let mut times = Times::default();
        for round in 0..WARM_UP + RUNS {
            if round == WARM_UP {
                times = Times::default();
            }
            times.nothing.push(self.nothing.time()?);
            times.without_request.push(self.without_request.time()?);
            times.claim.push(self.claim.time()?);
            self.give_back.time()?;
            if round % EVERY == 0 {
                times.minidom.push(self.minidom.time()?);
            }
        }
        Ok(times)
    }
}
