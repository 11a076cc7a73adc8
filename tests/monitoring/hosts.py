"""The hosts, and the causes that raise and end the alert of each."""

from __future__ import annotations

import json
import subprocess
from typing import TYPE_CHECKING

from ports import reserve
from programs import Agent, Etcd, TestError, device, get, guest, until, uuid

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

# More guests than `MAX_SILENT_GUESTS` in supervised.rs allows to be silent.
HUNG_GUESTS = 14
ONE_TIME = """usb_white_list_switch = "on"
usb_passthrough_whitelist = [{ vendor = "0529", one_time_use = true }]
"""
KEYSTONE = """[keystone]
url = "http://127.0.0.1:{port}/v3"
user = "virt-usb"
user_domain = "Default"
project = "service"
project_domain = "Default"
password_file = "{password}"
"""
FLEET = """[fleet]
endpoints = ["{endpoint}"]
machine_id = "{machine_id}"
lease = 5
"""
CERTIFICATE = "virt_usb_api_certificate_expiry_timestamp_seconds"
EXPIRES = "VirtUsbCertificateExpiresSoon"
# No cause from outside raises this alert, because an agent has more workers than calls to libvirt.
# The alert shows a bug of the agent, and has only a unit test.
UNCAUSED = {"VirtUsbWorkersBusy"}


def certify(folder: Path, days: int) -> None:
    """Create a certificate for the API that expires after this number of days."""
    key, certificate, new = folder / "api.key", folder / "api.crt", folder / "api.new"
    if not key.exists():
        openssl("genpkey", "-algorithm", "ED25519", "-out", key)
    names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"]
    openssl("req", "-x509", "-key", key, *names, "-days", str(days), "-out", new)
    new.replace(certificate)


def openssl(*words: str | Path) -> None:
    """Run openssl, which must succeed."""
    done = subprocess.run(["openssl", *words], capture_output=True, text=True)
    if done.returncode:
        raise TestError(done.stderr)


