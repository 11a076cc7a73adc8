"""The agent and the command line attach devices to running guests."""

import json

from lib.case import case
from lib.guests import XHCI, hostdev, metadata, usb_devices
from lib.shell import done, expect, refused
from lib.waiting import stays, until

KEY = {"vendor_id": "0951", "product_id": "1666"}


def asking(w, name, *requests, **more):
    return w.guest(name, metadata(usb_devices(*(requests or (KEY,)))), **more)


@case(
    "virsh start of a guest with a request: the agent attaches the device and keeps the definition"
)
def attach_after_start(w):
    (stick,) = w.drawer.twins(1)
    w.product.agent.start()
    row = until(lambda: known(w, stick), "the agent to find the stick")
    guest = asking(w, "g")
    before = w.virsh.xml("g", inactive=True)
    w.start(guest)
    w.allocated(guest, stick)
    (hostdev,) = w.virsh.hostdevs("g")
    expect(hostdev.alias == f"ua-usb-{row['id']}", f"our alias: {hostdev}")
    expect(
        (hostdev.vendor, hostdev.product) == ("0951", "1666"),
        f"vendor and product beside the address: {hostdev}",
    )
    expect(w.virsh.xml("g", inactive=True) == before, "the definition to stay as it was")
    w.boots_from(guest, stick, reset=True)
    w.destroy(guest)
    until(
        lambda: w.product.device(serial=stick.serial)["status"] == "available",
        "it to be available again",
    )


class Row(dict):
    """A device as the inventory lists it. While it is not listed: false, and without fields."""

    def __missing__(self, field):
        return None


def known(w, stick):
    rows = (d for d in w.product.devices() if d["serial"] == stick.serial and not d["deleted"])
    return Row(next(rows, {}))


@case("two guests with the same request get one stick each, and the third is refused")
def three_want_two(w):
    sticks = w.drawer.twins(2)
    w.product.agent.start()
    until(lambda: all(known(w, s) for s in sticks), "the agent to find the sticks")
    guests = [asking(w, f"g{n}") for n in range(2)]
    for guest in guests:
        w.start(guest)
    owner = lambda guest: [s for s in sticks if w.holds(guest, s) and w.has_live(guest, s)]
    until(lambda: all(owner(g) for g in guests), "each to have one")
    expect(owner(guests[0]) != owner(guests[1]), "two different ones")
    refused(
        w.virsh("start", asking(w, "g2").name),
        "virt-usb: g2 asks for usb_devices[0]",
        "is held by g0",
    )


@case("virt-usb start: the guest has the device from power-on, and the definition is unchanged")
def cold_plug(w):
    (stick,) = w.drawer.twins(1)
    w.product.agent.start()
    until(lambda: known(w, stick), "the agent to find the stick")
    guest = asking(w, "g")
    before = w.virsh.xml("g", inactive=True)
    w.product.must("start", "g")
    expect(w.has_live(guest, stick), "the device in the live XML")
    w.boots_from(guest, stick)
    w.allocated(guest, stick)
    expect(w.virsh.xml("g", inactive=True) == before, "the definition to stay as it was")
    expect(len(w.virsh.hostdevs("g")) == 1, "no second hostdev from the agent")
    w.destroy(guest)
    expect(
        w.virsh.xml("g", inactive=True) == before,
        "the definition to stay as it was after the guest's end",
    )


@case("virt-usb start says who holds the device, and leaves no claim")
def cold_plug_refused(w):
    (stick,) = w.drawer.twins(1)
    w.product.agent.start()
    until(lambda: known(w, stick), "the agent to find the stick")
    first, second = asking(w, "first"), asking(w, "second")
    w.product.must("start", "first")
    refused(w.product("start", "second"), "is held by first")
    expect(w.virsh.running() == ["first"], "the second not to run")
    expect(not w.product.claims_of(second), "nothing to be held for it")
    w.boots_from(first, stick)


