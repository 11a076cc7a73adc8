"""The cases in their order. Each begins in the state in which the previous one ended."""

import json
import os
import re
import shutil
import subprocess
import time

from planted import foreign_folder_is_left, scripts_follow_no_link
from roots import REPO, Failure, check, repack

HOOK = "/etc/libvirt/hooks/qemu.d/50-virt-usb"
PROGRAM = "/usr/sbin/virt-usb-hook"
CONFIG = "/etc/virt-usb/config.toml"
STATE = "/var/lib/virt-usb"
LOGS = "/var/log/virt-usb"
INVENTORY = f"{STATE}/inventory.sqlite"
UNIT = "/usr/lib/systemd/system/virt-usbd.service"
SCHEDULER = "/usr/lib/systemd/system/virt-usb-scheduler.service"
EXAMPLES = REPO / "tests/harness/examples"
INSTANCE = "6f3c9d7e-0b51-4a55-9a3e-0d3b8c1f2a01"
OURS = "# ours\n"


def installed(root):
    root.must("apt-get", "-qq", "update")
    # The same build with a lower version, which a later case upgrades.
    repack(root.package, root.packages / "older.deb", "0.0.1")
    said = root.apt("install", "/packages/older.deb")
    check("'systemctl reload'" in said.all, f"no message about what to reload:\n{said}")
    check(os.readlink(root.file(HOOK)) == PROGRAM, "the hook is not a link to the program")
    for program in ("virt-usb", "virt-usbd", PROGRAM):
        root.must(program, "--version")
    said = root.must(HOOK, "--version")
    check(said.out.startswith("virt-usb-hook "), str(said))
    root.must("getent", "passwd", "virt-usb")
    said = root.must("id", "-nG", "virt-usb")
    check(said.out.split() == ["virt-usb"], f"unexpected groups: {said.out}")
    said = root.must("stat", "-c", "%U %G %a", STATE)
    check(said.out == "virt-usb virt-usb 750\n", str(said))
    check(not root.file(INVENTORY).exists(), "the installation created an inventory")


def is_enabled(root):
    link = root.file("/etc/systemd/system/multi-user.target.wants/virt-usbd.service")
    check(link.is_symlink(), "the agent does not start at boot")


def units(root):
    is_enabled(root)
    scheduler = root.file("/etc/systemd/system/multi-user.target.wants/virt-usb-scheduler.service")
    check(not scheduler.is_symlink(), "the scheduler starts at boot")
    for unit in (UNIT, SCHEDULER):
        said = root.must("systemd-analyze", "verify", "--man=yes", unit)
        about_us = [line for line in said.all.splitlines() if "virt-usb" in line]
        check(not about_us, "\n".join(about_us))
        said = root.must("systemd-analyze", "security", "--offline=true", "--no-pager", unit)
        score = float(
            re.search(r"Overall exposure level for virt-usb\S*.service: ([0-9.]+)", said.out)[1]
        )
        check(score <= 2.0, said.out)
        print(f"     systemd-analyze security {unit}: {score}", flush=True)


def pages(root):
    found = sorted(root.file("/usr/share/man").glob("man*/virt-usb*"))
    names = {path.name for path in found}
    for name in (
        "virt-usb.1.gz",
        "virt-usb-claims.1.gz",
        "virt-usb-claims-release.1.gz",
        "virt-usbd.8.gz",
        "virt-usb-hook.8.gz",
    ):
        check(name in names, f"there is no {name}")
    for path in found:
        said = root.must(
            "man",
            "--warnings",
            "-E",
            "UTF-8",
            "-l",
            "-Tutf8",
            "-Z",
            "/" + str(path.relative_to(root.path)),
        )
        check(not said.err, f"{path.name}: {said.err}")
        plain = subprocess.run(["gzip", "-dc", path], capture_output=True, check=True).stdout
        lint = subprocess.run(["mandoc", "-Tlint", "-Werror"], input=plain, capture_output=True)
        check(lint.returncode == 0, f"{path.name}: {lint.stdout.decode()}")
    said = root.must("man", "-w", "virt-usb")
    check("man1/virt-usb.1" in said.out, str(said))


