"""The agent, with simulated devices and guests, and its API on 127.0.0.1."""

from __future__ import annotations

import http.client
import json
import os
import re
import socket
import subprocess
from pathlib import Path
from typing import Any

import ports

from local import TIMEOUT_SECONDS, end_with_parent, until

ROOT = Path(__file__).resolve().parents[2]
# Two devices of different kinds.
DEVICES = """\
[[device]]
vendor = "0529"
product = "0001"
bus = 1
device = 5
port = "1-1"
serial = "S1"
product_name = "HASP HL"

[[device]]
vendor = "096e"
product = "0006"
bus = 1
device = 6
port = "1-2"
serial = "S2"
product_name = "SafeNet"
"""


def program(name: str) -> str:
    """The path of a program of the release build."""
    path = ROOT / "target/release" / name
    if not path.exists():
        raise SystemExit(f"there is no {path}: run 'make build'")
    return str(path)


class Local(http.client.HTTPConnection):
    """Over a unix socket."""

    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=TIMEOUT_SECONDS)
        self.path = str(path)

    def connect(self) -> None:
        """Connect to the unix socket."""
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(TIMEOUT_SECONDS)
        self.sock.connect(self.path)


class Answer:
    """A response of the API."""

    def __init__(self, response: http.client.HTTPResponse) -> None:
        self.status, self.headers = response.status, response.headers
        text = response.read()
        self.json: Any = json.loads(text) if text else None

    def __repr__(self) -> str:
        return f"{self.status} {self.json}"

    def fault(self) -> str:
        """The message of an error response."""
        (told,) = self.json.values()
        return str(told["message"])


class Agent:
    """An agent in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = folder / "config.toml"
        self.child: subprocess.Popen[bytes] | None = None

    def make(self, keystone: dict[str, str | int]) -> None:
        """Create the folder and the configuration, with a table `[keystone]` if there are keys."""
        self.folder.mkdir(exist_ok=True)
        port = self.folder / "port"
        if not port.exists():
            port.write_text(str(ports.reserve()))
        lines = [
            f'state_dir = "{self.folder}/state"',
            f'api = "127.0.0.1:{port.read_text()}"',
            f'log = "{self.folder}/hook.log"',
        ]
        lines += ["[keystone]"] * bool(keystone)
        lines += [f"{key} = {json.dumps(value)}" for key, value in keystone.items()]
        self.config.write_text("\n".join(lines) + "\n")
        if not (self.folder / "sim.toml").exists():
            self.write_domains([])

    @property
    def port(self) -> int:
        """The port of its API."""
        return int((self.folder / "port").read_text())

    @property
    def url(self) -> str:
        """The URL of its API for Keystone's catalogue."""
        return f"http://127.0.0.1:{self.port}/v2.1"

    def write_domains(self, domains: list[dict[str, Any]]) -> None:
        """Set the simulated domains. The file is replaced in one step."""
        tables = [
            "[[domain]]\n"
            + "".join(
                f"{key} = {json.dumps(value)}\n" for key, value in one.items() if value is not None
            )
            for one in domains
        ]
        new = self.folder / "sim.new"
        new.write_text("\n".join([DEVICES, *tables]))
        new.rename(self.folder / "sim.toml")

    def start(self) -> None:
        """Start the agent and wait until it has its devices."""
        command = [
            program("virt-usbd"),
            "--config",
            str(self.config),
            "--sim",
            str(self.folder / "sim.toml"),
        ]
        log = self.folder / "agent.log"
        with log.open("ab") as to:
            self.child = subprocess.Popen(command, stdout=to, stderr=to, preexec_fn=end_with_parent)
        until(self._has_its_devices, self.log)

    def _has_its_devices(self) -> bool:
        try:
            return len(self.local("GET", "os-usb-devices")["usb_devices"]) == DEVICES.count(
                "[[device]]"
            )
        except (OSError, http.client.HTTPException):
            return False

    def stop(self) -> None:
        """End the agent."""
        if self.child is not None:
            self.child.terminate()
            self.child.wait()
            self.child = None

    def log(self) -> str:
        """The agent's log, without colours."""
        text = (self.folder / "agent.log").read_text()
        return re.sub(r"\x1b\[[0-9;]*m", "", text)

    def local(self, method: str, path: str, body: Any = None) -> Any:
        """Send a request through its socket, as an administrator."""
        answer = self._ask(Local(self.folder / "state/api.sock"), {}, method, f"/v3/{path}", body)
        assert answer.status < 300, answer
        return answer.json

    def servers(self) -> dict[str, str]:
        """The status of each guest, by its name."""
        return {one["name"]: one["status"] for one in self.local("GET", "servers")["servers"]}

    def ask(self, token: str, method: str, path: str, body: Any = None) -> Answer:
        """Send a request with this token."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=TIMEOUT_SECONDS)
        return self._ask(
            connection,
            {"X-Auth-Token": token},
            method,
            path if path.startswith("/") else f"/v3/{path}",
            body,
        )

    @staticmethod
    def _ask(
        connection: http.client.HTTPConnection,
        headers: dict[str, str],
        method: str,
        path: str,
        body: Any,
    ) -> Answer:
        sent = None if body is None else json.dumps(body)
        if sent is not None:
            headers = {**headers, "Content-Type": "application/json"}
        try:
            connection.request(method, path, sent, headers)
            return Answer(connection.getresponse())
        finally:
            connection.close()

    def virt_usb(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run virt-usb on this host."""
        command = [program("virt-usb"), "--config", str(self.config), *arguments]
        return subprocess.run(
            command,
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "NO_COLOR": "1"},
        )
