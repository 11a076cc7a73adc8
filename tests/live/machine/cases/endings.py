"""The ways in which a guest ends. Each ends its claim."""

from lib.case import case
from lib.daemons import kill_qemu
from lib.shell import done, expect, refused
from lib.waiting import until

from .gate import asking, simulate


def claimed(w):
    simulate(w)
    guest = asking(w, "g")
    w.start(guest)
    expect(w.product.claims_of(guest), "a claim while it runs")
    return guest


def free(w, guest):
    until(lambda: not w.product.claims_of(guest), "the claim to be gone")
    expect(
        w.product.device(serial="HL-0001")["status"] == "available", "the device to be available"
    )


@case("a claim ends when the guest is destroyed")
def destroy(w):
    guest = claimed(w)
    w.destroy(guest)
    free(w, guest)


@case("a claim ends when QEMU is killed")
def crash(w):
    guest = claimed(w)
    kill_qemu(guest.name)
    w.gone(guest)
    free(w, guest)


@case("a claim ends when the start fails after the hook")
def failed_start(w):
    simulate(w)
    guest = asking(
        w,
        "g",
        devices="</devices><qemu:commandline><qemu:arg value='-no-such-option'/>"
        "</qemu:commandline><devices>",
    )
    refused(w.virsh("start", "g"), "no-such-option")
    free(w, guest)


@case('hold = "instance": a claim outlives a stop, and the command line ends it')
def hold(w):
    simulate(w, hold="instance")
    guest = asking(w, "g")
    w.start(guest)
    w.destroy(guest)
    expect(w.product.claims_of(guest), "the claim to stay")
    refused(w.virsh("start", asking(w, "other").name), "is held by g")
    w.product.must("claims", "release", "g", "--force")
    free(w, guest)


@case("a save ends the claim of a guest, and a restore claims again")
def save_and_restore(w):
    guest = claimed(w)
    done(w.virsh("save", "g", "/tmp/g.save"))
    free(w, guest)
    done(w.virsh("restore", "/tmp/g.save"))
    expect("restore" in w.product.operations("g"), "the restore filter to be called")
    expect(w.product.claims_of(guest), "the claim to be back")
    w.destroy(guest)
    free(w, guest)
