"""Waiting for what takes a moment, and never longer than said."""

import time

from .shell import Failure

# Under emulation and with other work on the machine everything takes longer; no limit here is a claim about speed.
TIMEOUT_SECONDS = 300


def until(probe, what, seconds=TIMEOUT_SECONDS, pause=0.1):
    """Returns the probe's first truthy answer."""
    end = time.monotonic() + seconds
    while True:
        answer = probe()
        if answer:
            return answer
        if time.monotonic() > end:
            raise Failure(f"waited {seconds} s in vain for: {what}; last answer: {answer!r}")
        time.sleep(pause)


def until_none(problems, what, seconds=TIMEOUT_SECONDS, pause=0.5):
    """Waits for a list of problems to become empty, and tells those that stay."""
    end = time.monotonic() + seconds
    while True:
        found = problems()
        if not found:
            return
        if time.monotonic() > end:
            raise Failure(f"after {seconds} s {what} does not hold:\n  " + "\n  ".join(found))
        time.sleep(pause)


def stays(probe, what, seconds=2, pause=0.2):
    """It must hold all the time: for what must *not* happen."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if not probe():
            raise Failure(f"no longer holds: {what}")
        time.sleep(pause)
