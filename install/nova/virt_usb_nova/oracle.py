"""Who is asked which hosts can serve: the filter in this process, or `virt-usb scheduler`."""

from __future__ import annotations

import http.client
import json
import logging
import os
import socket
import threading
from typing import Any, Protocol
from urllib.parse import urlsplit

from virt_usb_nova import inventory, wasm
from virt_usb_nova.wasm import Broken, Question, Refused

LOG = logging.getLogger(__name__)


class Stale(RuntimeError):
    """What is known of the hosts is too old, or nothing is known: never "no host"."""


class Oracle(Protocol):
    """Answers about candidates; each call raises Stale, Refused (the question is wrong) or Broken."""

    def able(self, question: Question, candidates: list[str]) -> set[str]:
        """Those that can serve."""

    def scores(self, question: Question, candidates: list[str]) -> dict[str, int]:
        """The same, with how well."""

    def best(self, question: Question, limit: int) -> list[str]:
        """So many at most that can serve, of all hosts that are known, the best first."""

    def reasons(self, question: Question, candidates: list[str]) -> dict[str, dict[str, Any]]:
        """Why the others cannot: for each `reason` and its counts."""

    def flavor(self, name: str) -> str | None:
        """The stored flavor of that name, as JSON."""


class Local:
    """The filter in this process, fed with what the hosts have published.

    One instance for each who asks at the same time: they are kept, and each takes the changes since it was used last.
    """

    def __init__(self, source: inventory.Inventory, component: str, deadline: float, max_age: float) -> None:
        self._source, self._max_age = source, max_age
        self._program = wasm.Program(component, deadline)
        self._idle: list[_Instance] = []
        self._lock = threading.Lock()

    def able(self, question: Question, candidates: list[str]) -> set[str]:
        return set(self._ask(lambda one: one.filter.select_names(question, candidates, len(candidates))))

    def scores(self, question: Question, candidates: list[str]) -> dict[str, int]:
        answer = self._ask(lambda one: one.filter.select(question, candidates, len(candidates)))
        return {placement["host"]: placement["score"] for placement in answer["placements"]}

    def best(self, question: Question, limit: int) -> list[str]:
        names: list[str] = self._ask(lambda one: one.filter.select_names(question, None, limit))
        return names

    def reasons(self, question: Question, candidates: list[str]) -> dict[str, dict[str, Any]]:
        verdicts = self._ask(lambda one: one.filter.explain(question, candidates))
        return {host: verdict for host, verdict in verdicts.items() if not verdict["accepted"]}

    def flavor(self, name: str) -> str | None:
        self._source.refresh()
        return self._source.flavor(name)

    def _ask(self, call: Any) -> Any:
        self._source.refresh()
        if why := self._source.stale(self._max_age):
            raise Stale(why)
        with self._lock:
            one = self._idle.pop() if self._idle else None
        one = one or _Instance(self._program)
        try:
            one.catch_up(self._source.hosts)
            answer = call(one)
        except Refused:
            self._give_back(one)
            raise
        # What has failed otherwise is not asked again: a fresh one takes its place.
        self._give_back(one)
        return answer

    def _give_back(self, one: _Instance) -> None:
        with self._lock:
            self._idle.append(one)


class _Instance:
    """The filter, and how much of what has happened it knows."""

    def __init__(self, program: wasm.Program) -> None:
        self.filter = wasm.Filter(program)
        self._seen = 0

    def catch_up(self, hosts: inventory.Hosts) -> None:
        changes, seen = hosts.since(self._seen)
        lines = []
        for host, document in changes:
            if document is None:
                self.filter.remove(host)
            else:
                lines.append((host, document))
        for at in range(0, len(lines), 250):
            chunk = lines[at : at + 250]
            report = self.filter.load("\n".join(document for _, document in chunk), 0)
            for problem in report["problems"]:
                host = chunk[problem["line"] - 1][0]
                LOG.warning("the document of host %s is passed over: %s", host, problem["why"])
        self._seen = seen


class Remote:
    """A `virt-usb scheduler`, which follows the fleet itself."""

    def __init__(self, url: str, timeout: float, max_age: float) -> None:
        self._timeout, self._max_age = timeout, max_age
        self._path = url[len("unix:") :] if url.startswith("unix:") else None
        parts = urlsplit(url)
        self._host, self._port = parts.hostname or "127.0.0.1", parts.port or 8791

    def able(self, question: Question, candidates: list[str]) -> set[str]:
        return set(self.scores(question, candidates))

    def scores(self, question: Question, candidates: list[str]) -> dict[str, int]:
        answer = self._ask("/select", {**question, "hosts": candidates, "limit": len(candidates)})
        return {placement["host"]: placement["score"] for placement in answer["placements"]}

    def best(self, question: Question, limit: int) -> list[str]:
        answer = self._ask("/select", {**question, "limit": limit})
        return [placement["host"] for placement in answer["placements"]]

    def reasons(self, question: Question, candidates: list[str]) -> dict[str, dict[str, Any]]:
        verdicts = self._ask("/explain", question)["verdicts"]
        unknown = {"accepted": False, "reason": "unknown-host"}
        able = self.able(question, candidates)
        return {host: verdicts.get(host, unknown) for host in candidates if host not in able}

    def flavor(self, name: str) -> str | None:
        """A scheduler is asked with the name itself; the answer is read by nobody else."""
        return None

    def _ask(self, path: str, body: dict[str, Any]) -> Any:
        connection: http.client.HTTPConnection
        if self._path is None:
            connection = http.client.HTTPConnection(self._host, self._port, timeout=self._timeout)
        else:
            connection = _Unix(self._path, self._timeout)
        try:
            connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
            response = connection.getresponse()
            answer = json.loads(response.read())
        except (OSError, http.client.HTTPException, ValueError) as fault:
            raise Stale(f"virt-usb scheduler does not answer: {fault}") from fault
        finally:
            connection.close()
        if response.status == http.client.OK:
            if answer["age"] > self._max_age:
                raise Stale(f"virt-usb scheduler has heard nothing of the fleet for {answer['age']} s")
            return answer
        why = answer.get("error", f"status {response.status}")
        if response.status == http.client.SERVICE_UNAVAILABLE:
            raise Stale(why)
        if response.status in (http.client.BAD_REQUEST, http.client.NOT_FOUND):
            raise Refused(why)
        raise Broken(why)


class _Unix(http.client.HTTPConnection):
    def __init__(self, path: str, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


_lock = threading.Lock()
_made: tuple[int, Oracle | None] = (0, None)


def get(options: Any) -> Oracle:
    """This process's own: what was made before a fork is not used after it."""
    global _made
    with _lock:
        process, oracle = _made
        if oracle is None or process != os.getpid():
            oracle = make(options)
            _made = (os.getpid(), oracle)
        return oracle


def forget() -> None:
    """The next one is made anew: for tests."""
    global _made
    _made = (0, None)


def make(options: Any) -> Oracle:
    """As the options say."""
    if options.inventory == "scheduler":
        return Remote(options.scheduler_url, options.scheduler_timeout, options.max_age)
    source: inventory.Inventory
    if options.inventory == "file":
        if not options.inventory_file:
            raise ValueError("[virt_usb] inventory = file, and inventory_file names none")
        source = inventory.File(options.inventory_file, options.flavors_file)
    else:
        source = inventory.Etcd(options)
    return Local(source, options.component, options.deadline, options.max_age)
