"""Run programs with a deadline: a live test that fails says more than one that hangs."""

import subprocess
from dataclasses import dataclass


class Failure(Exception):
    """An expectation of a case that was not met."""


@dataclass
class Result:
    command: str
    status: int
    out: str
    err: str

    @property
    def ok(self):
        return self.status == 0

    @property
    def text(self):
        return (self.out + self.err).strip()

    def __str__(self):
        return f"$ {self.command}\n{self.text}\n[exit status {self.status}]"


# The commands of the current case, shown when it fails.
transcript = []


def run(*command, timeout=60, stdin="", quiet=False):
    """Run a program to its end. The status is 124 at the deadline, 127 if there is no program."""
    words = [str(word) for word in command]
    try:
        done = subprocess.run(
            words, input=stdin, capture_output=True, text=True, errors="replace", timeout=timeout
        )
        result = Result(" ".join(words), done.returncode, done.stdout, done.stderr)
    except subprocess.TimeoutExpired:
        result = Result(" ".join(words), 124, "", f"did not end within {timeout} s")
    except FileNotFoundError as missing:
        result = Result(" ".join(words), 127, "", str(missing))
    if not quiet:
        transcript.append(str(result))
    return result


def must(*command, **options):
    """Run a program. Raise Failure if it fails."""
    result = run(*command, **options)
    if not result.ok:
        raise Failure(f"a program failed:\n{result}")
    return result


def expect(holds, wanted):
    if not holds:
        raise Failure(f"wanted: {wanted}")


def refused(result, *fragments):
    """Check that a program failed and printed each of these fragments."""
    expect(not result.ok, f"a refusal, but it was done:\n{result}")
    for fragment in fragments:
        expect(fragment in result.text, f"a refusal with {fragment!r}, found:\n{result}")
    return result


def done(result):
    expect(result.ok, f"success, found:\n{result}")
    return result
