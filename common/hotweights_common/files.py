"""Files that are written whole or not at all, whenever the power fails."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def replace(path: Path, content: bytes, mode: int) -> None:
    """Give ``path`` this content and these permissions in one step: readers see all of it or all of
    the old. Raises `OSError`.

    The new file is made beside it, because only within one file system a rename is one step; under
    a name that nobody can have prepared and no other writer has.
    """
    beside: Path | None = None
    try:
        with tempfile.NamedTemporaryFile(
            dir=path.parent, prefix=f".{path.name}.", delete=False
        ) as file:
            beside = Path(file.name)
            # before the content, so that it never stands there with other permissions
            os.fchmod(file.fileno(), mode)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # else the name may be on the disk before the bytes are
        beside.replace(path)
        beside = None  # nothing is left to remove
    finally:
        if beside is not None:
            beside.unlink(missing_ok=True)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Have the names in a folder outlive the power. Raises `OSError`."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
