"""The filter: a WebAssembly component (wit/ in virt-usb's tree), run by `wasmtime` from PyPI.

Bulk goes in and out as text: these bindings convert a list one element at a time.
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
    """The input is wrong and changed nothing. Asking again will not help."""


class Broken(RuntimeError):
    """The filter failed: out of memory, out of time, a trap. It is never "no host"."""


def words(fault: Exception) -> str:
    """What went wrong in the first place, without where in the program: the last cause that is named, or what is said first."""
    lines = [line.strip() for line in str(fault).splitlines() if line.strip()]
    return lines[-1] if "Caused by:" in lines else lines[0]


def _threads() -> Any:
    """The real threads: green ones stand still while the filter computes, and could not stop it."""
    if "eventlet" in sys.modules:
        from eventlet import patcher  # noqa: PLC0415

        return patcher.original("threading")
    return threading


class Program:
    """The component, compiled: once in a process, for all its filters. A call of theirs may compute for the seconds of `deadline`, and
    is stopped before it has computed for twice as many: processor time, so that a busy machine stops no call.

    Make it where it is used: its clock does not survive a fork.
    """

    def __init__(self, file: str | Path, deadline: float = 0.25) -> None:
        config = Config()
        config.epoch_interruption = True
        # A parallel compilation leaves threads for the next one. A process that is forked has none of them, and would wait for ever.
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
        """Ends its clock."""
        self._stopped.set()

    def _tick(self) -> None:
        ticked = time.process_time()
        while not self._stopped.wait(self._deadline):
            if (now := time.process_time()) - ticked >= self._deadline:
                ticked = now
                self.engine.increment_epoch()


class Filter:
    """A filter for one who asks at a time.

    `feed` gives what the hosts have published: pairs of documents, one a line, and the time when they came in. A fresh instance
    begins with them. `memory` limits the filter's memory, in bytes.
    """

    def __init__(self, program: Program, feed: Feed = tuple, memory: int = 1 << 30) -> None:
        self._program, self._feed, self._memory = program, feed, memory
        self._functions: dict[str, Any] = {}

    def load(self, lines: str, received: int) -> Any:
        """Takes host documents, one a line. The answer tells which lines were refused."""
        return json.loads(self._call("load", lines, received))

    def remove(self, host: str) -> bool:
        """Forgets a host; false if there was none."""
        return bool(self._call("remove", host))

    def touch(self, host: str, received: int) -> bool:
        """Records that a host is alive; false if it is unknown."""
        return bool(self._call("touch", host, received))

    def set_status(self, host: str, device: int, status: str) -> bool:
        """True if it makes a difference to who may have the device."""
        answer = self._call("set_status", host, device, status)
        # These bindings tag a result only where its two types are one in Python.
        if isinstance(answer, str):
            raise Refused(answer)
        return bool(answer)

    def select(
        self, question: Question, candidates: Iterable[str] | None = None, limit: int = 10
    ) -> Any:
        """The best hosts, with their scores; None for the candidates is the whole fleet."""
        return json.loads(self._call("select", json.dumps(question), _join(candidates), limit))

    def select_names(
        self, question: Question, candidates: Iterable[str] | None = None, limit: int = 10
    ) -> list[str]:
        """Their names alone, the best first: the quickest way to ask about many."""
        return _split(self._call("select_names", json.dumps(question), _join(candidates), limit))

    def explain(self, question: Question, hosts: Iterable[str] | None = None) -> dict[str, Any]:
        """A verdict for each host."""
        answer = _split(self._call("explain", json.dumps(question), _join(hosts)))
        return {line["host"]: line["verdict"] for line in map(json.loads, answer)}

    def _call(self, name: str, *arguments: Any) -> Any:
        try:
            if not self._functions:
                self._start()
            answer = self._run(self._functions[name], self._inventory, *arguments)
        except WasmtimeError as fault:
            # A trap leaves an instance that cannot be entered again.
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
    # Not at white space, nor with splitlines: a name may hold what those split at.
    return text.removesuffix("\n").split("\n") if text else []
