"""Lines that strangers cause must not fill the disk: of each kind, only some a minute."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable


class FewLines(logging.Filter):
    """Lets ``most`` lines of one text (before its values are put in) through in ``seconds``; the
    last of them says so. Added to the logger of a module whose lines others can cause.
    """

    def __init__(
        self,
        most: int = 20,
        seconds: float = 60.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__()
        self._most, self._seconds, self._clock = most, seconds, clock
        self._seen: dict[str, tuple[float, int]] = {}  # text → since when, how many

    def filter(self, record: logging.LogRecord) -> bool:
        text, now = str(record.msg), self._clock()
        began, count = self._seen.get(text, (now, 0))
        if now - began >= self._seconds:
            began, count = now, 0
        self._seen[text] = (began, count + 1)
        if count == self._most - 1:
            record.msg = f"{text} (and no more of these for a while)"
        return count < self._most
