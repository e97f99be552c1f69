"""A bandwidth limit shared by all connections of a server, or by all fetches of a node: a bucket of
bytes that refills with time.

The arithmetic is pure (times are passed in); who must wait sleeps outside of the lock, in its own
thread.
"""

from __future__ import annotations

import threading
import time


class RateLimiter:
    """`take` returns at once while the bucket has bytes; afterwards as late as the rate asks for,
    in turn. Any thread may call it. ``burst_seconds``: how much of a pause may be made up for.
    Raises `ValueError` for a rate that is not positive.
    """

    def __init__(self, bytes_per_second: int, *, burst_seconds: float = 0.1) -> None:
        if bytes_per_second <= 0:
            raise ValueError(
                f"a bandwidth limit of {bytes_per_second} bytes/s lets nothing through; leave "
                "it out for none"
            )
        # what is taken at a time: an eighth of a second, so that connections take turns often; at
        # least what is worth a system call, at most what one call moves
        self.piece_nbytes = max(16 * 1024, min(1024 * 1024, bytes_per_second // 8))
        self._seconds_per_byte = 1 / bytes_per_second
        self._burst_seconds = burst_seconds
        self._free_at = 0.0
        self._lock = threading.Lock()

    def delay_seconds(self, nbytes: int, now: float) -> float:
        """Book `nbytes`; how long from `now` until they may go."""
        with self._lock:
            begins = max(self._free_at, now - self._burst_seconds)
            self._free_at = begins + nbytes * self._seconds_per_byte
            return max(0.0, begins - now)

    def take(self, nbytes: int, closing: threading.Event) -> None:
        """Wait until `nbytes` may go, or until `closing` is set."""
        delay = self.delay_seconds(nbytes, time.monotonic())
        if delay > 0:
            closing.wait(delay)
