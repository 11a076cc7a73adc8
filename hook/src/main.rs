//! `virt-usb-hook [--config FILE] NAME OP SUBOP EXTRA`: see the library.

fn main() -> std::process::ExitCode {
    virt_usb_hook::run::main()
}
