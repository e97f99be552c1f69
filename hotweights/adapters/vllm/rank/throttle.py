"""How work beside the serving model leaves it the processors and the interpreter."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

SWITCH_SECONDS = 0.00005  # 50 µs instead of Python's 5 ms: see `giving_way` for what it saves
_counting = threading.Lock()  # two threads may be inside: the last one puts it back
_inside = 0
_usual_seconds = 0.005


class Throttle:
    """Works a share of the time and rests the other, so that serving keeps the processors. Called
    between small steps, on the thread that works.
    """

    def __init__(self, share: float) -> None:
        """``share`` is from 0 to 1; 1 never rests."""
        # not below a twentieth: a version would never be finished
        self._share = min(max(share, 0.05), 1.0)
        self._since = time.monotonic()
        self.rested_seconds = 0.0

    def __call__(self) -> None:
        now = time.monotonic()
        if self._share < 1.0:
            # at most a second: after one long step an order to stop is still heard soon
            time.sleep(min((now - self._since) * (1.0 / self._share - 1.0), 1.0))
        self._since = time.monotonic()
        self.rested_seconds += self._since - now


@contextmanager
def giving_way() -> Iterator[None]:
    """While another thread works, the one that serves waits for the interpreter after each of its
    operations on tensors: 5 ms by default. 200 small products took 6 ms alone, 810 ms beside a busy
    thread, and 47 ms with this. See sys.setswitchinterval; it holds for the whole process.
    """
    global _usual_seconds, _inside
    with _counting:
        if not _inside:
            _usual_seconds = sys.getswitchinterval()
            sys.setswitchinterval(SWITCH_SECONDS)
        _inside += 1
    try:
        yield
    finally:
        with _counting:
            _inside -= 1
            if not _inside:
                sys.setswitchinterval(_usual_seconds)
