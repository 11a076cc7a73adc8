"""TCP ports of loopback for servers of a test.

`ports.rs` of `tests/suite` reserves them in the same way.
"""

from __future__ import annotations

import random
import socket

# The kernel uses ports from 32768 on for connections. If a server restarts on such a port, a
# connection may have taken it. A client that retries a port of that range may even connect to
# itself.
PORTS = range(16000, 32768)
_reserved: list[socket.socket] = []


def reserve() -> int:
    """A free port, which no other test reserves while this process runs."""
    for port in random.sample(PORTS, len(PORTS)):
        name = socket.socket(socket.AF_UNIX)
        with socket.socket() as taken:
            # An earlier server may have left connections in TIME_WAIT.
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
