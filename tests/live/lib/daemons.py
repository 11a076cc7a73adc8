"""libvirtd without systemd: it logs to a file, and a case can kill it with any signal."""

import os
import re
import signal
import subprocess
from pathlib import Path

from .shell import Failure
from .waiting import until

LOG = Path("/var/log/libvirt/libvirtd.log")
SOCKET = "/run/libvirt/libvirt-sock"

# QEMU runs as root. As another user, each call would probe again for several seconds whether KVM
# works.
QEMU_CONF = """
user = "root"
group = "root"
stdio_handler = "file"
remember_owner = 0
"""
# Debian's own configuration: polkit decides who may connect.
ASKING_POLKIT = f'log_outputs = "3:file:{LOG}"\n'
# There is no polkit here: members of the group may connect.
LIBVIRTD_CONF = f"""
auth_unix_rw = "none"
unix_sock_group = "libvirt"
unix_sock_rw_perms = "0770"
{ASKING_POLKIT}"""


class Libvirtd:
    def __init__(self, prefix=(), socket=SOCKET, options=()):
        self.prefix, self.socket, self.options = tuple(prefix), Path(socket), tuple(options)
        self.process = None

    @staticmethod
    def configure(conf=LIBVIRTD_CONF):
        Path("/etc/libvirt/qemu.conf").write_text(QEMU_CONF)
        Path("/etc/libvirt/libvirtd.conf").write_text(conf)

    def start(self):
        self.socket.unlink(missing_ok=True)
        quiet = subprocess.DEVNULL
        self.process = subprocess.Popen(
            [*self.prefix, "libvirtd", *self.options], stdin=quiet, stdout=quiet, stderr=quiet
        )
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

    def reload(self):
        """Do what 'systemctl reload libvirtd' does."""
        os.kill(self.process.pid, signal.SIGHUP)

    def ensure(self):
        if not self.is_running():
            self.start()


class Polkit:
    """A system bus and polkitd, for a libvirtd that lets polkit decide who may connect."""

    BUS = Path("/run/dbus/system_bus_socket")

    def __init__(self):
        self.processes = []

    def start(self):
        if self.processes:
            return
        self.BUS.parent.mkdir(exist_ok=True)
        self._run("dbus-daemon", "--system", "--nofork", "--nopidfile")
        until(self.BUS.exists, "the system bus")
        # The path in Debian 12, then the path in Debian 13.
        self._run(
            next(
                p for p in ("/usr/lib/polkit-1/polkitd", "/usr/libexec/polkitd") if Path(p).exists()
            ),
            "--no-debug",
        )

    def _run(self, *words):
        quiet = subprocess.DEVNULL
        self.processes.append(subprocess.Popen(words, stdin=quiet, stdout=quiet, stderr=quiet))

    def stop(self):
        while self.processes:
            process = self.processes.pop()
            process.kill()
            process.wait()
        self.BUS.unlink(missing_ok=True)


def qemu_pid(name, run=Path("/run/libvirt/qemu")):
    """The process id of a guest's QEMU."""
    return int((run / f"{name}.pid").read_text())


def qemus():
    """The QEMU processes by the names of their guests, independent of libvirtd."""
    found = {}
    for cmdline in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = cmdline.read_bytes().split(b"\0")
        except OSError:  # The process has ended meanwhile.
            continue
        for word in words:
            if word.startswith(b"guest="):
                found[word.removeprefix(b"guest=").split(b",")[0].decode()] = int(
                    cmdline.parent.name
                )
    return found


def has_qemu(name):
    return name in qemus()


def open_devices(pid):
    """The USB devices that this process has open: (bus, device)."""
    found = set()
    for link in Path(f"/proc/{pid}/fd").glob("*"):
        try:
            node = os.readlink(link)
        except OSError:  # The process or the descriptor has gone meanwhile.
            continue
        if match := re.fullmatch("/dev/bus/usb/([0-9]{3})/([0-9]{3})", node):
            found.add((int(match[1]), int(match[2])))
    return found


def kill_qemu(name):
    os.kill(qemu_pid(name), signal.SIGKILL)
