"""Locks between processes, by files. The kernel lets go of them when a process ends, however it
ends (flock(2)).
"""

from __future__ import annotations

import fcntl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hotweights_common.errors import HotweightsError

_AGAIN_SECONDS = 0.1  # flock has no time limit of its own


class Busy(HotweightsError):
    """Another process, or another opening of the file, has the lock."""


@contextmanager
def held(path: Path, wait_seconds: float = 0.0) -> Iterator[None]:
    """The lock that this file is. Raises `Busy` if another process or another opening of it has it
    for so long, and `OSError` when the file cannot be opened. It blocks the caller's thread.
    """
    until = time.monotonic() + wait_seconds
    with path.open("w") as file:
        while True:  # once at least, also without any wait
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= until:
                    raise Busy(str(path)) from None
                time.sleep(_AGAIN_SECONDS)
        yield
