"""The programs of this test, each in its own folder: agents, etcd, Prometheus."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from http.client import HTTPException
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ports import reserve

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

REPO = Path(__file__).resolve().parents[2]
BIN = REPO / "target/release"
# Timeout of a condition, in seconds. Only a failure takes that long.
TIMEOUT_SECONDS = 300
KINDS = {"vendor": "0529", "product": "0001"}


class TestError(Exception):
    """The failure of a test. The text is the reason."""


def until(what: str, look: Callable[[], Any], why: Callable[[], str] = str) -> Any:
    """Poll until `look` returns a true value, and return it."""
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while not (found := look()):
        if time.monotonic() > deadline:
            raise TestError(f"timeout: waited until {what}\n{why()}")
        time.sleep(0.2)
    return found


def get(url: str, headers: dict[str, str] | None = None) -> tuple[int, str]:
    """The status and the body of a response; status 0 if there is none."""
    request = urllib.request.Request(url, headers=headers or {})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()
    except (OSError, HTTPException) as error:
        return 0, str(error)


class Program:
    """A program that runs until the test ends it."""

    running: list[Program] = []  # noqa: RUF012 -- processes that end with this test

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.folder = name, folder
        self.log_file = folder / f"{name}.log"
        self.process: subprocess.Popen[bytes] | None = None

    def spawn(self, command: Iterable[str | Path]) -> None:
        """Start it. Its output goes to its log."""
        with self.log_file.open("ab") as log:
            # The kernel ends the program when this test ends for any reason.
            words = ["setpriv", "--pdeathsig", "KILL", *(str(word) for word in command)]
            self.process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        Program.running.append(self)

    def printed(self) -> str:
        """The output of the program."""
        return self.log_file.read_text(errors="replace") if self.log_file.exists() else ""

    def log(self) -> str:
        """The end of its output, for the report of a failure."""
        return "".join(f"{self.name}: {line}\n" for line in self.printed().splitlines()[-20:])

    def is_running(self) -> bool:
        """Whether it still runs."""
        return self.process is not None and self.process.poll() is None

    def end(self, how: signal.Signals = signal.SIGTERM) -> None:
        """End it, and wait for its end."""
        if self.process is not None:
            self.process.send_signal(how)
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
            Program.running.remove(self)
            self.process = None

    @staticmethod
    def end_all() -> None:
        """End all programs."""
        for program in Program.running[:]:
            program.end(signal.SIGKILL)


def lines(keys: dict[str, object]) -> str:
    """Keys of a TOML table. A key without a value is left out."""
    there = ((key, value) for key, value in keys.items() if value is not None)
    return "".join(f"{key} = {json.dumps(value)}\n" for key, value in there)


def device(number: int, **more: object) -> str:
    """An entry of the simulation file."""
    place = {"bus": 1, "device": number + 1, "port": f"1-{number + 1}", "serial": f"S{number}"}
    keys = KINDS | place | more
    return "[[device]]\n" + lines(keys)


def uuid(number: int) -> str:
    """The UUID of a guest."""
    return f"{number:08}-2222-4333-8444-555555555555"


def flavor(number: int) -> str:
    """A flavor that requests the device with this number."""
    return json.dumps({"usb_devices": [{"serial": f"S{number}"}]})


def guest(number: int, **more: object) -> str:
    """A guest that requests the device with its number."""
    keys = {"name": f"guest{number}", "uuid": uuid(number), "flavor": flavor(number)} | more
    return "[[domain]]\n" + lines(keys)


class Agent(Program):
    """A host with its agent. Devices and guests are simulated."""

    def __init__(self, name: str, folder: Path, keys: str = "", tables: str = "") -> None:
        super().__init__(name, folder / name)
        kernel = self.folder / "proc/sys/kernel"
        (kernel / "random").mkdir(parents=True)
        (kernel / "hostname").write_text(f"{name}\n")
        (kernel / "random/boot_id").write_text("11111111-1111-4111-8111-111111111111\n")
        (self.folder / "proc/uptime").write_text("1000.00 1000.00\n")
        (self.folder / "machine-id").write_text(f"{name.encode().hex():0<32.32}\n")
        (self.folder / "sys").mkdir()
        self.metrics, self.api = f"127.0.0.1:{reserve()}", f"127.0.0.1:{reserve()}"
        self.config = self.folder / "config.toml"
        paths = {"state_dir": "state", "procfs_root": "proc", "sysfs_root": "sys"}
        paths["log"] = "hook.log"
        text = "".join(f'{key} = "{self.folder / path}"\n' for key, path in paths.items())
        text += f'metrics = "{self.metrics}"\n'
        text += "scan_interval = 4\nabsent_grace = 1\nlibvirt_timeout = 6\n"
        if "api = " not in keys:
            text += f'api = "{self.api}"\n'
        self.config.write_text(text + keys + "\n" + tables)
        self.simulation: Path | None = self.folder / "sim.toml"
        self.show()

    def show(self, *entries: str) -> None:
        """Set the simulated devices and guests."""
        if self.simulation is not None:
            new = self.simulation.with_suffix(".new")
            new.write_text("\n".join(entries))
            new.replace(self.simulation)

    def start(self) -> None:
        """Start the agent, and wait until it is ready."""
        simulated = [] if self.simulation is None else ["--sim", str(self.simulation)]
        self.spawn([BIN / "virt-usbd", "--config", self.config, *simulated])

        def ready() -> bool:
            served = self.values("virt_usb_last_pass_timestamp_seconds")
            return not self.is_running() or bool(served and " ready" in self.printed())

        until(f"the agent of {self.name} is ready", ready, self.log)
        if not self.is_running():
            raise TestError(f"the agent of {self.name} has ended\n{self.log()}")

    def virt_usb(self, *words: str) -> str:
        """Run virt-usb on this host, and return its output."""
        command = [str(BIN / "virt-usb"), "--config", str(self.config), *words]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise TestError(f"virt-usb {' '.join(words)}: {done.stderr}\n{self.log()}")
        return done.stdout

    def hook(self, domain: str) -> None:
        """Call the hook for the start of a domain without a request."""
        xml = f"<domain type='qemu'><name>{domain}</name><uuid>{uuid(99)}</uuid></domain>"
        command = [str(BIN / "virt-usb-hook"), "--config", str(self.config)]
        command += [domain, "prepare", "begin", "-"]
        done = subprocess.run(command, input=xml, capture_output=True, text=True)
        if done.returncode:
            raise TestError(f"the hook: {done.stderr}")

    def text(self) -> str:
        """The text of all metrics."""
        return get(f"http://{self.metrics}/metrics")[1]

    def values(self, series: str) -> list[float]:
        """The values of the series with this prefix."""
        lines = self.text().splitlines()
        return [float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(series)]


class Etcd(Program):
    """An etcd with one member."""

    def __init__(self, folder: Path) -> None:
        super().__init__("etcd", folder / "etcd")
        self.folder.mkdir()
        self.endpoint, self.peer = (f"http://127.0.0.1:{reserve()}" for _ in range(2))

    def start(self) -> None:
        """Start it, and wait until it responds."""
        client = ["--listen-client-urls", self.endpoint, "--advertise-client-urls", self.endpoint]
        peer = ["--listen-peer-urls", self.peer, "--initial-advertise-peer-urls", self.peer]
        name = ["--name", "one", "--initial-cluster", f"one={self.peer}"]
        self.spawn(["etcd", "--data-dir", self.folder / "data", *client, *peer, *name])
        until("etcd answers", lambda: "true" in get(f"{self.endpoint}/health")[1], self.log)


class Prometheus(Program):
    """Prometheus with one job. A test can change its targets while it runs."""

    def __init__(self, folder: Path, rules: str) -> None:
        super().__init__("prometheus", folder / "prometheus")
        self.folder.mkdir()
        self.url = f"http://127.0.0.1:{reserve()}"
        self.targets = self.folder / "targets.json"
        self.scrape({})
        (self.folder / "rules.yml").write_text(rules)
        (self.folder / "prometheus.yml").write_text(
            "global: {scrape_interval: 2s, scrape_timeout: 2s, evaluation_interval: 2s}\n"
            "rule_files: [rules.yml]\n"
            "scrape_configs:\n"
            "  - job_name: virt-usb\n"
            f"    file_sd_configs: [{{files: [{self.targets.name}], refresh_interval: 2s}}]\n"
        )

    def start(self) -> None:
        """Start it, and wait until it responds."""
        program = shutil.which("prometheus")
        if program is None:
            raise TestError("prometheus is missing: run 'make test-deps'")
        listen = self.url.removeprefix("http://")
        config, data = self.folder / "prometheus.yml", self.folder / "data"
        self.spawn(
            [program, f"--config.file={config}", f"--web.listen-address={listen}",
             f"--storage.tsdb.path={data}", "--log.level=warn"]
        )  # fmt: skip
        until("Prometheus is ready", lambda: get(f"{self.url}/-/ready")[0] == 200, self.log)

    def scrape(self, targets: dict[str, str]) -> None:
        """Set the targets: the names of hosts, and the addresses of their metrics."""
        groups = [{"targets": [at], "labels": {"instance": name}} for name, at in targets.items()]
        new = self.targets.with_suffix(".new")
        new.write_text(json.dumps(groups))
        os.replace(new, self.targets)

    def ask(self, path: str, **parameters: str) -> Any:
        """The data of a response of its API."""
        url = f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        status, text = get(url)
        if status != 200:
            raise TestError(f"Prometheus answers {status} to {path} {parameters}: {text}")
        answer = json.loads(text)
        if answer["status"] != "success":
            raise TestError(f"Prometheus answers to {path} {parameters}: {answer}")
        return answer["data"]

    def firing(self) -> list[dict[str, Any]]:
        """The alerts that fire."""
        return [alert for alert in self.ask("alerts")["alerts"] if alert["state"] == "firing"]
