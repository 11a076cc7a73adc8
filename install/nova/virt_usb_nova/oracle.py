"""Oracles say which hosts can serve: the filter in this process, or `virt-usb scheduler`."""

from __future__ import annotations

import http.client
import json
import logging
import os
import socket
import threading
from typing import Any, Callable, Protocol, TypeVar
from urllib.parse import urlsplit

from virt_usb_nova import asked, inventory, wasm
from virt_usb_nova.inventory import Misconfigured, Stale
from virt_usb_nova.wasm import Broken, Question, Refused

LOG = logging.getLogger(__name__)

T = TypeVar("T")
# All errors of an oracle.
NO_ANSWER = (Stale, Refused, Misconfigured, Broken, asked.Wrong)


class Oracle(Protocol):
    """Answers questions about hosts.

    Each call raises Stale, Refused (the question is invalid) or Broken.
    """

    def able(self, question: Question, candidates: list[str]) -> set[str]:
        """The candidates that can serve."""

    def scores(self, question: Question, candidates: list[str]) -> dict[str, int]:
        """The candidates that can serve, with their scores."""

    def best(self, question: Question, limit: int) -> list[str]:
        """Known hosts that can serve, the best first, up to this number."""

    def reasons(self, question: Question, unable: list[str]) -> dict[str, dict[str, Any]]:
        """The verdicts on hosts that cannot serve: for each its `reason` and counts."""

    def flavor(self, name: str) -> Any:
        """The flavor for a question, by its name; None if none is stored."""

    def named(self, name: str) -> Any:
        """The same for `@NAME`. An oracle that knows the flavors refuses an unknown name itself."""


class Local:
    """The filter in this process, fed with the host documents.

    It keeps an instance for each concurrent caller, which takes the changes since its last use.
    """

    def __init__(self, source: inventory.Inventory, program: wasm.Program, max_age: float) -> None:
        self._source, self._program, self._max_age = source, program, max_age
        self._idle: list[_Instance] = []
        self._lock = threading.Lock()

    def able(self, question: Question, candidates: list[str]) -> set[str]:
        return set(
            self._ask(lambda one: one.filter.select_names(question, candidates, len(candidates)))
        )

    def scores(self, question: Question, candidates: list[str]) -> dict[str, int]:
        answer = self._ask(lambda one: one.filter.select(question, candidates, len(candidates)))
        return {placement["host"]: placement["score"] for placement in answer["placements"]}

    def best(self, question: Question, limit: int) -> list[str]:
        names: list[str] = self._ask(lambda one: one.filter.select_names(question, None, limit))
        return names

    def reasons(self, question: Question, unable: list[str]) -> dict[str, dict[str, Any]]:
        verdicts = self._ask(lambda one: one.filter.explain(question, unable))
        # Some may be able to serve meanwhile.
        return {host: verdict for host, verdict in verdicts.items() if not verdict["accepted"]}

    def flavor(self, name: str) -> Any:
        text = self._source.flavor(name)
        if text is None:
            return None
        try:
            value = asked.read(text)
        except ValueError as fault:
            raise asked.Wrong(f"the stored flavor {name!r}: {fault}") from fault
        if not isinstance(value, dict):
            raise asked.Wrong(f"the stored flavor {name!r} is not an object")
        return value

    def named(self, name: str) -> Any:
        return self.flavor(name)

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
        # An instance that failed otherwise is dropped. A fresh one replaces it.
        self._give_back(one)
        return answer

    def _give_back(self, one: _Instance) -> None:
        with self._lock:
            self._idle.append(one)


class _Instance:
    """A filter, with the number of the last change that it knows."""

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
                LOG.warning("the document of host %s is ignored: %s", host, problem["why"])
        self._seen = seen


