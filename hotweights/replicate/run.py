"""One plan into one image on this host: what is here already is reused, the rest is brought,
verified and measured.

Chunks are verified as they come, always; the finished image can be read once more. It knows neither
who decides (the coordinator, `participant`) nor where versions are kept (`version_store`).
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from hotweights.files import read_bounded
from hotweights.replicate.image_check import image_digest
from hotweights.replicate.local import LocalReplicator
from hotweights.replicate.world import Measured, Replicator, World
from hotweights_common.errors import HotweightsError
from hotweights_common.reasons import Reason
from hotweights_planner import plan as plans
from hotweights_planner.manifest import Chunk, Manifest
from hotweights_planner.plan import Plan
from hotweights_planner.plan_document import MAX_PLAN_NBYTES
from hotweights_storage.capacity import available_nbytes
from hotweights_storage.errors import ChecksumMismatch, NoCapacity, TransferError
from hotweights_storage.image import Image, ImageBuilder
from hotweights_storage.reader import read_chunks
from hotweights_storage.resolve import Progress
from hotweights_storage.source_reads import SourceReads
from hotweights_storage.sources.base import Source
from hotweights_storage.sources.file import open_folder
from hotweights_transports.peers.base import PeerError

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Base:
    """A version that lies on this host."""

    folder: Path
    manifest: Manifest


@dataclass(frozen=True, slots=True)
class Replicated:
    """What came of a replication. The image is open only within `replicated`."""

    image: Image
    measured: Measured
    reused_nbytes: int
    """Bytes that were taken from the base, verified as all others."""
    digest: str
    """As `image_digest` gives it."""


class Stop:
    """Ends a replication from another thread; whoever asked says why."""

    def __init__(self) -> None:
        self._set = threading.Event()
        self._error: HotweightsError | None = None

    def because(self, error: HotweightsError) -> None:
        """End it for this reason; the first one counts. From any thread."""
        self._error = self._error or error
        self._set.set()

    def check(self) -> None:
        """Raise the reason if there is one. Called with each chunk that comes in."""
        if self._error is not None:
            raise self._error


def read_plan(path: Path) -> Plan:
    """The plan of a file. Raises `BadPlan` or `SourceUnavailable`."""
    content = read_bounded(
        path, MAX_PLAN_NBYTES, "write it with `hotweights plan`, or name another with --plan"
    )
    return plans.parse(content, str(path))


def replicator_for(
    world: World, *, ucx: bool, mpi: bool, window: int, reads: SourceReads | None = None
) -> Replicator:
    """Whoever moves bytes in this world; ``reads`` says how long a source may hang. Raises
    `TransferError` where that cannot work here.
    """
    if world.size == 1:
        return LocalReplicator(reads)
    if mpi:
        from hotweights.replicate import mpi as by_mpi

        return by_mpi.replicator(window=window, reads=reads)
    if ucx:
        from hotweights.replicate import ucx as by_ucx

        return by_ucx.replicator(window=window, reads=reads)
    text = (
        f"WORLD_SIZE is {world.size}, and nothing says how its ranks talk; add --ucx or --mpi, or "
        "unset WORLD_SIZE"
    )
    raise TransferError(text, Reason.NO_TRANSPORT)


@contextmanager
def replicated(
    plan: Plan,
    replicator: Replicator,
    source: Callable[[], Source],
    world: World,
    base: Base | None = None,
    progress: Progress = lambda _nbytes: None,
    stop: Stop | None = None,
) -> Iterator[Replicated]:
    """The plan's version in memory, as long as the context lasts. ``base`` is what may be reused.
    Raises `TransferError` (`NoCapacity` before anything is read), or what ``stop`` was given.
    """
    stopping = stop or Stop()

    def count(nbytes: int) -> None:
        stopping.check()
        progress(nbytes)

    with ImageBuilder(plan.manifest) as builder:
        _check_room(builder)
        reused = _reuse(builder, base, count) if base is not None else 0
        try:
            measured = replicator.run(plan, builder, source, world, count)
        except PeerError as error:
            raise TransferError(str(error), error.reason) from error
        stopping.check()  # it may have come after the last chunk
        image = builder.finish()
    try:
        yield Replicated(image, measured, reused, image_digest(image))
    finally:
        image.close()


def _check_room(builder: ImageBuilder) -> None:
    free = available_nbytes()
    if builder.new_nbytes > free:
        text = (
            f"version {builder.manifest.version} needs {builder.new_nbytes} bytes of memory, "
            f"{free} are free here"
        )
        raise NoCapacity(f"{text}; free some, or replicate where there is more")


def _reuse(builder: ImageBuilder, base: Base, progress: Progress) -> int:
    """Take unchanged chunks from the version that is here; one that went bad on the disk is brought
    anew.
    """
    wanted = list(base.manifest.first_chunks(builder.missing))
    lock = threading.Lock()
    taken = 0

    def put(chunk: Chunk, data: memoryview) -> None:
        nonlocal taken
        try:
            builder.put(chunk.blake3, data, str(base.folder))
        except ChecksumMismatch as error:
            log.warning("%s (it is brought anew)", error)
            return
        with lock:
            taken += chunk.nbytes
            progress(chunk.nbytes)

    if wanted:
        try:
            with open_folder(base.folder) as source:
                read_chunks(source, wanted, put)
        except (TransferError, OSError) as error:
            if taken == 0:
                log.warning("nothing is reused: %s", error)
            else:
                log.warning("only a part is reused: %s", error)
    return taken
