//! The call, parsed into what libvirt permits (docs: <https://libvirt.org/hooks.html>).
//!
//! | operation | action | if the hook fails |
//! |---|---|---|
//! | `prepare` | claim, rewrite; its exit status is the veto | closed if the domain requests a device, otherwise open |
//! | `restore`, `migrate` | claim, rewrite; a true filter (a restore never fails: the `prepare` that follows refuses) | closed if the domain holds a hostdev of ours (migrate: any USB hostdev), otherwise open |
//! | `started`, `stopped`, `release` | confirm, release | open: a stop is never blocked, and a start no longer |
//! | `reconnect` | adopt | open: otherwise libvirt kills the guest |
//! | any other operation | none | open |

use std::ffi::OsString;
use std::path::PathBuf;

/// The operation that libvirt asks the hook to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Operation {
    /// A domain is about to start: it may be refused.
    Gate,
    /// A domain comes in with a state of its own: its XML may be replaced, or it is refused.
    Filter(Incoming),
    /// Something has happened: nothing can be refused.
    Notice(Happened),
    /// The daemon found the domain running.
    Adopt,
    /// Nothing for us, or from a libvirt newer than this program.
    Ignored,
}

/// How a domain comes in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Incoming {
    /// From an image on disk.
    Restore,
    /// From another host.
    Migrate,
}

/// A completed step of a domain's life.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Happened {
    /// QEMU is running.
    Started,
    /// QEMU has exited; libvirt has not released its devices yet.
    Stopped,
    /// libvirt has released all devices.
    Released {
        /// libvirt's reason, `-` before 10.5.
        reason: String,
    },
}

/// The fate of a domain if the hook fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnFault {
    /// Let the domain continue as if there were no hook; the journal records the error.
    Open,
    /// Refuse the domain.
    Closed,
}

impl Operation {
    /// The rule, for each operation, in one place. `concerned`: the domain asks for a device of
    /// ours or holds one.
    pub const fn on_fault(&self, concerned: bool) -> OnFault {
        match (self, concerned) {
            (Self::Gate | Self::Filter(_), true) => OnFault::Closed,
            (Self::Gate | Self::Filter(_), false) => OnFault::Open,
            (Self::Notice(_) | Self::Adopt | Self::Ignored, _) => OnFault::Open,
        }
    }

    /// Whether the call may end with another exit status than 0. libvirt ignores that of notices,
    /// kills the guest for that of a reconnect, and removes the saved state for that of a restore
    /// (`qemuDomainObjRestore` in 11.3): these never fail, whatever happens.
    pub const fn may_fail(&self) -> bool {
        matches!(self, Self::Gate | Self::Filter(Incoming::Migrate))
    }

    fn parse(op: &str, extra: &str) -> Self {
        match op {
            "prepare" => Self::Gate,
            "restore" => Self::Filter(Incoming::Restore),
            "migrate" => Self::Filter(Incoming::Migrate),
            "started" => Self::Notice(Happened::Started),
            "stopped" => Self::Notice(Happened::Stopped),
            "release" => Self::Notice(Happened::Released { reason: extra.to_owned() }),
            "reconnect" => Self::Adopt,
            _ => Self::Ignored,
        }
    }
}

/// A parsed call of libvirt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Call {
    /// `--config FILE`.
    pub config: Option<PathBuf>,
    /// The domain's name, as libvirt passes it. The XML decides who it is.
    pub name: String,
    /// The operation's name, for records.
    pub op: String,
    /// Meaning of the operation's name.
    pub operation: Operation,
    /// Program that makes the call.
    pub caller: HookCaller,
}

/// The calling program, which determines how the output is used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HookCaller {
    /// A process of its own, made by libvirtd or a person. libvirt throws away what `prepare`
    /// prints, so that the agent must attach what is claimed.
    Process,
    /// The simulated hypervisor: as libvirtd, but in a process that goes on.
    Simulation,
    /// `virt-usb start`: it starts what is printed.
    Starter,
}

/// The request that the arguments make.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Asked {
    /// Handle a call of libvirt.
    Handle(Call),
    /// Print the usage text.
    Help,
    /// Print the program's version.
    Version,
    /// Refuse the arguments, with the reason.
    Wrong(String),
}

