"""A world of one: the plan's chunks out of its source, by this host's own threads, in load
order.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from hotweights.replicate.world import Measured, World
from hotweights_planner.plan import Plan
from hotweights_storage.image import ImageBuilder
from hotweights_storage.reader import Limits
from hotweights_storage.resolve import Progress
from hotweights_storage.source_reads import SourceReads
from hotweights_storage.sources.base import Source
from hotweights_storage.stage import stage_from_source


class LocalReplicator:
    """A `world.Replicator` that reads the source itself."""

    def __init__(self, reads: SourceReads | None = None) -> None:
        """``reads``: the process's."""
        self._reads = reads or SourceReads()

    def run(
        self,
        plan: Plan,
        builder: ImageBuilder,
        source: Callable[[], Source],
        world: World,
        progress: Progress,
    ) -> Measured:
        """Reads what is missing, whoever planned it. Raises `TransferError`."""
        nbytes = sum(builder.nbytes(digest) for digest in builder.missing)
        began = time.perf_counter()

        def stage(opened: Source, limits: Limits) -> None:
            stage_from_source(opened, builder, limits=limits, progress=progress)
            # last: a file that was written meanwhile may have given bytes of two versions
            opened.check_unchanged()

        self._reads.read(plan.source, source, stage)
        return Measured("file", nbytes, time.perf_counter() - began)
