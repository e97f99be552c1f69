"""A work queue of keys: deduplicated, one worker per key at a time, paced, with backoff for what failed.

Adding a key says "something changed, look again"; however often it is said, it is looked at once. A key that is added while it
is worked on comes again afterwards. It knows nothing of what the keys mean; time is the event loop's.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)

_MAX_BACKOFF_SECONDS = 30.0


@dataclass(slots=True)
class _Waiting:
    handle: asyncio.TimerHandle
    due: float


@dataclass
class WorkQueue(Generic[K]):
    """Keys to work on. Use it from one event loop."""

    pace_seconds: float
    first_backoff_seconds: float = 0.2
    _ready: deque[K] = field(default_factory=deque)
    _since: dict[K, float] = field(default_factory=dict)  # when a ready key became so
    _working: set[K] = field(default_factory=set)
    _again: set[K] = field(default_factory=set)  # added while worked on
    _waiting: dict[K, _Waiting] = field(default_factory=dict)
    _began: dict[K, float] = field(default_factory=dict)
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
        """Work on this key: at once, or later unless something comes before. Never sooner than its pace allows."""
        now = asyncio.get_running_loop().time()
        if key in self._since:
            return
        if key in self._working and after_seconds <= 0:
            self._again.add(key)
            return
        due = max(now + after_seconds, self._next.get(key, now))
        waiting = self._waiting.get(key)
        if waiting is not None and waiting.due <= due:
            return
        if waiting is not None:
            waiting.handle.cancel()
            del self._waiting[key]
        if due <= now and key not in self._working:
            self._make_ready(key)
        else:
            self._waiting[key] = _Waiting(asyncio.get_running_loop().call_at(due, self._on_due, key), due)

    async def get(self) -> K:
        """The next key; say `done` or `failed` afterwards."""
        while not self._ready:
            self._filled.clear()
            await self._filled.wait()
        key = self._ready.popleft()
        self._since.pop(key, None)
        self._working.add(key)
        self._began[key] = asyncio.get_running_loop().time()
        return key

    def done(self, key: K) -> None:
        """It worked."""
        self._failures.pop(key, None)
        self._finish(key)

    def failed(self, key: K) -> float:
        """It did not: again, after a wait that doubles each time. The wait."""
        count = self._failures[key] = self._failures.get(key, 0) + 1
        wait = float(min(_MAX_BACKOFF_SECONDS, self.first_backoff_seconds * 2 ** min(count - 1, 16)))
        self._again.discard(key)
        self._finish(key)
        self.add(key, wait)
        return wait

    def _finish(self, key: K) -> None:
        self._working.discard(key)
        now = asyncio.get_running_loop().time()
        took = now - self._began.pop(key, now)
        self._next[key] = now + max(
            self.pace_seconds, 2 * took
        )  # what is costly comes less often: others want their turn
        if len(self._next) > 100_000:
            self._next.clear()  # paces of objects long gone
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
