//! `make bench`: the figures of BENCHMARKS.md, measured side by side in one run. It reports and never judges: what a
//! machine under load shows is no reason for a change to fail.
//!
//! ```text
//! world (devices, sysfs, configuration, domains) ─┬─► calls .... whole processes, in turn with /bin/true and Python
//!                                                 ├─► memory ... the peak of one process
//!                                                 ├─► crowd .... 200 processes at once
//!                                                 └─► claims ... inside one process, 10 000 devices
//! made fleet (50 000 hosts × 20 devices) ──┬─► filter ... in the sandbox and natively
//!                                          └─► python ... one batch call, and the same rules in Python
//!                                                        all ──► table
//! ```

mod agent;
mod calls;
mod claims;
mod crowd;
mod filter;
mod machine;
mod memory;
mod program;
mod python;
mod samples;
mod table;
mod world;

use std::io::Write;

use anyhow::Result;

use crate::table::Table;

fn main() -> Result<()> {
    let arguments: Vec<_> = std::env::args_os().skip(1).collect();
    if let Some((first, command)) = arguments.split_first()
        && first == memory::HELPER
    {
        return show(&memory::peak_of(command)?.to_string());
    }
    let programs = program::Programs::find()?;
    show(&machine::describe(&programs))?;
    let mut table = Table::default();
    calls::measure(&programs, &mut table)?;
    memory::measure(&programs, &mut table)?;
    crowd::measure(&programs, &mut table)?;
    claims::measure(&mut table)?;
    agent::measure(&programs, &mut table)?;
    filter::measure(&programs, &mut table)?;
    python::measure(&programs, &mut table)?;
    show(&table.to_string())
}

fn show(text: &str) -> Result<()> {
    Ok(writeln!(std::io::stdout(), "{text}")?)
}