def completions(root):
    for path in (
        "bash-completion/completions/virt-usb",
        "zsh/vendor-completions/_virt-usb",
        "fish/vendor_completions.d/virt-usb.fish",
    ):
        check("discover" in root.file(f"/usr/share/{path}").read_text(), path)
    root.must("bash", "-n", "/usr/share/bash-completion/completions/virt-usb")


def monitoring(root):
    """Check the files for Prometheus and Grafana, and the folder that logrotate rotates."""
    shipped = {path.name for path in root.file("/usr/share/virt-usb/monitoring").iterdir()}
    names = {"README.md", "virt-usb.rules.yml", "virt-usb.dashboard.json"}
    check(shipped == names, f"there are {shipped}")
    conffiles = root.must("dpkg-query", "-W", "-f", "${Conffiles}", "virt-usb").out
    check("/etc/logrotate.d/virt-usb " in conffiles, f"no conffile:\n{conffiles}")
    said = root.must("stat", "-c", "%U %G %a", LOGS)
    check(said.out == "root adm 2750\n", str(said))
    root.apt("install", "logrotate")
    config = root.packages / "log.toml"
    config.write_text(f'state_dir = "{STATE}"\nlog = "{LOGS}/hook.log"\n')
    plain = "<domain type='qemu'><name>plain</name><uuid>" + INSTANCE[:-2] + "03</uuid></domain>"
    for name in ("first", "second"):
        words = ["--config", "/packages/log.toml", name, "prepare", "begin", "-"]
        root.must(HOOK, *words, stdin=plain)
        if name == "first":
            said = root.must("logrotate", "--force", "/etc/logrotate.d/virt-usb")
            check(not said.all, str(said))
    for name, file in (("first", "hook.log.1"), ("second", "hook.log")):
        lines = root.file(f"{LOGS}/{file}").read_text().splitlines()
        check([json.loads(line)["domain"] for line in lines] == [name], f"{file}: {lines}")
        said = root.must("stat", "-c", "%U %G %a", f"{LOGS}/{file}")
        check(said.out == "root adm 640\n", str(said))


def recorded_host(root):
    """Check that libusb of this Debian finds the devices of the recorded host."""
    for name in ("compute-host", "compute-host-interfaces"):
        shutil.copy(REPO / f"tests/fixtures/{name}.umockdev", root.packages)
    records = [
        word
        for name in ("compute-host", "compute-host-interfaces")
        for word in ("-d", f"/packages/{name}.umockdev")
    ]
    config = root.packages / "recorded.toml"
    config.write_text('state_dir = "/packages/recorded"\nlog = "off"\n')
    said = root.must(
        "umockdev-run",
        *records,
        "--",
        "virt-usb",
        "--config",
        "/packages/recorded.toml",
        "discover",
        "--json",
    )
    check("vendor_id" in said.out or "added" in said.out, str(said))
    said = root.must("virt-usb", "--config", "/packages/recorded.toml", "devices", "--json")
    check(len(json.loads(said.out)) >= 5, str(said))


def claims(root):
    return json.loads(root.must("virt-usb", "claims", "--json").out)


def prepare(root, name, **how):
    how.setdefault("stdin", (EXAMPLES / "erp.xml").read_text())
    return root.run(HOOK, name, "prepare", "begin", "-", **how)


def a_claim(root):
    """Create a claim, which must survive an upgrade."""
    shutil.copy(EXAMPLES / "key.toml", root.packages)
    config = root.file(CONFIG)
    text = config.read_text()
    check('sysfs_root = "/sys"' in text, "the configuration is not the example")
    config.write_text(OURS + text.replace('sysfs_root = "/sys"', 'sysfs_root = "/packages/sys"'))
    root.must("virt-usb", "discover", "--sim", "/packages/key.toml", "--sysfs-out", "/packages/sys")
    # The other checks need libvirt.
    found = json.loads(root.run("virt-usb", "doctor", "--all", "--json").out)
    levels = {
        finding["level"]
        for finding in found
        if finding["check"] in ("hook", "configuration", "inventory")
    }
    check(levels == {"ok"}, str(found))
    said = root.must("stat", "-c", "%U %G %a", INVENTORY)
    check(
        said.out == "virt-usb virt-usb 640\n",
        f"the agent could not open the inventory that root created: {said}",
    )
    said = prepare(root, "erp")
    check(said.status == 0 and "ua-usb-1" in said.out, str(said))
    check([claim["instance_uuid"] for claim in claims(root)] == [INSTANCE], "no claim")


