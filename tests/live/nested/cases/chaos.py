"""All faults at once, for the duration of 'tests/live/run nested --chaos SECONDS'."""

import json
import os
import sqlite3
import time
from collections import Counter
from pathlib import Path

import libvirt
from lib import invariants
from lib.case import case
from lib.product import AGENT_LOG
from lib.shell import Failure, done, expect, run, transcript
from lib.waiting import TIMEOUT_SECONDS, until

from nested.storm import Storm, shown

from .live import asking, known

# The requests of each guest. An operator assigns devices to the last two.
REQUESTS = {
    "wants-sn0": [{"serial": "SN0"}],
    "wants-sn1": [{"serial": "SN1"}],
    "wants-one": [{"vendor_id": "0951"}],
    "wants-two": [{"vendor_id": "0951", "product_id": "1666", "count": 2}],
    "wants-acm": [{"vendor_id": "0525", "product_id": "a4a7"}],
    "given-a": [],
    "given-b": [],
}
# Seconds between two checks: minimum and maximum.
STORM = (60, 90)
# Limits for the agent at a check, after it has settled.
MOST_DESCRIPTORS = 100
MOST_THREADS = 64
ACTIONS_SHOWN = 40


@case(
    "random faults of libvirtd, agent and guests: no device is lost, duplicated or refused silently"
)
def storm(w):
    sticks = [*w.drawer.twins(5), w.drawer.serial_adapter("ACM", slot=5)]
    w.product.configure(scan_interval=15, flap_limit=0)
    w.product.agent.start()
    until(lambda: all(known(w, s) for s in sticks), "the agent to find the sticks")
    guests = [asking(w, name, *some) if some else w.guest(name) for name, some in REQUESTS.items()]
    Chaos(w, guests, sticks).run(w.chaos)


