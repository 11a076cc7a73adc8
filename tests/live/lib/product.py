"""The programs under test, installed and used as an operator does."""

import json
import os
import shutil
import signal
import subprocess
from pathlib import Path

from .shell import Failure, must, run
from .waiting import until

HOOKS = Path("/etc/libvirt/hooks/qemu.d")
CONFIG = Path("/etc/virt-usb/config.toml")
LOGS = Path("/var/log/virt-usb")
HOOK_LOG = LOGS / "hook.log"
AGENT_LOG = LOGS / "agent.log"
STATE = Path("/var/lib/virt-usb")
AGENT = Path("/usr/sbin/virt-usbd")
USER = "virt-usb"
# The agent's timeouts, in seconds. A case that tests the defaults sets these to None.
SHORT_WAITS = {"absent_grace": 3, "undefined_grace": 6, "recheck_delay": 2}


class Product:
    def __init__(self, repo):
        self.repo = Path(repo)
        self.agent = Agent()

    def install(self):
        must(self.repo / "install/hook", timeout=120)
        must(self.repo / "install/agent", timeout=120)
        if run("getent", "passwd", USER, quiet=True).status:
            must("useradd", "--system", "--no-create-home", "--shell", "/usr/sbin/nologin", USER)
        # This libvirtd checks the group and does not use polkit.
        must("usermod", "--append", "--groups", "libvirt", USER)
        self._clear_logs()

    def remove(self):
        """Remove everything, whether it was installed from the build or from a package."""
        if run("dpkg-query", "-W", "virt-usb", quiet=True).ok:
            must("dpkg", "--no-triggers", "--purge", "virt-usb")
        else:
            must(self.repo / "install/agent", "--remove")
            must(self.repo / "install/hook", "--remove")
        for folder in (CONFIG.parent, STATE):
            shutil.rmtree(folder, ignore_errors=True)
        run("userdel", USER)
        self._clear_logs()

    def fresh(self):
        """Create an empty inventory and the default configuration."""
        self.agent.stop()
        self.agent = Agent()
        shutil.rmtree(STATE, ignore_errors=True)
        STATE.mkdir(mode=0o750)
        shutil.chown(STATE, USER, USER)
        self._clear_logs()
        self.configure()

    @staticmethod
    def _clear_logs():
        # Purging the package removes the folder.
        LOGS.mkdir(parents=True, exist_ok=True)
        LOGS.chmod(0o1777)
        for log in (HOOK_LOG, AGENT_LOG):
            log.write_text("")
            log.chmod(0o666)

    def configure(self, **keys):
        """Write the configuration: these keys, and shorter timeouts. None means the default."""
        keys = {"log": str(HOOK_LOG)} | SHORT_WAITS | keys
        CONFIG.write_text(
            "".join(f"{key} = {toml(value)}\n" for key, value in keys.items() if value is not None)
        )

    def __call__(self, *words, timeout=60, quiet=False):
        return run("virt-usb", *words, timeout=timeout, quiet=quiet)

    def must(self, *words, timeout=60):
        return must("virt-usb", *words, timeout=timeout)

    def discover(self, *words):
        return self.must("discover", *words)

    def devices(self):
        """All devices of the inventory, including unplugged ones."""
        return self._json("devices", "--all")

    def claims(self):
        return self._json("claims")

    def events(self):
        return self._json("events", "--limit", "0")

    def _json(self, *words):
        answer = run("virt-usb", *words, "--json", quiet=True)
        if not answer.ok:
            raise Failure(f"a program failed:\n{answer}")
        return json.loads(answer.out)

    def device(self, **fields):
        """The only present device with these values: device(serial="SN0")."""
        rows = [
            d
            for d in self.devices()
            if not d["deleted"] and all(d[key] == value for key, value in fields.items())
        ]
        if len(rows) != 1:
            raise Failure(f"wanted one device with {fields}, found {len(rows)}: {rows}")
        return rows[0]

    def claims_of(self, guest):
        return [c for c in self.claims() if c["instance_uuid"] == guest.uuid]

    def hook_calls(self, domain=None):
        """The hook's records: (domain, operation, outcome)."""
        records = [json.loads(line) for line in HOOK_LOG.read_text().splitlines()]
        return [
            (r["domain"], r["operation"], r["outcome"])
            for r in records
            if domain in (None, r["domain"])
        ]

    def operations(self, domain):
        return [operation for _, operation, _ in self.hook_calls(domain)]


class Agent:
    """virt-usbd as its own user. `prefix` is a command that enters another host's namespaces."""

    def __init__(self, prefix=()):
        self.prefix = tuple(prefix)
        self.process = None
        # Size of the log when the agent started.
        self.before = 0

    def command(self):
        return ["setpriv", "--reuid", USER, "--regid", USER, "--init-groups", AGENT]

    def start(self):
        with open(AGENT_LOG, "a", encoding="utf-8") as log:
            self.before = log.tell()
            self.process = subprocess.Popen(
                [*self.prefix, *self.command()], stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        until(self.is_ready, "the agent to be ready")

    def is_ready(self):
        self.must_run()
        # The agent logs this after its first scan, when hooks and the API can reach it.
        return any(
            line.endswith(b" ready") for line in AGENT_LOG.read_bytes()[self.before :].splitlines()
        )

    def log(self):
        """The agent's log since its start."""
        return AGENT_LOG.read_bytes()[self.before :].decode(errors="replace")

    def is_running(self):
        return self.process is not None and self.process.poll() is None

    def must_run(self):
        if not self.is_running():
            raise Failure(f"the agent {self.state()}:\n{AGENT_LOG.read_text()[-3000:]}")

    def state(self):
        if self.process is None:
            return "was not started"
        return "runs" if self.is_running() else f"ended with status {self.process.returncode}"

    def threads(self):
        """The kernel stack of each thread."""
        tasks = (
            sorted(Path(f"/proc/{self.process.pid}/task").glob("*")) if self.is_running() else []
        )
        try:
            return [
                f"{(task / 'comm').read_text().strip()}: "
                f"{(task / 'stack').read_text().splitlines()[:6]}"
                for task in tasks
            ]
        except OSError as gone:
            return [str(gone)]

    def kill(self, how=signal.SIGKILL):
        if self.is_running():
            os.kill(self.process.pid, how)
            self.process.wait(20)

    def stop(self):
        self.kill(signal.SIGTERM)


def toml(value):
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        return "[" + ", ".join(toml(item) for item in value) + "]"
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {toml(item)}" for key, item in value.items()) + " }"
    return json.dumps(value)
