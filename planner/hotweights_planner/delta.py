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
    """The chunks of ``manifest`` whose digests are not in ``present``. Raises nothing; the manifest
    is taken as checked (no digest stands for two sizes).
    """
    chunks = (digest for tensor in manifest.tensors for digest in tensor.chunks)
    # a dictionary, not a set: it keeps the order
    missing = dict.fromkeys(digest for digest in chunks if digest not in present)
    whole = manifest.chunk_bytes
    # only a tensor's last chunk may be shorter, so all others need not be looked at
    lasts = {
        tensor.chunks[-1]: part for tensor in manifest.tensors if (part := tensor.nbytes % whole)
    }
    missing_nbytes = len(missing) * whole - sum(
        whole - part for digest, part in lasts.items() if digest in missing
    )
    return Delta(tuple(missing), missing_nbytes, manifest.nbytes - missing_nbytes)
