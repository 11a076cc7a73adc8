"""The Debian package on a compute host whose guests run: installed, upgraded, not downgraded, removed, purged.

dpkg, maintainer scripts, libvirtd, polkit and guests are real. What systemd would do is done here, as the scripts and the unit have it: the
agent is started, restarted and stopped, libvirtd is reloaded.
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
# All that was written since the machine started.
LAYER = Path("/virt-usb/layer/upper")
OLDER = "0.0.1"
OLDER_LOG = LOGS / "older"
# Who calls the older package's hook can be told.
OLDER_HOOK = f"""#!/bin/sh
echo "$@" >> {OLDER_LOG}
exec /usr/lib/virt-usb/hook "$@"
"""


class Unit(Agent):
    """The package's agent, as its unit says."""

    def command(self):
        unit = configparser.ConfigParser(strict=False, interpolation=None)
        unit.read(UNIT)
        said = unit["Service"]
        bare = ["--init-groups", "--no-new-privs", "--inh-caps=-all", "--bounding-set=-all"]
        own_user = ["setpriv", "--reuid", said["User"], "--regid", said["Group"], *bare]
        return ["sh", "-c", f'umask {said["UMask"]}; exec "$@"', "sh", *own_user, said["ExecStart"]]

    def program(self):
        """What it runs: "(deleted)" behind the name of one that was replaced."""
        return os.readlink(f"/proc/{self.process.pid}/exe")

    def may(self):
        """Its user, its groups and its capabilities."""
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
    """The package of what is built."""
    packages = list((REPO / "target/deb").glob("virt-usb_*.deb"))
    if len(packages) != 1:
        raise Failure("target/deb has no package: 'make deb' makes it")
    made = packages[0].stat().st_mtime
    programs = [
        REPO / "target/release" / name for name in ("virt-usb", "virt-usbd", "virt-usb-hook")
    ]
    for source in [*programs, *(REPO / "debian").iterdir(), *(REPO / "install").glob("virt-usb*")]:
        if source.stat().st_mtime > made:
            raise Failure(
                f"{packages[0].name} is older than {source.name}: 'make deb' makes it anew"
            )
    return packages[0]


def older():
    """The same build as a lower version whose schema is one less. What it asks of an inventory counts where there is one."""
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
    # Others' triggers, man-db's above all, take a minute here and tell nothing.
    return run("dpkg", "--no-triggers", *words, timeout=120)


def install(package):
    said = dpkg("--install", package)
    expect(said.ok, f"the package to be installed:\n{said}")
    return said.text


def version():
    return must("dpkg-query", "-W", "-f", "${Version} ${Status}", "virt-usb").out


def traces():
    """What has our name and is neither dpkg's record nor this harness's."""
    found = [Path("/") / path.relative_to(LAYER) for path in LAYER.rglob("*virt-usb*")] + list(
        Path("/run").rglob("*virt-usb*")
    )
    others = ("/virt-usb", "/var/lib/dpkg/", str(LOGS))
    return sorted(
        str(path) for path in found if os.path.lexists(path) and not str(path).startswith(others)
    )


def running(w):
    """A guest that has its stick."""
    # What the package says is to be done after its installation.
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
    """A change of the configuration, as an operator makes one."""
    text = CONFIG.read_text()
    ours = text.replace('log = "journal"', f'log = "{HOOK_LOG}"')
    expect(ours != text, "the packaged configuration to name the journal")
    CONFIG.write_text(ours)
    return ours


def had(w, guest):
    """What a guest must keep: its QEMU, its devices with their addresses, its claims."""
    return qemu_pid(guest.name), w.virsh.hostdevs(guest.name), w.product.claims_of(guest)


def keeps(w, guest, before):
    now = had(w, guest)
    expect(now == before, f"the guest to keep {before}, it has {now}")


def altered():
    """The files that are not as the package brought them."""
    return [line.split()[-1] for line in must("dpkg", "--verify", "virt-usb").out.splitlines()]


@case(
    "the package installed: libvirtd calls its hook, polkit lets its agent in, the guest boots from its stick",
    bare=True,
)
def installed(w):
    said = install(built())
    expect("'systemctl reload'" in said, f"it to say what is to be reloaded: {said}")
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
        f"the agent to be nobody but {user}: {w.product.agent.may()}",
    )
    found = {
        finding["check"]: finding["what"]
        for finding in json.loads(w.product("doctor", "--json").out)
        if finding["level"] != "ok"
    }
    # It cannot see that libvirtd was reloaded. This host has no journal.
    expect(
        found.keys() == {"hook", "log"} and "may not know of the hooks in it" in found["hook"],
        f"the doctor to find nothing else: {found}",
    )
    w.destroy(guest)
    until(lambda: known(w, stick)["status"] == "available", "it to be available again")


@case(
    "the package upgraded under a guest, and not downgraded: it keeps all, the new hook is called, the new agent goes on",
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
        "the agent that runs to be the older still",
    )
    w.product.agent.stop()
    w.product.agent.start()
    expect(w.product.agent.program() == str(AGENT), "the agent to be the new one")
    w.allocated(guest, stick)
    keeps(w, guest, before)
    _not_downgraded(w)
    keeps(w, guest, before)
    w.boots_from(guest, stick, reset=True)
    stick.move(2)
    w.allocated(guest, stick)
    w.destroy(guest)
    until(lambda: known(w, stick)["status"] == "available", "it to be available again")
    expect("release" in w.product.operations("g"), "the new hook to have given it back")
    expect(OLDER_LOG.read_text() == calls, "the older hook not to be called any more")


def _not_downgraded(w):
    """To the version that was there, which does not know the schema that the inventory has: nothing changes."""
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
    expect(w.product.agent.program() == str(AGENT), "the agent to go on")
    refused(w.virsh("start", asking(w, "other").name), "is held by g")


@case(
    "the package removed, installed again and purged under a guest: it keeps its device, what is left is what is documented",
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
    expect(said.ok and documented in said.text, f"it to say what is left:\n{said}")
    expect(traces() == [str(STATE)], f"the inventory alone to be left: {traces()}")
    w.boots_from(guest, stick, reset=True)
    must("sh", "-c", documented)
    expect(not traces(), f"nothing to be left: {traces()}")
