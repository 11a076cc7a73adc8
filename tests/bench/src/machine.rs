//! Description of the machine on which the figures were measured.

use std::fs;
use std::process::Command;

use crate::program::Programs;

pub(crate) fn describe(programs: &Programs) -> String {
    let cores = std::thread::available_parallelism().map_or(0, std::num::NonZero::get);
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let load = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    let load = load.split_whitespace().next().unwrap_or("?");
    let hook = if programs.hook_is_static() {
        "linked statically"
    } else {
        "linked dynamically: build it with 'make build'"
    };
    format!(
        "machine: {}, {cores} cores, Linux {}, {}, load {load} at the start; the hook is {hook}\n",
        cpu(),
        kernel.trim(),
        python_version(programs)
    )
}

fn cpu() -> String {
    let info = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = info.lines().find_map(|line| line.strip_prefix("model name")?.split_once(':'));
    model
        .map_or_else(|| "a processor without a name".to_owned(), |(_, name)| name.trim().to_owned())
}

fn python_version(programs: &Programs) -> String {
    let said = Command::new(&programs.python).arg("--version").output();
    said.map_or_else(
        |_| "no Python".to_owned(),
        |said| String::from_utf8_lossy(&said.stdout).trim().to_owned(),
    )
}
