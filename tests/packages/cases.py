"""What is shown, in this order: each case begins where the one before ended."""

import json
import os
import re
import shutil
import stat
import subprocess
import time

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
    # Built with a lower version: what is upgraded later.
    repack(root.package, root.packages / "older.deb", "0.0.1")
    said = root.apt("install", "/packages/older.deb")
    check("'systemctl reload'" in said.all, f"it does not say what to reload:\n{said}")
    check(os.readlink(root.file(HOOK)) == PROGRAM, "the hook is no link to the program")
    for program in ("virt-usb", "virt-usbd", PROGRAM):
        root.must(program, "--version")
    said = root.must(HOOK, "--version")
    check(said.out.startswith("virt-usb-hook "), str(said))
    root.must("getent", "passwd", "virt-usb")
    said = root.must("id", "-nG", "virt-usb")
    check(said.out.split() == ["virt-usb"], f"groups that nobody asked for: {said.out}")
    said = root.must("stat", "-c", "%U %G %a", STATE)
    check(said.out == "virt-usb virt-usb 750\n", str(said))
    check(not root.file(INVENTORY).exists(), "an inventory was made that nobody asked for")


def is_enabled(root):
    link = root.file("/etc/systemd/system/multi-user.target.wants/virt-usbd.service")
    check(link.is_symlink(), "the agent would not start with the machine")


def units(root):
    is_enabled(root)
    scheduler = root.file("/etc/systemd/system/multi-user.target.wants/virt-usb-scheduler.service")
    check(
        not scheduler.is_symlink(), "a scheduler would start with the machine that nobody asked for"
    )
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
    """Files for Prometheus and Grafana, and a folder for the hook's log that logrotate knows."""
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
    """libusb of this Debian finds the devices of the recorded host."""
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
    """What has to outlive an upgrade."""
    shutil.copy(EXAMPLES / "key.toml", root.packages)
    config = root.file(CONFIG)
    text = config.read_text()
    check('sysfs_root = "/sys"' in text, "the configuration is not the example")
    config.write_text(OURS + text.replace('sysfs_root = "/sys"', 'sysfs_root = "/packages/sys"'))
    root.must("virt-usb", "discover", "--sim", "/packages/key.toml", "--sysfs-out", "/packages/sys")
    # Other checks miss libvirt.
    found = json.loads(root.run("virt-usb", "doctor", "--all", "--json").out)
    levels = {
        finding["level"]
        for finding in found
        if finding["check"] in ("hook", "configuration", "inventory")
    }
    check(levels == {"ok"}, str(found))
    said = root.must("stat", "-c", "%U %G %a", INVENTORY)
    check(said.out == "virt-usb virt-usb 640\n", f"the agent could not open what root made: {said}")
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
    """With devices and guests of a file; as its unit would have it otherwise."""
    command = "setpriv --reuid virt-usb --regid virt-usb --clear-groups virt-usbd --config /packages/agent.toml --sim /packages/host.toml"
    root.must("sh", "-c", f"{command} < /dev/null > /run/agent.log 2>&1 & echo $! > /run/agent.pid")
    for _ in range(600):
        if "ready" in root.file("/run/agent.log").read_text():
            return
        time.sleep(0.1)
    raise Failure(f"the agent does not start:\n{root.file('/run/agent.log').read_text()}")


def ends(root, file, log, signal="TERM"):
    """Ends the program whose process id is in a file, and waits until it has."""
    pid = root.file(file).read_text().strip()
    root.must("kill", f"-{signal}", pid)
    for _ in range(600):
        # Nobody waits for what was left alone: it stays as a zombie. Its first thread is one before the
        # others have ended, and until then the process has its files and their locks.
        if root.run(
            "sh", "-c", f"cat /proc/{pid}/task/*/status 2> /dev/null | grep -q '^State:.[^ZX]'"
        ).status:
            return
        time.sleep(0.1)
    raise Failure(f"{pid} does not end:\n{root.file(log).read_text()}")


