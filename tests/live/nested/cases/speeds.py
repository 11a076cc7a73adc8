"""Devices that run at 480 Mb/s on the host, attached to a USB 1.1 controller."""

from lib.case import case
from lib.gadgets import SEEN
from lib.guests import UHCI, metadata, usb_devices
from lib.product import HOOK_LOG
from lib.shell import expect, refused
from lib.waiting import until


def found(w, gadget):
    """Start the agent and wait until the gadget is available."""
    w.product.agent.start()
    rows = lambda: [
        d
        for d in w.product.devices()
        if d["serial"] == gadget.serial and d["status"] == "available"
    ]
    until(rows, f"the agent to find {gadget.serial}")


def asking(w, gadget, **more):
    return w.guest("g", metadata(usb_devices({"serial": gadget.serial})), usb=UHCI, **more)


def seen_by_qemu(w, guest):
    """QEMU's list of the guest's USB devices with their speeds."""
    return w.virsh.must("qemu-monitor-command", guest.name, "--hmp", "info usb")


def runs_at_high_speed(gadget):
    expect((SEEN / gadget.port() / "speed").read_text().strip() == "480", "a device at 480 Mb/s")


@case("a guest with piix3-uhci gets a serial adapter at 480 Mb/s")
def adapter_on_uhci(w):
    adapter = w.drawer.serial_adapter("ACM0", slot=0)
    runs_at_high_speed(adapter)
    found(w, adapter)
    guest = asking(w, adapter)
    w.start(guest)
    w.allocated(guest, adapter)
    until(lambda: "Speed 12 Mb/s" in seen_by_qemu(w, guest), "QEMU to have it at 12 Mb/s")


@case("a guest with piix3-uhci boots from a stick at 480 Mb/s that the agent attached")
def stick_on_uhci(w):
    (stick,) = w.drawer.twins(1)
    runs_at_high_speed(stick)
    found(w, stick)
    guest = asking(w, stick)
    w.start(guest)
    w.allocated(guest, stick)
    w.boots_from(guest, stick, reset=True)
    expect(
        "is a disk that runs at high speed" in HOOK_LOG.read_text(),
        "the hook's record to warn that it is slow",
    )


@case("virt-usb start: a guest with piix3-uhci boots from a stick at 480 Mb/s")
def stick_on_uhci_from_power_on(w):
    (stick,) = w.drawer.twins(1)
    found(w, stick)
    guest = asking(w, stick)
    w.product.must("start", guest.name)
    w.boots_from(guest, stick)
    w.allocated(guest, stick)


@case(
    "a device with interrupt packets of 128 bytes is refused with piix3-uhci and runs at qemu-xhci"
)
def not_slowed_down(w):
    reporter = w.drawer.reporter("HID0", slot=0)
    runs_at_high_speed(reporter)
    found(w, reporter)
    alone = asking(w, reporter)
    refused(
        w.virsh("start", alone.name),
        "1 USB port for high-speed devices is needed, 0 are free",
        "replace its USB controller with",
    )
    both = (
        UHCI.replace("/>", " index='0'/>")
        + "<controller type='usb' model='qemu-xhci' index='1' ports='15'/>"
    )
    guest = w.guest("both", metadata(usb_devices({"serial": reporter.serial})), usb=both)
    w.start(guest)
    w.allocated(guest, reporter)
    until(lambda: "Speed 480 Mb/s" in seen_by_qemu(w, guest), "QEMU to have it at 480 Mb/s")
