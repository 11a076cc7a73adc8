"""Cases: how to write one, how they run, and how they are reported."""

import importlib
import time
import traceback
from dataclasses import dataclass
from typing import Callable

from . import shell
from .shell import Failure

_found = []


@dataclass
class Case:
    name: str
    title: str
    body: Callable
    bare: bool


def case(title, bare=False):
    """Mark a function of a world as a case.

    A `bare` case begins on a host without virt-usb and installs it itself.
    """

    def mark(body):
        file = body.__module__.rsplit(".", 1)[-1]
        _found.append(Case(f"{file}.{body.__name__}", title, body, bare))
        return body

    return mark


def collect(package, modules):
    """Collect the cases of these files, in this order."""
    _found.clear()
    for module in modules:
        importlib.import_module(f"{package}.{module}")
    return list(_found)


def matching(cases, wanted):
    return [c for c in cases if not wanted or any(w in c.name for w in wanted)]


def run_all(cases, world, say):
    """Run the cases one after the other. Return false if one failed."""
    failed = 0
    say(f"1..{len(cases)}")
    for number, one in enumerate(cases, 1):
        began = time.monotonic()
        trouble = _run(one, world)
        took = f"{time.monotonic() - began:.1f} s"
        if trouble is None:
            say(f"ok {number} - {one.title} [{one.name}] {took}")
        else:
            failed += 1
            say(f"not ok {number} - {one.title} [{one.name}] {took}")
            say(_indented(trouble + "\n" + world.logs()))
    return failed == 0


def _run(one, world):
    shell.transcript.clear()
    try:
        world.fresh(one.bare)
        one.body(world)
    except Failure as failure:
        where = traceback.extract_tb(failure.__traceback__)
        line = next(
            (
                f"{f.filename.rsplit('/', 1)[-1]}:{f.lineno}"
                for f in reversed(where)
                if "/cases/" in f.filename
            ),
            "",
        )
        return f"{where and line}: {failure}"
    except Exception:  # An error of the harness fails this case only.
        return traceback.format_exc()
    return None


def _indented(text):
    return "\n".join(f"    # {line}" for line in text.splitlines())
