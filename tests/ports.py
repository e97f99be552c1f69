"""Ports for whoever has to be told one before it listens."""

from __future__ import annotations

import random
import socket
from contextlib import ExitStack
from pathlib import Path

_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")
_LOWEST = 10_000
_TRIES = 100


def free_ports(count: int = 1) -> list[int]:
    """So many in a row, free now. None that the system gives to connections: one could get it
    before its owner, or between two of them, listens.
    """
    below = int(_RANGE.read_text().split()[0]) if _RANGE.exists() else 32_768
    for _ in range(_TRIES):
        first = random.randrange(_LOWEST, below - count)
        with ExitStack() as held:
            try:
                for port in range(first, first + count):
                    held.enter_context(socket.create_server(("127.0.0.1", port)))
            except OSError:
                continue
        return list(range(first, first + count))
    raise RuntimeError(f"no {count} free ports in a row between {_LOWEST} and {below}")
