"""Devices in use without a claim: a guest's disk or serial port, by a program, or unauthorized."""

import fcntl
import os
from contextlib import contextmanager
from pathlib import Path

from lib.case import case
from lib.gadgets import SEEN
from lib.guests import hostdev, metadata, usb_devices
from lib.shell import expect, refused
from lib.waiting import until

# USBDEVFS_CLAIMINTERFACE of <linux/usbdevice_fs.h>.
CLAIM_INTERFACE = 0x8004550F


def row(w, gadget):
    rows = [d for d in w.product.devices() if d["serial"] == gadget.serial and not d["deleted"]]
    return rows and rows[0]


def withheld(w, gadget, *words):
    """Wait until the device is withheld with these words in the reason."""

    def is_withheld():
        device = row(w, gadget)
        return (
            device
            and device["status_reason"] == "host-use"
            and all(word in (device["host_use"] or "") for word in words)
        )

    until(is_withheld, f"{gadget.serial} to be withheld for {words}: {row(w, gadget)}")


def available(w, gadget):
    until(
        lambda: (device := row(w, gadget)) and device["status"] == "available",
        f"{gadget.serial} to be available",
    )


def asking(w, gadget):
    return w.guest("asking", metadata(usb_devices({"serial": gadget.serial})))


def node(gadget, pattern):
    """The device node below the gadget's folder in sysfs."""
    found = until(lambda: list((SEEN / gadget.port()).glob(pattern)), f"{pattern} of {gadget.name}")
    return f"/dev/{found[0].name}"


@case(
    "a stick in the definition of a stopped guest is reserved for it until the guest is undefined"
)
def definition(w):
    (stick,) = w.drawer.twins(1)
    w.product.agent.start()
    available(w, stick)
    owner = w.guest("owner", devices=hostdev(stick))
    withheld(w, stick, "used by guest owner, which does not run, as hostdev")
    refused(
        w.virsh("start", asking(w, stick).name),
        "unavailable (host-use)",
        "used by guest owner, which does not run",
    )
    w.start(owner)
    w.boots_from(owner, stick)
    w.destroy(owner)
    withheld(w, stick, "used by guest owner, which does not run, as hostdev")
    w.virsh.must("undefine", "owner")
    available(w, stick)
    w.start(asking(w, stick))


@case("a serial adapter that backs a serial port of another guest is withheld")
def serial(w):
    adapter = w.drawer.serial_adapter("ACM0", slot=0)
    w.product.agent.start()
    path = node(adapter, "*:1.0/tty/ttyACM*")
    available(w, adapter)
    owner = w.guest(
        "owner", devices=f"<serial type='dev'><source path='{path}'/><target port='1'/></serial>"
    )
    w.start(owner)
    withheld(w, adapter, "used by guest owner as serial 1")
    refused(w.virsh("start", asking(w, adapter).name), "used by guest owner as serial 1")


@case("a stick that is a disk of another guest is withheld, and that guest keeps its disk")
def disk(w):
    (stick,) = w.drawer.twins(1)
    w.product.agent.start()
    path = node(stick, "*:1.0/host*/target*/*:*/block/sd*")
    available(w, stick)
    source = (
        f"<driver name='qemu' type='raw'/><source dev='{path}'/><target dev='vdb' bus='virtio'/>"
    )
    owner = w.guest("owner", devices=f"<disk type='block' device='disk'>{source}</disk>")
    w.start(owner)
    withheld(w, stick, "used by guest owner as disk vdb")
    refused(w.virsh("start", asking(w, stick).name), "used by guest owner as disk vdb")
    expect(Path(path).exists(), "the disk to stay with the host")
    w.destroy(owner)
    withheld(w, stick, "used by guest owner, which does not run, as disk vdb")
    w.virsh.must("undefine", "owner")
    available(w, stick)
    w.start(asking(w, stick))


@contextmanager
def opened(path):
    descriptor = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_NOCTTY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@case("a scan by root finds an open device node and names the program")
def program(w):
    adapter = w.drawer.serial_adapter("ACM0", slot=0)
    with opened(node(adapter, "*:1.0/tty/ttyACM*")):
        w.product.discover()
        withheld(w, adapter, "open in ", f"({os.getpid()})")
    w.product.discover()
    available(w, adapter)


@case("a device is withheld while a program has claimed an interface through usbfs")
def usbfs(w):
    reporter = w.drawer.reporter("HID0", slot=0)
    # There is no event for such a claim. The next scan finds it.
    w.product.configure(scan_interval=1)
    w.product.agent.start()
    available(w, reporter)
    interface = f"{reporter.port()}:1.0"
    until(lambda: (SEEN / interface / "driver").exists(), "usbhid to have it")
    Path("/sys/bus/usb/drivers/usbhid/unbind").write_text(interface)
    bus, device = reporter.address()
    with opened(f"/dev/bus/usb/{bus:03}/{device:03}") as descriptor:
        fcntl.ioctl(descriptor, CLAIM_INTERFACE, (0).to_bytes(4, "little"))
        withheld(w, reporter, "claimed by a program (usbfs)")
        refused(w.virsh("start", asking(w, reporter).name), "claimed by a program (usbfs)")
    available(w, reporter)


@case("a device that is not authorized is withheld even if a rule names it")
def unauthorized(w):
    (stick,) = w.drawer.twins(1)
    authorized = SEEN / stick.port() / "authorized"
    w.product.configure(
        usb_passthrough_whitelist=[{"vendor": stick.vendor, "product": stick.product}]
    )
    w.product.discover()
    available(w, stick)
    authorized.write_text("0\n")
    w.product.discover()
    withheld(w, stick, "not authorized (authorized = 0)")
    refused(w.virsh("start", asking(w, stick).name), "not authorized (authorized = 0)")
    authorized.write_text("1\n")
    w.product.discover()
    available(w, stick)
