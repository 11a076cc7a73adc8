"""Processes, requests and timeouts on this machine."""

from __future__ import annotations

import ctypes
import signal
import subprocess
import time
from collections.abc import Callable

import requests

TIMEOUT_SECONDS = 300.0


def end_with_parent() -> None:
    """Let the kernel end this child when its parent ends. Called before exec."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def session() -> requests.Session:
    """An HTTP session without a proxy."""
    made = requests.Session()
    made.trust_env = False
    return made


def status(url: str) -> int:
    """The status of a response; 0 if there is none."""
    try:
        return session().get(url, timeout=TIMEOUT_SECONDS).status_code
    except requests.ConnectionError:
        return 0


def wait_for(server: subprocess.Popen[bytes], url: str, right: set[int], log: str) -> None:
    """Wait until the server responds with one of these statuses, or has ended."""
    until(lambda: server.poll() is not None or status(url) in right, lambda: f"{url}: see {log}")
    if server.poll() is not None:
        raise SystemExit(f"the server at {url} has ended: see {log}")


def until(is_so: Callable[[], bool], otherwise: Callable[[], str]) -> None:
    """Wait for a condition. At the timeout, raise an error with the text of `otherwise`."""
    end = time.monotonic() + TIMEOUT_SECONDS
    while not is_so():
        if time.monotonic() > end:
            raise AssertionError(f"timeout: {otherwise()}")
        time.sleep(0.05)
