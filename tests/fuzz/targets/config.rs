//! Any text as the configuration: read, or refused in one line.
#![no_main]

use libfuzzer_sys::fuzz_target;
use virt_usb_config::{Config, Log};

fuzz_target!(|text: &str| {
    match Config::parse(text) {
        Ok(config) => {
            for path in [&config.state_dir, &config.sysfs_root, &config.procfs_root] {
                assert!(path.is_absolute());
            }
            assert!(!matches!(&config.log, Log::File(path) if !path.is_absolute()));
            assert_eq!(Config::parse(text), Ok(config));
        }
        Err(what) => assert!(!what.is_empty() && !what.contains('\n'), "one line: {what:?}"),
    }
});
