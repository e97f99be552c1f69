"""The same replication several times over, measured: what `hotweights bench` and
``bench/bench_replicate.py`` print.

Every round brings everything that the plan's version has, into fresh memory, verified; nothing is
committed. ``cold`` lets the kernel forget the source's files first, so that the disk is measured
and not the page cache.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from hotweights.replicate.run import replicated
from hotweights.replicate.world import Measured, Replicator, World
from hotweights_planner.plan import Plan
from hotweights_storage import device, linux
from hotweights_storage.sources.base import Source


@dataclass(frozen=True, slots=True)
class Round:
    """One replication, measured."""

    measured: Measured
    image_digest: str
    device_seconds: float
    """From host memory onto the GPU; 0 without one."""

    @property
    def bytes_per_second(self) -> float:
        """The rate of the transfer, verification included; 0 where it took no time at all."""
        return self.measured.nbytes / self.measured.seconds if self.measured.seconds else 0.0


def rounds(
    plan: Plan,
    replicator: Replicator,
    source: Callable[[], Source],
    world: World,
    repeat: int,
    road: device.CopyPath,
    folder: Path | None = None,
    *,
    cold: bool = False,
) -> Iterator[Round]:
    """Replicate ``repeat`` times, one after the other; each image is gone before the next.

    ``road`` is how an image gets onto a GPU, ``folder`` the source's, for that and for ``cold``.
    Raises `TransferError`.
    """
    for _ in range(repeat):
        if cold and folder is not None:
            _forget(folder)
        with replicated(plan, replicator, source, world) as done:
            began = time.perf_counter()
            if road.name != "host":  # "host" is no GPU: there is nothing to copy
                device.to_device(done.image, road, folder).close()
            device_seconds = time.perf_counter() - began if road.name != "host" else 0.0
            yield Round(done.measured, done.digest, device_seconds)


def median_rate(done: list[Round]) -> float:
    """Bytes per second of the round in the middle."""
    return statistics.median(one.bytes_per_second for one in done)


def _forget(folder: Path) -> None:
    """Let go of the cached pages of every file, without being root (posix_fadvise(2),
    ``POSIX_FADV_DONTNEED``).
    """
    for path in folder.iterdir():
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            try:
                linux.forget_pages(descriptor)
            finally:
                os.close(descriptor)
