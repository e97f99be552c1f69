"""Manifests in files, beside the weights or away from them, as `publish` writes them."""

from __future__ import annotations

from pathlib import Path

from hotweights.files import read_bounded
from hotweights_planner.manifest import MAX_MANIFEST_NBYTES
from hotweights_planner.published import Published, parse_published

MAX_NBYTES = MAX_MANIFEST_NBYTES + (1 << 16)
"""Of a file: a manifest, and on top 64 KiB for the path of its source."""


def read_published(path: Path) -> Published:
    """The manifest of a file, and the source that it names; raises `BadManifest` or
    `SourceUnavailable`.
    """
    return parse_published(read_text(path), str(path))


def read_text(path: Path) -> bytes:
    """The bytes of a file that is no larger than a manifest may be."""
    return read_bounded(
        path, MAX_NBYTES, "write it with `hotweights publish`, or name another file"
    )
