//! `virt-usb`: the operator's command line. See the library.

fn main() -> std::process::ExitCode {
    virt_usb::cli::main()
}
