"""Durations, compared with the same action by hand in the same run.

They are printed and never checked. Run them with `--case figures`.
"""

import json
import os
import signal
import time
from datetime import datetime

from lib.case import case
from lib.daemons import qemu_pid
from lib.guests import hostdev
from lib.product import HOOK_LOG
from lib.shell import done
from lib.waiting import until

from .live import asking, known
from .replug import running

ROUNDS = 5


def told(what, seconds, yardstick=None):
    """Print the median and its ratio to the yardstick. Return the median."""
    middle = sorted(seconds)[len(seconds) // 2]
    ratio = f", {middle / yardstick:.2f} × by hand" if yardstick else ""
    print(f"figure {what}: {middle * 1000:.0f} ms (median of {len(seconds)}){ratio}", flush=True)
    return middle


def allocated_at(w, after):
    """The time of the last allocation, if it is later than `after`."""
    events = json.loads(w.product.must("events", "--json", "--limit", "20").out)
    times = [
        datetime.fromisoformat(e["at"]).timestamp() for e in events if e["event"] == "allocated"
    ]
    return next((t for t in reversed(times) if t > after), None)


def hook_ended(operation, after):
    """The end of the hook's last call for this operation, if it is later than `after`."""
    records = [json.loads(line) for line in HOOK_LOG.read_text().splitlines()]
    return next(
        (r["at"] for r in reversed(records) if r["operation"] == operation and r["at"] > after),
        None,
    )


@case("duration of an attach: by hand, after a start, after a replug")
def attach(w):
    # Without this limit, the stick would count as flapping.
    w.product.configure(flap_limit=0)
    (stick,) = w.drawer.twins(1)
    plain = w.guest("plain")
    w.start(plain)
    by_hand = []
    for _ in range(ROUNDS):
        began = time.time()
        done(w.virsh.attach("plain", hostdev(stick)))
        by_hand.append(time.time() - began)
        done(w.virsh.detach("plain", hostdev(stick)))
    w.destroy(plain)
    hand = told("virsh attach-device by hand", by_hand)
    w.product.agent.start()
    until(lambda: known(w, stick), "the agent to find the stick")
    guest = asking(w, "g")
    starts, replugs = [], []
    for round_ in range(ROUNDS):
        began = time.time()
        w.start(guest)
        inside = until(lambda: allocated_at(w, began), "the stick to be in the guest")
        starts.append(inside - hook_ended("started", began))
        stick.unplug()
        until(lambda: not w.virsh.hostdevs("g"), "the stale hostdev to be gone")
        began = time.time()
        stick.plug(1 + round_ % 3)
        replugs.append(until(lambda: allocated_at(w, began), "the stick to be back") - began)
        w.destroy(guest)
    told("started → in the guest", starts, hand)
    told("plugged in again → back in the guest", replugs, hand)


@case("duration of an attach beside 20 guests with a stopped QEMU, and of the agent's shutdown")
def beside_stopped(w):
    pairs = running(w, count=6)
    late = w.drawer.stick("late", serial="LATE", slot=7)
    until(lambda: known(w, late), "the agent to find the last stick")
    idle = [w.guest(f"idle{n}") for n in range(14)]
    for guest in idle:
        w.start(guest)
    guest = asking(w, "late", {"serial": "LATE"})
    stopped = [qemu_pid(one.name) for one in [*(g for g, _ in pairs), *idle]]
    for pid in stopped:
        os.kill(pid, signal.SIGSTOP)
    try:
        # The agent must detach and attach each of these.
        for _, stick in pairs:
            stick.move(stick.slot)
        began = time.time()
        w.start(guest)
        inside = until(lambda: allocated_at(w, began), "the stick to be in the guest")
        told(
            "started → in the guest, beside 20 stopped ones",
            [inside - hook_ended("started", began)],
        )
        named = [
            e["at"]
            for e in json.loads(w.product.must("events", "--json", "--limit", "100").out)
            if e["event"] == "problem"
        ]
        print(f"figure problems named: {len(named)}", flush=True)
        os.kill(w.libvirtd.process.pid, signal.SIGSTOP)
        began = time.time()
        w.product.agent.stop()
        told("SIGTERM → the agent has ended, libvirtd stopped too", [time.time() - began])
    finally:
        os.kill(w.libvirtd.process.pid, signal.SIGCONT)
        for pid in stopped:
            os.kill(pid, signal.SIGCONT)
