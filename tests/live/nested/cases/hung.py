"""Guests, hooks and libvirtds that do not respond or give wrong answers."""

import os
import signal
from pathlib import Path

from lib.case import case
from lib.daemons import qemu_pid
from lib.product import HOOKS, SHORT_WAITS
from lib.shell import expect
from lib.waiting import stays, until

from .live import asking, known
from .replug import running

RESCAN = Path("/sys/bus/pci/rescan")
# Another hook that blocks libvirtd as long as a file exists.
SLOW = """#!/bin/sh
if [ "$1" = slow ] && [ "$2" = prepare ]; then
    : > /run/slow.began
    while [ -e /run/slow ]; do sleep 0.2; done
fi
"""


def problem(w, words):
    """Whether the inventory has a problem with these words."""
    return words in w.product.must("claims").out


@case(
    "a guest with a stopped QEMU delays no other guest, and its problem is shown until it continues"
)
def stopped(w):
    (stuck, mine), (_, other) = running(w, count=2)
    late = w.drawer.stick("late", serial="LATE", slot=5)
    until(lambda: known(w, late), "the agent to find the third stick")
    pid = qemu_pid(stuck.name)
    os.kill(pid, signal.SIGSTOP)
    try:
        mine.move(mine.slot)
        until(lambda: problem(w, "its QEMU is stopped"), "the problem to be shown")
        guest = asking(w, "late", {"serial": "LATE"})
        w.start(guest)
        w.allocated(guest, late)
        expect(w.product.claims_of(stuck), "the stuck guest to keep its claim")
    finally:
        os.kill(pid, signal.SIGCONT)
    w.allocated(stuck, mine, seconds=120)
    until(lambda: not problem(w, "is stopped"), "the problem to be solved")
    w.boots_from(stuck, mine, reset=True)


@case("another hook that does not end delays no other guest")
def slow_hook(w):
    ((guest, stick),) = running(w)
    hook, flag, began = HOOKS / "60-slow", Path("/run/slow"), Path("/run/slow.began")
    hook.write_text(SLOW)
    hook.chmod(0o755)
    flag.touch()
    began.unlink(missing_ok=True)
    slow = w.guest("slow")
    pid = os.fork()
    if pid == 0:
        os.execvp("virsh", ["virsh", "-q", "start", slow.name])
    try:
        until(began.exists, "the slow hook to be called")
        address = stick.address()
        stick.move(stick.slot)
        expect(stick.address() != address, "another address")
        w.allocated(guest, stick, seconds=120)
    finally:
        flag.unlink()
        os.waitpid(pid, 0)
        hook.unlink()


@case("a libvirtd that does not know a guest releases none of its devices")
def other_libvirt(w):
    ((guest, stick),) = running(w)
    # The agent user's session libvirtd may or may not start. Neither way does it know the guest.
    for uri, sign in (
        ("qemu:///session", ("knows none of", "no connection to libvirt")),
        ("test:///default", ("knows none of",)),
    ):
        w.product.agent.stop()
        w.product.configure(libvirt_uri=uri)
        w.product.agent.start()
        until(
            lambda: any(words in w.product.agent.log() for words in sign), f"{uri} to be told apart"
        )
        stays(
            lambda: w.holds(guest, stick),
            "the guest has its stick",
            seconds=4 * SHORT_WAITS["absent_grace"],
        )
    until(lambda: problem(w, "its QEMU runs on this host"), "the problem to be shown")
    w.product.configure()
    os.kill(w.product.agent.process.pid, signal.SIGHUP)
    until(
        lambda: "libvirt_uri has changed: restart the agent to apply it" in w.product.agent.log(),
        "SIGHUP to take effect",
    )
    expect(w.holds(guest, stick), "the guest to have its stick still")
    w.product.agent.stop()
    w.product.agent.start()
    until(lambda: not problem(w, "its QEMU runs on this host"), "the problem to be solved")
    w.allocated(guest, stick)
    w.boots_from(guest, stick, reset=True)


@case(
    "a device is reattached after its controller was unbound or removed, even at the same address"
)
def rebound(w):
    w.product.agent.start()
    kind = {"vendor_id": "0403", "product_id": "6001"}
    adapter = lambda: next(
        (d for d in w.product.devices() if (d["vendor_id"], d["product_id"]) == ("0403", "6001")),
        None,
    )
    row = until(adapter, "the agent to find the adapter behind the hub")
    guest = asking(w, "g", kind)
    w.start(guest)
    is_mine = lambda: (
        [c for c in w.product.claims_of(guest) if c["state"] == "allocated"]
        and w.virsh.hostdevs("g")
    )
    until(is_mine, "the guest to have the adapter")
    controller = Path(f"/sys/bus/usb/devices/usb{row['bus_id']}").resolve().parent
    driver = (controller / "driver").resolve()
    attached = lambda: [e for e in w.product.events() if e["event"] == "allocated"]
    for away, back in (
        ((driver / "unbind", controller.name), (driver / "bind", controller.name)),
        ((controller / "remove", "1"), (RESCAN, "1")),
    ):
        before = len(attached())
        away[0].write_text(away[1])
        back[0].write_text(back[1])
        until(lambda: len(attached()) > before, f"it to be reattached after {away[0].name}")
        until(is_mine, "the guest to have the adapter")
        interface = Path(f"/sys/bus/usb/devices/{adapter()['port_path']}:1.0/driver")
        expect(
            not interface.exists() or interface.resolve().name == "usbfs",
            "the host's driver to release it",
        )


@case("a stick is reattached after it was deauthorized and authorized again")
def authorized_again(w):
    w.product.configure(scan_interval=5)
    ((guest, stick),) = running(w)
    w.boots_from(guest, stick, reset=True)
    folder = Path("/sys/bus/usb/devices") / known(w, stick)["port_path"]
    attached = lambda: len([e for e in w.product.events() if e["event"] == "allocated"])
    before = attached()
    (folder / "authorized").write_text("0")
    (folder / "authorized").write_text("1")
    until(lambda: attached() > before, "it to be reattached")
    w.allocated(guest, stick)
    w.boots_from(guest, stick, reset=True)