SIMULATED = """[[device]]
vendor = "0529"
product = "0002"
bus = 1
device = 7
port = "1-2"
serial = "HL-0002"
speed = "full"

[[domain]]
name = "crm"
uuid = "5c9a1d0e-6f27-4c57-9a5e-0d2f6b7c8e91"
flavor = '{"usb_devices":[{"serial":"HL-0002"}]}'
"""


def agent_starts(root):
    """Start the agent as its unit does, with devices and guests of a file."""
    as_its_user = "setpriv --reuid virt-usb --regid virt-usb --clear-groups"
    options = "--config /packages/agent.toml --sim /packages/host.toml"
    command = f"{as_its_user} virt-usbd {options}"
    root.must("sh", "-c", f"{command} < /dev/null > /run/agent.log 2>&1 & echo $! > /run/agent.pid")
    for _ in range(600):
        if "ready" in root.file("/run/agent.log").read_text():
            return
        time.sleep(0.1)
    raise Failure(f"the agent does not start:\n{root.file('/run/agent.log').read_text()}")


def ends(root, file, log, signal="TERM"):
    """End the program with the process id in a file, and wait for its end."""
    pid = root.file(file).read_text().strip()
    root.must("kill", f"-{signal}", pid)
    for _ in range(600):
        # An orphaned process stays a zombie. Its first thread is one before the others have ended,
        # and until then the process keeps its files and their locks.
        if root.run(
            "sh", "-c", f"cat /proc/{pid}/task/*/status 2> /dev/null | grep -q '^State:.[^ZX]'"
        ).status:
            return
        time.sleep(0.1)
    raise Failure(f"{pid} does not end:\n{root.file(log).read_text()}")


def agent_stops(root):
    ends(root, "/run/agent.pid", "/run/agent.log")


def held(root):
    """Wait until the simulated guest has its device, and return its claim.

    A simulated guest lives in its agent, and each agent attaches the device again. The claim
    survives. tests/live restarts the agent under real guests.
    """
    for _ in range(600):
        said = root.run("virt-usb", "--config", "/packages/agent.toml", "claims", "--json")
        found = json.loads(said.out) if said.status == 0 else []
        if [claim["state"] for claim in found] == ["allocated"]:
            return [
                [claim[key] for key in ("id", "created_at", "device_id", "instance_uuid")]
                for claim in found
            ]
        time.sleep(0.1)
    raise Failure(f"the guest has no device:\n{said}\n{root.file('/run/agent.log').read_text()}")


def a_guest(root):
    """Start a guest, which keeps its device while the package is upgraded."""
    (root.packages / "agent.toml").write_text('state_dir = "/packages/agent"\nlog = "off"\n')
    (root.packages / "host.toml").write_text(SIMULATED)
    root.must("install", "-d", "-m", "0750", "-o", "virt-usb", "-g", "virt-usb", "/packages/agent")
    agent_starts(root)
    held(root)


def upgraded(root):
    before, config, guest = claims(root), root.file(CONFIG).read_text(), held(root)
    said = root.apt("install", "/packages/virt-usb.deb")
    check(
        root.file(CONFIG).read_text() == config and config.startswith(OURS),
        "the configuration was changed",
    )
    check(claims(root) == before, "the claims have changed")
    check(os.readlink(root.file(HOOK)) == PROGRAM, "the hook is not a link to the program")
    check("restart" not in said.all, f"a message about a restart:\n{said}")
    checked = root.must("virt-usb", "store", "check").out
    check("no problems found" in checked, "the inventory is damaged")
    check(prepare(root, "erp").status == 0, "the guest that has the device is refused")
    # postinst does this if systemd runs.
    agent_stops(root)
    agent_starts(root)
    check(held(root) == guest, "the running guest has another claim")
    agent_stops(root)
    version = subprocess.run(
        ["dpkg-deb", "-f", root.package, "Version"], capture_output=True, text=True, check=True
    ).stdout
    check(
        root.must("dpkg-query", "-W", "-f", "${Version}", "virt-usb").out == version.strip(),
        "another version is installed",
    )


