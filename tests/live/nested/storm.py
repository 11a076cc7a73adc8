"""A storm over the compute host: actors use it and break it at random, each in its own thread.

Each actor draws from its own random source, which the seed and its name determine. A seed repeats
what each actor chooses, but not the moments: how long an action takes depends on the machine.
"""

import os
import random
import re
import signal
import threading
import time
import traceback
from collections import Counter
from pathlib import Path

from lib.daemons import open_devices, qemus
from lib.product import HOOKS, LOGS
from lib.shell import Failure
from lib.waiting import TIMEOUT_SECONDS

# Timeout of a command, in seconds. libvirtd is stopped for at most 20 s.
COMMAND_TIMEOUT = 180
# TimeoutStopSec of the agent's unit, in seconds.
STOP_TIMEOUT = 60
# Exit statuses of a Rust program that panicked or aborted.
PANICKED = (101, 134, -6)
LOG = LOGS / "chaos.log"

# Another hook, which delays each call of libvirtd while a file exists.
SLOW_FLAG = Path("/run/chaos.slow")
SLOW_HOOK = """#!/bin/sh
sleep "$(cat /run/chaos.slow 2> /dev/null || echo 0)"
"""


class Storm:
    def __init__(self, w, guests, sticks):
        self.w, self.guests, self.sticks = w, guests, sticks
        self.began = time.monotonic()
        self.blows, self.rests = threading.Event(), threading.Event()
        self.deeds, self.faults = [], []
        self.tally = Counter()
        """How commands ended."""
        self.agent = threading.Lock()
        """Held while the agent is stopped and started on purpose."""
        self.spares_agent = False
        LOG.write_text("")
        self.actors = [
            Tenant(self, "tenant"),
            Tenant(self, "other tenant"),
            Freezer(self, "freezer"),
            Hand(self, "hand"),
            Operator(self, "operator"),
            Libvirt(self, "libvirtd"),
            Agent(self, "agent"),
        ]
        hook = HOOKS / "60-chaos"
        hook.write_text(SLOW_HOOK)
        hook.chmod(0o755)

    def begin(self):
        for actor in self.actors:
            actor.start()

    def blow(self, seconds):
        """Let the actors act for this time, and watch the invariants."""
        self.rests.clear()
        self.blows.set()
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self.watch()
            time.sleep(1)

    def calm(self):
        """Wait until each actor has finished its action. Then all programs run."""
        self.blows.clear()
        self.rests.set()
        end = time.monotonic() + TIMEOUT_SECONDS
        for actor in self.actors:
            if not actor.is_idle.wait(max(0, end - time.monotonic())):
                what = self.last(actor)
                raise Failure(
                    f"the {actor.name} has not finished within {TIMEOUT_SECONDS} s: {what}"
                )
        self.watch()

    def watch(self):
        """Check what must hold at every moment."""
        if self.faults:
            raise Failure("\n".join(self.faults))
        if self.agent.acquire(blocking=False):
            try:
                self.w.product.agent.must_run()
            finally:
                self.agent.release()
        # The processes are read one after the other. A device that moved meanwhile is in one of
        # them the second time.
        if (twice := doubled()) and (twice := twice & doubled()):
            raise Failure(f"several guests have a device open: {sorted(twice)}")

    def pause(self, seconds):
        """Sleep, but not longer than the storm lasts."""
        self.rests.wait(seconds)

    def note(self, actor, text):
        deed = (time.monotonic() - self.began, actor, text)
        self.deeds.append(deed)
        with LOG.open("a", encoding="utf-8") as log:
            log.write(f"{time.strftime('%H:%M:%S', time.gmtime())} {shown(deed)}\n")

    def fault(self, text):
        self.note("fault", text)
        self.faults.append(text)

    def last(self, actor):
        deeds = (text for _, who, text in reversed(self.deeds) if who == actor.name)
        return next(deeds, "nothing yet")

    def command(self, actor, *words):
        """Run virsh or virt-usb. The command may fail, but it must print a reason."""
        program, *rest = words
        self.note(actor, f"{' '.join(words)} ...")
        run = self.w.virsh if program == "virsh" else self.w.product
        result = run(*rest, timeout=COMMAND_TIMEOUT, quiet=True)
        told = result.text.splitlines()
        self.note(actor, f"{' '.join(words)}: {'done' if result.ok else ' '.join(told)}")
        if result.status in PANICKED or "panicked" in result.text:
            self.fault(f"a program panicked:\n{result}")
        elif not result.ok and not told:
            self.fault(f"a failure without a reason:\n{result}")
        elif "Hook script execution failed" in result.text and "virt-usb: " not in result.text:
            self.fault(f"a refusal without a reason:\n{result}")
        self.tally[f"{program} {rest[0]}: {'done' if result.ok else alike(' '.join(told))}"] += 1
        return result


