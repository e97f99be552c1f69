"""Ports for whoever has to be told one before it listens."""

from __future__ import annotations

import os
import random
import socket
from contextlib import ExitStack
from itertools import count as counting
from pathlib import Path

_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")
_LOWEST = 10_000
_CONTROL_PLANES = 20_000  # from here on those of hack/localcluster draw theirs
_TRIES = 100


def _share() -> range:
    """This worker's: what is free now, another one could be given before its owner listens."""
    below = int(_RANGE.read_text().split()[0]) if _RANGE.exists() else 32_768
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    number = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % workers
    size = (min(below, _CONTROL_PLANES) - _LOWEST) // workers
    return range(_LOWEST + number * size, _LOWEST + (number + 1) * size)


_places = counting(random.randrange(len(_share())))  # one after the other: none is given twice


def free_ports(count: int = 1) -> list[int]:
    """So many in a row, free now. None that the system gives to connections: one could get it
    before its owner, or between two of them, listens.
    """
    share = _share()
    for _ in range(_TRIES):
        places = [next(_places) % len(share) for _ in range(count)]
        ports = [share[place] for place in places]
        if ports[-1] - ports[0] != count - 1:
            continue  # around the end
        with ExitStack() as held:
            try:
                for port in ports:
                    held.enter_context(socket.create_server(("127.0.0.1", port)))
            except OSError:
                continue
        return ports
    raise RuntimeError(f"no {count} free ports in a row between {share.start} and {share.stop}")
