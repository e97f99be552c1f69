"""A work queue of keys: deduplicated, one worker per key at a time, paced, with backoff for what
failed.

Adding a key says "something changed, look again"; however often it is said, it is looked at once. A
key that is added while it is worked on comes again afterwards. It knows nothing of what the keys
mean; time is the event loop's.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from hotweights_common.backoff import Backoff

K = TypeVar("K", bound=Hashable)

_BUSY_SHARE = 4.0
"""One key may keep the processor busy for a fifth of the time."""


@dataclass(slots=True)
class _Waiting:
    handle: asyncio.TimerHandle
    due: float


@dataclass
class WorkQueue(Generic[K]):
    """Keys to work on. Use it from one event loop."""

    pace_seconds: float  # between the end of one look at a key and the next
    # a conflict is over at once; what fails for long is still looked at twice a minute
    backoff: Backoff = Backoff(0.2, 30.0)
    _ready: deque[K] = field(default_factory=deque)
    _since: dict[K, float] = field(default_factory=dict)  # when a ready key became so
    _working: set[K] = field(default_factory=set)
    _again: set[K] = field(default_factory=set)  # added while worked on
    _waiting: dict[K, _Waiting] = field(default_factory=dict)
    _next: dict[K, float] = field(default_factory=dict)  # when a key's pace allows it again
    _failures: dict[K, int] = field(default_factory=dict)
    _filled: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def depth(self) -> int:
        """Keys that are ready and wait for a worker."""
        return len(self._ready)

    @property
    def oldest_seconds(self) -> float:
        """How long the key that waits longest has been ready."""
        now = asyncio.get_running_loop().time()
        return max((now - since for since in self._since.values()), default=0.0)

    def add(self, key: K, after_seconds: float = 0.0) -> None:
        """Work on this key: at once, or later unless something comes before. Never sooner than its
        pace allows.
        """
        now = asyncio.get_running_loop().time()
        # ready already: it will see this change too
        if key in self._since:
            return
        # it may have looked before the change, so once more when it ends
        if key in self._working and after_seconds <= 0:
            self._again.add(key)
            return
        due = max(now + after_seconds, self._next.get(key, now))
        waiting = self._waiting.get(key)
        # it comes sooner anyway
        if waiting is not None and waiting.due <= due:
            return
        if waiting is not None:
            waiting.handle.cancel()
            del self._waiting[key]
        if due <= now and key not in self._working:
            self._make_ready(key)
        else:
            self._waiting[key] = _Waiting(
                asyncio.get_running_loop().call_at(due, self._on_due, key), due
            )

    def clear(self) -> None:
        """From now on nothing waits and nothing is worked on."""
        for waiting in self._waiting.values():
            waiting.handle.cancel()
        self._ready.clear()
        self._waiting.clear()
        for kept in (self._since, self._next, self._failures):
            kept.clear()
        for keys in (self._working, self._again):
            keys.clear()

    async def get(self) -> K:
        """The next key; say `done` or `failed` afterwards."""
        while not self._ready:
            self._filled.clear()
            await self._filled.wait()
        key = self._ready.popleft()
        self._since.pop(key, None)
        self._working.add(key)
        return key

    def done(self, key: K, busy_seconds: float = 0.0) -> None:
        """It worked, and kept the processor busy for so long."""
        self._failures.pop(key, None)
        self._finish(key, busy_seconds)

    def failed(self, key: K, at_least_seconds: float = 0.0) -> float:
        """It did not: again, after a wait that doubles each time, and that the API server may have
        asked to be longer. The wait.
        """
        count = self._failures[key] = self._failures.get(key, 0) + 1
        wait = max(self.backoff.seconds(count), at_least_seconds)
        # what happened meanwhile is seen at the next try; it must not shorten the wait
        self._again.discard(key)
        self._finish(key)
        self.add(key, wait)
        return wait

    def _finish(self, key: K, busy_seconds: float = 0.0) -> None:
        """What is costly comes less often, because others want their turn: by the time that it kept
        the processor busy, not by the time that it waited for somebody.
        """
        self._working.discard(key)
        now = asyncio.get_running_loop().time()
        self._next[key] = now + max(self.pace_seconds, _BUSY_SHARE * busy_seconds)
        # keys of objects that are gone never leave; to lose a pace costs one look too many
        if len(self._next) > 100_000:
            self._next.clear()
        if key in self._again:
            self._again.discard(key)
            self.add(key)

    def _on_due(self, key: K) -> None:
        self._waiting.pop(key, None)
        if key in self._working:
            self._again.add(key)
        elif key not in self._since:
            self._make_ready(key)

    def _make_ready(self, key: K) -> None:
        self._ready.append(key)
        self._since[key] = asyncio.get_running_loop().time()
        self._filled.set()