def shown(deed):
    seconds, actor, text = deed
    return f"{seconds:7.1f} s {actor}: {text}"


def alike(text):
    """A message without its variable parts."""
    text = text[max(0, text.find("virt-usb: ")) :]
    text = re.sub(r"\b(wants|given)-\w+", "GUEST", text)
    text = re.sub(r"[0-9a-f]{8}-[0-9a-f-]{27}", "UUID", text)
    return re.sub(r"\d[\d:.TZ-]*", "N", text)[:200]


def doubled():
    """Devices that several QEMU processes have open: (bus, device)."""
    count = Counter(node for pid in qemus().values() for node in open_devices(pid))
    return {node for node, users in count.items() if users > 1}


class Actor(threading.Thread):
    # Seconds between two actions: minimum and maximum.
    WAIT = (1, 5)
    # The actor's methods with their weights.
    ACTS = {}

    def __init__(self, storm, name):
        super().__init__(name=name, daemon=True)
        self.storm, self.w = storm, storm.w
        self.random = random.Random(f"{storm.w.seed}/{name}")
        self.is_idle = threading.Event()

    def run(self):
        while True:
            self.is_idle.set()
            self.storm.blows.wait()
            self.is_idle.clear()
            self.storm.pause(self.random.uniform(*self.WAIT))
            (act,) = self.random.choices(list(self.ACTS), list(self.ACTS.values()))
            if not self.storm.rests.is_set():
                self.do(act)

    def do(self, act):
        try:
            getattr(self, act)()
        except Failure as failure:
            self.storm.fault(f"the {self.name}: {failure}")
        except Exception:  # An error of the harness fails the case, too.
            self.storm.fault(f"the {self.name}: {traceback.format_exc()}")

    def note(self, text):
        self.storm.note(self.name, text)

    def command(self, *words):
        return self.storm.command(self.name, *words)

    def stop_and_continue(self, pid, what, seconds):
        """Send SIGSTOP, and SIGCONT after this time or when the storm ends."""
        self.note(f"SIGSTOP to {what} for {seconds:.1f} s")
        try:
            os.kill(pid, signal.SIGSTOP)
            self.storm.pause(seconds)
            os.kill(pid, signal.SIGCONT)
            self.note(f"SIGCONT to {what}")
        except ProcessLookupError:
            self.note(f"{what} has ended")

    def guest(self, runs=True):
        """The name of a guest that runs or is off; of any guest if there is none in that state."""
        running = qemus()
        names = [g.name for g in self.storm.guests]
        return self.random.choice([name for name in names if (name in running) == runs] or names)


class Tenant(Actor):
    """Start guests and end them in every way."""

    WAIT = (0.2, 3)
    ACTS = {"begin": 6, "cold_plug": 2, "destroy": 3, "kill": 2, "save": 1}

    def begin(self):
        self.command("virsh", "start", self.guest(runs=False))

    def cold_plug(self):
        self.command("virt-usb", "start", self.guest(runs=False))

    def destroy(self):
        self.command("virsh", "destroy", self.guest())

    def save(self):
        self.command("virsh", "managedsave", self.guest())

    def kill(self):
        name = self.guest()
        if pid := qemus().get(name):
            self.note(f"kill -9 of the QEMU of {name}")
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                self.note("it has ended")


class Freezer(Actor):
    """Stop the QEMU of a guest and let it continue."""

    WAIT = (3, 15)
    ACTS = {"freeze": 1}

    def freeze(self):
        name = self.guest()
        seconds = self.random.uniform(1, 20)
        if pid := qemus().get(name):
            self.stop_and_continue(pid, f"the QEMU of {name}", seconds)


class Hand(Actor):
    """Unplug sticks and plug them in again, at any bus."""

    WAIT = (2, 10)
    ACTS = {"move": 4, "unplug": 1}

    def stick(self):
        return self.random.choice(self.storm.sticks)

    def move(self):
        stick, seconds = self.stick(), self.random.choice([0, self.random.uniform(0, 6)])
        taken = [s.slot for s in self.storm.sticks if s is not stick]
        slot = self.random.choice([slot for slot in range(8) if slot not in taken])
        self.note(f"{stick.serial} from slot {stick.slot} to {slot}, away for {seconds:.1f} s")
        stick.unplug()
        self.storm.pause(seconds)
        stick.plug(slot)

    def unplug(self):
        stick = self.stick()
        self.note(f"{stick.serial} unplugged from slot {stick.slot}")
        stick.unplug()