def agent_stops(root):
    ends(root, "/run/agent.pid", "/run/agent.log")


def held(root):
    """Which claim the simulated guest has, once its device is in it. A simulated guest lives in its agent, and gets its device from each anew:
    the claim is what outlives it. Real guests over a restart are tests/live's."""
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
    """One that runs with its device while the package is upgraded."""
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
    check(claims(root) == before, "the claims are others")
    check(os.readlink(root.file(HOOK)) == PROGRAM, "the hook is no link to the program")
    check("restart" not in said.all, f"it speaks of a restart:\n{said}")
    checked = root.must("virt-usb", "store", "check").out
    check("no problems found" in checked, "the inventory is damaged")
    check(prepare(root, "erp").status == 0, "the guest that has the device is refused")
    # What postinst does where systemd runs.
    agent_stops(root)
    agent_starts(root)
    check(held(root) == guest, "the guest that runs has another claim")
    agent_stops(root)
    version = subprocess.run(
        ["dpkg-deb", "-f", root.package, "Version"], capture_output=True, text=True, check=True
    ).stdout
    check(
        root.must("dpkg-query", "-W", "-f", "${Version}", "virt-usb").out == version.strip(),
        "another version is there",
    )


def newer(root, number):
    """Another schema's number, written where SQLite has it."""
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
    check(os.readlink(root.file(HOOK)) == PROGRAM, "the refusal took the hook away")
    # The hook that is left: who asks for nothing passes, who asks is told.
    plain = re.sub(
        r"  <metadata>.*</metadata>\n", "", (EXAMPLES / "erp.xml").read_text(), flags=re.DOTALL
    ).replace(INSTANCE, INSTANCE[:-2] + "02")
    said = prepare(root, "plain", stdin=plain)
    check(said.status == 0 and not said.out, str(said))
    said = prepare(root, "erp")
    check(said.status == 1 and "or newer" in said.err, str(said))
    newer(root, schema)
    # Where nothing has changed in the inventory an older version may come back.
    root.must("dpkg", "-i", "/packages/older.deb")
    root.must("dpkg", "-i", "/packages/virt-usb.deb")
    check([claim["instance_uuid"] for claim in claims(root)] == [INSTANCE], "the claim is gone")


def daemons(root):
    """A system bus, polkit and libvirtd, as the machine would have them."""
    root.apt("install", "libvirt-daemon-system", "libvirt-clients", "polkitd", "dbus")
    root.file("/run/dbus").mkdir(exist_ok=True)
    root.must("dbus-daemon", "--system", "--fork", "--nopidfile")
    polkitd = next(
        p for p in ("/usr/lib/polkit-1/polkitd", "/usr/libexec/polkitd") if root.file(p).exists()
    )
    # In the background, with no output that would be waited for.
    root.must("sh", "-c", f"{polkitd} --no-debug < /dev/null > /run/polkitd.log 2>&1 &")


def libvirtd_stops(root):
    """libvirtd 11.3 sometimes takes longer over an orderly end than is worth waiting for; nothing of it is needed."""
    ends(root, "/run/libvirtd.pid", "/run/libvirtd.log", signal="KILL")


def libvirtd(root, keys):
    root.file("/etc/libvirt/libvirtd.conf").write_text(keys)
    if root.file("/run/libvirtd.pid").exists():
        libvirtd_stops(root)
    # With a network of its own: it would make bridges.
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
    """As the agent's user asks."""
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
    """polkit reads its rules anew some moments after they have changed."""
    for _ in range(300):
        if holds():
            return
        time.sleep(0.2)
    raise Failure(f"it does not come to that:\n{root.said[-1]}")