class Hosts:
    """Create a host for each cause. A host with one cause must raise only that alert."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.etcd = Etcd(folder)
        self.well = Agent("compute-well", folder)
        self.down = Agent("compute-down", folder)
        self.lost = Agent("compute-lost", folder, self.elsewhere(folder))
        self.lost.simulation = None
        self.hung = Agent("compute-hung", folder)
        self.unplugged = Agent("compute-attach", folder)
        self.blind = Agent("compute-scan", folder)
        self.used = Agent("compute-used", folder, ONE_TIME)
        password = folder / "keystone.password"
        password.write_text("secret\n")
        password.chmod(0o600)
        keystone = KEYSTONE.format(port=reserve(), password=password)
        self.api = Agent("compute-api", folder, tables=keystone)
        machine_id = folder / "compute-fleet/machine-id"
        fleet = FLEET.format(endpoint=self.etcd.endpoint, machine_id=machine_id)
        self.fleet = Agent("compute-fleet", folder, tables=fleet)
        tls = f'api_certificate = "{folder}/api.crt"\napi_key = "{folder}/api.key"\n'
        self.tls = Agent("compute-tls", folder, tls)
        simulated = [self.well, self.down, self.hung, self.unplugged, self.blind, self.used]
        self.agents = [*simulated, self.api, self.fleet, self.tls]
        # Tokens of the API's users, by their hosts.
        self.tokens: dict[Agent, str] = {}
        # Cause of each alert: the host, a description, and the action.
        self.causes: dict[str, tuple[str, str, Callable[[], object]]] = {
            "VirtUsbAgentDown": (self.down.name, "the agent ends", self.down.end),
            "VirtUsbLibvirtDisconnected": (self.lost.name, "libvirt is unreachable", self.lose),
            "VirtUsbLibvirtUnanswered": (self.hung.name, "QEMUs hang", self.hang),
            "VirtUsbLibvirtBlocked": (self.hung.name, "too many QEMUs hang", str),
            "VirtUsbNoPass": (self.hung.name, "the agent sends no more requests to libvirt", str),
            "VirtUsbGuestProblems": (self.hung.name, "guests get no device", str),
            "VirtUsbAttachesFail": (self.unplugged.name, "a device cannot be read", self.spoil),
            "VirtUsbScansFail": (self.blind.name, "no device can be read", self.blind_it),
            "VirtUsbDeviceQuarantined": (self.used.name, "a one-time device was used", self.use),
            "VirtUsbApiErrors": (self.api.name, "Keystone does not answer", self.ask_keystone),
            "VirtUsbFleetDisconnected": (self.fleet.name, "etcd ends", self.etcd.end),
            EXPIRES: (self.tls.name, "the certificate ends in five days", self.expire),
        }

    @staticmethod
    def elsewhere(folder: Path) -> str:
        """A libvirt that does not exist."""
        return f'libvirt_uri = "qemu+unix:///system?socket={folder}/libvirt-sock"\n'

    def expected(self, not_served: set[str]) -> set[tuple[str, str]]:
        """All alerts that fire while all causes last."""
        found = {(alert, host) for alert, (host, _, _) in self.causes.items()}
        found.add(("VirtUsbGuestProblems", self.unplugged.name))
        return found - ({(EXPIRES, self.tls.name)} if CERTIFICATE in not_served else set())

    @staticmethod
    def skips(alert: str, not_served: set[str]) -> str:
        """Why an alert cannot fire; empty if it can."""
        if alert == EXPIRES and CERTIFICATE in not_served:
            return f"the agent does not serve {CERTIFICATE}"
        return ""

    def targets(self) -> dict[str, str]:
        """The address of each host's metrics."""
        return {agent.name: agent.metrics for agent in self.agents}

    def start(self) -> None:
        """Start all hosts without any cause."""
        certify(self.folder, 365)
        self.etcd.start()
        self.unplugged.show(device(1))
        for agent in self.agents:
            if agent is self.fleet:
                agent.virt_usb("discover", "--sim", str(agent.simulation))
                agent.virt_usb("fleet", "join")
            agent.start()
        connected = "virt_usb_fleet_connected"
        until("the fleet hears", lambda: self.fleet.values(connected) == [1], self.fleet.log)
        role = ["--project", "admin", "--role", "admin"]
        for agent in (self.well, self.api):
            made = agent.virt_usb("--json", "token", "add", "user", *role)
            self.tokens[agent] = json.loads(made)["token"]
        self.exercise()

    def exercise(self) -> None:
        """Increment counters on the first host: attach, detach, and call the hook."""
        self.well.show(device(1), device(2), guest(1), guest(2, flavor=None))
        self.allocated(self.well, 1)
        token = self.folder / "token"
        token.write_text(self.tokens[self.well])
        token.chmod(0o600)
        url = ["--url", f"http://{self.well.api}", "--token-file", str(token)]
        self.well.virt_usb(*url, "attach", "guest2", '{"serial":"S2"}')
        self.well.virt_usb(*url, "detach", "guest2", '{"serial":"S2"}')
        self.well.hook("plain")

    def users(self) -> None:
        """Send a request to each API that has a user."""
        for agent, token in self.tokens.items():
            get(f"http://{agent.api}/v2.1/os-usb-devices", {"X-Auth-Token": token})

    @staticmethod
    def allocated(agent: Agent, number: int) -> None:
        """Wait until a guest has its device."""

        def has() -> bool:
            claims = json.loads(agent.virt_usb("--json", "claims"))
            return (uuid(number), "allocated") in {(c["instance_uuid"], c["state"]) for c in claims}

        until(f"guest{number} has its device", has, agent.log)

    def lose(self) -> None:
        """Let libvirt be absent when the agent starts, or afterwards."""
        self.lost.start()
        self.agents.append(self.lost)

    def hang(self) -> None:
        """Start guests with a QEMU that does not respond."""
        numbers = range(1, HUNG_GUESTS + 1)
        self.hung.show(*map(device, numbers), *(guest(n, hangs=True) for n in numbers))

    def spoil(self) -> None:
        """Break a device after a guest has claimed it, and before the agent attaches it."""
        agent = self.unplugged
        agent.show(device(1), guest(1, locked=True))
        until("the guest has a claim", lambda: "guest1" in agent.virt_usb("claims"), agent.log)
        agent.show(device(1, unreadable=True), guest(1, locked=True))
        told = "could not be read: 1-2"
        until("the device is unreadable", lambda: told in agent.printed(), agent.log)
        agent.show(device(1, unreadable=True), guest(1))

    def blind_it(self) -> None:
        """Make all devices unreadable."""
        self.blind.show("[[device")

    def use(self) -> None:
        """Let a guest use a device and end."""
        self.used.show(device(1), guest(1))
        self.allocated(self.used, 1)
        self.used.show(device(1), guest(1, running=False))

    def ask_keystone(self) -> None:
        """Call the API as a user of Keystone."""
        self.tokens[self.api] = "a-token-of-keystone"

    def expire(self) -> None:
        """Replace the certificate."""
        certify(self.folder, 5)

    def heal(self) -> None:
        """End all causes as the runbook describes."""
        self.down.start()
        # This test has no libvirt that could return.
        self.agents.remove(self.lost)
        self.lost.end()
        numbers = range(1, HUNG_GUESTS + 1)
        self.hung.show(*map(device, numbers), *map(guest, numbers))
        self.unplugged.show(device(1), guest(1))
        self.blind.show(device(1))
        self.used.virt_usb("quarantine", "clear", "1")
        del self.tokens[self.api]
        self.etcd.start()
        certify(self.folder, 365)
