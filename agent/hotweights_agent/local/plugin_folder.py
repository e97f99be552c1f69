"""Puts the plugin, as it was built into the agent's image, where the node's pods find it: ``<run
folder>/plugin/<version>``.

A version's folder appears whole or not at all, and pods that use an older version keep theirs. The
run folder is empty after a reboot, while pods still name the version that they were created with;
so copies are kept on the disk and laid out again. No agent knows which versions the pods of its
node name, hence a bound: the versions that agents of this node started with last. The agent does
not import the plugin and does not know what is in it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
from pathlib import Path

from hotweights_common.errors import HotweightsError

# a bound, because nobody tells which versions pods still name
KEPT_VERSIONS = 5


class PluginNotInstalled(HotweightsError):
    """The folder could not be put there."""


def install(built: Path, run_folder: Path, version: str) -> Path | None:
    """Copy the built plugin, unless it is there already; where it is. None: the image has none."""
    if not built.is_dir():
        return None
    place = run_folder / "plugin" / version
    try:
        run_folder.mkdir(parents=True, exist_ok=True)
        run_folder.chmod(0o755)
        _put(built, place)
    except OSError as error:
        text = (
            f"the plugin cannot be installed into {place}: {error}; the agent must own its "
            "run_folder"
        )
        raise PluginNotInstalled(text) from error
    return place


def keep(built: Path, kept: Path, run_folder: Path, version: str) -> list[str]:
    """Keep a copy of the built plugin in ``kept``, and lay out what was kept before and is gone;
    which versions that were.
    """
    try:
        if built.is_dir():
            _put(built, kept / version)
            os.utime(kept / version)  # the order of last use
        versions = _prune(kept) if kept.is_dir() else []
        missing = [
            name
            for name in versions
            if name != version and not (run_folder / "plugin" / name).exists()
        ]
        for name in missing:
            _put(kept / name, run_folder / "plugin" / name)
    except OSError as error:
        text = (
            f"earlier versions of the plugin cannot be kept in {kept} and laid out in "
            f"{run_folder}: {error}"
        )
        raise PluginNotInstalled(text) from error
    return missing


def _prune(kept: Path) -> list[str]:
    """Remove what is beyond the bound, and what an agent left half done when it was killed; the
    versions that stay.
    """
    # the last used first; what starts with a dot is half done
    folders = sorted(kept.iterdir(), key=lambda path: path.stat().st_mtime_ns, reverse=True)
    stay = [path for path in folders if not path.name.startswith(".")][:KEPT_VERSIONS]
    for path in folders:
        if path not in stay:
            shutil.rmtree(path)
    return [path.name for path in stay]


def _put(source: Path, place: Path) -> None:
    """A copy that everybody can read, whole or not at all; nothing when it is there already."""
    # by content: an image may be built anew under the same version
    if _content(place) == _content(source):
        return
    place.parent.mkdir(parents=True, exist_ok=True)
    place.parent.chmod(0o755)
    with tempfile.TemporaryDirectory(prefix=".new-", dir=place.parent) as beside:
        new, old = Path(beside) / "new", Path(beside) / "old"
        shutil.copytree(source, new)
        for path in (new, *new.rglob("*")):
            path.chmod(0o755 if path.is_dir() else 0o644)
        # a folder cannot be replaced by another in one step: for a moment there is none
        with contextlib.suppress(FileNotFoundError):
            place.replace(old)
        new.replace(place)


def _content(folder: Path) -> dict[str, str]:
    """Every file's digest, by its path in the folder; bytecode does not count."""
    files = (
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and "__pycache__" not in path.parts
    )
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }
