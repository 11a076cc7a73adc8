"""Redirections: USB ports that a SPICE client fills."""

from lib.case import case
from lib.guests import metadata, redirections
from lib.shell import done, expect
from lib.waiting import stays, until

SPICE = "<graphics type='spice' autoport='yes' listen='127.0.0.1'/>"


def desk(w, count):
    return w.guest("desk", metadata(redirections(count)), SPICE)


@case("the agent attaches redirections to a running guest with SPICE graphics")
def live(w):
    w.product.agent.start()
    guest = desk(w, 2)
    before = w.virsh.xml("desk", inactive=True)
    w.start(guest)
    until(
        lambda: sorted(w.virsh.redirdevs("desk")) == ["ua-usb-redir-0", "ua-usb-redir-1"],
        "both to be there",
    )
    ports = w.virsh.must("qemu-monitor-command", "desk", "--hmp", "info usb")
    expect(
        ports.count("USB Redirection Device") == 2
        or "ua-usb-redir-1" in w.virsh.must("qemu-monitor-command", "desk", "--hmp", "info qtree"),
        "QEMU to have them",
    )
    expect(w.virsh.xml("desk", inactive=True) == before, "the definition to stay as it was")
    stays(lambda: len(w.virsh.redirdevs("desk")) == 2, "two, not more", seconds=3)


@case("virt-usb start: a guest has its redirections from power-on")
def cold(w):
    w.product.agent.start()
    desk(w, 1)
    w.product.must("start", "desk")
    expect(w.virsh.redirdevs("desk") == ["ua-usb-redir-0"], f"one: {w.virsh.redirdevs('desk')}")
    stays(lambda: len(w.virsh.redirdevs("desk")) == 1, "one, not more", seconds=2)


@case("redirections survive save and restore, and are not duplicated")
def saved(w):
    w.product.agent.start()
    guest = desk(w, 1)
    w.start(guest)
    until(lambda: w.virsh.redirdevs("desk"), "it to be there")
    done(w.virsh("managedsave", "desk"))
    w.start(guest)
    stays(lambda: w.virsh.redirdevs("desk") == ["ua-usb-redir-0"], "one, not more", seconds=3)
