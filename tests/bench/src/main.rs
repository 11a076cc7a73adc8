//! `make bench`: the figures of BENCHMARKS.md, measured side by side in one run. It reports and
//! never judges: what a machine under load shows is no reason for a change to fail.
//!
//! ```text
//! world (devices, sysfs, configuration, domains) ─┬─► calls .... whole processes, in turn with /bin/true and Python
//!                                                 ├─► memory ... the peak of one process
//!                                                 ├─► crowd .... 200 processes at once
//!                                                 └─► claims ... inside one process, 10 000 devices
//! simulated hosts (a live agent each) ─────┬─► agent .... from an event to a row, a pass, idle
//!                                          └─► api ...... under wrk, in turn with nginx; 10 000 devices in pages; idle
//! made fleet (50 000 hosts × 20 devices) ──┬─► filter ... in the sandbox and natively
//!                                          ├─► fleet .... 5 000 of them over etcd, under a scheduler that follows
//!                                          └─► python ... one batch call, and the same rules in Python
//!                                                        all ──► table
//! ```
//! With names of parts as arguments, those alone are measured: `virt-usb-bench api`.

mod agent;
mod api;
mod calls;
mod claims;
mod crowd;
mod daemon;
mod filter;
mod fleet;
mod machine;
mod memory;
mod nginx;
mod program;
mod python;
mod samples;
mod table;
mod world;

use std::io::Write;

use anyhow::{Context as _, Result, ensure};

use crate::program::Programs;
use crate::table::Table;

type Part = fn(&Programs, &mut Table) -> Result<()>;

const PARTS: [(&str, Part); 9] = [
    ("calls", calls::measure),
    ("memory", memory::measure),
    ("crowd", crowd::measure),
    ("claims", |_, table| claims::measure(table)),
    ("agent", agent::measure),
    ("api", api::measure),
    ("filter", filter::measure),
    ("fleet", fleet::measure),
    ("python", python::measure),
];

fn main() -> Result<()> {
    let arguments: Vec<_> = std::env::args_os().skip(1).collect();
    if let Some((first, command)) = arguments.split_first()
        && first == memory::HELPER
    {
        return show(&memory::peak_of(command)?.to_string());
    }
    let names = PARTS.map(|(name, _)| name);
    let unknown = arguments.iter().find(|asked| names.iter().all(|name| name != asked));
    ensure!(unknown.is_none(), "no such part: {unknown:?}; there are {}", names.join(", "));
    let programs = Programs::find()?;
    show(&machine::describe(&programs))?;
    let mut table = Table::default();
    for (name, measure) in PARTS {
        if arguments.is_empty() || arguments.iter().any(|asked| asked == name) {
            measure(&programs, &mut table).with_context(|| format!("measuring {name}"))?;
        }
    }
    show(&table.to_string())
}

fn show(text: &str) -> Result<()> {
    Ok(writeln!(std::io::stdout(), "{text}")?)
}