class Chaos:
    def __init__(self, w, guests, sticks):
        self.w, self.guests = w, guests
        self.storm = Storm(w, guests, sticks)
        self.wants = {g.uuid: sum(r.get("count", 1) for r in REQUESTS[g.name]) for g in guests}

    def run(self, seconds):
        end, number = time.monotonic() + seconds, 0
        tell(f"chaos for {seconds} s, seed {self.w.seed}")
        self.storm.begin()
        try:
            while time.monotonic() < end:
                number += 1
                # An agent that runs undisturbed for some time shows its leaks.
                self.storm.spares_agent = self.w.random.random() < 0.3
                self.storm.blow(self.w.random.uniform(*STORM))
                self.check(number)
        except (Failure, AssertionError) as trouble:
            raise Failure(self.story(trouble)) from trouble
        finally:
            self.end()
            for told, times in sorted(self.storm.tally.items()):
                tell(f"{times:5} {told}")

    def story(self, trouble):
        deeds = [shown(deed) for deed in self.storm.deeds[-ACTIONS_SHOWN:]]
        title = f"--- the last {ACTIONS_SHOWN} actions"
        return "\n".join([f"seed {self.w.seed}: {trouble}", title, *deeds])

    def end(self):
        try:
            self.storm.calm()
        except Failure:  # It was reported already.
            pass

    def check(self, number):
        """Pause the storm and check the invariants."""
        self.storm.calm()
        began = time.monotonic()
        self.w.libvirtd.ensure()
        until(self.has_no_limbo, "libvirt to know which guests run")
        self.resume()
        self.settle()
        took = time.monotonic() - began
        self.probe()
        self.look_inside()
        done(self.w.product("store", "check", quiet=True))
        log = AGENT_LOG.read_text(errors="replace")
        expect("panicked" not in log, "no panic in the agent's log")
        self.w.product.agent.must_run()
        bounds = until(self.bounds, "the agent to have few descriptors and threads")
        starts = Counter()
        for told, times in self.storm.tally.items():
            if " start: " in told:
                starts[told.endswith(": done")] += times
        agent = "left alone" if self.storm.spares_agent else "restarted"
        tell(
            f"{time.monotonic() - self.storm.began:5.0f} s: check {number} passed, "
            f"settled after {took:.0f} s; {starts[True]} starts done, {starts[False]} failed; "
            f"the agent, {agent}, has {bounds}"
        )
        transcript.clear()

    def settle(self):
        more = lambda host: self.unserved(host) + self.unknown(host)
        invariants.settle(self.w, TIMEOUT_SECONDS, more)

    def unserved(self, host):
        """Guests that do not hold their devices, and problems. There are none after a pause."""
        inventory = Inventory(self.w)
        wrong = []
        for guest in self.guests:
            holds = sum(claim["instance_uuid"] == guest.uuid for claim in host.claims)
            assigned = inventory.assigned[guest.uuid]
            wants = self.wants[guest.uuid] + assigned
            if guest.name in host.uuids and holds != wants:
                wrong.append(f"{guest.name} runs and asks for {wants} devices, it holds {holds}")
            if guest.name not in host.uuids and holds > assigned:
                wrong.append(f"{guest.name} is off, holds {holds} and is assigned {assigned}")
        return wrong + inventory.problems

    @staticmethod
    def unknown(host):
        unknown = [name for name in host.opened if name not in host.live]
        return [f"the QEMU of {name} runs, and libvirt does not know it" for name in unknown]

    def has_no_limbo(self):
        lost = self.w.clear_limbo()
        for name in lost:
            self.storm.note("check", f"libvirt lists {name}, which has no QEMU: destroyed")
            self.storm.tally["libvirt listed a guest without a QEMU"] += 1
        return not lost

    def resume(self):
        """Resume guests: a libvirtd that is killed while it saves a guest leaves it paused."""
        for name in self.w.virsh.running():
            state = self.w.virsh.ask(lambda c, name=name: c.lookupByName(name).state()[0])
            if state == libvirt.VIR_DOMAIN_PAUSED:
                self.storm.note("check", f"{name} is paused: resumed")
                self.w.virsh("resume", name)

    def probe(self):
        """Start a guest: it gets its devices if they are free, or is refused with a reason."""
        running = self.w.virsh.running()
        saved = lambda name: self.w.virsh.ask(lambda c: c.lookupByName(name).hasManagedSaveImage())
        idle = [g.name for g in self.guests if g.about and g.name not in running]
        idle = [name for name in idle if not saved(name)]
        if not idle:
            return
        name = self.w.random.choice(idle)
        (request,) = REQUESTS[name]
        keys = request.keys() - {"count"}
        free = [d for d in self.w.product.devices() if d["status"] == "available"]
        free = [d for d in free if all(d[key] == request[key] for key in keys)]
        can = len(free) >= request.get("count", 1)
        result = self.storm.command("check", "virsh", "start", name)
        outcome = "started" if can else "refused"
        wanted = f"{name} to be {outcome}, {len(free)} devices are free for it"
        expect(result.ok == can, f"{wanted}:\n{result}")
        expect(can or f"virt-usb: {name} " in result.text, f"a refusal with a reason:\n{result}")
        self.settle()

    def look_inside(self):
        """Check that a guest with one stick boots from it."""
        rows = {d["id"]: d["serial"] for d in self.w.product.devices()}
        plugged = [s for s in self.storm.sticks if s.slot is not None]
        sticks = {s.serial: s for s in plugged if s.function == "mass_storage"}
        running = self.w.virsh.running()
        ready = []
        for guest in self.guests:
            serials = [rows[c["device_id"]] for c in self.w.product.claims_of(guest)]
            if guest.name in running and len(serials) == 1 and serials[0] in sticks:
                ready.append((guest, sticks[serials[0]]))
        if ready:
            guest, stick = self.w.random.choice(ready)
            self.storm.note("check", f"{guest.name} boots from {stick.serial}")
            self.w.boots_from(guest, stick, reset=True)

    def bounds(self):
        place = Path(f"/proc/{self.w.product.agent.process.pid}")
        descriptors, threads = (len(os.listdir(place / kind)) for kind in ("fd", "task"))
        few = descriptors <= MOST_DESCRIPTORS and threads <= MOST_THREADS
        return few and f"{descriptors} descriptors, {threads} threads"


class Inventory:
    """The data that the command line does not show as JSON, read from a backup."""

    def __init__(self, w):
        copy = Path("/tmp/chaos.sqlite")
        copy.unlink(missing_ok=True)
        done(run("virt-usb", "store", "backup", copy, quiet=True))
        with sqlite3.connect(copy) as store:
            problems = store.execute("SELECT domain, about, what FROM problems")
            self.problems = [": ".join(problem) for problem in problems]
            self.assigned = Counter()
            assignments = store.execute("SELECT instance_uuid, request FROM assignments")
            for instance, request in assignments:
                self.assigned[instance] += json.loads(request).get("count", 1)


def tell(text):
    print(f"# {text}", flush=True)
