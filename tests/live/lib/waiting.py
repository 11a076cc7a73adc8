"""Wait for a condition, with a timeout."""

import time

from .shell import Failure

# Everything takes longer under emulation and on a busy machine. The limits say nothing about speed.
TIMEOUT_SECONDS = 300


def until(probe, what, seconds=TIMEOUT_SECONDS, pause=0.1):
    """Return the first truthy answer of the probe."""
    end = time.monotonic() + seconds
    while True:
        answer = probe()
        if answer:
            return answer
        if time.monotonic() > end:
            raise Failure(f"timeout after {seconds} s: waited for {what}; last answer: {answer!r}")
        time.sleep(pause)


def until_none(problems, what, seconds=TIMEOUT_SECONDS, pause=0.5):
    """Wait until a list of problems is empty. Raise Failure with those that remain."""
    end = time.monotonic() + seconds
    while True:
        found = problems()
        if not found:
            return
        if time.monotonic() > end:
            raise Failure(f"after {seconds} s {what} does not hold:\n  " + "\n  ".join(found))
        time.sleep(pause)


def stays(probe, what, seconds=2, pause=0.2):
    """Check that a condition holds for the whole time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if not probe():
            raise Failure(f"no longer holds: {what}")
        time.sleep(pause)
