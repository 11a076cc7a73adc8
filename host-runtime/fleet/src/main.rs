//! `virt-usb-scheduler`: see the library's `scheduler`.

use std::process::ExitCode;

fn main() -> ExitCode {
    virt_usb_fleet::scheduler::main()
}