def newer(root, number):
    """Write another schema number into SQLite's header, and return the previous one."""
    with root.file(INVENTORY).open("r+b") as file:
        file.seek(60)
        before = int.from_bytes(file.read(4), "big")
        file.seek(60)
        file.write(number.to_bytes(4, "big"))
    return before


def older_is_refused(root):
    root.must("virt-usb", "discover", "--sim", "/packages/key.toml")
    schema = newer(root, 99)
    version = root.must("dpkg-query", "-W", "-f", "${Version}", "virt-usb").out
    said = root.refused("dpkg", "-i", "/packages/older.deb")
    for words in (
        "has schema 99, this package knows",
        "Nothing was changed",
        "install the one that wrote it",
    ):
        check(words in said.all, str(said))
    said = root.must("dpkg-query", "-W", "-f", "${Version} ${db:Status-Status}", "virt-usb")
    check(said.out == f"{version} installed", str(said))
    check(os.readlink(root.file(HOOK)) == PROGRAM, "the refusal removed the hook")
    # The remaining hook accepts guests without a request, and refuses others with a message.
    plain = re.sub(
        r"  <metadata>.*</metadata>\n", "", (EXAMPLES / "erp.xml").read_text(), flags=re.DOTALL
    ).replace(INSTANCE, INSTANCE[:-2] + "02")
    said = prepare(root, "plain", stdin=plain)
    check(said.status == 0 and not said.out, str(said))
    said = prepare(root, "erp")
    check(said.status == 1 and "or newer" in said.err, str(said))
    newer(root, schema)
    # With an unchanged schema, an older version can be installed.
    root.must("dpkg", "-i", "/packages/older.deb")
    root.must("dpkg", "-i", "/packages/virt-usb.deb")
    check([claim["instance_uuid"] for claim in claims(root)] == [INSTANCE], "the claim is gone")


def daemons(root):
    """Start a system bus and polkit."""
    root.apt("install", "libvirt-daemon-system", "libvirt-clients", "polkitd", "dbus")
    root.file("/run/dbus").mkdir(exist_ok=True)
    root.must("dbus-daemon", "--system", "--fork", "--nopidfile")
    polkitd = next(
        p for p in ("/usr/lib/polkit-1/polkitd", "/usr/libexec/polkitd") if root.file(p).exists()
    )
    # In the background, without output, which the command would wait for.
    root.must("sh", "-c", f"{polkitd} --no-debug < /dev/null > /run/polkitd.log 2>&1 &")


def libvirtd_stops(root):
    """Kill libvirtd: the orderly end of libvirtd 11.3 sometimes takes long."""
    ends(root, "/run/libvirtd.pid", "/run/libvirtd.log", signal="KILL")


def libvirtd(root, keys):
    root.file("/etc/libvirt/libvirtd.conf").write_text(keys)
    if root.file("/run/libvirtd.pid").exists():
        libvirtd_stops(root)
    # With its own network namespace, because it would create bridges.
    said = root.run(
        "sh", "-c", "unshare --net libvirtd --daemon < /dev/null > /run/libvirtd.log 2>&1"
    )
    if said.status:
        raise Failure(f"libvirtd does not start: {root.file('/run/libvirtd.log').read_text()}")
    for _ in range(600):
        if root.file("/run/libvirt/libvirt-sock").exists():
            return
        time.sleep(0.1)
    raise Failure(f"libvirtd does not start: {root.file('/run/libvirtd.log').read_text()}")


