"""What a version needs that a node does not have: each distinct chunk once, in load order.

It asks only whether a digest is there, never where or whose it is.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass
from operator import attrgetter

from hotweights_planner.manifest import Chunk, Manifest


@dataclass(frozen=True, slots=True)
class Delta:
    """``missing`` in load order; ``missing_nbytes + reused_nbytes`` are the version's bytes (equal chunks are reused)."""

    missing: tuple[Chunk, ...]
    missing_nbytes: int
    reused_nbytes: int


def delta(manifest: Manifest, present: Container[str]) -> Delta:
    """The chunks of ``manifest`` whose digests are not in ``present``."""
    wanted = {digest for tensor in manifest.tensors for digest in tensor.chunks if digest not in present}
    missing = tuple(manifest.first_chunks(wanted))
    missing_nbytes = sum(map(attrgetter("nbytes"), missing))
    return Delta(missing, missing_nbytes, manifest.nbytes - missing_nbytes)
