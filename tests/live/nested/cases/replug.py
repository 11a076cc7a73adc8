"""Sticks that are unplugged and plugged in again while a guest has them."""

from lib.case import case
from lib.gadgets import renew
from lib.shell import expect
from lib.waiting import stays, until

from .live import asking, known


def running(w, *requests, count=1):
    """Running guests with their sticks: [(guest, stick)]."""
    sticks = w.drawer.twins(count)
    w.product.agent.start()
    until(lambda: all(known(w, s) for s in sticks), "the agent to find the sticks")
    pairs = [(asking(w, f"g{n}", {"serial": s.serial}), s) for n, s in enumerate(sticks)]
    for guest, stick in pairs:
        w.start(guest)
    for guest, stick in pairs:
        w.allocated(guest, stick)
    return pairs


def is_waited_for(w, guest, stick):
    """Whether the stick is unplugged, out of the guest, and still claimed."""
    return (
        known(w, stick)["status"] == "removed"
        and not w.virsh.hostdevs(guest.name)
        and w.product.claims_of(guest)
    )


@case("a stick that is replugged at another bus is reattached, with its id and a new address")
def elsewhere(w):
    ((guest, stick),) = running(w)
    before, address = known(w, stick), stick.address()
    stick.unplug()
    until(
        lambda: is_waited_for(w, guest, stick),
        "the stale hostdev to be gone and the claim to be kept",
    )
    stick.plug(3)
    w.allocated(guest, stick)
    expect(known(w, stick)["id"] == before["id"], "the same id")
    expect(
        stick.address() != address and known(w, stick)["port_path"] == stick.port(),
        "the new address and port",
    )
    w.boots_from(guest, stick, reset=True)


@case("a stick that is replugged at once into the same port is reattached")
def at_once(w):
    ((guest, stick),) = running(w)
    for _ in range(2):
        stick.move(stick.slot)
        w.allocated(guest, stick)
    w.boots_from(guest, stick, reset=True)


@case("another device in the same port is not attached")
def stranger(w):
    ((guest, stick),) = running(w)
    slot = stick.slot
    stick.unplug()
    until(lambda: is_waited_for(w, guest, stick), "the claim to be kept")
    like = w.drawer.stick("like", serial="OTHER", slot=slot)
    until(lambda: known(w, like), "the stranger to be found")
    stays(lambda: not w.virsh.hostdevs(guest.name), "the guest has nothing", seconds=4)
    expect(
        known(w, like)["id"] != known(w, stick)["id"] and known(w, like)["status"] == "available",
        "a device of its own",
    )
    stick.plug(4)
    w.allocated(guest, stick)


@case("two sticks of one product swap their ports: each guest gets its own again")
def change_places(w):
    pairs = running(w, count=2)
    (_, one), (_, other) = pairs
    slots = one.slot, other.slot
    one.unplug()
    other.unplug()
    one.plug(slots[1])
    other.plug(slots[0])
    for guest, stick in pairs:
        w.allocated(guest, stick)
    for guest, stick in pairs:
        w.boots_from(guest, stick, reset=True)


@case("two sticks of one product swap their addresses while the agent is down")
def swap_numbers(w):
    pairs = running(w, count=2)
    (_, one), (_, other) = pairs
    for stick in (one, other):
        stick.unplug()
    renew(0, 1)
    one.plug(0)
    other.plug(1)
    for guest, stick in pairs:
        w.allocated(guest, stick)
    addresses = one.address(), other.address()
    w.product.agent.kill()
    for stick in (one, other):
        stick.unplug()
    renew(0, 1)
    one.plug(1)
    other.plug(0)
    expect(
        (other.address(), one.address()) == addresses,
        f"the numbers to be swapped: {addresses}, {one.address()}, {other.address()}",
    )
    w.product.agent.start()
    for guest, stick in pairs:
        w.allocated(guest, stick, seconds=40)
    for guest, stick in pairs:
        w.boots_from(guest, stick, reset=True)


@case("ports distinguish two sticks without a serial")
def no_serials(w):
    one, other = (w.drawer.stick(f"plain{n}", slot=n) for n in range(2))
    w.product.agent.start()
    row = lambda stick: next(
        (d for d in w.product.devices() if d["port_path"] == stick.port() and not d["deleted"]),
        None,
    )
    until(lambda: row(one) and row(other), "the agent to find the sticks")
    guests = [asking(w, f"g{n}", {"port": s.port()}) for n, s in enumerate((one, other))]
    for guest in guests:
        w.start(guest)
    both = list(zip(guests, (one, other)))
    until(lambda: all(w.has_live(g, s) for g, s in both), "each to have its own")
    port = one.port()
    one.move(0)
    expect(one.port() == port, "the same port")
    until(lambda: all(w.has_live(g, s) for g, s in both), "each to have its own again")
    ids = {c["device_id"] for g in guests for c in w.product.claims_of(g)}
    expect(ids == {row(one)["id"], row(other)["id"]}, "the same devices")


@case(
    "two buses swap their numbers, as at a reboot: each guest gets its own stick without a serial"
)
def swapped_buses(w):
    sticks = [w.drawer.stick(f"plain{n}", slot=n) for n in range(2)]
    w.product.agent.start()
    row = lambda stick: next(
        (d for d in w.product.devices() if d["port_path"] == stick.port() and not d["deleted"]),
        None,
    )
    until(lambda: all(row(s) for s in sticks), "the agent to find the sticks")
    ids = [row(s)["id"] for s in sticks]
    guests = [asking(w, f"g{n}", {"id": i}) for n, i in enumerate(ids)]
    for guest, stick in zip(guests, sticks):
        w.start(guest)
        until(lambda: w.has_live(guest, stick), "the guest to have its stick")
    ports = [s.port() for s in sticks]
    for guest in guests:
        w.destroy(guest)
    w.product.agent.kill()
    for stick in sticks:
        stick.unplug()
    renew(0, 1, found=(1, 0))
    for slot, stick in enumerate(sticks):
        stick.plug(slot)
    expect(
        [s.port() for s in sticks] == ports[::-1], f"the buses to have each other's number: {ports}"
    )
    # A start before the agent's scan finds the old numbers in the inventory.
    w.product.agent.start()
    for guest in guests:
        w.start(guest)
    for guest, stick, device in zip(guests, sticks, ids):
        until(lambda: w.has_live(guest, stick), "the guest to have its own stick again")
        expect([c["device_id"] for c in w.product.claims_of(guest)] == [device], "the same device")
        w.boots_from(guest, stick, reset=True)


@case('replug = "release": unplugging a device ends its claim')
def release_policy(w):
    w.product.configure(replug="release")
    ((guest, stick),) = running(w)
    stick.unplug()
    until(
        lambda: not w.product.claims_of(guest) and not w.virsh.hostdevs(guest.name),
        "the claim to end",
    )
    stick.plug(0)
    until(lambda: known(w, stick)["status"] == "available", "it to be free")
    stays(lambda: not w.virsh.hostdevs(guest.name), "the guest has nothing", seconds=3)
