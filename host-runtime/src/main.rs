//! The program `virt-usb`, the operator's command line. See the library's module `cli`.

fn main() -> std::process::ExitCode {
    virt_usb::cli::main()
}
