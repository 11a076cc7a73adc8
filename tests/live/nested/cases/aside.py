"""Devices that are used once, that turn into others, that come and go."""

import json

from lib.case import case
from lib.product import AGENT_LOG
from lib.shell import expect, refused
from lib.waiting import until

from .live import asking, known
from .replug import running


def set_aside(w):
    """What 'virt-usb quarantine' shows: one device."""
    return json.loads(w.product.must("quarantine", "--json").out)[0]


@case(
    "one_time_use: after its use a stick waits for an operator, and one that has become another is told loudly"
)
def used_once(w):
    w.product.configure(
        usb_passthrough_whitelist=[{"vendor": "0951", "product": "1666", "one_time_use": True}]
    )
    (stick,) = w.drawer.twins(1)
    w.product.agent.start()
    row = until(lambda: known(w, stick), "the agent to find the stick")
    guest, other = asking(w, "g"), asking(w, "other")
    w.start(guest)
    w.allocated(guest, stick)
    w.destroy(guest)
    until(lambda: known(w, stick)["status_reason"] == "quarantined", "it to be set aside")
    refused(
        w.virsh("start", "other"),
        f"device {row['id']} ",
        "unavailable (quarantined): g (",
        "virt-usb quarantine clear",
    )
    expect(not set_aside(w)["altered"], "nothing to be different yet")
    stick.unplug()
    stick.add_function()
    stick.plug(0)
    until(lambda: set_aside(w)["altered"], "the difference to be found")
    difference = "interfaces 08/06/50 before, 08/06/50 08/06/50 now"
    expect(set_aside(w)["altered"] == difference, f"what is different: {set_aside(w)}")
    until(
        lambda: f"it has changed since its last use: {difference}" in AGENT_LOG.read_text(),
        "the agent to say it",
    )
    w.product.must("quarantine", "clear", str(row["id"]))
    w.start(other)
    w.allocated(other, stick)


@case(
    "usb_aliases: a stick that shows another product while a guest has it is the same device, and the guest has it again"
)
def two_faces(w):
    w.product.configure(usb_aliases=[["0951:1666", "0951:16ae"]])
    ((guest, stick),) = running(w)
    row = known(w, stick)
    for product in ("16ae", "1666"):
        stick.unplug()
        stick.show_as(product)
        stick.plug(0)
        w.allocated(guest, stick)
        now = known(w, stick)
        expect(
            (now["id"], now["product_id"]) == (row["id"], product),
            f"the same device with another product: {now}",
        )
        (hostdev,) = w.virsh.hostdevs(guest.name)
        expect(hostdev.product == product, f"the guest's hostdev to name it: {hostdev}")
    w.boots_from(guest, stick, reset=True)
    expect("it has changed since" not in AGENT_LOG.read_text(), "no alarm: that is declared")


def come_and_go(w, stick):
    """Three times, each of them seen: at every return the kernel gives it a new number."""
    for _ in range(3):
        stick.move(0)
        until(
            lambda: known(w, stick) and known(w, stick)["device_id"] == stick.address()[1],
            "it to be seen",
        )


@case(
    "a stick that comes and goes is given back to its guest once it has stayed, and the second time waits for an operator"
)
def flapping(w):
    w.product.configure(
        flap_limit=3, flap_window=120, flap_pause=25, flap_quarantine=1, scan_interval=1
    )
    ((guest, stick),) = running(w)
    row = known(w, stick)
    come_and_go(w, stick)
    until(lambda: known(w, stick).get("flapping_until"), "it to count as flapping")
    until(
        lambda: "connects and disconnects too often" in w.product.must("claims").out,
        "an operator to be told",
    )
    expect(not w.virsh.hostdevs(guest.name), "it not to be given back at once")
    w.allocated(guest, stick, seconds=90)
    come_and_go(w, stick)
    until(lambda: known(w, stick).get("quarantined"), "it to wait for an operator")
    w.product.must("quarantine", "clear", str(row["id"]))
    w.allocated(guest, stick)
