"""Manifests that this node has seen, on its disk by digest, so that a version's layout need not be
asked for or hashed twice.

A file counts only if its sha256 is its name. The folder is bounded; what was not used for longest
goes.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

from hotweights_common import files
from hotweights_planner.errors import BadManifest
from hotweights_planner.manifest import Manifest, parse

log = logging.getLogger(__name__)

MAX_FILES = 16  # one that went is asked for again, which costs time and nothing else


class ManifestCache:
    """A folder of manifests. Its methods may be called from any thread."""

    def __init__(self, folder: Path, max_files: int = MAX_FILES) -> None:
        self._folder = folder
        self._max_files = max_files

    def get(self, digest: str) -> Manifest | None:
        """The manifest, if it is here and whole."""
        path = self._path(digest)
        try:
            manifest = parse(path.read_bytes(), str(path), digest)
            os.utime(path)  # the order of last use
        except FileNotFoundError:
            return None
        except (OSError, BadManifest) as error:
            log.warning("the kept manifest %s is of no use and is fetched again: %s", path, error)
            return None
        return manifest

    def put(self, manifest: Manifest) -> None:
        """Keep it. A disk that does not take it costs time later, nothing else."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            files.replace(self._path(manifest.digest), manifest.canonical, 0o600)
            kept = sorted(self._folder.glob("*.json"), key=lambda path: path.stat().st_mtime)
            # all but the last used
            for path in kept[: -self._max_files]:
                path.unlink(missing_ok=True)
        except OSError as error:
            log.warning("manifest %s is not kept: %s", manifest.digest, error)

    def _path(self, digest: str) -> Path:
        return self._folder / f"{digest.removeprefix('sha256:')}.json"
