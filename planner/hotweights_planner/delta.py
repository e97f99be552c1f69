"""What a version needs that a node does not have: each distinct chunk once, in load order.

It asks only whether a digest is there, never where or whose it is. There may be a million, so they
stay digests: a `Chunk` each would take ten times as long, most of it in Python's garbage collector.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass

from hotweights_planner.manifest import Manifest


@dataclass(frozen=True, slots=True)
class Delta:
    """``missing_nbytes + reused_nbytes`` are the version's bytes (equal chunks are reused)."""

    missing: tuple[str, ...]
    """The digests in load order, each once; `Manifest.first_chunks` says whence."""
    missing_nbytes: int
    reused_nbytes: int


def delta(manifest: Manifest, present: Container[str]) -> Delta:
    """The chunks of ``manifest`` whose digests are not in ``present``."""
    chunks = (digest for tensor in manifest.tensors for digest in tensor.chunks)
    missing = dict.fromkeys(digest for digest in chunks if digest not in present)
    whole = manifest.chunk_bytes
    lasts = {
        tensor.chunks[-1]: part for tensor in manifest.tensors if (part := tensor.nbytes % whole)
    }
    missing_nbytes = len(missing) * whole - sum(
        whole - part for digest, part in lasts.items() if digest in missing
    )
    return Delta(tuple(missing), missing_nbytes, manifest.nbytes - missing_nbytes)
