"""The filter in a scheduler without components: the core module, here with `wasmtime` from PyPI.

    module.py [virt-usb-filter-module.wasm]

It has the same class as component.py, over the C ABI that filter-wasm/src/module.rs documents. If
the runtime supports components, they are not slower: see compare.py.
"""

import json
import sys
import threading
from pathlib import Path

from wasmtime import Config, Engine, Instance, Module, Store, Trap, WasmtimeError

FILE = Path(__file__).parents[2] / "target/release/virt-usb-filter-module.wasm"
ABI = 1
REFUSED, CHANGED = -1, 0


class Refused(ValueError):
    """The input is invalid and changed nothing. A retry does not help."""


class Broken(RuntimeError):
    """The filter failed: out of memory, out of time, or a trap. It never means "no host"."""


class Filter:
    """A filter for one thread.

    Create it in the process that uses it, because neither its instance nor its clock survives a
    fork. `feed` returns the host documents for a fresh instance: pairs of documents, one per line,
    and the time of their arrival. `memory` limits the filter's memory, in bytes. A call may take
    `deadline` seconds, and is stopped before twice that time.
    """

    def __init__(self, file=FILE, feed=tuple, memory=1 << 30, deadline=0.25):
        config = Config()
        config.epoch_interruption = True
        self._engine = Engine(config)
        self._module = Module.from_file(self._engine, str(file))
        self._feed, self._limit, self._deadline = feed, memory, deadline
        self._inventory = None
        self._stopped = threading.Event()
        threading.Thread(target=self._tick, daemon=True).start()

    def close(self):
        self._stopped.set()
        self._inventory = None

    def load(self, lines, received):
        """Add host documents, one per line. The answer names the lines that were refused."""
        _, answer = self._call("load", lines, received)
        return json.loads(answer)

    def remove(self, host):
        changed, _ = self._call("remove", host)
        return changed

    def touch(self, host, received):
        changed, _ = self._call("touch", host, received)
        return changed

    def set_status(self, host, device, status):
        """Set the status of a device; true if that changes its availability."""
        changed, _ = self._call("set_status", host, device, status)
        return changed

    def select(self, question, candidates=None, limit=10):
        """The best hosts with their scores. Without candidates, all hosts are candidates."""
        _, answer = self._call("select", json.dumps(question), _join(candidates), limit)
        return json.loads(answer)

    def select_names(self, question, candidates=None, limit=10):
        """The names of the best hosts, the best first. It is the fastest call for many hosts."""
        _, answer = self._call("select_names", json.dumps(question), _join(candidates), limit)
        return _split(answer)

    def explain(self, question, hosts=None):
        """The verdict for each host."""
        _, answer = self._call("explain", json.dumps(question), _join(hosts))
        return {line["host"]: line["verdict"] for line in map(json.loads, _split(answer))}

    def _call(self, name, *arguments):
        try:
            if self._inventory is None:
                self._start()
            status = self._tell(name, self._inventory, *arguments)
            answer = self._answer()
        except (Trap, WasmtimeError) as fault:
            # The module's memory is not reliable after a trap.
            self._inventory = None
            raise Broken(str(fault).splitlines()[-1].strip()) from fault
        if status == REFUSED:
            raise Refused(answer)
        return status == CHANGED, answer

    def _start(self):
        self._store = Store(self._engine)
        self._store.set_limits(memory_size=self._limit)
        self._store.set_epoch_deadline(2)
        # The module imports nothing.
        self._exports = Instance(self._store, self._module, []).exports(self._store)
        self._memory = self._exports["memory"]
        self._room = 0, 0
        if (abi := self._run("abi")) != ABI:
            raise LookupError(f"found a module of ABI {abi}, wanted {ABI}")
        inventory = self._run("new")
        for lines, received in self._feed():
            self._tell("load", inventory, lines, received)
        self._inventory = inventory

    def _tell(self, name, *arguments):
        """Call a function, which takes each text as a pointer and a length."""
        arguments = [a.encode() if isinstance(a, str) else a for a in arguments]
        texts = b"".join(a for a in arguments if isinstance(a, bytes))
        # At least a byte: without an allocation the address would be 0, which means the whole
        # fleet.
        at = self._place(len(texts) + 1)
        self._memory.write(self._store, texts, at)
        numbers = []
        for argument in arguments:
            if isinstance(argument, bytes):
                numbers += [at, len(argument)]
                at += len(argument)
            else:
                numbers += [0, 0] if argument is None else [argument]
        return self._run(name, *numbers)

    def _place(self, size):
        """The address of a buffer of this size.

        The buffer is kept, because each call of a function takes these bindings some 10 µs.
        """
        start, most = self._room
        if size > most:
            self._run("free", start, most)
            self._room = start, most = self._address("alloc", size), size
        return start

    def _address(self, name, *numbers):
        # These bindings interpret a pointer as a signed number.
        return self._run(name, *numbers) & 0xFFFF_FFFF

    def _answer(self):
        start = self._address("answer")
        return self._memory.read(self._store, start, start + self._run("answer_len")).decode()

    def _run(self, name, *numbers):
        self._store.set_epoch_deadline(2)
        return self._exports[f"virt_usb_{name}"](self._store, *numbers)

    def _tick(self):
        while not self._stopped.wait(self._deadline):
            self._engine.increment_epoch()


def _join(names):
    return None if names is None else "\n".join(names)


def _split(text):
    # Neither split() nor splitlines(): a name may contain the characters that they split at.
    return text.removesuffix("\n").split("\n") if text else []


if __name__ == "__main__":
    import story

    story.tell(Filter, Refused, Broken, *sys.argv[1:])
