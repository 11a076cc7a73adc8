"""The host documents that the hosts have published: from etcd, or from a file.

Threads and connections start at the first use, because nova-scheduler forks its workers after it
has loaded its filters, and neither survives a fork.
"""

from __future__ import annotations

import base64
import json
import logging
import os
import threading
import time
from typing import Any, Optional, Protocol

import requests

from virt_usb_nova import asked

LOG = logging.getLogger(__name__)


class Stale(RuntimeError):
    """The host documents are too old, or there are none yet. It never means "no host"."""


class Misconfigured(RuntimeError):
    """An option is invalid. The text names it."""


# A change: the host, and its document as one line; None if the host is gone.
Change = tuple[str, Optional[str]]


class Hosts:
    """The documents of all hosts, for many readers. Each takes the changes since its last call."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # In the order of the changes, the latest at the end.
        self._documents: dict[str, tuple[int, str | None]] = {}
        self._change = 0

    def put(self, host: str, document: str | None) -> None:
        """Set the document of a host; None removes the host."""
        if document is not None:
            # With more lines, a part could pass for the document of another host.
            document = document.replace("\n", " ")
        with self._lock:
            known = self._documents.pop(host, None)
            self._change += 1
            if document is not None or known is not None:
                self._documents[host] = (self._change, document)

    def names(self) -> list[str]:
        """The names of the known hosts."""
        with self._lock:
            return [host for host, (_, document) in self._documents.items() if document is not None]

    def since(self, change: int) -> tuple[list[Change], int]:
        """The changes after that number, and the number of the latest change. 0 returns all."""
        changes: list[Change] = []
        with self._lock:
            for host, (number, document) in reversed(self._documents.items()):
                if number <= change:
                    break
                # A new reader has no host to remove.
                if document is not None or change > 0:
                    changes.append((host, document))
            return changes[::-1], self._change


class Inventory(Protocol):
    """A source of host documents and flavors."""

    hosts: Hosts

    def refresh(self) -> None:
        """Update the documents. Called before each question."""

    def stale(self, max_age: float) -> str | None:
        """Why the documents are stale; None if they are not."""

    def flavor(self, name: str) -> str | None:
        """The stored flavor of that name as JSON; None if none is stored. Raises Stale."""


def host_of(document: str) -> str | None:
    """The host of a document; None if the document cannot be read."""
    try:
        host = asked.read(document)["host"]
    except (ValueError, KeyError, TypeError):
        return None
    return host if isinstance(host, str) else None


class File:
    """A file of host documents, one per line. Another program replaces it with a rename."""

    @staticmethod
    def check(options: Any) -> None:
        """Check the options. Raises Misconfigured."""
        if not options.inventory_file:
            raise Misconfigured("inventory = file needs inventory_file")

    def __init__(self, options: Any) -> None:
        self.hosts = Hosts()
        self._path, self._flavors = options.inventory_file, options.flavors_file
        self._lock = threading.Lock()
        self._read: tuple[int, int, int] | None = None
        self._written = 0.0
        self._fault: str | None = "the file was not read yet"

    def refresh(self) -> None:
        with self._lock:
            try:
                found = os.stat(self._path)
                stamp = (found.st_mtime_ns, found.st_size, found.st_ino)
                if stamp != self._read:
                    self._take()
                    self._read = stamp
                self._written, self._fault = found.st_mtime, None
            except (OSError, UnicodeDecodeError) as fault:
                self._fault = f"{self._path}: {fault}"

    def _take(self) -> None:
        with open(self._path, encoding="utf-8") as file:
            lines = [line for line in file.read().split("\n") if line.strip()]
        fresh: dict[str, str] = {}
        for number, line in enumerate(lines, 1):
            host = host_of(line)
            if host is None:
                LOG.warning("%s, line %d: not a host document, ignored", self._path, number)
            else:
                fresh[host] = line
        known = dict(self.hosts.since(0)[0])
        for host in known.keys() - fresh.keys():
            self.hosts.put(host, None)
        for host, line in fresh.items():
            if known.get(host) != line:
                self.hosts.put(host, line)

    def stale(self, max_age: float) -> str | None:
        if self._fault is not None:
            return self._fault
        age = time.time() - self._written
        if age < -max_age:
            return f"{self._path} was written {-age:.0f} s in the future: a clock is wrong"
        return f"{self._path} was written {age:.0f} s ago" if age > max_age else None

    def flavor(self, name: str) -> str | None:
        if self._flavors is None:
            return None
        try:
            with open(self._flavors, encoding="utf-8") as file:
                stored = asked.read(file.read())
            return next((json.dumps(asks(one)) for one in stored if one["name"] == name), None)
        except (OSError, ValueError, KeyError, TypeError) as fault:
            raise Stale(f"{self._flavors}: {fault}") from fault


def asks(stored: dict[str, Any]) -> dict[str, Any]:
    """The request of a stored flavor."""
    return {
        key: stored[key] for key in ("usb_devices", "usb_redirection_devices") if stored.get(key)
    }


class Compacted(Exception):
    """etcd has compacted the revision at which the watch was to begin."""


class Fault(Exception):
    """etcd rejected a request or sent an invalid response."""


def _encoded(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


def _decoded(text: str) -> str:
    return base64.b64decode(text).decode("utf-8", "replace")


def _after(prefix: str) -> str:
    """The first key after all keys with this prefix."""
    return prefix[:-1] + chr(ord(prefix[-1]) + 1)


class Follower:
    """Follow the keys below a prefix through etcd's JSON gateway.

    It lists them, and then watches from the revision of the list.
    """

    PAGE = 500
    CONNECT = 3.0
    # Seconds without a message after which a request checks whether etcd still responds.
    SILENCE = 15.0
    PAUSE = 1.0

    def __init__(self, options: Any, part: str, sink: Any) -> None:
        self._endpoints = [endpoint.rstrip("/") for endpoint in options.etcd_endpoints]
        self._options, self._sink = options, sink
        self._prefix = options.etcd_prefix + part
        self._revision = 0
        self._cluster = ""
        self._known: dict[str, str] = {}
        self._token: str | None = None
        self.heard: float | None = None
        # Why there are no updates; None if there are. The log has it once.
        self.fault: str | None = "etcd has not responded yet"
        self._said = False
        self.listed = threading.Event()
        self._session = requests.Session()
        self._session.trust_env = False
        if options.etcd_cafile:
            self._session.verify = options.etcd_cafile
        if options.etcd_certfile:
            self._session.cert = (
                options.etcd_certfile,
                options.etcd_keyfile or options.etcd_certfile,
            )

    def start(self) -> None:
        """Follow in a thread, until the process ends."""
        threading.Thread(target=self.follow, daemon=True, name="virt-usb-etcd").start()

    def follow(self) -> None:
        while True:
            try:
                self._check()
                if self._revision == 0:
                    self._list()
                self._watch()
            except Compacted:
                LOG.info(
                    "etcd has compacted revision %d: listing %s again", self._revision, self._prefix
                )
                self._revision = 0
            except (requests.RequestException, Fault, ValueError, KeyError, OSError) as fault:
                self._deaf(str(fault))
            except Exception as fault:  # because nothing would restart this thread
                LOG.debug("etcd's follower", exc_info=True)
                self._deaf(f"{type(fault).__name__}: {fault}")

    def _deaf(self, why: str) -> None:
        self.fault = f"{self._endpoints[0]}: {why}"
        if not self._said:
            LOG.warning("no updates of %s from etcd: %s", self._prefix, self.fault)
            self._said = True
        # The next endpoint may be another etcd, or a restored one: list everything again.
        self._token, self._revision = None, 0
        self._endpoints.append(self._endpoints.pop(0))
        time.sleep(self.PAUSE)

    def _hear(self) -> None:
        self.heard = time.monotonic()
        if self.fault is not None and self.listed.is_set():
            self.fault = None
            if self._said:
                LOG.info("updates of %s from etcd again: %s", self._prefix, self._endpoints[0])
            self._said = False

    def _post(self, path: str, body: dict[str, Any], stream: bool = False) -> requests.Response:
        headers = {}
        if self._options.etcd_user and path != "/v3/auth/authenticate":
            if self._token is None:
                self._token = self._sign_in()
            headers["Authorization"] = self._token
        answer = self._session.post(
            self._endpoints[0] + path,
            json=body,
            headers=headers,
            stream=stream,
            timeout=(self.CONNECT, self.SILENCE),
        )
        if not answer.ok:
            raise Fault(_message(answer))
        return answer

    def _sign_in(self) -> str:
        with open(self._options.etcd_password_file, encoding="utf-8") as file:
            password = file.readline().rstrip("\n")
        body = {"name": self._options.etcd_user, "password": password}
        return str(self._post("/v3/auth/authenticate", body).json()["token"])

    def _check(self) -> None:
        """Make a call that needs a leader. List again if etcd is another one or was restored."""
        key = _encoded(self._prefix)
        header = self._post("/v3/kv/range", {"key": key, "keys_only": True}).json()["header"]
        if header["cluster_id"] != self._cluster or int(header["revision"]) < self._revision:
            self._cluster, self._revision = header["cluster_id"], 0

    def _list(self) -> None:
        key, at, seen = self._prefix, 0, set()
        while True:
            body = {
                "key": _encoded(key),
                "range_end": _encoded(_after(self._prefix)),
                "limit": str(self.PAGE),
                "revision": str(at),
            }
            page = self._post("/v3/kv/range", body).json()
            at = at or int(page["header"]["revision"])
            for pair in page.get("kvs", []):
                name = _decoded(pair["key"])[len(self._prefix) :]
                seen.add(name)
                self._put(name, _decoded(pair.get("value", "")))
            if not page.get("more"):
                break
            key = _decoded(page["kvs"][-1]["key"]) + "\0"
        for name in self._known.keys() - seen:
            self._gone(name)
        self._revision = at

    def _watch(self) -> None:
        create = {
            "key": _encoded(self._prefix),
            "range_end": _encoded(_after(self._prefix)),
            "start_revision": str(self._revision + 1),
        }
        with self._post("/v3/watch", {"create_request": create}, stream=True) as answer:
            try:
                rest = b""
                for part in answer.iter_content(chunk_size=None):
                    *lines, rest = (rest + part).split(b"\n")
                    for line in filter(None, lines):
                        self._take(json.loads(line))
            except requests.ConnectionError as fault:
                # No message for a while. The next round checks whether etcd responds, and continues
                # at the same revision.
                if "timed out" not in str(fault).lower():
                    raise
                return
        # etcd has ended the watch.
        time.sleep(0.1)

    def _take(self, message: dict[str, Any]) -> None:
        if "error" in message:
            raise Fault(str(message["error"].get("message", message["error"])))
        result = message["result"]
        if int(result.get("compact_revision", 0)) > 0:
            raise Compacted
        if result.get("canceled"):
            raise Fault(result.get("cancel_reason") or "the watch was cancelled")
        if result.get("created"):
            self.listed.set()
        self._hear()
        for event in result.get("events", []):
            pair = event["kv"]
            name = _decoded(pair["key"])[len(self._prefix) :]
            if event.get("type") == "DELETE":
                self._gone(name)
            else:
                self._put(name, _decoded(pair.get("value", "")))
            self._revision = max(self._revision, int(pair["mod_revision"]))

    def _put(self, name: str, value: str) -> None:
        if self._known.get(name) != value:
            self._known[name] = value
            self._sink(name, value)

    def _gone(self, name: str) -> None:
        if self._known.pop(name, None) is not None:
            self._sink(name, None)


def _message(answer: requests.Response) -> str:
    try:
        body = answer.json()
        said = body.get("error") or body.get("message")
    except (ValueError, AttributeError):
        said = None
    return str(said or f"status {answer.status_code}")


class Etcd:
    """The documents that the fleet's agents publish in etcd."""

    # Timeout of the first caller, which waits until the fleet is known, in seconds.
    FIRST = 10.0

    @staticmethod
    def check(options: Any) -> None:
        """Check the options. Raises Misconfigured."""
        wrong = [
            endpoint
            for endpoint in options.etcd_endpoints
            if not endpoint.startswith(("http://", "https://"))
        ]
        if wrong or not options.etcd_endpoints:
            raise Misconfigured(
                f"etcd_endpoints: found {wrong}, wanted URLs with http:// or https://"
            )
        if not (options.etcd_prefix.startswith("/") and options.etcd_prefix.endswith("/")):
            raise Misconfigured(
                f"etcd_prefix: found {options.etcd_prefix!r}, wanted a text that begins and ends "
                "with a slash, as fleet.prefix on the hosts"
            )
        if options.etcd_user and not options.etcd_password_file:
            raise Misconfigured("etcd_user needs etcd_password_file")

    def __init__(self, options: Any) -> None:
        self.hosts = Hosts()
        self._flavors: dict[str, str] = {}
        self._known = Follower(options, "hosts/", self._host)
        self._named = Follower(options, "flavors/", self._flavor)
        self._first = time.monotonic() + self.FIRST
        self._known.start()
        self._named.start()

    def _host(self, host: str, document: str | None) -> None:
        # A host cannot publish for another one.
        if document is not None and host_of(document) != host:
            LOG.warning(
                "the document of host %s cannot be read or names another host, and is ignored",
                host,
            )
            document = None
        self.hosts.put(host, document)

    def _flavor(self, name: str, text: str | None) -> None:
        if text is None:
            self._flavors.pop(name, None)
        else:
            self._flavors[name] = text

    def _wait(self, follower: Follower) -> None:
        follower.listed.wait(max(0.0, self._first - time.monotonic()))

    def refresh(self) -> None:
        self._wait(self._known)

    def stale(self, max_age: float) -> str | None:
        if not self._known.listed.is_set() or self._known.heard is None:
            return f"the fleet is not known yet: {self._known.fault}"
        age = time.monotonic() - self._known.heard
        return (
            f"no update from the fleet for {age:.0f} s: {self._known.fault}"
            if age > max_age
            else None
        )

    def flavor(self, name: str) -> str | None:
        self._wait(self._named)
        if not self._named.listed.is_set():
            raise Stale(f"the fleet's flavors are not known yet: {self._named.fault}")
        return self._flavors.get(name)
