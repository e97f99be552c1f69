"""Whose turn it is to be staged.

There are few places, because each version takes memory and the network from its first byte on. Two
things must not wait for them: a version that a pod needs before it can open its port, which waits
for its own kind alone; and everything else, while whoever has a place gets nothing. A source that
hangs, or a parent that has nothing yet, thus keeps no version of another source from coming.

It knows versions by their digests, and nothing of how they come.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

from hotweights_common.reasons import Reason
from hotweights_storage.errors import Cancelled

TICK_SECONDS = 0.2  # how late a cancellation, or a place that is lent, is noticed
IDLE_SECONDS = 10.0  # without a byte for so long whoever has a place does not count


@dataclass(slots=True, eq=False)
class _Staging:
    digest: str
    moved_at: float  # seconds: when its last bytes came, or it got its place


class Places:
    """Thread-safe. Any number of threads wait; each is woken when it may go on."""

    def __init__(self, at_once: int, idle_seconds: float = IDLE_SECONDS) -> None:
        self._at_once = at_once
        self._idle_seconds = idle_seconds
        self._changed = threading.Condition()
        self._awaited: frozenset[str] = frozenset()
        self._waiting: list[str] = []  # in the order in which they came
        self._staging: list[_Staging] = []

    def prefer(self, digests: Collection[str]) -> None:
        """Pods wait for these and can do nothing else; no others are preferred any more."""
        with self._changed:
            self._awaited = frozenset(digests)
            self._changed.notify_all()

    @contextlib.contextmanager
    def place(
        self, digest: str, cancel: threading.Event, deadline: float
    ) -> Iterator[Callable[[], None]]:
        """Wait for a place, and keep it for the context; what it gives is to be called when bytes
        came. ``deadline`` is `time.monotonic`'s. Raises `Cancelled`, also when that passes.
        """
        one = self._wait(digest, cancel, deadline)

        def moved() -> None:
            one.moved_at = time.monotonic()

        try:
            yield moved
        finally:
            with self._changed:
                self._staging.remove(one)
                self._changed.notify_all()

    def _wait(self, digest: str, cancel: threading.Event, deadline: float) -> _Staging:
        with self._changed:
            self._waiting.append(digest)
            try:
                while not self._may_begin(digest, time.monotonic()):
                    if cancel.is_set():
                        raise Cancelled("cancelled while it waited for its turn")
                    if time.monotonic() > deadline:
                        raise Cancelled(
                            "its turn did not come in time; stage fewer versions at once",
                            Reason.DEADLINE_EXCEEDED,
                        )
                    self._changed.wait(TICK_SECONDS)
            finally:
                self._waiting.remove(digest)
                self._changed.notify_all()
            one = _Staging(digest, time.monotonic())
            self._staging.append(one)
            return one

    def _may_begin(self, digest: str, now: float) -> bool:
        first = next((d for d in self._waiting if d in self._awaited), self._waiting[0])
        if digest != first:
            return False
        moving = [one for one in self._staging if now - one.moved_at < self._idle_seconds]
        if digest in self._awaited:  # what nobody waits for keeps none of these waiting
            moving = [one for one in moving if one.digest in self._awaited]
        return len(moving) < self._at_once
