//! The figures of BENCHMARKS.md (`make bench`), measured side by side in one run. The program
//! reports them and never fails because of them, because other load on the machine affects them.
//!
//! ```text
//! world (a host, domains) ─┬─► calls .... processes, in turn with /bin/true and Python
//!                          ├─► memory ... the peak of a process
//!                          ├─► crowd .... 200 processes at once
//!                          └─► claims ... in one process, 10 000 devices
//! simulated hosts ─────────┬─► agent .... from an event to a row, a pass, idle
//! (each with an agent)     └─► api ...... under wrk, in turn with nginx; pages; idle
//! generated fleet ─────────┬─► filter ... in the sandbox and natively
//! (50 000 hosts            ├─► fleet .... 5 000 hosts over etcd, with a scheduler
//! × 20 devices)            └─► python ... a batch call, and the same rules in Python
//!                              all ──► table
//! ```
//! To measure only some parts, pass their names: `virt-usb-bench api`.

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
