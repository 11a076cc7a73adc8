"""Programs, always with a deadline: a live test that hangs says less than one that fails."""

import subprocess
from dataclasses import dataclass


class Failure(Exception):
    """What a case wanted and did not get."""


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


# What ran in the case at hand: shown when it fails.
transcript = []


def run(*command, timeout=60, stdin="", quiet=False):
    """Runs it to its end; a program that does not end has the status 124, one that is not there 127."""
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
    """Runs it and takes no failure."""
    result = run(*command, **options)
    if not result.ok:
        raise Failure(f"a program failed:\n{result}")
    return result


def expect(holds, wanted):
    if not holds:
        raise Failure(f"wanted: {wanted}")


def refused(result, *fragments):
    """It must have failed, and said each of these."""
    expect(not result.ok, f"a refusal, but it was done:\n{result}")
    for fragment in fragments:
        expect(fragment in result.text, f"a refusal with {fragment!r}, found:\n{result}")
    return result


def done(result):
    expect(result.ok, f"success, found:\n{result}")
    return result
