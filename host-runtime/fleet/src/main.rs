//! The program `virt-usb-scheduler`. See the library's module `scheduler`.

use std::process::ExitCode;

fn main() -> ExitCode {
    virt_usb_fleet::scheduler::main()
}
