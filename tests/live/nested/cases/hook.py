"""The hook without the agent, with real devices: what it refuses and when it releases devices."""

from lib.case import case
from lib.daemons import kill_qemu
from lib.guests import NO_USB, UHCI, XHCI, hostdev, metadata, nova, usb_devices
from lib.shell import expect, refused
from lib.waiting import until

KEY = {"vendor_id": "0951", "product_id": "1666"}


def asks(w, name, *requests, **more):
    return w.guest(name, metadata(usb_devices(*(requests or (KEY,)))), **more)


@case("virsh start is refused with the name of the holder until a device is free")
def none_free(w):
    w.drawer.twins(2)
    w.product.discover()
    first, second, third = (asks(w, name) for name in ("first", "second", "third"))
    w.start(first)
    w.start(second)
    held = {c["device_id"] for c in w.product.claims()}
    expect(len(held) == 2, f"two devices to be claimed: {w.product.claims()}")
    refused(
        w.virsh("start", third.name),
        "virt-usb: third asks for usb_devices[0]",
        "of 2 that match",
        "is held by first",
        "is held by second",
    )
    w.destroy(first)
    w.start(third)
    expect(
        len(w.product.claims_of(third)) == 1,
        "the third guest to have the device that the first released",
    )


@case("virsh start is refused if no matching device is plugged in")
def nothing_there(w):
    w.product.discover()
    refused(
        w.virsh("start", asks(w, "g").name),
        "virt-usb: g asks for usb_devices[0]",
        "this host has no such device",
    )


@case("a device that was unplugged after the last scan is not claimed")
def not_where_it_was(w):
    (stick,) = w.drawer.twins(1)
    w.product.discover()
    stick.unplug()
    refused(w.virsh("start", asks(w, "g").name), "is not where it was", "virt-usb discover")


@case("a Nova guest without a USB bus is refused, and the error names the image property to set")
def no_usb_bus(w):
    w.drawer.twins(1)
    w.product.discover()
    guest = w.guest(
        "g", nova({"usb:devices": '[{"vendor_id":"0951","product_id":"1666"}]'}), usb=NO_USB
    )
    refused(w.virsh("start", guest.name), "has no USB bus", "hw:usb_model=qemu-xhci")
    expect(not w.product.claims(), "nothing to be held")


@case("a guest without a free USB port is refused, and the error says what to change")
def no_free_port(w):
    w.drawer.twins(1)
    w.product.discover()
    full = asks(w, "full", usb=XHCI.replace("15", "1"), devices="<input type='tablet' bus='usb'/>")
    refused(w.virsh("start", full.name), "1 USB port is needed, 0 are free", "ports='15'")
    tablets = "<input type='tablet' bus='usb'/>" * 2
    slow = asks(w, "slow", usb=UHCI, devices=tablets)
    refused(w.virsh("start", slow.name), "1 USB port is needed, 0 are free", "qemu-xhci")
    expect(not w.product.claims(), "nothing to be held")


@case("hubs cannot be claimed, but devices behind a hub can")
def hub(w):
    w.product.discover()
    behind = w.product.device(vendor_id="0403")
    expect(behind["port_path"].count(".") == 1, f"a port behind a hub: {behind}")
    hubs = [d for d in w.product.devices() if d["class"] == "09"]
    expect(all(d["status"] != "available" for d in hubs), f"no hub to be offered: {hubs}")
    by_class = asks(w, "byclass", {"class": "09"})
    refused(w.virsh("start", by_class.name), "virt-usb: byclass")
    by_hand = w.guest("byhand", devices=hub_hostdev(behind["port_path"]))
    refused(w.virsh("start", by_hand.name), "virt-usb: byhand", "hub")


def hub_hostdev(port):
    from lib.gadgets import SEEN

    at = SEEN / port.rsplit(".", 1)[0]
    read = lambda name: (at / name).read_text().strip()
    return (
        f"<hostdev mode='subsystem' type='usb'><source>"
        f"<vendor id='0x{read('idVendor')}'/><product id='0x{read('idProduct')}'/>"
        f"<address bus='{read('busnum')}' device='{read('devnum')}'/></source></hostdev>"
    )


def released(w, guest):
    until(lambda: not w.product.claims_of(guest), f"{guest.name}'s claims to be gone")


@case("a guest with Nova's extra specs gets a claim, which ends on destroy")
def release_on_destroy(w):
    (stick,) = w.drawer.twins(1)
    w.product.discover()
    guest = w.guest("g", nova({"usb:devices": '[{"vendor_id":"0951","product_id":"1666"}]'}))
    w.start(guest)
    expect(w.product.claims_of(guest), "a claim while it runs")
    w.destroy(guest)
    released(w, guest)
    expect(w.product.device(serial=stick.serial)["status"] == "available", "it to be available")


@case("a device is released when QEMU is killed, and the next guest can use it")
def release_on_crash(w):
    (stick,) = w.drawer.twins(1)
    w.product.discover()
    guest = w.guest("g", devices=hostdev(stick))
    w.start(guest)
    w.boots_from(guest, stick)
    kill_qemu(guest.name)
    w.gone(guest)
    released(w, guest)
    heir = w.guest("heir", devices=hostdev(stick))
    w.start(heir)
    w.boots_from(heir, stick)


@case("a device is released when QEMU does not start")
def release_on_failed_start(w):
    w.drawer.twins(1)
    w.product.discover()
    guest = asks(
        w,
        "g",
        devices="</devices><qemu:commandline><qemu:arg value='-no-such-option'/>"
        "</qemu:commandline><devices>",
    )
    refused(w.virsh("start", guest.name), "no-such-option")
    expect("prepare" in w.product.operations(guest.name), "the hook to have been called")
    released(w, guest)
