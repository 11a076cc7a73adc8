"""On this machine alone: ports, processes, requests, waiting."""

from __future__ import annotations

import ctypes
import signal
import subprocess
import time
from collections.abc import Callable

import requests

TIMEOUT_SECONDS = 300.0


def end_with_parent() -> None:
    """Run in a child before it becomes its program: the kernel ends it when this process is gone."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def session() -> requests.Session:
    """What asks without a proxy, whatever the environment says."""
    made = requests.Session()
    made.trust_env = False
    return made


def status(url: str) -> int:
    """Of what is answered there; 0 where nobody answers."""
    try:
        return session().get(url, timeout=TIMEOUT_SECONDS).status_code
    except requests.ConnectionError:
        return 0


def wait_for(server: subprocess.Popen[bytes], url: str, right: set[int], log: str) -> None:
    """Until it answers so; no longer than it lives."""
    until(lambda: server.poll() is not None or status(url) in right, lambda: f"{url}: see {log}")
    if server.poll() is not None:
        raise SystemExit(f"what was to answer at {url} has ended: see {log}")


def until(is_so: Callable[[], bool], otherwise: Callable[[], str]) -> None:
    """Waits; says what is wrong when it has waited for too long."""
    end = time.monotonic() + TIMEOUT_SECONDS
    while not is_so():
        if time.monotonic() > end:
            raise AssertionError(f"waited in vain: {otherwise()}")
        time.sleep(0.05)
