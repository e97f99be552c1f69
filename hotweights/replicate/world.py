"""The ranks that replicate a plan together, and what whoever moves the bytes promises.

A launcher (mpiexec, Slurm, a shell loop) says by four variables who is who. It knows no wire:
``ucx`` and ``mpi`` are two `Replicator`, ``local`` is what happens without any.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from hotweights_planner.errors import Refused

if TYPE_CHECKING:
    from hotweights_planner.plan import Plan
    from hotweights_storage.image import ImageBuilder
    from hotweights_storage.resolve import Progress
    from hotweights_storage.sources.base import Source

DEFAULT_PORT = 19999
MAX_RANKS = 1024


@dataclass(frozen=True, slots=True)
class World:
    """Who we are among how many, and where rank 0 is."""

    size: int = 1
    rank: int = 0
    address: str = "127.0.0.1"
    port: int = DEFAULT_PORT

    @classmethod
    def read(cls, environment: Mapping[str, str], *, mpiexec: bool = False) -> World:
        """From WORLD_SIZE, RANK, MASTER_ADDR and MASTER_PORT; what is not set is a world of one.
        With ``mpiexec``, size and rank are also taken from what that tells its ranks (PMI_SIZE and
        PMI_RANK, as MPICH's Hydra sets them). Raises `Refused`.
        """
        size_name, rank_name = ("WORLD_SIZE", "RANK")
        if mpiexec and not environment.get(size_name) and environment.get("PMI_SIZE"):
            size_name, rank_name = ("PMI_SIZE", "PMI_RANK")
        size = _number(environment, size_name, 1, 1, MAX_RANKS)
        rank = _number(environment, rank_name, 0, 0, size - 1)
        port = _number(environment, "MASTER_PORT", DEFAULT_PORT, 1, 65535)
        return cls(size, rank, environment.get("MASTER_ADDR") or "127.0.0.1", port)


@dataclass(frozen=True, slots=True)
class Measured:
    """What one rank saw of its part."""

    transport: str
    """What moved the bytes: ``file``, ``ucx``, ``mpi``."""
    nbytes: int
    """Verified bytes that came into this rank's image."""
    seconds: float
    """From the first request to the last verified chunk."""
    details: Mapping[str, str | int | float] = field(default_factory=dict)
    """What else is worth printing: which lanes were live, settings, retries."""


class Replicator(Protocol):
    """Moves the plan's buckets from rank 0 to all ranks. ``ucx`` and ``mpi`` each have
    ``replicator(*, window: int) -> Replicator``, which raises `TransferError` with the reason where
    it cannot work here; ``window`` is how many buckets are on their way at once.

    `run` is called once on every rank, in a thread that may block. Rank 0 reads ``source``; every
    other rank may open it only after its peers failed for good, or raise instead. Every chunk that
    ``builder`` is missing goes through `ImageBuilder.put`, which verifies it; ranks may miss
    different chunks, because each has what it has of the base version. ``progress`` is told the
    bytes that came in addition, by one thread at a time. When `run` returns, nothing of the version
    is missing on this rank; it does not finish the builder. It raises `TransferError` or
    `PeerError`, in bounded time whatever the others do.
    """

    def run(
        self,
        plan: Plan,
        builder: ImageBuilder,
        source: Callable[[], Source],
        world: World,
        progress: Progress,
    ) -> Measured: ...


def _number(environment: Mapping[str, str], name: str, default: int, least: int, most: int) -> int:
    text = environment.get(name)
    if not text:
        return default
    number = int(text) if text.isascii() and text.isdigit() else -1
    if not least <= number <= most:
        raise Refused(
            name,
            f"{text!r} is not a number from {least} to {most}",
            "let the launcher set it, or unset it",
        )
    return number
