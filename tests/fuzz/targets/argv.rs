//! Any bytes as the hook's arguments, separated by NUL: no panic, and a parsed call follows the
//! rules.
#![no_main]

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;

use libfuzzer_sys::fuzz_target;
use virt_usb_hook::call::{Invocation, OnError, Operation, parse};

const KNOWN: [&str; 7] =
    ["prepare", "restore", "migrate", "started", "stopped", "release", "reconnect"];

fuzz_target!(|bytes: &[u8]| {
    let arguments: Vec<OsString> =
        bytes.split(|b| *b == 0).map(|a| OsString::from_vec(a.to_vec())).collect();
    match parse(arguments.iter().cloned()) {
        Invocation::Handle(call) => {
            assert!(arguments.len() >= 4);
            assert_eq!(
                call.operation != Operation::Ignored,
                KNOWN.contains(&call.op.as_str()),
                "{call:?}"
            );
            assert_eq!(
                call.operation.on_error(false),
                OnError::Open,
                "a domain without a request is not refused"
            );
            let can_refuse = matches!(call.operation, Operation::Gate | Operation::Filter(_));
            assert_eq!(call.operation.on_error(true) == OnError::Closed, can_refuse, "{call:?}");
            let texts: Vec<_> = arguments.iter().map(|a| a.to_string_lossy()).collect();
            assert!(texts.contains(&call.name.as_str().into()));
            assert!(texts.contains(&call.op.as_str().into()));
        }
        Invocation::Invalid(why) => assert!(!why.is_empty()),
        Invocation::Help | Invocation::Version => assert!(bytes.windows(2).any(|w| w == b"--")),
    }
});
