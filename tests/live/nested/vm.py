"""The nested compute host: a VM on the machine's root, read-only below a layer in memory."""

import ctypes
import shutil
import signal
import subprocess
import time
from pathlib import Path

from nested.kernel import Kernel

# The first boot probes QEMU's capabilities. Later boots read them from this folder.
KEPT = "capabilities"
# A CPU without AVX and fast string instructions: emulating what programs use instead takes half the
# time.
CPU = "Nehalem"
# A test machine needs no mitigations.
KERNEL_WORDS = (
    "console=ttyS0 quiet mitigations=off nokaslr clocksource=hpet tsc=unstable no_timer_check "
    "audit=0 apparmor=0 random.trust_cpu=on cryptomgr.notests net.ifnames=0 panic=-1 norandmaps"
)


def end_with_parent():
    """Let the kernel kill this child when its parent ends. Called before exec."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)


class Nested:
    def __init__(self, repo, cache, say, cpus=1, part="1/1"):
        self.repo, self.cache, self.say, self.cpus = Path(repo), Path(cache), say, cpus
        # Several VMs may run at the same time, each with a part of the cases.
        self.place = self.cache / f"vm-{part.replace('/', '-of-')}"
        self.share = self.place / "share"
        self.kernel = Kernel(self.cache, self.repo / "tests/live/nested/init")

    def run(self, words, limit):
        """Boot the VM, print the output of the cases, and return their exit status."""
        self.kernel.prepare()
        self._lay_out(words, limit)
        began = time.monotonic()
        with open(self.place / "qemu.log", "w", encoding="utf-8") as log:
            vm = subprocess.Popen(
                self._command(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                preexec_fn=end_with_parent,
            )
            try:
                self._follow(vm, limit + 90)
            finally:
                vm.kill()
                vm.wait()
        status = self._status()
        if status is None or status == 124:
            why = (
                f"the cases took longer than {limit} s"
                if status
                else "the VM ended without a result"
            )
            self.say(f"not ok - the nested compute host: {why}")
            self.say(self._tail("console.log") + self._tail("qemu.log"))
        self.say(f"# the nested compute host ran for {time.monotonic() - began:.0f} s")
        return 0 if status == 0 else 1

    def _lay_out(self, words, limit):
        self.share.mkdir(parents=True, exist_ok=True)
        for left in ("out", "status"):
            (self.share / left).unlink(missing_ok=True)
        shutil.rmtree(self.share / "logs", ignore_errors=True)
        (self.share / "logs").mkdir()
        (self.share / "out").touch()
        (self.share / "arguments").write_text(" ".join(words) + "\n")
        (self.share / "limit").write_text(f"{limit}\n")
        if not (self.share / "udev").exists():
            shutil.copytree(self.cache / "udev", self.share / "udev", symlinks=True)

    def _command(self):
        def folder(path, tag, mode=""):
            return [
                "-virtfs",
                f"local,path={path},mount_tag={tag},security_model=none,multidevs=remap{mode}",
            ]

        return [
            "qemu-system-x86_64",
            "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
            "-machine", "q35", "-accel", "tcg,thread=multi,tb-size=512",
            "-cpu", CPU, "-smp", str(self.cpus), "-m", "1536",
            "-kernel", self.kernel.image, "-initrd", self.kernel.initramfs, "-append", KERNEL_WORDS,
            "-serial", f"file:{self.place / 'console.log'}",
            # A hub with a device behind it: dummy_hcd can emulate neither.
            "-device", "qemu-xhci,id=usb", "-device", "usb-hub,bus=usb.0,port=1",
            "-chardev", "null,id=nowhere",
            "-device", "usb-serial,bus=usb.0,port=1.2,chardev=nowhere,always-plugged=on",
            *folder("/", "machine", ",readonly=on"),
            *folder(self.repo, "repo", ",readonly=on"),
            *folder(self.share, "share"),
        ]  # fmt: skip

    def _follow(self, vm, limit):
        """Print the output of the cases as it arrives."""
        end = time.monotonic() + limit
        with open(self.share / "out", encoding="utf-8", errors="replace") as out:
            while True:
                ended = vm.poll() is not None or time.monotonic() > end
                for line in out:
                    self.say(line.rstrip("\n"))
                if ended:
                    return
                time.sleep(0.2)

    def _status(self):
        try:
            return int((self.share / "status").read_text())
        except (FileNotFoundError, ValueError):
            return None

    def _tail(self, name):
        path = self.place / name
        text = path.read_text(errors="replace") if path.exists() else ""
        return f"--- {name}\n" + "\n".join(text.splitlines()[-30:]) + "\n"
