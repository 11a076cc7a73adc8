"""Run the filter, a WebAssembly component (wit/ in virt-usb's tree), with `wasmtime` from PyPI.

Lists are passed as texts, because these bindings convert a list one element at a time.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Callable

from wasmtime import Config, Engine, Store, WasmtimeError
from wasmtime.component import Component, Linker, Variant

EXPORTS = {
    "new": ("inventory", "[constructor]inventory"),
    "remove": ("inventory", "[method]inventory.remove"),
    "touch": ("inventory", "[method]inventory.touch"),
    "load": ("text", "load"),
    "set_status": ("text", "set-status"),
    "select": ("text", "select"),
    "select_names": ("text", "select-names"),
    "explain": ("text", "explain"),
}

Question = dict[str, Any]
Feed = Callable[[], Iterable[tuple[str, int]]]


class Refused(ValueError):
    """The input is invalid and changed nothing. A retry does not help."""


class Broken(RuntimeError):
    """The filter failed: out of memory, out of time, or a trap. It never means "no host"."""


def words(fault: Exception) -> str:
    """The root cause of an error, without a backtrace: the last named cause, or the first line."""
    lines = [line.strip() for line in str(fault).splitlines() if line.strip()]
    return lines[-1] if "Caused by:" in lines else lines[0]


def _threads() -> Any:
    """The `threading` module with native threads.

    Green threads stand still while the filter computes, and could not stop it.
    """
    if "eventlet" in sys.modules:
        from eventlet import patcher  # noqa: PLC0415

        return patcher.original("threading")
    return threading


class Program:
    """A compiled component, for all filters of a process.

    A call of a filter may compute for `deadline` seconds, and is stopped before it has computed
    for twice that time. It is processor time, so that a busy machine stops no call.

    Create it in the process that uses it, because its clock does not survive a fork.
    """

    def __init__(self, file: str | Path, deadline: float = 0.25) -> None:
        config = Config()
        config.epoch_interruption = True
        # A parallel compilation keeps threads for the next one. A forked process has none of them,
        # and would wait for them forever.
        config.parallel_compilation = False
        self.engine = Engine(config)
        try:
            self.component = Component.from_file(self.engine, str(file))
        except (WasmtimeError, OSError) as fault:
            raise Broken(f"{file}: {words(fault)}") from fault
        self._deadline = deadline
        threads = _threads()
        self._stopped = threads.Event()
        threads.Thread(target=self._tick, daemon=True).start()

    def close(self) -> None:
        """Stop the clock."""
        self._stopped.set()

    def _tick(self) -> None:
        ticked = time.process_time()
        while not self._stopped.wait(self._deadline):
            if (now := time.process_time()) - ticked >= self._deadline:
                ticked = now
                self.engine.increment_epoch()


class Filter:
    """A filter for one caller at a time.

    `feed` returns the host documents for a fresh instance: pairs of documents, one per line, and
    the time of their arrival. `memory` limits the filter's memory, in bytes.
    """

    def __init__(self, program: Program, feed: Feed = tuple, memory: int = 1 << 30) -> None:
        self._program, self._feed, self._memory = program, feed, memory
        self._functions: dict[str, Any] = {}

    def load(self, lines: str, received: int) -> Any:
        """Add host documents, one per line. The answer names the lines that were refused."""
        return json.loads(self._call("load", lines, received))

    def remove(self, host: str) -> bool:
        """Remove a host; false if it is unknown."""
        return bool(self._call("remove", host))

    def touch(self, host: str, received: int) -> bool:
        """Record that a host is alive; false if it is unknown."""
        return bool(self._call("touch", host, received))

    def set_status(self, host: str, device: int, status: str) -> bool:
        """Set the status of a device; true if that changes its availability."""
        answer = self._call("set_status", host, device, status)
        # These bindings tag a result only if its two types are the same in Python.
        if isinstance(answer, str):
            raise Refused(answer)
        return bool(answer)

    def select(
        self, question: Question, candidates: Iterable[str] | None = None, limit: int = 10
    ) -> Any:
        """The best hosts with their scores. Without candidates, all hosts are candidates."""
        return json.loads(self._call("select", json.dumps(question), _join(candidates), limit))

    def select_names(
        self, question: Question, candidates: Iterable[str] | None = None, limit: int = 10
    ) -> list[str]:
        """The names of the best hosts, the best first. It is the fastest call for many hosts."""
        return _split(self._call("select_names", json.dumps(question), _join(candidates), limit))

    def explain(self, question: Question, hosts: Iterable[str] | None = None) -> dict[str, Any]:
        """The verdict for each host."""
        answer = _split(self._call("explain", json.dumps(question), _join(hosts)))
        return {line["host"]: line["verdict"] for line in map(json.loads, answer)}

    def _call(self, name: str, *arguments: Any) -> Any:
        try:
            if not self._functions:
                self._start()
            answer = self._run(self._functions[name], self._inventory, *arguments)
        except WasmtimeError as fault:
            # An instance that trapped cannot be called again.
            self._functions = {}
            raise Broken(words(fault)) from fault
        if not isinstance(answer, Variant):
            return answer
        if answer.tag == "err":
            raise Refused(answer.payload)
        return answer.payload

    def _start(self) -> None:
        self._store = Store(self._program.engine)
        self._store.set_limits(memory_size=self._memory)
        # The filter imports nothing, so there is nothing to link.
        instance = self._run(Linker(self._program.engine).instantiate, self._program.component)
        functions = {name: self._find(instance, *place) for name, place in EXPORTS.items()}
        self._inventory = self._run(functions["new"])
        for lines, received in self._feed():
            self._run(functions["load"], self._inventory, lines, received)
        self._functions = functions

    def _find(self, instance: Any, interface: str, name: str) -> Any:
        outer = instance.get_export_index(self._store, f"virt-usb:scheduler/{interface}@0.1.0")
        inner = outer and instance.get_export_index(self._store, name, outer)
        if inner is None:
            raise Broken(
                f"found no {interface}.{name} in the component, wanted a filter of version 0.1.0"
            )
        return instance.get_func(self._store, inner)

    def _run(self, function: Any, *arguments: Any) -> Any:
        self._store.set_epoch_deadline(2)
        return function(self._store, *arguments)


def _join(names: Iterable[str] | None) -> str | None:
    return None if names is None else "\n".join(names)


def _split(text: str) -> list[str]:
    # Neither split() nor splitlines(): a name may contain the characters that they split at.
    return text.removesuffix("\n").split("\n") if text else []
