"""Devices that are used once, change their identity, or flap."""

import json

from lib.case import case
from lib.product import AGENT_LOG
from lib.shell import expect, refused
from lib.waiting import until

from .live import asking, known
from .replug import running


def set_aside(w):
    """The device that 'virt-usb quarantine' shows."""
    return json.loads(w.product.must("quarantine", "--json").out)[0]


@case("one_time_use: a used stick is quarantined, and a changed one raises an alarm")
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
    until(lambda: known(w, stick)["status_reason"] == "quarantined", "it to be quarantined")
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
        "the agent to log it",
    )
    w.product.must("quarantine", "clear", str(row["id"]))
    w.start(other)
    w.allocated(other, stick)


@case(
    "usb_aliases: a stick that changes its product id in a guest is the same device, and reattached"
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
    expect(
        "it has changed since" not in AGENT_LOG.read_text(),
        "no alarm, because the configuration allows the change",
    )


def come_and_go(w, stick):
    """Replug the stick three times. The agent sees each: the kernel assigns a new device number."""
    for _ in range(3):
        stick.move(0)
        until(
            lambda: known(w, stick) and known(w, stick)["device_id"] == stick.address()[1],
            "it to be seen",
        )


@case("a flapping stick is reattached when it is stable, and quarantined the second time")
def flapping(w):
    w.product.configure(
        flap_limit=3, flap_window=120, flap_pause=25, flap_quarantine=1, scan_interval=1
    )
    ((guest, stick),) = running(w)
    row = known(w, stick)
    come_and_go(w, stick)
    until(lambda: known(w, stick).get("flapping_until"), "it to be flapping")
    until(
        lambda: "connects and disconnects too often" in w.product.must("claims").out,
        "the operator to see it",
    )
    expect(not w.virsh.hostdevs(guest.name), "it not to be reattached at once")
    w.allocated(guest, stick, seconds=90)
    come_and_go(w, stick)
    until(lambda: known(w, stick).get("quarantined"), "it to be quarantined")
    w.product.must("quarantine", "clear", str(row["id"]))
    w.allocated(guest, stick)
