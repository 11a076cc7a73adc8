//! Writes simulated devices as a sysfs tree, with only those files that discovery and the hook
//! read.

use std::fs;
use std::io;
use std::os::unix::fs::symlink;
use std::path::Path;

use virt_usb_model::{Class, Device, DevicePath, Speed};

use super::Entry;
use crate::discovery::sysfs::CONTROLLERS;

/// File beside `devices` that marks a tree written by a simulation, which may be replaced.
const MARK: &str = "simulated-by-virt-usb";

/// Whether a simulation wrote the tree.
pub(super) fn is_simulated(root: &Path) -> bool {
    root.join("bus/usb").join(MARK).exists()
}

/// Builds the tree in another directory, and then renames it. A concurrent hook sees the old or the
/// new tree, except for a moment between two renames in which it sees no device.
pub(super) fn write(root: &Path, entries: &[Entry]) -> io::Result<()> {
    let usb = root.join("bus/usb");
    let (devices, fresh, old) =
        (usb.join("devices"), usb.join("devices.new"), usb.join("devices.old"));
    fs::create_dir_all(&usb)?;
    if !usb.join(MARK).exists() {
        if devices.exists() {
            let what = format!(
                "{} was not written by a simulation, and is not replaced",
                devices.display()
            );
            return Err(io::Error::new(io::ErrorKind::AlreadyExists, what));
        }
        fs::write(usb.join(MARK), "")?;
    }
    remove(&fresh)?;
    fs::create_dir(&fresh)?;
    for entry in entries {
        write_device(&fresh.join(entry.device.key.port.to_string()), entry)?;
        if let Some(path) = &entry.device.key.path {
            write_root_hub(&fresh, entry.device.key.port.bus(), path)?;
        }
    }
    remove(&old)?;
    if devices.exists() {
        fs::rename(&devices, &old)?;
    }
    fs::rename(&fresh, &devices)?;
    remove(&old)
}

fn remove(dir: &Path) -> io::Result<()> {
    match fs::remove_dir_all(dir) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        done => done,
    }
}

/// Writes the root hub of a bus as a link to its directory below its controller. That directory is
/// within `devices`, so that the whole tree is replaced at once.
fn write_root_hub(devices: &Path, bus: u8, path: &DevicePath) -> io::Result<()> {
    let link = devices.join(format!("usb{bus}"));
    if link.is_symlink() {
        return Ok(());
    }
    // The reverse of `controller` in sysfs.rs of the crate config.
    let (function, platform) = match path.controller().split_once("-platform-") {
        Some((function, platform)) => (Some(function), Some(platform)),
        None => match path.controller().strip_prefix("platform-") {
            Some(platform) => (None, Some(platform)),
            None => (Some(path.controller()), None),
        },
    };
    let function = function.map(|name| format!("pci0000:00/{}", name.trim_start_matches("pci-")));
    let platform = platform.map(|name| format!("platform/{name}"));
    let folder: Vec<String> = function.into_iter().chain(platform).collect();
    let hub =
        Path::new(CONTROLLERS).join("devices").join(folder.join("/")).join(format!("usb{bus}"));
    fs::create_dir_all(devices.join(&hub))?;
    fs::write(devices.join(&hub).join("version"), format!(" {}.00\n", path.version()))?;
    symlink(hub, link)
}

fn write_device(dir: &Path, Entry { device, ties, unreadable }: &Entry) -> io::Result<()> {
    fs::create_dir(dir)?;
    let put = |name: &str, value: &str| fs::write(dir.join(name), format!("{value}\n"));
    let put_some = |name: &str, value: Option<&str>| value.map_or(Ok(()), |value| put(name, value));
    match unreadable {
        // A directory instead of a file cannot be read by any user, including root.
        true => fs::create_dir(dir.join("idVendor"))?,
        false => put("idVendor", &device.key.usb.vendor.to_string())?,
    }
    put("idProduct", &device.key.usb.product.to_string())?;
    put("busnum", &device.address.bus().to_string())?;
    put("devnum", &device.address.device().to_string())?;
    put("bDeviceClass", &device.class.to_string())?;
    put("bConfigurationValue", "1")?;
    put("authorized", if ties.unauthorized { "0" } else { "1" })?;
    put_some("speed", device.speed.map(megabits))?;
    put_some("serial", device.key.serial.text())?;
    put_some("manufacturer", device.manufacturer.as_deref())?;
    put_some("product", device.product.as_deref())?;
    if let Some(descriptors) = &device.descriptors {
        fs::write(dir.join("descriptors"), descriptors.bytes())?;
    }
    write_interfaces(dir, device)
}

/// Writes a directory for each interface. If there are more drivers than interfaces, adds
/// interfaces with the class of the last one.
fn write_interfaces(dir: &Path, device: &Device) -> io::Result<()> {
    let drivers: Vec<&str> = device.driver.iter().flat_map(|drivers| drivers.split(',')).collect();
    let last = device.interfaces.last().copied().unwrap_or(Class::new(0xff));
    for n in 0..device.interfaces.len().max(drivers.len()) {
        let interface = dir.join(format!("{}:1.{n}", device.key.port));
        let class = device.interfaces.get(n).copied().unwrap_or(last);
        fs::create_dir(&interface)?;
        fs::write(interface.join("bInterfaceClass"), format!("{class}\n"))?;
        fs::write(interface.join("bInterfaceNumber"), format!("{n:02x}\n"))?;
        if let Some(driver) = drivers.get(n) {
            symlink(Path::new("../../../drivers").join(driver), interface.join("driver"))?;
        }
    }
    Ok(())
}

/// Speed in the kernel's notation (`speed_show` in drivers/usb/core/sysfs.c).
const fn megabits(speed: Speed) -> &'static str {
    match speed {
        Speed::Low => "1.5",
        Speed::Full => "12",
        Speed::High => "480",
        Speed::Super => "5000",
        Speed::SuperPlus => "10000",
    }
}
