"""Files that are written whole or not at all, whenever the power fails."""

from __future__ import annotations

import os
from pathlib import Path


def replace(path: Path, content: bytes, mode: int) -> None:
    """Give ``path`` this content and these permissions in one step: readers see all of it or all of the old. Raises `OSError`.

    The new file is made beside it, because only within one file system a rename is one step. Its name is the process's, so that what
    a killed process leaves is overwritten by the next one of that number and does not grow into a heap.
    """
    beside = path.with_name(f".{path.name}.new-{os.getpid()}")
    try:
        with beside.open("wb") as file:
            os.fchmod(file.fileno(), mode)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # else the name may be on the disk before the bytes are
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Have the names in a folder outlive the power. Raises `OSError`."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
