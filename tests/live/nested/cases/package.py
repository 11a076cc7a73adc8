"""The Debian package on a host with running guests: install, upgrade, downgrade, remove, purge.

dpkg, the maintainer scripts, libvirtd, polkit and the guests are real. There is no systemd: the
cases start, restart and stop the agent and reload libvirtd as the scripts and the unit would.
"""

import configparser
import json
import os
import re
import sys
from pathlib import Path

from lib.case import case
from lib.daemons import qemu_pid
from lib.product import AGENT, CONFIG, HOOK_LOG, HOOKS, LOGS, STATE, USER, Agent
from lib.shell import Failure, expect, must, refused, run
from lib.waiting import until

from .live import asking, known

REPO = Path(__file__).resolve().parents[4]
sys.path.append(str(REPO / "tests/packages"))
from roots import repack  # noqa: E402

LINK = HOOKS / "50-virt-usb"
PROGRAM = Path("/usr/sbin/virt-usb-hook")
UNIT = "/usr/lib/systemd/system/virt-usbd.service"
# All files that were written since the VM started.
LAYER = Path("/virt-usb/layer/upper")
OLDER = "0.0.1"
OLDER_LOG = LOGS / "older"
# The older package's hook logs its calls.
OLDER_HOOK = f"""#!/bin/sh
echo "$@" >> {OLDER_LOG}
exec /usr/lib/virt-usb/hook "$@"
"""


class Unit(Agent):
    """The agent of the package, started as its unit defines."""

    def command(self):
        unit = configparser.ConfigParser(strict=False, interpolation=None)
        unit.read(UNIT)
        said = unit["Service"]
        bare = ["--init-groups", "--no-new-privs", "--inh-caps=-all", "--bounding-set=-all"]
        own_user = ["setpriv", "--reuid", said["User"], "--regid", said["Group"], *bare]
        return ["sh", "-c", f'umask {said["UMask"]}; exec "$@"', "sh", *own_user, said["ExecStart"]]

    def program(self):
        """The agent's program; its name ends with "(deleted)" if it was replaced."""
        return os.readlink(f"/proc/{self.process.pid}/exe")

    def may(self):
        """The agent's user, groups and capabilities."""
        status = dict(
            line.split(":\t", 1)
            for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        )
        return (
            status["Uid"].split()[1],
            status["Groups"].split(),
            int(status["CapEff"], 16) | int(status["CapBnd"], 16),
        )


def built():
    """The package of the current build."""
    packages = list((REPO / "target/deb").glob("virt-usb_*.deb"))
    if len(packages) != 1:
        raise Failure("target/deb has no package: run 'make deb'")
    made = packages[0].stat().st_mtime
    programs = [
        REPO / "target/release" / name for name in ("virt-usb", "virt-usbd", "virt-usb-hook")
    ]
    for source in [*programs, *(REPO / "debian").iterdir(), *(REPO / "install").glob("virt-usb*")]:
        if source.stat().st_mtime > made:
            raise Failure(f"{packages[0].name} is older than {source.name}: run 'make deb'")
    return packages[0]


def older():
    """The same build as a lower version that knows one schema less."""
    path = Path("/tmp/older.deb")
    if not path.exists():
        repack(built(), path, OLDER, make_older)
    return path


def make_older(tree):
    program = tree / PROGRAM.relative_to("/")
    program.rename(tree / "usr/lib/virt-usb/hook")
    program.write_text(OLDER_HOOK)
    program.chmod(0o755)
    preinst = tree / "DEBIAN/preinst"
    preinst.write_text(
        re.sub(
            r"(?m)^schema=(\d+)$", lambda found: f"schema={int(found[1]) - 1}", preinst.read_text()
        )
    )


def dpkg(*words):
    # The triggers of other packages, above all man-db, take a minute and test nothing.
    return run("dpkg", "--no-triggers", *words, timeout=120)


def install(package):
    said = dpkg("--install", package)
    expect(said.ok, f"the package to be installed:\n{said}")
    return said.text


def version():
    return must("dpkg-query", "-W", "-f", "${Version} ${Status}", "virt-usb").out


def traces():
    """The files with our name that belong neither to dpkg nor to this harness."""
    found = [Path("/") / path.relative_to(LAYER) for path in LAYER.rglob("*virt-usb*")] + list(
        Path("/run").rglob("*virt-usb*")
    )
    others = ("/virt-usb", "/var/lib/dpkg/", str(LOGS))
    return sorted(
        str(path) for path in found if os.path.lexists(path) and not str(path).startswith(others)
    )


def running(w):
    """A running guest that has its stick."""
    # The package asks for this after its installation.
    w.libvirtd.reload()
    (stick,) = w.drawer.twins(1)
    w.product.agent = Unit()
    w.product.agent.start()
    until(lambda: known(w, stick), "the agent to find the stick")
    guest = asking(w, "g")
    w.start(guest)
    w.allocated(guest, stick)
    return guest, stick


def log_to_file():
    """Change the configuration as an operator does."""
    text = CONFIG.read_text()
    ours = text.replace('log = "journal"', f'log = "{HOOK_LOG}"')
    expect(ours != text, "the packaged configuration to name the journal")
    CONFIG.write_text(ours)
    return ours


