"""kill -9 of everything, at any moment."""

import contextlib
import threading
import time
from pathlib import Path

from lib import invariants
from lib.case import case
from lib.daemons import kill_qemu
from lib.product import CONFIG, HOOKS, SHORT_WAITS
from lib.shell import Failure, expect
from lib.waiting import stays, until

from .live import asking, known
from .replug import running


@case("kill -9 of the agent: guests keep what they have, the next agent goes on with it")
def agent(w):
    ((guest, stick),) = running(w)
    w.product.agent.kill()
    stays(lambda: w.has_live(guest, stick), "the guest keeps it", seconds=1)
    stick.move(2)
    w.product.agent.start()
    w.allocated(guest, stick)
    w.product.agent.kill()
    w.destroy(guest)
    w.product.agent.start()
    invariants.settle(w)
    expect(known(w, stick)["status"] == "available", "it to be available")


@case("kill -9 of libvirtd: guests live on, the agent finds its way back")
def libvirtd(w):
    ((guest, stick),) = running(w)
    w.libvirtd.kill()
    stick.unplug()
    w.libvirtd.start()
    until(lambda: guest.name in w.virsh.running(), "the guest to live on")
    until(lambda: not w.virsh.hostdevs(guest.name), "the stale hostdev to be detached", seconds=40)
    stick.plug(1)
    w.allocated(guest, stick, seconds=40)
    invariants.settle(w)


@case("kill -9 of libvirtd and QEMU at once: what the guest held is free after the grace")
def both(w):
    ((guest, stick),) = running(w)
    w.libvirtd.kill()
    kill_qemu(guest.name)
    w.libvirtd.start()
    w.gone(guest)
    until(lambda: not w.product.claims_of(guest), "the claim to end", seconds=invariants.GRACE)
    heir = asking(w, "heir", {"serial": stick.serial})
    w.start(heir)
    w.allocated(heir, stick)


@case(
    "where no hook releases it, what a guest held is free after ten seconds by default, and not before"
)
def default_waits(w):
    w.product.configure(**dict.fromkeys(SHORT_WAITS))
    ((guest, _),) = running(w)
    hook, away = HOOKS / "50-virt-usb", CONFIG.parent / "hook"
    hook.rename(away)
    try:
        w.destroy(guest)
        stays(lambda: w.product.claims_of(guest), "the claim is kept", seconds=6)
        until(lambda: not w.product.claims_of(guest), "the claim to end")
    finally:
        away.rename(hook)


@case("kill -9 of QEMU, agent or libvirtd at random moments: afterwards all is as it should be")
def random_moments(w):
    Chaos(w).run()


class Chaos:
    """Three sticks, three guests that want them; something is going on, and something is killed."""

    def __init__(self, w):
        self.w, self.random = w, w.random
        self.sticks = w.drawer.twins(3)
        w.product.configure(scan_interval=5, flap_limit=0)
        w.product.agent.start()
        until(lambda: all(known(w, s) for s in self.sticks), "the agent to find the sticks")
        wishes = [
            {"serial": "SN0"},
            {"vendor_id": "0951"},
            {"vendor_id": "0951", "product_id": "1666"},
        ]
        self.guests = [asking(w, f"g{n}", wish) for n, wish in enumerate(wishes)]

    def run(self):
        for number in range(self.w.kills):
            act, victim, delay = (
                self.random.choice(self.acts()),
                self.random.choice(["qemu", "agent", "libvirtd"]),
                self.random.uniform(0, 3),
            )
            story = f"kill {number + 1}: {act.__name__} and {victim} after {delay:.2f} s (seed {self.w.seed})"
            try:
                self.once(act, victim, delay)
            except (Failure, AssertionError) as trouble:
                raise Failure(f"{story}: {trouble}") from trouble

    def acts(self):
        return [self.start, self.start, self.destroy, self.replug]

    def once(self, act, victim, delay):
        subject = threading.Thread(target=self.quietly, args=(act,))
        subject.start()
        time.sleep(delay)
        self.kill(victim)
        subject.join(90)
        expect(not subject.is_alive(), "the command to end")
        self.w.libvirtd.ensure()
        if not self.w.product.agent.is_running():
            self.w.product.agent.start()
        self.w.clear_limbo()
        invariants.settle(self.w)

    @staticmethod
    def quietly(act):
        # A command whose daemon is killed fails: what counts is what is there afterwards.
        try:
            act()
        except Failure:
            pass

    def start(self):
        self.w.virsh("start", self.random.choice(self.guests).name)

    def destroy(self):
        self.w.virsh("destroy", self.random.choice(self.guests).name)

    def replug(self):
        stick = self.random.choice(self.sticks)
        stick.move(
            self.random.choice([s for s in range(6) if s not in [t.slot for t in self.sticks]])
        )

    def kill(self, victim):
        if victim == "agent":
            self.w.product.agent.kill()
        elif victim == "libvirtd":
            self.w.libvirtd.kill()
        else:
            pids = sorted(Path("/run/libvirt/qemu").glob("g?.pid"))
            # One that ends by itself just now leaves its file for a moment.
            with contextlib.suppress(OSError, ValueError):
                if pids:
                    kill_qemu(self.random.choice(pids).stem)
