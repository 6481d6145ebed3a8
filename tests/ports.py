"""Ports that nobody else takes between being chosen and being listened at."""

from __future__ import annotations

import random
import socket
from pathlib import Path

LOWEST = 10_000
RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")
_given: set[int] = set()


def free_port() -> int:
    """A port of the loopback that is free, below those that the system itself gives out, and never the same again.

    Where the system gives out all of them, or does not say, it is one of its own.
    """
    highest = int(RANGE.read_text().split()[0]) if RANGE.exists() else 0
    draw = random.SystemRandom()  # as other processes of the tests have not
    for _ in range(100 if highest > LOWEST else 0):
        port = draw.randrange(LOWEST, highest)
        if port not in _given and _is_free(port):
            _given.add(port)
            return port
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
