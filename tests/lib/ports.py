"""TCP ports of loopback for servers of a test.

`ports.rs` of `tests/suite` reserves them in the same way.
"""

from __future__ import annotations

import random
import socket

# The kernel gives ports from 32768 on to connections. A server that starts again on one of those may
# find it taken by a connection. Such a connection can even be one to itself: a client that tries a
# port of that range again and again is connected to itself at some time.
PORTS = range(16000, 32768)
_reserved: list[socket.socket] = []


def reserve() -> int:
    """A port that nobody listens on, and that no other test reserves while this process lives."""
    for port in random.sample(PORTS, len(PORTS)):
        name = socket.socket(socket.AF_UNIX)
        with socket.socket() as taken:
            # A server of before may have left connections that wait for their end.
            taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                name.bind(f"\0virt-usb-test-port-{port}")
                taken.bind(("127.0.0.1", port))
            except OSError:
                name.close()
                continue
        _reserved.append(name)
        return port
    raise OSError(f"no TCP port from {PORTS.start} to {PORTS.stop - 1} is free")
