"""Hand-written hostdevs: the hook claims the device and the guest boots from it."""

from lib.case import case
from lib.guests import hostdev
from lib.shell import expect, refused


@case("two guests with identical sticks each boot from their own")
def each_its_own(w):
    sticks = w.drawer.twins(2)
    w.product.discover()
    guests = [w.guest(f"g{n}", devices=hostdev(stick)) for n, stick in enumerate(sticks)]
    for guest in guests:
        w.start(guest)
    for guest, stick in zip(guests, sticks):
        w.boots_from(guest, stick)
        expect(
            w.holds(guest, stick),
            f"{stick.serial} to be allocated to {guest.name}: {w.product.claims()}",
        )


@case("a device that another guest holds is refused at virsh start and at virsh attach-device")
def second_taker(w):
    (stick,) = w.drawer.twins(1)
    w.product.discover()
    first, second = (
        w.guest("first", devices=hostdev(stick)),
        w.guest("second", devices=hostdev(stick)),
    )
    w.start(first)
    refused(
        w.virsh("start", second.name), "virt-usb: second ", f"first ({first.uuid}) holds it since"
    )
    expect(w.holds(first, stick), "the first guest to keep it")
    expect(not w.product.claims_of(second), "the second guest to hold nothing")
    w.boots_from(first, stick)
    third = w.guest("third")
    w.start(third)
    refused(w.virsh.attach(third.name, hostdev(stick)), "in use by driver QEMU, domain first")


@case("a hostdev with an address that now belongs to another device is refused")
def stale_address(w):
    one, other = w.drawer.twins(2)
    old = one.address()
    guest = w.guest("g", devices=hostdev(one))
    w.product.discover()
    one.move(2)
    w.product.discover()
    answer = refused(w.virsh("start", guest.name))
    expect(str(old[1]) in answer.text, "the message to name the address")
    expect(not w.product.claims_of(guest), "nothing to be held")
    expect(other.is_there(), "the other stick to be left alone")
