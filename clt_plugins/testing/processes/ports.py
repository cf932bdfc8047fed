"""Ports for processes that meet on this machine."""

from __future__ import annotations

import random
import socket

PORTS = range(10_000, 32_000)
"""Below those that systems give to connections (Linux from 32,768, macOS and Windows from 49,152). So no connection
takes a port between the call and its use, and no client that comes early is connected with itself."""


def free_port() -> int:
    """A port that nobody listens on.

    Raises:
        OSError: none was found.
    """
    draw = random.SystemRandom()
    for _ in range(1000):
        port = draw.choice(PORTS)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port
    raise OSError(f"no port from {PORTS.start} to {PORTS.stop - 1} is free")
