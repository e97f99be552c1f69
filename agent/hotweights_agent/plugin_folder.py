"""Puts the plugin, as it was built into the agent's image, where the node's pods find it: ``<run folder>/plugin/<version>``.

A version's folder appears whole or not at all, and pods that use an older version keep theirs. The agent does not import the
plugin and does not know what is in it.
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import tempfile
from pathlib import Path


class PluginNotInstalled(Exception):
    """The folder could not be put there."""


def install(built: Path, run_folder: Path, version: str) -> Path | None:
    """Copy the built plugin, unless it is there already; where it is. None: the image has none."""
    if not built.is_dir():
        return None
    place = run_folder / "plugin" / version
    try:
        if _content(place) == _content(built):
            return place
        place.parent.mkdir(parents=True, exist_ok=True)
        run_folder.chmod(0o755)
        place.parent.chmod(0o755)
        with tempfile.TemporaryDirectory(prefix=".new-", dir=place.parent) as beside:
            new, old = Path(beside) / "new", Path(beside) / "old"
            shutil.copytree(built, new)
            for path in (new, *new.rglob("*")):
                path.chmod(0o755 if path.is_dir() else 0o644)
            with contextlib.suppress(FileNotFoundError):
                place.replace(old)
            new.replace(place)
    except OSError as error:
        text = f"the plugin cannot be installed into {place}: {error}; the agent must own its run_folder"
        raise PluginNotInstalled(text) from error
    return place


def _content(folder: Path) -> dict[str, str]:
    """Every file's digest, by its path in the folder; bytecode does not count."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and "__pycache__" not in path.parts)
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
