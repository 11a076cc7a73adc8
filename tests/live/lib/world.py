"""A compute host, and what a case does to it."""

import random
import time
from pathlib import Path

from . import shell
from .daemons import ASKING_POLKIT, LOG, Libvirtd, Polkit, has_qemu
from .guests import Guest
from .product import AGENT_LOG, HOOK_LOG, HOOKS, Product
from .shell import expect
from .virsh import Virsh
from .waiting import until


class World:
    def __init__(self, repo, seed, kills, drawer=None, chaos=None):
        self.product = Product(repo)
        self.libvirtd = Libvirtd()
        self.polkit = Polkit()
        self.bare = False
        """Whether the current case began without virt-usb."""
        self.virsh = Virsh()
        self.drawer = drawer
        """The USB sticks, if the place can have any."""
        self.seed, self.kills, self.chaos = seed, kills, chaos
        self.random = random.Random(seed)
        self.log_from = 0

    def set_up(self):
        Libvirtd.configure()
        self.product.install()
        self.libvirtd.start()
        self.virsh.must("version", timeout=120)

    def fresh(self, bare=False):
        """Prepare the host for a case: no guest, no stick, an empty inventory, no agent.

        A `bare` host has no virt-usb either, and has polkit.
        """
        self.product.agent.stop()
        self.libvirtd.ensure()
        self._remove_guests()
        if self.drawer:
            self.drawer.empty()
        if bare or self.bare:
            self._install_anew(bare)
        if not bare:
            self.product.fresh()
        for hook in HOOKS.glob("*"):
            if hook.name != "50-virt-usb":
                hook.unlink()
        self.log_from = LOG.stat().st_size if LOG.exists() else 0
        self.random.seed(self.seed)

    def _install_anew(self, bare):
        self.product.remove()
        # The bus must not end while libvirtd starts, because libvirtd would end too.
        self.libvirtd.kill()
        if bare:
            self.polkit.start()
            Libvirtd.configure(ASKING_POLKIT)
        else:
            self.polkit.stop()
            Libvirtd.configure()
            self.product.install()
        self.libvirtd.start()
        self.bare = bare

    def _remove_guests(self):
        for name in self.virsh.running():
            self.virsh.destroy(name)
        for name in self.virsh.names():
            self.virsh.undefine(name)
        for serial in Path("/tmp").glob("*.serial"):
            serial.unlink()

    def guest(self, name, about="", devices="", **more):
        """Define a guest."""
        guest = Guest(name, about, devices, **more)
        self.virsh.define(guest)
        return guest

    def start(self, guest):
        self.virsh.start(guest.name)

    def destroy(self, guest):
        self.virsh.destroy(guest.name)

    def gone(self, guest):
        until(lambda: guest.name not in self.virsh.running(), f"{guest.name} to be off")

    def boots_from(self, guest, stick, reset=False):
        """Wait until the guest has run the boot code of this stick, and of no other.

        If the stick was attached after power-on, `reset` lets the guest boot from it.
        """
        before = guest.booted_from()
        if reset:
            self.virsh.must("reset", guest.name)
        fresh = until(
            lambda: guest.booted_from()[len(before) if reset else 0 :],
            f"{guest.name} to boot from a stick",
            seconds=60,
        )
        name = stick.serial or stick.name
        expect(
            set(fresh) == {name}, f"{guest.name} to boot from {name} alone, it booted from {fresh}"
        )

    def holds(self, guest, stick, state="allocated"):
        """The guest's claim on this stick in that state; None if there is none."""
        row = self.product.device(serial=stick.serial)
        return next(
            (
                c
                for c in self.product.claims_of(guest)
                if c["device_id"] == row["id"] and c["state"] == state
            ),
            None,
        )

    def has_live(self, guest, stick):
        """Whether the guest's live XML has the device at its current address."""
        return any(h.address == stick.address() for h in self.virsh.hostdevs(guest.name))

    def allocated(self, guest, stick, seconds=60):
        """Wait until the stick is allocated in the inventory and in the guest's live XML."""

        def is_allocated():
            self.product.agent.must_run()
            return self.holds(guest, stick) and self.has_live(guest, stick)

        until(is_allocated, f"{stick.serial} to be allocated to {guest.name}", seconds)

    def clear_limbo(self):
        """Destroy guests that run only in libvirt's view. Return their names.

        If libvirtd is killed after it wrote the status file of a guest and before it started QEMU,
        it lists the guest as running from then on, with a start job without an owner (seen with
        9.0.0: "current job is (none, none, start) owned by (0 <null>"). An operator destroys it.
        """
        time.sleep(1)
        lost = [name for name in self.virsh.running() if not has_qemu(name)]
        for name in lost:
            self.virsh("destroy", name)
        return lost

    def logs(self):
        """The logs that help to understand a failure."""
        parts = [
            "--- commands of this case",
            *shell.transcript[-25:],
            f"--- the agent {self.product.agent.state()}",
            *self.product.agent.threads(),
        ]
        for title, path, start in (
            ("hook", HOOK_LOG, 0),
            ("agent", AGENT_LOG, 0),
            ("libvirtd", LOG, self.log_from),
        ):
            text = path.read_bytes()[start:].decode(errors="replace") if path.exists() else ""
            parts += [f"--- {title}'s log", text[-6000:].rstrip()]
        for words in (("devices", "--all"), ("claims",), ("events", "--limit", "30")):
            parts += [f"--- virt-usb {' '.join(words)}", self.product(*words, quiet=True).text]
        parts += [
            "--- the kernel's log",
            "\n".join(shell.run("dmesg", quiet=True).out.splitlines()[-30:]),
        ]
        return "\n".join(parts)
