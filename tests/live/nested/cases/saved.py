"""Saved guests with a stick that was moved meanwhile."""

from lib.case import case
from lib.guests import hostdev, metadata, usb_devices
from lib.shell import done, expect, refused
from lib.waiting import until

from .live import asking, known


def saved(w):
    (stick,) = w.drawer.twins(1)
    w.product.discover()
    guest = w.guest("g", devices=hostdev(stick))
    w.start(guest)
    w.boots_from(guest, stick)
    done(w.virsh("managedsave", guest.name))
    return guest, stick


def kept(w, guest):
    """Check that the saved state still exists and the domain has no trace of the refusal."""
    expect("Managed save:   yes" in done(w.virsh("dominfo", guest.name)).text, "the saved state")
    expect("refusal" not in done(w.virsh("dumpxml", guest.name)).text, "a definition as before")


@case("a saved guest is restored with its stick, which was replugged at another port")
def moved(w):
    guest, stick = saved(w)
    old = stick.address()
    stick.move(3)
    expect(stick.address() != old, "another address")
    w.product.discover()
    w.start(guest)
    expect(
        w.has_live(guest, stick),
        f"the address of now, {stick.address()}: {w.virsh.hostdevs(guest.name)}",
    )
    expect(w.product.claims_of(guest), "a claim")


@case(
    "a saved guest without its stick is refused, and the error says how to remove the saved state"
)
def gone(w):
    (stick,) = w.drawer.twins(1)
    w.product.discover()
    alias = f"ua-usb-{w.product.device(serial=stick.serial)['id']}"
    guest = w.guest(
        "g", metadata(usb_devices({"serial": stick.serial})), hostdev(stick, alias=alias)
    )
    w.start(guest)
    done(w.virsh("managedsave", guest.name))
    stick.unplug()
    w.product.discover()
    refused(w.virsh("start", guest.name), "virt-usb: g ", "virsh managedsave-remove")
    kept(w, guest)
    stick.plug(2)
    w.product.discover()
    w.start(guest)
    expect(w.product.claims_of(guest), "a claim")


@case("a saved guest does not get a stick that another guest claimed meanwhile")
def taken(w):
    guest, stick = saved(w)
    other = w.guest("other", devices=hostdev(stick))
    w.start(other)
    refused(w.virsh("start", guest.name), "and other (", "holds it since")
    kept(w, guest)
    w.destroy(other)
    w.start(guest)


@case("a restored guest with a request boots from its stick")
def with_agent(w):
    (stick,) = w.drawer.twins(1)
    w.product.agent.start()
    until(lambda: known(w, stick), "the agent to find the stick")
    guest = asking(w, "g")
    w.start(guest)
    w.allocated(guest, stick)
    w.boots_from(guest, stick, reset=True)
    done(w.virsh("managedsave", "g"))
    stick.move(3)
    until(lambda: known(w, stick)["port_path"] == stick.port(), "the agent to see where it is now")
    w.start(guest)
    w.allocated(guest, stick)
    # QEMU closes a host device when it loads a state, and does not open it again. The XML still
    # shows the device while the host's driver has it.
    until(
        lambda: stick.driver() != "usb-storage",
        "QEMU to hold the device, not the host's usb-storage",
    )
    w.boots_from(guest, stick, reset=True)
