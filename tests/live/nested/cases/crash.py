"""kill -9 of each program, at any moment."""

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


@case("kill -9 of the agent: guests keep their devices, and the next agent continues")
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


@case("kill -9 of libvirtd: guests keep running, and the agent reconnects")
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


@case("kill -9 of libvirtd and QEMU at once: the device is free after absent_grace")
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
    "without a hook, the agent releases the device of a stopped guest after ten seconds by default"
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


@case("kill -9 of QEMU, agent or libvirtd at random moments: all invariants hold afterwards")
def random_moments(w):
    Chaos(w).run()


class Chaos:
    """Three sticks and three guests that request them. An action runs while a program is killed."""

    def __init__(self, w):
        self.w, self.random = w, w.random
        self.sticks = w.drawer.twins(3)
        w.product.configure(scan_interval=5, flap_limit=0)
        w.product.agent.start()
        until(lambda: all(known(w, s) for s in self.sticks), "the agent to find the sticks")
        requests = [
            {"serial": "SN0"},
            {"vendor_id": "0951"},
            {"vendor_id": "0951", "product_id": "1666"},
        ]
        self.guests = [asking(w, f"g{n}", request) for n, request in enumerate(requests)]

    def run(self):
        for number in range(self.w.kills):
            act, victim, delay = (
                self.random.choice(self.acts()),
                self.random.choice(["qemu", "agent", "libvirtd"]),
                self.random.uniform(0, 3),
            )
            deed = f"{act.__name__} and {victim} after {delay:.2f} s"
            story = f"kill {number + 1}: {deed} (seed {self.w.seed})"
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
        # A command fails when its daemon is killed. The test checks the state afterwards.
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
            # A guest that has just ended leaves its file for a moment.
            with contextlib.suppress(OSError, ValueError):
                if pids:
                    kill_qemu(self.random.choice(pids).stem)