@case("virt-usb attach and detach on a running guest")
def command_line_live(w):
    one, other = w.drawer.twins(2)
    w.product.agent.start()
    until(lambda: known(w, one) and known(w, other), "the agent to find the sticks")
    guest, rival = w.guest("g"), w.guest("rival")
    w.start(guest)
    w.start(rival)
    w.product.must("attach", "g", '{"serial":"SN1"}')
    w.allocated(guest, other)
    device = str(known(w, other)["id"])
    refused(w.product("attach", "rival", device), "g")
    w.boots_from(guest, other, reset=True)
    w.product.must("attach", rival.uuid, "0951:1666")
    w.allocated(rival, one)
    w.product.must("detach", guest.uuid, device)
    expect(not w.has_live(guest, other), "it to be out of the guest")
    until(lambda: known(w, other)["status"] == "available", "it to be available")
    w.product.must("attach", "rival", device)
    w.allocated(rival, other)


@case("virt-usb attach and detach on a stopped guest take effect at its next start")
def command_line_stopped(w):
    (stick,) = w.drawer.twins(1)
    w.product.agent.start()
    until(lambda: known(w, stick), "the agent to find the stick")
    guest = w.guest("g")
    w.product.must("attach", "g", "0951:1666")
    w.start(guest)
    w.allocated(guest, stick)
    w.destroy(guest)
    w.product.must("detach", "g", "0951:1666")
    w.start(guest)
    stays(
        lambda: not w.virsh.hostdevs("g") and not w.product.claims_of(guest),
        "the guest has nothing",
        seconds=4,
    )


@case("a device that was attached with virsh attach-device is adopted")
def adopted(w):
    (stick,) = w.drawer.twins(1)
    w.product.agent.start()
    until(lambda: known(w, stick), "the agent to find the stick")
    guest = w.guest("g")
    w.start(guest)
    done(w.virsh.attach("g", hostdev(stick)))
    w.allocated(guest, stick)
    refused(w.virsh("start", asking(w, "other").name), "is held by g")
    done(w.virsh.detach("g", hostdev(stick)))
    until(
        lambda: not w.product.claims_of(guest),
        "the claim to end when it is detached by hand",
        seconds=40,
    )


@case("virt-usb attach fails if a running guest has no free USB port, and leaves no claim")
def no_free_port(w):
    (stick,) = w.drawer.twins(1)
    w.product.agent.start()
    until(lambda: known(w, stick), "the agent to find the stick")
    guest = w.guest("g", usb=XHCI.replace("15", "1"), devices="<input type='tablet' bus='usb'/>")
    w.start(guest)
    refused(w.virsh.attach("g", hostdev(stick)), "No free USB ports")
    refused(w.product("attach", "g", "0951:1666"), "USB port")
    expect(not w.product.claims_of(guest), "nothing to be held")
    expect(known(w, stick)["status"] == "available", "it to be available")


@case(
    "a device in QEMU that libvirtd does not know, because it was killed, is removed and reattached"
)
def unknown_to_libvirt(w):
    (stick,) = w.drawer.twins(1)
    w.product.agent.start()
    row = until(lambda: known(w, stick), "the agent to find the stick")
    guest = w.guest("g")
    w.start(guest)
    add = {"driver": "usb-host", "id": f"ua-usb-{row['id']}", "vendorid": 0xDEAD, "productid": 1}
    answer = done(
        w.virsh(
            "qemu-monitor-command", "g", json.dumps({"execute": "device_add", "arguments": add})
        )
    )
    expect("error" not in answer.text, f"QEMU to take it: {answer}")
    refused(w.virsh.attach("g", hostdev(stick, alias=add["id"])), "Duplicate")
    w.product.must("attach", "g", str(row["id"]))
    w.allocated(guest, stick)
    w.boots_from(guest, stick, reset=True)


@case("if the agent is installed but does not run, a guest with a request is refused")
def agent_dead(w):
    w.drawer.twins(1)
    w.product.agent.start()
    w.product.discover()
    w.product.agent.kill()
    guest = asking(w, "g")
    refused(w.virsh("start", "g"), "virt-usb: g ", "agent")
    expect(not w.product.claims_of(guest), "nothing to be held")
    plain = w.guest("plain")
    w.start(plain)