def virsh(root, *words, groups="--clear-groups"):
    """Run virsh as the agent's user."""
    return root.run(
        "setpriv",
        "--reuid",
        "virt-usb",
        "--regid",
        "virt-usb",
        groups,
        "virsh",
        "-q",
        "-c",
        "qemu:///system",
        *words,
    )


def until(root, holds):
    """Wait for a condition: polkit reads changed rules after some moments."""
    for _ in range(300):
        if holds():
            return
        time.sleep(0.2)
    raise Failure(f"timeout; the last command:\n{root.said[-1]}")


def polkit(root):
    """Check the rights of the agent's user with polkit and libvirtd. It needs no group."""
    daemons(root)
    rule = root.file("/usr/share/polkit-1/rules.d/50-virt-usb.rules")
    libvirtd(root, "")
    # polkit starts in the background, and may not respond yet.
    until(root, lambda: virsh(root, "list", "--all").status == 0)
    # Without the rule, libvirtd denies access, with and without the group in the process: polkit
    # looks groups up in the user database.
    away = rule.rename(rule.with_suffix(".away"))
    for groups in ("--clear-groups", "--groups=libvirt"):
        until(
            root,
            lambda: "authentication unavailable" in virsh(root, "list", "--all", groups=groups).err,
        )
    away.rename(rule)
    until(root, lambda: virsh(root, "list", "--all").status == 0)
    libvirtd(root, 'access_drivers = [ "polkit" ]\n')
    allowed = set(re.findall(r'"(org\.libvirt\.[a-z.-]+)"', rule.read_text()))
    root.must(
        "sh",
        "-c",
        "setpriv --reuid virt-usb --regid virt-usb --clear-groups "
        "sleep 600 < /dev/null > /dev/null 2>&1 & echo $! > /run/agent.pid",
    )
    agent = root.file("/run/agent.pid").read_text().strip()
    # Before exec, the process is root's shell.
    until(root, lambda: root.run("cat", f"/proc/{agent}/comm").out == "sleep\n")
    actions = set()
    for policy in root.file("/usr/share/polkit-1/actions").glob("org.libvirt.*.policy"):
        actions |= set(re.findall(r'<action id="([^"]+)"', policy.read_text()))
    check(allowed <= actions, f"libvirt does not know {allowed - actions}")
    check(len(actions) > 100, "libvirt's actions are missing")
    for action in sorted(actions):
        said = root.run("pkcheck", "--action-id", action, "--process", agent)
        check((said.status == 0) == (action in allowed), f"{action}:\n{said}")
    root.must("kill", agent)
    # The same through libvirtd.
    check(virsh(root, "list", "--all").status == 0, "the agent may not list guests")
    for words in (["net-list"], ["secret-list"], ["nodedev-list"], ["domcapabilities"]):
        said = virsh(root, *words)
        check("access denied" in said.err, f"{words}:\n{said}")
    libvirtd_stops(root)


def another_hook_stays(root):
    """Check that the package keeps a foreign file with the hook's name, and reports it."""
    root.file(HOOK).unlink()
    root.file(HOOK).write_text("#!/bin/sh\n")
    said = root.must("dpkg", "-i", "/packages/virt-usb.deb")
    check(f"ln -sf {PROGRAM} {HOOK}" in said.all, str(said))
    check(root.file(HOOK).read_text() == "#!/bin/sh\n", "it was overwritten")
    root.must("dpkg", "--remove", "virt-usb")
    check(root.file(HOOK).read_text() == "#!/bin/sh\n", "it was removed")
    root.file(HOOK).unlink()
    root.must("dpkg", "-i", "/packages/virt-usb.deb")
    check(os.readlink(root.file(HOOK)) == PROGRAM, "no hook")


def left(root):
    """All files with our name, except those that dpkg and others keep for any package."""
    found = root.must(
        "find",
        "/",
        "-xdev",
        "(",
        "-path",
        "/packages",
        "-o",
        "-path",
        "/proc",
        "-o",
        "-path",
        "/sys",
        ")",
        "-prune",
        "-o",
        "-name",
        "*virt-usb*",
        "-print",
    )
    kept = (
        "/var/lib/dpkg/",
        "/var/cache/apt/",
        "/var/lib/systemd/deb-systemd-helper",
        "/var/lib/apt/",
    )
    return sorted(path for path in found.out.split() if not path.startswith(kept))


