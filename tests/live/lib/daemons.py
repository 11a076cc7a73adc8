"""libvirtd, as this harness starts it: no systemd, its log in a file, and killed as hard as a case wants."""

import os
import signal
import subprocess
from pathlib import Path

from .shell import Failure
from .waiting import until

LOG = Path("/var/log/libvirt/libvirtd.log")
SOCKET = "/run/libvirt/libvirt-sock"

# As root: as another user every call asks QEMU again whether the machine's KVM works by now, for seconds.
QEMU_CONF = """
user = "root"
group = "root"
stdio_handler = "file"
remember_owner = 0
"""
# No polkit here: whoever is in the group may talk to it.
LIBVIRTD_CONF = f"""
auth_unix_rw = "none"
unix_sock_group = "libvirt"
unix_sock_rw_perms = "0770"
log_outputs = "3:file:{LOG}"
"""


class Libvirtd:
    def __init__(self, prefix=(), socket=SOCKET, options=()):
        self.prefix, self.socket, self.options = tuple(prefix), Path(socket), tuple(options)
        self.process = None

    @staticmethod
    def configure(root=Path("/"), more=""):
        (root / "etc/libvirt/qemu.conf").write_text(QEMU_CONF)
        (root / "etc/libvirt/libvirtd.conf").write_text(LIBVIRTD_CONF + more)

    def start(self):
        self.socket.unlink(missing_ok=True)
        quiet = subprocess.DEVNULL
        self.process = subprocess.Popen([*self.prefix, "libvirtd", *self.options], stdin=quiet, stdout=quiet, stderr=quiet)
        until(self.socket.exists, "libvirtd's socket", seconds=60)

    def is_running(self):
        return self.process is not None and self.process.poll() is None

    def kill(self, how=signal.SIGKILL):
        if self.is_running():
            os.kill(self.process.pid, how)
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            raise Failure(f"libvirtd does not end on {how.name}") from None

    def restart(self, how=signal.SIGTERM):
        self.kill(how)
        self.start()

    def ensure(self):
        if not self.is_running():
            self.start()


def qemu_pid(name, run=Path("/run/libvirt/qemu")):
    """The process of a running guest."""
    return int((run / f"{name}.pid").read_text())


def has_qemu(name):
    """Whether any process is this guest's QEMU, whatever libvirtd says."""
    mark = f"guest={name},".encode()
    for cmdline in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if mark in cmdline.read_bytes():
                return True
        except OSError:  # It has ended meanwhile.
            continue
    return False


def kill_qemu(name):
    os.kill(qemu_pid(name), signal.SIGKILL)