def polkit(root):
    """polkit and libvirtd themselves say what the agent's user may do, and that it needs no group for it."""
    daemons(root)
    rule = root.file("/usr/share/polkit-1/rules.d/50-virt-usb.rules")
    libvirtd(root, "")
    # polkit is started in the background: it may not answer yet.
    until(root, lambda: virsh(root, "list", "--all").status == 0)
    # Without the rule it would not be, with the group in its process or without it: polkit looks into the user database.
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
        "setpriv --reuid virt-usb --regid virt-usb --clear-groups sleep 600 < /dev/null > /dev/null 2>&1 & echo $! > /run/agent.pid",
    )
    agent = root.file("/run/agent.pid").read_text().strip()
    # Before, it is root's shell.
    until(root, lambda: root.run("cat", f"/proc/{agent}/comm").out == "sleep\n")
    actions = set()
    for policy in root.file("/usr/share/polkit-1/actions").glob("org.libvirt.*.policy"):
        actions |= set(re.findall(r'<action id="([^"]+)"', policy.read_text()))
    check(allowed <= actions, f"libvirt knows no {allowed - actions}")
    check(len(actions) > 100, "libvirt's actions are not there")
    for action in sorted(actions):
        said = root.run("pkcheck", "--action-id", action, "--process", agent)
        check((said.status == 0) == (action in allowed), f"{action}:\n{said}")
    root.must("kill", agent)
    # As libvirtd asks it.
    check(virsh(root, "list", "--all").status == 0, "the agent may not list guests")
    for words in (["net-list"], ["secret-list"], ["nodedev-list"], ["domcapabilities"]):
        said = virsh(root, *words)
        check("access denied" in said.err, f"{words}:\n{said}")
    libvirtd_stops(root)


def another_hook_stays(root):
    """A file of that name which is somebody else's is left alone, and said."""
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
    """All that has our name, but for what dpkg and others keep of any package."""
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
    # As an agent would have left them.
    for name in ("agent.lock", "hook.sock"):
        root.file(f"{STATE}/{name}").touch()
    root.file("/etc/libvirt/hooks/qemu.d/10-other").write_text("#!/bin/sh\n")
    root.must("apt-get", "-qq", "-y", "remove", "virt-usb")
    check(not os.path.lexists(root.file(HOOK)), "the hook is still called")
    check(root.file("/etc/libvirt/hooks/qemu.d/10-other").exists(), "another's hook is gone")
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
    check(not root.file(CONFIG).read_text().startswith(OURS), "the configuration is not a new one")
    check(
        [claim["instance_uuid"] for claim in claims(root)] == [INSTANCE], "the inventory is another"
    )
    root.must("apt-get", "-qq", "-y", "purge", "virt-usb")
    root.must("sh", "-c", f"rm -r {STATE} && userdel virt-usb")
    check(left(root) == [], f"left: {left(root)}")


CASES = [
    ("installed with apt, beside nothing but what it depends on", installed),
    ("systemd likes the unit", units),
    ("the manual", pages),
    ("completions", completions),
    ("monitoring, and the rotation of the hook's log", monitoring),
    ("discover on a recorded host", recorded_host),
    ("a claim, by the hook that libvirt would call", a_claim),
    ("a guest that runs", a_guest),
    ("upgraded, with the claim and the configuration kept", upgraded),
    ("an older package is refused on a newer inventory", older_is_refused),
    ("polkit lets the agent do what it has to, and no more", polkit),
    ("another's hook of that name stays", another_hook_stays),
    ("removed, without a trace of the hook", removed),
    ("purged but for the data", purged),
    ("installed again, and removed with the data", again),
]


def too_new(root):
    root.must("apt-get", "-qq", "update")
    # With -qq apt does not say what is missing.
    refusal = root.refused(
        "apt-get", "-y", "--no-install-recommends", "install", "/packages/virt-usb.deb"
    )
    check("virt-usb : Depends:" in refusal.all, f"apt does not name what is missing:\n{refusal}")
    check(root.run("dpkg-query", "-W", "virt-usb").status != 0, "a part of the package is there")


# Where the Debian is older than the one that the package was built on.
OLDER = [("a package that was built on a newer Debian is refused as a whole", too_new)]
