"""The filter in a scheduler written in Python: the component, with `wasmtime` from PyPI.

    component.py [virt-usb-filter.wasm]

Bulk goes in and out as text: these bindings convert a list one element at a time.
"""

import json
import sys
import threading
from pathlib import Path

from wasmtime import Config, Engine, Store, WasmtimeError
from wasmtime.component import Component, Linker, Variant

FILE = Path(__file__).parents[2] / "target/release/virt-usb-filter.wasm"

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


class Refused(ValueError):
    """The input is wrong and changed nothing. Asking again will not help."""


class Broken(RuntimeError):
    """The filter failed: out of memory, out of time, a trap. It is never "no host"."""


class Filter:
    """A filter for one thread. Make it where it is used: neither its instance nor its clock survives a fork.

    `feed` gives what the hosts have published: pairs of documents, one a line, and the time when they came in. A fresh instance
    begins with them. The filter may use so many bytes of `memory`; a call may take the seconds of `deadline`, and is stopped
    before twice as many.
    """

    def __init__(self, file=FILE, feed=tuple, memory=1 << 30, deadline=0.25):
        config = Config()
        config.epoch_interruption = True
        self._engine = Engine(config)
        self._component = Component.from_file(self._engine, str(file))
        self._feed, self._memory, self._deadline = feed, memory, deadline
        self._functions = {}
        self._stopped = threading.Event()
        threading.Thread(target=self._tick, daemon=True).start()

    def close(self):
        self._stopped.set()
        self._functions = {}

    def load(self, lines, received):
        """Takes host documents, one a line. The answer tells which lines were refused."""
        return json.loads(self._call("load", lines, received))

    def remove(self, host):
        return self._call("remove", host)

    def touch(self, host, received):
        return self._call("touch", host, received)

    def set_status(self, host, device, status):
        """True if it makes a difference to who may have the device."""
        answer = self._call("set_status", host, device, status)
        # These bindings tag a result only where its two types are one in Python.
        if isinstance(answer, str):
            raise Refused(answer)
        return answer

    def select(self, question, candidates=None, limit=10):
        """The best hosts, with their scores; None for the candidates is the whole fleet."""
        return json.loads(self._call("select", json.dumps(question), _join(candidates), limit))

    def select_names(self, question, candidates=None, limit=10):
        """Their names alone, the best first: the quickest way to ask about many."""
        return _split(self._call("select_names", json.dumps(question), _join(candidates), limit))

    def explain(self, question, hosts=None):
        """A verdict for each host."""
        answer = _split(self._call("explain", json.dumps(question), _join(hosts)))
        return {line["host"]: line["verdict"] for line in map(json.loads, answer)}

    def _call(self, name, *arguments):
        try:
            if not self._functions:
                self._start()
            answer = self._run(self._functions[name], self._inventory, *arguments)
        except WasmtimeError as fault:
            # A trap leaves an instance that cannot be entered again.
            self._functions = {}
            raise Broken(str(fault).splitlines()[-1].strip()) from fault
        if not isinstance(answer, Variant):
            return answer
        if answer.tag == "err":
            raise Refused(answer.payload)
        return answer.payload

    def _start(self):
        self._store = Store(self._engine)
        self._store.set_limits(memory_size=self._memory)
        # The filter imports nothing, so there is nothing to link.
        instance = self._run(Linker(self._engine).instantiate, self._component)
        functions = {name: self._find(instance, *place) for name, place in EXPORTS.items()}
        self._inventory = self._run(functions["new"])
        for lines, received in self._feed():
            self._run(functions["load"], self._inventory, lines, received)
        self._functions = functions

    def _find(self, instance, interface, name):
        outer = instance.get_export_index(self._store, f"virt-usb:scheduler/{interface}@0.1.0")
        inner = outer and instance.get_export_index(self._store, name, outer)
        if inner is None:
            raise LookupError(f"found no {interface}.{name} in the component, wanted a filter of version 0.1.0")
        return instance.get_func(self._store, inner)

    def _run(self, function, *arguments):
        self._store.set_epoch_deadline(2)
        return function(self._store, *arguments)

    def _tick(self):
        while not self._stopped.wait(self._deadline):
            self._engine.increment_epoch()


def _join(names):
    return None if names is None else "\n".join(names)


def _split(text):
    # Not at white space, nor with splitlines: a name may hold what those split at.
    return text.removesuffix("\n").split("\n") if text else []


if __name__ == "__main__":
    import story

    story.tell(Filter, Refused, Broken, *sys.argv[1:])
