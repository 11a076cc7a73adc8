//! The program `virt-usb-hook`, which libvirt calls. See the library's module `run`.

fn main() -> std::process::ExitCode {
    virt_usb_hook::run::main()
}
