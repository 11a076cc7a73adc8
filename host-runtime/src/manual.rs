//! Man pages for each command, and shell completions, generated from the clap definitions.
//! `make build` writes them to `target/manual`, from where the package takes them. The hook does
//! not use clap; its page is in `install/man/`.

use std::fs;
use std::io;
use std::path::Path;

use clap::{Command, CommandFactory};
use clap_complete::Shell;
use clap_mangen::Man;
use clap_mangen::roff::{Roff, bold, roman};

use virt_usb_fleet::scheduler;
use virt_usb_store::user::User;

use crate::daemon;

/// A section that clap does not generate: a heading, and entries that each have a tag. An entry
/// with an empty tag is a paragraph.
type Section = (&'static str, &'static [(&'static str, &'static str)]);

const FILES: Section = (
    "FILES",
    &[
        ("/etc/virt-usb/config.toml", "The configuration. The file explains every key."),
        ("/var/lib/virt-usb/inventory.sqlite", "The inventory, in the directory set by state_dir."),
        ("/etc/libvirt/hooks/qemu.d/50-virt-usb", "The hook, as libvirt calls it."),
    ],
);
const COMMAND: [Section; 3] = [
    (
        "EXIT STATUS",
        &[
            ("0", "Success."),
            (
                "1",
                "The command failed; one line on stderr says why. For 'store check': the \
                    inventory is damaged. For 'doctor': some functions do not work.",
            ),
            ("2", "The arguments are invalid. For 'doctor': guests do not get their devices."),
            ("3", "For 'filter': no host can satisfy the flavor."),
        ],
    ),
    FILES,
    ("SEE ALSO", &[("", "virt-usbd(8), virt-usb-hook(8), virsh(1)")]),
];
const SUBCOMMAND: [Section; 1] =
    [("SEE ALSO", &[("", "virt-usb(1), virt-usbd(8), virt-usb-hook(8)")])];
const DAEMON: [Section; 4] = [
    (
        "EXIT STATUS",
        &[
            ("0", "The agent was asked to stop."),
            ("1", "The agent could not start. The last line of its log says why."),
        ],
    ),
    (
        "SIGNALS",
        &[
            (
                "SIGHUP",
                "Reload the configuration. If the new one is invalid, the agent rejects it and \
                    keeps the previous one.",
            ),
            ("SIGTERM, SIGINT", "Stop the agent. Guests keep their devices."),
        ],
    ),
    FILES,
    ("SEE ALSO", &[("", "virt-usb(1), virt-usb-hook(8), libvirtd(8)")]),
];

const SCHEDULER: [Section; 4] = [
    (
        "EXIT STATUS",
        &[
            ("0", "The scheduler was asked to stop."),
            ("1", "The scheduler could not start. The last line of its log says why."),
            ("2", "The arguments are invalid."),
        ],
    ),
    ("SIGNALS", &[("SIGTERM, SIGINT", "Stop the scheduler.")]),
    (
        "FILES",
        &[("/etc/virt-usb/config.toml", "The configuration. The table [fleet] is required.")],
    ),
    ("SEE ALSO", &[("", "virt-usb(1), virt-usbd(8)")]),
];

/// Writes all pages and completion scripts into `dir`, which is created if it is missing: `*.1`,
/// `*.8`, and one completion script per shell. `date` (YYYY-MM-DD) is the date of the pages; the
/// caller sets it so that builds are reproducible.
///
/// # Errors
/// Errors of the file system.
pub fn write(command: &Command, dir: &Path, date: &str) -> io::Result<()> {
    let _owner = User::of(dir)?.enter()?;
    fs::create_dir_all(dir)?;
    let mut shown = command.clone().disable_help_subcommand(true);
    shown.build();
    page(dir, &shown, ("1", date), &COMMAND)?;
    subcommands(dir, &shown, date)?;
    page(dir, &daemon::Arguments::command(), ("8", date), &DAEMON)?;
    // 'virt-usb scheduler' starts this program, whose page replaces that of the subcommand.
    page(dir, &scheduler::Arguments::command(), ("1", date), &SCHEDULER)?;
    for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
        clap_complete::generate_to(shell, &mut command.clone(), "virt-usb", dir)?;
    }
    Ok(())
}

fn subcommands(dir: &Path, command: &Command, date: &str) -> io::Result<()> {
    for below in command.get_subcommands().filter(|c| !c.is_hide_set()) {
        page(dir, below, ("1", date), &SUBCOMMAND)?;
        subcommands(dir, below, date)?;
    }
    Ok(())
}

fn page(
    dir: &Path,
    command: &Command,
    (section, date): (&str, &str),
    more: &[Section],
) -> io::Result<()> {
    let man = Man::new(command.clone())
        .section(section)
        .date(date)
        .source(concat!("virt-usb ", env!("CARGO_PKG_VERSION")))
        .manual("virt-usb");
    let mut text = Vec::new();
    man.render(&mut text)?;
    text.extend(sections(more).to_roff().into_bytes());
    fs::write(dir.join(man.get_filename()), text)
}

fn sections(list: &[Section]) -> Roff {
    let mut roff = Roff::new();
    for (heading, entries) in list {
        roff.control("SH", [*heading]);
        for (tag, text) in *entries {
            if !tag.is_empty() {
                roff.control("TP", []);
                roff.text([bold(*tag)]);
            }
            roff.text([roman(*text)]);
        }
    }
    roff
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_command_that_is_shown_has_a_page() {
        let dir = tempfile::tempdir().unwrap();
        write(&crate::cli::Arguments::command(), dir.path(), "2026-11-24").unwrap();
        let read = |name: &str| fs::read_to_string(dir.path().join(name)).unwrap();
        for command in crate::cli::Arguments::command().get_subcommands() {
            let name = format!("virt-usb-{}.1", command.get_name());
            if command.is_hide_set() {
                assert!(!dir.path().join(&name).exists(), "{name}");
                continue;
            }
            let text = read(&name);
            for heading in [".SH NAME", ".SH SYNOPSIS", ".SH DESCRIPTION", ".SH \"SEE ALSO\""] {
                assert!(text.contains(heading), "{name}: {heading}\n{text}");
            }
        }
        assert!(read("virt-usb-claims-release.1").contains("force"));
        assert!(read("virt-usb.1").contains(".SH \"EXIT STATUS\""));
        assert!(read("virt-usbd.8").contains("SIGHUP"));
        let scheduler = read("virt-usb-scheduler.1");
        assert!(scheduler.contains(r"\fBvirt\-usb\-scheduler\fR ["), "{scheduler}");
        assert!(scheduler.contains("config") && scheduler.contains("SIGTERM"), "{scheduler}");
        for script in ["virt-usb.bash", "_virt-usb", "virt-usb.fish"] {
            let text = read(script);
            assert!(text.contains("discover"), "{script}");
        }
    }
}