def removed(root):
    # An agent leaves these files.
    for name in ("agent.lock", "hook.sock"):
        root.file(f"{STATE}/{name}").touch()
    root.file("/etc/libvirt/hooks/qemu.d/10-other").write_text("#!/bin/sh\n")
    root.must("apt-get", "-qq", "-y", "remove", "virt-usb")
    check(not os.path.lexists(root.file(HOOK)), "the hook is still called")
    check(root.file("/etc/libvirt/hooks/qemu.d/10-other").exists(), "the other hook is gone")
    root.file("/etc/libvirt/hooks/qemu.d/10-other").unlink()
    check(
        root.file(INVENTORY).exists() and root.file(CONFIG).read_text().startswith(OURS),
        "data or configuration is gone",
    )
    for name in ("agent.lock", "hook.sock"):
        check(
            not root.file(f"{STATE}/{name}").exists(),
            f"{name} is left: a hook would wait for an agent",
        )


def purged(root):
    root.must(
        "apt-get", "-qq", "-y", "install", "/packages/virt-usb.deb", "--no-install-recommends"
    )
    check([claim["instance_uuid"] for claim in claims(root)] == [INSTANCE], "the claim is gone")
    said = root.must("apt-get", "-qq", "-y", "purge", "virt-usb")
    check(f"rm -r {STATE} && userdel virt-usb" in said.all, str(said))
    check(root.file(INVENTORY).exists(), "the inventory is gone")
    check(left(root) == [STATE], f"left: {left(root)}")
    check(not root.file("/etc/libvirt/hooks/qemu.d").exists(), "an empty folder is left")


def again(root):
    root.apt("install", "/packages/virt-usb.deb")
    check(os.readlink(root.file(HOOK)) == PROGRAM, "no hook")
    is_enabled(root)
    check(not root.file(CONFIG).read_text().startswith(OURS), "the configuration is not new")
    check(
        [claim["instance_uuid"] for claim in claims(root)] == [INSTANCE],
        "the inventory has changed",
    )
    root.must("apt-get", "-qq", "-y", "purge", "virt-usb")
    root.must("sh", "-c", f"rm -r {STATE} && userdel virt-usb")
    check(left(root) == [], f"left: {left(root)}")


CASES = [
    ("apt installs the package with only its dependencies", installed),
    ("systemd accepts the units", units),
    ("the manual", pages),
    ("completions", completions),
    ("files for monitoring, and the rotation of the hook's log", monitoring),
    ("virt-usb discover on a recorded host", recorded_host),
    ("the installed hook claims a device", a_claim),
    ("a running guest gets a device", a_guest),
    ("an upgrade keeps the claim and the configuration", upgraded),
    ("a downgrade is refused if the inventory's schema is newer", older_is_refused),
    ("polkit grants the agent exactly the needed rights", polkit),
    ("the package's scripts follow no link that the agent's user plants", scripts_follow_no_link),
    ("a folder that contains files of another user keeps its owner", foreign_folder_is_left),
    ("a foreign hook with the same name stays", another_hook_stays),
    ("a removal leaves nothing of the hook", removed),
    ("a purge keeps only the data", purged),
    ("a new installation finds the data, and all of it can be removed", again),
]


def too_new(root):
    root.must("apt-get", "-qq", "update")
    # With -qq, apt does not name what is missing.
    refusal = root.refused(
        "apt-get", "-y", "--no-install-recommends", "install", "/packages/virt-usb.deb"
    )
    check("virt-usb : Depends:" in refusal.all, f"apt does not name what is missing:\n{refusal}")
    check(root.run("dpkg-query", "-W", "virt-usb").status != 0, "the package is partly installed")


# For a Debian that is older than the one on which the package was built.
OLDER = [("apt refuses a package that was built on a newer Debian", too_new)]
