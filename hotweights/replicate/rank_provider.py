"""What one rank has of a plan so far, for the ranks after it, and whether the next one has said
goodbye.

A builder in progress as `ChunkProvider`: verified chunks are lent, missing ones are waited for. It
knows no transport.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from hotweights_agent.staging.chunk_sources import ChunkSource
from hotweights_transports.peers.base import ChunkProvider, Deliver, Lease, Missing, Pending, Want

if TYPE_CHECKING:
    from hotweights_planner.plan import Plan
    from hotweights_storage.image import ImageBuilder
    from hotweights_storage.resolve import Progress


class RankProvider(ChunkProvider):
    """What a rank lends; asked from any thread. ``child`` is the rank whose goodbye is waited for,
    None where nobody pulls from here by right.
    """

    def __init__(
        self, plan: Plan, builder: ImageBuilder, child: int | None, progress: Progress
    ) -> None:
        self._plan = plan
        self._builder = builder
        self._progress = progress
        self._goodbye = b"" if child is None else self._words(child)
        self._known = frozenset(chunk.blake3 for chunk in plan.manifest.chunks())
        self._changed = threading.Condition()  # guards what follows
        self._ended = False
        self.parted = False
        """Whether the child said that it has everything."""
        self.heard_at: float | None = None
        """When somebody last asked for something."""

    def announcing(self, source: ChunkSource) -> ChunkSource:
        """The same source; those who wait here hear of each chunk that it brings."""
        return _Announcing(source, self)

    def goodbye(self, rank: int) -> str:
        """The digest of what ``rank`` asks its parent for when it has everything: only who knows
        the plan knows it.
        """
        return _digest(self._words(rank))

    def arrived(self, want: Want) -> None:
        """A chunk is verified and in the builder: those who wait for it are woken."""
        with self._changed:
            self._progress(want.nbytes)  # under the lock: by one thread at a time, as promised
            self._changed.notify_all()

    def end(self) -> None:
        """Nothing more will come: nobody waits here any longer, and what is here stays lent."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def wait(self, seconds: float) -> None:
        """Wait until the child has said goodbye, at most so long."""
        with self._changed:
            self._changed.wait_for(lambda: self.parted, seconds)

    # What the others ask (`ChunkProvider`):

    def locate(self, blake3: str) -> Lease | Pending | None:
        """A chunk that is here, or one of the plan's that is waited for until `end`."""
        self.heard_at = time.monotonic()
        if blake3 not in self._known:
            return None
        found = self._builder.range(blake3)
        if found is not None:
            return Lease(*found, release=_stays)
        return None if self._ended else Pending(lambda seconds: self._await(blake3, seconds))

    def manifest(self, digest: str) -> bytes | None:
        """The plan's manifest. Asked for by the child's goodbye: those words, and it has parted."""
        self.heard_at = time.monotonic()
        if digest == self._plan.manifest.digest:
            return self._plan.manifest.canonical
        if not self._goodbye or digest != _digest(self._goodbye):
            return None
        with self._changed:
            self.parted = True
            self._changed.notify_all()
        return self._goodbye

    def _await(self, blake3: str, seconds: float) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: self._ended or self._builder.has(blake3), seconds)

    def _words(self, rank: int) -> bytes:
        return f"rank {rank} has everything of {self._plan.digest}".encode()


class _Announcing(ChunkSource):
    def __init__(self, source: ChunkSource, board: RankProvider) -> None:
        self.name = source.name
        self._source = source
        self._board = board

    def fetch(
        self, wanted: Iterator[Want], deliver: Deliver, stop: threading.Event
    ) -> list[Missing]:
        def announce(want: Want, data: memoryview) -> None:
            deliver(want, data)
            self._board.arrived(want)

        return self._source.fetch(wanted, announce, stop)


def _digest(words: bytes) -> str:
    return f"sha256:{hashlib.sha256(words).hexdigest()}"


def _stays() -> None:
    """Nothing to release: the builder outlives the server that lends from it."""