class Operator(Actor):
    """Attach devices to guests without requests, detach them, and show the inventory."""

    WAIT = (2, 8)
    ACTS = {"attach": 4, "detach": 3, "look": 1}
    # Limit of assigned devices: with more, no guest could start.
    MOST = 2

    def __init__(self, storm, name):
        super().__init__(storm, name)
        self.given = []

    def attach(self):
        if len(self.given) >= self.MOST:
            self.detach()
            return
        stick = self.random.choice(self.storm.sticks)
        given = self.random.choice([g.name for g in self.storm.guests if not g.about])
        selectors = [f'{{"serial":"{stick.serial}"}}', f"{stick.vendor}:{stick.product}"]
        selector = self.random.choice(selectors)
        # A command that failed may have taken effect, or may take effect later.
        self.command("virt-usb", "attach", given, selector)
        self.given.append((given, selector))

    def detach(self):
        if self.given:
            taken = self.random.choice(self.given)
            result = self.command("virt-usb", "detach", *taken)
            if named := re.search("name one by its id: device ([0-9]+)", result.text):
                result = self.command("virt-usb", "detach", taken[0], named[1])
            if result.ok or "no such device" in result.text:
                self.given.remove(taken)

    def look(self):
        for words in (("devices",), ("claims",), ("events", "--limit", "5")):
            if not self.command("virt-usb", *words).ok:
                self.storm.fault(f"the inventory cannot be shown: {self.storm.last(self)}")


class Libvirt(Actor):
    """Stop libvirtd, kill it and slow it down."""

    WAIT = (8, 25)
    ACTS = {"freeze": 3, "kill": 3, "stop": 1, "stutter": 2, "slow": 2}

    def freeze(self):
        self.stop_and_continue(self.w.libvirtd.process.pid, "libvirtd", self.random.uniform(1, 20))

    def kill(self, how=signal.SIGKILL):
        seconds = self.random.choice([0, self.random.uniform(0, 8)])
        if not self.w.libvirtd.is_running():
            self.storm.tally["libvirtd ended by itself"] += 1
        self.note(f"{how.name} to libvirtd, started again after {seconds:.1f} s")
        try:
            self.w.libvirtd.kill(how)
        except Failure as failure:
            self.note(f"{failure}: killed")
            self.w.libvirtd.kill()
        self.storm.pause(seconds)
        self.w.libvirtd.start()
        self.note("libvirtd runs")

    def stop(self):
        self.kill(signal.SIGTERM)

    def stutter(self):
        for _ in range(self.random.randrange(5, 20)):
            seconds = self.random.uniform(0.1, 1)
            self.stop_and_continue(self.w.libvirtd.process.pid, "libvirtd", seconds)
            self.storm.pause(self.random.uniform(0.05, 0.3))

    def slow(self):
        each, seconds = self.random.uniform(0.5, 4), self.random.uniform(5, 30)
        self.note(f"each call of libvirtd's hooks takes {each:.1f} s more, for {seconds:.0f} s")
        flag = SLOW_FLAG
        flag.write_text(f"{each:.1f}")
        self.storm.pause(seconds)
        flag.unlink()
        self.note("hooks are as quick as before")


class Agent(Actor):
    """Kill the agent, stop it, and let it reload its configuration."""

    WAIT = (5, 30)
    ACTS = {"kill": 3, "stop": 2, "reload": 2}

    def kill(self, how=signal.SIGKILL):
        seconds = self.random.choice([0, self.random.uniform(0, 3), self.random.uniform(0, 15)])
        if self.storm.spares_agent:
            return
        with self.storm.agent:
            agent = self.w.product.agent
            agent.must_run()
            self.note(f"{how.name} to the agent, started again after {seconds:.1f} s")
            began = time.monotonic()
            os.kill(agent.process.pid, how)
            status = agent.process.wait(STOP_TIMEOUT)
            self.note(f"the agent ended after {time.monotonic() - began:.1f} s with {status}")
            if status != (-how if how == signal.SIGKILL else 0):
                self.storm.fault(f"the agent ended with status {status} on {how.name}")
            self.storm.pause(seconds)
            began = time.monotonic()
            agent.start()
            self.note(f"the agent is ready after {time.monotonic() - began:.1f} s")

    def stop(self):
        self.kill(signal.SIGTERM)

    def reload(self):
        self.note("SIGHUP to the agent")
        os.kill(self.w.product.agent.process.pid, signal.SIGHUP)
