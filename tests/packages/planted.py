"""The package's scripts under attack by the owner of the inventory's folder, who plants links."""

import os
import subprocess
import sys

from roots import Failure, check

STATE = "/var/lib/virt-usb"
VICTIM = "/srv/victim"
# Names in STATE that a script reads, removes or gives away.
NAMES = ["inventory.sqlite", "agent.lock", "hook.sock", "hints"]
# VIRT_USB_ROUNDS makes all attacks longer: 'make soak' sets it.
ROUNDS = 3 * int(os.environ.get("VIRT_USB_ROUNDS", "1"))

# Each name changes places with a link to root's file of that name, as fast as possible. Links to
# root's files stand under names of their own as well. The attacker runs outside the root, which
# has no ctypes: `folder` is the state folder as seen from there, `victim` a path inside the root.
ATTACKER = """
import ctypes, os, sys
uid, gid, root, folder, victim, *names = sys.argv[1:]
os.chdir(folder)
secrets = os.open(root + victim, os.O_PATH)
os.setgroups([])
os.setgid(int(gid))
os.setuid(int(uid))
rename, exchange, here = ctypes.CDLL(None).renameat2, 2, -100
os.makedirs(".aside", exist_ok=True)
for name in names:
    if not os.path.lexists(name):
        open(name, "w").close()
    os.symlink(f"{victim}/{name}", f".aside/{name}")
    os.symlink(f"{victim}/{name}", f"link-{name}")
    try:
        os.link(name, f"second-{name}", src_dir_fd=secrets)
    except OSError:
        pass
print("ready", flush=True)
while True:
    for name in names:
        rename(here, name.encode(), here, f".aside/{name}".encode(), exchange)
"""


def attack(root):
    """Start the attacker as the user virt-usb; the caller ends it."""
    ids = root.must("sh", "-c", "id -u virt-usb && id -g virt-usb").out.split()
    attacker = subprocess.Popen(
        [sys.executable, "-c", ATTACKER, *ids, root.path, root.file(STATE), VICTIM, *NAMES],
        stdout=subprocess.PIPE,
        text=True,
    )
    if attacker.stdout.readline() != "ready\n":
        raise Failure("the attacker does not start")
    return attacker


def files(root):
    """Owner, mode, size and content of each of the victim's files."""
    return root.must("sh", "-c", f"cd {VICTIM} && stat -c '%n %u:%g %a %s %F' * && cat *").out


def scripts_follow_no_link(root):
    root.must("install", "-d", "-m", "0711", VICTIM)
    for name in NAMES:
        root.file(f"{VICTIM}/{name}").write_text(f"root's {name}\n")
        root.file(f"{VICTIM}/{name}").chmod(0o600)
    root.must("cp", "-a", STATE, "/packages/state")
    before = files(root)
    attacker = attack(root)
    try:
        scripts = "/var/lib/dpkg/info/virt-usb"
        for words in (
            f"{scripts}.postinst configure",
            f"{scripts}.postinst configure 0.0.1",
            f"{scripts}.prerm upgrade 99",
        ):
            loop = f"for round in $(seq {ROUNDS}); do {words} > /dev/null 2>&1 || exit 1; done"
            root.must("sh", "-c", loop, timeout=1800)
        # prerm takes the hook away, and postinst brings it back.
        loop = f"{scripts}.prerm remove && {scripts}.postinst configure 0.0.1"
        root.must(
            "sh",
            "-c",
            f"for round in $(seq {ROUNDS}); do ({loop}) > /dev/null 2>&1 || exit 1; done",
            timeout=1800,
        )
        root.must("dpkg", "-i", "/packages/virt-usb.deb")
        check(attacker.poll() is None, "the attacker ended before the scripts")
    finally:
        attacker.kill()
        attacker.wait()
    now = files(root)
    check(now == before, f"root's files were changed:\n{before}\n{now}")
    root.must("rm", "-rf", STATE, VICTIM)
    root.must("mv", "/packages/state", STATE)


def foreign_folder_is_left(root):
    """A folder of root's in which another user has a place is not given to the agent's user."""
    root.must("mv", STATE, "/packages/state")
    root.must("install", "-d", "-m", "0750", STATE)
    root.must("install", "-d", "-m", "0755", "-o", "games", f"{STATE}/hints")
    root.file("/srv/secret").write_text("root's secret\n")
    root.must("ln", "/srv/secret", f"{STATE}/hints/second-name")
    root.must("/var/lib/dpkg/info/virt-usb.postinst", "configure")
    owner = root.must("stat", "-c", "%U", "/srv/secret").out
    check(owner == "root\n", f"root's file was given to {owner}")
    root.must("rm", "-rf", STATE, "/srv/secret")
    root.must("mv", "/packages/state", STATE)
