//! The program `virt-usbd`, the agent. See the library's module `daemon`.

use std::process::ExitCode;

use tracing::Level;
use virt_usb::daemon::{Arguments, Options, run};

fn main() -> ExitCode {
    virt_usb_config::panics::abort();
    let arguments: Arguments = match virt_usb_fleet::log::arguments() {
        Ok(arguments) => arguments,
        Err(code) => return code,
    };
    virt_usb_fleet::log::start(if arguments.verbose { Level::DEBUG } else { Level::INFO });
    virt_usb_fleet::log::finish(run(&Options { config: arguments.config, sim: arguments.sim }))
}