class Remote:
    """A `virt-usb scheduler`, which follows the fleet itself."""

    def __init__(self, url: str, timeout: float, max_age: float) -> None:
        self._url, self._timeout, self._max_age = url, timeout, max_age
        self._path = url[len("unix:") :] if url.startswith("unix:/") else None
        try:
            parts = urlsplit(url)
            self._host, self._port = parts.hostname, parts.port or 8791
        except ValueError as fault:
            raise Misconfigured(f"scheduler_url: {url}: {fault}") from fault
        if self._path is None and (
            parts.scheme != "http" or not self._host or parts.path.strip("/")
        ):
            raise Misconfigured(
                f"scheduler_url: found {url!r}, wanted http://HOST:PORT or unix:/PATH"
            )

    def able(self, question: Question, candidates: list[str]) -> set[str]:
        return set(self.scores(question, candidates))

    def scores(self, question: Question, candidates: list[str]) -> dict[str, int]:
        asks = {**question, "hosts": candidates, "limit": len(candidates)}
        return self._ask(
            "/select",
            asks,
            lambda answer: {
                placement["host"]: int(placement["score"]) for placement in answer["placements"]
            },
        )

    def best(self, question: Question, limit: int) -> list[str]:
        return self._ask(
            "/select",
            {**question, "limit": limit},
            lambda answer: [placement["host"] for placement in answer["placements"]],
        )

    def reasons(self, question: Question, unable: list[str]) -> dict[str, dict[str, Any]]:
        unknown = {"accepted": False, "reason": "unknown-host"}
        return self._ask(
            "/explain",
            question,
            lambda answer: {host: answer["verdicts"].get(host, unknown) for host in unable},
        )

    def flavor(self, name: str) -> Any:
        try:
            self._ask("/select", {"flavor": self.named(name), "limit": 1}, lambda _: None)
        except _Nowhere:
            return None
        return self.named(name)

    def named(self, name: str) -> Any:
        return f"@{name}"

    def _ask(self, path: str, body: dict[str, Any], read: Callable[[Any], T]) -> T:
        connection: http.client.HTTPConnection
        if self._path is None:
            connection = http.client.HTTPConnection(
                self._host or "", self._port, timeout=self._timeout
            )
        else:
            connection = _Unix(self._path, self._timeout)
        try:
            connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
            response = connection.getresponse()
            status, text = response.status, response.read()
        except (OSError, http.client.HTTPException) as fault:
            raise Stale(f"virt-usb scheduler at {self._url} does not respond: {fault}") from fault
        finally:
            connection.close()
        try:
            answer = asked.read(text)
            if status == http.client.OK:
                if answer["age"] > self._max_age:
                    raise Stale(
                        f"virt-usb scheduler at {self._url} has no update from the fleet for "
                        f"{answer['age']} s"
                    )
                return read(answer)
            why = str(answer["error"])
        except (ValueError, KeyError, TypeError, AttributeError) as fault:
            raise Broken(
                f"the server at {self._url} is not a virt-usb scheduler: status {status}, "
                f"{text[:100]!r}"
            ) from fault
        if status == http.client.SERVICE_UNAVAILABLE:
            raise Stale(why)
        if status == http.client.NOT_FOUND:
            raise _Nowhere(why)
        raise (Refused if status == http.client.BAD_REQUEST else Broken)(why)


class _Nowhere(Refused):
    """The fleet has no flavor of that name."""


class _Unix(http.client.HTTPConnection):
    def __init__(self, path: str, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


_lock = threading.Lock()
_made: Oracle | None = None


def get(options: Any) -> Oracle:
    """The oracle of this process."""
    global _made
    with _lock:
        if _made is None:
            _made = make(options)
        return _made


def forget() -> None:
    """Drop the current oracle, so that the next call creates one: after a fork, and in tests."""
    global _lock, _made
    # Another thread may have held the lock during the fork.
    _lock, _made = threading.Lock(), None


os.register_at_fork(after_in_child=forget)


def make(options: Any) -> Oracle:
    """Create an oracle. Raises Misconfigured, or Broken if the filter cannot be loaded."""
    if options.inventory == "scheduler":
        return Remote(options.scheduler_url, options.scheduler_timeout, options.max_age)
    kind = inventory.File if options.inventory == "file" else inventory.Etcd
    kind.check(options)
    # First the step that may fail, because nothing would stop the other one.
    program = wasm.Program(options.component, options.deadline)
    return Local(kind(options), program, options.max_age)
