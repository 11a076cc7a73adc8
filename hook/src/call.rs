//! Parses a call of libvirt (<https://libvirt.org/hooks.html>) into an operation and its caller.
//!
//! | operation | action | on an error of the hook |
//! |---|---|---|
//! | `prepare` | claim, rewrite; the exit status is the veto | refuse if it needs virt-usb |
//! | `restore`, `migrate` | claim, rewrite; libvirt uses the printed XML | as `prepare` |
//! | `started`, `stopped`, `release` | confirm or release claims | continue |
//! | `reconnect` | adopt | continue; otherwise libvirt kills the guest |
//! | any other operation | none | continue |
//!
//! A domain needs virt-usb if it requests a device. For `restore` it must have a hostdev of
//! virt-usb, and for `migrate` any USB hostdev. A restore always exits 0, and the `prepare` that
//! follows refuses.

use std::ffi::OsString;
use std::path::PathBuf;

/// The operation that libvirt asks the hook to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Operation {
    /// A domain is about to start. The hook may refuse it.
    Gate,
    /// A domain with a saved state arrives. The hook may replace its XML or refuse it.
    Filter(Incoming),
    /// A step is completed. The hook cannot refuse anything.
    Notice(Happened),
    /// libvirtd was restarted, and has found the domain running.
    Adopt,
    /// An operation without meaning for virt-usb, or one of a newer libvirt.
    Ignored,
}

/// Origin of a domain that arrives with a saved state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Incoming {
    /// The domain is restored from an image on disk.
    Restore,
    /// The domain migrates from another host.
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

/// Effect of an error of the hook on the domain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnError {
    /// Let the domain continue as if there were no hook; the journal records the error.
    Open,
    /// Refuse the domain.
    Closed,
}

impl Operation {
    /// Returns what an error of the hook means for the domain. This is the only place with that
    /// rule. `concerned`: the domain requests or holds a device of virt-usb.
    pub const fn on_error(&self, concerned: bool) -> OnError {
        match (self, concerned) {
            (Self::Gate | Self::Filter(_), true) => OnError::Closed,
            (Self::Gate | Self::Filter(_), false) => OnError::Open,
            (Self::Notice(_) | Self::Adopt | Self::Ignored, _) => OnError::Open,
        }
    }

    /// Whether the call may have an exit status other than 0. For notices, libvirt ignores it. For
    /// a reconnect, it kills the guest. For a restore, it removes the saved state
    /// (`qemuDomainObjRestore` in 11.3).
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
    /// Path of the configuration (`--config FILE`).
    pub config: Option<PathBuf>,
    /// Name of the domain as libvirt passes it. The UUID in the XML identifies the domain.
    pub name: String,
    /// Name of the operation, for records.
    pub op: String,
    /// The parsed operation.
    pub operation: Operation,
    /// Program that makes the call.
    pub caller: HookCaller,
}

/// The calling program, which determines how the output is used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HookCaller {
    /// libvirtd or a person, in a process of its own. libvirt ignores the output of `prepare`, so
    /// the agent must attach the claimed devices.
    Process,
    /// The simulated hypervisor, like libvirtd, but within the caller's process.
    Simulation,
    /// `virt-usb start`, which starts the printed XML.
    Starter,
}

/// The parsed arguments.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Invocation {
    /// Handle a call of libvirt.
    Handle(Call),
    /// Print the usage text.
    Help,
    /// Print the program's version.
    Version,
    /// Refuse the arguments, with this reason.
    Invalid(String),
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
pub fn parse(arguments: impl Iterator<Item = OsString>) -> Invocation {
    let arguments: Vec<String> = arguments.map(|a| a.to_string_lossy().into_owned()).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match words.as_slice() {
        ["--config", file, name, op, _, extra, ..] => handle(Some(file), name, op, extra),
        [option, name, op, _, extra, ..] if option.starts_with("--config=") => {
            handle(option.strip_prefix("--config="), name, op, extra)
        }
        [name, op, _, extra, ..] => handle(None, name, op, extra),
        ["--help"] => Invocation::Help,
        ["--version"] => Invocation::Version,
        _ => Invocation::Invalid(
            "wanted four arguments, NAME OPERATION SUBOPERATION EXTRA, optionally after \
            --config FILE"
                .into(),
        ),
    }
}

fn handle(config: Option<&str>, name: &str, op: &str, extra: &str) -> Invocation {
    let operation = Operation::parse(op, extra);
    Invocation::Handle(Call {
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

    fn args(words: &[&str]) -> Invocation {
        parse(words.iter().map(OsString::from))
    }

    #[test]
    fn libvirts_calls() {
        let Invocation::Handle(call) = args(&["g1", "release", "end", "destroyed"]) else {
            panic!()
        };
        assert_eq!(
            call.operation,
            Operation::Notice(Happened::Released { reason: "destroyed".into() })
        );
    }

    #[test]
    fn a_domain_may_have_any_name() {
        for name in ["--x", "--help", "--version", "--config", "--config=/nope", "--", "-", ""] {
            for op in ["prepare", "restore", "reconnect", "teleport"] {
                let Invocation::Handle(call) = args(&[name, op, "begin", "-"]) else {
                    panic!("{name} {op}")
                };
                assert_eq!((call.name.as_str(), call.op.as_str(), &call.config), (name, op, &None));
            }
            let Invocation::Handle(call) = args(&["--config", "/c", name, "prepare", "begin", "-"])
            else {
                panic!("{name}")
            };
            assert_eq!((call.name.as_str(), call.config), (name, Some("/c".into())));
            let Invocation::Handle(call) = args(&["--config=/c", name, "prepare", "begin", "-"])
            else {
                panic!("{name}")
            };
            assert_eq!((call.name.as_str(), call.config), (name, Some("/c".into())));
        }
    }

    #[test]
    fn operations_of_a_later_libvirt_are_ignored_and_never_closed() {
        let Invocation::Handle(call) = args(&["g1", "teleport", "begin", "-", "more"]) else {
            panic!()
        };
        assert_eq!(call.operation, Operation::Ignored);
        assert_eq!(call.operation.on_error(true), OnError::Open);
    }

    #[test]
    fn missing_arguments_are_refused() {
        assert!(matches!(args(&["g1", "prepare"]), Invocation::Invalid(_)));
        assert!(matches!(args(&["--config"]), Invocation::Invalid(_)));
        assert!(matches!(args(&[]), Invocation::Invalid(_)));
        assert_eq!(args(&["--help"]), Invocation::Help);
        assert_eq!(args(&["--version"]), Invocation::Version);
    }
}
