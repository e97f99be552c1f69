"""Brings what an image lacks from a source into memory: read, verify, store, tell.

It runs in the caller's thread and in a pool of its own until everything asked for is there, or
raises. Chunks that somebody else (a peer) brought meanwhile are left out. It does not decide what
is fetched from where; that is the agent's plan.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterator

from hotweights_planner.manifest import Chunk
from hotweights_storage.image import ImageBuilder
from hotweights_storage.reader import Limits, read_chunks
from hotweights_storage.resolve import Progress
from hotweights_storage.sources.base import Source


def stage_from_source(
    source: Source,
    builder: ImageBuilder,
    wanted: Collection[str] | None = None,
    workers: int | None = None,
    limits: Limits | None = None,
    progress: Progress | None = None,
) -> None:
    """Put ``wanted`` digests (default: all that are missing) into ``builder``, whose ``on_chunk``
    hears of each. Raises what the source does, `ChecksumMismatch`, `NoCapacity`, and `Cancelled` by
    ``limits``; what was stored until then stays, and it may be called again.
    """
    counting = threading.Lock()

    def lacking() -> Iterator[Chunk]:
        for chunk in builder.manifest.first_chunks(builder.missing if wanted is None else wanted):
            if not builder.has(chunk.blake3):
                yield chunk

    def put(chunk: Chunk, data: memoryview) -> None:
        # somebody may have brought it while it was read: that spares hashing it
        if (
            not builder.has(chunk.blake3)
            and builder.put(chunk.blake3, data, source.uri)
            and progress is not None
        ):
            with counting:
                progress(chunk.nbytes)

    read_chunks(source, lacking(), put, workers, limits)
