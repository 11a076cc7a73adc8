"""The rotation of the hook's log by logrotate."""

from __future__ import annotations

import gzip
import json
import subprocess
import threading
from typing import TYPE_CHECKING

from programs import REPO, Agent, TestError

if TYPE_CHECKING:
    from pathlib import Path

ROTATIONS = 4


def records(file: Path) -> list[str]:
    """The domains of the records in a file."""
    text = gzip.decompress(file.read_bytes()).decode() if file.suffix == ".gz" else file.read_text()
    return [json.loads(line)["domain"] for line in text.splitlines()]


def rotates(folder: Path) -> None:
    """Rotate the log while hooks write to it. Each record must be in one of the files, once."""
    logs = folder / "virt-usb-log"
    logs.mkdir(mode=0o750)
    host = Agent("compute-log", folder)
    text = host.config.read_text()
    host.config.write_text(text.replace(f"{host.folder}/hook.log", f"{logs}/hook.log"))
    host.virt_usb("discover", "--sim", str(host.simulation))
    rules = (REPO / "install/virt-usb.logrotate").read_text()
    if "/var/log/virt-usb/" not in rules:
        raise TestError("the rules name another folder than /var/log/virt-usb")
    config = folder / "logrotate.conf"
    config.write_text(rules.replace("/var/log/virt-usb/", f"{logs}/"))
    config.chmod(0o644)

    def rotate() -> None:
        state = folder / "logrotate.state"
        command = ["logrotate", "--force", "--state", str(state), str(config)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode or done.stderr:
            raise TestError(f"logrotate: {done.stderr}")

    # Without a log, logrotate does nothing and prints nothing.
    rotate()
    host.hook("first")
    rotate()
    host.hook("second")
    for name, expected in (("hook.log", ["second"]), ("hook.log.1", ["first"])):
        if (found := records(logs / name)) != expected:
            raise TestError(f"{name} has the records {found}, and not {expected}")
    if (mode := (logs / "hook.log").stat().st_mode & 0o777) != 0o640:
        raise TestError(f"the new log has the mode {mode:o}")
    written, enough = ["first", "second"], threading.Event()

    def write() -> None:
        while not enough.is_set():
            name = f"guest{len(written)}"
            host.hook(name)
            written.append(name)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(ROTATIONS):
            rotate()
    finally:
        enough.set()
        writer.join()
    found = sorted(domain for file in logs.glob("hook.log*") for domain in records(file))
    if found != sorted(written):
        raise TestError(f"written: {sorted(written)}\nfound: {found}")
