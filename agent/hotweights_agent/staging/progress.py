"""How much has come, added up from many threads."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

# as often as the fetch reports, for people: what is decided does not depend on it
TELL_SECONDS = 0.5


class ByteCounter:
    """Counts bytes, and tells their sum now and then."""

    def __init__(self, tell: Callable[[int], None]) -> None:
        self._tell = tell
        self._lock = threading.Lock()
        self._told_at = time.monotonic()
        self.nbytes = 0

    def add(self, nbytes: int) -> None:
        """So many more have come. May be called from any thread; tells outside of the lock."""
        with self._lock:
            self.nbytes += nbytes
            now = time.monotonic()
            if now - self._told_at < TELL_SECONDS:
                return
            self._told_at = now
            came = self.nbytes
        self._tell(came)