/// Usage text that `--help` prints.
pub const USAGE: &str = "\
usage: virt-usb-hook [--config FILE] NAME OPERATION SUBOPERATION EXTRA < DOMAIN.xml

libvirt calls this program at every step of a domain's life. To try it by hand, use hook-harness.
It is installed in /etc/libvirt/hooks/qemu.d/. Exit status: 0 accepted, 1 refused (the reason is
on stderr), 2 invalid arguments. If the XML was rewritten, it is printed on stdout.
";

/// Parses the arguments after the program's name. Bytes that are not UTF-8 are replaced. Arguments
/// after the fourth are ignored, because a later libvirt may send more.
///
/// libvirt puts the domain's name first, and a domain can have any name, even `--help`. Four
/// arguments are therefore always a call. Only people pass fewer, or `--config FILE` before them.
pub fn parse(arguments: impl Iterator<Item = OsString>) -> Asked {
    let arguments: Vec<String> = arguments.map(|a| a.to_string_lossy().into_owned()).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match words.as_slice() {
        ["--config", file, name, op, _, extra, ..] => handle(Some(file), name, op, extra),
        [option, name, op, _, extra, ..] if option.starts_with("--config=") => {
            handle(option.strip_prefix("--config="), name, op, extra)
        }
        [name, op, _, extra, ..] => handle(None, name, op, extra),
        ["--help"] => Asked::Help,
        ["--version"] => Asked::Version,
        _ => Asked::Wrong(
            "wanted four arguments, NAME OPERATION SUBOPERATION EXTRA, optionally after \
            --config FILE"
                .into(),
        ),
    }
}

fn handle(config: Option<&str>, name: &str, op: &str, extra: &str) -> Asked {
    let operation = Operation::parse(op, extra);
    Asked::Handle(Call {
        config: config.map(Into::into),
        name: name.to_owned(),
        op: op.to_owned(),
        operation,
        caller: HookCaller::Process,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args(words: &[&str]) -> Asked {
        parse(words.iter().map(OsString::from))
    }

    #[test]
    fn libvirts_calls() {
        let Asked::Handle(call) = args(&["g1", "release", "end", "destroyed"]) else { panic!() };
        assert_eq!(
            call.operation,
            Operation::Notice(Happened::Released { reason: "destroyed".into() })
        );
    }

    #[test]
    fn a_domain_may_have_any_name() {
        for name in ["--x", "--help", "--version", "--config", "--config=/nope", "--", "-", ""] {
            for op in ["prepare", "restore", "reconnect", "teleport"] {
                let Asked::Handle(call) = args(&[name, op, "begin", "-"]) else {
                    panic!("{name} {op}")
                };
                assert_eq!((call.name.as_str(), call.op.as_str(), &call.config), (name, op, &None));
            }
            let Asked::Handle(call) = args(&["--config", "/c", name, "prepare", "begin", "-"])
            else {
                panic!("{name}")
            };
            assert_eq!((call.name.as_str(), call.config), (name, Some("/c".into())));
            let Asked::Handle(call) = args(&["--config=/c", name, "prepare", "begin", "-"]) else {
                panic!("{name}")
            };
            assert_eq!((call.name.as_str(), call.config), (name, Some("/c".into())));
        }
    }

    #[test]
    fn operations_of_a_later_libvirt_are_ignored_and_never_closed() {
        let Asked::Handle(call) = args(&["g1", "teleport", "begin", "-", "more"]) else { panic!() };
        assert_eq!(call.operation, Operation::Ignored);
        assert_eq!(call.operation.on_fault(true), OnFault::Open);
    }

    #[test]
    fn what_is_missing_is_said() {
        assert!(matches!(args(&["g1", "prepare"]), Asked::Wrong(_)));
        assert!(matches!(args(&["--config"]), Asked::Wrong(_)));
        assert!(matches!(args(&[]), Asked::Wrong(_)));
        assert_eq!(args(&["--help"]), Asked::Help);
        assert_eq!(args(&["--version"]), Asked::Version);
    }
}