def had(w, guest):
    """What a guest must keep: its QEMU, the addresses of its devices, and its claims."""
    return qemu_pid(guest.name), w.virsh.hostdevs(guest.name), w.product.claims_of(guest)


def keeps(w, guest, before):
    now = had(w, guest)
    expect(now == before, f"the guest to keep {before}, it has {now}")


def altered():
    """The files that differ from those of the package."""
    return [line.split()[-1] for line in must("dpkg", "--verify", "virt-usb").out.splitlines()]


@case(
    "install: libvirtd calls the hook, polkit admits the agent, and the guest boots from its stick",
    bare=True,
)
def installed(w):
    said = install(built())
    expect("'systemctl reload'" in said, f"a message about what to reload: {said}")
    guest, stick = running(w)
    w.boots_from(guest, stick, reset=True)
    refused(
        w.virsh("start", asking(w, "other").name),
        "virt-usb: other asks for usb_devices[0]",
        "is held by g",
    )
    expect(os.readlink(LINK) == str(PROGRAM), "the hook to be a link to the program")
    expect(not altered(), f"all files to be the package's, the configuration too: {altered()}")
    user, group = (must("id", flag, USER).out.strip() for flag in ("-u", "-g"))
    expect(
        w.product.agent.may() == (user, [group], 0),
        f"the agent to run as {user} without other rights: {w.product.agent.may()}",
    )
    found = {
        finding["check"]: finding["what"]
        for finding in json.loads(w.product("doctor", "--json").out)
        if finding["level"] != "ok"
    }
    # The doctor cannot tell that libvirtd was reloaded. This host has no journal.
    expect(
        found.keys() == {"hook", "log"} and "may not know of the hooks in it" in found["hook"],
        f"the doctor to find nothing else: {found}",
    )
    w.destroy(guest)
    until(lambda: known(w, stick)["status"] == "available", "it to be available again")


@case(
    "upgrade: a guest keeps its device, the new hook and agent take over, a downgrade fails",
    bare=True,
)
def upgraded(w):
    install(older())
    ours = log_to_file()
    guest, stick = running(w)
    expect("g prepare begin -" in OLDER_LOG.read_text(), "the older hook to have been called")
    before, calls = had(w, guest), OLDER_LOG.read_text()
    install(built())
    keeps(w, guest, before)
    expect(CONFIG.read_text() == ours, "the configuration to stay")
    expect(
        w.product.agent.program() == f"{AGENT} (deleted)",
        "the older agent still to run",
    )
    w.product.agent.stop()
    w.product.agent.start()
    expect(w.product.agent.program() == str(AGENT), "the new agent to run")
    w.allocated(guest, stick)
    keeps(w, guest, before)
    _not_downgraded(w)
    keeps(w, guest, before)
    w.boots_from(guest, stick, reset=True)
    stick.move(2)
    w.allocated(guest, stick)
    w.destroy(guest)
    until(lambda: known(w, stick)["status"] == "available", "it to be available again")
    expect("release" in w.product.operations("g"), "the new hook to have released it")
    expect(OLDER_LOG.read_text() == calls, "the older hook to be called no longer")


def _not_downgraded(w):
    """Try the older version, which does not know the inventory's schema: nothing changes."""
    newer = version()
    schema = len(list((REPO / "host-runtime/store/migrations").glob("*.sql")))
    refused(
        dpkg("--install", older()),
        f"has schema {schema}, this package knows {schema - 1}",
        "Nothing was changed",
    )
    expect(version() == newer, f"{newer} to stay installed: {version()}")
    expect(
        altered() == [str(CONFIG)] and os.readlink(LINK) == str(PROGRAM),
        f"all files to stay: {altered()}",
    )
    expect(w.product.agent.program() == str(AGENT), "the agent to keep running")
    refused(w.virsh("start", asking(w, "other").name), "is held by g")


@case(
    "remove, reinstall and purge: a guest keeps its device, and only documented files remain",
    bare=True,
)
def removed(w):
    install(built())
    ours = log_to_file()
    guest, stick = running(w)
    before = had(w, guest)
    w.product.agent.stop()
    said = dpkg("--remove", "virt-usb")
    expect(said.ok and not HOOKS.exists(), f"the hook to be gone:\n{said}")
    expect(CONFIG.read_text() == ours, "the configuration to stay")
    here = {path.name for path in STATE.iterdir()}
    expect(
        "inventory.sqlite" in here and not here & {"agent.lock", "hook.sock"},
        f"the inventory to stay, and no sign of an agent: {here}",
    )
    w.start(w.guest("plain"))
    w.boots_from(guest, stick, reset=True)
    install(built())
    keeps(w, guest, before)
    w.product.agent.start()
    stick.move(2)
    w.allocated(guest, stick)
    w.product.agent.stop()
    said = dpkg("--purge", "virt-usb")
    documented = f"rm -r {STATE} && userdel {USER}"
    expect(said.ok and documented in said.text, f"a message about what is left:\n{said}")
    expect(traces() == [str(STATE)], f"the inventory alone to be left: {traces()}")
    w.boots_from(guest, stick, reset=True)
    must("sh", "-c", documented)
    expect(not traces(), f"nothing to be left: {traces()}")
